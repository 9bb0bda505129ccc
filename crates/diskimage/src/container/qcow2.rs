//! qcow2, versions 2 and 3, as QEMU's `docs/interop/qcow2.rst` describes it. Only the active state is read; snapshots
//! inside the image and reference counts are not looked at.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use mainstay_core::{Blocks, Code, Error, Result};

use super::{Format, Naming, Opening};
use crate::bytes::{self, Fields};
use crate::mapped::{Map, Mapped, Place};
use crate::pages::{Kept, Pages};
use crate::unpack;

/// Of a version 3 header with the type of compression.
const HEADER: usize = 112;
const NAME_MAX: u32 = 1023;
/// Header extensions that are read before giving up.
const EXTENSIONS_MAX: usize = 64;
/// The largest level 1 table that QEMU accepts, in entries (32 MiB).
const L1_MAX: u64 = 4 << 20;
/// Unpacked clusters kept; with the largest clusters 16 MiB.
const UNPACKED: usize = 8;

const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

const EXTENSION_BACKING_FORMAT: u32 = 0xE279_2ACA;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

const ENTRY_OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;
const ENTRY_COPIED: u64 = 1 << 63;
const ENTRY_PACKED: u64 = 1 << 62;
const ENTRY_ZERO: u64 = 1;

/// Subclusters of a cluster in images with extended entries.
const SUBCLUSTERS: u32 = 32;

#[derive(Clone, Copy)]
enum Packing {
    Deflate,
    Zstd,
}

/// What the header says, checked.
struct Header {
    version: u32,
    cluster_bits: u32,
    size: u64,
    l1_offset: u64,
    extended: bool,
    data_file: bool,
    packing: Packing,
    corrupt: bool,
    backing_name: Option<Vec<u8>>,
    backing_format: Option<Format>,
    data_name: Option<Vec<u8>>,
}

pub(super) fn open(
    opening: &mut Opening<'_>,
    base: Arc<dyn Blocks>,
    path: &Path,
    naming: Naming,
) -> Result<Arc<dyn Blocks>> {
    let header = Header::read(&*base)?;
    if header.corrupt {
        opening.notes.push(format!("{} is marked as corrupt; `qemu-img check` tells more.", path.display()));
    }
    let data = match (&header.data_name, header.data_file) {
        (Some(name), true) => opening.companion(path, name, naming)?.1,
        (None, true) => {
            return Err(Error::integrity("the image keeps its data in another file and does not say which"));
        }
        (_, false) => Arc::clone(&base),
    };
    let mut devices = vec![data];
    if let Some(name) = &header.backing_name {
        devices.push(opening.backing(path, name, header.backing_format, naming)?);
    }
    let pages = Pages::new(Arc::clone(&base));
    Ok(Arc::new(Mapped(Qcow2 { base, pages, devices, header, unpacked: Mutex::new(Kept::new(UNPACKED)) })))
}

impl Header {
    fn read(base: &dyn Blocks) -> Result<Self> {
        let head = bytes::read_up_to(base, 0, HEADER)?;
        let fields = Fields::new("the qcow2 header", &head);
        let version = fields.be32(4)?;
        if !(2..=3).contains(&version) {
            return Err(unsupported(format!("qcow2 of version {version}")));
        }
        match fields.be32(32)? {
            0 => {}
            1 => return Err(unsupported("an image that QEMU encrypted with AES".into())),
            2 => return Err(unsupported("an image that QEMU encrypted with LUKS".into())),
            method => return Err(unsupported(format!("encryption of kind {method}"))),
        }
        let cluster_bits = fields.be32(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(Error::integrity(format!("clusters of 2^{cluster_bits} bytes")));
        }
        let (features, length) = match version {
            2 => (0, 72),
            _ => (fields.be64(72)?, fields.be32(100)?),
        };
        let known = INCOMPATIBLE_DIRTY
            | INCOMPATIBLE_CORRUPT
            | INCOMPATIBLE_DATA_FILE
            | INCOMPATIBLE_COMPRESSION
            | INCOMPATIBLE_EXTENDED_L2;
        if features & !known != 0 {
            return Err(unsupported(format!("an image with the unknown features {:#x}", features & !known)));
        }
        let packing =
            match (features & INCOMPATIBLE_COMPRESSION != 0).then(|| fields.array::<1>(104)).transpose()? {
                None | Some([0]) => Packing::Deflate,
                Some([1]) => Packing::Zstd,
                Some([kind]) => return Err(unsupported(format!("compression of kind {kind}"))),
            };
        let mut header = Self {
            version,
            cluster_bits,
            size: fields.be64(24)?,
            l1_offset: fields.be64(40)?,
            extended: features & INCOMPATIBLE_EXTENDED_L2 != 0,
            data_file: features & INCOMPATIBLE_DATA_FILE != 0,
            packing,
            corrupt: features & INCOMPATIBLE_CORRUPT != 0,
            backing_name: None,
            backing_format: None,
            data_name: None,
        };
        header.check_tables(base, fields.be32(36)?)?;
        header.read_names(base, length, fields.be64(8)?, fields.be32(16)?)?;
        Ok(header)
    }

    fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an entry of level 2.
    fn entry(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Bytes of the disk that one table of level 2 tells about.
    fn covered(&self) -> u64 {
        (self.cluster() / self.entry()) << self.cluster_bits
    }

    fn check_tables(&self, base: &dyn Blocks, l1_entries: u32) -> Result<()> {
        let needed = self.size.div_ceil(self.covered());
        if self.size > i64::MAX.unsigned_abs() || needed > L1_MAX {
            return Err(Error::integrity(format!(
                "a disk of {} bytes in clusters of {}",
                self.size,
                self.cluster()
            )));
        }
        if u64::from(l1_entries) < needed {
            return Err(Error::integrity(format!(
                "a table of level 1 with {l1_entries} entries instead of {needed}"
            )));
        }
        let end = self.l1_offset.checked_add(needed * 8);
        if !self.l1_offset.is_multiple_of(self.cluster()) || end.is_none_or(|end| end > base.size()) {
            return Err(Error::integrity(format!(
                "a table of level 1 at byte {} of {}",
                self.l1_offset,
                base.size()
            ))
            .hint("The image may be cut short."));
        }
        if self.extended && self.cluster_bits < 14 {
            return Err(Error::integrity("subclusters of less than 512 bytes"));
        }
        Ok(())
    }

    /// Reads the header's extensions, which begin at `at`, and the name of the backing file.
    fn read_names(&mut self, base: &dyn Blocks, at: u32, name_at: u64, name_length: u32) -> Result<()> {
        let first = bytes::read_up_to(base, 0, bytes::index(self.cluster())?)?;
        let fields = Fields::new("the qcow2 header", &first);
        let mut at = bytes::index(u64::from(at))?;
        for _ in 0..EXTENSIONS_MAX {
            // They end with a mark, at the backing file's name, or with the cluster.
            if (name_at != 0 && at as u64 >= name_at) || at.saturating_add(8) > first.len() {
                break;
            }
            let (kind, length) = (fields.be32(at)?, bytes::index(u64::from(fields.be32(at + 4)?))?);
            let text = || fields.take(at + 8, length);
            match kind {
                0 => break,
                EXTENSION_BACKING_FORMAT => self.backing_format = Some(format_named(text()?)?),
                EXTENSION_DATA_FILE => self.data_name = Some(text()?.to_vec()),
                _ => {}
            }
            at = at.saturating_add(8).saturating_add(length.next_multiple_of(8));
        }
        if name_at != 0 && name_length != 0 {
            if name_length > NAME_MAX {
                return Err(Error::integrity(format!("a backing file's name of {name_length} bytes")));
            }
            let name = fields.take(bytes::index(name_at)?, bytes::index(u64::from(name_length))?)?;
            self.backing_name = Some(name.to_vec());
        }
        Ok(())
    }
}

fn unsupported(what: String) -> Error {
    Error::new(Code::Unsupported, format!("{what} is not read"))
        .hint("Convert it with `qemu-img convert -O qcow2` to a new image.")
}

fn format_named(name: &[u8]) -> Result<Format> {
    match name {
        b"raw" | b"host_device" | b"file" => Ok(Format::Raw),
        b"qcow2" => Ok(Format::Qcow2),
        b"vmdk" => Ok(Format::Vmdk),
        b"vhdx" => Ok(Format::Vhdx),
        other => Err(unsupported(format!("a backing file of format {}", String::from_utf8_lossy(other)))),
    }
}

struct Qcow2 {
    base: Arc<dyn Blocks>,
    pages: Pages,
    /// The data, then the backing file if there is one.
    devices: Vec<Arc<dyn Blocks>>,
    header: Header,
    unpacked: Mutex<Kept<u64>>,
}

/// What the tables say about a byte.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Cell {
    /// Nothing: the backing file knows, or it is a hole.
    Absent,
    Zero,
    Data(u64),
    Packed(u64),
}

impl Cell {
    /// Whether `next` goes on where this one stops after `length` bytes.
    fn continues(self, length: u64, next: Self) -> bool {
        match (self, next) {
            (Self::Absent, Self::Absent) | (Self::Zero, Self::Zero) => true,
            (Self::Data(here), Self::Data(there)) => here.checked_add(length) == Some(there),
            _ => false,
        }
    }
}

impl Qcow2 {
    /// The bytes from `offset` on that no table of level 2 tells about; or the place of that table.
    fn level1(&self, offset: u64, wanted: u64) -> Result<std::result::Result<u64, u64>> {
        let covered = self.header.covered();
        let page = self.pages.from(self.header.l1_offset + offset / covered * 8)?;
        let mut absent = 0;
        for entry in page.bytes().chunks_exact(8) {
            let entry = Fields::new("the table of level 1", entry).be64(0)? & ENTRY_OFFSET;
            if entry == 0 {
                absent += covered - (offset + absent) % covered;
            } else if absent == 0 {
                return if entry.is_multiple_of(self.header.cluster()) {
                    Ok(Ok(entry))
                } else {
                    Err(Error::integrity(format!("a table of level 2 at byte {entry}, within a cluster")))
                };
            }
            if entry != 0 || absent >= wanted {
                break;
            }
        }
        Ok(Err(absent))
    }

    /// What one entry of level 2 says about byte `within` of its cluster, and for how many bytes.
    fn cell(&self, entry: &[u8], within: u64) -> Result<(Cell, u64)> {
        let fields = Fields::new("a table of level 2", entry);
        let word = fields.be64(0)?;
        let rest = self.header.cluster() - within;
        if word & ENTRY_PACKED != 0 {
            if self.header.data_file {
                return Err(Error::integrity("a compressed cluster in an image with a separate data file"));
            }
            return Ok((Cell::Packed(word), rest));
        }
        let host = word & ENTRY_OFFSET;
        if !host.is_multiple_of(self.header.cluster()) {
            return Err(Error::integrity(format!("a cluster at byte {host}, within another")));
        }
        // In a separate data file the first cluster has offset 0 like one that is absent, and a mark.
        let present = host != 0 || (self.header.data_file && word & ENTRY_COPIED != 0);
        if self.header.extended {
            return self.subclusters(fields.be64(8)?, present.then_some(host), within);
        }
        match (word & ENTRY_ZERO != 0, present) {
            (true, _) if self.header.version < 3 => {
                Err(Error::integrity("a cluster marked as zero in an image of version 2"))
            }
            (true, _) => Ok((Cell::Zero, rest)),
            (false, true) => Ok((Cell::Data(host + within), rest)),
            (false, false) => Ok((Cell::Absent, rest)),
        }
    }

    /// As [`Qcow2::cell`], by the bitmap of an extended entry: 32 bits say what is there, 32 what is zero.
    fn subclusters(&self, bitmap: u64, host: Option<u64>, within: u64) -> Result<(Cell, u64)> {
        let bits = self.header.cluster_bits - SUBCLUSTERS.trailing_zeros();
        let first = within >> bits;
        let state =
            |number: u64| (bitmap >> number & 1 != 0, bitmap >> (number + u64::from(SUBCLUSTERS)) & 1 != 0);
        let cell = match (state(first), host) {
            ((true, true), _) => return Err(Error::integrity("a subcluster both zero and not")),
            ((true, false), None) => {
                return Err(Error::integrity("a subcluster present in a cluster that is not"));
            }
            ((true, false), Some(host)) => Cell::Data(host + within),
            ((false, true), _) => Cell::Zero,
            ((false, false), _) => Cell::Absent,
        };
        let alike = (first..u64::from(SUBCLUSTERS))
            .take_while(|number| state(*number) == state(first))
            .count() as u64;
        Ok((cell, ((first + alike) << bits) - within))
    }
}

impl Map for Qcow2 {
    fn size(&self) -> u64 {
        self.header.size
    }

    fn devices(&self) -> &[Arc<dyn Blocks>] {
        &self.devices
    }

    fn place(&self, offset: u64, wanted: u64) -> Result<(Place, u64)> {
        let (cell, length) = match self.level1(offset, wanted)? {
            Err(absent) => (Cell::Absent, absent),
            Ok(table) => {
                let (cluster, size) = (self.header.cluster(), self.header.entry());
                let number = offset % self.header.covered() / cluster;
                let page = self.pages.from(table + number * size)?;
                let mut entries = page.bytes()[..].chunks_exact(bytes::index(size)?);
                let left_in_table = bytes::index(cluster / size - number)?;
                let mut entries = entries.by_ref().take(left_in_table);
                let first =
                    entries.next().ok_or_else(|| Error::integrity("a table of level 2 is cut short"))?;
                let (cell, mut length) = self.cell(first, offset % cluster)?;
                let mut whole = (offset + length).is_multiple_of(cluster);
                for entry in entries {
                    if length >= wanted || !whole {
                        break;
                    }
                    let (next, more) = self.cell(entry, 0)?;
                    if !cell.continues(length, next) {
                        break;
                    }
                    length += more;
                    whole = more == cluster;
                }
                (cell, length)
            }
        };
        Ok(match cell {
            Cell::Zero => (Place::Zero, length),
            Cell::Data(offset) => (Place::At { device: 0, offset }, length),
            Cell::Packed(packed) => {
                (Place::Packed { packed, skip: bytes::index(offset % self.header.cluster())? }, length)
            }
            Cell::Absent => match self.devices.get(1).map(|backing| backing.size().saturating_sub(offset)) {
                // The backing file may be shorter; behind its end all is zero.
                None | Some(0) => (Place::Hole, length),
                Some(left) => (Place::At { device: 1, offset }, length.min(left)),
            },
        })
    }

    fn unpack(&self, packed: u64) -> Result<Arc<[u8]>> {
        if let Some(whole) = self.unpacked.lock().unwrap_or_else(PoisonError::into_inner).get(&packed) {
            return Ok(whole);
        }
        let offset_bits = 62 - (self.header.cluster_bits - 8);
        let offset = packed & ((1 << offset_bits) - 1);
        let sectors = (packed & (ENTRY_PACKED - 1)) >> offset_bits;
        let length = (sectors + 1) * 512 - offset % 512;
        // The last sector may lie partly beyond the end of the file.
        let stored = bytes::read_up_to(&*self.base, offset, bytes::index(length)?)?;
        let mut whole = vec![0; bytes::index(self.header.cluster())?];
        match self.header.packing {
            Packing::Deflate => unpack::deflate(&stored, &mut whole)?,
            Packing::Zstd => unpack::zstd(&stored, &mut whole)?,
        }
        let whole: Arc<[u8]> = whole.into();
        self.unpacked.lock().unwrap_or_else(PoisonError::into_inner).put(packed, Arc::clone(&whole));
        Ok(whole)
    }
}
