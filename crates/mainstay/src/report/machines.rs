//! The lines that tell of virtual machines.

use schemars::JsonSchema;
use serde::Serialize;

/// A machine of a host, and how it stands.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Machine {
    pub id: String,
    pub name: String,
    pub host: String,
    /// running, paused, shut off, crashed, unknown
    pub state: String,
    pub disks: Vec<String>,
    /// Of all disks whose size the host tells.
    pub bytes: u64,
    /// Null for a machine that nobody protects.
    pub workload: Option<String>,
    pub last_point: Option<String>,
    pub last_backed_up: Option<String>,
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

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Written {
    pub item: String,
    pub path: String,
    pub bytes: u64,
}
