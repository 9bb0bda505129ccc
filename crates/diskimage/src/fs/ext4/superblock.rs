//! The superblock: sizes, features, and where the group descriptors are.

use mainstay_core::{Code, Error, Result};

use crate::fs::bytes::{Bytes as _, crc32c, until_nul};

/// Features without which the layout is not understood (`s_feature_incompat`).
pub(super) mod incompat {
    pub(in super::super) const FILETYPE: u32 = 0x2;
    pub(in super::super) const RECOVER: u32 = 0x4;
    pub(in super::super) const JOURNAL_DEVICE: u32 = 0x8;
    pub(in super::super) const META_BG: u32 = 0x10;
    pub(in super::super) const EXTENTS: u32 = 0x40;
    pub(in super::super) const BITS_64: u32 = 0x80;
    pub(in super::super) const MMP: u32 = 0x100;
    pub(in super::super) const FLEX_BG: u32 = 0x200;
    pub(in super::super) const EA_INODE: u32 = 0x400;
    pub(in super::super) const CHECKSUM_SEED: u32 = 0x2000;
    pub(in super::super) const LARGE_DIR: u32 = 0x4000;
    pub(in super::super) const INLINE_DATA: u32 = 0x8000;
    pub(in super::super) const ENCRYPT: u32 = 0x1_0000;
    pub(in super::super) const CASEFOLD: u32 = 0x2_0000;

    pub(super) const KNOWN: u32 = FILETYPE
        | RECOVER
        | META_BG
        | EXTENTS
        | BITS_64
        | MMP
        | FLEX_BG
        | EA_INODE
        | CHECKSUM_SEED
        | LARGE_DIR
        | INLINE_DATA
        | ENCRYPT
        | CASEFOLD;
}

/// Features that a reader may lack (`s_feature_ro_compat`).
pub(super) mod ro_compat {
    pub(in super::super) const SPARSE_SUPER: u32 = 0x1;
    pub(in super::super) const GDT_CHECKSUM: u32 = 0x10;
    pub(in super::super) const BIGALLOC: u32 = 0x200;
    pub(in super::super) const METADATA_CHECKSUM: u32 = 0x400;
}

mod compat {
    pub(super) const HAS_JOURNAL: u32 = 0x4;
    pub(super) const SPARSE_SUPER2: u32 = 0x200;
}

#[derive(Clone, Debug)]
pub(super) struct Superblock {
    pub(super) block_shift: u32,
    /// Blocks per cluster, as a power of two: the unit of the block bitmap.
    pub(super) cluster_shift: u32,
    pub(super) blocks: u64,
    pub(super) first_block: u64,
    pub(super) blocks_per_group: u32,
    pub(super) inodes: u32,
    pub(super) inodes_per_group: u32,
    pub(super) inode_size: u16,
    pub(super) descriptor_size: usize,
    reserved_descriptor_blocks: u64,
    first_meta_group: u32,
    backup_groups: [u32; 2],
    compat: u32,
    pub(super) incompat: u32,
    pub(super) ro_compat: u32,
    /// Set when metadata carries CRC-32C checksums.
    pub(super) checksum_seed: Option<u32>,
    pub(super) journal_inode: u32,
    /// Own inodes that have no fixed number; 0 for none.
    own_inodes: [u32; 2],
    pub(super) uuid: [u8; 16],
    pub(super) label: Vec<u8>,
}

impl Superblock {
    /// From its 1024 bytes, on a volume of `volume_size` bytes.
    pub(super) fn parse(raw: &[u8], volume_size: u64) -> Result<Self> {
        let damaged = |why: &str| Error::integrity(format!("the ext4 superblock is damaged: {why}"));
        if raw.le16(0x38)? != 0xef53 {
            return Err(damaged("its magic number is missing"));
        }
        let (compat, incompat, ro_compat) = (raw.le32(0x5c)?, raw.le32(0x60)?, raw.le32(0x64)?);
        check_features(incompat)?;
        let checksums = ro_compat & ro_compat::METADATA_CHECKSUM != 0;
        if checksums && crc32c(!0, raw.part(0, 0x3fc)?) != raw.le32(0x3fc)? {
            return Err(damaged("its checksum is wrong"));
        }
        let uuid = raw.field(0x68)?;
        let seed = if incompat & incompat::CHECKSUM_SEED != 0 { raw.le32(0x270)? } else { crc32c(!0, &uuid) };
        let dynamic = raw.le32(0x4c)? > 0;
        let wide = incompat & incompat::BITS_64 != 0;
        let block_shift = raw.le32(0x18)?;
        let bigalloc = ro_compat & ro_compat::BIGALLOC != 0;
        let cluster_shift = if bigalloc { raw.le32(0x1c)?.checked_sub(block_shift) } else { Some(0) };
        let high = if wide { raw.le32(0x150)? } else { 0 };
        let superblock = Self {
            block_shift: block_shift.saturating_add(10),
            cluster_shift: cluster_shift
                .ok_or_else(|| damaged("its clusters are smaller than its blocks"))?,
            blocks: u64::from(high) << 32 | u64::from(raw.le32(0x4)?),
            first_block: u64::from(raw.le32(0x14)?),
            blocks_per_group: raw.le32(0x20)?,
            inodes: raw.le32(0)?,
            inodes_per_group: raw.le32(0x28)?,
            inode_size: if dynamic { raw.le16(0x58)? } else { 128 },
            descriptor_size: if wide { usize::from(raw.le16(0xfe)?) } else { 32 },
            reserved_descriptor_blocks: u64::from(raw.le16(0xce)?),
            first_meta_group: raw.le32(0x104)?,
            backup_groups: [raw.le32(0x24c)?, raw.le32(0x250)?],
            compat,
            incompat,
            ro_compat,
            checksum_seed: checksums.then_some(seed),
            journal_inode: raw.le32(0xe0)?,
            own_inodes: [raw.le32(0x26c)?, raw.le32(0x280)?],
            uuid,
            label: until_nul(raw.part(0x78, 16)?).to_vec(),
        };
        superblock.check(volume_size)?;
        Ok(superblock)
    }

    /// Refuses numbers that do not fit each other, so that arithmetic on them is safe everywhere else.
    fn check(&self, volume_size: u64) -> Result<()> {
        let damaged = |why: &str| Err(Error::integrity(format!("the ext4 superblock is damaged: {why}")));
        if self.block_shift > 16 || self.cluster_shift > 20 {
            return damaged("its block size is impossible");
        }
        let block = self.block_size();
        let bits = block * 8;
        if self.blocks_per_group == 0 || u64::from(self.blocks_per_group) > bits << self.cluster_shift {
            return damaged("its number of blocks per group is impossible");
        }
        if self.inodes_per_group == 0 || u64::from(self.inodes_per_group) > bits {
            return damaged("its number of inodes per group is impossible");
        }
        let inode = u64::from(self.inode_size);
        if !inode.is_power_of_two() || inode < 128 || inode > block {
            return damaged("its inode size is impossible");
        }
        let descriptor = self.descriptor_size as u64;
        if !descriptor.is_power_of_two() || descriptor < 32 || descriptor > block.min(1024) {
            return damaged("its group descriptors have an impossible size");
        }
        if self.first_block > 1 || self.blocks <= self.first_block {
            return damaged("it has no blocks");
        }
        if self.blocks.checked_mul(block).is_none_or(|size| size > volume_size) {
            let what = format!(
                "the ext4 file system has {} blocks of {block} bytes, more than its volume of {volume_size} bytes",
                self.blocks
            );
            return Err(Error::integrity(what).hint("the image may have been cut short"));
        }
        if u64::from(self.inodes) > self.groups() * u64::from(self.inodes_per_group) {
            return damaged("it has more inodes than its groups hold");
        }
        Ok(())
    }

    pub(super) fn block_size(&self) -> u64 {
        1 << self.block_shift
    }

    /// The block that holds this superblock.
    fn own_block(&self) -> u64 {
        1024 >> self.block_shift
    }

    pub(super) fn groups(&self) -> u64 {
        (self.blocks - self.first_block).div_ceil(u64::from(self.blocks_per_group))
    }

    pub(super) fn has_journal(&self) -> bool {
        self.compat & compat::HAS_JOURNAL != 0
    }

    /// Whether an inode belongs to the file system itself: its journal, its quotas, its list of orphans.
    pub(super) fn is_own_inode(&self, number: u32) -> bool {
        const FIRST_ORDINARY: u32 = 11;
        number < FIRST_ORDINARY || self.own_inodes.contains(&number)
    }

    pub(super) fn group_start(&self, group: u64) -> u64 {
        self.first_block + group * u64::from(self.blocks_per_group)
    }

    /// Block and offset within it of a group's descriptor.
    pub(super) fn descriptor_place(&self, group: u32) -> Result<(u64, u64)> {
        if u64::from(group) >= self.groups() {
            return Err(Error::integrity(format!("there is no block group {group}")));
        }
        let size = self.descriptor_size as u64;
        let per_block = self.block_size() / size;
        let index = u64::from(group) / per_block;
        let offset = u64::from(group) % per_block * size;
        let block = if self.in_meta_group(index) {
            let first = index * per_block;
            // With clusters of blocks of 1 KiB, groups are counted from block 0, but the superblock is block 1.
            let late = self.first_block < self.own_block() && index == 0;
            self.group_start(first) + u64::from(self.has_superblock(first)) + u64::from(late)
        } else {
            self.own_block() + 1 + index
        };
        Ok((block, offset))
    }

    /// Whether the block of descriptors of that index lies in the groups that it describes.
    fn in_meta_group(&self, index: u64) -> bool {
        self.incompat & incompat::META_BG != 0 && index >= u64::from(self.first_meta_group)
    }

    /// Whether a group begins with a copy of the superblock.
    fn has_superblock(&self, group: u64) -> bool {
        if group == 0 {
            return true;
        }
        if self.compat & compat::SPARSE_SUPER2 != 0 {
            return self.backup_groups.iter().any(|&backup| u64::from(backup) == group);
        }
        let power_of = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        let sparse = self.ro_compat & ro_compat::SPARSE_SUPER != 0;
        !sparse || group == 1 || power_of(3) || power_of(5) || power_of(7)
    }

    /// Blocks at the start of a group that hold copies of the superblock and of descriptors.
    pub(super) fn head_blocks(&self, group: u64) -> u64 {
        let copy = u64::from(self.has_superblock(group));
        let per_block = self.block_size() / self.descriptor_size as u64;
        let index = group / per_block;
        if self.in_meta_group(index) {
            let within = group % per_block;
            return copy + u64::from(matches!(within, 0 | 1) || within == per_block - 1);
        }
        let mut descriptors = self.groups().div_ceil(per_block);
        if self.incompat & incompat::META_BG != 0 {
            descriptors = descriptors.min(u64::from(self.first_meta_group));
        }
        if copy == 1 { 1 + descriptors + self.reserved_descriptor_blocks } else { 0 }
    }
}

fn check_features(incompat: u32) -> Result<()> {
    if incompat & incompat::JOURNAL_DEVICE != 0 {
        let what = "this is the journal of an ext4 file system that lies on another device";
        return Err(Error::new(Code::Unsupported, what));
    }
    let unknown = incompat & !incompat::KNOWN;
    if unknown != 0 {
        let what = format!("the ext4 file system uses features that are not known here ({unknown:#x})");
        return Err(Error::new(Code::Unsupported, what));
    }
    Ok(())
}
