//! What the bitmaps say: space that nobody uses, and inodes that are in use.

use std::ops::Range;

use mainstay_core::{Kind, Result};

use super::superblock::ro_compat;
use super::{Group, Inode, Visitor, Volume, node};

/// Flags of groups whose bitmaps were never written.
const INODES_NEW: u16 = 0x1;
const BLOCKS_NEW: u16 = 0x2;

/// Extents handed to a visitor at once.
const BATCH: usize = 1024;

/// Bytes of inode tables read at once.
const TABLE_PART: usize = 128 << 10;

impl Volume {
    /// Ascending ranges of bytes that are free. A group whose numbers contradict each other says nothing.
    pub(super) fn free(&self, visit: &mut dyn FnMut(Range<u64>) -> Result<()>) -> Result<()> {
        let size = self.block_size();
        let mut waiting: Option<Range<u64>> = None;
        for number in 0..self.superblock.groups() as u32 {
            for range in self.free_of_group(number).unwrap_or_default() {
                let range = range.start * size..range.end * size;
                match &mut waiting {
                    Some(last) if last.end == range.start => last.end = range.end,
                    last => {
                        if let Some(done) = last.replace(range) {
                            visit(done)?;
                        }
                    }
                }
            }
        }
        waiting.map_or(Ok(()), visit)
    }

    /// Free ranges of blocks.
    fn free_of_group(&self, number: u32) -> Result<Vec<Range<u64>>> {
        let group = self.group(number)?;
        let start = self.superblock.group_start(u64::from(number));
        let end = (start + u64::from(self.superblock.blocks_per_group)).min(self.superblock.blocks);
        let used = if self.never_written(&group, BLOCKS_NEW) {
            self.implied_bitmap(number, &group, start..end)
        } else {
            self.block(group.block_bitmap)?
        };
        let shift = self.superblock.cluster_shift;
        let clusters = (end - start).div_ceil(1 << shift);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        let mut free = 0;
        for cluster in 0..clusters {
            if bit(&used, cluster) {
                continue;
            }
            free += 1;
            let first = start + (cluster << shift);
            let last = (first + (1 << shift)).min(end);
            match ranges.last_mut() {
                Some(range) if range.end == first => range.end = last,
                _ => ranges.push(first..last),
            }
        }
        Ok(if free == u64::from(group.free_clusters) { ranges } else { Vec::new() })
    }

    /// The bitmap that a group without a written one would have: only its own metadata is used.
    fn implied_bitmap(&self, number: u32, group: &Group, blocks: Range<u64>) -> Vec<u8> {
        let superblock = &self.superblock;
        let mut bitmap = vec![0; self.block_size() as usize];
        let table = u64::from(superblock.inodes_per_group) * u64::from(superblock.inode_size);
        let table = table.div_ceil(self.block_size());
        let head = superblock.head_blocks(u64::from(number));
        let used = [
            blocks.start..blocks.start + head,
            group.block_bitmap..group.block_bitmap.saturating_add(1),
            group.inode_bitmap..group.inode_bitmap.saturating_add(1),
            group.inode_table..group.inode_table.saturating_add(table),
        ];
        for range in used {
            for block in range.start.max(blocks.start)..range.end.min(blocks.end) {
                let cluster = (block - blocks.start) >> superblock.cluster_shift;
                if let Some(byte) = bitmap.get_mut((cluster / 8) as usize) {
                    *byte |= 1 << (cluster % 8);
                }
            }
        }
        bitmap
    }

    fn never_written(&self, group: &Group, flag: u16) -> bool {
        let counted = ro_compat::GDT_CHECKSUM | ro_compat::METADATA_CHECKSUM;
        self.superblock.ro_compat & counted != 0 && group.flags & flag != 0
    }

    /// Every regular file, group by group. What is damaged is passed over.
    pub(super) fn files(&self, visit: &mut Visitor<'_>) -> Result<()> {
        for number in 0..self.superblock.groups() as u32 {
            if let Ok(group) = self.group(number) {
                self.files_of_group(number, &group, visit)?;
            }
        }
        Ok(())
    }

    fn files_of_group(&self, number: u32, group: &Group, visit: &mut Visitor<'_>) -> Result<()> {
        let superblock = &self.superblock;
        let (Ok(table), Ok(bitmap)) = (group.table_offset(superblock), self.block(group.inode_bitmap)) else {
            return Ok(());
        };
        if self.never_written(group, INODES_NEW) {
            return Ok(());
        }
        let size = usize::from(superblock.inode_size);
        let per_part = TABLE_PART / size;
        let used = superblock.inodes_per_group.saturating_sub(group.unused_inodes) as usize;
        let mut part = vec![0; TABLE_PART];
        for first in (0..used).step_by(per_part) {
            let count = per_part.min(used - first);
            if !(first..first + count).any(|index| bit(&bitmap, index as u64)) {
                continue;
            }
            let bytes = &mut part[..count * size];
            if self.read(table + (first * size) as u64, bytes).is_err() {
                continue;
            }
            for (within, raw) in bytes.chunks_exact(size).enumerate() {
                let index = first + within;
                let inode = number.checked_mul(superblock.inodes_per_group);
                let inode = inode.and_then(|base| base.checked_add(index as u32 + 1));
                if let Some(inode) = inode.filter(|_| bit(&bitmap, index as u64)) {
                    self.visit_file(inode, raw, visit)?;
                }
            }
        }
        Ok(())
    }

    fn visit_file(&self, number: u32, raw: &[u8], visit: &mut Visitor<'_>) -> Result<()> {
        let Ok(inode) = Inode::parse(&self.superblock, number, raw.to_vec()) else { return Ok(()) };
        let own = self.superblock.is_own_inode(number) || inode.is_xattr_value();
        if own || inode.links == 0 || inode.kind().ok() != Some(Kind::File) {
            return Ok(());
        }
        let mut batch = Vec::new();
        let mut stopped = None;
        let walked = self.for_each_extent(&inode, &mut |extent| {
            batch.push(extent);
            if batch.len() == BATCH {
                let result = visit(node(number), &batch);
                batch.clear();
                return result.inspect_err(|error| stopped = Some(error.code()));
            }
            Ok(())
        });
        match walked {
            Err(error) if stopped.is_some() => return Err(error),
            // A map that is damaged further on says nothing reliable about its start either.
            Err(_) => return Ok(()),
            Ok(()) => {}
        }
        if batch.is_empty() { Ok(()) } else { visit(node(number), &batch) }
    }
}

fn bit(bitmap: &[u8], index: u64) -> bool {
    let byte = usize::try_from(index / 8).ok().and_then(|byte| bitmap.get(byte));
    byte.is_none_or(|byte| byte >> (index % 8) & 1 == 1)
}
