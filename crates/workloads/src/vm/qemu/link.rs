//! A QEMU on another machine, which needs no program of ours: it offers the held disks by itself, under TLS, and keeps
//! in a file of its own what the guest overwrites meanwhile.
//!
//! The link may be cut at any moment, and then nothing more can be said to the host. So nothing is ever done over a
//! link that the guest could not live with for good: its processors are never halted, its file systems are frozen only
//! under a timer that runs inside the guest ([`crate::vm::agent::Agent::set_timer`]), and when what it overwrites
//! cannot be kept, it is the snapshot that is given up.

use std::path::PathBuf;
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use mainstay_nbd::{Address, Client, ClientTls};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::undo::Remains;
use crate::vm::agent::Agent;
use crate::vm::endpoint::Endpoint;
use crate::vm::qmp::Qmp;

/// What making a file may take: one that is reserved in full is written by some file systems.
const CREATE: Duration = Duration::from_secs(60);

/// What the guest may take to thaw, which most likely is.
const THAW: Duration = Duration::from_secs(10);

/// How to get at the disks of a QEMU on another machine, or of the machines of a libvirt there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Where QEMU is to offer its disks, as seen from both sides.
    pub host: String,
    pub port: u16,
    /// The directory of our certificates ([`ClientTls::from_directory`]).
    pub tls: PathBuf,
    /// On the host: the directory of QEMU's own certificates, by the same names; a libvirt knows its own.
    pub host_tls: PathBuf,
    /// On the host: where QEMU may make files. What the guest overwrites during a run is kept there, so it should be
    /// for QEMU's eyes only. The files are empty after a run; QEMU cannot remove them.
    pub host_scratch: PathBuf,
}

/// What a run leaves on a host that only its QEMU can take away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Far {
    /// To thaw the guest after a death, should it have been frozen.
    pub(super) agent: Option<Endpoint>,
    pub(super) scratch: Vec<PathBuf>,
}

impl Link {
    fn address(&self) -> Address {
        Address::tcp(self.host.clone(), self.port)
    }

    /// Has QEMU listen for us, and for nobody without a certificate of our authority.
    pub(super) fn listen(&self, qmp: &mut Qmp, prefix: &str) -> Result<()> {
        let credentials = format!("{prefix}tls");
        add_credentials(qmp, &credentials, "server", &self.host_tls)?;
        let address = json!({ "host": self.host, "port": self.port.to_string() });
        let address = json!({ "type": "inet", "data": address });
        qmp.run("nbd-server-start", json!({ "addr": address, "tls-creds": credentials }))
            .map(drop)
            .map_err(|error| error.hint("each QEMU of a host needs a port of its own: nbd=HOST:PORT"))
    }

    pub(in crate::vm) fn client(&self, export: String) -> Result<Client> {
        Ok(Client::new(self.address(), export).tls(ClientTls::from_directory(&self.tls)?))
    }

    /// The scratch file of the disk at `index`: always the same one, so that no more and no more of them lie about.
    pub(super) fn scratch(&self, machine: &str, index: usize) -> PathBuf {
        let plain = |letter: char| if letter.is_ascii_alphanumeric() { letter } else { '_' };
        let machine: String = machine.chars().take(64).map(plain).collect();
        self.host_scratch.join(format!("mainstay-scratch-{machine}-{index}"))
    }
}

impl Far {
    /// The guest first: a run that died may have frozen it.
    pub(super) fn thaw(&self) {
        // Its own timer thaws it in any case.
        let agent = self.agent.as_ref().map(Agent::connect);
        let _best_effort = agent.map(|agent| agent.and_then(|mut agent| agent.thaw(THAW)));
    }

    /// What is left when all nodes and exports are gone.
    pub(super) fn remove(&self, qmp: &mut Qmp, remains: &Remains) -> Result<()> {
        let mut outcome = Ok(());
        for (number, file) in self.scratch.iter().enumerate() {
            let job = format!("{}z{number}", remains.prefix);
            outcome = outcome.and(create(qmp, &job, file, 0, false));
        }
        let objects: Vec<Value> = qmp.ask("qom-list", json!({ "path": "/objects" }))?;
        let names = objects.iter().filter_map(|object| object["name"].as_str());
        for name in names.filter(|name| name.starts_with(&remains.prefix)) {
            outcome = outcome.and(qmp.run("object-del", json!({ "id": name })).map(drop));
        }
        outcome
    }
}

/// `endpoint` is which side of a connection QEMU is to be.
pub(super) fn add_credentials(
    qmp: &mut Qmp,
    name: &str,
    endpoint: &str,
    directory: &std::path::Path,
) -> Result<()> {
    let wanted = json!({ "qom-type": "tls-creds-x509", "id": name, "endpoint": endpoint, "dir": directory,
        "verify-peer": true });
    qmp.run("object-add", wanted).map(drop).map_err(|error| {
        error.hint(format!("on the host, {} must hold certificates that QEMU can read", directory.display()))
    })
}

/// Has QEMU make a file of this many bytes, or empty one that is there. `reserve`: all its room is taken at once.
pub(super) fn create(
    qmp: &mut Qmp,
    job: &str,
    file: &std::path::Path,
    size: u64,
    reserve: bool,
) -> Result<()> {
    let preallocation = if reserve { "falloc" } else { "off" };
    let options = json!({ "driver": "file", "filename": file, "size": size, "preallocation": preallocation });
    qmp.run("blockdev-create", json!({ "job-id": job, "options": options }))?;
    let over =
        |data: &Value| data["id"].as_str() == Some(job) && data["status"].as_str() == Some("concluded");
    let fail = |why: &str| {
        let what = format!("QEMU cannot make {} on the host: {why}", file.display());
        Error::new(Code::Io, what)
            .hint("host-scratch=DIR must be a directory on the host that QEMU may write to")
    };
    if !qmp.wait("JOB_STATUS_CHANGE", CREATE, over)? {
        return Err(fail("it does not answer"));
    }
    let jobs: Vec<Value> = qmp.ask("query-jobs", json!({}))?;
    let outcome =
        jobs.iter().find(|one| one["id"].as_str() == Some(job)).and_then(|one| one["error"].as_str());
    let outcome = outcome.map_or(Ok(()), |why| Err(fail(&crate::vm::channel::clean(why))));
    qmp.run("job-dismiss", json!({ "id": job }))?;
    outcome
}
