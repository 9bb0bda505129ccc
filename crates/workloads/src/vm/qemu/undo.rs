//! Taking away what a run put into a QEMU, after the run or after its death. Everything a run makes carries its
//! prefix, so that one sweep finds it whatever the run got to.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::disks::{Node, drives};
use super::hold::set_drive;
use super::link::Far;
use crate::vm::endpoint::Endpoint;
use crate::vm::qmp::Qmp;

/// What QEMU may take to let go of an export or a job.
const LET_GO: Duration = Duration::from_secs(30);

/// What a run has put into a QEMU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::vm) struct Remains {
    pub(super) qmp: Endpoint,
    /// How the names of all that the run makes begin.
    pub(super) prefix: String,
    /// The run started the NBD server.
    pub(super) server: bool,
    /// Devices that may use a filter of the run, and the nodes that are theirs.
    pub(super) drives: Vec<(String, String)>,
    /// A file that stands as long as the run has halted the guest's processors.
    pub(super) stopped: PathBuf,
    /// What lies on another machine.
    pub(super) far: Option<Far>,
}

#[derive(Deserialize)]
struct Named {
    id: String,
}

#[derive(Deserialize)]
struct Job {
    id: String,
    status: String,
}

impl Remains {
    /// After the death of the run. A QEMU that is gone has nothing left to remove.
    pub(in crate::vm) fn clear(&self) -> Result<()> {
        if let Some(far) = &self.far {
            far.thaw();
        }
        match Qmp::connect(&self.qmp) {
            Ok(mut qmp) => self.remove(&mut qmp),
            Err(error) if error.code() == Code::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Goes on past what cannot be removed, and tells the first reason.
    pub(super) fn remove(&self, qmp: &mut Qmp) -> Result<()> {
        let mut first = Ok(());
        let mut note = |outcome: Result<()>| {
            if first.is_ok() {
                first = outcome;
            }
        };
        // A guest that stands comes before everything.
        note(continue_after(qmp, &self.stopped));
        // Whoever reads goes first, then what is read, then what keeps it.
        note(self.exports(qmp));
        note(self.jobs(qmp, "k"));
        note(self.nodes(qmp, "snapshot-access"));
        note(self.jobs(qmp, ""));
        note(self.put_back(qmp));
        note(self.nodes(qmp, ""));
        note(self.bitmaps(qmp));
        if self.server {
            note(stop_server(qmp));
        }
        if let Some(far) = &self.far {
            note(far.remove(qmp, self));
        }
        first
    }

    /// Nobody reads the disks any more, and the bitmaps beside them are free.
    pub(super) fn exports(&self, qmp: &mut Qmp) -> Result<()> {
        let all: Vec<Named> = qmp.ask("query-block-exports", json!({}))?;
        let ours = all.iter().filter(|one| one.id.starts_with(&self.prefix));
        ours.map(|one| remove_export(qmp, &one.id)).fold(Ok(()), Result::and)
    }

    /// Ends our jobs whose names go on like that.
    fn jobs(&self, qmp: &mut Qmp, kind: &str) -> Result<()> {
        let prefix = format!("{}{kind}", self.prefix);
        let all: Vec<Job> = qmp.ask("query-jobs", json!({}))?;
        let ours = all.iter().filter(|job| job.id.starts_with(&prefix));
        let end = |job: &Job| match job.status.as_str() {
            "concluded" => qmp.run("job-dismiss", json!({ "id": job.id })).map(drop),
            _ => cancel(qmp, &job.id),
        };
        ours.map(end).fold(Ok(()), Result::and)
    }

    /// Removes our nodes of one kind; all when it is empty.
    fn nodes(&self, qmp: &mut Qmp, driver: &str) -> Result<()> {
        let nodes: Vec<Node> = qmp.ask("query-named-block-nodes", json!({ "flat": true }))?;
        let ours = nodes.iter().filter(|node| node.node_name.starts_with(&self.prefix));
        let ours = ours.filter(|node| driver.is_empty() || node.drv == driver);
        let remove = |node: &Node| qmp.run("blockdev-del", json!({ "node-name": node.node_name })).map(drop);
        ours.map(remove).fold(Ok(()), Result::and)
    }

    /// Gives the devices their own disks back.
    fn put_back(&self, qmp: &mut Qmp) -> Result<()> {
        let mut outcome = Ok(());
        for (device, used) in drives(qmp)?.iter().filter(|(_, used)| used.starts_with(&self.prefix)) {
            let own = self.drives.iter().find(|(known, _)| known == device);
            outcome = outcome.and(match own {
                Some((_, own)) => set_drive(qmp, device, own),
                None => Err(Error::bug(format!("whose node {used} of {device} is, is not known"))),
            });
        }
        outcome
    }

    /// Removes the bitmaps that lived for this run only.
    fn bitmaps(&self, qmp: &mut Qmp) -> Result<()> {
        let nodes: Vec<Node> = qmp.ask("query-named-block-nodes", json!({ "flat": true }))?;
        let mut outcome = Ok(());
        for node in &nodes {
            for bitmap in node.dirty_bitmaps.iter().filter(|bitmap| bitmap.name.starts_with(&self.prefix)) {
                outcome = outcome.and(remove_bitmap(qmp, &node.node_name, &bitmap.name));
            }
        }
        outcome
    }
}

/// Has the guest's processors go on, if a run has halted them.
pub(super) fn continue_after(qmp: &mut Qmp, stopped: &Path) -> Result<()> {
    if !stopped.exists() {
        return Ok(());
    }
    qmp.run("cont", json!({}))?;
    std::fs::remove_file(stopped)
        .map_err(|error| Error::io(format!("cannot remove {}", stopped.display()), error))
}

pub(super) fn remove_bitmap(qmp: &mut Qmp, node: &str, name: &str) -> Result<()> {
    qmp.run("block-dirty-bitmap-remove", json!({ "node": node, "name": name })).map(drop)
}

fn remove_export(qmp: &mut Qmp, id: &str) -> Result<()> {
    qmp.run("block-export-del", json!({ "id": id, "mode": "hard" }))?;
    let gone = qmp.wait("BLOCK_EXPORT_DELETED", LET_GO, |data| data["id"].as_str() == Some(id))?;
    let late = || Error::new(Code::Io, format!("QEMU does not let go of the export {id}"));
    if gone { Ok(()) } else { Err(late()) }
}

fn cancel(qmp: &mut Qmp, id: &str) -> Result<()> {
    qmp.run("job-cancel", json!({ "id": id }))?;
    let over = |data: &Value| data["id"].as_str() == Some(id) && data["status"].as_str() == Some("null");
    let gone = qmp.wait("JOB_STATUS_CHANGE", LET_GO, over)?;
    let late = || Error::new(Code::Io, format!("QEMU does not end the job {id}"));
    if gone { Ok(()) } else { Err(late()) }
}

/// Stops the server, unless somebody else uses it meanwhile.
fn stop_server(qmp: &mut Qmp) -> Result<()> {
    let exports: Vec<Value> = qmp.ask("query-block-exports", json!({}))?;
    if exports.iter().any(|export| export["type"].as_str() == Some("nbd")) {
        return Ok(());
    }
    qmp.run("nbd-server-stop", json!({})).map(drop)
}
