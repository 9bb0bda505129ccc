//! A sparse file: the disk in grains, found through a directory of tables.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use mainstay_core::{Blocks, Code, Error, Result};

use super::SECTOR;
use crate::bytes::{self, Fields};
use crate::mapped::{Map, Place};
use crate::pages::{Kept, Pages};
use crate::unpack;

/// In sectors; VMware's grains have 128.
const GRAIN_MAX: u64 = 8192;
const TABLE_MAX: u64 = 1 << 16;
/// Unpacked grains kept; 4 MiB with VMware's, 32 with the largest.
const UNPACKED: usize = 8;
/// A compressed grain is never much longer than a plain one.
const PACKED_MAX_OVER: u64 = 64 << 10;

const NEWLINES: u32 = 1;
const ZEROED_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
const MARKERS: u32 = 1 << 17;

/// The directory lies behind the data, told by a second header near the end.
const AT_END: u64 = u64::MAX;
/// From the end of the file to that header: itself and the end-of-stream mark.
const FOOTER: u64 = 1024;

pub(super) struct Sparse {
    base: Arc<dyn Blocks>,
    pages: Pages,
    /// The file, then what it is a layer on.
    devices: Vec<Arc<dyn Blocks>>,
    /// In bytes.
    size: u64,
    grain: u64,
    directory: u64,
    /// Grains of a table.
    table: u64,
    flags: u32,
    unclean: bool,
    unpacked: Mutex<Kept<u64>>,
}

/// Whether the file is a sparse one, rather than a text.
pub(super) fn is(base: &dyn Blocks) -> Result<bool> {
    Ok(bytes::read_up_to(base, 0, 4)? == b"KDMV")
}

/// Where the text about the disk lies within a sparse file, if it has one; `None` in other files.
pub(super) fn text(base: &dyn Blocks) -> Result<Option<Range<u64>>> {
    if !is(base)? {
        return Ok(None);
    }
    let header = bytes::read(base, 0, bytes::index(SECTOR)?)?;
    let fields = Fields::new("the VMDK header", &header);
    let (start, length) = (fields.le64(28)?.checked_mul(SECTOR), fields.le64(36)?.checked_mul(SECTOR));
    let range = start.zip(length).and_then(|(start, length)| Some(start..start.checked_add(length)?));
    range.map(Some).ok_or_else(|| Error::integrity("a description beyond the end of the file"))
}

impl Sparse {
    /// `parent` is what shows where there is no grain.
    pub(super) fn open(base: Arc<dyn Blocks>, parent: Option<Arc<dyn Blocks>>) -> Result<Self> {
        if !is(&*base)? {
            return Err(Error::integrity("a sparse part that does not begin like one"));
        }
        let mut header = bytes::read(&*base, 0, bytes::index(SECTOR)?)?;
        if Fields::new("the VMDK header", &header).le64(56)? == AT_END {
            header = bytes::read(&*base, base.size().saturating_sub(FOOTER), bytes::index(SECTOR)?)?;
            if !header.starts_with(b"KDMV") {
                return Err(Error::integrity("the footer is missing").hint("The image may be cut short."));
            }
        }
        let fields = Fields::new("the VMDK header", &header);
        let (version, flags) = (fields.le32(4)?, fields.le32(8)?);
        if !(1..=3).contains(&version) {
            return Err(Error::new(Code::Unsupported, format!("VMDK of version {version} is not read")));
        }
        if flags & NEWLINES != 0 && fields.take(73, 4)? != b"\n \r\n" {
            return Err(Error::integrity("the file was damaged by a transfer that took it for text"));
        }
        let known = matches!((flags & COMPRESSED != 0, fields.le16(77)?), (false, _) | (true, 1));
        if !known || (flags & COMPRESSED != 0) != (flags & MARKERS != 0) {
            return Err(Error::new(Code::Unsupported, "this kind of compression in VMDK is not read"));
        }
        let (sectors, grain, table) = (fields.le64(12)?, fields.le64(20)?, u64::from(fields.le32(44)?));
        let fits = grain.is_power_of_two() && grain <= GRAIN_MAX && (1..=TABLE_MAX).contains(&table);
        let size = sectors.checked_mul(SECTOR).filter(|size| *size <= i64::MAX.unsigned_abs());
        let (Some(size), true) = (size, fits) else {
            return Err(Error::integrity(format!(
                "{sectors} sectors in grains of {grain} and tables of {table}"
            )));
        };
        let directory = fields.le64(56)?.checked_mul(SECTOR);
        let end = |start: &u64| start.checked_add(size.div_ceil(table * grain * SECTOR) * 4);
        let directory = directory.filter(|start| end(start).is_some_and(|end| end <= base.size()));
        Ok(Self {
            pages: Pages::new(Arc::clone(&base)),
            devices: [Some(Arc::clone(&base)), parent].into_iter().flatten().collect(),
            size,
            grain: grain * SECTOR,
            directory: directory.ok_or_else(|| {
                Error::integrity("the directory lies beyond the end of the file")
                    .hint("The image may be cut short.")
            })?,
            table,
            flags,
            unclean: fields.array::<1>(72)? != [0],
            unpacked: Mutex::new(Kept::new(UNPACKED)),
            base,
        })
    }

    pub(super) fn unclean(&self) -> bool {
        self.unclean
    }

    fn absent(&self, offset: u64, length: u64) -> (Place, u64) {
        match self.devices.get(1).map(|parent| parent.size().saturating_sub(offset)) {
            None | Some(0) => (Place::Hole, length),
            Some(left) => (Place::At { device: 1, offset }, length.min(left)),
        }
    }
}

impl Map for Sparse {
    fn size(&self) -> u64 {
        self.size
    }

    fn devices(&self) -> &[Arc<dyn Blocks>] {
        &self.devices
    }

    fn place(&self, offset: u64, wanted: u64) -> Result<(Place, u64)> {
        let covered = self.table * self.grain;
        let page = self.pages.from(self.directory + offset / covered * 4)?;
        let table = u64::from(Fields::new("the grain directory", page.bytes()).le32(0)?) * SECTOR;
        if table == 0 {
            return Ok(self.absent(offset, covered - offset % covered));
        }
        let number = offset % covered / self.grain;
        let page = self.pages.from(table + number * 4)?;
        let entries = page.bytes().chunks_exact(4).take(bytes::index(self.table - number)?);
        let mut entries = entries.map(|entry| Fields::new("a grain table", entry).le32(0));
        let first = entries.next().ok_or_else(|| Error::integrity("a grain table is cut short"))??;
        let within = offset % self.grain;
        let mut length = self.grain - within;
        let grain = |sector: u32| u64::from(sector) * SECTOR;
        let plain = self.flags & COMPRESSED == 0;
        let zero = |sector: u32| sector == 1 && self.flags & ZEROED_GRAINS != 0;
        for next in entries {
            let next = next?;
            let goes_on = match first {
                0 => next == 0,
                sector if zero(sector) => zero(next),
                sector => plain && grain(next).checked_sub(grain(sector)) == Some(within + length),
            };
            if length >= wanted || !goes_on {
                break;
            }
            length += self.grain;
        }
        Ok(match first {
            0 => self.absent(offset, length),
            sector if zero(sector) => (Place::Zero, length),
            sector if plain => (Place::At { device: 0, offset: grain(sector) + within }, length),
            sector => (Place::Packed { packed: grain(sector), skip: bytes::index(within)? }, length),
        })
    }

    fn unpack(&self, packed: u64) -> Result<Arc<[u8]>> {
        if let Some(whole) = self.unpacked.lock().unwrap_or_else(PoisonError::into_inner).get(&packed) {
            return Ok(whole);
        }
        // In front of a grain stand its place on the disk (8 bytes) and its packed length (4).
        let mark = bytes::read(&*self.base, packed, 12)?;
        let mark = Fields::new("the mark of a grain", &mark);
        let (sector, length) = (mark.le64(0)?, u64::from(mark.le32(8)?));
        if length > self.grain + PACKED_MAX_OVER {
            return Err(Error::integrity(format!("a grain packed to {length} bytes")));
        }
        let stored = bytes::read(&*self.base, packed + 12, bytes::index(length)?)?;
        // The last grain may be packed only as far as the disk reaches.
        let left = self.size.saturating_sub(sector.saturating_mul(SECTOR)).min(self.grain);
        let mut whole = vec![0; bytes::index(self.grain)?];
        unpack::zlib(&stored, &mut whole, bytes::index(left)?)?;
        let whole: Arc<[u8]> = whole.into();
        self.unpacked.lock().unwrap_or_else(PoisonError::into_inner).put(packed, Arc::clone(&whole));
        Ok(whole)
    }
}
