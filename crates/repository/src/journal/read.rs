//! What a journal holds, and the changes in it.

use std::sync::Arc;

use mainstay_core::{Change, Code, Error, Position, Progress, Result, StreamRef, Time};

use super::object::{Head, Stored, StreamId};
use super::{is_whole, read_body, read_header};
use crate::names;
use crate::shared::Shared;

/// A stream of changes as it is stored.
pub struct Journal {
    shared: Arc<Shared>,
    id: StreamId,
    stream: StreamRef,
    parts: Vec<Part>,
    /// What could not be read, by number.
    damage: Vec<(u64, String)>,
}

struct Part {
    stored: Stored,
    head: Head,
}

/// A stretch of a stream in which nothing is missing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    pub start: Position,
    pub end: Position,
    /// The earliest and the latest time that its changes tell.
    pub first: Option<Time>,
    pub last: Option<Time>,
    /// Content bytes.
    pub bytes: u64,
}

/// What is missing between two stretches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hole {
    pub start: Position,
    pub end: Position,
    /// Between which times, as far as the changes around it tell.
    pub after: Option<Time>,
    pub before: Option<Time>,
    pub why: String,
}

/// Puts an object behind the one that it names as the one before it. What lies between the two was torn when its writer
/// died, and another took its place; whoever may only write cannot take anything whole away. Why the object is passed over
/// itself, if it fits nowhere.
fn add(shared: &Shared, parts: &mut Vec<Part>, part: Part) -> Result<Option<&'static str>> {
    let previous = part.stored.header.previous;
    let before = match parts.iter().rposition(|earlier| earlier.stored.hash == previous) {
        Some(index) => index + 1,
        None if previous == [0; 32] => 0,
        // The one before it is lost, or was trimmed.
        None => parts.len(),
    };
    if parts.get(..before).and_then(<[Part]>::last).is_some_and(|last| last.head.end > part.head.start) {
        return Ok(Some("it goes back in the stream"));
    }
    for torn in parts.get(before..).unwrap_or_default() {
        if is_whole(shared, &torn.stored)? {
            return Ok(Some("it would take the place of what is whole"));
        }
    }
    parts.truncate(before);
    parts.push(part);
    Ok(None)
}

impl Journal {
    /// `None` when nothing of the stream can be read.
    pub(super) fn open(shared: &Arc<Shared>, id: StreamId, mut numbers: Vec<u64>) -> Result<Option<Self>> {
        numbers.sort_unstable();
        let (mut parts, mut damage): (Vec<Part>, _) = (Vec::new(), Vec::new());
        let mut next = shared.state().trimmed(&id.0);
        numbers.retain(|number| *number >= next);
        for number in numbers {
            if number > next {
                damage.push((next, format!("{} objects from here on are gone", number - next)));
            }
            next = number.saturating_add(1);
            match Self::part(shared, id, number) {
                Ok(Some(part)) => {
                    damage.extend(add(shared, &mut parts, part)?.map(|why| (number, why.to_owned())));
                }
                Ok(None) => {}
                Err(error) if matches!(error.code(), Code::Integrity | Code::TooNew) => {
                    damage.push((number, error.chain().join(": ")));
                }
                Err(error) => return Err(error),
            }
        }
        let Some(stream) = parts.first().map(|part| part.head.stream.clone()) else { return Ok(None) };
        Ok(Some(Self { shared: Arc::clone(shared), id, stream, parts, damage }))
    }

    fn part(shared: &Shared, id: StreamId, number: u64) -> Result<Option<Part>> {
        let Some(stored) = read_header(shared, id, number)? else { return Ok(None) };
        let head = stored.head(shared.family(), shared.ring.domain(stored.header.domain)?)?;
        Ok(Some(Part { stored, head }))
    }

    pub fn id(&self) -> StreamId {
        self.id
    }

    pub fn stream(&self) -> &StreamRef {
        &self.stream
    }

    /// Objects that cannot be read, and why.
    pub fn damage(&self) -> &[(u64, String)] {
        &self.damage
    }

    /// Where the first object starts that tells of a time behind `time`; `None` when there is none.
    pub fn since(&self, time: Time) -> Option<Position> {
        let part = self.parts.iter().find(|part| part.head.last > Some(time))?;
        Some(part.head.start.clone())
    }

    /// Content bytes of what [`Repository::trim_journal`] would give up.
    ///
    /// [`Repository::trim_journal`]: crate::Repository::trim_journal
    pub fn bytes_before(&self, position: &Position) -> u64 {
        let before = self.parts.iter().take_while(|part| part.head.end <= *position);
        before.map(|part| part.head.bytes).sum()
    }

    /// The number of the object that holds the change at `position`, or of the first one behind it.
    pub(super) fn number_at(&self, position: &Position) -> u64 {
        let index = self.parts.partition_point(|part| part.head.end <= *position);
        match self.parts.get(index) {
            Some(part) => part.stored.header.number,
            None => self.parts.last().map_or(0, |part| part.stored.header.number + 1),
        }
    }

    /// Stretches without a hole, in order.
    pub fn stretches(&self) -> Vec<Stretch> {
        let mut stretches: Vec<Stretch> = Vec::new();
        for Part { head, .. } in &self.parts {
            let (first, last) = (head.first, head.last);
            match stretches.last_mut().filter(|stretch| stretch.end == head.start) {
                Some(stretch) => {
                    stretch.end = head.end.clone();
                    stretch.first = stretch.first.into_iter().chain(first).min();
                    stretch.last = stretch.last.max(last);
                    stretch.bytes += head.bytes;
                }
                None => stretches.push(Stretch {
                    start: head.start.clone(),
                    end: head.end.clone(),
                    first,
                    last,
                    bytes: head.bytes,
                }),
            }
        }
        stretches
    }

    /// What is missing between the stretches, in order.
    pub fn holes(&self) -> Vec<Hole> {
        let mut holes = Vec::new();
        for pair in self.parts.windows(2) {
            let [before, after] = pair else { continue };
            if before.head.end == after.head.start {
                continue;
            }
            let between = before.stored.header.number + 1..after.stored.header.number;
            let lost = self.damage.iter().find(|(number, _)| between.contains(number));
            let why = match (&after.head.gap, lost) {
                (Some(why), _) => why.clone(),
                (None, Some((_, why))) => format!("what was stored is damaged: {why}"),
                (None, None) => "what was stored is gone".to_owned(),
            };
            holes.push(Hole {
                start: before.head.end.clone(),
                end: after.head.start.clone(),
                after: before.head.last,
                before: after.head.first,
                why,
            });
        }
        holes
    }

    /// The changes from the one that holds `from` on, in order. Ends at the end of the journal; at a hole, or at what
    /// is damaged, with [`Code::Integrity`]. Needs the power to read.
    ///
    /// Errors: [`Code::NotFound`] when no stretch holds `from`.
    pub fn read<'a>(&'a self, from: &Position) -> Result<impl Iterator<Item = Result<Change>> + use<'a>> {
        let index = self.parts.partition_point(|part| part.head.end <= *from);
        if self.parts.get(index).is_none_or(|part| part.head.start > *from)
            && self.parts.last().is_none_or(|part| part.head.end != *from)
        {
            let what = format!("the journal {} does not reach so far", self.stream.name);
            return Err(Error::new(Code::NotFound, what));
        }
        self.shared.ring.content_secret()?;
        let from = from.clone();
        let changes = (index..self.parts.len()).flat_map(move |part| {
            let changes = match self.follows(part, index).and_then(|()| self.changes(part)) {
                Ok(changes) => changes.into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            };
            changes.into_iter()
        });
        let changes =
            changes.skip_while(move |change| change.as_ref().is_ok_and(|change| change.end <= from));
        Ok(changes.scan(false, |failed, change| {
            let goes_on = !*failed;
            *failed = change.is_err();
            goes_on.then_some(change)
        }))
    }

    fn follows(&self, index: usize, first: usize) -> Result<()> {
        let before = if index == first { None } else { self.parts.get(index - 1) };
        match (before, self.parts.get(index)) {
            (Some(before), Some(part)) if before.head.end != part.head.start => {
                Err(Error::integrity(format!("the journal {} has a hole", self.stream.name)))
            }
            _ => Ok(()),
        }
    }

    fn changes(&self, index: usize) -> Result<Vec<Change>> {
        let part =
            self.parts.get(index).ok_or_else(|| Error::bug("a part of a journal that is not there"))?;
        let body = read_body(&self.shared, &part.stored)?;
        let secret = self.shared.ring.content_secret()?;
        part.stored.changes(self.shared.family(), secret, &part.head, &body)
    }

    /// The objects whose headers are damaged, and what is wrong with each.
    pub(super) fn damaged(&self) -> Vec<String> {
        let line = |(number, why): &(u64, String)| format!("{}: {why}", names::journal(&self.id.0, *number));
        self.damage.iter().map(line).collect()
    }

    /// As [`Journal::damaged`], having read every stored byte.
    pub(super) fn verify(&self, progress: &dyn Progress) -> Result<Vec<String>> {
        let mut damaged = self.damaged();
        for part in &self.parts {
            progress.check()?;
            match read_body(&self.shared, &part.stored).and_then(|body| part.stored.check_body(&body)) {
                Err(error) if matches!(error.code(), Code::Integrity | Code::NotFound) => {
                    let name = names::journal(&self.id.0, part.stored.header.number);
                    damaged.push(format!("{name}: {}", error.chain().join(": ")));
                }
                checked => checked?,
            }
        }
        Ok(damaged)
    }
}
