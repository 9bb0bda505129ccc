//! The lines that tell of virtual machines.

use mainstay_repository::PointInfo;
use schemars::JsonSchema;
use serde::Serialize;

use super::lines::{Changes, stamp};
use super::sprawl::Standing;

/// A machine of a host, and how it stands.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Machine {
    pub id: String,
    pub name: String,
    pub host: String,
    /// running, paused, shut off, saved, crashed, unknown
    pub state: String,
    pub disks: Vec<String>,
    /// Of all disks whose size the host tells.
    pub bytes: u64,
    /// Null for a machine that nobody protects.
    pub workload: Option<String>,
    pub last_point: Option<String>,
    pub last_backed_up: Option<String>,
    /// protected, unprotected, overdue
    pub protection: String,
    #[serde(flatten)]
    pub standing: Standing,
}

/// The points that are shown together: an image of a machine, and newer files over it. Open databases among the files
/// are not application-consistent.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Composed {
    pub image: Layer,
    /// Each lies over those before it.
    pub files: Vec<Layer>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Layer {
    pub point: String,
    pub workload: String,
    pub moment: String,
    /// The machine that took it, and the writer whose key signed it.
    pub host: String,
    pub writer: String,
    /// fuzzy, crash, file-system, application, offline
    pub consistency: String,
}

impl Composed {
    pub(crate) fn of(image: &PointInfo, files: &[PointInfo]) -> Self {
        Self { image: Layer::of(image), files: files.iter().map(Layer::of).collect() }
    }
}

impl Layer {
    fn of(point: &PointInfo) -> Self {
        Self {
            point: point.id.to_string(),
            workload: point.workload.name.clone(),
            moment: stamp(point.moment),
            host: point.host.clone(),
            writer: point.writer.to_string(),
            consistency: point.consistency.name().to_owned(),
        }
    }
}

/// How a machine was captured; a line of the type `backed_up` follows.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct MachineCaptured {
    pub point: String,
    pub workload: String,
    pub machine: String,
    pub host: String,
    /// crash, file-system, application, offline
    pub consistency: String,
    /// For so long the guest's file systems stood still.
    pub frozen_milliseconds: u64,
    pub disks: Vec<CapturedDisk>,
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct CapturedDisk {
    pub name: String,
    pub bytes: u64,
    /// full, incremental, scan
    pub mode: String,
    /// Why everything had to be read.
    pub why: Option<String>,
    /// Changes are tracked from now on.
    pub tracked: bool,
}

/// Another host copied a machine here. It is no point yet.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct MachineReceived {
    pub machine: String,
    /// The directory of copies.
    pub stage: String,
    /// crash, file-system, application
    pub consistency: String,
    /// For so long the guest's file systems stood still.
    pub frozen_milliseconds: u64,
    pub disks: Vec<CapturedDisk>,
    /// What came over the network.
    pub received_bytes: u64,
    pub seconds: f64,
    pub notes: Vec<String>,
}

/// The disks of a machine were written.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct MachineRestored {
    pub point: String,
    pub workload: String,
    pub written: Vec<Written>,
    /// Of the disks and documents.
    pub bytes: u64,
    /// Of data; the rest is holes.
    pub written_bytes: u64,
    pub seconds: f64,
}

/// Newer files were put on the restored disks.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct FilesApplied {
    /// The point of the disks.
    pub image: String,
    /// The points of the files, in this order.
    pub files: Vec<String>,
    #[serde(flatten)]
    pub changes: Changes,
    pub written_bytes: u64,
    /// What could not be put where it belongs.
    pub skipped: u64,
    pub damaged: u64,
    pub seconds: f64,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Written {
    pub item: String,
    pub path: String,
    pub bytes: u64,
}

/// A machine was put back over its present disks.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct MachinePutBack {
    pub point: String,
    pub workload: String,
    pub machine: String,
    pub host: String,
    /// The point that takes it back.
    pub undo: String,
    pub written: Vec<Written>,
    /// Of the disks.
    pub bytes: u64,
    /// Of them differed and were written.
    pub written_bytes: u64,
    pub started: bool,
    pub seconds: f64,
}

/// A machine was brought back as a machine of a host.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct MachineRecovered {
    pub point: String,
    pub workload: String,
    /// How the host calls it.
    pub machine: String,
    pub name: String,
    pub host: String,
    pub directory: String,
    /// It was there before this run, which left it as it is; the times are those of then.
    pub was_complete: bool,
    pub started: bool,
    pub write_seconds: f64,
    pub define_seconds: f64,
    /// From its start to the end of the wait for it.
    pub start_seconds: f64,
    pub check_seconds: f64,
    /// In all: the measured recovery time.
    pub seconds: f64,
    /// Of the disks.
    pub bytes: u64,
    /// Of data; the rest is holes.
    pub written_bytes: u64,
}

/// A machine runs from its point.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct MachineRunning {
    pub point: String,
    pub workload: String,
    /// From the start to the first answer of the guest's agent; null when it did not answer in time.
    pub seconds: Option<f64>,
    /// What the machine has read until then.
    pub bytes_read: u64,
    /// What was fetched from the repository for it: stored bytes, mostly compressed.
    pub bytes_fetched: u64,
    pub directory: String,
    /// The process of the machine.
    pub process: u32,
    /// An earlier run had started it.
    pub joined: bool,
}

/// The disks of a running machine are where it runs, and need the repository no more.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct MachineHome {
    pub point: String,
    pub directory: String,
    pub seconds: f64,
}

/// A point was proven by starting what it holds.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Proven {
    pub point: String,
    pub workload: String,
    /// Until the guest's agent answered.
    pub boot_seconds: f64,
    /// Until the last check had passed: the measured recovery time.
    pub seconds: u64,
    pub checks: u64,
    /// What the machine has read.
    pub bytes_read: u64,
    /// What was fetched from the repository for it: stored bytes, mostly compressed.
    pub bytes_fetched: u64,
}

/// A point was started, and the machine did not come up or failed a check.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Unproven {
    pub point: String,
    pub workload: String,
    pub why: String,
    /// Where to look.
    pub hint: Option<String>,
}
