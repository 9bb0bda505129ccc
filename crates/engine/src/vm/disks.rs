//! Writing the content of a disk where it is wanted: an image file or a bare disk, of the same size or another.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use mainstay_core::{Blocks, Code, Counts, Error, Event, Extent, ExtentKind, Progress, Result};
use mainstay_diskimage::Qcow2Writer;
use mainstay_diskimage::partition::refit;
use mainstay_nbd::WritableBlocks;

/// Read and written at once.
const PIECE_BYTES: u64 = 2 << 20;
/// Extents are asked for in windows of this length.
const WINDOW_BYTES: u64 = 1 << 30;

/// Writes `disk` to `target`, which may be of another size: then the backup of its GPT moves along. What is a hole in the
/// disk stays one when `fresh` says that the target reads as zeros; otherwise it is zeroed. Durable when this returns the
/// bytes of data written.
///
/// Errors: [`Code::Refused`] when the disk does not fit; those of both sides. The target may be half written then.
pub fn write_disk(
    disk: &dyn Blocks,
    target: &dyn WritableBlocks,
    fresh: bool,
    jobs: usize,
    progress: &dyn Progress,
) -> Result<u64> {
    let refit = refit(disk, target.size())?;
    let copy = Copy {
        disk,
        target,
        fresh,
        end: refit.copied,
        next: Mutex::new(Pieces { at: 0, extents: Vec::new() }),
        done: AtomicU64::new(0),
        written: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        progress,
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(|| copy.work())).collect();
        let mut outcome = Ok(());
        for worker in workers {
            let ended =
                worker.join().unwrap_or_else(|_| Err(Error::bug("a thread that writes a disk panicked")));
            // The others are only told to stop; the one that failed says why.
            if outcome.is_ok() {
                outcome = ended;
            }
        }
        outcome
    })?;
    if !fresh && target.size() > refit.copied {
        target.zero(refit.copied..target.size())?;
    }
    for (at, patch) in &refit.patches {
        target.write_at(*at, patch)?;
    }
    target.flush()?;
    Ok(copy.written.load(Ordering::Relaxed))
}

struct Copy<'a> {
    disk: &'a dyn Blocks,
    target: &'a dyn WritableBlocks,
    fresh: bool,
    end: u64,
    next: Mutex<Pieces>,
    done: AtomicU64,
    written: AtomicU64,
    stop: AtomicBool,
    progress: &'a dyn Progress,
}

struct Pieces {
    at: u64,
    /// What is left of the window, last first.
    extents: Vec<Extent>,
}

impl Copy<'_> {
    fn work(&self) -> Result<()> {
        let mut buffer = vec![0; PIECE_BYTES as usize];
        loop {
            let moved = self.step(&mut buffer);
            match moved {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => {
                    self.stop.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    }

    fn step(&self, buffer: &mut [u8]) -> Result<bool> {
        self.progress.check()?;
        let Some((range, is_data)) = self.take()? else { return Ok(false) };
        let length = range.end - range.start;
        if is_data {
            let piece = buffer.get_mut(..length as usize).unwrap_or_default();
            self.disk.read_at(range.start, piece)?;
            self.target.write_at(range.start, piece)?;
            self.written.fetch_add(length, Ordering::Relaxed);
        } else if !self.fresh {
            self.target.zero(range)?;
        }
        let bytes = self.done.fetch_add(length, Ordering::Relaxed) + length;
        let written_bytes = self.written.load(Ordering::Relaxed);
        self.progress.event(&Event::Done(Counts { bytes, written_bytes, ..Counts::default() }));
        Ok(true)
    }

    /// The next piece; in order, so that packs are read from front to back.
    fn take(&self) -> Result<Option<(Range<u64>, bool)>> {
        if self.stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        while next.extents.last().is_some_and(|extent| extent.range.end <= next.at) {
            next.extents.pop();
        }
        if next.extents.is_empty() {
            let window = next.at..self.end.min(next.at + WINDOW_BYTES);
            if window.is_empty() {
                return Ok(None);
            }
            next.extents = self.disk.extents(window)?;
            next.extents.reverse();
        }
        let Some(extent) = next.extents.last() else {
            return Err(Error::bug("the extents of a disk do not cover it"));
        };
        let is_data = extent.kind == ExtentKind::Data;
        // Zeros take one request however many they are.
        let most = if is_data { next.at + PIECE_BYTES - next.at % PIECE_BYTES } else { u64::MAX };
        let range = next.at..extent.range.end.min(most);
        if range.is_empty() {
            return Err(Error::bug("the extents of a disk do not follow each other"));
        }
        next.at = range.end;
        Ok(Some((range, is_data)))
    }
}

/// How a new image file keeps a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImageFormat {
    #[default]
    Raw,
    Qcow2,
}

impl ImageFormat {
    /// What people, file names and hypervisors call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// A new image file.
pub enum ImageTarget {
    Raw(RawTarget),
    Qcow2(Qcow2Writer),
}

impl ImageTarget {
    /// Makes a new file for a disk of `size` bytes that only its owner may read.
    ///
    /// Errors: [`Code::AlreadyExists`].
    pub fn create(path: &Path, size: u64, format: ImageFormat) -> Result<Self> {
        Ok(match format {
            ImageFormat::Raw => Self::Raw(RawTarget::create(path, size)?),
            ImageFormat::Qcow2 => Self::Qcow2(Qcow2Writer::create(path, size)?),
        })
    }

    fn blocks(&self) -> &dyn Blocks {
        match self {
            Self::Raw(raw) => raw,
            Self::Qcow2(qcow2) => qcow2,
        }
    }
}

impl Blocks for ImageTarget {
    fn size(&self) -> u64 {
        self.blocks().size()
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        self.blocks().extents(range)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.blocks().read_at(offset, buffer)
    }
}

impl WritableBlocks for ImageTarget {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.write_at(offset, data),
            Self::Qcow2(qcow2) => qcow2.write_at(offset, data),
        }
    }

    fn zero(&self, range: Range<u64>) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.zero(range),
            Self::Qcow2(qcow2) => qcow2.zero(range),
        }
    }

    fn flush(&self) -> Result<()> {
        match self {
            Self::Raw(raw) => raw.flush(),
            Self::Qcow2(qcow2) => qcow2.flush(),
        }
    }
}

/// An image file without a format, or a bare disk.
pub struct RawTarget {
    file: File,
    path: PathBuf,
    size: u64,
    is_device: bool,
}

impl RawTarget {
    /// Makes a new file of `size` bytes that only its owner may read.
    ///
    /// Errors: [`Code::AlreadyExists`].
    pub fn create(path: &Path, size: u64) -> Result<Self> {
        let failed = |error: std::io::Error| Error::io(format!("cannot make {}", path.display()), error);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Error::new(Code::AlreadyExists, format!("{} exists already", path.display()))
                    .hint("choose another place, or move it away")
            }
            _ => failed(error),
        })?;
        file.set_len(size).map_err(failed)?;
        Ok(Self { file, path: path.to_owned(), size, is_device: false })
    }

    /// Opens a disk, or a partition, to be written over.
    ///
    /// Errors: [`Code::Usage`] when it is no block device; [`Code::Conflict`] when it is in use.
    pub fn device(path: &Path) -> Result<Self> {
        let failed = |error: std::io::Error| Error::io(format!("cannot open {}", path.display()), error);
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_block_device() {
            return Err(Error::new(Code::Usage, format!("{} is not a disk", path.display()))
                .hint("a file is made in a directory: name that with --to"));
        }
        // Without this flag the kernel lets a mounted disk be written over.
        let exclusive = rustix::fs::OFlags::EXCL.bits().cast_signed();
        let file = OpenOptions::new().read(true).write(true).custom_flags(exclusive).open(path);
        let mut file = file.map_err(|error| match error.kind() {
            std::io::ErrorKind::ResourceBusy => {
                Error::new(Code::Conflict, format!("{} is in use", path.display()))
                    .hint("unmount what is on it, and stop what holds it")
            }
            _ => failed(error),
        })?;
        let size = std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).map_err(failed)?;
        Ok(Self { file, path: path.to_owned(), size, is_device: true })
    }

    fn failed(&self, error: std::io::Error) -> Error {
        Error::io(format!("cannot write {}", self.path.display()), error)
    }
}

impl Blocks for RawTarget {
    fn size(&self) -> u64 {
        self.size
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        let change = mainstay_core::ChangeState::Unknown;
        Ok(if range.is_empty() { Vec::new() } else { vec![Extent { range, kind: ExtentKind::Data, change }] })
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let failed = |error| Error::io(format!("cannot read {}", self.path.display()), error);
        self.file.read_exact_at(buffer, offset).map_err(failed)
    }
}

impl WritableBlocks for RawTarget {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.file.write_all_at(data, offset).map_err(|error| self.failed(error))
    }

    fn zero(&self, range: Range<u64>) -> Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        let flags = if self.is_device { FallocateFlags::ZERO_RANGE } else { FallocateFlags::PUNCH_HOLE }
            | FallocateFlags::KEEP_SIZE;
        if fallocate(&self.file, flags, range.start, range.end - range.start).is_ok() {
            return Ok(());
        }
        // What cannot free space is written.
        let zeros = vec![0; PIECE_BYTES as usize];
        let mut at = range.start;
        while at < range.end {
            let length = (range.end - at).min(PIECE_BYTES);
            self.write_at(at, zeros.get(..length as usize).unwrap_or_default())?;
            at += length;
        }
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.file.sync_all().map_err(|error| self.failed(error))
    }
}

/// The progress of one disk on top of what was written before it.
pub(super) struct Shifted<'a> {
    pub(super) base: Counts,
    pub(super) inner: &'a dyn Progress,
}

impl Progress for Shifted<'_> {
    fn event(&self, event: &Event<'_>) {
        match event {
            Event::Done(counts) => self.inner.event(&Event::Done(Counts {
                bytes: self.base.bytes + counts.bytes,
                written_bytes: self.base.written_bytes + counts.written_bytes,
                ..self.base
            })),
            other => self.inner.event(other),
        }
    }

    fn cancelled(&self) -> bool {
        self.inner.cancelled()
    }
}
