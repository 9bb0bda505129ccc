//! Copies of machines that their hosts have pushed here, to be backed up later. Each machine has a directory:
//!
//! ```text
//! DISK.raw      one for each disk
//! state.json    which copy they are and whether it is whole; what the last point does not hold yet
//! ```
//!
//! The state calls the copy unfinished before the first byte of a push is written, and whole when all are durable. An
//! unfinished copy is never backed up. It need not be thrown away either: the bitmaps on the host go on recording since
//! the last whole copy, so the next push writes again whatever an unfinished one has written, and more.

mod disk;
mod state;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{Code, Error, Id16, Result, Time};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::channel::clean;
use super::hypervisor::{
    Caps, DiskMode, DiskPlace, DiskSnapshot, DiskSummary, Hypervisor, MachineId, MachineSnapshot,
    MachineState, MachineSummary, Owner, SnapshotRequest, Swept,
};
use super::machine::Machine;
use super::mark::Marks;
pub(super) use disk::StagedDisk;
use state::{Staged, State};

/// The name of this driver in marks.
const DRIVER: &str = "stage";

/// A directory of machines that were pushed here.
pub struct Stage {
    path: PathBuf,
}

/// A copy that is being pushed. Nobody else touches it meanwhile.
pub(super) struct Incoming {
    directory: PathBuf,
    state: State,
    disks: Vec<Arc<StagedDisk>>,
    _lock: File,
}

impl Stage {
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    fn directory(&self, machine: &MachineId) -> PathBuf {
        let plain = |letter: char| if letter.is_ascii_alphanumeric() || letter == '-' { letter } else { '_' };
        self.path.join(machine.0.chars().take(100).map(plain).collect::<String>())
    }

    /// Begins to receive a machine. `owner` will own the bitmaps on its host, unless there is an earlier copy.
    ///
    /// Errors: [`Code::Conflict`] when somebody else receives or reads it.
    pub(super) fn begin(&self, machine: &MachineId, owner: Owner) -> Result<Incoming> {
        let directory = self.directory(machine);
        let made = std::fs::create_dir_all(&directory);
        made.map_err(|error| Error::io(format!("cannot make {}", directory.display()), error))?;
        let lock = lock(&directory)?;
        let state = State::read(&directory)?.unwrap_or_else(|| State::new(owner));
        if state.staged.as_ref().is_some_and(|staged| staged.machine.id != *machine) {
            let what = format!("{} holds another machine", directory.display());
            return Err(Error::new(Code::Conflict, what).hint("name another directory"));
        }
        Ok(Incoming { directory, state, disks: Vec::new(), _lock: lock })
    }

    /// The whole copy of a machine, under a lock.
    fn staged(&self, machine: &MachineId) -> Result<(PathBuf, State, Staged, File)> {
        let missing = || {
            let what = format!("there is no machine {} in {}", clean(&machine.0), self.path.display());
            Error::new(Code::NotFound, what)
        };
        let directory = self.directory(machine);
        if !directory.is_dir() {
            return Err(missing());
        }
        let lock = lock(&directory)?;
        let state = State::read(&directory)?.ok_or_else(missing)?;
        if !state.whole {
            let what = format!("the copy of {} was never finished", clean(&machine.0));
            return Err(Error::new(Code::Refused, what).hint("receive it again; the next push completes it"));
        }
        let staged = state.staged.clone().ok_or_else(missing)?;
        Ok((directory, state, staged, lock))
    }
}

fn lock(directory: &Path) -> Result<File> {
    let fail = |error| Error::io(format!("cannot open {}", directory.display()), error);
    let file = File::open(directory).map_err(fail)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => {
            Err(Error::new(Code::Conflict, format!("somebody else is at work in {}", directory.display())))
        }
        Err(errno) => Err(fail(errno.into())),
    }
}

fn file_of(directory: &Path, disk: &str) -> PathBuf {
    directory.join(format!("{disk}.raw"))
}

impl Incoming {
    pub(super) fn owner(&self) -> Owner {
        self.state.owner
    }

    /// The marks of the last whole copy, of those disks whose file is still there.
    pub(super) fn since(&self) -> Option<Marks> {
        let mut marks = self.state.staged.as_ref()?.marks.clone();
        marks.disks.retain(|name, mark| {
            std::fs::metadata(file_of(&self.directory, name)).is_ok_and(|file| file.len() == mark.size)
        });
        Some(marks)
    }

    /// From now on the copy is no longer what it was. The disks to write to, in the same order.
    pub(super) fn open(&mut self, disks: &[DiskSnapshot]) -> Result<Vec<Arc<StagedDisk>>> {
        self.state.whole = false;
        // A copy that is made anew is nothing to build upon until it is whole.
        if let Some(staged) = &mut self.state.staged {
            let is_built_upon = |name: &String| {
                disks.iter().any(|disk| disk.name == *name && disk.mode == DiskMode::Incremental)
            };
            staged.marks.disks.retain(|name, _| is_built_upon(name));
        }
        self.state.write(&self.directory)?;
        for disk in disks {
            let keep = disk.mode == DiskMode::Incremental;
            let opened = StagedDisk::receive(&file_of(&self.directory, &disk.name), disk.size, keep)?;
            self.disks.push(Arc::new(opened));
        }
        Ok(self.disks.clone())
    }

    /// Everything has arrived: makes it durable, and then the copy.
    pub(super) fn finish(mut self, snapshot: &dyn MachineSnapshot, copy: Id16, moment: Time) -> Result<()> {
        for (shown, disk) in snapshot.disks().iter().zip(&self.disks) {
            disk.sync()?;
            let changed = self.state.changed.entry(shown.name.clone()).or_default();
            *changed = match shown.mode {
                DiskMode::Incremental => disk::union(changed, &disk.written()),
                DiskMode::Full | DiskMode::Scan { .. } => vec![(0, shown.size)],
            };
        }
        let names: Vec<&String> = snapshot.disks().iter().map(|disk| &disk.name).collect();
        self.state.changed.retain(|name, _| names.contains(&name));
        self.state.staged = Some(Staged::of(snapshot, copy, moment)?);
        self.state.whole = true;
        self.state.write(&self.directory)
    }
}

impl Hypervisor for Stage {
    fn name(&self) -> String {
        format!("the copies in {}", self.path.display())
    }

    fn caps(&self) -> Caps {
        Caps { incremental: true, ..Caps::default() }
    }

    fn list(&self) -> Result<Vec<MachineSummary>> {
        let fail = |error| Error::io(format!("cannot list {}", self.path.display()), error);
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.path).map_err(fail)? {
            let directory = entry.map_err(fail)?.path();
            if !directory.is_dir() {
                continue;
            }
            let Some(staged) = State::read(&directory)?.and_then(|state| state.staged) else { continue };
            found.push(summary(&directory, staged));
        }
        found.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(found)
    }

    fn config(&self, machine: &MachineId) -> Result<Machine> {
        self.staged(machine).map(|(_, _, staged, _)| staged.machine())
    }

    fn snapshot(&self, machine: &MachineId, request: &SnapshotRequest) -> Result<Box<dyn MachineSnapshot>> {
        let (directory, state, staged, lock) = self.staged(machine)?;
        let taken = disk::StagedSnapshot::new(directory, state, staged, lock, request)?;
        Ok(Box::new(taken))
    }

    fn define(&self, _machine: &Machine, _disks: &[DiskPlace], _start: bool) -> Result<MachineId> {
        Err(unsupported())
    }

    fn start(&self, _machine: &MachineId) -> Result<()> {
        Err(unsupported())
    }

    fn stop(&self, _machine: &MachineId) -> Result<()> {
        Err(unsupported())
    }

    fn destroy(&self, _machine: &MachineId) -> Result<()> {
        Err(unsupported())
    }

    fn sweep(&self) -> Result<Swept> {
        Ok(Swept::default())
    }
}

fn summary(directory: &Path, staged: Staged) -> MachineSummary {
    let disk = |disk: &state::StagedShape| DiskSummary {
        name: disk.name.clone(),
        path: file_of(directory, &disk.name),
        format: "raw".into(),
        size: Some(disk.size),
        backing: Vec::new(),
        bitmaps: Vec::new(),
    };
    MachineSummary {
        id: staged.machine.id.clone(),
        name: staged.machine.name.clone(),
        state: MachineState::ShutOff,
        disks: staged.disks.iter().map(disk).collect(),
        snapshots: Vec::new(),
    }
}

fn unsupported() -> Error {
    Error::new(Code::Unsupported, "a copy of a machine is to be backed up, and nothing else")
}
