//! Snapshots of the file system as what is read, so that a point is of one moment. The paths in the point stay
//! those of the live tree.
//!
//! On btrfs a snapshot lives in the top directory of its own subvolume, under a name that begins with
//! [`SNAPSHOT_PREFIX`]; on LVM it is a volume of such a name. Whoever reads a snapshot holds a lock on it; one that
//! nobody holds was left by a crash, and is removed by the next run that comes by.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::hash::{BuildHasher as _, Hasher as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use rustix::fs::{CWD, FlockOperation, Mode, OFlags, StatxFlags, flock, openat, statfs, statx};
use rustix::io::Errno;

use crate::armed::Armed;
use crate::process::Program;

use super::lvm::LogicalSnapshot;
use super::mounts::{Mount, mount_of, mounts};

/// How the name of a snapshot begins. What is called so is never captured itself.
pub(super) const SNAPSHOT_PREFIX: &[u8] = b".mainstay-snapshot-";

/// `linux/magic.h`.
const BTRFS: u32 = 0x9123_683e;

/// The inode of the top directory of every subvolume, from `linux/btrfs_tree.h`.
const SUBVOLUME_TOP: u64 = 256;

/// The inode of the empty directory that stands for a nested subvolume in a snapshot.
pub(super) const SUBVOLUME_STAND_IN: u64 = 2;

/// What one command may take: it waits for the file system to write what is due.
const LIMIT: Duration = Duration::from_secs(300);

/// Whether to read from snapshots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SnapshotRule {
    #[default]
    Never,
    /// Where it can be done, which asks for root; elsewhere the live tree is read.
    WherePossible,
    /// It is an error if any root cannot be read from a snapshot.
    Always,
}

/// The snapshots of one run. Dropped, they are deleted.
#[derive(Default)]
pub(super) struct Snapshots {
    taken: Vec<Taken>,
    /// What to read in the place of a root, by the root's path without the leading `/`.
    instead: HashMap<Vec<u8>, PathBuf>,
    /// Mount points of the live tree, which a snapshot does not show.
    mounts: HashSet<Vec<u8>>,
    /// Every root is read from one and the same snapshot.
    pub(super) whole: bool,
}

/// A snapshot and the lock on it, which goes first.
struct Taken {
    _lock: OwnedFd,
    /// What was captured: the top of a subvolume, or a mount point.
    top: PathBuf,
    /// Where it can be read.
    path: PathBuf,
    _kept: Kept,
}

/// Deletes the snapshot when it is dropped.
enum Kept {
    Btrfs { _snapshot: Subvolume },
    Lvm { _snapshot: LogicalSnapshot },
}

/// A btrfs snapshot. Dropped, it is deleted.
struct Subvolume {
    path: PathBuf,
    _armed: Armed,
}

impl Snapshots {
    /// Takes a snapshot of every subvolume that one of `roots` (real paths, without the leading `/`) lies in.
    ///
    /// Errors: [`Code::Unsupported`] under [`SnapshotRule::Always`] when a root lies neither on btrfs nor on LVM.
    pub(super) fn take(roots: &[Vec<u8>], rule: SnapshotRule) -> Result<Self> {
        let mut snapshots = Self::default();
        let able = rule == SnapshotRule::Always || rustix::process::geteuid().is_root();
        if rule == SnapshotRule::Never || !able {
            return Ok(snapshots);
        }
        let mounts = mounts();
        for root in roots {
            match snapshots.add(&absolute(root), &mounts) {
                Ok(inside) => drop(snapshots.instead.insert(root.clone(), inside)),
                Err(error) if rule == SnapshotRule::Always => return Err(error),
                // The live tree will do.
                Err(_) => {}
            }
        }
        snapshots.mounts = mounts.into_iter().map(|mount| mount.point).collect();
        snapshots.whole = snapshots.taken.len() == 1 && snapshots.instead.len() == roots.len();
        Ok(snapshots)
    }

    /// The directory to read instead of the root at `path`.
    pub(super) fn instead_of(&self, path: &[u8]) -> Option<std::result::Result<OwnedFd, Errno>> {
        self.instead.get(path).map(|path| open_directory(path))
    }

    /// Whether something is mounted at `path` in the live tree.
    pub(super) fn is_mount_point(&self, path: &[u8]) -> bool {
        self.mounts.contains(path)
    }

    /// The path inside a snapshot of what is live at `path`.
    fn add(&mut self, path: &Path, mounts: &[Mount]) -> Result<PathBuf> {
        if !path.is_dir() {
            let what = format!("cannot take a snapshot of {}: it is no directory", path.display());
            return Err(Error::new(Code::Unsupported, what));
        }
        let live = path.as_os_str().as_bytes().strip_prefix(b"/").unwrap_or_default();
        let mount = mount_of(mounts, live);
        let top = match (subvolume_of(path), mount) {
            (Some(top), _) => top,
            (None, Some(mount)) => absolute(&mount.point),
            (None, None) => {
                let what = format!("cannot tell where {} is mounted", path.display());
                return Err(Error::new(Code::Unsupported, what));
            }
        };
        let rest = path.strip_prefix(&top).unwrap_or(Path::new("")).to_owned();
        if let Some(taken) = self.taken.iter().find(|taken| taken.top == top) {
            return Ok(taken.path.join(rest));
        }
        let tag = format!("{:016x}", std::hash::RandomState::new().build_hasher().finish());
        let (path, kept) = if subvolume_of(path).is_some() {
            sweep(&top);
            let mut name = SNAPSHOT_PREFIX.to_vec();
            name.extend_from_slice(tag.as_bytes());
            let path = top.join(OsStr::from_bytes(&name));
            let _armed = Armed::new(format!("the snapshot {} to be deleted", path.display()));
            let snapshot = Subvolume { path: path.clone(), _armed };
            btrfs(["subvolume", "snapshot", "-r"]).argument(&top).argument(&path).run_well()?;
            (path, Kept::Btrfs { _snapshot: snapshot })
        } else {
            LogicalSnapshot::mounted().into_iter().for_each(|snapshot| {
                // In use: it stays. Otherwise dropping it removes it.
                if lock(&snapshot.path, FlockOperation::NonBlockingLockExclusive).is_err() {
                    snapshot.leave();
                }
            });
            let mount = mount.ok_or_else(|| Error::bug("a mount that was there is gone"))?;
            let snapshot = LogicalSnapshot::take(mount, &tag)?;
            (snapshot.path.clone(), Kept::Lvm { _snapshot: snapshot })
        };
        let lock = lock(&path, FlockOperation::NonBlockingLockShared).map_err(|errno| {
            Error::io(format!("cannot open the snapshot {}", path.display()), errno.into())
        })?;
        let inside = path.join(rest);
        self.taken.push(Taken { _lock: lock, top, path, _kept: kept });
        Ok(inside)
    }
}

impl Drop for Subvolume {
    fn drop(&mut self) {
        // Should it fail, the next run finds the snapshot without a lock.
        let _left = btrfs(["subvolume", "delete"]).argument(&self.path).run_well();
    }
}

fn lock(path: &Path, operation: FlockOperation) -> std::result::Result<OwnedFd, Errno> {
    open_directory(path).and_then(|fd| flock(&fd, operation).map(|()| fd))
}

fn btrfs<const N: usize>(arguments: [&str; N]) -> Program {
    Program::new("btrfs", LIMIT).arguments(arguments)
}

/// Deletes the snapshots in `top` that nobody reads.
fn sweep(top: &Path) {
    let Ok(entries) = std::fs::read_dir(top) else { return };
    for entry in entries.flatten() {
        if !entry.file_name().as_bytes().starts_with(SNAPSHOT_PREFIX) {
            continue;
        }
        let unused =
            open_directory(&entry.path()).and_then(|fd| flock(&fd, FlockOperation::NonBlockingLockExclusive));
        let is_top = inode(&entry.path()).is_ok_and(|inode| inode == SUBVOLUME_TOP);
        if unused.is_ok() && is_top {
            let _left = btrfs(["subvolume", "delete"]).argument(entry.path()).run_well();
        }
    }
}

/// The top directory of the btrfs subvolume that the directory `path` lies in, if it does.
fn subvolume_of(path: &Path) -> Option<PathBuf> {
    // The kernel's word is 32 bits long, whatever the type here is.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "see above")]
    let magic = statfs(path).map_or(0, |stat| stat.f_type as u32);
    let is_top = |path: &&Path| inode(path).is_ok_and(|inode| inode == SUBVOLUME_TOP);
    if magic == BTRFS { path.ancestors().find(is_top).map(Path::to_owned) } else { None }
}

fn inode(path: &Path) -> std::result::Result<u64, Errno> {
    statx(CWD, path, rustix::fs::AtFlags::SYMLINK_NOFOLLOW, StatxFlags::INO).map(|stat| stat.stx_ino)
}

fn open_directory(path: &Path) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty())
}

fn absolute(path: &[u8]) -> PathBuf {
    let mut bytes = b"/".to_vec();
    bytes.extend_from_slice(path);
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}
