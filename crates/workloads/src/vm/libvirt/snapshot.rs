//! One moment of a machine that runs under libvirt: a backup job in pull mode, begun together with a checkpoint
//! (<https://libvirt.org/kbase/live_full_disk_backup.html>, <https://libvirt.org/formatbackup.html>).
//!
//! The job offers each disk over NBD, with the bitmap of the checkpoint that the last point named. That checkpoint is
//! deleted once the new point is durable; given up, the new one is.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Blocks, Code, Consistency, Error, Result};
use mainstay_nbd::{Address, Client};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::virsh::{ANSWER, Virsh, refused, word};
use super::{DRIVER, LibvirtHost, Look, names};
use crate::vm::agent::{ANSWER as AGENT, set_timer, stop_timer};
use crate::vm::domain_xml::{parse, parse_live, quoted};
use crate::vm::guard::{Freezer, Frozen, Guard, Thaw};
use crate::vm::hypervisor::{
    DiskMode, DiskSnapshot, Hypervisor as _, MachineId, MachineSnapshot, Owner, SnapshotRequest,
};
use crate::vm::machine::{Machine, MachineDisk};
use crate::vm::mark::{BitmapState, DiskMark, Found, Marks};
use crate::vm::qemu::{Link, PREFIX};
use crate::vm::run_dir::{self, Plan, RunDir};
use crate::vm::watch::{Broken, Watch, Watched, check, explain};

/// What the beginning of a job may take; the guest may stand still meanwhile.
const BEGIN: Duration = Duration::from_secs(120);

/// What a guest may take to trim its disks.
const TRIM: Duration = Duration::from_secs(120);

/// How often the end of a job is looked for, and how long the looks are apart.
const ENDS: u32 = 200;
const END_PAUSE: Duration = Duration::from_millis(50);

/// What a run has put into a libvirt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::vm) struct Remains {
    virsh: Virsh,
    domain: String,
    /// Of the run: stands in the job's document, by which it is known as ours.
    mark: String,
}

impl Remains {
    /// After the death of the run. Its checkpoint stays: whether its point is durable is not known here.
    pub(in crate::vm) fn clear(&self) -> Result<()> {
        if !self.is_there()? {
            return Ok(());
        }
        self.virsh.run(&["domjobabort", &self.domain])?;
        for _look in 0..ENDS {
            if !self.is_there()? {
                return Ok(());
            }
            std::thread::sleep(END_PAUSE);
        }
        Err(Error::new(Code::Io, format!("libvirt does not end the backup job of {}", self.domain)))
    }

    /// Whether our job runs.
    ///
    /// Errors: nobody knows, since libvirt cannot be reached.
    fn is_there(&self) -> Result<bool> {
        match self.virsh.run(&["backup-dumpxml", &self.domain]) {
            Ok(job) => Ok(job.contains(&self.mark)),
            // The machine is gone, or without a job.
            Err(error) if error.code() == Code::NotFound => Ok(false),
            Err(error) if NO_JOB.iter().any(|words| chain(&error).contains(words)) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// How libvirt says that a machine has no backup job.
const NO_JOB: [&str; 3] = ["no domain backup job", "domain is not running", "not supported"];

/// See [`MachineSnapshot`].
pub(super) struct LibvirtSnapshot {
    /// Before the job: the scratch space is not watched while it is taken down.
    watch: Option<Watch>,
    job: Job,
    broken: Broken,
    scratch: PathBuf,
    machine: Machine,
    shown: Vec<DiskSnapshot>,
    reached: Consistency,
    frozen: Duration,
    notes: Vec<String>,
}

/// A backup job that runs, or is about to. Dropped, it is ended and its checkpoint deleted.
struct Job {
    virsh: Virsh,
    domain: String,
    remains: Remains,
    disks: Vec<JobDisk>,
    owner: Owner,
    /// Tracks changes from the moment on; `None` when libvirt made none.
    checkpoint: Option<String>,
    committed: bool,
    guard: Option<Guard>,
    directory: RunDir,
    /// To a machine on another computer.
    link: Option<Link>,
    /// Where what the guest overwrites is kept: how the names of those files begin, as the machine's host sees them.
    kept: String,
}

struct JobDisk {
    disk: MachineDisk,
    size: u64,
    inode: Option<u64>,
    mode: DiskMode,
    /// The checkpoint that the mark of the last point names.
    old: Option<String>,
    increments: u32,
}

pub(super) fn take(host: &LibvirtHost, look: Look, request: &SnapshotRequest) -> Result<LibvirtSnapshot> {
    let Look { uuid, mut machine, now: text, has_job, checkpoints, .. } = look;
    let uuid = uuid.as_str();
    if host.is_here() {
        check(&host.scratch, host.reserve)?;
    } else if host.link.is_none() {
        let what = format!("nothing says how to reach the disks of {} on its computer", machine.name);
        return Err(Error::new(Code::Usage, what)
            .hint("add ,tls=DIR,host-scratch=DIR behind the URI; see the guide to backup by proxy"));
    }
    if has_job {
        // Libvirt would let us wait for half a minute, with the guest standing still.
        let what = format!("a backup of the machine {} runs already", machine.name);
        return Err(Error::new(Code::Conflict, what).hint("wait until it has ended"));
    }
    // Where the disks are now: after a snapshot the machine writes elsewhere than its definition says.
    let (now, live) = (parse(&text)?, parse_live(&text)?);
    let mut notes = Vec::new();
    let wanted = choose(&now, &request.disks)?;
    let disks = wanted.into_iter().map(|disk| JobDisk::judge(disk, host, &machine, &checkpoints, request));
    let mut job = Job::open(host, uuid, disks.collect(), live.user, request)?;
    let mut freeze = request.want >= Consistency::FileSystem && can_freeze(&text, &mut notes);
    let mut ask =
        |command: &str, words: Value| host.ask_guest(&MachineId(uuid.to_owned()), command, words, AGENT);
    let mut timer = None;
    if freeze && host.link.is_some() {
        match set_timer(&mut ask, request.freeze_limit) {
            Ok(set) => timer = set,
            Err(error) => {
                freeze = false;
                notes.push(format!("the guest was not frozen: {}", chain(&error)));
            }
        }
    }
    if freeze && request.trim {
        let trouble = host.virsh.run_within(TRIM, &["domfstrim", uuid]).err();
        notes.extend(trouble.map(|error| format!("the guest did not trim its disks: {}", chain(&error))));
    }
    let begun = job.begin(host, freeze, request, &mut notes);
    // One that stays thaws what is thawed.
    let _stopped = timer.map(|timer| stop_timer(&mut ask, timer));
    let (mut reached, frozen) = begun?;
    if request.hooked && reached == Consistency::FileSystem {
        reached = Consistency::Application;
    }
    for disk in job.disks.iter().filter(|disk| !job.tracks(disk)) {
        notes.push(format!("the next run has to read all of the disk {}", disk.disk.name));
    }
    for disk in &mut machine.disks {
        let seen = job.disks.iter().find(|seen| seen.disk.name == disk.name);
        disk.size = seen.map(|seen| seen.size).or(disk.size);
    }
    let shown = job.disks.iter().map(|disk| job.shown(disk)).collect();
    let broken = Broken::default();
    let remains = job.remains.clone();
    let give_up = move || {
        // Should it fail, the end of the run tries again.
        let _ended = remains.clear();
    };
    let watch = || Watch::start(&host.scratch, host.reserve, &broken, give_up);
    let watch = host.is_here().then(watch).transpose()?;
    let scratch = host.scratch.clone();
    Ok(LibvirtSnapshot { watch, job, broken, scratch, machine, shown, reached, frozen, notes })
}

fn chain(error: &Error) -> String {
    error.chain().join(": ")
}

fn choose(machine: &Machine, wanted: &[String]) -> Result<Vec<MachineDisk>> {
    let disks: Vec<_> = machine.disks.iter().filter(|disk| !disk.read_only).collect();
    if let Some(missing) = wanted.iter().find(|name| !disks.iter().any(|disk| disk.name == **name)) {
        let names = disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>().join(", ");
        let what = format!("the machine has no disk {missing}");
        return Err(Error::new(Code::NotFound, what).hint(format!("its disks are {names}")));
    }
    let chosen = |disk: &&MachineDisk| wanted.is_empty() || wanted.contains(&disk.name);
    Ok(disks.into_iter().filter(chosen).cloned().collect())
}

/// Whether the machine's document says that an agent is there.
fn can_freeze(document: &str, notes: &mut Vec<String>) -> bool {
    let agent = document.split("<channel").find(|channel| channel.contains("org.qemu.guest_agent"));
    let connected = agent.is_some_and(|agent| {
        agent.split("</channel>").next().is_some_and(|agent| agent.contains("state='connected'"))
    });
    if !connected {
        notes.push(match agent {
            None => "the guest was not frozen: the machine has no channel for a guest agent".into(),
            Some(_) => "the guest was not frozen: no agent has answered in it".into(),
        });
    }
    connected
}

impl JobDisk {
    fn judge(
        disk: MachineDisk,
        host: &LibvirtHost,
        machine: &Machine,
        checkpoints: &[String],
        request: &SnapshotRequest,
    ) -> Self {
        use std::os::unix::fs::MetadataExt as _;
        let size = machine.disks.iter().find(|known| known.name == disk.name).and_then(|known| known.size);
        let mark = request.since.as_ref().and_then(|marks| marks.of(DRIVER, &machine.id, &disk.name));
        let old = mark.and_then(|mark| mark.bitmap.clone());
        // Whether its bitmaps are whole is found out when the job begins.
        let state = BitmapState { granularity: 0, recording: true, inconsistent: false, busy: false };
        let known = old.as_ref().is_some_and(|old| checkpoints.contains(old));
        let seen = host.is_here().then(|| std::fs::metadata(&disk.source).ok()).flatten();
        let inode = seen.map(|metadata| metadata.ino());
        let size = size.unwrap_or(0);
        let found = Found { size, image: &disk.source, inode, bitmap: known.then_some(state) };
        let mode = mark.map_or(DiskMode::Full, |mark| mark.judge(&found, request.scan_every));
        let increments = match mode {
            DiskMode::Incremental => mark.map_or(0, |mark| mark.increments.saturating_add(1)),
            DiskMode::Full | DiskMode::Scan { .. } => 0,
        };
        Self { disk, size, inode, mode, old, increments }
    }

    /// Reads it whole after all.
    fn scan(&mut self, why: &str) {
        self.mode = DiskMode::Scan { why: why.to_owned() };
        self.increments = 0;
    }
}

/// How the names of an owner's checkpoints begin.
fn owned(owner: &Owner) -> String {
    format!("{PREFIX}{}-{}-", owner.repository, owner.workload)
}

impl Job {
    fn open(
        host: &LibvirtHost,
        uuid: &str,
        disks: Vec<JobDisk>,
        user: Option<(u32, u32)>,
        request: &SnapshotRequest,
    ) -> Result<Self> {
        let (virsh, domain) = (host.virsh.clone(), uuid.to_owned());
        let place = RunDir::place_of(&host.scratch, &request.run);
        // All names of its files have it.
        let mark = format!("{:.16}", request.run.to_string());
        let (kept, user) = match &host.link {
            None => (place.join(""), user),
            Some(link) => (link.host_scratch.join(format!("mainstay-{mark}-")), None),
        };
        let kept = kept.to_string_lossy().into_owned();
        let remains = Remains { virsh: virsh.clone(), domain: domain.clone(), mark };
        let plan = Plan {
            thaw: Some(Thaw::Virsh { uri: virsh.uri.clone(), domain: domain.clone() }),
            freeze_limit_milliseconds: u64::try_from(request.freeze_limit.as_millis()).unwrap_or(u64::MAX),
            remains: run_dir::Remains::Libvirt(remains.clone()),
        };
        let directory = RunDir::create(&host.scratch, &request.run, user, &plan)?;
        let checkpoint = disks.iter().any(|disk| disk.disk.format == "qcow2");
        let checkpoint = checkpoint.then(|| format!("{}{}", owned(&request.owner), request.run));
        let mut job = Self {
            virsh,
            domain,
            remains,
            disks,
            owner: request.owner,
            checkpoint,
            committed: false,
            guard: None,
            directory,
            link: host.link.clone(),
            kept,
        };
        job.guard = Some(Guard::start(host.guard.as_ref(), job.directory.path(), None)?);
        Ok(job)
    }

    /// Where a machine of this computer offers its disks.
    fn socket(&self) -> PathBuf {
        self.directory.place().join("nbd")
    }

    fn client(&self, disk: &str) -> Result<Client> {
        match &self.link {
            None => Ok(Client::new(Address::Unix(self.socket()), disk)),
            Some(link) => link.client(disk.to_owned()),
        }
    }

    fn tracks(&self, disk: &JobDisk) -> bool {
        self.checkpoint.is_some() && disk.disk.format == "qcow2"
    }

    fn shown(&self, disk: &JobDisk) -> DiskSnapshot {
        DiskSnapshot {
            name: disk.disk.name.clone(),
            size: disk.size,
            mode: disk.mode.clone(),
            tracked: self.tracks(disk),
        }
    }

    /// Begins the job. What libvirt cannot do is asked of it no more: first the increment of the disk that it names,
    /// then all increments, then the checkpoint.
    fn begin(
        &mut self,
        host: &LibvirtHost,
        freeze: bool,
        request: &SnapshotRequest,
        notes: &mut Vec<String>,
    ) -> Result<(Consistency, Duration)> {
        let mut cleared = false;
        loop {
            let error = match self.attempt(host, freeze, request, notes)? {
                Ok(reached) => return Ok(reached),
                Err(error) => error,
            };
            let why = chain(&error);
            let named = |disk: &&mut JobDisk| why.contains(&format!("'{}'", disk.disk.name));
            let mut increments: Vec<_> =
                self.disks.iter_mut().filter(|disk| disk.mode == DiskMode::Incremental).collect();
            if !increments.is_empty() {
                let all = !increments.iter_mut().any(|disk| named(disk));
                increments.into_iter().filter(|disk| all || named(disk)).for_each(|disk| disk.scan(&why));
            } else if self.checkpoint.is_some() && !cleared {
                // One of ours may be broken, and libvirt refuses new ones for its sake.
                cleared = true;
                let _left = self.delete_checkpoints(None);
            } else if let Some(refused) = self.checkpoint.take() {
                notes.push(format!("libvirt made no checkpoint {refused}: {why}"));
            } else {
                return Err(error.during("cannot hold the disks still"));
            }
        }
    }

    /// One attempt, with the guest standing still around it. The outer error ends the run.
    fn attempt(
        &mut self,
        host: &LibvirtHost,
        freeze: bool,
        request: &SnapshotRequest,
        notes: &mut Vec<String>,
    ) -> Result<Result<(Consistency, Duration)>> {
        let begin = self.begin_line()?;
        if !freeze {
            let outcome = self.virsh.run_line(BEGIN, &begin)?;
            let begun = outcome.status == Some(0);
            let crash = (Consistency::Crash, Duration::ZERO);
            return Ok(if begun { Ok(crash) } else { Err(refused("backup-begin", &outcome)) });
        }
        let (virsh, domain) = (self.virsh.clone(), self.domain.clone());
        let mut line = Line { virsh, domain, begin, said: None };
        let guard = self.guard.as_mut().ok_or_else(|| Error::bug("a run has no guard"))?;
        let clock = host.clock.as_ref();
        let ended = Frozen::begin(&mut line, guard, clock, request.freeze_limit).and_then(Frozen::end);
        let Some(said) = line.said else {
            return Err(ended.err().unwrap_or_else(|| Error::bug("a line of commands came to nothing")));
        };
        if let Some(error) = said.refused {
            return Ok(Err(error));
        }
        match ended {
            Ok((_, true)) if said.froze => Ok(Ok((Consistency::FileSystem, said.stood))),
            ended => {
                let why = ended.err().map_or(said.trouble, |error| chain(&error));
                notes.push(format!("the guest was not frozen: {why}"));
                Ok(Ok((Consistency::Crash, Duration::ZERO)))
            }
        }
    }

    /// The command that begins the job; its documents are written for it.
    fn begin_line(&self) -> Result<String> {
        let server = match &self.link {
            None => format!("transport='unix' socket={}", quoted(&self.socket().to_string_lossy())),
            Some(Link { host, port, .. }) => {
                format!("transport='tcp' tls='yes' name={} port='{port}'", quoted(host))
            }
        };
        let mut backup = format!("<domainbackup mode='pull'><server {server}/><disks>");
        let mut checkpoint = String::from("<domaincheckpoint>");
        if let Some(name) = &self.checkpoint {
            // Writing to a string cannot fail.
            let _ = write!(checkpoint, "<name>{name}</name>");
        }
        checkpoint.push_str("<disks>");
        for disk in &self.disks {
            let name = quoted(&disk.disk.name);
            let scratch = quoted(&format!("{}{}", self.kept, disk.disk.name));
            let mode = match (&disk.mode, &disk.old) {
                (DiskMode::Incremental, Some(old)) => format!(
                    "backupmode='incremental' incremental={} exportbitmap={}",
                    quoted(old),
                    quoted(&bitmap(disk))
                ),
                _ => "backupmode='full'".into(),
            };
            let _ = write!(
                backup,
                "<disk name={name} backup='yes' type='file' exportname={name} {mode}><scratch file={scratch}/></disk>"
            );
            let kept = if disk.disk.format == "qcow2" { "bitmap" } else { "no" };
            let _ = write!(checkpoint, "<disk name={name} checkpoint='{kept}'/>");
        }
        backup.push_str("</disks></domainbackup>");
        checkpoint.push_str("</disks></domaincheckpoint>");
        let document = |name: &str, text: &str| -> Result<String> {
            let path = self.directory.path().join(name);
            let written = std::fs::write(&path, text);
            written.map_err(|error| Error::io(format!("cannot write {}", path.display()), error))?;
            word(&path)
        };
        let mut line = format!("backup-begin {} {}", self.domain, document("backup.xml", &backup)?);
        if self.checkpoint.is_some() {
            let _ = write!(line, " {}", document("checkpoint.xml", &checkpoint)?);
        }
        Ok(line)
    }

    /// Deletes the checkpoints of this owner but one. A broken one is at least forgotten.
    fn delete_checkpoints(&self, but: Option<&str>) -> Result<()> {
        let prefix = owned(&self.owner);
        let all = names(&self.virsh.run(&["checkpoint-list", &self.domain, "--name"])?);
        let stale = all.iter().filter(|name| name.starts_with(&prefix) && but != Some(name.as_str()));
        stale.map(|name| self.delete_checkpoint(name)).fold(Ok(()), Result::and)
    }

    fn delete_checkpoint(&self, name: &str) -> Result<()> {
        let deleted = self.virsh.run(&["checkpoint-delete", &self.domain, name]);
        let forgotten = |_| self.virsh.run(&["checkpoint-delete", &self.domain, name, "--metadata"]);
        deleted.or_else(forgotten).map(drop)
    }

    fn commit(&mut self) -> Result<()> {
        let ended = self.remains.clear();
        self.committed = true;
        let outcome = ended.and(self.delete_checkpoints(self.checkpoint.as_deref()));
        outcome.map_err(|error| {
            error.during("everything is stored, but an old checkpoint remains on the machine")
        })
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        let ended = if self.committed { Ok(()) } else { self.remains.clear() };
        if let (Some(checkpoint), false, Ok(())) = (&self.checkpoint, self.committed, &ended) {
            // There may be none yet; one that stays is deleted by the next point.
            let _left = self.delete_checkpoint(checkpoint);
        }
        if ended.is_err() {
            self.directory.keep();
        }
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
    }
}

/// The name under which a disk's changes are exported.
fn bitmap(disk: &JobDisk) -> String {
    format!("since-{}", disk.disk.name)
}

/// Freezes, begins the job and thaws over one connection: the guest stands still for no more than that.
struct Line {
    virsh: Virsh,
    domain: String,
    begin: String,
    said: Option<Said>,
}

/// What came of it.
struct Said {
    froze: bool,
    /// Libvirt did not begin the job.
    refused: Option<Error>,
    /// File systems that were frozen until the thaw; `None` when that failed.
    thawed: Option<u64>,
    stood: Duration,
    trouble: String,
}

impl Freezer for Line {
    fn freeze(&mut self, _limit: Duration) -> Result<()> {
        let Self { domain, begin, .. } = self;
        // Each command is carried out whatever became of the one before.
        let line = format!("domfsfreeze {domain}; {begin}; domfsthaw {domain}");
        let outcome = self.virsh.time_line(BEGIN, &line)?;
        let said = String::from_utf8_lossy(&outcome.output);
        let begun = said.contains("Backup started");
        self.said = Some(Said {
            froze: number_after(&said, "Froze ").is_some_and(|number| number > 0),
            refused: (!begun).then(|| refused("backup-begin", &outcome)),
            thawed: number_after(&said, "Thawed "),
            stood: total(&said),
            trouble: chain(&refused("domfsfreeze", &outcome)),
        });
        Ok(())
    }

    fn thaw(&mut self) -> Result<bool> {
        let thawed = match self.said.as_ref().and_then(|said| said.thawed) {
            Some(thawed) => thawed,
            None => {
                let outcome = self.virsh.time_line(ANSWER, &format!("domfsthaw {}", self.domain))?;
                let said = String::from_utf8_lossy(&outcome.output);
                number_after(&said, "Thawed ").ok_or_else(|| refused("domfsthaw", &outcome))?
            }
        };
        Ok(thawed > 0)
    }
}

fn number_after(text: &str, word: &str) -> Option<u64> {
    text.split_once(word)?.1.split_whitespace().next()?.parse().ok()
}

/// The sum of the times that virsh took for its commands.
fn total(text: &str) -> Duration {
    let times =
        text.split("(Time: ").skip(1).filter_map(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    let milliseconds: f64 = times.sum();
    Duration::try_from_secs_f64(milliseconds / 1000.0).unwrap_or_default()
}

impl LibvirtSnapshot {
    pub(super) fn with_notes(mut self, notes: Vec<String>) -> Self {
        self.notes.extend(notes);
        self
    }
}

impl MachineSnapshot for LibvirtSnapshot {
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
        &self.shown
    }

    fn open(&self, disk: usize) -> Result<Box<dyn Blocks>> {
        let disk = self.job.disks.get(disk).ok_or_else(|| Error::bug(format!("there is no disk {disk}")))?;
        let incremental = disk.mode == DiskMode::Incremental;
        let dirty = incremental.then(|| format!("qemu:dirty-bitmap:{}", bitmap(disk)));
        let opened = self.job.client(&disk.disk.name).and_then(|client| client.blocks(dirty.as_deref()));
        let disk = opened.map_err(|error| explain(&self.broken, &self.scratch, error))?;
        let (broken, scratch) = (Arc::clone(&self.broken), self.scratch.clone());
        Ok(Box::new(Watched { disk: Box::new(disk), broken, scratch }))
    }

    fn marks(&self) -> Result<Marks> {
        let mut marks = Marks::new(DRIVER, self.machine.id.clone());
        for disk in &self.job.disks {
            let mark = DiskMark {
                bitmap: self.job.checkpoint.clone().filter(|_| self.job.tracks(disk)),
                size: disk.size,
                granularity: 0,
                image: disk.disk.source.clone(),
                inode: disk.inode,
                increments: disk.increments,
                stamp: None,
            };
            marks.disks.insert(disk.disk.name.clone(), mark);
        }
        Ok(marks)
    }

    fn commit(mut self: Box<Self>) -> Result<()> {
        self.watch = None;
        self.job.commit()
    }
}
