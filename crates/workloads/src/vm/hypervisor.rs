//! What every kind of host offers, whoever makes it: machines can be listed, described, held still for a backup and
//! brought into being again.

use std::path::PathBuf;
use std::time::Duration;

use mainstay_core::{Blocks, Code, Consistency, Error, Id16, Result, Time};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::agent::{ANSWER, shell};
use super::machine::Machine;
use super::mark::Marks;

/// How a host calls a machine: its UUID where it has one, otherwise its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MachineId(pub String);

/// A host of machines. One implementation for each vendor.
pub trait Hypervisor: Send + Sync {
    /// For people: which host this is.
    fn name(&self) -> String;

    fn caps(&self) -> Caps;

    /// Every machine on the host, running or not.
    fn list(&self) -> Result<Vec<MachineSummary>>;

    /// The names of the same machines, without a look at each.
    fn names(&self) -> Result<Vec<(MachineId, String)>> {
        Ok(self.list()?.into_iter().map(|machine| (machine.id, machine.name)).collect())
    }

    /// The machine's configuration, in neutral form and in the vendor's.
    fn config(&self, machine: &MachineId) -> Result<Machine>;

    /// Holds one moment of the machine's disks, which can be read until the value is dropped or committed.
    ///
    /// What stands in the way of an increment makes a disk a [`DiskMode::Scan`] and never an error. What stands in
    /// the way of a freeze lowers [`MachineSnapshot::reached`].
    ///
    /// Errors: [`mainstay_core::Code::NotFound`] for a machine or disk that is not there,
    /// [`mainstay_core::Code::Conflict`] when somebody else is at work on the machine. The machine is as it was.
    fn snapshot(&self, machine: &MachineId, request: &SnapshotRequest) -> Result<Box<dyn MachineSnapshot>>;

    /// Brings a machine into being, whose disks stand ready, in the machine's order.
    fn define(&self, machine: &Machine, disks: &[DiskPlace], start: bool) -> Result<MachineId>;

    fn start(&self, machine: &MachineId) -> Result<()>;

    /// Asks the guest to shut down. Returns before it has.
    fn stop(&self, machine: &MachineId) -> Result<()>;

    /// Takes a machine away that [`Hypervisor::define`] made: the power first, then its definition. Disks stay.
    fn destroy(&self, machine: &MachineId) -> Result<()>;

    /// Asks the agent in the machine's guest; commands and answers are those of QEMU's guest agent.
    ///
    /// Errors: [`mainstay_core::Code::Unsupported`] where there is no way to it; [`mainstay_core::Code::Io`] when none
    /// answers within `limit`.
    fn ask_guest(
        &self,
        _machine: &MachineId,
        _command: &str,
        _arguments: Value,
        _limit: Duration,
    ) -> Result<Value> {
        Err(Error::new(Code::Unsupported, "this host does not lead to the agents of its guests"))
    }

    /// Removes what runs that died left on the host. What live runs and others own stays.
    fn sweep(&self) -> Result<Swept>;
}

/// Whether the agent in a machine's guest answers now.
pub fn guest_answers(host: &dyn Hypervisor, machine: &MachineId) -> bool {
    host.ask_guest(machine, "guest-ping", json!({}), ANSWER).is_ok()
}

/// Runs a line in the guest's shell to its end; its exit status.
///
/// Errors: those of the agent; [`Code::Io`] when it does not end in time, or is ended by a signal.
pub fn guest_shell(host: &dyn Hypervisor, machine: &MachineId, line: &str, limit: Duration) -> Result<i64> {
    shell(&mut |command, arguments| host.ask_guest(machine, command, arguments, ANSWER), line, limit)
}

/// One moment of a machine. Dropped without [`MachineSnapshot::commit`] it abandons: changes go on being tracked
/// since the last point as if this run had never been, and the guest runs.
pub trait MachineSnapshot: Send {
    /// The level of consistency that was reached.
    fn reached(&self) -> Consistency;

    /// For how long the guest's file systems stood still; zero when they did not.
    fn frozen(&self) -> Duration;

    /// When the moment was, if it was not just now.
    fn moment(&self) -> Option<Time> {
        None
    }

    /// What a person should know, in clauses: why the guest was not frozen, why a disk cannot be tracked.
    fn notes(&self) -> &[String];

    /// The configuration at that moment.
    fn machine(&self) -> &Machine;

    fn disks(&self) -> &[DiskSnapshot];

    /// Opens the disk at this place of [`MachineSnapshot::disks`]. Extents tell what changed since the mark.
    fn open(&self, disk: usize) -> Result<Box<dyn Blocks>>;

    /// Where the next increment starts, once this run is committed. Asked for when everything has been read.
    ///
    /// Errors: what was read is not of one moment after all.
    fn marks(&self) -> Result<Marks>;

    /// Called once the point is durable: from now on the new marks count and the old ones are let go.
    ///
    /// Errors: a mark could not be moved; the point is whole, and the next run may have to read everything.
    fn commit(self: Box<Self>) -> Result<()>;
}

/// What a host can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Caps {
    /// Changes of running machines are tracked.
    pub incremental: bool,
    /// Guests can be frozen for a moment.
    pub freeze: bool,
    /// Machines that are shut down can be read, and their disks written over.
    pub offline: bool,
    /// Machines can be defined and started.
    pub define: bool,
}

/// Whom the marks on a machine's disks belong to. Marks of other owners are never touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    #[serde(with = "super::mark::id16")]
    pub repository: Id16,
    #[serde(with = "super::mark::id16")]
    pub workload: Id16,
}

/// How to take a snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotRequest {
    pub owner: Owner,
    /// Names this run; random.
    pub run: Id16,
    /// The disks wanted, by name; all when empty.
    pub disks: Vec<String>,
    /// The consistency asked for. [`Consistency::Crash`] and below do not freeze the guest.
    pub want: Consistency,
    /// The marks of the point that the increment builds upon; `None` when there is no such point.
    pub since: Option<Marks>,
    /// A disk is read whole after so many increments, in case its tracking lies. 0: never.
    pub scan_every: u32,
    /// The guest's agent has freeze hooks that bring its applications to rest, so that a freeze is
    /// [`Consistency::Application`].
    pub hooked: bool,
    /// Has the guest tell its disks which blocks it no longer uses, first.
    pub trim: bool,
    /// The longest that a guest may stand still; then it is thawed, whatever has been reached.
    pub freeze_limit: Duration,
}

impl SnapshotRequest {
    /// A request for every disk, as consistent as the guest's file systems can be made.
    pub fn new(owner: Owner, run: Id16) -> Self {
        Self {
            owner,
            run,
            disks: Vec::new(),
            want: Consistency::FileSystem,
            since: None,
            scan_every: 30,
            hooked: false,
            trim: false,
            freeze_limit: Duration::from_secs(10),
        }
    }
}

/// A disk in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSnapshot {
    pub name: String,
    /// Bytes the guest sees.
    pub size: u64,
    pub mode: DiskMode,
    /// Whether changes are tracked from now on.
    pub tracked: bool,
}

/// How much of a disk has to be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskMode {
    /// There is nothing to build upon.
    Full,
    /// Only what its extents call changed.
    Incremental,
    /// All of it, since nothing can tell what changed; what the repository holds already is not stored again.
    Scan { why: String },
}

impl DiskMode {
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
            Self::Scan { .. } => "scan",
        }
    }
}

/// Where the content of a disk stands, for a machine about to be defined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPlace {
    /// The disk's name in the machine.
    pub name: String,
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MachineState {
    Running,
    Paused,
    ShutOff,
    /// Off, but its memory is kept: the next start goes on from there.
    Saved,
    Crashed,
    /// The host says something else, or nothing.
    Unknown,
}

impl MachineState {
    /// Whether its disks are in use.
    pub const fn runs(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }
}

/// A machine as an inventory shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MachineSummary {
    pub id: MachineId,
    pub name: String,
    pub state: MachineState,
    pub disks: Vec<DiskSummary>,
    /// Snapshots that somebody took and that still cost space.
    pub snapshots: Vec<SnapshotSeen>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskSummary {
    pub name: String,
    /// Empty for what has no path (a network disk).
    pub path: PathBuf,
    pub format: String,
    /// Bytes the guest sees; `None` when the host does not say without being asked again.
    pub size: Option<u64>,
    /// The images below this one, nearest first.
    pub backing: Vec<PathBuf>,
    pub bitmaps: Vec<BitmapSeen>,
}

/// Somebody's record of changes on a disk: a dirty bitmap, or a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BitmapSeen {
    pub name: String,
    /// Its name is one that we give.
    pub ours: bool,
    pub recording: bool,
    pub inconsistent: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SnapshotSeen {
    pub name: String,
    /// When it was taken, in seconds since 1970; `None` when the host does not say.
    pub taken: Option<i64>,
    pub checkpoint: bool,
}

/// What [`Hypervisor::sweep`] took away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Runs whose remains are gone.
    pub runs: usize,
    /// What could not be removed, in clauses.
    pub left: Vec<String>,
}
