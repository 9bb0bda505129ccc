//! Volumes of disks that were just written, mounted by the kernel as their machine mounts them, so that files can be put on
//! them. Only on a thread with mounts of its own: see [`super::private`].

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use mainstay_diskimage::fs::FsKind;
use mainstay_workloads::process::Program;

use super::apply::WrittenDisk;
use super::tree::Mount;
use crate::mount::DiskFiles;

/// How long mounting may take: a long journal is replayed.
const LIMIT: Duration = Duration::from_secs(600);

/// How directories to mount at are called; the process that made one follows, and a number.
const PLACE: &str = ".mainstay-mounted-";

/// Below such a directory: where the tree is, and the disks that are no files.
const TREE: &str = "tree";
const DISKS: &str = "disks";

/// A directory to mount in, made for that. Removed when dropped, unless something is still mounted.
pub(super) struct Place(PathBuf);

impl Place {
    /// Takes away what runs that were killed have left in `scratch`: empty directories.
    pub(super) fn new(scratch: &Path) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        sweep(scratch);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = scratch.join(format!("{PLACE}{}-{number}", std::process::id()));
        let failed = |error: std::io::Error| Error::io(format!("cannot make {}", directory.display()), error);
        for made in [directory.clone(), directory.join(TREE), directory.join(DISKS)] {
            std::fs::create_dir(made).map_err(failed)?;
        }
        Ok(Self(directory.canonicalize().map_err(failed)?))
    }

    /// For file systems.
    pub(super) fn tree(&self) -> PathBuf {
        self.0.join(TREE)
    }

    /// For disks that are shown as files.
    pub(super) fn disks(&self) -> PathBuf {
        self.0.join(DISKS)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        remove(&self.0);
    }
}

/// The tree of a machine, mounted. Unmounted when dropped.
pub(super) struct Mounted {
    /// Where the machine's root is.
    pub(super) root: PathBuf,
    /// Outer ones first.
    places: Vec<PathBuf>,
    /// The disks as files or devices, by their number.
    disks: Vec<PathBuf>,
    shown: Option<DiskFiles>,
    /// The last to go.
    _place: Place,
}

impl Mounted {
    /// A place to mount at, below `scratch`.
    pub(super) fn new(scratch: &Path, disks: &[WrittenDisk]) -> Result<Self> {
        let place = Place::new(scratch)?;
        let others = disks.iter().filter_map(|disk| match disk {
            WrittenDisk::Raw(_) => None,
            WrittenDisk::Blocks(blocks) => Some(Arc::clone(blocks)),
        });
        let others: Vec<_> = others.collect();
        let shown = if others.is_empty() { None } else { Some(DiskFiles::new(others, &place.disks())?) };
        let mut number = 0;
        let mut path = |disk: &WrittenDisk| match (disk, &shown) {
            (WrittenDisk::Raw(path), _) => path.clone(),
            (WrittenDisk::Blocks(_), shown) => {
                number += 1;
                shown.as_ref().map_or_else(PathBuf::new, |shown| shown.path(number - 1))
            }
        };
        let disks = disks.iter().map(&mut path).collect();
        Ok(Self { root: place.tree(), places: Vec::new(), disks, shown, _place: place })
    }

    /// Mounts a volume that lies on the disk of this number at its place in the tree.
    ///
    /// Errors: [`Code::Unsupported`] for a file system that is not written here; whatever the kernel says.
    pub(super) fn mount(&mut self, mount: &Mount, disk: usize, range: &Range<u64>) -> Result<()> {
        let at = self.root.join(OsStr::from_bytes(mount.at.as_bytes()));
        let real = at.canonicalize().map_err(|error| Error::io("the directory is not there", error))?;
        if real != at {
            return Err(Error::new(Code::Refused, "a symbolic link stands on the way to it"));
        }
        let (kind, options) = options(mount)?;
        let disk = self.disks.get(disk).ok_or_else(|| Error::bug("a volume lies on no disk"))?;
        let place = format!("loop,offset={},sizelimit={}", range.start, range.end - range.start);
        Program::new("mount", LIMIT)
            .arguments(["-t", kind, "-o", &format!("{place},nosuid,nodev,noexec,noatime{options}")])
            .argument(disk)
            .argument(&at)
            .run_well()?;
        self.places.push(at);
        Ok(())
    }

    /// Unmounts everything, so that all is on the disks.
    pub(super) fn finish(mut self) -> Result<()> {
        while let Some(place) = self.places.pop() {
            Program::new("umount", LIMIT).argument(place).run_well()?;
        }
        self.shown.take().map_or(Ok(()), DiskFiles::finish)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        while let Some(place) = self.places.pop() {
            // The end of the thread takes away what stays.
            let _unmounted = Program::new("umount", LIMIT).argument(place).run_well();
        }
    }
}

/// The kernel's name of the file system, and what it has to be told.
fn options(mount: &Mount) -> Result<(&'static str, String)> {
    let kind = mount.kind();
    Ok(match kind {
        FsKind::Ext2 | FsKind::Ext3 | FsKind::Ext4 => ("ext4", String::new()),
        // It refuses a second file system of one identity unless it is told not to mind.
        FsKind::Xfs => ("xfs", ",nouuid".to_owned()),
        FsKind::Btrfs => {
            let base = std::str::from_utf8(mount.line.base.as_bytes()).ok();
            let plain = base.filter(|base| !base.contains([',', '"', '\\']));
            let base =
                plain.ok_or_else(|| Error::new(Code::Unsupported, "its subvolume has a strange name"))?;
            let subvolume = if base.is_empty() { String::new() } else { format!(",subvol=/{base}") };
            ("btrfs", subvolume)
        }
        FsKind::Fat => {
            let owners: String = mount.line.owners.iter().map(|option| format!(",{option}")).collect();
            ("vfat", owners)
        }
        FsKind::Ntfs | FsKind::Kernel => {
            let what = format!("{} is not written here", kind.name());
            return Err(Error::new(Code::Unsupported, what));
        }
    })
}

/// Removes the empty places of processes that are no more.
fn sweep(scratch: &Path) {
    let Ok(entries) = std::fs::read_dir(scratch) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let process =
            name.to_str().and_then(|name| name.strip_prefix(PLACE)?.split('-').next()?.parse::<u32>().ok());
        if process.is_some_and(|process| !Path::new(&format!("/proc/{process}")).exists()) {
            remove(&entry.path());
        }
    }
}

/// Removes a place, which is empty unless somebody uses it.
fn remove(directory: &Path) {
    for empty in [directory.join(TREE), directory.join(DISKS), directory.to_owned()] {
        let _removed = std::fs::remove_dir(empty);
    }
}
