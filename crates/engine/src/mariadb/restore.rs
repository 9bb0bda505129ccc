//! Recovery of a server: the files of a point made consistent, and the log behind it played back.

use std::fs::File;
use std::io::{BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{
    Clock, Code, Counts, Error, Event, ItemPath, Kind, Phase, Piece, Progress, Result, Time, WorkloadId,
};
use mainstay_repository::{Journal, PointInfo, PointReader, Repository, Stretch};
use mainstay_workloads::mariadb::{
    self, DATA, DESCRIPTION, Description, FILE_START, Gtid, KIND, LogFile, PARTS, Place, PrivateServer,
    give_to_server, log_bytes, part_offset, prepare,
};

use super::stream;
use crate::written::{empty_directory, new_file, write};

const DESCRIPTION_BYTES_MAX: usize = 16 << 20;
/// No event of a log is longer.
const EVENT_BYTES_MAX: u64 = 1 << 30;
/// The directory with the log that is played back, while that is done. No database is called so.
const LOGS: &str = "#mainstay-logs";

/// Where recovery stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// At the end of what the journal holds.
    End,
    /// With the files of the point.
    Consistent,
    /// Before the first transaction after this moment; logs count in seconds.
    Time(Time),
    /// Before a place: file by number, and offset.
    Place(u32, u64),
    /// Before this transaction.
    Gtid(Gtid),
}

/// What a recovery will do.
pub struct ServerPlan {
    pub point: PointInfo,
    pub description: Description,
    pub until: Until,
    /// What a person should know, if anything.
    pub note: Option<String>,
    /// The journal, and the stretch of it that is played back.
    log: Option<(Journal, Stretch)>,
}

/// A span within which any moment can be recovered.
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
pub struct ServerRestored {
    pub counts: Counts,
    /// It is as of this place.
    pub place: Option<String>,
}

/// Files that a server can be started on, but for the log behind them.
pub struct Prepared {
    pub counts: Counts,
}

fn description(reader: &PointReader) -> Result<Description> {
    let path = ItemPath::new(DESCRIPTION).unwrap_or_default();
    let entry = reader.lookup(&path)?;
    let entry = entry.ok_or_else(|| Error::integrity(format!("the point has no {DESCRIPTION}")))?;
    let (mut content, mut text, mut buffer) = (reader.stream(&entry)?, Vec::new(), vec![0; 64 << 10]);
    while let Piece::Data(length) = content.read(&mut buffer)? {
        text.extend_from_slice(buffer.get(..length).unwrap_or_default());
        if text.len() > DESCRIPTION_BYTES_MAX {
            return Err(Error::integrity(format!("{DESCRIPTION} is too long")));
        }
    }
    Description::from_json(&text)
}

/// Readable points of a server, newest first.
fn points(repository: &Repository, workload: &WorkloadId) -> Result<Vec<(PointInfo, Description)>> {
    let mut found = Vec::new();
    for point in repository.points()?.into_iter().rev() {
        if point.workload.id == *workload && point.workload.kind.0 == KIND && point.readable {
            let description = description(&repository.read(&point.id)?)?;
            found.push((point, description));
        }
    }
    Ok(found)
}

/// The stretch behind a point, and whether it is the last one of its journal.
fn behind(journal: &Journal, description: &Description) -> Option<(Stretch, bool)> {
    let place = description.place().position();
    let stretches = journal.stretches();
    let last = stretches.last()?.end.clone();
    let found = stretches.into_iter().find(|stretch| stretch.start <= place && place <= stretch.end)?;
    let is_last = found.end == last;
    Some((found, is_last))
}

fn journal_of<'a>(
    journals: &'a [Journal],
    point: &PointInfo,
    description: &Description,
) -> Option<&'a Journal> {
    let name = stream(&point.workload, description.log.as_deref()?).name;
    journals
        .iter()
        .find(|journal| journal.stream().workload.id == point.workload.id && journal.stream().name == name)
}

/// The spans within which any moment can be recovered: from each first point of a stretch of the log to its end.
pub fn spans(repository: &Repository, workload: &WorkloadId) -> Result<Vec<Span>> {
    let journals = repository.journals()?;
    let mut spans: Vec<Span> = Vec::new();
    for (point, description) in points(repository, workload)?.iter().rev() {
        let Some(journal) = journal_of(&journals, point, description) else { continue };
        let Some((stretch, _)) = behind(journal, description) else { continue };
        let Some(end) = Place::from_position(&stretch.end) else { continue };
        let log = journal.stream().name.clone();
        if spans.iter().any(|span| (&span.log, span.end) == (&log, end)) {
            continue;
        }
        let until = stretch.last.unwrap_or(point.moment).max(point.moment);
        let (start, from) = (description.place(), point.moment);
        spans.push(Span { log, start, end, from, until, bytes: stretch.bytes });
    }
    Ok(spans)
}

/// Finds the point and the log that lead to `until`.
///
/// Errors: [`Code::NotFound`] when nothing leads there, with what does.
pub fn plan_server(repository: &Repository, workload: &WorkloadId, until: Until) -> Result<ServerPlan> {
    repository.refresh()?;
    let mut journals = repository.journals()?;
    for (point, description) in points(repository, workload)? {
        let journal = journal_of(&journals, &point, &description);
        let found = journal.and_then(|journal| behind(journal, &description));
        let Some(note) = leads_to(&point, &description, found.as_ref(), until) else { continue };
        let at = journal.and_then(|journal| journals.iter().position(|other| other.id() == journal.id()));
        let log = at.zip(found).map(|(at, (stretch, _))| (journals.swap_remove(at), stretch));
        return Ok(ServerPlan { point, description, until, note, log });
    }
    Err(nothing_leads_there(&spans(repository, workload)?))
}

/// `None` when it does not; else what is to be said of it, if anything.
fn leads_to(
    point: &PointInfo,
    description: &Description,
    found: Option<&(Stretch, bool)>,
    until: Until,
) -> Option<Option<String>> {
    let quiet = |last: Option<Time>, time: Time| {
        let last = last.unwrap_or(point.moment).max(point.moment);
        let seconds = time.since(last).as_secs();
        (last < time)
            .then(|| format!("the log says nothing of the last {seconds} seconds before that moment"))
    };
    match (until, found) {
        (Until::End, None) => {
            Some(Some("there is no log behind the point: it comes back as it was then".into()))
        }
        (Until::End, Some(_)) | (Until::Consistent, _) => Some(None),
        (_, None) => None,
        (Until::Time(time), Some((stretch, is_last))) => {
            let reaches = *is_last || stretch.last >= Some(time);
            (point.moment <= time && reaches).then(|| quiet(stretch.last, time))
        }
        (Until::Place(file, offset), Some((stretch, _))) => {
            let place = Place { epoch: description.epoch, file, offset };
            let within = description.place() <= place && place.position() <= stretch.end;
            within.then_some(None)
        }
        (Until::Gtid(gtid), Some(_)) => {
            let before = description.gtid(gtid.domain).is_none_or(|last| last.sequence < gtid.sequence);
            before.then_some(None)
        }
    }
}

fn nothing_leads_there(spans: &[Span]) -> Error {
    let error = Error::new(Code::NotFound, "that moment cannot be recovered");
    let text = |span: &Span| {
        format!(
            "{} to {} (seconds since 1970: {} to {})",
            span.start,
            span.end,
            span.from.seconds(),
            span.until.seconds()
        )
    };
    match spans {
        [] => error.hint(
            "there is no point with an unbroken log behind it: mainstay db backup, and mainstay db follow",
        ),
        spans => error
            .hint(format!("these spans can be: {}", spans.iter().map(text).collect::<Vec<_>>().join(", "))),
    }
}

/// Writes the files of the plan's point into a new directory and has them made consistent.
///
/// Errors: [`Code::AlreadyExists`] when there is something in the directory already.
pub fn prepare_server(
    repository: &Repository,
    plan: &ServerPlan,
    to: &Path,
    clock: &Arc<dyn Clock>,
    progress: &dyn Progress,
) -> Result<Prepared> {
    progress.event(&Event::Phase(Phase::Copying));
    empty_directory(to)?;
    let reader = repository.read(&plan.point.id)?;
    let mut counts = Counts::default();
    for top in [DATA, PARTS] {
        let top =
            ItemPath::new(top).map_err(|error| Error::bug("a name of ours is no path").because(error))?;
        if reader.lookup(&top)?.is_none() {
            continue;
        }
        for entry in reader.walk(&top) {
            let entry = entry?;
            if entry.metadata.kind != Kind::File {
                continue;
            }
            progress.event(&Event::Item(&entry.path));
            let mut names: Vec<&[u8]> = entry.path.components().skip(1).collect();
            let offset = part_offset(&entry.metadata);
            if offset.is_some() {
                names.pop();
            }
            let path =
                names.iter().fold(to.to_owned(), |path, name| path.join(std::ffi::OsStr::from_bytes(name)));
            let content = reader.stream(&entry)?;
            counts.bytes += entry.content_bytes();
            match offset {
                None => {
                    counts.items += 1;
                    sync(&new_file(content, &path, 0o660, progress)?)?;
                }
                Some(offset) => more(content, &path, offset, progress)?,
            }
            progress.event(&Event::Done(counts));
        }
    }
    progress.event(&Event::Phase(Phase::Finishing));
    prepare(to, &**clock, progress)?;
    Ok(Prepared { counts })
}

fn sync(file: &File) -> Result<()> {
    file.sync_all().map_err(|error| Error::io("the content cannot be written", error))
}

/// Goes on with a file that came in parts.
fn more(
    mut content: Box<dyn mainstay_core::StreamReader>,
    path: &Path,
    offset: u64,
    progress: &dyn Progress,
) -> Result<()> {
    let failed = |error| Error::io(format!("cannot write {}", path.display()), error);
    let mut file = File::options().write(true).open(path).map_err(failed)?;
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    write(content.as_mut(), &mut file, progress)?;
    sync(&file)
}

/// Writes a server's files into a new directory, as they were at the moment of the plan, ready for a server of the same
/// version to be started on them.
///
/// Errors: [`Code::AlreadyExists`] when there is something in the directory already; [`Code::NotFound`] for a transaction
/// that the log does not hold.
pub fn restore_server(
    repository: &Repository,
    plan: &ServerPlan,
    to: &Path,
    clock: &Arc<dyn Clock>,
    progress: &dyn Progress,
) -> Result<ServerRestored> {
    let prepared = prepare_server(repository, plan, to, clock, progress)?;
    let base = plan.description.place();
    let mut reached = plan.description.log.as_ref().map(|_| base);
    let mut is_given = false;
    if let (Some((journal, stretch)), false) = (&plan.log, plan.until == Until::Consistent) {
        let logs = to.join(LOGS);
        let files = write_logs(journal, stretch, &plan.description, &logs, progress)?;
        let stop = stop(&files, base, plan.until)?;
        let until = files.iter().position(|(place, _)| (place.epoch, place.file) == (stop.epoch, stop.file));
        let files: Vec<PathBuf> =
            files.into_iter().take(until.map_or(0, |at| at + 1)).map(|(_, path)| path).collect();
        if stop > base {
            // Whatever we write is written: only now, and only once.
            give_to_server(to)?;
            is_given = true;
            let server = PrivateServer::start(to, false, clock, progress)?;
            mariadb::replay(&server, &files, base.offset, stop.offset, &**clock, progress)?;
            server.stop(progress)?;
            reached = Some(stop);
        }
        std::fs::remove_dir_all(&logs)
            .map_err(|error| Error::io("cannot remove the log that was played", error))?;
    }
    if !is_given {
        give_to_server(to)?;
    }
    let name = |place: Place| {
        let base = plan.description.log.clone().unwrap_or_default();
        format!("{}:{}", LogFile { base, number: place.file }, place.offset)
    };
    Ok(ServerRestored { counts: prepared.counts, place: reached.map(name) })
}

/// Writes the files of a log, from that in which the point is, as the server had them. Each comes with the place where it
/// ends.
pub fn write_logs(
    journal: &Journal,
    stretch: &Stretch,
    description: &Description,
    to: &Path,
    progress: &dyn Progress,
) -> Result<Vec<(Place, PathBuf)>> {
    let base = description.log.clone().unwrap_or_default();
    std::fs::create_dir(to).map_err(|error| Error::io(format!("cannot make {}", to.display()), error))?;
    let start = Place { offset: FILE_START.len() as u64, ..description.place() };
    let from = start.position().max(stretch.start.clone());
    let mut files: Vec<(Place, PathBuf)> = Vec::new();
    let mut open: Option<File> = None;
    if from >= stretch.end {
        return Ok(files);
    }
    for change in journal.read(&from)? {
        progress.check()?;
        let change = change?;
        let malformed = || Error::integrity("a change of a log is malformed");
        let at = log_bytes(&change).ok_or_else(malformed)?;
        let end = Place::from_position(&change.end).ok_or_else(malformed)?;
        let failed = |error| Error::io("cannot write the log", error);
        if files.last().is_none_or(|(known, _)| (known.epoch, known.file) != (at.epoch, at.file)) {
            let path = to.join(LogFile { base: base.clone(), number: at.file }.to_string());
            let mut file =
                File::options().write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
            file.write_all(FILE_START).map_err(failed)?;
            files.push((end, path));
            open = Some(file);
        }
        if let (Some((known, _)), Some(file)) = (files.last_mut(), &mut open) {
            file.seek(SeekFrom::Start(at.offset))
                .and_then(|_| file.write_all(&change.bytes))
                .map_err(failed)?;
            *known = end;
        }
        if change.end >= stretch.end {
            break;
        }
    }
    Ok(files)
}

/// Where to stop: the first event that is not wanted any more, or the end of the last one that is whole.
fn stop(files: &[(Place, PathBuf)], base: Place, until: Until) -> Result<Place> {
    let mut reached = base;
    for (end, path) in files {
        let mut at = Place { offset: FILE_START.len() as u64, ..*end };
        let failed = |error| Error::io(format!("cannot read {}", path.display()), error);
        let mut file = BufReader::new(File::open(path).map_err(failed)?);
        file.seek(SeekFrom::Start(at.offset)).map_err(failed)?;
        while let Some(bytes) = next_event(&mut file)? {
            let Some(event) = mariadb::Event::first(&bytes) else { break };
            let next = Place { offset: at.offset + event.bytes.len() as u64, ..at };
            let is_over = match until {
                Until::Place(file, offset) => (next.file, next.offset) > (file, offset),
                Until::Time(time) => event.gtid().is_some() && event.time() > Some(time),
                Until::Gtid(gtid) => event.gtid() == Some(gtid),
                Until::End | Until::Consistent => false,
            };
            if is_over && at >= base {
                return Ok(at);
            }
            at = next;
            reached = reached.max(at);
        }
    }
    match until {
        Until::Gtid(gtid) => {
            Err(Error::new(Code::NotFound, format!("the log does not hold the transaction {gtid}"))
                .hint("mainstay db status says from where to where it reaches"))
        }
        _ => Ok(reached),
    }
}

/// A whole event; `None` at the end, also in the middle of one.
fn next_event(file: &mut BufReader<File>) -> Result<Option<Vec<u8>>> {
    const HEADER: u64 = 19;
    let failed = |error| Error::io("cannot read the log", error);
    let mut bytes = Vec::new();
    file.by_ref().take(HEADER).read_to_end(&mut bytes).map_err(failed)?;
    let Some(length) = bytes.get(9..).and_then(|rest| rest.first_chunk::<4>()) else { return Ok(None) };
    let length = u64::from(u32::from_le_bytes(*length));
    if bytes.len() < HEADER as usize {
        return Ok(None);
    }
    if !(HEADER..=EVENT_BYTES_MAX).contains(&length) {
        return Err(Error::integrity("a binary log holds what is no event"));
    }
    file.by_ref().take(length - HEADER).read_to_end(&mut bytes).map_err(failed)?;
    Ok((bytes.len() as u64 == length).then_some(bytes))
}
