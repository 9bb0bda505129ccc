//! What `--json` writes: one object a line, named by its `type`. A contract: fields may be added, none changes its
//! meaning. The schema is `docs/json/mainstay.schema.json`.

use std::os::unix::ffi::OsStrExt as _;

use mainstay_core::{Code, Counts, Error, ItemPath, Kind, Skip, Time};
use mainstay_engine::view::Seen;
use mainstay_engine::vm::machine_of;
use mainstay_engine::workload::root_bytes;
use mainstay_repository::PointInfo;
use mainstay_workloads::files;
use schemars::JsonSchema;
use serde::Serialize;

use super::{databases, machines, records, recovery, sprawl};

/// One line of output.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Line {
    /// A repository was made.
    Initialized(Initialized),
    /// The recovery kit, in full: a secret.
    Kit(Kit),
    /// A recovery point was taken.
    BackedUp(BackedUp),
    /// What `backup --dry-run` found.
    WouldBackUp(WouldBackUp),
    /// What the verb would do without `--dry-run`, where no other line tells.
    WouldDo(WouldDo),
    /// An item with something missing, or worth a word.
    Skipped(Skipped),
    /// Something a person should read; not an error.
    Note(Note),
    /// A recovery point.
    Point(Box<Point>),
    /// A difference between two points.
    Difference(Difference),
    /// One state of one item, from `find`.
    Found(Found),
    /// An item of a point.
    Item(Item),
    /// A part of an item's content.
    Content(Content),
    /// What a restore does, or would do, to one path.
    RestoreStep(RestoreStep),
    /// What a restore would do in all.
    RestorePlan(RestorePlan),
    /// What a restore did in all.
    Restored(Restored),
    /// Points are shown as directories.
    Mounted(Mounted),
    /// What was checked.
    Verified(Verified),
    /// Damage that `verify` found.
    Damage(Damage),
    /// What becomes of one point.
    Verdict(Verdict),
    /// Points that were expired, or would be.
    Expired(Expired),
    /// What `gc` freed, or would.
    Collected(Collected),
    /// How one workload stands.
    Workload(Workload),
    /// How the repository stands.
    Repository(Repository),
    /// A machine of a host.
    Machine(machines::Machine),
    /// Something on the hosts of machines that somebody should know of.
    Finding(sprawl::Finding),
    /// What is to become of something on the hosts.
    Decision(sprawl::Decision),
    /// Which points are shown together.
    Composed(machines::Composed),
    /// How a machine was captured.
    MachineCaptured(machines::MachineCaptured),
    /// A host copied a machine here.
    MachineReceived(machines::MachineReceived),
    /// What became of a machine's disks.
    MachineRestored(machines::MachineRestored),
    /// Newer files were put on the restored disks of a machine.
    FilesApplied(machines::FilesApplied),
    /// A machine was put back over its present disks.
    MachinePutBack(machines::MachinePutBack),
    /// A machine was brought back as a machine of a host.
    MachineRecovered(machines::MachineRecovered),
    /// A machine of a recovery plan.
    RecoveryPlanned(recovery::RecoveryPlanned),
    /// What became of a machine of a recovery plan.
    RecoveryState(recovery::RecoveryState),
    /// A machine runs from its point.
    MachineRunning(machines::MachineRunning),
    /// A machine that runs from its point was copied home.
    MachineHome(machines::MachineHome),
    /// How a database cluster was captured.
    ClusterCaptured(databases::ClusterCaptured),
    /// A cluster was written out.
    ClusterRestored(databases::ClusterRestored),
    /// Databases were recovered and checked.
    DatabaseProven(databases::DatabaseProven),
    /// How a database server was captured.
    ServerCaptured(databases::ServerCaptured),
    /// A database server was written out.
    ServerRestored(databases::ServerRestored),
    /// A database was written out.
    DatabaseRestored(databases::DatabaseRestored),
    /// The log of a cluster is followed.
    Following(databases::Following),
    /// A span within which any moment can be recovered.
    Recoverable(databases::Recoverable),
    /// A part of a log that is missing.
    Hole(databases::Hole),
    /// A throwaway server shows a cluster at a moment.
    ClusterOpened(databases::ClusterOpened),
    /// A throwaway server has ended.
    ClusterClosed(databases::ClusterClosed),
    /// A cluster was recovered and checked.
    Drilled(databases::Drilled),
    /// What a server keeps of its log for somebody.
    Slot(databases::Slot),
    /// Log that no point needs any more was given up, or would be.
    Trimmed(databases::Trimmed),
    /// Something that happened to a row.
    RecordEvent(records::RecordEvent),
    /// What was looked at for that.
    RecordHistory(records::RecordHistory),
    /// What a restore of a record does, or would do.
    RecordPlan(Box<records::RecordPlan>),
    /// A record is back.
    RecordRestored(records::RecordRestored),
    /// A definition or a script.
    RecordText(records::RecordText),
    /// A row that may never come back.
    ErasedRow(records::ErasedRow),
    /// A point was proven.
    Proven(machines::Proven),
    /// A point was to be proven, and was not.
    Unproven(machines::Unproven),
    /// What opens the repository.
    Key(Key),
    /// Whoever may write.
    Writer(Writer),
    /// One row of the table of exit codes.
    ExitCode(ExitCode),
    /// The run did not do what it was asked for. Always the last line.
    Failed(Failed),
}

/// A path for people, with control characters escaped; `base64` holds the exact bytes when they differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Path {
    pub path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_base64: Option<String>,
}

/// The paths that a point was asked to protect, as people read them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Roots {
    pub roots: Vec<String>,
    /// The exact bytes of all of them, when those of any one differ from what is shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub roots_base64: Option<Vec<String>>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Initialized {
    /// The repository's id: 64 hexadecimal digits.
    pub repository: String,
    pub location: String,
    /// The private file that a generated key was written to.
    pub key_file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file_base64: Option<String>,
    /// The file that the recovery kit was written to.
    pub kit_file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kit_file_base64: Option<String>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Kit {
    pub text: String,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct BackedUp {
    pub point: String,
    pub workload: String,
    pub host: String,
    #[serde(flatten)]
    pub roots: Roots,
    pub tags: Vec<String>,
    #[serde(flatten)]
    pub counts: Totals,
    pub seconds: f64,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct WouldBackUp {
    pub workload: String,
    pub host: String,
    #[serde(flatten)]
    pub roots: Roots,
    pub items: u64,
    /// Content bytes of all items.
    pub bytes: u64,
    /// Items whose content would be read, and their bytes.
    pub read_items: u64,
    pub read_bytes: u64,
    pub skipped: u64,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct WouldDo {
    /// In words.
    pub what: String,
}

/// Totals of a run. Bytes are of content, except `written_bytes`, which were added to the medium.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Totals {
    pub items: u64,
    pub bytes: u64,
    /// Items whose content was not read again.
    pub unchanged: u64,
    pub read_bytes: u64,
    /// Bytes that the repository did not hold yet, before compression.
    pub new_bytes: u64,
    pub written_bytes: u64,
    /// Items with something missing: the reason for exit status 3.
    pub skipped: u64,
    pub noticed: u64,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Skipped {
    #[serde(flatten)]
    pub path: Path,
    /// unreadable, unsupported, metadata, changed, silent-change, unwritable, damaged
    pub reason: String,
    pub detail: String,
    /// Whether something is missing, rather than only worth a word.
    pub missing: bool,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Note {
    pub message: String,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Point {
    /// 32 hexadecimal digits.
    pub point: String,
    pub workload: String,
    pub workload_id: String,
    /// files, vm, undo
    pub kind: String,
    pub host: String,
    #[serde(flatten)]
    pub roots: Roots,
    /// Times are RFC 3339 in UTC, here and everywhere.
    pub moment: String,
    pub started: String,
    pub finished: String,
    pub parent: Option<String>,
    pub consistency: String,
    #[serde(flatten)]
    pub counts: Totals,
    pub tags: Vec<String>,
    /// The virtual machine that it is of, or whose files it holds.
    pub machine: Option<String>,
    pub holds: Vec<Hold>,
    pub verified: Option<String>,
    pub proven: Option<String>,
    pub writer: String,
    /// Whether the present key can read it.
    pub readable: bool,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Hold {
    pub hold: String,
    pub reason: String,
    pub placed: String,
    pub until: Option<String>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Difference {
    #[serde(flatten)]
    pub path: Path,
    /// added, removed, content, metadata
    pub change: String,
    pub old_size: Option<u64>,
    pub new_size: Option<u64>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Found {
    #[serde(flatten)]
    pub item: Item,
    pub workload: String,
    /// The newest and the oldest point of a run of points in which the item is the same.
    pub newest: String,
    pub newest_moment: String,
    pub oldest: String,
    pub oldest_moment: String,
    pub points: u64,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Item {
    #[serde(flatten)]
    pub path: Path,
    /// file, directory, symlink, fifo, socket, character-device, block-device, disk, record
    pub kind: String,
    pub size: u64,
    /// Permission bits, octal.
    pub mode: String,
    pub uid: u32,
    pub gid: u32,
    pub user: Option<String>,
    pub group: Option<String>,
    pub modified: String,
    pub link_target: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_target_base64: Option<String>,
    /// The content changed while it was read.
    pub changed_while_read: bool,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Content {
    #[serde(flatten)]
    pub path: Path,
    pub base64: String,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct RestoreStep {
    #[serde(flatten)]
    pub path: Path,
    /// create, replace, metadata, delete, blocked
    pub action: String,
    pub bytes: u64,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct RestorePlan {
    pub point: String,
    #[serde(flatten)]
    pub target: Target,
    #[serde(flatten)]
    pub changes: Changes,
    pub bytes: u64,
    /// Whether an undo point would be taken first.
    pub undo: bool,
}

/// The directory that was, or would be, restored into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Target {
    pub target: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_base64: Option<String>,
}

/// How many paths meet which fate.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub struct Changes {
    pub created: u64,
    pub replaced: u64,
    pub metadata: u64,
    pub deleted: u64,
    pub same: u64,
    /// Would be skipped: where the item belongs stands a directory that holds something.
    pub blocked: u64,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Restored {
    pub point: String,
    #[serde(flatten)]
    pub target: Target,
    #[serde(flatten)]
    pub changes: Changes,
    pub bytes: u64,
    pub written_bytes: u64,
    pub skipped: u64,
    /// Items whose stored content was damaged.
    pub damaged: u64,
    /// `mainstay undo` with this point takes the restore back.
    pub undo_point: Option<String>,
    pub seconds: f64,
}

/// Points can be read below a directory, until somebody ends it.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Mounted {
    pub directory: String,
    /// The point that is shown; null for all of them.
    pub point: Option<String>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Verified {
    pub points: u64,
    /// Points in which nothing is wrong.
    pub sound: u64,
    pub read_data: bool,
    pub packs: u64,
    pub bytes: u64,
    pub damage: u64,
    /// Damaged packs in whose place stands now what is whole of them, or was made good by their parity.
    pub rewritten: u64,
    pub seconds: f64,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Damage {
    /// What is damaged, in words.
    pub what: String,
    /// A point that is hurt by it.
    pub point: Option<String>,
    /// A path that is hurt by it.
    pub path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_base64: Option<String>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Verdict {
    pub point: String,
    pub workload: String,
    pub moment: String,
    pub keep: bool,
    /// Why it is kept.
    pub why: Vec<String>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Expired {
    pub points: Vec<String>,
    pub kept: u64,
    pub dry_run: bool,
    /// Workloads that lose points though none of their points was ever verified.
    pub never_verified: Vec<String>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Collected {
    pub dry_run: bool,
    /// Bytes that were, or could be, given back to the medium now.
    pub freed_bytes: u64,
    pub deleted_packs: u64,
    /// Packs that nothing needs, or that were copied away: freed once their grace is over.
    pub condemned_packs: u64,
    /// Of a dry run.
    pub condemned_bytes: u64,
    pub copied_bytes: u64,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Workload {
    pub workload: String,
    pub kind: String,
    pub host: String,
    pub points: u64,
    pub last_point: String,
    pub last_backed_up: String,
    pub age_seconds: u64,
    pub last_verified: Option<String>,
    pub last_proven: Option<String>,
    /// In the last point.
    pub items: u64,
    pub bytes: u64,
    pub skipped: u64,
    pub overdue: bool,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Repository {
    pub repository: String,
    pub location: String,
    pub points: u64,
    pub stored_bytes: u64,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Key {
    pub key: String,
    /// passphrase, key-file, recovery-kit
    pub kind: String,
    pub label: String,
    pub created: String,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Writer {
    pub writer: String,
    pub name: String,
    pub powers: String,
    pub revoked: bool,
    /// The private file that the credential was written to.
    pub file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_base64: Option<String>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ExitCode {
    pub exit: u8,
    pub name: String,
    pub meaning: String,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Failed {
    /// A name of docs/exit-codes.md.
    pub code: String,
    pub exit: u8,
    /// What happened, and then why.
    pub message: String,
    pub hint: Option<String>,
}

impl Path {
    /// Of an item of a file tree: from `/` down.
    pub fn of(path: &ItemPath) -> Self {
        let (path, path_base64) = exact(&[b"/", path.as_bytes()].concat());
        Self { path, path_base64 }
    }
}

impl Roots {
    /// As the points have them.
    pub fn of(roots: &[String]) -> Self {
        let all: Vec<Vec<u8>> = roots.iter().map(|root| root_bytes(root)).collect();
        let differ = all.iter().any(|bytes| exact(bytes).1.is_some());
        Self {
            roots: all.iter().map(|bytes| exact(bytes).0).collect(),
            roots_base64: differ.then(|| all.iter().map(|bytes| base64(bytes)).collect()),
        }
    }
}

impl Target {
    pub fn of(path: &std::path::Path) -> Self {
        let (target, target_base64) = exact(path.as_os_str().as_bytes());
        Self { target, target_base64 }
    }
}

/// Bytes for people, with control characters and what is no UTF-8 escaped; and in base64 when that differs.
pub fn exact(bytes: &[u8]) -> (String, Option<String>) {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            if character.is_control() {
                text.extend(character.escape_default());
            } else {
                text.push(character);
            }
        }
        chunk.invalid().iter().for_each(|byte| text.push_str(&format!("\\x{byte:02x}")));
    }
    let differs = text.as_bytes() != bytes;
    (text, differs.then(|| base64(bytes)))
}

/// As [`exact`], of a file that there may be.
pub fn exact_file(path: Option<&std::path::Path>) -> (Option<String>, Option<String>) {
    path.map(|path| exact(path.as_os_str().as_bytes()))
        .map_or((None, None), |(text, base64)| (Some(text), base64))
}

/// A path of a point as people write it.
pub fn shown(path: &ItemPath) -> String {
    if path.is_root() { "/".to_owned() } else { format!("/{path}") }
}

impl From<&Counts> for Totals {
    fn from(counts: &Counts) -> Self {
        let Counts { items, bytes, unchanged, read_bytes, new_bytes, written_bytes, skipped, noticed } =
            *counts;
        Self { items, bytes, unchanged, read_bytes, new_bytes, written_bytes, skipped, noticed }
    }
}

impl From<&files::Changes> for Changes {
    fn from(changes: &files::Changes) -> Self {
        let files::Changes { created, replaced, metadata, deleted, same, blocked } = *changes;
        Self { created, replaced, metadata, deleted, same, blocked }
    }
}

impl From<&Skip> for Skipped {
    fn from(skip: &Skip) -> Self {
        Self {
            path: Path::of(&skip.path),
            reason: skip.reason.name().to_owned(),
            detail: skip.detail.clone(),
            missing: skip.reason.is_loss(),
        }
    }
}

impl From<&PointInfo> for Point {
    fn from(info: &PointInfo) -> Self {
        Self {
            point: info.id.to_string(),
            workload: info.workload.name.clone(),
            workload_id: info.workload.id.to_string(),
            kind: info.workload.kind.0.clone(),
            host: info.host.clone(),
            roots: Roots::of(&info.roots),
            moment: stamp(info.moment),
            started: stamp(info.started),
            finished: stamp(info.finished),
            parent: info.parent.map(|parent| parent.to_string()),
            consistency: info.consistency.name().to_owned(),
            counts: Totals::from(&info.counts),
            tags: info.tags.clone(),
            machine: machine_of(info).map(str::to_owned),
            holds: info.holds.iter().map(Hold::from).collect(),
            verified: info.verified.map(stamp),
            proven: info.proven.map(stamp),
            writer: info.writer.to_string(),
            readable: info.readable,
        }
    }
}

impl From<&mainstay_repository::Hold> for Hold {
    fn from(hold: &mainstay_repository::Hold) -> Self {
        Self {
            hold: hold.id.to_string(),
            reason: hold.reason.clone(),
            placed: stamp(hold.placed),
            until: hold.until.map(stamp),
        }
    }
}

impl From<&Seen> for Item {
    fn from(entry: &Seen) -> Self {
        let metadata = &entry.metadata;
        let text =
            |bytes: &Option<Vec<u8>>| bytes.as_ref().map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        let link = metadata.link_target.as_deref().map(exact);
        let (link_target, link_target_base64) =
            link.map_or((None, None), |(text, base64)| (Some(text), base64));
        Self {
            path: Path::of(&entry.path),
            kind: kind(metadata.kind).to_owned(),
            size: metadata.size,
            mode: format!("{:04o}", metadata.mode),
            uid: metadata.uid,
            gid: metadata.gid,
            user: text(&metadata.user),
            group: text(&metadata.group),
            modified: stamp(metadata.modified),
            link_target,
            link_target_base64,
            changed_while_read: entry.changed_while_read,
        }
    }
}

impl From<&Error> for Failed {
    fn from(error: &Error) -> Self {
        Self {
            code: error.code().name().to_owned(),
            exit: error.code().exit(),
            message: error.chain().join(": "),
            hint: error.next_step().map(str::to_owned),
        }
    }
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self { exit: code.exit(), name: code.name().to_owned(), meaning: code.meaning().to_owned() }
    }
}

const fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::File => "file",
        Kind::Directory => "directory",
        Kind::Symlink => "symlink",
        Kind::Fifo => "fifo",
        Kind::Socket => "socket",
        Kind::CharDevice => "character-device",
        Kind::BlockDevice => "block-device",
        Kind::Disk => "disk",
        Kind::Record => "record",
    }
}

/// RFC 3339 in UTC.
pub fn stamp(time: Time) -> String {
    jiff::Timestamp::from_nanosecond(i128::from(time.0)).unwrap_or_default().to_string()
}

/// RFC 4648 section 4, with padding.
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let at = |index: usize| u32::from(group.get(index).copied().unwrap_or(0));
        let word = at(0) << 16 | at(1) << 8 | at(2);
        for digit in 0..4 {
            let index = usize::try_from(word >> (18 - 6 * digit) & 63).unwrap_or_default();
            let used = digit <= group.len();
            text.push(if used { DIGITS.get(index).map_or('=', |byte| char::from(*byte)) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use mainstay_core::ItemPath;

    use super::{Path, base64};

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (bytes, text) in
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")]
        {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xff, 0xef, 0xbe]), "/+++");
    }

    #[test]
    fn a_path_that_cannot_be_shown_exactly_comes_in_bytes_as_well() {
        let path = |bytes: &[u8]| Path::of(&ItemPath::new(bytes).unwrap());
        assert_eq!(path(b"etc/hosts"), Path { path: "/etc/hosts".into(), path_base64: None });
        assert_eq!(path(b"a\xff").path_base64.as_deref(), Some("L2H/"));
        assert_eq!(path(b"a\n").path, "/a\\n");
        assert!(path(b"a\n").path_base64.is_some());
    }
}
