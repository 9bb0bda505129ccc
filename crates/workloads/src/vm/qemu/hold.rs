//! Holding the disks still: from one moment on, old content is copied away before the guest overwrites it.
//!
//! Best are filters of our own between device and disk. When something cannot be copied away, or not in time, they give
//! the snapshot up and not the guest's write. They are put in one by one, so the guest's processors are halted for these
//! milliseconds if there are several disks. What has no device that could be given a filter, a storage daemon, gets jobs,
//! which begin in one transaction; they spare the guest's writes since QEMU 10.1.

use std::path::Path;

use mainstay_core::{Code, Error, Result};
use serde_json::{Value, json};

use super::undo::continue_after;
use crate::vm::qmp::Qmp;

/// The first QEMU whose jobs give up the snapshot, and not the guest's write.
const JOBS_BREAK_SNAPSHOT: (u64, u64) = (10, 1);

/// How long a guest's write may wait for the old content to be copied away, in seconds; then the snapshot is given up.
const PATIENCE: u32 = 45;

/// A disk to be held, and the names of what holds it.
pub(super) struct Held {
    /// The device that the guest sees.
    pub(super) device: Option<String>,
    pub(super) node: String,
    pub(super) scratch: String,
    pub(super) filter: String,
    pub(super) job: String,
}

/// What keeps several disks at one moment while the filters are put in one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Together {
    /// Nothing writes: the guest's file systems are frozen, or its processors are at rest.
    Still,
    /// The guest's processors are halted by us.
    Halt,
    /// Nothing; it takes jobs, which begin in one transaction.
    Transaction,
}

/// What is ready to hold the disks.
pub(super) enum Hold {
    Filters(Vec<Held>),
    Jobs(Vec<Held>),
}

impl Hold {
    /// Prepares filters where they can be had, otherwise jobs. The scratch nodes are there.
    pub(super) fn prepare(qmp: &mut Qmp, disks: Vec<Held>) -> Self {
        if disks.is_empty() || disks.iter().any(|disk| disk.device.is_none()) {
            return Self::Jobs(disks);
        }
        let added = disks.iter().take_while(|disk| {
            let filter = json!({ "driver": "copy-before-write", "node-name": disk.filter, "file": disk.node,
                "target": disk.scratch, "on-cbw-error": "break-snapshot", "cbw-timeout": PATIENCE });
            qmp.run("blockdev-add", filter).is_ok()
        });
        if added.count() == disks.len() {
            return Self::Filters(disks);
        }
        remove_filters(qmp, &disks);
        Self::Jobs(disks)
    }

    /// Whether a guest's write fails rather than the snapshot, should there be no room for what it overwrites.
    pub(super) fn endangers_the_guest(&self, qmp: &Qmp) -> bool {
        matches!(self, Self::Jobs(_)) && Self::jobs_endanger(qmp)
    }

    pub(super) fn jobs_endanger(qmp: &Qmp) -> bool {
        qmp.version < JOBS_BREAK_SNAPSHOT
    }

    /// The moment. `stopped` is a file that stands as long as the guest's processors are halted by us. `risk`: jobs will
    /// do, even if they fail the guest's write when there is no room for what it overwrites.
    pub(super) fn begin(
        &mut self,
        qmp: &mut Qmp,
        together: Together,
        stopped: &Path,
        risk: bool,
    ) -> Result<()> {
        if let Self::Filters(disks) = self {
            match insert(qmp, disks, together, stopped) {
                Ok(()) => return Ok(()),
                // They are out again, and the jobs take the names.
                Err(_) => remove_filters(qmp, disks),
            }
            *self = Self::Jobs(std::mem::take(disks));
        }
        let breaks = qmp.version >= JOBS_BREAK_SNAPSHOT;
        if !breaks && !risk {
            let what = "this QEMU could hold the disks only at the risk of the guest's writes";
            return Err(Error::new(Code::Unsupported, what)
                .hint("QEMU 10.1 can, or one whose guest is frozen by its agent: agent=tcp://HOST:PORT"));
        }
        let Self::Jobs(disks) = self else { return Ok(()) };
        let actions: Vec<Value> = disks.iter().map(|disk| job(disk, breaks)).collect();
        qmp.run("transaction", json!({ "actions": actions })).map(drop)
    }
}

fn remove_filters(qmp: &mut Qmp, disks: &[Held]) {
    for disk in disks {
        // One that was never added is not there.
        let _absent = qmp.run("blockdev-del", json!({ "node-name": disk.filter }));
    }
}

/// Puts the filters in, all or none.
fn insert(qmp: &mut Qmp, disks: &[Held], together: Together, stopped: &Path) -> Result<()> {
    let several = disks.len() > 1;
    if several && together == Together::Transaction {
        return Err(Error::bug("filters are not put in in one transaction"));
    }
    let halt = several && together == Together::Halt;
    if halt {
        std::fs::write(stopped, "")
            .map_err(|error| Error::io(format!("cannot write {}", stopped.display()), error))?;
        qmp.run("stop", json!({}))?;
    }
    let mut outcome = Ok(());
    let mut inserted = 0;
    for disk in disks {
        outcome = set_drive(qmp, disk.device.as_deref().unwrap_or_default(), &disk.filter);
        if outcome.is_err() {
            break;
        }
        inserted += 1;
    }
    if outcome.is_err() {
        for disk in disks.iter().take(inserted) {
            set_drive(qmp, disk.device.as_deref().unwrap_or_default(), &disk.node)?;
        }
    }
    if halt {
        continue_after(qmp, stopped)?;
    }
    outcome
}

/// Has a device use another node. `device` is what QEMU calls it: an id, or a path in its object tree.
pub(super) fn set_drive(qmp: &mut Qmp, device: &str, node: &str) -> Result<()> {
    let path =
        if device.starts_with('/') { device.to_owned() } else { format!("/machine/peripheral/{device}") };
    qmp.run("qom-set", json!({ "path": path, "property": "drive", "value": node })).map(drop)
}

fn job(disk: &Held, breaks: bool) -> Value {
    let mut data = json!({ "job-id": disk.job, "device": disk.node, "target": disk.scratch, "sync": "none",
        "filter-node-name": disk.filter });
    if breaks {
        data["on-cbw-error"] = "break-snapshot".into();
    }
    json!({ "type": "blockdev-backup", "data": data })
}
