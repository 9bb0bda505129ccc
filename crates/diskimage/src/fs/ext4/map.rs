//! Where the blocks of a file are: trees of extents, and the older lists of indirect blocks.

use mainstay_core::{Error, Result};

use super::inode::Inode;
use super::{FileExtent, Volume};
use crate::fs::bytes::{Bytes as _, crc32c};

/// The deepest tree that the format allows (`EXT4_MAX_EXTENT_DEPTH`).
const DEPTH_MAX: u16 = 5;

/// Blocks beyond which no file reaches.
const BLOCKS_MAX: u64 = 1 << 32;

/// A stretch of blocks of a file, from the one that was asked for on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    /// At least 1.
    pub(super) blocks: u64,
    /// The first block on the volume; `None` for a hole and for space that was never written.
    pub(super) start: Option<u64>,
}

/// Finds blocks of one file. Remembers the last leaf, since the next question is mostly about what follows.
pub(super) struct Mapper {
    leaf: Option<Leaf>,
}

/// The extents of one leaf, which decides about the logical blocks of `from..until`.
struct Leaf {
    from: u64,
    until: u64,
    extents: Vec<Extent>,
}

#[derive(Clone, Copy)]
struct Extent {
    logical: u64,
    blocks: u64,
    start: Option<u64>,
}

impl Mapper {
    pub(super) fn new() -> Self {
        Self { leaf: None }
    }

    /// What lies at a logical block of the file.
    pub(super) fn at(&mut self, volume: &Volume, inode: &Inode, logical: u64) -> Result<Stretch> {
        if logical >= BLOCKS_MAX {
            return Ok(Stretch { blocks: u64::MAX - logical, start: None });
        }
        if !inode.has_extents() {
            return indirect(volume, inode, logical);
        }
        let stretch = match &self.leaf {
            Some(leaf) if (leaf.from..leaf.until).contains(&logical) => leaf.at(logical),
            _ => {
                let leaf = volume.leaf(inode, logical)?;
                let stretch = leaf.at(logical);
                self.leaf = Some(leaf);
                stretch
            }
        };
        Ok(stretch)
    }
}

impl Leaf {
    fn at(&self, logical: u64) -> Stretch {
        let next = self.extents.partition_point(|extent| extent.logical <= logical);
        if let Some(extent) = next.checked_sub(1).and_then(|index| self.extents.get(index))
            && logical < extent.logical + extent.blocks
        {
            let skipped = logical - extent.logical;
            let start = extent.start.map(|start| start + skipped);
            return Stretch { blocks: extent.blocks - skipped, start };
        }
        let end = self.extents.get(next).map_or(self.until, |extent| extent.logical);
        Stretch { blocks: end - logical, start: None }
    }
}

impl Volume {
    /// The leaf that decides about a logical block.
    fn leaf(&self, inode: &Inode, logical: u64) -> Result<Leaf> {
        let damaged =
            |why: &str| Error::integrity(format!("the extents of inode {} are damaged: {why}", inode.number));
        let (mut from, mut until) = (0, BLOCKS_MAX);
        let mut node = inode.map_bytes().to_vec();
        let mut depth = node.le16(6)?;
        if depth > DEPTH_MAX {
            return Err(damaged("the tree is too deep"));
        }
        let mut is_root = true;
        loop {
            let entries =
                check_node(&node, depth).map_err(|error| damaged("a node is malformed").because(error))?;
            let first = |index: usize| node.le32(12 + 12 * index).map(u64::from);
            // The index above a node says where the node begins; so no node can stand in two places.
            if !is_root && entries > 0 && first(0)? != from {
                return Err(damaged("a node does not begin where its index says"));
            }
            if depth == 0 {
                let extents = self.leaf_extents(&node, entries, until);
                let extents = extents.map_err(|error| damaged("an extent is impossible").because(error))?;
                return Ok(Leaf { from, until, extents });
            }
            let mut chosen = None;
            for index in 0..entries {
                let start = first(index)?;
                if start > logical {
                    until = until.min(start);
                    break;
                }
                chosen = Some((index, start));
            }
            let Some((index, start)) = chosen else {
                return Ok(Leaf { from, until, extents: Vec::new() });
            };
            let at = 12 + 12 * index;
            let child = u64::from(node.le16(at + 8)?) << 32 | u64::from(node.le32(at + 4)?);
            (from, depth, is_root) = (start, depth - 1, false);
            node = self.block(child)?;
            self.check_extent_block(&node, inode, child)?;
        }
    }

    /// The extents of a leaf: ascending, apart, below `until`, and on the volume.
    fn leaf_extents(&self, node: &[u8], entries: usize, until: u64) -> Result<Vec<Extent>> {
        /// Lengths above this stand for space that was given out but never written.
        const WRITTEN_MAX: u64 = 32768;
        let mut extents = Vec::with_capacity(entries);
        let mut end = 0;
        for index in 0..entries {
            let at = 12 + 12 * index;
            let logical = u64::from(node.le32(at)?);
            let length = u64::from(node.le16(at + 4)?);
            let start = u64::from(node.le16(at + 6)?) << 32 | u64::from(node.le32(at + 8)?);
            let (blocks, written) =
                if length <= WRITTEN_MAX { (length, true) } else { (length - WRITTEN_MAX, false) };
            let in_order = blocks > 0 && logical >= end && logical + blocks <= until;
            if !in_order || start <= self.superblock.first_block || start + blocks > self.superblock.blocks {
                return Err(Error::integrity(format!("{blocks} blocks of the file at block {start}")));
            }
            end = logical + blocks;
            extents.push(Extent { logical, blocks, start: written.then_some(start) });
        }
        Ok(extents)
    }

    fn check_extent_block(&self, node: &[u8], inode: &Inode, block: u64) -> Result<()> {
        let Some(seed) = inode.checksum_seed else { return Ok(()) };
        let tail = 12 + 12 * usize::from(node.le16(4)?);
        if crc32c(seed, node.part(0, tail)?) != node.le32(tail)? {
            let what = format!("block {block} of the extents of inode {} is damaged", inode.number);
            return Err(Error::integrity(what));
        }
        Ok(())
    }

    /// Calls `visit` for each stretch of the file's content on the volume, ascending.
    pub(super) fn for_each_extent(
        &self,
        inode: &Inode,
        visit: &mut dyn FnMut(FileExtent) -> Result<()>,
    ) -> Result<()> {
        if inode.is_inline() {
            return Ok(());
        }
        let size = self.block_size();
        let blocks = inode.size.div_ceil(size).min(BLOCKS_MAX);
        let mut mapper = Mapper::new();
        let mut left = self.superblock.blocks;
        let mut logical = 0;
        while logical < blocks {
            let stretch = mapper.at(self, inode, logical)?;
            if let Some(start) = stretch.start {
                // Each block has one owner, so a file that has more than there are was made by hand.
                left = left.checked_sub(stretch.blocks).ok_or_else(|| {
                    Error::integrity(format!("inode {} has more blocks than its volume", inode.number))
                })?;
                let file_offset = logical * size;
                let length = (stretch.blocks * size).min(inode.size - file_offset);
                visit(FileExtent { file_offset, volume_offset: start * size, length })?;
            }
            logical += stretch.blocks;
        }
        Ok(())
    }
}

/// The number of entries of a node of the tree, after checking its header.
fn check_node(node: &[u8], depth: u16) -> Result<usize> {
    let (magic, entries, room) = (node.le16(0)?, node.le16(2)?, node.le16(4)?);
    let fits = (node.len() - 12) / 12;
    if magic != 0xf30a || node.le16(6)? != depth || entries > room || usize::from(room) > fits {
        return Err(Error::integrity("the header does not fit"));
    }
    Ok(usize::from(entries))
}

/// The map of ext2 and ext3: twelve blocks, then one, two and three levels of blocks of block numbers.
fn indirect(volume: &Volume, inode: &Inode, logical: u64) -> Result<Stretch> {
    const DIRECT: u64 = 12;
    let map = inode.map_bytes();
    let shift = volume.superblock.block_shift - 2;
    let per_block = 1u64 << shift;
    if logical < DIRECT {
        return run(volume, inode, map.part(0, 48)?, logical, DIRECT);
    }
    let mut within = logical - DIRECT;
    for level in 1..=3u32 {
        let span = 1u64 << (shift * level);
        if within >= span {
            within -= span;
            continue;
        }
        let mut pointer = map.le32(44 + 4 * level as usize)?;
        let mut covered = span;
        for below in (0..level).rev() {
            if pointer == 0 {
                return Ok(Stretch { blocks: covered - within % covered, start: None });
            }
            let block = volume.block(u64::from(pointer))?;
            covered = 1u64 << (shift * below);
            let index = (within >> (shift * below)) % per_block;
            if below == 0 {
                return run(volume, inode, &block, index, per_block);
            }
            pointer = block.le32(4 * index as usize)?;
        }
    }
    Ok(Stretch { blocks: BLOCKS_MAX.saturating_sub(logical).max(1), start: None })
}

/// The blocks that follow each other from `index` on in a list of `count` block numbers.
fn run(volume: &Volume, inode: &Inode, list: &[u8], index: u64, count: u64) -> Result<Stretch> {
    let number = |index: u64| list.le32(4 * index as usize).map(u64::from);
    let first = number(index)?;
    let mut blocks = 1;
    while index + blocks < count {
        let expected = if first == 0 { 0 } else { first + blocks };
        if number(index + blocks)? != expected {
            break;
        }
        blocks += 1;
    }
    if first + blocks > volume.superblock.blocks {
        let what = format!("inode {} points beyond the end of its file system", inode.number);
        return Err(Error::integrity(what));
    }
    Ok(Stretch { blocks, start: (first != 0).then_some(first) })
}
