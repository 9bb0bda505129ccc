//! Plain QEMU, spoken to over its monitor. The monitor takes one client, so each machine needs a monitor socket that
//! nobody else uses. `qemu-storage-daemon` is a machine too: its disks are what it exports.
//!
//! One moment of all disks is held by jobs that copy old content away before the guest overwrites it, started in one
//! transaction ([`hold`]). What changed is told by dirty bitmaps. A new one begins *before* the moment and the old
//! one goes on recording *after* it, until the point is durable: both know too much rather than too little, whatever
//! dies when.

mod arguments;
mod config;
mod disks;
mod emulator;
mod hold;
mod link;
mod place;
mod push;
pub(super) mod script;
mod snapshot;
mod undo;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Clock, Code, Error, Id16, Result};
use serde_json::{Value, json};

use super::agent::Agent;
use super::endpoint::Endpoint;
use super::guard::GuardProgram;
use super::hypervisor::{
    BitmapSeen, Caps, DiskPlace, DiskSummary, Hypervisor, MachineId, MachineSnapshot, MachineState,
    MachineSummary, SnapshotRequest, SnapshotSeen, Swept,
};
use super::machine::Machine;
use super::qmp::Qmp;
use super::run_dir;
use super::watch::RESERVE;

pub(super) use emulator::kvm_works;
pub use emulator::{Accelerator, Emulator, EmulatorPlan, is_home, overlay};
pub use link::Link;
pub use place::{Place, Run};
pub use push::Received;
pub(super) use undo::Remains;

/// The name of this driver in marks.
const DRIVER: &str = "qemu";

/// How all names begin that we give to bitmaps, nodes, jobs and exports.
pub(super) const PREFIX: &str = "mainstay-";

/// How the names of bitmaps and checkpoints begin that a repository leaves on machines.
pub fn marks_of(repository: &Id16) -> String {
    format!("{PREFIX}{repository}-")
}

/// A QEMU that runs.
#[derive(Clone, Debug)]
pub struct QemuMachine {
    /// How people call it.
    pub name: String,
    /// Somebody gave it that name; otherwise the one that QEMU was started with counts more.
    pub named: bool,
    /// Its monitor, in JSON mode.
    pub monitor: Endpoint,
    /// Its channel to the guest agent.
    pub agent: Option<Endpoint>,
    /// The socket of an NBD server that this QEMU runs already; a process runs at most one.
    pub server: Option<PathBuf>,
    /// It runs on another machine.
    pub link: Option<Link>,
}

/// The machines of a host that are plain QEMU processes.
pub struct QemuHost {
    machines: Vec<QemuMachine>,
    /// On fast local storage: what the guests overwrite during a run is kept here.
    scratch: PathBuf,
    /// What must stay free there, in bytes.
    reserve: u64,
    guard: Option<GuardProgram>,
    clock: Arc<dyn Clock>,
}

impl QemuHost {
    pub fn new(machines: Vec<QemuMachine>, scratch: PathBuf, clock: Arc<dyn Clock>) -> Self {
        Self { machines, scratch, reserve: RESERVE, guard: None, clock }
    }

    /// Has runs watched over by a process of its own.
    #[must_use]
    pub fn guarded_by(mut self, guard: GuardProgram) -> Self {
        self.guard = Some(guard);
        self
    }

    /// A run is given up before less than so many bytes are free for scratch files.
    #[must_use]
    pub fn scratch_reserve(mut self, bytes: u64) -> Self {
        self.reserve = bytes;
        self
    }

    /// Takes away what runs that died have left; what could not be removed.
    fn sweep_remains(&self) -> Vec<String> {
        run_dir::sweep(&self.scratch).left
    }

    /// Finds the machine and speaks to its monitor.
    fn connect(&self, id: &MachineId) -> Result<(&QemuMachine, Qmp)> {
        if let [only] = self.machines.as_slice() {
            let mut qmp = Qmp::connect(&only.monitor)?;
            let found = identity(only, &mut qmp);
            return if found == *id || only.name == id.0 { Ok((only, qmp)) } else { Err(missing(id)) };
        }
        for machine in &self.machines {
            // One that does not run must not keep the others from being found.
            let Ok(mut qmp) = Qmp::connect(&machine.monitor) else { continue };
            if identity(machine, &mut qmp) == *id || machine.name == id.0 {
                return Ok((machine, qmp));
            }
        }
        Err(missing(id))
    }
}

impl Hypervisor for QemuHost {
    fn name(&self) -> String {
        "QEMU".into()
    }

    fn caps(&self) -> Caps {
        Caps { incremental: true, freeze: true, offline: false, define: false }
    }

    fn list(&self) -> Result<Vec<MachineSummary>> {
        self.machines.iter().map(summary).collect()
    }

    fn config(&self, machine: &MachineId) -> Result<Machine> {
        let (machine, mut qmp) = self.connect(machine)?;
        config::machine(machine, &mut qmp)
    }

    fn snapshot(&self, machine: &MachineId, request: &SnapshotRequest) -> Result<Box<dyn MachineSnapshot>> {
        let swept = self.sweep()?;
        let (machine, qmp) = self.connect(machine)?;
        let taken = snapshot::take(self, machine, qmp, request)?;
        Ok(Box::new(taken.with_notes(swept.left)))
    }

    fn define(&self, _machine: &Machine, _disks: &[DiskPlace], _start: bool) -> Result<MachineId> {
        Err(unsupported("defined"))
    }

    fn start(&self, _machine: &MachineId) -> Result<()> {
        Err(unsupported("started"))
    }

    fn stop(&self, machine: &MachineId) -> Result<()> {
        self.connect(machine)?.1.run("system_powerdown", json!({})).map(drop)
    }

    fn destroy(&self, _machine: &MachineId) -> Result<()> {
        Err(unsupported("taken away"))
    }

    fn ask_guest(
        &self,
        machine: &MachineId,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value> {
        let (machine, _) = self.connect(machine)?;
        let socket = machine.agent.as_ref();
        let socket =
            socket.ok_or_else(|| Error::new(Code::Unsupported, "the agent's socket is not known"))?;
        Agent::connect(socket)?.run(command, arguments, limit)
    }

    fn sweep(&self) -> Result<Swept> {
        Ok(run_dir::sweep(&self.scratch))
    }
}

fn summary(machine: &QemuMachine) -> Result<MachineSummary> {
    let off = || MachineSummary {
        id: MachineId(machine.name.clone()),
        name: machine.name.clone(),
        state: MachineState::ShutOff,
        disks: Vec::new(),
        snapshots: Vec::new(),
    };
    let mut qmp = match Qmp::connect(&machine.monitor) {
        Ok(qmp) => qmp,
        Err(error) if error.code() == Code::NotFound => return Ok(off()),
        Err(error) => return Err(error),
    };
    let disks = disks::disks(&mut qmp)?;
    let internal = disks.iter().flat_map(|disk| &disk.node.image.snapshots);
    let seen = |snapshot: &disks::Internal| SnapshotSeen {
        name: super::channel::clean(&snapshot.name),
        taken: Some(snapshot.date_sec),
        checkpoint: false,
    };
    let snapshots = internal.map(seen).collect();
    Ok(MachineSummary {
        id: identity(machine, &mut qmp),
        name: config::name_of(machine, &mut qmp),
        state: state(&mut qmp),
        disks: disks.iter().map(disk_summary).collect(),
        snapshots,
    })
}

fn disk_summary(disk: &disks::Disk) -> DiskSummary {
    let named = disk.node.dirty_bitmaps.iter().filter(|bitmap| !bitmap.name.is_empty());
    let seen = |bitmap: &disks::Bitmap| BitmapSeen {
        name: super::channel::clean(&bitmap.name),
        ours: bitmap.name.starts_with(PREFIX),
        recording: bitmap.recording,
        inconsistent: bitmap.inconsistent,
    };
    DiskSummary {
        name: disk.name.clone(),
        path: PathBuf::from(&disk.node.file),
        format: disk.node.drv.clone(),
        size: Some(disk.node.image.virtual_size),
        backing: disk.node.backing(),
        bitmaps: named.map(seen).collect(),
    }
}

/// The UUID if the machine was given one, otherwise its name.
fn identity(machine: &QemuMachine, qmp: &mut Qmp) -> MachineId {
    let uuid = qmp.run("query-uuid", json!({})).ok();
    let uuid = uuid.as_ref().and_then(|answer| answer["UUID"].as_str());
    let given = uuid.filter(|uuid| uuid.bytes().any(|byte| !matches!(byte, b'0' | b'-')));
    MachineId(given.map_or_else(|| machine.name.clone(), super::channel::clean))
}

fn state(qmp: &mut Qmp) -> MachineState {
    // A storage daemon does not know the question, and always runs.
    let answer = qmp.run("query-status", json!({})).unwrap_or_else(|_| json!({ "status": "running" }));
    match answer["status"].as_str().unwrap_or_default() {
        "running" => MachineState::Running,
        "guest-panicked" | "internal-error" | "io-error" => MachineState::Crashed,
        "shutdown" | "prelaunch" | "inmigrate" => MachineState::ShutOff,
        "paused" | "suspended" | "debug" | "watchdog" => MachineState::Paused,
        _ => MachineState::Unknown,
    }
}

fn missing(id: &MachineId) -> Error {
    Error::new(Code::NotFound, format!("no machine {} is known here", id.0))
}

fn unsupported(what: &str) -> Error {
    let what = format!("machines of plain QEMU cannot be {what} here");
    Error::new(Code::Unsupported, what)
        .hint("name the directory that its disks and its start script go to: dir:DIRECTORY")
}

/// For questions that some kinds of QEMU do not know.
fn optional(qmp: &mut Qmp, command: &str) -> Value {
    qmp.run(command, json!({})).unwrap_or_default()
}
