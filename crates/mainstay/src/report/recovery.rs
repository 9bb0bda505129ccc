//! The lines that tell of recovery plans.

use jiff::tz::TimeZone;
use schemars::JsonSchema;
use serde::Serialize;

use super::human::{Align, bytes};
use super::machines::MachineRecovered;
use super::text::{clean, seconds, shown_time};

/// A machine of a recovery plan, and what would be done with it.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct RecoveryPlanned {
    pub name: String,
    /// new; begun, written, defined, started or complete by an earlier run; impossible
    pub state: String,
    /// Why it is impossible.
    pub why: Option<String>,
    pub point: Option<String>,
    /// That the point stands for.
    pub moment: Option<String>,
    /// Machines that must be there first.
    pub after: Vec<String>,
    pub directory: String,
    pub disks: u64,
    /// That its disks will have.
    pub bytes: u64,
    /// Of data in them.
    pub data_bytes: u64,
    pub cpus: Option<u32>,
    /// Bytes.
    pub memory: Option<u64>,
    /// What its interfaces are plugged into; none for one that is taken away.
    pub networks: Vec<String>,
    pub starts: bool,
    /// agent, nothing, or a time
    pub waits_for: String,
    /// At 150 MB of data in a second, and half a minute for an agent.
    pub estimated_seconds: f64,
}

/// What became of a machine of a recovery plan.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct RecoveryState {
    pub name: String,
    /// complete, was complete, failed, not tried
    pub state: String,
    /// Why it is not there.
    pub why: Option<String>,
    pub recovered: Option<MachineRecovered>,
}

pub(super) const PLANNED: [(&str, Align); 11] = [
    ("MACHINE", Align::Left),
    ("STATE", Align::Left),
    ("POINT", Align::Left),
    ("DISKS", Align::Right),
    ("DATA", Align::Right),
    ("CPUS", Align::Right),
    ("MEMORY", Align::Right),
    ("ABOUT", Align::Right),
    ("AFTER", Align::Left),
    ("WAITS FOR", Align::Left),
    ("", Align::Left),
];

pub(super) const STATES: [(&str, Align); 8] = [
    ("MACHINE", Align::Left),
    ("STATE", Align::Left),
    ("WRITE", Align::Right),
    ("START", Align::Right),
    ("CHECKS", Align::Right),
    ("IN ALL", Align::Right),
    ("DATA", Align::Right),
    ("", Align::Left),
];

impl RecoveryPlanned {
    pub(super) fn row(&self, zone: &TimeZone) -> Vec<String> {
        let nothing = String::new;
        vec![
            clean(&self.name),
            self.state.clone(),
            self.moment.as_deref().map_or_else(nothing, |moment| shown_time(moment, zone)),
            bytes(self.bytes),
            bytes(self.data_bytes),
            self.cpus.map_or_else(nothing, |cpus| cpus.to_string()),
            self.memory.map_or_else(nothing, bytes),
            seconds(self.estimated_seconds),
            clean(&self.after.join(", ")),
            if self.starts { self.waits_for.clone() } else { "is not started".to_owned() },
            self.why.as_deref().map_or_else(|| clean(&self.networks.join(", ")), clean),
        ]
    }
}

impl RecoveryState {
    pub(super) fn row(&self) -> Vec<String> {
        let time = |of: fn(&MachineRecovered) -> f64| {
            self.recovered.as_ref().map_or_else(String::new, |recovered| seconds(of(recovered)))
        };
        vec![
            clean(&self.name),
            self.state.clone(),
            time(|recovered| recovered.write_seconds),
            time(|recovered| recovered.start_seconds),
            time(|recovered| recovered.check_seconds),
            time(|recovered| recovered.seconds),
            self.recovered.as_ref().map_or_else(String::new, |recovered| bytes(recovered.written_bytes)),
            self.why.as_deref().map(clean).unwrap_or_default(),
        ]
    }
}
