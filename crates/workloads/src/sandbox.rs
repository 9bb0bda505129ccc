//! A private directory for a server that lives as long as a run: what is in it, and who uses it, goes with the run,
//! also when that is killed.
//!
//! The directory itself belongs to whoever runs Mainstay, and holds a lock; `place` in it belongs to the server's user. A
//! guard, a process that outlives `kill -9` of ours, clears up behind a run that died; without one the next run does.

use std::fs::File;
use std::hash::{BuildHasher as _, Hasher as _};
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin};
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::time::Timespec;

use crate::process::Program;
use crate::vm::GuardProgram;

/// How the name of such a directory begins.
const PREFIX: &str = "mainstay-db-";
/// The part that belongs to the server's user.
const PLACE: &str = "place";
/// What is mounted in the place, if anything is.
const CLUSTER: &str = "cluster";
/// How long a server may take to end at once, in seconds.
const END_SECONDS: i64 = 20;
const UNMOUNT_LIMIT: Duration = Duration::from_secs(30);
/// The longest path that a guard is told, in bytes.
const WORD_MAX: u64 = 64 << 10;

/// A directory that this process works in. Dropped, whoever still uses it is ended, and it is removed with all that is in
/// it.
pub struct Sandbox {
    path: PathBuf,
    place: PathBuf,
    guard: Option<(Child, ChildStdin)>,
    _lock: File,
}

impl Sandbox {
    /// Makes one in `scratch`, after clearing away what runs that died have left there. Its place is ours until
    /// [`Self::open`].
    pub fn create(scratch: &Path, guard: Option<&GuardProgram>) -> Result<Self> {
        sweep(scratch);
        // Short: the path of a socket in it has little more than a hundred bytes.
        let tag = std::hash::RandomState::new().build_hasher().finish();
        let path = std::path::absolute(scratch.join(format!("{PREFIX}{tag:016x}")));
        let path = path.map_err(|error| Error::io("cannot find out where we are", error))?;
        let fail = |error| Error::io(format!("cannot prepare {}", path.display()), error);
        std::fs::DirBuilder::new().mode(0o711).create(&path).map_err(fail)?;
        let lock = lock(&path, FlockOperation::NonBlockingLockExclusive)?;
        let mut this = Self { place: path.join(PLACE), path: path.clone(), guard: None, _lock: lock };
        std::fs::DirBuilder::new().mode(0o700).create(&this.place).map_err(fail)?;
        if let Some(GuardProgram { program, arguments }) = guard {
            let program = Program::new(program, Duration::MAX).arguments(arguments);
            let (child, mut control) = program.attend(None)?;
            let told = control.write_all(&[this.path.as_os_str().as_bytes(), b"\n"].concat());
            told.map_err(|error| Error::io("the guard of a server is gone", error))?;
            this.guard = Some((child, control));
        }
        Ok(this)
    }

    /// Ours alone.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The server's.
    pub fn place(&self) -> &Path {
        &self.place
    }

    /// Where the cluster's directories go, or are mounted.
    pub fn cluster(&self) -> PathBuf {
        self.place.join(CLUSTER)
    }

    /// Hands the place to the server's user, who may put links there from then on: what has to be done in it by name is done
    /// before, or follows none.
    pub fn open(&self, user: Option<(u32, u32)>) -> Result<()> {
        self.give(&self.place, user)
    }

    /// Hands a file or directory to the server's user, following no link.
    pub fn give(&self, path: &Path, user: Option<(u32, u32)>) -> Result<()> {
        let Some((user, group)) = user else { return Ok(()) };
        std::os::unix::fs::lchown(path, Some(user), Some(group))
            .map_err(|error| Error::io(format!("cannot give {} to the server's user", path.display()), error))
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // Should it fail, the next run finds it without a lock.
        let cleared = clear(&self.path);
        if let Some((mut guard, mut control)) = self.guard.take() {
            if cleared.is_ok() {
                let _told = control.write_all(b"done\n");
            }
            drop(control);
            let _ended = guard.wait();
        }
    }
}

/// Clears away what runs that died have left in `scratch`.
fn sweep(scratch: &Path) {
    let entries = std::fs::read_dir(scratch).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().as_bytes().starts_with(PREFIX.as_bytes())) {
        let ours = std::os::unix::fs::MetadataExt::uid;
        if !entry.metadata().is_ok_and(|found| ours(&found) == rustix::process::geteuid().as_raw()) {
            continue;
        }
        if let Ok(_lock) = lock(&entry.path(), FlockOperation::NonBlockingLockExclusive) {
            // What cannot be cleared away now is met again.
            let _cleared = clear(&entry.path());
        }
    }
}

/// Stands guard over one run: `control` says which directory, and `done` at last; its end without that is the run's death.
pub fn attend(control: impl Read) -> Result<()> {
    let mut control = BufReader::new(control);
    let mut word = || {
        let mut word = Vec::new();
        let read = (&mut control).take(WORD_MAX).read_until(b'\n', &mut word);
        read.map_err(|error| Error::io("cannot hear the run that is watched over", error)).map(|_| word)
    };
    let mut directory = word()?;
    if directory.pop() != Some(b'\n') || word()? == b"done\n" {
        return Ok(());
    }
    let directory = PathBuf::from(std::ffi::OsStr::from_bytes(&directory));
    // A process that dies does not close everything at once.
    let _lock = match lock(&directory, FlockOperation::LockExclusive) {
        Err(error) if error.code() == Code::NotFound => return Ok(()),
        locked => locked?,
    };
    clear(&directory)
}

/// Ends who works in a directory and removes it.
fn clear(directory: &Path) -> Result<()> {
    end_users(directory)?;
    let mounted = directory.join(PLACE).join(CLUSTER);
    match unmount(&mounted, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Err(Errno::PERM) => {
            let helper = Program::new("fusermount3", UNMOUNT_LIMIT).arguments(["-u", "-z", "--"]);
            // Nothing was mounted, as a rule.
            let _unmounted = helper.argument(&mounted).run();
        }
        // Nothing is mounted there, or there is no such place.
        _unmounted => {}
    }
    match std::fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("cannot remove {}", directory.display()), error))
        }
        _ => Ok(()),
    }
}

/// Ends every program that was started on what lies in the directory: first by the signal that has a PostgreSQL server
/// end at once and take its shared memory along.
fn end_users(directory: &Path) -> Result<()> {
    for pid in users(directory) {
        let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { continue };
        // It could have ended meanwhile, and another have got its number.
        if !uses(pid, directory) {
            continue;
        }
        let fail = |errno: Errno| Error::io("cannot end a server of a run that is over", errno.into());
        for signal in [Signal::QUIT, Signal::KILL] {
            match pidfd_send_signal(&process, signal) {
                Err(Errno::SRCH) => break,
                sent => sent.map_err(fail)?,
            }
            let mut fds = [PollFd::new(&process, PollFlags::IN)];
            let limit = Timespec { tv_sec: END_SECONDS, tv_nsec: 0 };
            if rustix::io::retry_on_intr(|| poll(&mut fds, Some(&limit))).map_err(fail)? > 0 {
                break;
            }
        }
    }
    Ok(())
}

fn users(directory: &Path) -> Vec<Pid> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok().and_then(Pid::from_raw));
    pids.filter(|pid| uses(*pid, directory)).collect()
}

/// Whether a program was told, in a word of its own, to work on a cluster in the directory.
fn uses(pid: Pid, directory: &Path) -> bool {
    let cluster = directory.join(PLACE).join(CLUSTER);
    let words = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    let mut words = words.split(|byte| *byte == 0);
    words.any(|word| Path::new(std::ffi::OsStr::from_bytes(word)).starts_with(&cluster))
}

fn lock(path: &Path, operation: FlockOperation) -> Result<File> {
    let fail = |error| Error::io(format!("cannot open {}", path.display()), error);
    let directory = File::open(path).map_err(fail)?;
    match rustix::io::retry_on_intr(|| flock(&directory, operation)) {
        Ok(()) => Ok(directory),
        Err(Errno::WOULDBLOCK) => {
            Err(Error::new(Code::Conflict, format!("somebody works in {}", path.display())))
        }
        Err(errno) => Err(fail(errno.into())),
    }
}
