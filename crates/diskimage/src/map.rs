//! Where the content of files lies on disks, so that images are cut as files are; what is free and what is swap.
//!
//! All of it is a hint: a map that is wrong costs room in the repository and never a byte of the image. So whatever
//! cannot be understood is left out, and said in a note.

mod runs;

use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{Blocks, Extent, Result, Run};

use crate::compose::check_range;
use crate::fs::{FileExtent, FileSystem, Node, Opened, Other};
use crate::volume::{Encryption, Volume};
use runs::{Runs, RunsBuilder};

/// Bytes at the start of swap space that say what it is; they stay, or the machine would miss its swap.
const SWAP_HEADER: u64 = 64 << 10;

/// Ranges of free space that one disk remembers; when there are more, the shortest are forgotten.
const RANGES_MAX: usize = 1 << 19;

/// The shortest range that is worth remembering, in bytes.
const RANGE_MIN: u64 = 64 << 10;

/// How a volume is opened: [`crate::fs::open`], or the same in a sandbox.
pub type Opener<'a> = &'a dyn Fn(Arc<dyn Blocks>) -> Result<Opened>;

/// The maps of the disks of one machine.
pub struct CutMap {
    disks: Vec<Arc<DiskMap>>,
    /// What was left out and why, each a sentence.
    pub notes: Vec<String>,
}

impl CutMap {
    /// Maps `disks` disks from the volumes that lie on them. Memory stays below about 64 MiB however many files there
    /// are: what is more waits in a temporary file.
    pub fn of(volumes: &[Volume], disks: usize, open: Opener<'_>) -> Self {
        let mut building =
            Building { disks: (0..disks).map(|_| DiskBuilder::new(disks)).collect(), notes: Vec::new() };
        for (number, volume) in volumes.iter().enumerate() {
            if let Err(error) = building.add(number, volume, open) {
                building.notes.push(format!("{}: {}", volume.name, error.chain().join(": ")));
            }
        }
        let Building { disks, mut notes } = building;
        let disks = disks.into_iter().map(|disk| Arc::new(disk.finish(&mut notes))).collect();
        Self { disks, notes }
    }

    /// The map of the disk of that number.
    pub fn disk(&self, number: usize) -> Option<Arc<DiskMap>> {
        self.disks.get(number).cloned()
    }
}

/// The map of one disk.
pub struct DiskMap {
    runs: Runs,
    free: Vec<Range<u64>>,
    swap: Vec<Range<u64>>,
}

impl DiskMap {
    /// The runs of files that touch `range`, clipped to it, ascending and apart.
    pub fn cuts(&self, range: Range<u64>) -> Result<Vec<Run>> {
        self.runs.within(range)
    }

    /// How many runs there are.
    pub fn len(&self) -> u64 {
        self.runs.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that no file system uses, ascending and apart. Short ranges are left out.
    pub fn free(&self) -> &[Range<u64>] {
        &self.free
    }

    /// Bytes that hold swapped memory, without what makes it swap space, ascending and apart.
    pub fn swap(&self) -> &[Range<u64>] {
        &self.swap
    }
}

/// A disk that knows where its files are.
pub struct Mapped {
    base: Arc<dyn Blocks>,
    map: Arc<DiskMap>,
}

impl Mapped {
    pub fn new(base: Arc<dyn Blocks>, map: Arc<DiskMap>) -> Self {
        Self { base, map }
    }
}

impl Blocks for Mapped {
    fn size(&self) -> u64 {
        self.base.size()
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        self.base.extents(range)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.base.read_at(offset, buffer)
    }

    fn cuts(&self, range: Range<u64>) -> Result<Vec<Run>> {
        check_range(self, &range)?;
        self.map.cuts(range)
    }
}

struct Building {
    disks: Vec<DiskBuilder>,
    notes: Vec<String>,
}

struct DiskBuilder {
    runs: RunsBuilder,
    free: Ranges,
    swap: Ranges,
    /// What the volumes span that say what is free.
    claimed: Vec<Range<u64>>,
}

impl DiskBuilder {
    fn new(disks: usize) -> Self {
        Self {
            runs: RunsBuilder::new(disks),
            free: Ranges::default(),
            swap: Ranges::default(),
            claimed: Vec::new(),
        }
    }

    fn finish(mut self, notes: &mut Vec<String>) -> DiskMap {
        self.claimed.sort_unstable_by_key(|range| range.start);
        if self.claimed.windows(2).any(|pair| pair[0].end > pair[1].start) {
            notes.push("volumes overlap on a disk, so none of it counts as free".to_owned());
            (self.free, self.swap) = (Ranges::default(), Ranges::default());
        }
        let runs = self.runs.finish().unwrap_or_else(|error| {
            notes.push(format!("the places of files are not known: {}", error.chain().join(": ")));
            Runs::default()
        });
        DiskMap { runs, free: self.free.finish(), swap: self.swap.finish() }
    }
}

impl Building {
    fn add(&mut self, number: usize, volume: &Volume, open: Opener<'_>) -> Result<()> {
        match open(Arc::clone(&volume.blocks))? {
            Opened::FileSystem(file_system) => {
                self.claim(volume);
                let freed = file_system.free(&mut |range| {
                    self.put_ranges(volume, range, |disk| &mut disk.free);
                    Ok(())
                });
                if let Err(error) = freed {
                    self.notes.push(format!("{}: {}", volume.name, error.chain().join(": ")));
                }
                // Encrypted, equal content differs from place to place: cutting it would find nothing twice.
                if volume.encryption == Encryption::None {
                    self.files(number, volume, &*file_system)
                } else {
                    Ok(())
                }
            }
            Opened::Other(Other::Swap) => {
                self.claim(volume);
                self.put_ranges(volume, SWAP_HEADER..volume.blocks.size(), |disk| &mut disk.swap);
                Ok(())
            }
            Opened::Other(_) => Ok(()),
        }
    }

    fn claim(&mut self, volume: &Volume) {
        for (disk, range) in volume.occupied() {
            if let Some(disk) = self.disks.get_mut(disk) {
                disk.claimed.push(range);
            }
        }
    }

    fn files(&mut self, number: usize, volume: &Volume, file_system: &dyn FileSystem) -> Result<()> {
        // Files may share extents, but not without end.
        let mut left = volume.blocks.size() / 512;
        file_system.files(&mut |node, extents| {
            let file = file_name(number, node);
            for extent in extents {
                let Some(rest) = left.checked_sub(1) else { return Ok(()) };
                left = rest;
                self.put_extent(volume, file, extent)?;
            }
            Ok(())
        })
    }

    fn put_extent(&mut self, volume: &Volume, file: u64, extent: &FileExtent) -> Result<()> {
        let Some(end) = extent.volume_offset.checked_add(extent.length) else { return Ok(()) };
        let places = volume.on_disk(extent.volume_offset..end);
        let there: u64 = places.iter().map(|(_, range)| range.end - range.start).sum();
        // With a part on a disk that is not there, the places of the others in the file are not known.
        if there != extent.length {
            return Ok(());
        }
        let mut file_offset = extent.file_offset;
        for (disk, image) in places {
            let length = image.end - image.start;
            if let Some(disk) = self.disks.get_mut(disk) {
                disk.runs.put(Run { image, file, file_offset })?;
            }
            file_offset = file_offset.saturating_add(length);
        }
        Ok(())
    }

    fn put_ranges(&mut self, volume: &Volume, range: Range<u64>, of: fn(&mut DiskBuilder) -> &mut Ranges) {
        if range.is_empty() {
            return;
        }
        volume.each_on_disk(range, &mut |disk, range| {
            if let Some(disk) = self.disks.get_mut(disk) {
                of(disk).put(range);
            }
        });
    }
}

/// A number that differs between files that could lie beside each other.
fn file_name(volume: usize, node: Node) -> u64 {
    (volume as u64).rotate_right(8) ^ node.space.rotate_right(24) ^ node.number
}

/// Ranges of bytes, as many as are worth their memory.
struct Ranges {
    ranges: Vec<Range<u64>>,
    shortest: u64,
}

impl Default for Ranges {
    fn default() -> Self {
        Self { ranges: Vec::new(), shortest: RANGE_MIN }
    }
}

impl Ranges {
    fn put(&mut self, range: Range<u64>) {
        if range.end - range.start < self.shortest {
            return;
        }
        self.ranges.push(range);
        while self.ranges.len() > RANGES_MAX {
            self.shortest *= 2;
            self.ranges.retain(|range| range.end - range.start >= self.shortest);
        }
    }

    fn finish(mut self) -> Vec<Range<u64>> {
        self.ranges.sort_unstable_by_key(|range| range.start);
        let mut joined: Vec<Range<u64>> = Vec::with_capacity(self.ranges.len());
        for range in self.ranges {
            match joined.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => joined.push(range),
            }
        }
        joined
    }
}
