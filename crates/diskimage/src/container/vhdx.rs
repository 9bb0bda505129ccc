//! VHDX, as Microsoft's MS-VHDX describes it. What its log holds is applied in memory; layers on another disk
//! (differencing disks) are refused.

mod log;

use std::sync::Arc;

use mainstay_core::{Blocks, Code, Error, Result};

use crate::bytes::{self, Fields};
use crate::checksum::crc32c;
use crate::mapped::{Map, Mapped, Place};
use crate::pages::Pages;
use crate::partition::guid;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// Where the two headers and the two region tables lie.
const HEADERS: [u64; 2] = [64 * KIB, 128 * KIB];
const REGIONS: [u64; 2] = [192 * KIB, 256 * KIB];
const HEADER: usize = 4096;
const TABLE: usize = 64 << 10;
/// Entries of a region or metadata table.
const ENTRIES_MAX: u64 = 2047;
const SIZE_MAX: u64 = 64 << 40;

const REGION_BLOCKS: &str = "2dc27766-f623-4200-9d64-115e9bfd4a08";
const REGION_METADATA: &str = "8b7ca206-4790-4b9a-b8fe-575f050f886e";
const ITEM_FILE: &str = "caa16737-fa36-4d43-b3b6-33f0aa44e76b";
const ITEM_SIZE: &str = "2fa54224-cd1b-4876-b211-5dbed83bf4b8";
const ITEM_SECTOR: &str = "8141bf1d-a96f-4709-ba47-f233a8faab5f";

pub(super) fn open(base: &Arc<dyn Blocks>) -> Result<Arc<dyn Blocks>> {
    let header = Header::newest(&**base)?;
    let patched = log::replay(base, &header)?;
    let (blocks, metadata) = regions(&*patched)?;
    let vhdx = Vhdx::new(Arc::clone(base), patched, &blocks, &metadata)?;
    Ok(Arc::new(Mapped(vhdx)))
}

/// What the newer of the two headers says about the log.
struct Header {
    log_id: [u8; 16],
    log: std::ops::Range<u64>,
}

impl Header {
    fn newest(base: &dyn Blocks) -> Result<Self> {
        let mut newest: Option<(u64, Self)> = None;
        for at in HEADERS {
            let bytes = bytes::read(base, at, HEADER)?;
            let fields = Fields::new("the VHDX header", &bytes);
            if fields.take(0, 4)? != b"head" || !sums(&bytes)? {
                continue;
            }
            let (version, log_version) = (fields.le16(66)?, fields.le16(64)?);
            if (version, log_version) != (1, 0) {
                return Err(Error::new(Code::Unsupported, format!("VHDX of version {version} is not read")));
            }
            let (sequence, start) = (fields.le64(8)?, fields.le64(72)?);
            let log = start..start.saturating_add(u64::from(fields.le32(68)?));
            if newest.as_ref().is_none_or(|(known, _)| *known < sequence) {
                newest = Some((sequence, Self { log_id: fields.array(48)?, log }));
            }
        }
        newest.map(|(_, header)| header).ok_or_else(|| Error::integrity("both headers are damaged"))
    }
}

/// Whether the checksum in bytes 4 to 8 is right.
fn sums(bytes: &[u8]) -> Result<bool> {
    let sum = Fields::new("a VHDX structure", bytes).le32(4)?;
    let mut summed = bytes.to_vec();
    summed[4..8].fill(0);
    Ok(crc32c(&summed) == sum)
}

/// A stretch of the file, in bytes.
struct Region {
    start: u64,
    length: u64,
}

/// Where the table of blocks and the metadata lie.
fn regions(base: &dyn Blocks) -> Result<(Region, Region)> {
    for at in REGIONS {
        let table = bytes::read(base, at, TABLE)?;
        let fields = Fields::new("the VHDX region table", &table);
        if fields.take(0, 4)? != b"regi" || !sums(&table)? {
            continue;
        }
        let (mut blocks, mut metadata) = (None, None);
        for number in 0..u64::from(fields.le32(8)?).min(ENTRIES_MAX) {
            let at = bytes::index(16 + number * 32)?;
            let region = Region { start: fields.le64(at + 16)?, length: u64::from(fields.le32(at + 24)?) };
            match guid(fields.array(at)?).as_str() {
                REGION_BLOCKS => blocks = Some(region),
                REGION_METADATA => metadata = Some(region),
                other if fields.le32(at + 28)? & 1 != 0 => {
                    return Err(Error::new(
                        Code::Unsupported,
                        format!("VHDX with a region {other} is not read"),
                    ));
                }
                _ => {}
            }
        }
        return blocks
            .zip(metadata)
            .ok_or_else(|| Error::integrity("a table of blocks or the metadata is missing"));
    }
    Err(Error::integrity("both region tables are damaged"))
}

/// The metadata that reading needs.
struct Metadata {
    block: u64,
    size: u64,
    sector: u64,
}

impl Metadata {
    fn read(base: &dyn Blocks, region: &Region) -> Result<Self> {
        let table = bytes::read(base, region.start, TABLE)?;
        let fields = Fields::new("the VHDX metadata", &table);
        if fields.take(0, 8)? != b"metadata" {
            return Err(Error::integrity("the metadata does not begin like metadata"));
        }
        let (mut file, mut size, mut sector) = (None, None, None);
        for number in 0..u64::from(fields.le16(10)?).min(ENTRIES_MAX) {
            let at = bytes::index(32 + number * 32)?;
            let (offset, length) = (u64::from(fields.le32(at + 16)?), u64::from(fields.le32(at + 20)?));
            let item = || {
                if offset + length > region.length {
                    return Err(Error::integrity("metadata beyond its region"));
                }
                bytes::read(base, region.start.saturating_add(offset), 8)
            };
            match guid(fields.array(at)?).as_str() {
                ITEM_FILE => file = Some(item()?),
                ITEM_SIZE => size = Some(Fields::new("the disk's size", &item()?).le64(0)?),
                ITEM_SECTOR => sector = Some(u64::from(Fields::new("the sector size", &item()?).le32(0)?)),
                _ => {}
            }
        }
        let (Some(file), Some(size), Some(sector)) = (file, size, sector) else {
            return Err(Error::integrity("the metadata is incomplete"));
        };
        let file = Fields::new("the VHDX file parameters", &file);
        if file.le32(4)? & 2 != 0 {
            return Err(Error::new(Code::Unsupported, "VHDX disks that are a layer on another are not read")
                .hint("Merge the layers on the Hyper-V host first: `Merge-VHD`."));
        }
        let block = u64::from(file.le32(0)?);
        let fits =
            block.is_power_of_two() && (MIB..=256 * MIB).contains(&block) && matches!(sector, 512 | 4096);
        if !fits || size > SIZE_MAX || !size.is_multiple_of(sector) {
            return Err(Error::integrity(format!(
                "{size} bytes in blocks of {block} and sectors of {sector}"
            )));
        }
        Ok(Self { block, size, sector })
    }
}

struct Vhdx {
    pages: Pages,
    devices: [Arc<dyn Blocks>; 1],
    metadata: Metadata,
    /// Where the table of blocks begins.
    table: u64,
    /// Blocks between two entries about sector bitmaps, which only layers have a use for.
    ratio: u64,
}

impl Vhdx {
    fn new(
        base: Arc<dyn Blocks>,
        patched: Arc<dyn Blocks>,
        blocks: &Region,
        metadata: &Region,
    ) -> Result<Self> {
        let metadata = Metadata::read(&*patched, metadata)?;
        let ratio = (metadata.sector << 23) / metadata.block;
        let count = metadata.size.div_ceil(metadata.block);
        let entries = count + count.saturating_sub(1) / ratio;
        let end = blocks.start.checked_add(entries * 8);
        if entries * 8 > blocks.length || end.is_none_or(|end| end > patched.size()) {
            return Err(Error::integrity(format!("a table of {} bytes for {count} blocks", blocks.length)));
        }
        Ok(Self { pages: Pages::new(patched), devices: [base], metadata, table: blocks.start, ratio })
    }
}

impl Map for Vhdx {
    fn size(&self) -> u64 {
        self.metadata.size
    }

    fn devices(&self) -> &[Arc<dyn Blocks>] {
        &self.devices
    }

    fn place(&self, offset: u64, _wanted: u64) -> Result<(Place, u64)> {
        let (number, within) = (offset / self.metadata.block, offset % self.metadata.block);
        let page = self.pages.from(self.table + (number + number / self.ratio) * 8)?;
        let entry = Fields::new("the table of blocks", page.bytes()).le64(0)?;
        let place = match entry & 7 {
            0 | 1 | 3 => Place::Hole,
            2 => Place::Zero,
            6 => Place::At { device: 0, offset: (entry >> 20 << 20) + within },
            state => return Err(Error::integrity(format!("block {number} is in the state {state}"))),
        };
        Ok((place, self.metadata.block - within))
    }
}
