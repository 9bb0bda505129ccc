//! The log as a server pushes it (`archive_command`) and asks for it (`restore_command`), segment by segment, into and out
//! of the same journal that a follower writes.

use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::Write as _;
use std::path::Path;
use std::time::UNIX_EPOCH;

use mainstay_core::{Change, Code, Error, Result, StreamRef, Time, WorkloadRef};
use mainstay_repository::{Journal, JournalWriter, Repository};
use mainstay_workloads::postgres::{History, KIND, Lsn, SegmentHead, SegmentName};

use super::backup::workload_of;
use super::plan::cluster;
use super::{history, stream};

const SEGMENT_BYTES_MAX: u64 = 1 << 30;
/// Files that say otherwise than the journal: nothing of them is lost, and no server waits for ever.
const ASIDE: &str = "aside ";
/// In a segment of an unknown size.
const SEGMENT_BYTES: u64 = 16 << 20;

/// What became of a file that a server pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It is durable.
    Stored,
    /// It was there already.
    Known,
    /// It is durable, but beside the journal, which has other bytes in its place or another history of its timeline.
    Aside,
    /// Recovery never asks for such a file.
    Unneeded,
}

/// Stores a file of `pg_wal` as the workload `name`.
///
/// Errors: [`Code::Integrity`] for what is no segment, [`Code::Conflict`] when a follower stored something at the same
/// moment: the server tries again.
pub fn push_wal(repository: &Repository, name: &str, file: &Path) -> Result<Pushed> {
    let failed = |error| Error::io(format!("cannot read {}", file.display()), error);
    let file_name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let parsed = SegmentName::parse(&file_name);
    if parsed.is_none() && !file_name.ends_with(".history") {
        return Ok(Pushed::Unneeded);
    }
    let metadata = std::fs::metadata(file).map_err(failed)?;
    if metadata.len() > SEGMENT_BYTES_MAX {
        return Err(Error::integrity(format!("{} is longer than any segment", file.display())));
    }
    let bytes = std::fs::read(file).map_err(failed)?;
    let Some(segment) = parsed else { return push_history(repository, name, file, &file_name, bytes) };
    let head = SegmentHead::parse(&bytes)?;
    if head.segment_bytes != bytes.len() as u64 {
        return Err(Error::integrity(format!("{} is not as long as it says", file.display())));
    }
    let workload = workload_of(name, &head.system);
    let mut reference = stream(&workload, &head.system, segment.timeline);
    reference.parent = match parent(repository, &workload, &head.system, segment.timeline, file) {
        Err(error) if error.code() == Code::AlreadyExists => {
            return set_aside(repository, &workload, &head.system, &file_name, bytes);
        }
        parent => parent?,
    };
    let start = segment.start(head.segment_bytes);
    let written = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let time = written.map(|since| Time::from_seconds(0).plus(since));
    let mut journal = repository.append_journal(reference.clone())?;
    let end = start.0 + bytes.len() as u64;
    let known = match journal.end() {
        Some(known) => {
            Lsn::from_position(known).ok_or_else(|| Error::integrity("a journal of another kind"))?
        }
        None => start,
    };
    if known > start && differs(repository, &reference, start, &bytes, known.0.min(end) - start.0)? {
        return set_aside(repository, &workload, &head.system, &file_name, bytes);
    }
    if known.0 >= end {
        return Ok(Pushed::Known);
    }
    if known < start {
        journal.skip("the segments in between were never pushed")?;
    }
    append(&mut journal, known.max(start), start, &bytes, time)?;
    Ok(Pushed::Stored)
}

/// Appends what of a segment lies behind `from`.
fn append(
    journal: &mut JournalWriter,
    from: Lsn,
    start: Lsn,
    bytes: &[u8],
    time: Option<Time>,
) -> Result<()> {
    let skip = usize::try_from(from.0 - start.0).unwrap_or(usize::MAX);
    let mut at = from;
    for part in bytes.get(skip..).unwrap_or_default().chunks(Change::BYTES_MAX) {
        let end = Lsn(at.0 + part.len() as u64);
        journal.append(&Change { start: at.position(), end: end.position(), time, bytes: part.to_vec() })?;
        at = end;
    }
    journal.close().map(drop)
}

/// Whether the journal has other bytes in the place of the first `length` of a segment. Whoever may not read believes.
fn differs(
    repository: &Repository,
    reference: &StreamRef,
    start: Lsn,
    bytes: &[u8],
    length: u64,
) -> Result<bool> {
    let Some(journal) = repository.journal(reference)? else { return Ok(false) };
    let mut stored = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
    match read(&journal, start, &mut stored) {
        Ok(length) => Ok(length < stored.len() || bytes.get(..length) != stored.get(..length)),
        Err(error) if error.code() == Code::NoPower => Ok(false),
        // It lies in a hole, where nothing can be put any more.
        Err(error) if error.code() == Code::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

/// Fills a buffer with the log from `start` on, as far as it goes without a hole.
pub(super) fn read(journal: &Journal, start: Lsn, buffer: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    for change in journal.read(&start.position())? {
        let change = match change {
            Err(error) if error.code() == Code::Integrity && filled > 0 => return Ok(filled),
            change => change?,
        };
        let at =
            Lsn::from_position(&change.start).ok_or_else(|| Error::integrity("a journal of another kind"))?;
        let skip = usize::try_from((start.0 + filled as u64).saturating_sub(at.0)).unwrap_or(usize::MAX);
        let part = change.bytes.get(skip..).unwrap_or_default();
        let rest = buffer.get_mut(filled..).unwrap_or_default();
        let length = part.len().min(rest.len());
        rest.get_mut(..length).unwrap_or_default().copy_from_slice(part.get(..length).unwrap_or_default());
        filled += length;
        if filled == buffer.len() {
            break;
        }
    }
    Ok(filled)
}

fn set_aside(
    repository: &Repository,
    workload: &WorkloadRef,
    system: &str,
    file_name: &str,
    bytes: Vec<u8>,
) -> Result<Pushed> {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    let name = format!("{ASIDE}{system} {file_name} {:016x}", hasher.finish());
    let mut journal =
        repository.append_journal(StreamRef { workload: workload.clone(), name, parent: None })?;
    if journal.end().is_none() {
        append(&mut journal, Lsn(0), Lsn(0), &bytes, None)?;
    }
    Ok(Pushed::Aside)
}

/// The files of a workload that were set aside, by their files' names.
pub fn aside(journals: &[Journal], workload: &WorkloadRef) -> Vec<String> {
    let ours = journals.iter().filter(|journal| journal.stream().workload.id == workload.id);
    let name =
        |journal: &Journal| journal.stream().name.strip_prefix(ASIDE)?.split(' ').nth(1).map(str::to_owned);
    ours.filter_map(name).collect()
}

fn push_history(
    repository: &Repository,
    name: &str,
    file: &Path,
    file_name: &str,
    bytes: Vec<u8>,
) -> Result<Pushed> {
    let timeline = file_name.strip_suffix(".history").and_then(|digits| u32::from_str_radix(digits, 16).ok());
    let timeline =
        timeline.ok_or_else(|| Error::integrity(format!("{file_name} is no name of a history")))?;
    // The server runs us in its data directory.
    let data = file.parent().and_then(Path::parent).unwrap_or(Path::new(""));
    let system = system_of(data)?;
    let history = History::parse(timeline, bytes)?;
    let workload = workload_of(name, &system);
    match history::store(repository, &workload, &system, &history) {
        // Two servers were promoted, each for itself.
        Err(error) if error.code() == Code::AlreadyExists => {
            set_aside(repository, &workload, &system, file_name, history.text)
        }
        stored => stored.map(|()| Pushed::Stored),
    }
}

/// The cluster's number, which its control file begins with.
fn system_of(data: &Path) -> Result<String> {
    let control = data.join("global/pg_control");
    let bytes = std::fs::read(&control)
        .map_err(|error| Error::io(format!("cannot read {}", control.display()), error))?;
    let number = bytes.first_chunk::<8>().ok_or_else(|| Error::integrity("the control file is cut short"))?;
    Ok(u64::from_le_bytes(*number).to_string())
}

/// Where a timeline came from: its history lies beside the segment, or was pushed before.
fn parent(
    repository: &Repository,
    workload: &WorkloadRef,
    system: &str,
    timeline: u32,
    file: &Path,
) -> Result<Option<(String, mainstay_core::Position)>> {
    if timeline == 1 {
        return Ok(None);
    }
    let beside = file.with_file_name(History::file_name(timeline));
    let text = std::fs::read(&beside).map_err(|error| {
        Error::io(format!("the history of timeline {timeline} is not beside its segment"), error)
            .hint("archive_command runs in the data directory: mainstay db push-wal … %p")
    })?;
    let history = History::parse(timeline, text)?;
    history::store(repository, workload, system, &history)?;
    let last = history.before.last();
    Ok(last.map(|(parent, left)| (stream(workload, system, *parent).name, left.position())))
}

/// Writes the file of that name to `to`, as `restore_command` asks for it. What a segment lacks at its end is zeros.
///
/// Errors: [`Code::NotFound`] when it is not in the journal.
pub fn fetch_wal(repository: &Repository, name: &str, file_name: &str, to: &Path) -> Result<()> {
    let missing = || Error::new(Code::NotFound, format!("{file_name} is not in the journal of {name}"));
    let journals = repository.journals()?;
    let ours = |journal: &&Journal| {
        let workload = &journal.stream().workload;
        workload.name == name && workload.kind.0 == KIND
    };
    let workload =
        journals.iter().find(ours).map(|journal| journal.stream().workload.id).ok_or_else(missing)?;
    let bytes = if let Some(segment) = SegmentName::parse(file_name) {
        let suffix = format!(" timeline {}", segment.timeline);
        let of = |journal: &&Journal| {
            let stream = journal.stream();
            stream.workload.id == workload
                && stream.name.starts_with(super::PREFIX)
                && stream.name.ends_with(&suffix)
        };
        let journal = journals.iter().find(of).ok_or_else(missing)?;
        let size = segment_bytes(repository, &workload)?;
        let mut bytes = vec![0; usize::try_from(size).unwrap_or(usize::MAX)];
        match read(journal, segment.start(size), &mut bytes) {
            Ok(length) if length > 0 => bytes,
            Err(error) if error.code() != Code::NotFound => return Err(error),
            _ => return Err(missing()),
        }
    } else {
        let histories = history::all(&journals, &workload)?;
        let wanted = |history: &History| History::file_name(history.timeline) == file_name;
        histories.into_iter().find(wanted).ok_or_else(missing)?.text
    };
    let written = File::create(to).and_then(|mut file| {
        file.write_all(&bytes)?;
        file.sync_all()
    });
    written.map_err(|error| Error::io(format!("cannot write {}", to.display()), error))
}

fn segment_bytes(repository: &Repository, workload: &mainstay_core::WorkloadId) -> Result<u64> {
    let points = repository.points()?;
    let newest = points.iter().rfind(|point| point.workload.id == *workload && point.readable);
    match newest {
        Some(point) => Ok(cluster(&repository.read(&point.id)?)?.segment_bytes),
        None => Ok(SEGMENT_BYTES),
    }
}
