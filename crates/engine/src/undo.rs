//! The way back from a restore: before it touches anything that exists, a point of just that is taken.
//!
//! Such a point holds a directory `before` with the affected items under their full paths, and a record `changes`
//! with one entry for each path that the restore was about to change: a letter, the path, a NUL byte. The letters
//! are `+` created, `!` replaced, `~` metadata, `-` deleted. A directory in which something was about to come or go
//! counts as one of which the metadata changes: its time does.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{
    Body, Captured, Clock, Code, Consistency, Error, Event, Item, ItemPath, Kind, Metadata, Next, Open,
    Phase, Piece, PointId, Position, Progress, Receipt, Result, Source, Stamp, StreamEnd, StreamReader,
    WorkloadKind, WorkloadRef,
};
use mainstay_repository::{Compression, Parent, PointInfo, PointReader, Repository, WriteRequest};
use mainstay_workloads::files::{
    Action, Change, Changes, FilesRequest, FilesSource, OwnerRule, Place, RestoreMode, RestoreRules,
};

use crate::copy::copy;
use crate::restore::{RestorePlan, View, acts, unless_damaged};
use crate::vm::takes_back;
use crate::workload::{derived_id, root_text};

/// The kind of workload whose points hold what a restore was about to overwrite.
pub const UNDO: &str = "undo";

/// Whether a point takes back a restore, of files or of a machine.
pub fn is_undo(point: &PointInfo) -> bool {
    point.workload.kind.0 == UNDO || takes_back(point)
}

const BEFORE: &[u8] = b"before";
const CHANGES: &[u8] = b"changes";
/// A record of changes longer than this is none of ours.
const CHANGES_MAX: usize = 1 << 30;

/// The newest undo point of `host`.
pub fn newest<'a>(points: &'a [PointInfo], host: &str) -> Option<&'a PointInfo> {
    points.iter().rfind(|point| point.workload.kind.0 == UNDO && point.host == host)
}

/// Takes a point of what `plan` is about to touch.
pub(crate) fn take(
    repository: &Repository,
    plan: &RestorePlan,
    host: &str,
    clock: &Arc<dyn Clock>,
    progress: &Arc<dyn Progress>,
) -> Result<PointId> {
    progress.event(&Event::Phase(Phase::Opening));
    let root = item_path(&plan.root)?;
    let changes: Vec<Change> =
        plan.changes.iter().filter(acts).map(|change| below(&root, change)).collect::<Result<_>>()?;
    let changes = with_directories(changes)?;
    let source = Before::new(&changes, clock)?;
    let name = format!("{host}:undo");
    let writer = repository.write(WriteRequest {
        workload: WorkloadRef { id: derived_id(host, &name), kind: WorkloadKind(UNDO.to_owned()), name },
        host: host.to_owned(),
        roots: vec![root_text(&plan.root)],
        tags: Vec::new(),
        reread_one_in: 0,
        any_order: false,
        parent: Parent::None,
        progress: Arc::clone(progress),
        compression: Compression::default(),
        jobs: 2,
    })?;
    let point = copy(Box::new(source), Box::new(writer), progress.as_ref())?;
    let skipped = crate::backup::find(repository, &point)?.counts.skipped;
    if skipped > 0 {
        let what = format!("{skipped} items that would change cannot be read, and could not be brought back");
        return Err(Error::new(Code::Refused, what));
    }
    // Told at once: a restore that fails half-way needs it most.
    progress.event(&Event::Note(&format!("mainstay undo {point} takes this restore back")));
    Ok(point)
}

/// What taking a restore back would do.
///
/// Errors: [`Code::Usage`] for a point that is not an undo point, [`Code::Cancelled`].
pub fn plan_undo(reader: &PointReader, owners: OwnerRule, progress: &dyn Progress) -> Result<RestorePlan> {
    let info = reader.info();
    if info.workload.kind.0 != UNDO {
        let what = format!("point {} holds no undo of a restore", info.id);
        let hint = format!("restore it: mainstay restore {}", info.id);
        return Err(Error::new(Code::Usage, what).hint(hint));
    }
    let before = ItemPath::root().join(BEFORE).map_err(bug)?;
    let changes = read_changes(reader)?;
    let (mut selection, mut alone) = (BTreeSet::new(), BTreeSet::new());
    let mut removals: Vec<ItemPath> = Vec::new();
    for (action, path) in changes {
        if action == Action::Create {
            // What is created is listed after what it lies in.
            if !removals.last().is_some_and(|last| path.is_within(last)) {
                removals.push(path);
            }
            continue;
        }
        let stored = ItemPath::new([BEFORE, b"/", path.as_bytes()].concat()).map_err(bug)?;
        if unless_damaged(reader.lookup(&stored))?.is_none_or(|found| found.is_some()) {
            if action == Action::Metadata {
                alone.insert(stored.clone());
            }
            selection.insert(stored);
        }
    }
    let plan = RestorePlan {
        point: info.clone(),
        root: PathBuf::from("/"),
        changes: Vec::new(),
        totals: Changes::default(),
        bytes: 0,
        all_bytes: 0,
        lost: Vec::new(),
        mode: RestoreMode::Overwrite,
        owners,
        view: View { selection, alone, links: BTreeSet::new(), strip: before, keep_top: true },
        rules: RestoreRules { mode: RestoreMode::Overwrite, ..RestoreRules::default() },
        removals,
    };
    plan.compare(reader, progress)
}

fn bug(error: mainstay_core::PathError) -> Error {
    Error::integrity("an undo point names a path that cannot be").because(error)
}

fn item_path(path: &Path) -> Result<ItemPath> {
    let bytes = path.as_os_str().as_bytes();
    let trimmed = bytes.strip_prefix(b"/").unwrap_or(bytes);
    ItemPath::new(trimmed.strip_suffix(b"/").unwrap_or(trimmed)).map_err(|error| {
        Error::new(Code::Usage, format!("cannot restore below {}", path.display()))
            .because(error)
            .hint("name the directory by its absolute path without `.` and `..`")
    })
}

/// The change under its full path.
fn below(root: &ItemPath, change: &Change) -> Result<Change> {
    let separator: &[u8] = if root.is_root() || change.path.is_root() { b"" } else { b"/" };
    let bytes = [root.as_bytes(), separator, change.path.as_bytes()].concat();
    let path = ItemPath::new(bytes).map_err(|error| Error::bug("a path below the target").because(error))?;
    Ok(Change { path, ..change.clone() })
}

/// The changes and, in the order of the paths, the directories whose times they move.
fn with_directories(mut changes: Vec<Change>) -> Result<Vec<Change>> {
    let known: BTreeSet<ItemPath> = changes.iter().map(|change| change.path.clone()).collect();
    let moving = changes.iter().filter(|change| change.action != Action::Metadata);
    let around: BTreeSet<ItemPath> = moving.filter_map(|change| change.path.parent()).collect();
    let mut place = Place::open(Path::new("/"), OwnerRule::Leave)?;
    for path in around.into_iter().filter(|path| !path.is_root() && !known.contains(path)) {
        if place.is_own_directory(&path)? {
            changes.push(Change { path, action: Action::Metadata, bytes: 0, found: None });
        }
    }
    changes.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(changes)
}

fn absolute(path: &ItemPath) -> PathBuf {
    Path::new("/").join(OsStr::from_bytes(path.as_bytes()))
}

const fn letter(action: Action) -> Option<u8> {
    match action {
        Action::Create => Some(b'+'),
        Action::Replace => Some(b'!'),
        Action::Metadata => Some(b'~'),
        Action::Delete => Some(b'-'),
        Action::Same | Action::Blocked => None,
    }
}

fn action(letter: u8) -> Option<Action> {
    [Action::Create, Action::Replace, Action::Metadata, Action::Delete]
        .into_iter()
        .find(|action| self::letter(*action) == Some(letter))
}

fn encode(changes: &[Change]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for change in changes {
        let Some(letter) = letter(change.action) else { continue };
        bytes.push(letter);
        bytes.extend_from_slice(change.path.as_bytes());
        bytes.push(0);
    }
    bytes
}

fn decode(bytes: &[u8]) -> Result<Vec<(Action, ItemPath)>> {
    let broken = || Error::integrity("an undo point does not say what the restore changed");
    let Some(bytes) = bytes.strip_suffix(&[0]) else {
        return if bytes.is_empty() { Ok(Vec::new()) } else { Err(broken()) };
    };
    let parse = |entry: &[u8]| {
        let (letter, path) = entry.split_first()?;
        Some((action(*letter)?, ItemPath::new(path).ok()?))
    };
    bytes.split(|byte| *byte == 0).map(|entry| parse(entry).ok_or_else(broken)).collect()
}

fn read_changes(reader: &PointReader) -> Result<Vec<(Action, ItemPath)>> {
    let path = ItemPath::root().join(CHANGES).map_err(bug)?;
    let entry = reader.lookup(&path)?.filter(|entry| entry.has_body);
    let Some(entry) = entry else { return Ok(Vec::new()) };
    let mut stream = reader.stream(&entry)?;
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match stream.read(&mut buffer)? {
            Piece::Data(length) if bytes.len() + length <= CHANGES_MAX => {
                bytes.extend_from_slice(buffer.get(..length).unwrap_or_default());
            }
            Piece::End => return decode(&bytes),
            _ => return Err(Error::integrity("the record of changes of an undo point is no such record")),
        }
    }
}

/// The source of an undo point.
struct Before {
    head: Option<Box<Item>>,
    files: Option<FilesSource>,
    tail: Option<Box<Item>>,
    /// The affected paths that exist, and of those the ones of which everything below is affected too.
    affected: BTreeSet<ItemPath>,
    whole: BTreeSet<ItemPath>,
    moment: mainstay_core::Time,
}

impl Before {
    fn new(changes: &[Change], clock: &Arc<dyn Clock>) -> Result<Self> {
        let existing = changes.iter().filter(|change| change.action != Action::Create);
        let affected: BTreeSet<ItemPath> = existing.clone().map(|change| change.path.clone()).collect();
        let vanishes = existing.filter(|change| change.action != Action::Metadata);
        let whole: BTreeSet<ItemPath> = vanishes.map(|change| change.path.clone()).collect();
        let mut roots: Vec<PathBuf> = Vec::new();
        let mut last: Option<&ItemPath> = None;
        for path in &whole {
            if !last.is_some_and(|last| path.is_within(last)) {
                roots.push(absolute(path));
                last = Some(path);
            }
        }
        let bare: Vec<PathBuf> = affected.difference(&whole).map(absolute).collect();
        let request = FilesRequest { roots, bare, keep_links: true, ..FilesRequest::default() };
        let files =
            if affected.is_empty() { None } else { Some(FilesSource::new(request, Arc::clone(clock))?) };
        let directory = Metadata { mode: 0o700, ..Metadata::new(Kind::Directory) };
        let record = Arc::new(encode(changes));
        let size = u64::try_from(record.len()).unwrap_or(u64::MAX);
        let tail = Metadata { mode: 0o600, size, ..Metadata::new(Kind::Record) };
        Ok(Self {
            head: Some(item(BEFORE, directory, Body::None)?),
            files,
            tail: Some(item(CHANGES, tail, Body::Stream(Box::new(Text(record))))?),
            affected,
            whole,
            moment: clock.now(),
        })
    }

    /// Whether the item belongs to the point: affected, inside what vanishes, or on the way to either.
    fn wants(&self, path: &ItemPath) -> bool {
        let next = self.affected.range(path..).next();
        let above = || std::iter::successors(path.parent(), ItemPath::parent);
        next.is_some_and(|next| next.is_within(path)) || above().any(|above| self.whole.contains(&above))
    }
}

fn item(name: &[u8], metadata: Metadata, body: Body) -> Result<Box<Item>> {
    let path = ItemPath::root().join(name).map_err(bug)?;
    Ok(Box::new(Item { path, metadata, stamp: Stamp::default(), body }))
}

impl Source for Before {
    fn next(&mut self) -> Result<Next> {
        if let Some(head) = self.head.take() {
            return Ok(Next::Item(head));
        }
        while let Some(files) = &mut self.files {
            let mut next = files.next()?;
            let path = match &mut next {
                Next::Item(item) => &mut item.path,
                Next::Skipped(skip) => &mut skip.path,
                Next::End => break,
            };
            let original = std::mem::take(path);
            *path = ItemPath::new([BEFORE, b"/", original.as_bytes()].concat()).unwrap_or_default();
            if !original.is_root() && self.wants(&original) {
                return Ok(next);
            }
        }
        self.files = None;
        Ok(self.tail.take().map_or(Next::End, Next::Item))
    }

    fn seal(&mut self) -> Result<Captured> {
        Ok(Captured { position: Position::default(), consistency: Consistency::Fuzzy, moment: self.moment })
    }

    fn commit(self: Box<Self>, _receipt: &Receipt) -> Result<()> {
        Ok(())
    }
}

/// Bytes in memory as a stream.
pub(crate) struct Text(pub(crate) Arc<Vec<u8>>);

impl Open for Text {
    fn open(&self) -> Result<Box<dyn StreamReader>> {
        Ok(Box::new(TextReader { text: Arc::clone(&self.0), at: 0 }))
    }
}

struct TextReader {
    text: Arc<Vec<u8>>,
    at: usize,
}

impl StreamReader for TextReader {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece> {
        let rest = self.text.get(self.at..).unwrap_or_default();
        let length = rest.len().min(buffer.len());
        if length == 0 {
            return Ok(Piece::End);
        }
        buffer.iter_mut().zip(rest).for_each(|(to, byte)| *to = *byte);
        self.at += length;
        Ok(Piece::Data(length))
    }

    fn finish(self: Box<Self>) -> Result<StreamEnd> {
        Ok(StreamEnd::Steady)
    }
}

#[cfg(test)]
mod tests {
    use mainstay_core::{Code, ItemPath};
    use mainstay_workloads::files::{Action, Change};

    use super::{decode, encode};

    #[test]
    fn the_record_of_changes_round_trips_and_refuses_other_bytes() {
        let change = |path: &[u8], action| Change {
            path: ItemPath::new(path).unwrap(),
            action,
            bytes: 7,
            found: None,
        };
        let changes = [
            change(b"etc", Action::Metadata),
            change(b"etc/a\nb\xff", Action::Create),
            change(b"etc/old", Action::Delete),
            change(b"etc/same", Action::Same),
            change(b"etc/z", Action::Replace),
        ];
        let decoded = decode(&encode(&changes)).unwrap();
        let kept = changes.iter().filter(|change| change.action != Action::Same);
        assert_eq!(decoded, kept.map(|change| (change.action, change.path.clone())).collect::<Vec<_>>());
        assert!(decode(b"").unwrap().is_empty());
        for bad in [&b"+etc"[..], b"?etc\0", b"+/etc\0", b"+a/../b\0", b"\0", b"+a\0\0"] {
            assert_eq!(decode(bad).unwrap_err().code(), Code::Integrity, "{bad:?}");
        }
    }
}
