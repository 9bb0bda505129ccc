//! Directories. Those with a hash tree are read from front to back as well: the nodes of the tree look like blocks
//! without names.

use mainstay_core::{Error, Kind, Piece, Result};

use super::inode::Inode;
use super::map::Mapper;
use super::{Node, Page, Volume, incompat, node};
use crate::fs::bytes::{Bytes as _, crc32c};
use crate::fs::{DirEntry, check_name};

/// Bytes of a directory that one call looks at, however few names they hold.
const SCAN_MAX: u64 = 16 << 20;

/// An entry as it lies in its block.
struct Raw<'a> {
    /// Offset within the part that was parsed.
    offset: usize,
    inode: u32,
    kind: u8,
    name: &'a [u8],
}

impl Volume {
    pub(in crate::fs) fn find(&self, directory: &Inode, name: &[u8]) -> Result<Option<Node>> {
        let mut from = 0;
        loop {
            let mut found = None;
            let next = self.scan(directory, from, &mut |_, entry| {
                if entry.name == name {
                    found = Some(node(entry.inode));
                }
                Ok(found.is_none())
            })?;
            match next {
                Some(next) if found.is_none() => from = next,
                _ => return Ok(found),
            }
        }
    }

    pub(super) fn list(&self, directory: &Inode, from: u64, limit: usize) -> Result<Page> {
        let with_kind = self.superblock.incompat & incompat::FILETYPE != 0;
        let mut entries = Vec::new();
        let next = self.scan(directory, from, &mut |_, entry| {
            if entries.len() == limit {
                return Ok(false);
            }
            check_name(entry.name)?;
            let kind = if with_kind { kind(entry.kind) } else { None };
            entries.push(DirEntry { name: entry.name.to_vec(), node: node(entry.inode), kind });
            Ok(true)
        })?;
        Ok(Page { entries, next })
    }

    /// Shows entries in use, without `.` and `..`, from an offset on, until `each` says no; then that entry is the
    /// next. Returns where to go on.
    fn scan(
        &self,
        directory: &Inode,
        from: u64,
        each: &mut dyn FnMut(u64, &Raw<'_>) -> Result<bool>,
    ) -> Result<Option<u64>> {
        let damaged = |error: Error| {
            Error::integrity(format!("the directory in inode {} is damaged", directory.number)).because(error)
        };
        if directory.is_inline() {
            // The number of the parent comes first.
            let bytes = self.inline(directory)?;
            return self.scan_part(bytes.get(4..).unwrap_or_default(), 0, from, each).map_err(damaged);
        }
        let size = self.block_size();
        // A larger one could only hold its blocks twice.
        if directory.size > self.superblock.blocks * size {
            return Err(damaged(Error::integrity("it is larger than its volume")));
        }
        let mut mapper = Mapper::new();
        let mut block = vec![0; size as usize];
        let mut at = from / size * size;
        let stop = at.saturating_add(SCAN_MAX);
        while at < directory.size {
            if at >= stop {
                return Ok(Some(at));
            }
            match self.read_content(directory, &mut mapper, at, &mut block)? {
                Piece::Data(length) if length == block.len() => {
                    self.check_block(directory, &block).map_err(damaged)?;
                    if let Some(next) = self.scan_part(&block, at, from, each).map_err(damaged)? {
                        return Ok(Some(next));
                    }
                    at += size;
                }
                Piece::Data(_) => return Err(damaged(Error::integrity("it ends within a block"))),
                Piece::Hole(length) => at += length,
                Piece::End => break,
            }
        }
        Ok(None)
    }

    /// Goes through a list of entries that begins at `base`. Returns the offset of the entry that was refused.
    fn scan_part(
        &self,
        part: &[u8],
        base: u64,
        from: u64,
        each: &mut dyn FnMut(u64, &Raw<'_>) -> Result<bool>,
    ) -> Result<Option<u64>> {
        let mut offset = 0;
        while offset < part.len() {
            let (entry, length) = self.entry(part, offset)?;
            offset += length;
            let Some(entry) = entry else { continue };
            let at = base + entry.offset as u64;
            if at >= from && !matches!(entry.name, b"." | b"..") && !each(at, &entry)? {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    /// The entry at an offset, `None` if it is not in use, and its length.
    fn entry<'a>(&self, part: &'a [u8], offset: usize) -> Result<(Option<Raw<'a>>, usize)> {
        let rest = part.get(offset..).unwrap_or_default();
        let inode = rest.le32(0)?;
        let length = match rest.le16(4)? {
            // In blocks of 64 KiB, the length of the whole block and more do not fit.
            0 | u16::MAX if part.len() >= 1 << 16 => part.len(),
            length if part.len() >= 1 << 16 => usize::from(length & !3) | usize::from(length & 3) << 16,
            length => usize::from(length),
        };
        let (name_length, kind) = (usize::from(rest.byte(6)?), rest.byte(7)?);
        if length < 8 || length % 4 != 0 || length > rest.len() || 8 + name_length > length {
            return Err(Error::integrity("the length of an entry is impossible"));
        }
        if inode == 0 {
            return Ok((None, length));
        }
        if inode > self.superblock.inodes {
            return Err(Error::integrity("an entry names an inode that does not exist"));
        }
        let name = rest.part(8, name_length)?;
        Ok((Some(Raw { offset, inode, kind, name }), length))
    }

    /// Verifies the checksum of a block of names, which looks like an entry at its end. The nodes of hash trees have
    /// none that a walk along the entries would reach; they hold no names.
    fn check_block(&self, directory: &Inode, block: &[u8]) -> Result<()> {
        const TAIL: [u8; 8] = [0, 0, 0, 0, 12, 0, 0, 0xde];
        let (Some(seed), Some(tail)) = (directory.checksum_seed, block.len().checked_sub(12)) else {
            return Ok(());
        };
        let mut offset = 0;
        while offset < tail {
            offset += self.entry(block, offset)?.1;
        }
        let is_tail = offset == tail && block.part(tail, 8)? == TAIL;
        if is_tail && crc32c(seed, block.part(0, tail)?) != block.le32(tail + 8)? {
            return Err(Error::integrity("the checksum of a block is wrong"));
        }
        Ok(())
    }
}

fn kind(number: u8) -> Option<Kind> {
    Some(match number & 7 {
        1 => Kind::File,
        2 => Kind::Directory,
        3 => Kind::CharDevice,
        4 => Kind::BlockDevice,
        5 => Kind::Fifo,
        6 => Kind::Socket,
        7 => Kind::Symlink,
        _ => return None,
    })
}
