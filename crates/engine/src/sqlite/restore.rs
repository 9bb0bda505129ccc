//! Recovery of databases: the file of a point, and the commits behind it up to a moment.

use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use mainstay_core::{
    Change, Code, Counts, Error, Event, ItemPath, Phase, Piece, Progress, Result, StreamReader, Time,
    WorkloadId,
};
use mainstay_repository::{Entry, Journal, PointInfo, PointReader, Repository};
use mainstay_workloads::sqlite::{
    Base, DESCRIPTION, Database, Description, KIND, Place, Replay, last_commit,
};

use super::link::{self, Link, link};
use crate::written::{empty_directory, new_file};

const DESCRIPTION_BYTES_MAX: usize = 16 << 20;
const LOG_HEADER_BYTES: usize = 32;

/// Where recovery stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// At the end of what the journal holds.
    End,
    /// After the last commit that was seen until this moment.
    Time(Time),
    /// After the last commit up to here.
    Place(Place),
}

/// What a recovery will do.
pub struct DatabasesPlan {
    /// The newest of the points that are used.
    pub point: PointInfo,
    pub until: Until,
    pub databases: Vec<DatabasePlan>,
    journals: Vec<Journal>,
}

/// What a recovery will do with one database.
#[derive(Clone, Debug)]
pub struct DatabasePlan {
    pub point: PointInfo,
    pub base: Base,
    /// What a person should know, if anything.
    pub note: Option<String>,
    link: Option<Link>,
    journal: Option<usize>,
}

/// A span within which any commit of a database can be recovered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    pub log: String,
    pub start: Place,
    pub end: Place,
    pub from: Time,
    pub until: Time,
    pub bytes: u64,
}

/// What a recovery made.
#[derive(Clone, Debug, Default)]
pub struct DatabasesRestored {
    pub counts: Counts,
    /// By database: the commit it is at, if that is known.
    pub databases: Vec<(String, Option<Place>)>,
    /// What SQLite's own check found, by database.
    pub damage: Vec<(String, String)>,
}

/// Points and journals of a workload, newest point first.
struct Known {
    points: Vec<(PointInfo, Description)>,
    journals: Vec<Journal>,
}

impl Known {
    fn load(repository: &Repository, workload: &WorkloadId) -> Result<Self> {
        repository.refresh()?;
        let mut points = Vec::new();
        for point in repository.points()?.into_iter().rev() {
            let is_one = point.workload.id == *workload && point.workload.kind.0 == KIND;
            if is_one && point.readable {
                let description = description(&repository.read(&point.id)?)?;
                points.push((point, description));
            }
        }
        let mut journals = repository.journals()?;
        journals.retain(|journal| journal.stream().workload.id == *workload);
        Ok(Self { points, journals })
    }

    fn journal(&self, database: &str) -> Option<usize> {
        let name = format!("log of {database}");
        self.journals.iter().position(|journal| journal.stream().name == name)
    }

    fn link(&self, base: &Base) -> Result<(Option<usize>, Option<Link>)> {
        let Some(index) = self.journal(&base.name) else { return Ok((None, None)) };
        let found = self.journals.get(index).map(|journal| link(journal, base)).transpose()?;
        Ok((Some(index), found.flatten()))
    }
}

fn description(reader: &PointReader) -> Result<Description> {
    let entry = entry(reader, DESCRIPTION.as_bytes())?;
    let (mut content, mut text, mut buffer) = (reader.stream(&entry)?, Vec::new(), vec![0; 64 << 10]);
    while let Piece::Data(length) = content.read(&mut buffer)? {
        text.extend_from_slice(buffer.get(..length).unwrap_or_default());
        if text.len() > DESCRIPTION_BYTES_MAX {
            return Err(Error::integrity(format!("{DESCRIPTION} is too long")));
        }
    }
    Description::from_json(&text)
}

fn entry(reader: &PointReader, path: &[u8]) -> Result<Entry> {
    let name = String::from_utf8_lossy(path).into_owned();
    let path = ItemPath::new(path)
        .map_err(|error| Error::integrity("a point names a database impossibly").because(error))?;
    reader.lookup(&path)?.ok_or_else(|| Error::integrity(format!("the point has no {name}")))
}

/// The spans within which any commit can be recovered, by database.
pub fn spans(repository: &Repository, workload: &WorkloadId) -> Result<Vec<Span>> {
    let known = Known::load(repository, workload)?;
    let mut spans: Vec<Span> = Vec::new();
    for (point, description) in known.points.iter().rev() {
        for base in &description.databases {
            let (Some(journal), Some(link)) = known.link(base)? else { continue };
            let log = known.journals.get(journal).map(|journal| journal.stream().name.clone());
            let (log, end) = (log.unwrap_or_default(), Place::from_position(&link.stretch.end));
            let (Some(start), Some(end)) = (Place::from_position(&link.from), end) else { continue };
            if spans.iter().any(|span| (&span.log, span.end) == (&log, end)) {
                continue;
            }
            let (from, bytes) = (Time(base.moment), link.stretch.bytes);
            let until = link.stretch.last.unwrap_or(from).max(from).max(point.moment.min(from));
            spans.push(Span { log, start, end, from, until, bytes });
        }
    }
    spans.sort_by(|one, other| (&one.log, one.start).cmp(&(&other.log, other.start)));
    Ok(spans)
}

/// Finds the points and logs that lead to `until`. `only`: one database, by its name in points.
///
/// Errors: [`Code::NotFound`] when nothing leads there, with what does.
pub fn plan_databases(
    repository: &Repository,
    workload: &WorkloadId,
    until: Until,
    only: Option<&str>,
) -> Result<DatabasesPlan> {
    let known = Known::load(repository, workload)?;
    let before = |point: &PointInfo| !matches!(until, Until::Time(time) if point.moment > time);
    let newest = known.points.iter().find(|(point, _)| before(point));
    let Some((point, description)) = newest else { return Err(nothing_leads_there(&known)) };
    let names: Vec<String> = description.databases.iter().map(|base| base.name.clone()).collect();
    let names: Vec<String> = names.into_iter().filter(|name| only.is_none_or(|only| only == name)).collect();
    if names.is_empty() {
        let what = format!("there is no database {:?} in the points", only.unwrap_or_default());
        return Err(Error::new(Code::NotFound, what).hint("mainstay ls WORKLOAD shows what there is"));
    }
    if matches!(until, Until::Place(_)) && names.len() > 1 {
        return Err(Error::new(Code::Usage, "a place is of one log, and there are several databases")
            .hint("name the one that is meant with --database"));
    }
    let mut databases = Vec::new();
    for name in &names {
        databases.push(database(&known, name, until)?.ok_or_else(|| nothing_leads_there(&known))?);
    }
    Ok(DatabasesPlan { point: point.clone(), until, databases, journals: known.journals })
}

/// The newest base of a database that leads there.
fn database(known: &Known, name: &str, until: Until) -> Result<Option<DatabasePlan>> {
    for (point, description) in &known.points {
        let Some(base) = description.databases.iter().find(|base| base.name == name) else { continue };
        let (journal, link) = known.link(base)?;
        let note = match (&link, until) {
            (_, Until::Time(time)) if base.moment > time.0 => continue,
            (Some(link), Until::Time(time)) if link.is_last => silent_since(name, base, link, time),
            (Some(link), Until::Time(time)) if link.stretch.last < Some(time) => return Ok(None),
            (Some(link), Until::Place(place)) if !reaches(link, place) => continue,
            (Some(_), _) | (None, Until::End) => None,
            (None, Until::Place(_)) => continue,
            (None, Until::Time(_)) if base.has_log => return Ok(None),
            (None, Until::Time(_)) => {
                Some(format!("{name} has no log: it comes back as it was when the point was taken"))
            }
        };
        return Ok(Some(DatabasePlan { point: point.clone(), base: base.clone(), note, link, journal }));
    }
    Ok(None)
}

fn silent_since(name: &str, base: &Base, link: &Link, time: Time) -> Option<String> {
    let last = link.stretch.last.unwrap_or(Time(base.moment)).max(Time(base.moment));
    (last < time).then(|| {
        let seconds = time.since(last).as_secs();
        format!("the log of {name} says nothing of the last {seconds} seconds before that moment")
    })
}

fn reaches(link: &Link, place: Place) -> bool {
    let (Some(from), Some(end)) = (Place::from_position(&link.from), Place::from_position(&link.stretch.end))
    else {
        return false;
    };
    let key = |place: &Place| (place.generation, place.frame);
    let first = (from.generation, from.frame.max(if from.salts == link.salts { link.after } else { 0 }));
    first <= key(&place) && key(&place) <= key(&end)
}

fn nothing_leads_there(known: &Known) -> Error {
    let error = Error::new(Code::NotFound, "that moment cannot be recovered");
    if known.points.is_empty() {
        return error.hint("there is no point of these databases: mainstay db backup");
    }
    let mut texts = Vec::new();
    for (_, description) in known.points.iter().rev() {
        for base in &description.databases {
            let Ok((_, Some(link))) = known.link(base) else { continue };
            let until = link.stretch.last.unwrap_or(Time(base.moment)).max(Time(base.moment));
            let place = Place::from_position(&link.stretch.end).unwrap_or_default();
            let text = format!(
                "{} to {place} (seconds since 1970: {} to {})",
                base.name,
                Time(base.moment).seconds(),
                until.seconds()
            );
            if !texts.contains(&text) {
                texts.push(text);
            }
        }
    }
    error.hint(format!("these spans can be: {}", texts.join(", ")))
}

/// Writes databases into a new directory, each as it was after the last commit that the plan reaches, and lets SQLite check
/// them.
///
/// Errors: [`Code::AlreadyExists`] when there is something in the directory already.
pub fn restore_databases(
    repository: &Repository,
    plan: &DatabasesPlan,
    to: &Path,
    progress: &dyn Progress,
) -> Result<DatabasesRestored> {
    progress.event(&Event::Phase(Phase::Copying));
    empty_directory(to)?;
    let mut restored = DatabasesRestored::default();
    for database in &plan.databases {
        progress.check()?;
        let path = to.join(std::ffi::OsStr::from_bytes(database.base.name.as_bytes()));
        let reader = repository.read(&database.point.id)?;
        let file = write(&reader, &database.base, &path, progress)?;
        let mut replay = Replay::new(&file, database.base.page_bytes);
        let own = own_log(&reader, &database.base, &mut replay)?;
        let reached = replay_journal(plan, database, &mut replay, progress)?;
        replay.finish()?;
        restored.counts.items += 1;
        restored.counts.bytes += file.metadata().map_or(0, |metadata| metadata.len());
        restored.databases.push((database.base.name.clone(), reached.or(own)));
        drop(file);
        let found = Database::quick_check(&path)?;
        restored.damage.extend(found.into_iter().map(|line| (database.base.name.clone(), line)));
    }
    Ok(restored)
}

/// Writes the file of a database as the point has it.
fn write(reader: &PointReader, base: &Base, path: &Path, progress: &dyn Progress) -> Result<File> {
    let entry = entry(reader, base.name.as_bytes())?;
    progress.event(&Event::Item(&entry.path));
    let file = new_file(reader.stream(&entry)?, path, entry.metadata.mode, progress)?;
    if rustix::process::geteuid().is_root() {
        let owner = (Some(entry.metadata.uid), Some(entry.metadata.gid));
        std::os::unix::fs::fchown(&file, owner.0, owner.1)
            .map_err(|error| Error::io(format!("cannot write {}", path.display()), error))?;
    }
    Ok(file)
}

/// Puts the log that the point itself has into the file.
fn own_log(reader: &PointReader, base: &Base, replay: &mut Replay<'_>) -> Result<Option<Place>> {
    let path = [base.name.as_bytes(), b"-wal"].concat();
    let path = ItemPath::new(path)
        .map_err(|error| Error::integrity("a point names a log impossibly").because(error))?;
    let Some(entry) = reader.lookup(&path)? else { return Ok(None) };
    let mut content = reader.stream(&entry)?;
    let frame_bytes = 24 + base.page_bytes as usize;
    let per_change = ((Change::BYTES_MAX - LOG_HEADER_BYTES) / frame_bytes).max(1);
    let mut at = Place::default();
    let mut reached = None;
    loop {
        let header = if at.frame == 0 { LOG_HEADER_BYTES } else { 0 };
        let bytes = fill(content.as_mut(), header + per_change * frame_bytes)?;
        let frames = bytes.len().saturating_sub(header) / frame_bytes;
        if frames == 0 {
            return Ok(reached);
        }
        if at.frame == 0 {
            let word = |at: usize| {
                let word = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
                word.map_or(0, |word| u32::from_be_bytes(*word))
            };
            at.salts = [word(16), word(20)];
        }
        let end = Place { frame: at.frame.saturating_add(frames as u32), ..at };
        let change = Change { start: at.position(), end: end.position(), time: None, bytes };
        reached = replay.change(&change, 0, u32::MAX)?.or(reached);
        at = end;
    }
}

/// Up to so many bytes; fewer at the end.
fn fill(content: &mut dyn StreamReader, length: usize) -> Result<Vec<u8>> {
    let (mut bytes, mut filled) = (vec![0; length], 0);
    while filled < length {
        match content.read(bytes.get_mut(filled..).unwrap_or_default())? {
            Piece::Data(read) => filled += read,
            Piece::Hole(zeros) => {
                filled = filled.saturating_add(usize::try_from(zeros).unwrap_or(usize::MAX)).min(length);
            }
            Piece::End => break,
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}

/// Puts the commits of the journal behind it, up to where the plan says.
fn replay_journal(
    plan: &DatabasesPlan,
    database: &DatabasePlan,
    replay: &mut Replay<'_>,
    progress: &dyn Progress,
) -> Result<Option<Place>> {
    let (Some(link), Some(journal)) =
        (&database.link, database.journal.and_then(|index| plan.journals.get(index)))
    else {
        return Ok(None);
    };
    // A journal may end, or a hole begin, in the middle of a transaction: nothing behind the last commit is put anywhere.
    let Some(last) = last_commit_until(journal, link, plan.until)? else { return Ok(None) };
    for change in changes(journal, link)? {
        progress.check()?;
        let (change, end) = change?;
        if end.generation > last.generation {
            break;
        }
        let after = if end.salts == link.salts { link.after } else { 0 };
        let until = if end.generation == last.generation { last.frame } else { u32::MAX };
        replay.change(&change, after, until)?;
        if (end.generation, end.frame) >= (last.generation, last.frame) {
            break;
        }
    }
    Ok(Some(last))
}

/// The last commit that is wanted.
fn last_commit_until(journal: &Journal, link: &Link, until: Until) -> Result<Option<Place>> {
    let mut found = None;
    for change in changes(journal, link)? {
        let (change, end) = change?;
        let (is_later, frames) = match until {
            Until::End => (false, u32::MAX),
            Until::Time(time) => (change.time > Some(time), u32::MAX),
            Until::Place(place) if end.generation == place.generation => (false, place.frame),
            Until::Place(place) => (end.generation > place.generation, u32::MAX),
        };
        if is_later {
            break;
        }
        found = last_commit(&change, frames).or(found);
    }
    Ok(found)
}

/// The changes behind a base, within their stretch, and where each ends.
fn changes<'a>(
    journal: &'a Journal,
    link: &'a Link,
) -> Result<impl Iterator<Item = Result<(Change, Place)>> + 'a> {
    let within = link::changes(journal, &link.from, &link.stretch)?;
    Ok(within.map(|change| {
        let change = change?;
        let end =
            Place::from_position(&change.end).ok_or_else(|| Error::integrity("a journal of another kind"))?;
        Ok((change, end))
    }))
}
