//! Where the log behind a database of a point lies in its journal.

use mainstay_core::{Change, Position, Result};
use mainstay_repository::{Journal, Stretch};
use mainstay_workloads::sqlite::{Base, Place, changes_start};

/// What follows on a base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) stretch: Stretch,
    /// Whether another stretch comes behind it.
    pub(super) is_last: bool,
    /// The change to begin with; the end of the stretch when nothing has followed yet.
    pub(super) from: Position,
    /// Frames of the generation `salts` up to here are in the base.
    pub(super) after: u32,
    pub(super) salts: [u32; 2],
}

/// Finds what follows on a base; `None` when nothing does.
pub(super) fn link(journal: &Journal, base: &Base) -> Result<Option<Link>> {
    let hint = base.journal.map(|place| place.position());
    if base.end.is_none() && hint.is_none() {
        return Ok(None);
    }
    let stretches = journal.stretches();
    let count = stretches.len();
    for (index, stretch) in stretches.into_iter().enumerate() {
        let from = hint.as_ref().map_or(&stretch.start, |hint| hint.max(&stretch.start)).clone();
        if from > stretch.end {
            continue;
        }
        if let Some((from, after)) = within(journal, base, &stretch, &from)? {
            let salts = base.end.map_or([0, 0], |end| end.salts);
            return Ok(Some(Link { is_last: index + 1 == count, stretch, from, after, salts }));
        }
    }
    Ok(None)
}

fn within(
    journal: &Journal,
    base: &Base,
    stretch: &Stretch,
    from: &Position,
) -> Result<Option<(Position, u32)>> {
    // Nothing may have followed yet.
    if let Some(last) = Place::from_position(&stretch.end)
        && *from == stretch.end
    {
        let same = base.end.is_none_or(|end| (end.salts, end.frame) == (last.salts, last.frame));
        return Ok(same.then(|| (stretch.end.clone(), 0)));
    }
    for change in changes(journal, from, stretch)? {
        let change = change?;
        if let Some(found) = fits(base, &change) {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn fits(base: &Base, change: &Change) -> Option<(Position, u32)> {
    let (start, end) = (Place::from_position(&change.start)?, Place::from_position(&change.end)?);
    let Some(state) = base.end else {
        return changes_start(&start, &end).then(|| (change.start.clone(), 0));
    };
    let same =
        |place: &Place| (place.salts, place.frame, place.sums) == (state.salts, state.frame, state.sums);
    if same(&start) {
        return Some((change.start.clone(), state.frame));
    }
    if same(&end) {
        return Some((change.end.clone(), state.frame));
    }
    (end.salts == state.salts && end.frame > state.frame).then(|| (change.start.clone(), state.frame))
}

/// The changes of a stretch from a position on.
pub(super) fn changes<'a>(
    journal: &'a Journal,
    from: &Position,
    stretch: &'a Stretch,
) -> Result<impl Iterator<Item = Result<Change>> + 'a> {
    // Behind its end there may be a hole, which nobody asks for.
    let mut ended = *from >= stretch.end;
    let all = if ended { None } else { Some(journal.read(from)?) };
    Ok(all.into_iter().flatten().take_while(move |change| {
        let goes_on = !ended;
        ended = change.as_ref().is_ok_and(|change| change.end >= stretch.end);
        goes_on
    }))
}
