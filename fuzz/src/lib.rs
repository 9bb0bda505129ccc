//! What the fuzzers share: bytes as a disk, and a look at everything that a reader makes of them.

pub mod host;
pub mod peer;

use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{Blocks, Error, Extent, ExtentKind, Piece, Result};
use mainstay_diskimage::compose::extent;
use mainstay_diskimage::fs::{self, FileSystem, Node, Opened};
use mainstay_diskimage::volume::volumes;

/// What is read and asked about at most, in bytes.
const LOOK: u64 = 1 << 20;

/// Bytes in memory, with zeros behind them up to a length.
pub struct Disk {
    bytes: Vec<u8>,
    size: u64,
}

impl Disk {
    /// `size` is at least that of the bytes.
    pub fn new(bytes: Vec<u8>, size: u64) -> Self {
        let size = size.max(bytes.len() as u64);
        Self { bytes, size }
    }
}

impl Blocks for Disk {
    fn size(&self) -> u64 {
        self.size
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        assert!(range.start <= range.end && range.end <= self.size, "extents beyond the end: {range:?}");
        Ok(if range.is_empty() { Vec::new() } else { vec![extent(range, ExtentKind::Data)] })
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if offset.checked_add(buffer.len() as u64).is_none_or(|end| end > self.size) {
            return Err(Error::integrity("beyond the end"));
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(self.bytes.len());
        let there = (self.bytes.len() - start).min(buffer.len());
        buffer[..there].copy_from_slice(&self.bytes[start..start + there]);
        buffer[there..].fill(0);
        Ok(())
    }
}

/// Reads both ends of a device and its extents, which must cover what was asked for.
pub fn look(blocks: &dyn Blocks) {
    let size = blocks.size();
    for range in [0..size.min(LOOK), size.saturating_sub(LOOK)..size] {
        let mut buffer = vec![0; usize::try_from(range.end - range.start).unwrap_or(0)];
        let _damaged = blocks.read_at(range.start, &mut buffer);
        let Ok(extents) = blocks.extents(range.clone()) else { continue };
        let mut at = range.start;
        for extent in extents {
            assert!(extent.range.start == at && extent.range.end > at, "a gap at {at}");
            at = extent.range.end;
        }
        assert_eq!(at, range.end, "extents end early");
    }
}

/// Looks at all volumes of a disk.
pub fn look_at_volumes(disk: Disk) {
    let size = disk.size;
    let Ok(layout) = volumes(&[Arc::new(disk)], &|_| None) else { return };
    for volume in &layout.volumes {
        look(&*volume.blocks);
        let places = [volume.occupied(), volume.on_disk(0..LOOK)].concat();
        assert!(places.iter().all(|(disk, range)| *disk == 0 && range.end <= size));
    }
}

/// Asks the file system on a volume everything there is to ask, within limits.
pub fn look_at_file_system(disk: Disk) {
    let size = disk.size;
    let Ok(Opened::FileSystem(file_system)) = fs::open(Arc::new(disk)) else { return };
    let mut seen = std::collections::HashSet::new();
    let mut waiting = vec![file_system.root()];
    while let Some(node) = waiting.pop().filter(|_| seen.len() < 64) {
        if seen.insert(node) {
            let _damaged = file_system.metadata(node);
            let _damaged = file_system.extents(node);
            read_some(&*file_system, node);
            let page = file_system.read_dir(node, 0, 32).unwrap_or_default();
            waiting.extend(page.entries.into_iter().map(|entry| entry.node));
        }
    }
    let _damaged = file_system.free(&mut |range| {
        assert!(range.start < range.end && range.end <= size, "free space beyond the end: {range:?}");
        Ok(())
    });
    let mut left = 1000;
    let _damaged = file_system.files(&mut |_, _| {
        left -= 1;
        if left > 0 { Ok(()) } else { Err(Error::integrity("enough")) }
    });
}

fn read_some(file_system: &dyn FileSystem, node: Node) {
    let Ok(content) = file_system.content(node) else { return };
    let mut buffer = vec![0; 4096];
    let mut offset = 0;
    for _ in 0..16 {
        match content.read(offset, &mut buffer) {
            Ok(Piece::Data(length)) => offset += length as u64,
            Ok(Piece::Hole(length)) => offset += length,
            Ok(Piece::End) | Err(_) => return,
        }
        assert!(offset <= content.size(), "more than the size");
    }
}

/// CRC-32 from this start, without the last inversion.
pub fn crc32(start: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(start, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (0xEDB8_8320 & 0u32.wrapping_sub(sum & 1)))
    })
}

/// Writes `patch` at `at`, lengthening the bytes if need be.
pub fn put(bytes: &mut Vec<u8>, at: usize, patch: &[u8]) {
    bytes.resize(bytes.len().max(at + patch.len()), 0);
    bytes[at..at + patch.len()].copy_from_slice(patch);
}
