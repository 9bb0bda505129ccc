//! The content of files, and the targets of symbolic links.

use std::sync::{Arc, Mutex, PoisonError};

use mainstay_core::{Error, Piece, Result};

use super::Volume;
use super::inode::Inode;
use super::map::Mapper;
use crate::fs::Content;

/// The longest target that a symbolic link may have (PATH_MAX), in bytes.
const LINK_MAX: u64 = 4096;

/// The content of a file; the volume is shared, so it outlives the file system's handle.
pub(super) fn open(volume: Arc<Volume>, inode: Inode) -> Result<Arc<dyn Content>> {
    if inode.is_inline() {
        let bytes = volume.inline(&inode)?;
        return Ok(Arc::new(Inline { bytes, size: inode.size }));
    }
    Ok(Arc::new(Mapped { volume, inode, mapper: Mutex::new(Mapper::new()) }))
}

/// Content that lies in blocks.
struct Mapped {
    volume: Arc<Volume>,
    inode: Inode,
    mapper: Mutex<Mapper>,
}

impl Content for Mapped {
    fn size(&self) -> u64 {
        self.inode.size
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Piece> {
        let mut mapper = self.mapper.lock().unwrap_or_else(PoisonError::into_inner);
        self.volume.read_content(&self.inode, &mut mapper, offset, buffer)
    }
}

/// Content that lies in the inode and its attributes; zeros follow it up to the size.
struct Inline {
    bytes: Vec<u8>,
    size: u64,
}

impl Content for Inline {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Piece> {
        if offset >= self.size || buffer.is_empty() {
            return Ok(Piece::End);
        }
        let from =
            usize::try_from(offset).ok().and_then(|offset| self.bytes.get(offset..)).unwrap_or_default();
        if from.is_empty() {
            return Ok(Piece::Hole(self.size - offset));
        }
        let length = from.len().min(buffer.len());
        buffer[..length].copy_from_slice(&from[..length]);
        Ok(Piece::Data(length))
    }
}

impl Volume {
    /// As [`Content::read`].
    pub(super) fn read_content(
        &self,
        inode: &Inode,
        mapper: &mut Mapper,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<Piece> {
        let left = inode.size.saturating_sub(offset);
        if left == 0 || buffer.is_empty() {
            return Ok(Piece::End);
        }
        let shift = self.superblock.block_shift;
        let within = offset & (self.block_size() - 1);
        let stretch = mapper.at(self, inode, offset >> shift)?;
        let available = stretch.blocks.saturating_mul(self.block_size()).saturating_sub(within).min(left);
        let Some(start) = stretch.start else { return Ok(Piece::Hole(available)) };
        let length = available.min(buffer.len() as u64) as usize;
        self.read((start << shift) + within, &mut buffer[..length])?;
        Ok(Piece::Data(length))
    }

    /// The whole content of something small, holes filled with zeros.
    pub(super) fn small_content(&self, inode: &Inode, limit: u64) -> Result<Vec<u8>> {
        if inode.size > limit {
            let what = format!("inode {} has {} bytes, more than it may", inode.number, inode.size);
            return Err(Error::integrity(what));
        }
        let mut bytes = vec![0; inode.size as usize];
        let mut mapper = Mapper::new();
        let mut done = 0;
        while done < bytes.len() {
            done += match self.read_content(inode, &mut mapper, done as u64, &mut bytes[done..])? {
                Piece::Data(length) => length,
                Piece::Hole(length) => length as usize,
                Piece::End => break,
            };
        }
        Ok(bytes)
    }

    /// What an inode holds without blocks of its own, at most its size.
    pub(super) fn inline(&self, inode: &Inode) -> Result<Vec<u8>> {
        let mut bytes = inode.map_bytes().to_vec();
        if inode.size > bytes.len() as u64 {
            bytes.extend(self.inline_rest(inode)?);
        }
        bytes.truncate(usize::try_from(inode.size).unwrap_or(usize::MAX));
        Ok(bytes)
    }

    pub(super) fn link_target(&self, inode: &Inode) -> Result<Vec<u8>> {
        inode.check_readable()?;
        let map = inode.map_bytes();
        let target = if inode.is_inline() {
            self.inline(inode)?
        } else if !inode.has_extents() && inode.size < map.len() as u64 {
            map[..inode.size as usize].to_vec()
        } else {
            self.small_content(inode, LINK_MAX)?
        };
        if target.is_empty() || target.len() as u64 != inode.size || target.contains(&0) {
            let what = format!("the target of the symbolic link in inode {} is damaged", inode.number);
            return Err(Error::integrity(what));
        }
        Ok(target)
    }
}
