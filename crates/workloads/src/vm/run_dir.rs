//! The directory of one run on a host: its scratch images and sockets, and the plan of how to clear everything away.
//! Whoever works in it holds a lock on it; one that nobody holds was left by a crash.

use std::fs::File;
use std::hash::{BuildHasher as _, Hasher as _};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_core::{Code, Error, Id16, Result};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::guard::Thaw;
use super::hypervisor::Swept;
use super::{libvirt, qemu};

/// How the name of such a directory begins.
const PREFIX: &str = "mainstay-run-";

const PLAN: &str = "plan.json";

/// The part of the directory that belongs to the machine's user.
const PLACE: &str = "host";

/// The longest plan, in bytes.
const PLAN_MAX: u64 = 1 << 20;

/// How to undo what a run did to a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Plan {
    pub(super) thaw: Option<Thaw>,
    pub(super) freeze_limit_milliseconds: u64,
    pub(super) remains: Remains,
}

/// What is to be removed from the host, by the driver that put it there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Remains {
    Qemu(qemu::Remains),
    Libvirt(libvirt::Remains),
}

impl Plan {
    pub(super) fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(PLAN);
        let fail = |error| Error::io(format!("cannot read {}", path.display()), error);
        if std::fs::metadata(&path).map_err(fail)?.len() > PLAN_MAX {
            return Err(Error::integrity(format!("{} is too long", path.display())));
        }
        let text = std::fs::read(&path).map_err(fail)?;
        serde_json::from_slice(&text)
            .map_err(|error| Error::integrity(format!("{} makes no sense", path.display())).because(error))
    }

    pub(super) fn thaw(&self) -> Option<&Thaw> {
        self.thaw.as_ref()
    }

    pub(super) fn freeze_limit(&self) -> Duration {
        Duration::from_millis(self.freeze_limit_milliseconds)
    }
}

/// A directory that this process works in. Dropped, it is removed with all that is in it.
pub(super) struct RunDir {
    path: PathBuf,
    place: PathBuf,
    /// User and group of the machine.
    user: Option<(u32, u32)>,
    keep: bool,
    _lock: File,
}

impl RunDir {
    /// Makes a directory in `scratch`, with a place inside for what `user` (and we) may touch. The plan is ours alone:
    /// a machine that broke out must not tell us what to do.
    pub(super) fn create(scratch: &Path, run: &Id16, user: Option<(u32, u32)>, plan: &Plan) -> Result<Self> {
        let path = path_of(scratch, run);
        let fail = |error| Error::io(format!("cannot prepare {}", path.display()), error);
        std::fs::DirBuilder::new().mode(0o711).create(&path).map_err(fail)?;
        let lock = lock(&path)?;
        let made = Self { place: path.join(PLACE), path: path.clone(), user, keep: false, _lock: lock };
        let text =
            serde_json::to_vec(plan).map_err(|error| Error::bug("cannot write a plan").because(error))?;
        std::fs::write(path.join(PLAN), text).map_err(fail)?;
        std::fs::DirBuilder::new().mode(0o700).create(&made.place).map_err(fail)?;
        made.give(&File::open(&made.place).map_err(fail)?, &made.place)?;
        Ok(made)
    }

    /// What the machine's user will be able to touch, before it is made.
    pub(super) fn place_of(scratch: &Path, run: &Id16) -> PathBuf {
        path_of(scratch, run).join(PLACE)
    }

    /// A file of ours in the directory, before it is made.
    pub(super) fn file_of(scratch: &Path, run: &Id16, name: &str) -> PathBuf {
        path_of(scratch, run).join(name)
    }

    /// Leaves everything for the next run to clear away.
    pub(super) fn keep(&mut self) {
        self.keep = true;
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What the machine's user may touch.
    pub(super) fn place(&self) -> &Path {
        &self.place
    }

    /// Makes an empty file of `size` bytes for the machine.
    pub(super) fn sparse(&self, name: &str, size: u64) -> Result<PathBuf> {
        let path = self.place.join(name);
        let fail = |error| Error::io(format!("cannot make {}", path.display()), error);
        let file = File::create_new(&path).map_err(fail)?;
        file.set_permissions(std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
        file.set_len(size).map_err(fail)?;
        self.give(&file, &path)?;
        Ok(path)
    }

    /// Hands a file to the user that the machine runs as, if that is another one.
    fn give(&self, file: &File, path: &Path) -> Result<()> {
        let Some((user, group)) = self.user else { return Ok(()) };
        if user == rustix::process::geteuid().as_raw() {
            return Ok(());
        }
        std::os::unix::fs::fchown(file, Some(user), Some(group)).map_err(|error| {
            Error::io(format!("cannot give {} to the user {user} of the machine", path.display()), error)
                .hint("run as root, or as the user that the machine runs as")
        })
    }
}

/// Short: the path of a socket in it has little more than a hundred bytes.
fn path_of(scratch: &Path, run: &Id16) -> PathBuf {
    scratch.join(format!("{PREFIX}{:.16}", run.to_string()))
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if !self.keep {
            // Should it fail, the next run finds it without a lock.
            let _left = std::fs::remove_dir_all(&self.path);
        }
    }
}

/// Clears away what runs that died left behind `scratch`.
pub(super) fn sweep(scratch: &Path) -> Swept {
    let mut swept = Swept::default();
    for directory in abandoned(scratch) {
        match clear(&directory) {
            Ok(()) => swept.runs += 1,
            Err(error) => {
                let what = format!("what an earlier run left in {} remains", directory.display());
                swept.left.push(format!("{what}: {}", error.chain().join(": ")));
            }
        }
    }
    swept
}

/// The directories in `scratch` that were left by a crash.
fn abandoned(scratch: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(scratch) else { return Vec::new() };
    let named = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX));
    named.map(|entry| entry.path()).filter(|path| lock(path).is_ok()).collect()
}

/// Carries out the plan of a run that died, and removes its directory. A live run is left alone.
fn clear(directory: &Path) -> Result<()> {
    match lock(directory) {
        Ok(lock) => clear_locked(directory, lock),
        // Somebody works in it, or it is gone.
        Err(error) if matches!(error.code(), Code::Conflict | Code::NotFound) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Like [`clear`], once the run has let go of the directory: a process that dies does not close everything at once.
pub(super) fn clear_after_death(directory: &Path) -> Result<()> {
    match lock_with(directory, FlockOperation::LockExclusive) {
        Ok(lock) if directory.exists() => clear_locked(directory, lock),
        Ok(_) => Ok(()),
        Err(error) if error.code() == Code::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn clear_locked(directory: &Path, lock: File) -> Result<()> {
    let (path, place) = (directory.to_owned(), directory.join(PLACE));
    let mut directory = RunDir { path, place, user: None, keep: false, _lock: lock };
    let cleared = match Plan::read(&directory.path) {
        Ok(Plan { remains: Remains::Qemu(remains), .. }) => remains.clear(),
        Ok(Plan { remains: Remains::Libvirt(remains), .. }) => remains.clear(),
        // It died before it had done anything.
        Err(_) => Ok(()),
    };
    // Otherwise the plan is still needed.
    directory.keep = cleared.is_err();
    cleared
}

fn lock(path: &Path) -> Result<File> {
    lock_with(path, FlockOperation::NonBlockingLockExclusive)
}

fn lock_with(path: &Path, operation: FlockOperation) -> Result<File> {
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

/// A number that nobody else has, for names.
pub(super) fn tag() -> u64 {
    std::hash::RandomState::new().build_hasher().finish()
}
