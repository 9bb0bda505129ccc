//! Snapshots of the file system as what is read, so that a point is of one moment. The paths in the point stay
//! those of the live tree.
//!
//! A snapshot lives in the top directory of its own btrfs subvolume, under a name that begins with
//! [`SNAPSHOT_PREFIX`]. Whoever reads it holds a lock on it; one that nobody holds was left by a crash, and is
//! removed by the next run that comes by.

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

use crate::process::Program;

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

struct Taken {
    top: PathBuf,
    path: PathBuf,
    /// Holds the lock for as long as the snapshot is wanted.
    lock: Option<OwnedFd>,
}

impl Snapshots {
    /// Takes a snapshot of every subvolume that one of `roots` (real paths, without the leading `/`) lies in.
    ///
    /// Errors: [`Code::Unsupported`] under [`SnapshotRule::Always`] when a root does not lie on btrfs.
    pub(super) fn take(roots: &[Vec<u8>], rule: SnapshotRule) -> Result<Self> {
        let mut snapshots = Self::default();
        let able = rule == SnapshotRule::Always || rustix::process::geteuid().is_root();
        if rule == SnapshotRule::Never || !able {
            return Ok(snapshots);
        }
        for root in roots {
            let path = absolute(root);
            match snapshots.add(&path) {
                Ok(inside) => drop(snapshots.instead.insert(root.clone(), inside)),
                Err(error) if rule == SnapshotRule::Always => return Err(error),
                // The live tree will do.
                Err(_) => {}
            }
        }
        snapshots.mounts = mount_points(&std::fs::read("/proc/self/mountinfo").unwrap_or_default());
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
    fn add(&mut self, path: &Path) -> Result<PathBuf> {
        let top = subvolume_of(path)?;
        let rest = path.strip_prefix(&top).unwrap_or(Path::new("")).to_owned();
        if let Some(taken) = self.taken.iter().find(|taken| taken.top == top) {
            return Ok(taken.path.join(rest));
        }
        sweep(&top);
        let tag = std::hash::RandomState::new().build_hasher().finish();
        let mut name = SNAPSHOT_PREFIX.to_vec();
        name.extend_from_slice(format!("{tag:016x}").as_bytes());
        let path = top.join(OsStr::from_bytes(&name));
        btrfs(["subvolume", "snapshot", "-r"]).argument(&top).argument(&path).run_well()?;
        // Armed before it is opened: from here on it is deleted whatever happens.
        self.taken.push(Taken { top, path: path.clone(), lock: None });
        let lock = open_directory(&path)
            .and_then(|fd| flock(&fd, FlockOperation::NonBlockingLockShared).map(|()| fd))
            .map_err(|errno| {
                Error::io(format!("cannot open the snapshot {}", path.display()), errno.into())
            })?;
        if let Some(taken) = self.taken.last_mut() {
            taken.lock = Some(lock);
        }
        Ok(path.join(rest))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.lock = None;
        // Should it fail, the next run finds the snapshot without a lock.
        let _left = btrfs(["subvolume", "delete"]).argument(&self.path).run_well();
    }
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

/// The top directory of the btrfs subvolume that the directory `path` lies in.
fn subvolume_of(path: &Path) -> Result<PathBuf> {
    let refuse = |why: &str| {
        Error::new(Code::Unsupported, format!("cannot take a snapshot of {}: {why}", path.display()))
    };
    if !path.is_dir() {
        return Err(refuse("it is no directory"));
    }
    // The kernel's word is 32 bits long, whatever the type here is.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "see above")]
    let magic = statfs(path).map_or(0, |stat| stat.f_type as u32);
    if magic != BTRFS {
        return Err(refuse("it does not lie on btrfs"));
    }
    let is_top = |path: &&Path| inode(path).is_ok_and(|inode| inode == SUBVOLUME_TOP);
    path.ancestors().find(is_top).map(Path::to_owned).ok_or_else(|| refuse("its subvolume is out of sight"))
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

/// The fifth field of each line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)), without the leading `/`.
fn mount_points(text: &[u8]) -> HashSet<Vec<u8>> {
    let field = |line: &[u8]| line.split(|&byte| byte == b' ').nth(4).map(unescape);
    let points = text.split(|&byte| byte == b'\n').filter_map(field);
    points.filter_map(|point| point.strip_prefix(b"/").map(<[u8]>::to_vec)).collect()
}

/// Undoes `\040` and its like, which stand for blanks and backslashes.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(value) if byte == b'\\' => {
                bytes.push(value);
                rest = tail.get(3..).unwrap_or_default();
            }
            _ => {
                bytes.push(byte);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::mount_points;

    #[test]
    fn mount_points_are_read_with_their_blanks() {
        let text = b"22 1 0:21 / / rw shared:1 - ext4 /dev/vda rw\n36 22 8:1 / /mnt/with\\040a\\134blank rw - xfs x rw\nbroken";
        let points = mount_points(text);
        assert_eq!(points.len(), 2);
        assert!(points.contains(b"".as_slice()) && points.contains(b"mnt/with a\\blank".as_slice()));
    }
}
