//! One machine brought back as a machine of a host: its disks written, defined, started, asked. What has been done is
//! written down beside the disks after each stage, so that a run that was killed or failed is gone on with where it
//! stopped, and what is complete is left as it is.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Code, Error, ItemPath, PointId, Progress, Result};
use mainstay_repository::{PointInfo, PointReader};
use mainstay_workloads::vm::{
    DiskPlace, Firmware, Hypervisor, Identity, Machine, MachineId, MachineState, NVRAM, RawDocument, RawKind,
    Shape, guest_answers, guest_shell,
};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::super::apply::{Applied, Newer};
use super::super::instant::{document, machine};
use super::super::restore::{DiskPlaces, ImageFolder, plan_machine, restore_machine, sync_directory};

/// The record of a recovery, in the directory of its machine.
const RECORD: &str = "mainstay-recovery.json";
/// The longest record, in bytes.
const RECORD_MAX: u64 = 16 << 20;
const VERSION: u32 = 1;

/// How often somebody looks whether something has happened.
const LOOK: Duration = Duration::from_millis(500);

/// What is to become of the machine of a point.
#[derive(Clone, Debug)]
pub struct Recovery {
    /// The point, in the words of whoever asked for it.
    pub asked: String,
    pub shape: Shape,
    /// Where its disks go: a directory of its own.
    pub folder: ImageFolder,
    pub start: bool,
    /// What is waited for once it is started.
    pub wait: Wait,
    /// The longest wait for the agent, and for each check.
    pub limit: Duration,
    /// Lines for the guest's shell that must end with status 0.
    pub checks: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    Nothing,
    Time(Duration),
    /// The guest's agent answers.
    Agent,
}

/// How far a recovery has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// The disks are being written.
    Begun,
    Written,
    Defined,
    Started,
    /// Everything that was asked for has been done.
    Complete,
}

/// How long each part took, in seconds; of all runs together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Times {
    pub write: f64,
    pub define: f64,
    /// From the start to the first answer of the agent, or to the end of the wait.
    pub start: f64,
    pub checks: f64,
}

impl Times {
    pub fn total(&self) -> f64 {
        self.write + self.define + self.start + self.checks
    }
}

/// What is written down.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    point: String,
    /// The words that meant this point when it was begun.
    #[serde(default)]
    asked: String,
    /// The points whose newer files are put on the disks, lowest first.
    #[serde(default)]
    files: Vec<String>,
    /// What was asked for, to be compared.
    request: String,
    /// As it is defined: with its identity.
    pub machine: Machine,
    stage: Stage,
    /// Starting it was part of what has been done.
    #[serde(default)]
    pub started: bool,
    pub times: Times,
    /// Content bytes of the disks.
    pub bytes: u64,
    pub written_bytes: u64,
}

/// What became of a machine.
#[derive(Clone, Debug)]
pub struct Recovered {
    pub point: PointId,
    pub workload: String,
    pub id: MachineId,
    pub name: String,
    pub directory: PathBuf,
    /// It was complete before this run, which left it as it is.
    pub was_complete: bool,
    /// It was started, by this run or an earlier one.
    pub started: bool,
    pub times: Times,
    pub bytes: u64,
    pub written_bytes: u64,
    /// The points of its newer files, and what came of them if this run put them on the disks.
    pub files: Vec<PointInfo>,
    pub applied: Option<Applied>,
}

impl Record {
    /// The record in a directory, if there is one.
    ///
    /// Errors: [`Code::Integrity`] for what is none, [`Code::TooNew`].
    pub fn read(directory: &Path) -> Result<Option<Self>> {
        let path = directory.join(RECORD);
        let failed = |error| Error::io(format!("cannot read {}", path.display()), error);
        let length = match std::fs::metadata(&path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let strange = || Error::integrity(format!("{} is no record of a recovery", path.display()));
        if length > RECORD_MAX {
            return Err(strange());
        }
        let text = std::fs::read(&path).map_err(failed)?;
        let record: Self = serde_json::from_slice(&text).map_err(|error| strange().because(error))?;
        if record.version > VERSION {
            return Err(Error::new(Code::TooNew, format!("{} is of a newer Mainstay", path.display())));
        }
        Ok(Some(record))
    }

    /// What was begun in a directory, if `asked` still means it: the same words do, whatever `latest` is by now, and so
    /// does whatever `find` finds to be the same point.
    ///
    /// Errors: [`Code::Conflict`] for another point, and those of [`Record::read`] and `find`.
    pub fn begun(
        directory: &Path,
        asked: &str,
        find: impl FnOnce() -> Result<PointId>,
    ) -> Result<Option<Self>> {
        match Self::read(directory)? {
            Some(record) if record.asked != asked && record.point()? != find()? => Err(other(directory)),
            record => Ok(record),
        }
    }

    /// How far it has come towards a machine that is started or not: one may be complete and not have been started.
    pub fn stage(&self, start: bool) -> Stage {
        if self.stage == Stage::Complete && start && !self.started { Stage::Defined } else { self.stage }
    }

    /// The point that is being brought back.
    pub fn point(&self) -> Result<PointId> {
        self.point.parse().map_err(|()| Error::integrity("the record of a recovery names no point"))
    }

    /// The points whose newer files go on the disks, out of those of the repository.
    ///
    /// Errors: [`Code::NotFound`] when one of them is gone.
    pub fn files(&self, points: &[PointInfo]) -> Result<Vec<PointInfo>> {
        let found = self.files.iter().map(|id| points.iter().find(|point| point.id.to_string() == *id));
        let found: Option<Vec<&PointInfo>> = found.collect();
        let found = found.ok_or_else(|| {
            Error::new(Code::NotFound, "a point of the newer files that this was begun with is gone")
                .hint("begin anew: remove the directory")
        })?;
        Ok(found.into_iter().cloned().collect())
    }

    fn write(&self, directory: &Path) -> Result<()> {
        use std::io::Write as _;
        let (path, new) = (directory.join(RECORD), directory.join(format!("{RECORD}.new")));
        let failed = |error| Error::io(format!("cannot write {}", path.display()), error);
        let text = serde_json::to_vec_pretty(self);
        let text = text.map_err(|error| Error::bug("cannot write a record").because(error))?;
        let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&new);
        file.and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all())).map_err(failed)?;
        #[expect(clippy::disallowed_methods, reason = "a record is there whole, or as it was before")]
        std::fs::rename(&new, &path).map_err(failed)?;
        sync_directory(directory)
    }
}

/// The machine of a point with the documents of its vendor and the variables of its firmware.
pub fn whole_machine(reader: &PointReader) -> Result<Machine> {
    let mut machine = machine(reader)?;
    let find = |name: &str| -> Result<Option<Vec<u8>>> {
        let found = reader.lookup(&ItemPath::new(name).unwrap_or_default())?;
        found.filter(|entry| entry.has_body).map(|entry| document(reader, &entry)).transpose()
    };
    for kind in [RawKind::LibvirtXml, RawKind::QemuJson] {
        if let Some(text) = find(kind.item())? {
            machine.raw = Some(RawDocument { kind, text });
            break;
        }
    }
    machine.nvram = find(NVRAM)?;
    Ok(machine)
}

/// Whether the host can take the machine: errors now rather than when its disks are written.
///
/// Errors: [`Code::AlreadyExists`] for a name or an identity that the host has already, [`Code::Unsupported`] for a host
/// that defines nothing and for newer files that cannot be put on the disks, and those of [`plan_machine`].
pub fn check_recovery(
    reader: &PointReader,
    recovery: &Recovery,
    host: &dyn Hypervisor,
    newer: &Newer<'_>,
) -> Result<Machine> {
    if !host.caps().define {
        let what = format!("no machine can be defined on {}", host.name());
        return Err(Error::new(Code::Unsupported, what)
            .hint("name the libvirt of this computer, or dir:DIRECTORY for machines of plain QEMU"));
    }
    let machine = recovery.shape.apply(whole_machine(reader)?, &mut random)?;
    for listed in host.list()? {
        if listed.id.0.eq_ignore_ascii_case(&machine.id.0) && recovery.shape.identity == Identity::Same {
            let what = format!("{} has the machine {} of this identity already", host.name(), listed.name);
            return Err(Error::new(Code::AlreadyExists, what)
                .hint("bring it back --in-place, or as a machine with a new identity"));
        }
        if listed.name == machine.name {
            let what = format!("{} has a machine called {} already", host.name(), machine.name);
            return Err(Error::new(Code::AlreadyExists, what).hint("choose another name"));
        }
    }
    let plan = plan_machine(reader, &DiskPlaces::Directory(folder(recovery)))?;
    newer.check(reader, Some(&plan))?;
    Ok(machine)
}

/// The disks that the shape keeps.
fn folder(recovery: &Recovery) -> ImageFolder {
    ImageFolder { disks: recovery.shape.disks.clone(), documents: false, ..recovery.folder.clone() }
}

/// Brings a machine back, or goes on where an earlier run stopped.
///
/// Errors: those of [`check_recovery`], of the disks and of the host; [`Code::Conflict`] when the directory holds another
/// recovery; [`Code::Refused`] when the guest does not answer or a check fails. What was done stays, and the next run goes
/// on with it.
pub fn recover_machine(
    reader: &PointReader,
    recovery: &Recovery,
    host: &dyn Hypervisor,
    newer: &Newer<'_>,
    jobs: usize,
    progress: &Arc<dyn Progress>,
) -> Result<Recovered> {
    let files: Vec<String> = newer.files.iter().map(|point| point.id.to_string()).collect();
    let directory = &recovery.folder.directory;
    let request = format!("{:?} {:?}", recovery.shape, folder(recovery));
    let mut record = match Record::read(directory)? {
        Some(record)
            if record.request == request && record.files == files && record.point()? == reader.info().id =>
        {
            record
        }
        Some(_) => return Err(other(directory)),
        None => {
            let machine = check_recovery(reader, recovery, host, newer)?;
            std::fs::create_dir_all(directory)
                .map_err(|error| Error::io(format!("cannot make {}", directory.display()), error))?;
            let (point, times) = (reader.info().id.to_string(), Times::default());
            Record {
                version: VERSION,
                point,
                asked: recovery.asked.clone(),
                files,
                request,
                machine,
                stage: Stage::Begun,
                started: false,
                times,
                bytes: 0,
                written_bytes: 0,
            }
        }
    };
    let _lock = lock(directory)?;
    let was_complete = record.stage(recovery.start) == Stage::Complete;
    if !was_complete && !is_as_read(directory, &record)? {
        let what = format!("somebody else has just worked in {}", directory.display());
        return Err(Error::new(Code::Conflict, what).hint("run again"));
    }
    record.stage = record.stage(recovery.start);
    let mut run = Run { reader, recovery, host, newer, progress, record, applied: None };
    run.go_on(jobs)?;
    let applied = run.applied;
    let Record { machine, started, times, bytes, written_bytes, .. } = run.record;
    let (point, directory) = (reader.info().id, directory.clone());
    let workload = reader.info().workload.name.clone();
    Ok(Recovered {
        point,
        workload,
        id: machine.id,
        name: machine.name,
        directory,
        was_complete,
        started,
        times,
        bytes,
        written_bytes,
        files: newer.files.to_vec(),
        applied,
    })
}

fn other(directory: &Path) -> Error {
    let what = format!("{} holds a recovery of another point or shape", directory.display());
    Error::new(Code::Conflict, what)
        .hint("choose another directory, or remove it with the machine it belongs to")
}

/// Keeps others out as long as it lives.
fn lock(directory: &Path) -> Result<File> {
    let failed = |error| Error::io(format!("cannot lock {}", directory.display()), error);
    let file = File::open(directory).map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => {
            let what = format!("another recovery is at work in {}", directory.display());
            Err(Error::new(Code::Conflict, what).hint("wait for its end"))
        }
        Err(errno) => Err(failed(errno.into())),
    }
}

/// Whether nobody went on between the reading of the record and the lock.
fn is_as_read(directory: &Path, record: &Record) -> Result<bool> {
    let now = Record::read(directory)?;
    Ok(now.map_or(record.bytes == 0 && record.stage == Stage::Begun, |now| {
        now.stage == record.stage && now.machine.id == record.machine.id
    }))
}

/// A recovery under way.
struct Run<'a> {
    reader: &'a PointReader,
    recovery: &'a Recovery,
    host: &'a dyn Hypervisor,
    newer: &'a Newer<'a>,
    progress: &'a Arc<dyn Progress>,
    record: Record,
    applied: Option<Applied>,
}

impl Run<'_> {
    fn go_on(&mut self, jobs: usize) -> Result<()> {
        if self.record.stage == Stage::Begun {
            self.reached(Stage::Begun)?;
            let began = self.newer.clock.monotonic();
            self.write(jobs)?;
            self.record.times.write += self.since(began);
            self.reached(Stage::Written)?;
        }
        if self.record.stage == Stage::Written {
            let began = self.newer.clock.monotonic();
            self.define()?;
            self.record.times.define += self.since(began);
            self.reached(Stage::Defined)?;
        }
        if self.record.stage == Stage::Defined && self.recovery.start {
            let began = self.newer.clock.monotonic();
            if !is_running(self.host, &self.record.machine.id)? {
                self.host.start(&self.record.machine.id)?;
            }
            self.wait()?;
            self.record.times.start += self.since(began);
            self.record.started = true;
            self.reached(Stage::Started)?;
        }
        if self.record.stage < Stage::Complete {
            let began = self.newer.clock.monotonic();
            self.check()?;
            self.record.times.checks += self.since(began);
            self.reached(Stage::Complete)?;
        }
        Ok(())
    }

    fn reached(&mut self, stage: Stage) -> Result<()> {
        self.record.stage = stage;
        self.record.write(&self.recovery.folder.directory)
    }

    fn since(&self, began: Duration) -> f64 {
        self.newer.clock.monotonic().saturating_sub(began).as_secs_f64()
    }

    fn write(&mut self, jobs: usize) -> Result<()> {
        let folder = folder(self.recovery);
        for disk in &self.record.machine.disks {
            // Whatever is there is half of what an earlier run wrote: the record was there before it.
            remove(&folder.image(&disk.name))?;
        }
        let plan = plan_machine(self.reader, &DiskPlaces::Directory(folder))?;
        self.newer.check(self.reader, Some(&plan))?;
        let counts = restore_machine(self.reader, &plan, jobs, self.progress)?;
        if !self.newer.files.is_empty() {
            self.applied = Some(self.newer.apply_to(&plan, self.progress)?);
        }
        (self.record.bytes, self.record.written_bytes) = (plan.bytes(), counts.written_bytes);
        Ok(())
    }

    fn define(&mut self) -> Result<()> {
        let directory = &self.recovery.folder.directory;
        let captured = whole_machine(self.reader)?;
        let mut machine = Machine { raw: captured.raw, ..self.record.machine.clone() };
        if let Firmware::Uefi { nvram, .. } = &mut machine.firmware {
            // Without its variables the host makes new ones.
            *nvram = None;
            if let Some(variables) = &captured.nvram {
                let path = directory.join(NVRAM);
                std::fs::write(&path, variables)
                    .map_err(|error| Error::io(format!("cannot write {}", path.display()), error))?;
                *nvram = Some(path.display().to_string());
            }
        }
        let place = |name: &String| DiskPlace {
            name: name.clone(),
            path: self.recovery.folder.image(name),
            format: self.recovery.folder.format.name().into(),
        };
        let places: Vec<DiskPlace> = machine.disks.iter().map(|disk| place(&disk.name)).collect();
        for (disk, place) in machine.disks.iter_mut().zip(&places) {
            (disk.source, disk.format) = (place.path.display().to_string(), place.format.clone());
        }
        // The host may call it differently.
        self.record.machine.id = self.host.define(&machine, &places, false)?;
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        let id = &self.record.machine.id;
        let limit = match self.recovery.wait {
            Wait::Nothing => return Ok(()),
            Wait::Time(time) => time,
            Wait::Agent => self.recovery.limit,
        };
        let began = self.newer.clock.monotonic();
        while self.newer.clock.monotonic().saturating_sub(began) < limit {
            self.progress.check()?;
            if self.recovery.wait == Wait::Agent && guest_answers(self.host, id) {
                return Ok(());
            }
            if !is_running(self.host, id)? {
                let what = format!("the machine {} ended after its start", self.record.machine.name);
                return Err(Error::new(Code::Refused, what)
                    .hint("its console says why; the next run starts it again"));
            }
            std::thread::sleep(LOOK);
        }
        match self.recovery.wait {
            Wait::Agent => {
                let what = format!(
                    "the agent in {} did not answer within {} s",
                    self.record.machine.name,
                    limit.as_secs()
                );
                Err(Error::new(Code::Refused, what)
                    .hint("the machine is left running; run again to go on waiting"))
            }
            _ => Ok(()),
        }
    }

    fn check(&self) -> Result<()> {
        for line in self.recovery.checks.iter().filter(|_| self.recovery.start) {
            self.progress.check()?;
            let status = guest_shell(self.host, &self.record.machine.id, line, self.recovery.limit)?;
            if status != 0 {
                let what =
                    format!("the check {line:?} in {} ended with status {status}", self.record.machine.name);
                return Err(Error::new(Code::Refused, what)
                    .hint("the machine is left running; run again to check again"));
            }
        }
        Ok(())
    }
}

/// Whether the host says that the machine runs.
pub(in crate::vm) fn is_running(host: &dyn Hypervisor, id: &MachineId) -> Result<bool> {
    Ok(state_of(host, id)?.runs())
}

/// How the host says that the machine is.
pub(in crate::vm) fn state_of(host: &dyn Hypervisor, id: &MachineId) -> Result<MachineState> {
    let found = host.list()?.into_iter().find(|listed| listed.id == *id);
    let found = found.ok_or_else(|| {
        Error::new(Code::NotFound, format!("{} has no machine {} any more", host.name(), id.0))
    })?;
    Ok(found.state)
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("cannot remove {}", path.display()), error))
        }
        _ => Ok(()),
    }
}

fn random(bytes: &mut [u8]) -> Result<()> {
    getrandom::fill(bytes).map_err(|error| Error::bug(format!("the system gives no random bytes: {error}")))
}
