//! Directories: entries in the record itself and in blocks, of which a bitmap tells which are in use.

use mainstay_core::{Error, Kind, Result};

use super::content::Stream;
use super::own;
use super::record::{Body, File, kind_of_attribute, mend};
use super::{Node, Volume, utf16};
use crate::fs::DirEntry;
use crate::fs::bytes::Bytes as _;

/// The name of the index of names, `$I30`.
const NAME: [u16; 4] = [0x24, 0x49, 0x33, 0x30];

/// Blocks that a directory may have.
const BLOCKS_MAX: u64 = 1 << 24;

/// Blocks of a directory that one call looks at, however few names they hold.
const SCAN_MAX: u64 = 4096;

impl Volume {
    /// Shows the entries of a directory from a place on until `each` says no; then that entry is the next. A place is
    /// the number of a block, the record being 0, and the number of an entry in it. Returns where to go on.
    pub(super) fn scan(
        &self,
        directory: &File,
        from: u64,
        each: &mut dyn FnMut(u64, DirEntry) -> Result<bool>,
    ) -> Result<Option<u64>> {
        let damaged =
            |why: &str| Error::integrity(format!("the directory in file record {} {why}", directory.number));
        if !directory.is_directory() {
            let what = format!("file record {} is not a directory", directory.number);
            return Err(Error::new(mainstay_core::Code::NotFound, what));
        }
        let root = directory.attributes.iter().find_map(|attribute| match &attribute.body {
            Body::Resident(value)
                if attribute.kind == kind_of_attribute::INDEX_ROOT && attribute.name == NAME =>
            {
                Some(value)
            }
            _ => None,
        });
        let root = root.ok_or_else(|| damaged("has no index"))?;
        let size = root.le32(8)? as usize;
        let blocks = Stream::of(directory, kind_of_attribute::INDEX_ALLOCATION, &NAME)?;
        if !size.is_power_of_two() || !(512..=64 << 10).contains(&size) {
            return Err(damaged("has blocks of an impossible size"));
        }
        let count = blocks.size / size as u64;
        if count > BLOCKS_MAX || blocks.size > self.clusters * self.cluster_size {
            return Err(damaged("is larger than its volume"));
        }
        let bitmap = Stream::of(directory, kind_of_attribute::BITMAP, &NAME)?;
        let mut used = vec![0; usize::try_from(bitmap.size.min(BLOCKS_MAX / 8)).unwrap_or(0)];
        self.read_stream(&bitmap, 0, &mut used)?;

        let first = from >> 32;
        for block in first..=count {
            if block >= first + SCAN_MAX {
                return Ok(Some(block << 32));
            }
            let skip = if block == first { from & 0xffff_ffff } else { 0 };
            let next = if block == 0 {
                entries(root.get(16..).unwrap_or_default(), skip, each)?
            } else {
                let index = block - 1;
                let bits = used.get((index / 8) as usize).copied().unwrap_or(0);
                if bits >> (index % 8) & 1 == 0 {
                    continue;
                }
                let mut bytes = vec![0; size];
                self.read_stream(&blocks, index * size as u64, &mut bytes)?;
                mend(&mut bytes, b"INDX", "a block of a directory")?;
                entries(bytes.get(0x18..).unwrap_or_default(), skip, each)?
            };
            if let Some(next) = next {
                return Ok(Some(block << 32 | next));
            }
        }
        Ok(None)
    }
}

/// Shows the entries of one node, which begins with its header. Returns the number of the one that was refused.
fn entries(
    node: &[u8],
    skip: u64,
    each: &mut dyn FnMut(u64, DirEntry) -> Result<bool>,
) -> Result<Option<u64>> {
    const LAST: u8 = 2;
    const DOS: u8 = 2;
    const REPARSE_POINT: u32 = 0x400;
    const DIRECTORY: u32 = 0x1000_0000;
    let end = (node.le32(4)? as usize).min(node.len());
    let mut at = node.le32(0)? as usize;
    let mut number = 0;
    while at < end {
        let length = usize::from(node.le16(at + 8)?);
        if length < 0x10 {
            return Err(Error::integrity("an entry of a directory is damaged"));
        }
        if node.byte(at + 12)? & LAST != 0 {
            break;
        }
        let key = node.part(at + 0x10, usize::from(node.le16(at + 10)?))?;
        let (reference, space) = (node.le64(at)?, key.byte(0x41)?);
        let target = Node { space: reference >> 48, number: reference & 0xffff_ffff_ffff };
        // The file system's own files have names in its root directory.
        if space != DOS && target.number >= own::ORDINARY && number >= skip {
            let name = utf16(key.part(0x42, 2 * usize::from(key.byte(0x40)?))?);
            let kind = match key.le32(0x38)? {
                flags if flags & REPARSE_POINT != 0 => None,
                flags if flags & DIRECTORY != 0 => Some(Kind::Directory),
                _ => Some(Kind::File),
            };
            if !each(number, DirEntry { name, node: target, kind })? {
                return Ok(Some(number));
            }
        }
        number += 1;
        at += length;
    }
    Ok(None)
}
