//! A host that copies one moment of its machine to us: it writes what changed since the last copy straight into our NBD
//! server, from the held disks, so that the guest never waits for the network. Then the host is let go, and what
//! arrived is backed up whenever there is time for it.

use std::time::Duration;

use mainstay_core::{Code, Consistency, Error, Progress, Result, Time};
use mainstay_nbd::{Address, Export, Server, ServerOptions, ServerTls};
use serde_json::{Value, json};

use super::link::add_credentials;
use super::{QemuHost, snapshot};
use crate::vm::hypervisor::{DiskMode, DiskSnapshot, MachineId, MachineSnapshot, SnapshotRequest};
use crate::vm::stage::{Incoming, Stage};

/// How often it is asked whether the run is to stop.
const LOOK: Duration = Duration::from_millis(500);

/// What [`QemuHost::push`] did.
#[derive(Clone, Debug)]
pub struct Received {
    pub name: String,
    pub reached: Consistency,
    pub frozen: Duration,
    pub disks: Vec<DiskSnapshot>,
    /// Bytes that came over the network, without what was said to be zeros.
    pub bytes: u64,
    pub notes: Vec<String>,
}

impl QemuHost {
    /// Has the host copy a machine into `stage`. `listen` is where it finds us.
    ///
    /// Errors: [`Code::Usage`] when the machine is not on another host; those of [`crate::vm::Hypervisor::snapshot`];
    /// what became of the link. The copy is unfinished then, and the next push completes it; the guest runs.
    pub fn push(
        &self,
        machine: &MachineId,
        stage: &Stage,
        listen: &Address,
        request: &SnapshotRequest,
        progress: &dyn Progress,
    ) -> Result<Received> {
        let swept = self.sweep_remains();
        let (known, mut qmp) = self.connect(machine)?;
        let Some(link) = &known.link else {
            return Err(Error::new(
                Code::Usage,
                "the machine is on this host, where nothing has to be copied",
            )
            .hint("back it up with mainstay vm backup"));
        };
        // It may have been named otherwise; the copy is kept under what the machine is.
        let machine = super::identity(known, &mut qmp);
        let mut incoming = stage.begin(&machine, request.owner)?;
        let request = SnapshotRequest { owner: incoming.owner(), since: incoming.since(), ..request.clone() };
        let taken = snapshot::take(self, known, qmp, &request)?.with_notes(swept);
        let moment = self.clock.now();
        let tls = ServerTls::from_directory(&link.tls)?;
        let exports = exports(&mut incoming, taken.disks(), &request)?;
        let server =
            Server::start(listen, exports, ServerOptions { tls: Some(tls), ..ServerOptions::default() })?;
        let pushed = taken.push(server.address(), &name(&request, ""), progress);
        let bytes = (0..taken.disks().len())
            .filter_map(|index| server.counters(&name(&request, &index.to_string())))
            .map(|counters| counters.bytes_written)
            .sum();
        // Whatever became of it, the server is gone before the copy is called whole.
        let stopped = server.stop();
        pushed.and(stopped)?;
        let received = Received {
            name: taken.machine().name.clone(),
            reached: taken.reached(),
            frozen: taken.frozen(),
            disks: taken.disks().to_vec(),
            bytes,
            notes: taken.notes().to_vec(),
        };
        finish(incoming, taken, &request, moment)?;
        Ok(received)
    }
}

fn finish(
    incoming: Incoming,
    taken: snapshot::QemuSnapshot,
    request: &SnapshotRequest,
    moment: Time,
) -> Result<()> {
    incoming.finish(&taken, request.run, moment)?;
    Box::new(taken).commit()
}

/// Nobody can guess it, and the server tells it to nobody, so that no other host writes into this machine's copy.
fn name(request: &SnapshotRequest, index: &str) -> String {
    format!("{}-{index}", request.run)
}

fn exports(
    incoming: &mut Incoming,
    disks: &[DiskSnapshot],
    request: &SnapshotRequest,
) -> Result<Vec<Export>> {
    let opened = incoming.open(disks)?.into_iter().enumerate();
    Ok(opened
        .map(|(index, disk)| Export::writable(name(request, &index.to_string()), disk).hidden())
        .collect())
}

impl snapshot::QemuSnapshot {
    /// Has QEMU copy every disk, or what changed on it, to the exports called `name` with the disk's place after it.
    fn push(&self, to: &Address, name: &str, progress: &dyn Progress) -> Result<()> {
        let Address::Tcp { host, port } = to else {
            return Err(Error::new(Code::Usage, "a host finds nobody at the path of a socket")
                .hint("write --listen HOST:PORT"));
        };
        let mut session = self.session();
        let Some(link) = session.link.clone() else {
            return Err(Error::bug("a machine of this host is pushed"));
        };
        let remains = session.remains.clone();
        remains.exports(&mut session.qmp)?;
        let credentials = format!("{}push", remains.prefix);
        add_credentials(&mut session.qmp, &credentials, "client", &link.host_tls)?;
        for (index, disk) in self.disks().iter().enumerate() {
            let (source, target) = (session.name('a', index), session.name('t', index));
            let server = json!({ "type": "inet", "host": host, "port": port.to_string() });
            let node = json!({ "driver": "nbd", "node-name": target, "server": server,
                "export": format!("{name}{index}"), "tls-creds": credentials });
            session
                .qmp
                .run("blockdev-add", node)
                .map_err(|error| error.hint("can the host connect to --listen?"))?;
            let mut job = json!({ "job-id": session.name('k', index), "device": source, "target": target,
                "sync": "full" });
            if disk.mode == DiskMode::Incremental {
                let bitmap = session.name('p', index);
                let node = session.disks.get(index).map(|tracked| tracked.disk.node.node_name.clone());
                let from = json!([{ "node": node, "name": session.since_name(index) }]);
                let new = json!({ "node": source, "name": bitmap, "disabled": true });
                session.qmp.run("block-dirty-bitmap-add", new)?;
                let merge = json!({ "node": source, "target": bitmap, "bitmaps": from });
                session.qmp.run("block-dirty-bitmap-merge", merge)?;
                job["sync"] = "bitmap".into();
                job["bitmap"] = bitmap.into();
                job["bitmap-mode"] = "never".into();
            }
            session.qmp.run("blockdev-backup", job)?;
            session.wait_for_push(index, progress)?;
            session.qmp.run("blockdev-del", json!({ "node-name": target }))?;
        }
        Ok(())
    }
}

impl snapshot::Session {
    fn wait_for_push(&mut self, index: usize, progress: &dyn Progress) -> Result<()> {
        let job = self.name('k', index);
        let ours = |data: &Value| data["device"].as_str() == Some(job.as_str());
        loop {
            progress.check()?;
            let Some(data) = self.qmp.event("BLOCK_JOB_COMPLETED", LOOK, ours)? else { continue };
            let Some(why) = data["error"].as_str() else { return Ok(()) };
            let what = format!("the host could not copy its disk: {}", crate::vm::channel::clean(why));
            return Err(Error::new(Code::Io, what));
        }
    }
}
