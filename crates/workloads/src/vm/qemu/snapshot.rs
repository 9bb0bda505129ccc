//! One moment of a running QEMU's disks.
//!
//! ```text
//! before      scratch files, NBD server, a new bitmap on each disk: it records more than it must
//! the moment  [freeze] from now on old content is copied away before it is overwritten ([`super::hold`]) [thaw]
//! after       the old bitmap as it stands now, a little more than it must be, beside the frozen content on NBD
//! commit      the old bitmap is removed         abandon   the new one is
//! ```

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mainstay_core::{Blocks, Clock, Code, Consistency, Error, Result};
use mainstay_nbd::{Address, Client};
use serde_json::{Value, json};

use super::disks::{Disk, disks};
use super::hold::{Held, Hold, Together};
use super::link::{Far, create};
use super::undo::{Remains, remove_bitmap};
use super::{DRIVER, Link, PREFIX, QemuHost, QemuMachine, config, identity, state};
use crate::vm::agent::Agent;
use crate::vm::guard::{Frozen, Guard, Thaw};
use crate::vm::hypervisor::{
    DiskMode, DiskSnapshot, MachineId, MachineSnapshot, MachineState, Owner, SnapshotRequest,
};
use crate::vm::machine::Machine;
use crate::vm::mark::{BitmapState, DiskMark, Found, Marks};
use crate::vm::qmp::Qmp;
use crate::vm::run_dir::{self, Plan, RunDir};
use crate::vm::watch::{Broken, Watch, Watched, check, explain};

/// Bytes for which a bitmap has one bit: QEMU's own choice for most images.
const GRANULARITY: u64 = 64 << 10;

/// What a guest may take to trim its disks.
const TRIM: Duration = Duration::from_secs(120);

/// The oldest QEMU that can show the frozen content (`snapshot-access`).
const OLDEST: (u64, u64) = (7, 0);

/// See [`MachineSnapshot`].
pub(super) struct QemuSnapshot {
    /// Before the session: the guest's scratch is not watched while it is taken down.
    watch: Option<Watch>,
    session: Arc<Mutex<Session>>,
    broken: Broken,
    /// `None` when it is on another machine.
    scratch: Option<PathBuf>,
    id: MachineId,
    machine: Machine,
    disks: Vec<DiskSnapshot>,
    reached: Consistency,
    frozen: Duration,
    notes: Vec<String>,
}

/// What a run has put into a QEMU. Dropped, it takes it out again.
pub(super) struct Session {
    pub(super) qmp: Qmp,
    pub(super) remains: Remains,
    owner: Owner,
    pub(super) disks: Vec<Tracked>,
    /// To another machine.
    pub(super) link: Option<Link>,
    /// There is room for all that the guest may overwrite.
    reserved: bool,
    socket: PathBuf,
    state: SessionState,
    /// After the rest: it is said to be done only then.
    guard: Option<Guard>,
    directory: RunDir,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum SessionState {
    Open,
    /// Nothing can be read any more; the new bitmaps are still there.
    LetGo,
    Committed,
}

/// What counts when the disks are held.
struct Moment<'a> {
    /// The guest's processors are at work.
    running: bool,
    /// Several disks.
    several: bool,
    /// The longest that the guest may stand still.
    limit: Duration,
    clock: &'a dyn Clock,
}

/// A disk and its bitmaps.
pub(super) struct Tracked {
    pub(super) disk: Disk,
    inode: Option<u64>,
    mode: DiskMode,
    /// The bitmap that the mark of the last point names.
    old: Option<String>,
    /// The bitmap that records from this run on.
    new: Option<String>,
    increments: u32,
}

pub(super) fn take(
    host: &QemuHost,
    known: &QemuMachine,
    mut qmp: Qmp,
    request: &SnapshotRequest,
) -> Result<QemuSnapshot> {
    if qmp.version < OLDEST {
        let what = format!("QEMU {}.{} cannot show a frozen disk", qmp.version.0, qmp.version.1);
        return Err(Error::new(Code::Unsupported, what).hint("QEMU 7.0 and later can"));
    }
    let machine = config::machine(known, &mut qmp)?;
    let id = identity(known, &mut qmp);
    let running = state(&mut qmp) == MachineState::Running;
    let mut notes = Vec::new();
    let mut agent = if request.want >= Consistency::FileSystem && running {
        agent(known, request).map_err(|why| notes.push(why)).ok()
    } else {
        None
    };
    if let Some(agent) = agent.as_mut().filter(|_| request.trim) {
        let trouble = agent.trim(TRIM).err();
        notes.extend(
            trouble.map(|error| format!("the guest did not trim its disks: {}", error.chain().join(": "))),
        );
    }
    let tracked = choose(disks(&mut qmp)?, &request.disks)?;
    let here = known.link.is_none();
    let tracked: Vec<_> = tracked.into_iter().map(|disk| Tracked::judge(disk, &id, request, here)).collect();
    let several = tracked.len() > 1;
    let mut session = Session::open(host, known, qmp, request, tracked, agent.as_ref())?;
    session.prepare(request, &mut notes)?;
    let mut hold = session.hold();
    let moment = Moment { running, several, limit: request.freeze_limit, clock: host.clock.as_ref() };
    let (mut reached, frozen) = session.pin(&mut hold, agent.as_mut(), &moment, &mut notes)?;
    if request.hooked && reached == Consistency::FileSystem {
        reached = Consistency::Application;
    }
    if let Some(agent) = agent {
        // The guard holds the connection too; others may want it while the disks are read.
        agent.hang_up();
    }
    session.publish()?;
    let disks = session.disks.iter().map(Tracked::shown).collect();
    let endangered = hold.endangers_the_guest(&session.qmp);
    let (session, broken) = (Arc::new(Mutex::new(session)), Broken::default());
    let watch = if endangered && here { Some(watch(host, &session, &broken)?) } else { None };
    let scratch = here.then(|| host.scratch.clone());
    Ok(QemuSnapshot { watch, session, broken, scratch, id, machine, disks, reached, frozen, notes })
}

/// Gives the snapshot up when the scratch space runs out.
fn watch(host: &QemuHost, session: &Arc<Mutex<Session>>, broken: &Broken) -> Result<Watch> {
    let session = Arc::downgrade(session);
    Watch::start(&host.scratch, host.reserve, broken, move || {
        let Some(session) = session.upgrade() else { return };
        // Should it fail, the end of the run tries again.
        let _removed = session.lock().unwrap_or_else(PoisonError::into_inner).let_go();
    })
}

/// A connection to an agent that can freeze, or why there is none. On another machine the guest has a timer that thaws
/// it, whatever becomes of the link.
fn agent(known: &QemuMachine, request: &SnapshotRequest) -> std::result::Result<Agent, String> {
    let why = |error: Error| format!("the guest was not frozen: {}", error.chain().join(": "));
    let Some(socket) = &known.agent else {
        return Err("the guest was not frozen: no channel to a guest agent is known".into());
    };
    let mut agent = Agent::connect(socket).map_err(why)?;
    let info = agent.info().map_err(why)?;
    if !["guest-fsfreeze-freeze", "guest-fsfreeze-thaw"].iter().all(|needed| info.enabled.contains(*needed)) {
        return Err(format!("the guest was not frozen: its agent {} does not do that", info.version));
    }
    if known.link.is_some() {
        agent.set_timer(request.freeze_limit).map_err(why)?;
    }
    Ok(agent)
}

fn choose(all: Vec<Disk>, wanted: &[String]) -> Result<Vec<Disk>> {
    let names = || all.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(", ");
    if let Some(missing) = wanted.iter().find(|name| !all.iter().any(|disk| disk.name == **name)) {
        let what = format!("the machine has no disk {missing}");
        return Err(Error::new(Code::NotFound, what).hint(format!("its disks are {}", names())));
    }
    let chosen = |disk: &Disk| wanted.is_empty() || wanted.contains(&disk.name);
    Ok(all.into_iter().filter(chosen).collect())
}

impl Tracked {
    /// `here`: the image is a file of this machine.
    fn judge(disk: Disk, id: &MachineId, request: &SnapshotRequest, here: bool) -> Self {
        let inode = disk.node.inode().filter(|_| here);
        let mark = request.since.as_ref().and_then(|marks| marks.of(DRIVER, id, &disk.name));
        let bitmap = mark.and_then(|mark| mark.bitmap.as_deref()).and_then(|name| disk.node.bitmap(name));
        let found = Found {
            size: disk.node.image.virtual_size,
            image: &disk.node.file,
            inode,
            bitmap: bitmap.map(|bitmap| BitmapState {
                granularity: bitmap.granularity,
                recording: bitmap.recording,
                inconsistent: bitmap.inconsistent,
                busy: bitmap.busy,
            }),
        };
        let mode = mark.map_or(DiskMode::Full, |mark| mark.judge(&found, request.scan_every));
        let old = mark.and_then(|mark| mark.bitmap.clone());
        let increments = match mode {
            DiskMode::Incremental => mark.map_or(0, |mark| mark.increments.saturating_add(1)),
            DiskMode::Full | DiskMode::Scan { .. } => 0,
        };
        Self { disk, inode, mode, old, new: None, increments }
    }

    fn shown(&self) -> DiskSnapshot {
        DiskSnapshot {
            name: self.disk.name.clone(),
            size: self.disk.node.image.virtual_size,
            mode: self.mode.clone(),
            tracked: self.new.is_some(),
        }
    }

    fn mark(&self) -> DiskMark {
        DiskMark {
            bitmap: self.new.clone(),
            size: self.disk.node.image.virtual_size,
            granularity: GRANULARITY,
            image: self.disk.node.file.clone(),
            inode: self.inode,
            increments: self.increments,
            stamp: None,
        }
    }
}

/// How the names of an owner's bitmaps begin.
fn owned(owner: &Owner) -> String {
    format!("{PREFIX}{}-{}-", owner.repository, owner.workload)
}

impl Session {
    fn open(
        host: &QemuHost,
        known: &QemuMachine,
        qmp: Qmp,
        request: &SnapshotRequest,
        disks: Vec<Tracked>,
        agent: Option<&Agent>,
    ) -> Result<Self> {
        if known.link.is_none() {
            check(&host.scratch, host.reserve)?;
        }
        // `r` is no hexadecimal digit, so this begins no owner's name.
        let prefix = format!("{PREFIX}r{:.8}-", request.run.to_string());
        let drives = disks.iter().map(|tracked| &tracked.disk);
        let drives = drives.filter_map(|disk| Some((disk.device.clone()?, disk.node.node_name.clone())));
        let remains = Remains {
            qmp: known.monitor.clone(),
            prefix,
            server: known.server.is_none(),
            drives: drives.collect(),
            stopped: RunDir::file_of(&host.scratch, &request.run, "stopped"),
            far: known.link.as_ref().map(|link| Far {
                agent: known.agent.clone(),
                scratch: (0..disks.len()).map(|index| link.scratch(&known.name, index)).collect(),
            }),
        };
        let limit = u64::try_from(request.freeze_limit.as_millis()).unwrap_or(u64::MAX);
        let plan = Plan {
            thaw: known.agent.clone().map(|socket| Thaw::Agent { socket }),
            freeze_limit_milliseconds: limit,
            remains: run_dir::Remains::Qemu(remains.clone()),
        };
        let peer = qmp.peer().filter(|_| known.link.is_none());
        let user = peer.map(|peer| (peer.uid.as_raw(), peer.gid.as_raw()));
        let directory = RunDir::create(&host.scratch, &request.run, user, &plan)?;
        let link = known.link.clone();
        let socket = known.server.clone().unwrap_or_else(|| directory.place().join("nbd"));
        let (owner, state) = (request.owner, SessionState::Open);
        let reserved = link.is_some()
            && Hold::jobs_endanger(&qmp)
            && (disks.iter().any(|disk| disk.disk.device.is_none()) || disks.len() > 1 && agent.is_none());
        let mut session =
            Self { qmp, remains, owner, disks, link, reserved, socket, state, guard: None, directory };
        let directory = session.directory.path();
        let agent = agent.and_then(Agent::socket);
        session.guard = Some(Guard::start(host.guard.as_ref(), directory, agent)?);
        Ok(session)
    }

    /// The name of a thing of the disk at `index`.
    pub(super) fn name(&self, what: char, index: usize) -> String {
        format!("{}{what}{index}", self.remains.prefix)
    }

    /// Everything that can be done before the guest stands still.
    fn prepare(&mut self, request: &SnapshotRequest, notes: &mut Vec<String>) -> Result<()> {
        if let Some(link) = &self.link {
            link.listen(&mut self.qmp, &self.remains.prefix)?;
        } else if self.remains.server {
            let address = json!({ "type": "unix", "data": { "path": self.socket } });
            self.qmp.run("nbd-server-start", json!({ "addr": address })).map_err(|error| {
                error.hint("if this QEMU runs an NBD server already, tell Mainstay its socket")
            })?;
        }
        for index in 0..self.disks.len() {
            let Some(tracked) = self.disks.get(index) else { break };
            let (node, size) = (tracked.disk.node.node_name.clone(), tracked.disk.node.image.virtual_size);
            let (keeps, name) = (tracked.disk.node.keeps_bitmaps(), tracked.disk.name.clone());
            let file = self.scratch(index, size)?;
            let discard = if self.reserved { "ignore" } else { "unmap" };
            let scratch = json!({ "driver": "file", "node-name": self.name('s', index), "filename": file,
                "discard": discard });
            self.qmp.run("blockdev-add", scratch)?;
            let bitmap = format!("{}{}-{name}", owned(&self.owner), request.run);
            let new = match self.add_bitmap(&node, &bitmap, keeps) {
                Ok(()) => Some(bitmap),
                Err(error) => {
                    let why = error.chain().join(": ");
                    notes.push(format!("the next run has to read all of the disk {name}: {why}"));
                    None
                }
            };
            if let Some(tracked) = self.disks.get_mut(index) {
                tracked.new = new;
            }
        }
        Ok(())
    }

    /// A file for what the guest overwrites of a disk.
    fn scratch(&mut self, index: usize, size: u64) -> Result<PathBuf> {
        let Some(far) = &self.remains.far else {
            return self.directory.sparse(&format!("scratch{index}"), size);
        };
        let file =
            far.scratch.get(index).ok_or_else(|| Error::bug(format!("there is no disk {index}")))?.clone();
        let job = self.name('c', index);
        create(&mut self.qmp, &job, &file, size, self.reserved)?;
        Ok(file)
    }

    /// One that outlives the machine where the image can hold it.
    fn add_bitmap(&mut self, node: &str, name: &str, keeps: bool) -> Result<()> {
        let mut add = |persistent: bool| {
            let wanted =
                json!({ "node": node, "name": name, "granularity": GRANULARITY, "persistent": persistent });
            self.qmp.run("block-dirty-bitmap-add", wanted).map(drop)
        };
        if keeps && add(true).is_ok() { Ok(()) } else { add(false) }
    }

    /// Gets ready what will hold the disks.
    fn hold(&mut self) -> Hold {
        let held = self.disks.iter().enumerate().map(|(index, tracked)| Held {
            device: tracked.disk.device.clone(),
            node: tracked.disk.node.node_name.clone(),
            scratch: self.name('s', index),
            filter: self.name('f', index),
            job: self.name('j', index),
        });
        let held = held.collect();
        Hold::prepare(&mut self.qmp, held)
    }

    /// The moment itself, with the guest standing still if it can: what was reached, and for how long it stood.
    fn pin(
        &mut self,
        hold: &mut Hold,
        agent: Option<&mut Agent>,
        moment: &Moment<'_>,
        notes: &mut Vec<String>,
    ) -> Result<(Consistency, Duration)> {
        let stopped = self.remains.stopped.clone();
        let Self { qmp, guard: Some(guard), link, reserved, .. } = self else {
            return Err(Error::bug("a run has no guard"));
        };
        let frozen = match agent.map(|agent| Frozen::begin(agent, guard, moment.clock, moment.limit)) {
            None => None,
            Some(Ok(frozen)) => Some(frozen),
            Some(Err(error)) => {
                notes.push(format!("the guest was not frozen: {}", error.chain().join(": ")));
                None
            }
        };
        let together = match (moment.running, &link, &frozen) {
            (true, None, _) => Together::Halt,
            (true, Some(_), None) => Together::Transaction,
            (false, _, _) | (true, Some(_), Some(_)) => Together::Still,
        };
        let started = hold.begin(qmp, together, &stopped, link.is_none() || *reserved);
        let ended = frozen.map(Frozen::end);
        started.map_err(|error| {
            let why = notes.last().map(|note| format!(" ({note})")).unwrap_or_default();
            error.during(format!("cannot hold the disks still{why}"))
        })?;
        match ended {
            None => Ok((Consistency::Crash, Duration::ZERO)),
            Some(Ok((_, false)) | Err(_)) if link.is_some() && moment.several => {
                let what = "the guest did not stand still until all of its disks were held";
                Err(Error::new(Code::Io, what).hint("try again, or give it more time: --freeze-limit"))
            }
            Some(Ok((stood, true))) => Ok((Consistency::FileSystem, stood)),
            Some(Ok((stood, false))) => {
                notes.push("the guest was thawed before the disks were held".into());
                Ok((Consistency::Crash, stood))
            }
            Some(Err(error)) => {
                notes.push(format!(
                    "the guest did not confirm that it was thawed: {}",
                    error.chain().join(": ")
                ));
                Ok((Consistency::Crash, Duration::ZERO))
            }
        }
    }

    /// Offers the frozen content, with what changed before it.
    fn publish(&mut self) -> Result<()> {
        for index in 0..self.disks.len() {
            let access = json!({ "driver": "snapshot-access", "node-name": self.name('a', index),
                "file": self.name('f', index), "read-only": true });
            self.qmp.run("blockdev-add", access)?;
            let since = self.since(index);
            let export = json!({ "type": "nbd", "id": self.name('e', index), "name": self.name('e', index),
                "node-name": self.name('a', index), "bitmaps": since.into_iter().collect::<Vec<_>>() });
            self.qmp.run("block-export-add", export)?;
        }
        Ok(())
    }

    /// A copy of the old bitmap, which itself goes on recording. Where that fails, the disk is read whole.
    fn since(&mut self, index: usize) -> Option<Value> {
        let name = self.since_name(index);
        let tracked = self.disks.get_mut(index)?;
        if tracked.mode != DiskMode::Incremental {
            return None;
        }
        let node = &tracked.disk.node.node_name;
        let actions = json!([
            { "type": "block-dirty-bitmap-add", "data": { "node": node, "name": name, "disabled": true,
                "granularity": GRANULARITY } },
            { "type": "block-dirty-bitmap-merge",
                "data": { "node": node, "target": name, "bitmaps": [tracked.old.as_deref()?] } },
        ]);
        match self.qmp.run("transaction", json!({ "actions": actions })) {
            Ok(_) => Some(json!({ "node": node, "name": name })),
            Err(error) => {
                tracked.mode = DiskMode::Scan { why: error.chain().join(": ") };
                tracked.increments = 0;
                None
            }
        }
    }

    pub(super) fn since_name(&self, index: usize) -> String {
        self.name('b', index)
    }

    /// Gives up what can be read. The bitmaps stay.
    fn let_go(&mut self) -> Result<()> {
        if self.state != SessionState::Open {
            return Ok(());
        }
        self.state = SessionState::LetGo;
        self.remains.remove(&mut self.qmp)
    }

    /// Lets go of the bitmaps of earlier points, and of runs that died.
    fn commit(&mut self) -> Result<()> {
        let let_go = self.let_go();
        self.state = SessionState::Committed;
        let prefix = owned(&self.owner);
        let mut outcome = let_go;
        for now in disks(&mut self.qmp)? {
            let Some(tracked) = self.disks.iter().find(|tracked| tracked.disk.name == now.name) else {
                continue;
            };
            let names = now.node.dirty_bitmaps.iter().map(|bitmap| bitmap.name.as_str());
            let stale =
                names.filter(|name| name.starts_with(&prefix) && tracked.new.as_deref() != Some(*name));
            for name in stale {
                outcome = outcome.and(remove_bitmap(&mut self.qmp, &now.node.node_name, name));
            }
        }
        outcome.map_err(|error| {
            error.during("everything is stored, but old marks remain on the machine's disks")
        })
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // What cannot be removed now is left to the next run: it finds the plan, unless all went well.
        let gone = self.let_go();
        if self.state == SessionState::LetGo {
            for tracked in &self.disks {
                let Some(new) = &tracked.new else { continue };
                let _left = remove_bitmap(&mut self.qmp, &tracked.disk.node.node_name, new);
            }
        }
        if gone.is_err() {
            self.directory.keep();
        }
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
    }
}

impl QemuSnapshot {
    pub(super) fn with_notes(mut self, notes: Vec<String>) -> Self {
        self.notes.extend(notes);
        self
    }

    pub(super) fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MachineSnapshot for QemuSnapshot {
    fn reached(&self) -> Consistency {
        self.reached
    }

    fn frozen(&self) -> Duration {
        self.frozen
    }

    fn notes(&self) -> &[String] {
        &self.notes
    }

    fn machine(&self) -> &Machine {
        &self.machine
    }

    fn disks(&self) -> &[DiskSnapshot] {
        &self.disks
    }

    fn open(&self, disk: usize) -> Result<Box<dyn Blocks>> {
        let session = self.session();
        let tracked =
            session.disks.get(disk).ok_or_else(|| Error::bug(format!("there is no disk {disk}")))?;
        let incremental = tracked.mode == DiskMode::Incremental;
        let dirty = incremental.then(|| format!("qemu:dirty-bitmap:{}", session.since_name(disk)));
        let export = session.name('e', disk);
        if let Some(link) = &session.link {
            let client = link.client(export)?;
            drop(session);
            return Ok(Box::new(client.blocks(dirty.as_deref())?));
        }
        let client = Client::new(Address::Unix(session.socket.clone()), export);
        drop(session);
        let scratch = self.scratch.clone().unwrap_or_default();
        let opened = client.blocks(dirty.as_deref());
        let opened = opened.map_err(|error| explain(&self.broken, &scratch, error))?;
        Ok(Box::new(Watched { disk: Box::new(opened), broken: Arc::clone(&self.broken), scratch }))
    }

    fn marks(&self) -> Result<Marks> {
        let mut marks = Marks::new(DRIVER, self.id.clone());
        let session = self.session();
        marks.disks = session.disks.iter().map(|disk| (disk.disk.name.clone(), disk.mark())).collect();
        Ok(marks)
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        self.watch = None;
        self.session().commit()
    }
}
