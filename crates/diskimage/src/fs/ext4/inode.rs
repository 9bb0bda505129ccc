//! Inodes.

use mainstay_core::{Code, Error, Kind, Result, Time};

use super::superblock::Superblock;
use crate::fs::bytes::{Bytes as _, crc32c};

mod flags {
    pub(super) const COMPRESSED: u32 = 0x4;
    pub(super) const ENCRYPTED: u32 = 0x800;
    pub(super) const EXTENTS: u32 = 0x8_0000;
    pub(super) const XATTR_VALUE: u32 = 0x20_0000;
    pub(super) const INLINE_DATA: u32 = 0x1000_0000;
}

/// Bytes of the part that every inode has.
const CORE: usize = 128;

/// An inode; its map of blocks and its attributes are parsed where they are needed.
pub(super) struct Inode {
    pub(super) number: u32,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    pub(super) links: u16,
    flags: u32,
    pub(super) modified: Time,
    /// The block of extended attributes; 0 for none.
    pub(super) xattr_block: u64,
    /// Checksums of what belongs to this inode go on from here.
    pub(super) checksum_seed: Option<u32>,
    raw: Vec<u8>,
    /// Where the bytes that follow the known fields begin: attributes inside the inode.
    extra_end: usize,
}

impl Inode {
    pub(super) fn parse(superblock: &Superblock, number: u32, raw: Vec<u8>) -> Result<Self> {
        let extra = if raw.len() > CORE { usize::from(raw.le16(0x80)?) } else { 0 };
        if extra % 4 != 0 || CORE + extra > raw.len() {
            return Err(Error::integrity(format!("inode {number} is damaged: its size is impossible")));
        }
        let extra_end = CORE + extra;
        let generation = raw.le32(0x64)?;
        let checksum_seed = superblock
            .checksum_seed
            .map(|seed| crc32c(crc32c(seed, &number.to_le_bytes()), &generation.to_le_bytes()));
        let mode = raw.le16(0)?;
        let links = raw.le16(0x1a)?;
        if let Some(seed) = checksum_seed
            && (mode != 0 || links != 0)
        {
            check_checksum(number, &raw, seed, extra)?;
        }
        let seconds = i64::from(raw.le32(0x10)? as i32);
        let precise = if extra >= 0x8c - CORE { raw.le32(0x88)? } else { 0 };
        // Two more bits of seconds, then nanoseconds.
        let modified = Time::from_parts(seconds + (i64::from(precise & 3) << 32), i64::from(precise >> 2));
        let join = |low: u16, high: u16| u32::from(high) << 16 | u32::from(low);
        let is_file_or_dir = matches!(mode & 0o170_000, 0o100_000 | 0o040_000);
        let size_high = if is_file_or_dir { raw.le32(0x6c)? } else { 0 };
        Ok(Self {
            number,
            mode,
            uid: join(raw.le16(2)?, raw.le16(0x78)?),
            gid: join(raw.le16(0x18)?, raw.le16(0x7a)?),
            size: u64::from(size_high) << 32 | u64::from(raw.le32(4)?),
            links,
            flags: raw.le32(0x20)?,
            modified,
            xattr_block: u64::from(raw.le16(0x76)?) << 32 | u64::from(raw.le32(0x68)?),
            checksum_seed,
            extra_end,
            raw,
        })
    }

    pub(super) fn kind(&self) -> Result<Kind> {
        Ok(match self.mode >> 12 {
            0o10 => Kind::File,
            0o04 => Kind::Directory,
            0o12 => Kind::Symlink,
            0o01 => Kind::Fifo,
            0o14 => Kind::Socket,
            0o02 => Kind::CharDevice,
            0o06 => Kind::BlockDevice,
            _ => return Err(Error::integrity(format!("inode {} is of no known kind", self.number))),
        })
    }

    /// Refuses content that only its owner's key or another reader can make sense of.
    pub(super) fn check_readable(&self) -> Result<()> {
        let refuse = |how: &str| {
            Err(Error::new(Code::Unsupported, format!("inode {} is {how} in its file system", self.number)))
        };
        if self.flags & flags::ENCRYPTED != 0 {
            return refuse("encrypted");
        }
        if self.flags & flags::COMPRESSED != 0 {
            return refuse("compressed");
        }
        Ok(())
    }

    pub(super) fn has_extents(&self) -> bool {
        self.flags & flags::EXTENTS != 0
    }

    /// Whether this is no file but the value of somebody's attribute.
    pub(super) fn is_xattr_value(&self) -> bool {
        self.flags & flags::XATTR_VALUE != 0
    }

    pub(super) fn is_inline(&self) -> bool {
        self.flags & flags::INLINE_DATA != 0
    }

    /// The 60 bytes that hold the map of blocks, a short link or the start of inline content.
    pub(super) fn map_bytes(&self) -> &[u8] {
        self.raw.get(0x28..0x64).unwrap_or_default()
    }

    /// The bytes between the fields of the inode and its end.
    pub(super) fn after_fields(&self) -> &[u8] {
        self.raw.get(self.extra_end..).unwrap_or_default()
    }

    /// Major and minor number, from the old or the new form.
    pub(super) fn device(&self) -> Result<(u32, u32)> {
        let map = self.map_bytes();
        let old = map.le32(0)?;
        if old != 0 {
            return Ok((old >> 8 & 0xff, old & 0xff));
        }
        let new = map.le32(4)?;
        Ok((new >> 8 & 0xfff, (new & 0xff) | (new >> 12 & 0xf_ff00)))
    }
}

fn check_checksum(number: u32, raw: &[u8], seed: u32, extra: usize) -> Result<()> {
    let has_high = extra >= 4;
    let zero = [0; 2];
    let mut crc = crc32c(seed, raw.part(0, 0x7c)?);
    crc = crc32c(crc, &zero);
    let low = raw.le16(0x7c)?;
    let mut stored = u32::from(low);
    if has_high {
        crc = crc32c(crc, raw.part(0x7e, 0x82 - 0x7e)?);
        crc = crc32c(crc, &zero);
        crc = crc32c(crc, raw.get(0x84..).unwrap_or_default());
        stored |= u32::from(raw.le16(0x82)?) << 16;
    } else {
        crc = crc32c(crc, raw.get(0x7e..).unwrap_or_default());
        crc &= 0xffff;
    }
    if crc == stored {
        return Ok(());
    }
    Err(Error::integrity(format!("inode {number} is damaged: its checksum is wrong")))
}
