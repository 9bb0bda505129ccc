//! What is written over a base that must not change: a raw image that fills up, and a map of what is in it.

mod map;
mod medium;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_core::{Blocks, ChangeState, Code, Error, Extent, ExtentKind, Result};
use rustix::fs::{FlockOperation, flock};

use crate::blocks::{WritableBlocks, check};
use map::{BLOCK, Boot, Map};
use medium::Medium;

/// How much [`Overlay::pull`] reads from the base at once, in bytes.
const PULL_LEN: u64 = 1 << 20;

/// A device that reads from a base until it is written.
///
/// A write that returned survives the end of the process, however it ends; after [`WritableBlocks::flush`] it survives
/// a power cut. The first write to a block of 64 KiB copies the rest of the block from the base.
pub struct Overlay {
    base: Arc<dyn Blocks>,
    data: Box<dyn Medium>,
    map: Map,
    /// Held while a block becomes local. The base is read before, so nobody waits long.
    first: Mutex<()>,
    flushing: Mutex<()>,
    /// A sync failed: what is on the disk is unknown, and no later sync tells.
    lost: AtomicBool,
    /// Where the image lies.
    place: PathBuf,
}

impl Overlay {
    /// Opens the overlay at `path`, or makes it. The map lies beside it, with `.map` after the name.
    ///
    /// `base_id` says what the base is, such as a digest of its names; an overlay opens only over the same.
    ///
    /// Errors: [`Code::Refused`] when it belongs to another base; [`Code::Conflict`] when it is in use;
    /// [`Code::AlreadyExists`] when there is something without a map.
    pub fn open(path: &Path, base: Arc<dyn Blocks>, base_id: &[u8; 32]) -> Result<Self> {
        let during = |error: Error| error.during(format!("cannot use the overlay {}", path.display()));
        Self::open_files(path, base, base_id).map_err(during)
    }

    fn open_files(path: &Path, base: Arc<dyn Blocks>, base_id: &[u8; 32]) -> Result<Self> {
        let size = base.size();
        let boot = this_boot();
        let map_path = map_path(path);
        if path.exists() && !map_path.exists() {
            return Err(Error::new(Code::AlreadyExists, "there is a file, but no map that belongs to it")
                .hint("if it is an image to keep, choose another place; otherwise remove it"));
        }
        let map = open_file(&map_path)?;
        flock(&map, FlockOperation::NonBlockingLockExclusive).map_err(|errno| {
            Error::new(Code::Conflict, "another process uses it").because(std::io::Error::from(errno))
        })?;
        let data = open_file(path)?;
        if length(&map)? == 0 || !Map::is_made(&map)? {
            resize(&data, size)?;
            resize(&map, map::file_len(size)?)?;
            data.sync_all().map_err(|error| Error::io("cannot sync the image", error))?;
            sync_directory(path)?;
            Map::make(&map, size, base_id, &boot)?;
        }
        if length(&map)? != map::file_len(size)? || length(&data)? != size {
            return Err(map::other_base());
        }
        let mut overlay = Self::over(base, Box::new(data), Box::new(map), base_id, &boot)?;
        overlay.place = path.into();
        Ok(overlay)
    }

    fn over(
        base: Arc<dyn Blocks>,
        data: Box<dyn Medium>,
        map: Box<dyn Medium>,
        base_id: &[u8; 32],
        boot: &Boot,
    ) -> Result<Self> {
        let map = Map::open(map, base.size(), base_id, boot)?;
        let lost = AtomicBool::new(false);
        let (first, flushing, place) = (Mutex::default(), Mutex::default(), PathBuf::new());
        Ok(Self { base, data, map, first, flushing, lost, place })
    }

    /// Bytes that are not local yet, in whole blocks; at 0 the base is no longer read.
    pub fn missing(&self) -> u64 {
        self.map.missing() * BLOCK
    }

    /// Makes `range` local, while others read and write.
    pub fn pull(&self, range: Range<u64>) -> Result<()> {
        check(self.size(), &range)?;
        let mut at = range.start / BLOCK * BLOCK;
        while at < range.end {
            let (end, local) = self.map.stretch(at, range.end.min(at.saturating_add(PULL_LEN)));
            let end = end.next_multiple_of(BLOCK).min(self.size());
            if !local {
                self.pull_blocks(at..end)?;
            }
            at = end;
        }
        Ok(())
    }

    fn pull_blocks(&self, range: Range<u64>) -> Result<()> {
        let mut bytes = vec![0; len_of(&range)];
        if self.base.extents(range.clone())?.iter().any(|extent| extent.kind == ExtentKind::Data) {
            self.base.read_at(range.start, &mut bytes)?;
        }
        for block in blocks_touched(&range) {
            let part = self.block_range(block);
            let start = len_of(&(range.start..part.start));
            let content = &bytes[start..start + len_of(&part)];
            let _first = self.first();
            if self.map.has(block) {
                continue;
            }
            let written = if content.iter().all(|byte| *byte == 0) {
                // Not merely left alone: a power cut may have left bytes of a write that never counted.
                self.data.punch(part)
            } else {
                self.data.write(part.start, content)
            };
            written.map_err(trouble)?;
            self.map.mark(block..block + 1)?;
        }
        Ok(())
    }

    /// Ends the overlay: the image is all there is, and the map goes.
    ///
    /// Errors: [`Code::Refused`] while something is missing.
    pub fn finish(self) -> Result<()> {
        if self.missing() > 0 {
            let what = format!("{} bytes are still in the base only", self.missing());
            return Err(Error::new(Code::Refused, what).hint("pull them first"));
        }
        self.flush()?;
        std::fs::remove_file(map_path(&self.place))
            .map_err(|error| Error::io("cannot remove the map", error))?;
        sync_directory(&self.place)
    }

    /// Writes to blocks some of which may not be local, each for itself.
    fn write_first(&self, offset: u64, data: &[u8]) -> Result<()> {
        let range = offset..offset + data.len() as u64;
        for block in blocks_touched(&range) {
            let whole = self.block_range(block);
            let part = range.start.max(whole.start)..range.end.min(whole.end);
            let bytes = &data[len_of(&(offset..part.start))..len_of(&(offset..part.end))];
            let mut copy = Vec::new();
            if part != whole && !self.map.has(block) {
                copy.resize(len_of(&whole), 0);
                self.base.read_at(whole.start, &mut copy)?;
                let start = len_of(&(whole.start..part.start));
                copy[start..start + bytes.len()].copy_from_slice(bytes);
            }
            let _first = self.first();
            if self.map.has(block) {
                // Somebody else was first.
                self.data.write(part.start, bytes).map_err(trouble)?;
                continue;
            }
            let (at, content) = if part == whole { (part.start, bytes) } else { (whole.start, &copy[..]) };
            self.data.write(at, content).map_err(trouble)?;
            self.map.mark(block..block + 1)?;
        }
        Ok(())
    }

    fn block_range(&self, block: u64) -> Range<u64> {
        block * BLOCK..((block + 1) * BLOCK).min(self.size())
    }

    fn first(&self) -> MutexGuard<'_, ()> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn usable(&self) -> Result<()> {
        if self.lost.load(Ordering::Acquire) {
            return Err(Error::new(Code::Io, "a sync failed earlier, so it is unknown what the disk holds"));
        }
        Ok(())
    }

    /// Adds what the image holds between two local offsets.
    fn local_extents(&self, range: Range<u64>, extents: &mut Vec<Extent>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let (end, is_data) = self.data.next_change(&(at..range.end)).map_err(trouble)?;
            let kind = if is_data { ExtentKind::Data } else { ExtentKind::Hole };
            push(extents, Extent { range: at..end, kind, change: ChangeState::Changed });
            at = end;
        }
        Ok(())
    }
}

impl Blocks for Overlay {
    fn size(&self) -> u64 {
        self.base.size()
    }

    /// Changed is what is local.
    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        check(self.size(), &range)?;
        let mut extents = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let (end, local) = self.map.stretch(at, range.end);
            if local {
                self.local_extents(at..end, &mut extents)?;
            } else {
                for extent in self.base.extents(at..end)? {
                    push(&mut extents, Extent { change: ChangeState::Unchanged, ..extent });
                }
            }
            at = end;
        }
        Ok(extents)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = offset..offset.saturating_add(buffer.len() as u64);
        check(self.size(), &range)?;
        let mut at = range.start;
        while at < range.end {
            let (end, local) = self.map.stretch(at, range.end);
            let part = &mut buffer[len_of(&(offset..at))..len_of(&(offset..end))];
            if local {
                self.data.read(at, part).map_err(trouble)?;
            } else {
                self.base.read_at(at, part)?;
            }
            at = end;
        }
        Ok(())
    }
}

impl WritableBlocks for Overlay {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let range = offset..offset.saturating_add(data.len() as u64);
        check(self.size(), &range)?;
        self.usable()?;
        let mut at = range.start;
        while at < range.end {
            let (end, local) = self.map.stretch(at, range.end);
            let part = &data[len_of(&(offset..at))..len_of(&(offset..end))];
            if local {
                self.data.write(at, part).map_err(trouble)?;
            } else {
                self.write_first(at, part)?;
            }
            at = end;
        }
        Ok(())
    }

    fn zero(&self, range: Range<u64>) -> Result<()> {
        check(self.size(), &range)?;
        self.usable()?;
        let whole = range.start.div_ceil(BLOCK)..match range.end == self.size() {
            true => range.end.div_ceil(BLOCK),
            false => range.end / BLOCK,
        };
        let (start, end) = (whole.start * BLOCK, (whole.end * BLOCK).min(self.size()));
        if start >= end {
            return self.write_at(range.start, &vec![0; len_of(&range)]);
        }
        self.write_at(range.start, &vec![0; len_of(&(range.start..start))])?;
        self.write_at(end, &vec![0; len_of(&(end..range.end))])?;
        let _first = self.first();
        self.data.punch(start..end).map_err(trouble)?;
        self.map.mark(whole)
    }

    fn flush(&self) -> Result<()> {
        let _flushing = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        self.usable()?;
        let unsaved = self.map.unsaved();
        let synced = self.data.sync().map_err(trouble).and_then(|()| self.map.save(&unsaved));
        if synced.is_err() {
            self.lost.store(true, Ordering::Release);
        }
        synced
    }
}

/// Every block that has a byte in `range`.
fn blocks_touched(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK..range.end.div_ceil(BLOCK)
}

/// The length of a range that is in memory.
fn len_of(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).unwrap_or(usize::MAX)
}

fn push(extents: &mut Vec<Extent>, extent: Extent) {
    match extents.last_mut() {
        Some(last) if last.kind == extent.kind && last.change == extent.change => {
            last.range.end = extent.range.end;
        }
        _ => extents.push(extent),
    }
}

fn map_path(path: &Path) -> PathBuf {
    let mut name: OsString = path.into();
    name.push(".map");
    name.into()
}

fn open_file(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|error| Error::io(format!("cannot open {}", path.display()), error))
}

/// Gives `file` this length, and nothing but zeros.
fn resize(file: &File, len: u64) -> Result<()> {
    file.set_len(0)
        .and_then(|()| file.set_len(len))
        .map_err(|error| Error::io("cannot make a sparse file", error))
}

fn length(file: &File) -> Result<u64> {
    file.metadata()
        .map(|metadata| metadata.len())
        .map_err(|error| Error::io("cannot look at the length of a file", error))
}

fn sync_directory(path: &Path) -> Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| Error::io(format!("cannot sync {}", directory.display()), error))
}

/// The kernel's name for the time since it started; zeros where it has none, which no opening takes for its own.
fn this_boot() -> Boot {
    let name = std::fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    name.first_chunk().copied().unwrap_or([0; 36])
}

fn trouble(error: std::io::Error) -> Error {
    Error::io("the local image cannot be used", error)
}
