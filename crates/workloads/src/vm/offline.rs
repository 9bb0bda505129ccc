//! Machines that are shut down: their images are read where they lie, under QEMU's own lock, and never started. A
//! machine that is to be started meanwhile is told that its images are in use.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Blocks, ChangeState, Clock, Code, Consistency, Error, Extent, Result, Run};
use mainstay_diskimage::container::{self, Directories, Format};
use mainstay_nbd::{Address, Client};

use super::hypervisor::{DiskMode, DiskSnapshot, MachineSnapshot, SnapshotRequest};
use super::image_lock;
use super::machine::{Machine, MachineDisk};
use super::mark::{BitmapState, DiskMark, Found, Marks};
use super::run_dir::tag;
use crate::process::Program;

/// Files touched less than this ago may be touched again within one tick of their times.
const SETTLED: Duration = Duration::from_secs(2);

/// What `qemu-nbd` may take to open an image.
const OPEN: Duration = Duration::from_secs(60);

/// A machine to be read in place.
pub(super) struct Offline<'a> {
    /// The name of the driver in marks.
    pub(super) driver: &'static str,
    pub(super) machine: Machine,
    /// For sockets; without it bitmaps inside images are not asked.
    pub(super) scratch: Option<&'a Path>,
    /// Less than [`Consistency::Offline`] when the guest did not shut down.
    pub(super) reached: Consistency,
    pub(super) notes: Vec<String>,
}

struct OfflineSnapshot {
    driver: &'static str,
    machine: Machine,
    shown: Vec<DiskSnapshot>,
    disks: Vec<OfflineDisk>,
    reached: Consistency,
    notes: Vec<String>,
}

struct OfflineDisk {
    name: String,
    blocks: Arc<dyn Blocks>,
    /// Every extent is known to be what it was.
    untouched: bool,
    mark: DiskMark,
    files: Vec<PathBuf>,
    /// What the files looked like when the reading began.
    seen: Vec<Look>,
    _locks: Vec<File>,
}

/// What tells one state of a file from another: (size, modification, change, inode), times in nanoseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Look(u64, i128, i128, u64);

/// Errors: [`Code::Conflict`] when an image is in use; what opening an image says.
pub(super) fn take(
    offline: Offline<'_>,
    request: &SnapshotRequest,
    clock: &dyn Clock,
) -> Result<Box<dyn MachineSnapshot>> {
    let Offline { driver, mut machine, scratch, reached, mut notes } = offline;
    let wanted = choose(&machine, &request.disks)?;
    let (mut disks, mut shown) = (Vec::new(), Vec::new());
    for disk in wanted {
        let place = Place { driver, machine: &machine, scratch, now: clock.now().0.into() };
        let (opened, mode) = open(&place, &disk, request, &mut notes).map_err(|error| {
            error.during(format!("cannot read the disk {} of {}", disk.name, machine.name))
        })?;
        let tracked = opened.mark.stamp.is_some() || opened.mark.bitmap.is_some();
        shown.push(DiskSnapshot { name: disk.name, size: opened.blocks.size(), mode, tracked });
        disks.push(opened);
    }
    for disk in &mut machine.disks {
        let seen = shown.iter().find(|seen| seen.name == disk.name);
        disk.size = seen.map(|seen| seen.size).or(disk.size);
    }
    Ok(Box::new(OfflineSnapshot { driver, machine, shown, disks, reached, notes }))
}

fn choose(machine: &Machine, wanted: &[String]) -> Result<Vec<MachineDisk>> {
    let disks: Vec<_> = machine.disks.iter().filter(|disk| !disk.read_only).collect();
    if let Some(missing) = wanted.iter().find(|name| !disks.iter().any(|disk| disk.name == **name)) {
        return Err(Error::new(Code::NotFound, format!("the machine has no disk {missing}")));
    }
    let chosen = |disk: &&MachineDisk| wanted.is_empty() || wanted.contains(&disk.name);
    Ok(disks.into_iter().filter(chosen).cloned().collect())
}

struct Place<'a> {
    driver: &'static str,
    machine: &'a Machine,
    scratch: Option<&'a Path>,
    /// Nanoseconds since 1970.
    now: i128,
}

fn open(
    place: &Place<'_>,
    disk: &MachineDisk,
    request: &SnapshotRequest,
    notes: &mut Vec<String>,
) -> Result<(OfflineDisk, DiskMode)> {
    let path = PathBuf::from(&disk.source);
    let mut locks = vec![locked(&path)?];
    let opened = container::open(&path, format(disk)?, &Directories::of(&path)?)?;
    for file in opened.files.iter().filter(|file| **file != path) {
        locks.push(locked(file)?);
    }
    notes.extend(opened.notes.iter().map(|note| format!("the disk {}: {note}", disk.name)));
    let seen = opened.files.iter().map(|file| Look::at(file)).collect::<Result<Vec<_>>>()?;
    let stamp = stamp(&seen, place.now);
    let mark = request.since.as_ref().and_then(|marks| marks.of(place.driver, &place.machine.id, &disk.name));
    let inode = seen.first().map(|look| look.3);
    // Its state is found out by asking for it.
    let bitmap = BitmapState { granularity: 0, recording: true, inconsistent: false, busy: false };
    let found = Found { size: opened.blocks.size(), image: &disk.source, inode, bitmap: Some(bitmap) };
    let mut disk = OfflineDisk {
        name: disk.name.clone(),
        mark: DiskMark {
            bitmap: None,
            size: opened.blocks.size(),
            granularity: mark.map_or(0, |mark| mark.granularity),
            image: disk.source.clone(),
            inode,
            increments: 0,
            stamp,
        },
        blocks: opened.blocks,
        untouched: false,
        files: opened.files,
        seen,
        _locks: locks,
    };
    let mode = match mark {
        None => DiskMode::Full,
        Some(mark) => disk.since(mark, &found, request, place.scratch),
    };
    Ok((disk, mode))
}

/// What the configuration says, so that a guest cannot pass its raw disk off as another format.
fn format(disk: &MachineDisk) -> Result<Option<Format>> {
    Ok(Some(match disk.format.as_str() {
        "raw" => Format::Raw,
        "qcow2" => Format::Qcow2,
        "vmdk" => Format::Vmdk,
        "vhdx" => Format::Vhdx,
        "" => return Ok(None),
        other => {
            let what = format!("images of the format {other} are not read");
            return Err(Error::new(Code::Unsupported, what).hint("start the machine, and it can be captured"));
        }
    }))
}

fn locked(path: &Path) -> Result<File> {
    let fail = |error| Error::io(format!("cannot open {}", path.display()), error);
    let file = File::open(path).map_err(fail)?;
    match image_lock::hold(&file) {
        Ok(true) => Ok(file),
        Ok(false) => {
            let what = format!("{} is in use by a machine that runs", path.display());
            Err(Error::new(Code::Conflict, what)
                .hint("capture the machine through its hypervisor, or shut it down"))
        }
        Err(errno) => Err(Error::io(format!("cannot lock {}", path.display()), errno.into())),
    }
}

impl Look {
    fn at(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path)
            .map_err(|error| Error::io(format!("cannot look at {}", path.display()), error))?;
        let time = |seconds: i64, rest: i64| i128::from(seconds) * 1_000_000_000 + i128::from(rest);
        let modified = time(metadata.mtime(), metadata.mtime_nsec());
        let changed = time(metadata.ctime(), metadata.ctime_nsec());
        // A device's times tell nothing of its content.
        let changed = if metadata.is_file() { changed } else { i128::MAX };
        Ok(Self(metadata.size(), modified, changed, metadata.ino()))
    }
}

/// `None` when the files could change without looking different.
fn stamp(seen: &[Look], now: i128) -> Option<String> {
    let settled = i128::try_from(SETTLED.as_nanos()).unwrap_or(i128::MAX);
    let firm = seen.iter().all(|look| look.2.saturating_add(settled) < now);
    firm.then(|| {
        let one =
            |Look(size, modified, changed, inode): &Look| format!("{size} {modified} {changed} {inode}");
        seen.iter().map(one).collect::<Vec<_>>().join(", ")
    })
}

impl OfflineDisk {
    /// How the disk has to be read since `mark`.
    fn since(
        &mut self,
        mark: &DiskMark,
        found: &Found<'_>,
        request: &SnapshotRequest,
        scratch: Option<&Path>,
    ) -> DiskMode {
        if let Some(why) = mark.other(found, request.scan_every) {
            return DiskMode::Scan { why };
        }
        let same = mark.stamp.is_some() && mark.stamp == self.mark.stamp;
        if !same {
            let (Some(bitmap), Some(scratch)) = (&mark.bitmap, scratch) else {
                return DiskMode::Scan { why: "nothing recorded what changed since the last point".into() };
            };
            match by_bitmap(&self.mark.image, bitmap, scratch) {
                Ok(blocks) => self.blocks = blocks,
                Err(error) => {
                    return DiskMode::Scan {
                        why: format!("the bitmap {bitmap}: {}", error.chain().join(": ")),
                    };
                }
            }
        }
        self.untouched = same;
        // It goes on knowing all that changes from now on, and more.
        self.mark.bitmap.clone_from(&mark.bitmap);
        self.mark.increments = mark.increments.saturating_add(1);
        DiskMode::Incremental
    }
}

/// Has `qemu-nbd` offer the image with a bitmap that it holds. The program ends with its last reader.
fn by_bitmap(image: &str, bitmap: &str, scratch: &Path) -> Result<Arc<dyn Blocks>> {
    let socket = scratch.join(format!("mainstay-{:016x}", tag()));
    let serve =
        Program::new("qemu-nbd", OPEN).arguments(["--fork", "--read-only", "--shared=8", "-f", "qcow2"]);
    let serve = serve.arguments(["-x", "disk", "-B", bitmap, "-k"]).argument(&socket).argument(image);
    serve.run_well()?;
    let client = Client::new(Address::Unix(socket.clone()), "disk");
    let opened = client.blocks(Some(&format!("qemu:dirty-bitmap:{bitmap}")));
    // Nobody else is to come.
    let _removed = std::fs::remove_file(&socket);
    Ok(Arc::new(opened?))
}

impl MachineSnapshot for OfflineSnapshot {
    fn reached(&self) -> Consistency {
        self.reached
    }

    fn frozen(&self) -> Duration {
        Duration::ZERO
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
        let disk = self.disks.get(disk).ok_or_else(|| Error::bug(format!("there is no disk {disk}")))?;
        Ok(Box::new(Still { blocks: Arc::clone(&disk.blocks), untouched: disk.untouched }))
    }

    fn marks(&self) -> Result<Marks> {
        let mut marks = Marks::new(self.driver, self.machine.id.clone());
        for disk in &self.disks {
            for (file, seen) in disk.files.iter().zip(&disk.seen) {
                if Look::at(file)? != *seen {
                    let what = format!("{} changed while it was read", file.display());
                    return Err(
                        Error::new(Code::Conflict, what).hint("run again; the machine may have been started")
                    );
                }
            }
            marks.disks.insert(disk.name.clone(), disk.mark.clone());
        }
        Ok(marks)
    }

    fn commit(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

/// A disk that nobody writes to.
struct Still {
    blocks: Arc<dyn Blocks>,
    untouched: bool,
}

impl Blocks for Still {
    fn size(&self) -> u64 {
        self.blocks.size()
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        let mut extents = self.blocks.extents(range)?;
        if self.untouched {
            extents.iter_mut().for_each(|extent| extent.change = ChangeState::Unchanged);
        }
        Ok(extents)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.blocks.read_at(offset, buffer)
    }

    fn cuts(&self, range: Range<u64>) -> Result<Vec<Run>> {
        self.blocks.cuts(range)
    }
}
