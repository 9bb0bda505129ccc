//! The content of files: extents as they lie, compressed ones, and what fits into an item.

use std::sync::{Arc, Mutex, PoisonError};

use fs_btrfs::compression::{Compression, MAX_COMPRESSED, MAX_UNCOMPRESSED, ShortDecode, decompress};
use fs_btrfs::inode::Inode;
use mainstay_core::{Code, Error, Piece, Result};

use super::tree::{Key, kind_of_item};
use super::{Content, FileExtent, Node, Volume, guarded, translate};
use crate::fs::bytes::Bytes as _;

const INLINE: u8 = 0;
const REGULAR: u8 = 1;
const RESERVED: u8 = 2;

/// Where the bytes of an inline extent begin in its item.
const INLINE_START: usize = 21;

/// Content that lies in blocks of its own.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Extent {
    compression: Compression,
    /// Logical address and length of all of it as it lies.
    start: u64,
    stored: u64,
    /// Length of all of it in plain.
    plain: u64,
    /// What the file has of that.
    offset: u64,
    length: u64,
}

/// What an item says about a part of a file.
enum Part {
    Inline,
    Extent(Extent),
    /// A hole of that length, or space that was reserved and never written.
    Nothing(u64),
}

fn damaged(why: &str) -> Error {
    Error::integrity(format!("an extent of a file is damaged: {why}"))
}

fn part(item: &[u8]) -> Result<Part> {
    let plain = item.le64(8)?;
    if item.byte(17)? != 0 || item.le16(18)? != 0 {
        return Err(Error::new(
            Code::Unsupported,
            "the content of a file is encoded in a way not known here",
        ));
    }
    let compression = guarded(
        "btrfs",
        || Compression::from_byte(item.byte(16).unwrap_or(u8::MAX)),
        |error| translate("the content of a file is compressed in a way not known here", error),
    )?;
    let kind = item.byte(20)?;
    if kind == INLINE {
        return Ok(Part::Inline);
    }
    let (start, stored) = (item.le64(21)?, item.le64(29)?);
    let (offset, length) = (item.le64(37)?, item.le64(45)?);
    match kind {
        _ if length == 0 => Err(damaged("it is empty")),
        RESERVED => Ok(Part::Nothing(length)),
        REGULAR if start == 0 => Ok(Part::Nothing(length)),
        REGULAR => {
            let within = offset.checked_add(length).is_some_and(|end| end <= plain);
            let whole =
                compression.is_compressed() || start.checked_add(offset.saturating_add(length)).is_some();
            if !within || !whole {
                return Err(damaged("it reaches beyond itself"));
            }
            Ok(Part::Extent(Extent { compression, start, stored, plain, offset, length }))
        }
        _ => Err(damaged("it is of no known kind")),
    }
}

pub(super) fn open(volume: Arc<Volume>, node: Node, inode: &Inode) -> Result<Arc<dyn Content>> {
    let root = volume.root(node.space)?.block;
    Ok(Arc::new(File { volume, root, number: inode.ino, size: inode.size, unpacked: Mutex::default() }))
}

struct File {
    volume: Arc<Volume>,
    root: u64,
    number: u64,
    size: u64,
    /// The compressed extent that was unpacked last: readers want it piece by piece.
    unpacked: Mutex<Option<(Extent, Arc<[u8]>)>>,
}

impl Content for File {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Piece> {
        let left = self.size.saturating_sub(offset);
        if left == 0 || buffer.is_empty() {
            return Ok(Piece::End);
        }
        let key = Key { object: self.number, kind: kind_of_item::EXTENT_DATA, offset };
        let (item, next) = self.volume.blocks.up_to(self.root, key)?;
        let own = |key: &Key| key.object == self.number && key.kind == kind_of_item::EXTENT_DATA;
        // With the feature "no holes", what no item mentions is one.
        let hole = next.filter(own).map_or(left, |next| next.offset - offset).min(left);
        let Some((at, item)) = item.filter(|(key, _)| own(key)) else { return Ok(Piece::Hole(hole)) };
        let within = offset - at.offset;
        match part(&item)? {
            Part::Inline => {
                let bytes = self.volume.inline(&item)?.unwrap_or_default();
                let from =
                    usize::try_from(within).ok().and_then(|within| bytes.get(within..)).unwrap_or_default();
                if from.is_empty() {
                    return Ok(Piece::Hole(hole));
                }
                let length = from.len().min(buffer.len()).min(usize::try_from(left).unwrap_or(usize::MAX));
                buffer[..length].copy_from_slice(&from[..length]);
                Ok(Piece::Data(length))
            }
            Part::Nothing(length) if within < length => Ok(Piece::Hole((length - within).min(left))),
            Part::Extent(extent) if within < extent.length => {
                let available = (extent.length - within).min(left).min(buffer.len() as u64) as usize;
                self.read_extent(&extent, within, &mut buffer[..available]).map(Piece::Data)
            }
            Part::Nothing(_) | Part::Extent(_) => Ok(Piece::Hole(hole)),
        }
    }
}

impl File {
    /// Some of the bytes from `within` on, an offset in what the file has of the extent.
    fn read_extent(&self, extent: &Extent, within: u64, buffer: &mut [u8]) -> Result<usize> {
        if extent.compression.is_compressed() {
            let plain = self.unpack(extent)?;
            let from = (extent.offset + within) as usize;
            let bytes = plain.get(from..).unwrap_or_default();
            let length = bytes.len().min(buffer.len());
            buffer[..length].copy_from_slice(&bytes[..length]);
            return if length > 0 { Ok(length) } else { Err(damaged("it is shorter than its file")) };
        }
        let (place, goes_on) = self.volume.blocks.physical(extent.start + extent.offset + within)?;
        let length = goes_on.min(buffer.len() as u64) as usize;
        if length == 0 {
            return Err(damaged("it lies nowhere"));
        }
        self.volume.blocks.pages.read(place, &mut buffer[..length])?;
        Ok(length)
    }

    fn unpack(&self, extent: &Extent) -> Result<Arc<[u8]>> {
        let mut unpacked = self.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, plain)) = &*unpacked
            && last == extent
        {
            return Ok(plain.clone());
        }
        let packed = self.volume.stored(extent)?;
        let plain: Arc<[u8]> = self.volume.plain(extent.compression, &packed, extent.plain)?.into();
        *unpacked = Some((*extent, plain.clone()));
        Ok(plain)
    }
}

impl Volume {
    /// All bytes of a compressed extent as they lie.
    fn stored(&self, extent: &Extent) -> Result<Vec<u8>> {
        if extent.stored > MAX_COMPRESSED {
            return Err(damaged("it is larger than a compressed one can be"));
        }
        let mut packed = vec![0; extent.stored as usize];
        let mut done = 0;
        while done < packed.len() {
            let (place, goes_on) = self.blocks.physical(extent.start.saturating_add(done as u64))?;
            let length = goes_on.min((packed.len() - done) as u64) as usize;
            if length == 0 {
                return Err(damaged("it lies nowhere"));
            }
            self.blocks.pages.read(place, &mut packed[done..done + length])?;
            done += length;
        }
        Ok(packed)
    }

    /// Zeros follow what was packed: an extent that was the end of its file once had no more to pack, even if the file
    /// went on later.
    fn plain(&self, how: Compression, packed: &[u8], length: u64) -> Result<Vec<u8>> {
        let length = usize::try_from(length).ok().filter(|&length| length <= MAX_UNCOMPRESSED);
        let length = length.ok_or_else(|| damaged("it is larger than a compressed one can be"))?;
        let sector = self.blocks.parsed.superblock().sectorsize as usize;
        let failed = |error| translate("cannot decompress the content of a file", error);
        guarded("btrfs", || decompress(how, packed, length, sector, ShortDecode::Pad), failed)
    }

    /// The content that an item holds itself; `None` when it lies elsewhere.
    pub(super) fn inline(&self, item: &[u8]) -> Result<Option<Vec<u8>>> {
        if !matches!(part(item)?, Part::Inline) {
            return Ok(None);
        }
        let bytes = item.get(INLINE_START..).unwrap_or_default();
        let how = guarded(
            "btrfs",
            || Compression::from_byte(item.byte(16).unwrap_or(u8::MAX)),
            |error| translate("the content of a file is compressed in a way not known here", error),
        )?;
        if how.is_compressed() {
            return self.plain(how, bytes, item.le64(8)?).map(Some);
        }
        Ok(Some(bytes.to_vec()))
    }

    /// Adds where an item's part of a file of `size` bytes lies, if it lies there as it is.
    pub(super) fn place(&self, at: u64, item: &[u8], size: u64, extents: &mut Vec<FileExtent>) -> Result<()> {
        let Part::Extent(extent) = part(item)? else { return Ok(()) };
        if extent.compression.is_compressed() || at >= size {
            return Ok(());
        }
        let length = extent.length.min(size - at);
        let mut done = 0;
        while done < length {
            let (volume_offset, goes_on) = self.blocks.physical(extent.start + extent.offset + done)?;
            let part = goes_on.min(length - done);
            if part == 0 {
                return Err(damaged("it lies nowhere"));
            }
            extents.push(FileExtent { file_offset: at + done, volume_offset, length: part });
            done += part;
        }
        Ok(())
    }
}
