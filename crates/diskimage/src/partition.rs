//! Partition tables: MBR with logical partitions, and GPT (UEFI specification, section 5), from its backup when the
//! primary is damaged.

use std::ops::Range;

use mainstay_core::{Blocks, Error, Result};

use crate::bytes::{self, Fields};
use crate::checksum::crc32;

mod refit;

pub use refit::{Refit, refit};

/// Of MBR; GPT may count in sectors of 4096.
const SECTOR: u64 = 512;
/// Entries of a GPT, and its bytes; common are 128 and 16 KiB.
const GPT_ENTRIES_MAX: u32 = 4096;
const GPT_TABLE_MAX: u64 = 2 << 20;
/// Logical partitions that are followed.
const LOGICAL_MAX: u32 = 256;

const MBR_PROTECTIVE: u8 = 0xEE;
const MBR_EXTENDED: [u8; 3] = [0x05, 0x0F, 0x85];

/// What a disk is divided into.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    pub kind: TableKind,
    /// In the order of the table; the numbers are those that Linux gives.
    pub partitions: Vec<Partition>,
    /// What is damaged or odd, each a sentence.
    pub notes: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TableKind {
    /// None: the disk as a whole is one volume.
    #[default]
    Whole,
    Mbr,
    Gpt,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// From 1; logical partitions from 5.
    pub number: u32,
    /// In bytes of the disk, not beyond its end.
    pub range: Range<u64>,
    pub kind: PartitionKind,
    /// The name in the GPT.
    pub label: Option<String>,
    /// Of the partition itself, not of the file system on it; lower case.
    pub uuid: Option<String>,
}

/// What the table says is in a partition. Installers often say something else than what is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PartitionKind {
    Mbr(u8),
    /// The type as a lower-case UUID.
    Gpt(String),
}

/// Reads the partition table of a disk.
///
/// Damage that leaves nothing to read is a note and no partitions; only reading itself fails.
pub fn partitions(disk: &dyn Blocks) -> Result<Table> {
    if disk.size() < SECTOR {
        return Ok(Table::default());
    }
    let sector = bytes::read(disk, 0, bytes::index(SECTOR)?)?;
    let entries = mbr_entries(&sector)?;
    let protective = entries.iter().flatten().any(|entry| entry.kind == MBR_PROTECTIVE);
    let mut notes = Vec::new();
    if protective || entries.iter().all(Option::is_none) {
        if let Some(table) = gpt(disk, &mut notes)? {
            return Ok(table);
        }
        if protective {
            notes.push("The disk should have a GPT, but neither of its two copies can be read.".into());
        }
    }
    let mut partitions = Vec::new();
    if !looks_like_a_file_system(&sector)? && plausible(&entries, disk.size()) {
        for (number, entry) in (1..).zip(&entries) {
            let Some(entry) = entry.as_ref().filter(|entry| entry.kind != MBR_PROTECTIVE) else { continue };
            if MBR_EXTENDED.contains(&entry.kind) {
                logical(disk, entry.start, &mut partitions, &mut notes)?;
            } else {
                add(disk, number, entry, 0, &mut partitions, &mut notes);
            }
        }
        partitions.sort_by_key(|partition| partition.number);
        if let Some(signature) = sector.get(440..444).filter(|signature| **signature != [0; 4]) {
            let signature = u32::from_le_bytes([signature[0], signature[1], signature[2], signature[3]]);
            for partition in &mut partitions {
                partition.uuid = Some(format!("{signature:08x}-{:02x}", partition.number));
            }
        }
    }
    let kind = if partitions.is_empty() { TableKind::Whole } else { TableKind::Mbr };
    Ok(Table { kind, partitions, notes })
}

/// An entry of an MBR, in sectors relative to where its kind counts from.
struct MbrEntry {
    active: u8,
    kind: u8,
    start: u64,
    sectors: u64,
}

/// The four entries; all `None` without the signature at the end.
fn mbr_entries(sector: &[u8]) -> Result<[Option<MbrEntry>; 4]> {
    let fields = Fields::new("the MBR", sector);
    let mut entries = [const { None }; 4];
    if fields.be16(510)? != 0x55AA {
        return Ok(entries);
    }
    for (at, entry) in (446..).step_by(16).zip(&mut entries) {
        let [active, _, _, _, kind] = fields.array(at)?;
        let (start, sectors) = (u64::from(fields.le32(at + 8)?), u64::from(fields.le32(at + 12)?));
        *entry = (kind != 0 && sectors != 0).then_some(MbrEntry { active, kind, start, sectors });
    }
    Ok(entries)
}

/// Boot sectors of file systems end like an MBR, with code where the entries would be.
fn plausible(entries: &[Option<MbrEntry>; 4], size: u64) -> bool {
    entries
        .iter()
        .flatten()
        .all(|entry| entry.active & 0x7F == 0 && entry.start != 0 && entry.start * SECTOR < size)
}

/// Whether the first sector is that of FAT, exFAT or NTFS on the whole disk.
fn looks_like_a_file_system(sector: &[u8]) -> Result<bool> {
    let fields = Fields::new("the boot sector", sector);
    let jump: [u8; 3] = fields.array(0)?;
    if !matches!(jump, [0xEB, _, 0x90] | [0xE9, _, _]) {
        return Ok(false);
    }
    let name: [u8; 8] = fields.array(3)?;
    let [per_cluster, reserved_low, reserved_high, fats] = fields.array(13)?;
    let fat = matches!(fields.le16(11)?, 512 | 1024 | 2048 | 4096)
        && per_cluster.is_power_of_two()
        && (reserved_low, reserved_high) != (0, 0)
        && (1..=2).contains(&fats);
    Ok(fat || &name == b"NTFS    " || &name == b"EXFAT   ")
}

fn add(
    disk: &dyn Blocks,
    number: u32,
    entry: &MbrEntry,
    from: u64,
    partitions: &mut Vec<Partition>,
    notes: &mut Vec<String>,
) {
    let start = (from + entry.start) * SECTOR;
    let kind = PartitionKind::Mbr(entry.kind);
    let partition =
        Partition { number, range: start..start + entry.sectors * SECTOR, kind, label: None, uuid: None };
    partitions.extend(fit(disk, partition, notes));
}

/// Partitions that reach beyond the end of the disk are cut there; those wholly beyond it are left out.
fn fit(disk: &dyn Blocks, mut partition: Partition, notes: &mut Vec<String>) -> Option<Partition> {
    let (number, size) = (partition.number, disk.size());
    if partition.range.start >= size {
        notes.push(format!("Partition {number} lies beyond the end of the disk and is left out."));
        return None;
    }
    if partition.range.end > size {
        notes.push(format!(
            "Partition {number} reaches beyond the end of the disk; the disk may be cut short."
        ));
        partition.range.end = size;
    }
    Some(partition)
}

/// Follows the chain of an extended partition: each link tells of one partition and of the next link.
fn logical(
    disk: &dyn Blocks,
    first: u64,
    partitions: &mut Vec<Partition>,
    notes: &mut Vec<String>,
) -> Result<()> {
    let mut seen = Vec::new();
    let (mut link, mut number) =
        (first, 5 + partitions.iter().filter(|known| known.number >= 5).count() as u32);
    loop {
        if (link + 1) * SECTOR > disk.size() || seen.contains(&link) || seen.len() as u32 >= LOGICAL_MAX {
            notes.push(
                "The chain of logical partitions is damaged; those behind the damage are left out.".into(),
            );
            return Ok(());
        }
        seen.push(link);
        let entries = mbr_entries(&bytes::read(disk, link * SECTOR, bytes::index(SECTOR)?)?)?;
        let is_link = |entry: &&MbrEntry| MBR_EXTENDED.contains(&entry.kind);
        for entry in entries.iter().flatten().filter(|entry| !is_link(entry)).take(1) {
            add(disk, number, entry, link, partitions, notes);
            number += 1;
        }
        match entries.iter().flatten().find(is_link) {
            Some(next) => link = first + next.start,
            None => return Ok(()),
        }
    }
}

/// A GPT by its primary copy, or by the one at the end of the disk. `None` when there is neither.
fn gpt(disk: &dyn Blocks, notes: &mut Vec<String>) -> Result<Option<Table>> {
    let mut trouble = Vec::new();
    for sector in [SECTOR, 4096] {
        let last = (disk.size() / sector).saturating_sub(1);
        for (name, header) in [("first", 1), ("last", last)] {
            match gpt_at(disk, sector, header) {
                Ok(None) => {}
                Ok(Some(mut table)) => {
                    if name == "last" {
                        table
                            .notes
                            .push("The GPT at the start of the disk is damaged; its backup was read.".into());
                    }
                    table.notes.append(notes);
                    return Ok(Some(table));
                }
                Err(error) if error.code() == mainstay_core::Code::Integrity => {
                    trouble.push(format!("The {name} copy of the GPT is damaged: {error}."));
                }
                Err(error) => return Err(error),
            }
        }
    }
    notes.append(&mut trouble);
    Ok(None)
}

/// The GPT with its header in sector number `header`; `None` without its signature.
fn gpt_at(disk: &dyn Blocks, sector: u64, header: u64) -> Result<Option<Table>> {
    if header == 0 || (header + 1) * sector > disk.size() {
        return Ok(None);
    }
    let bytes = bytes::read(disk, header * sector, bytes::index(sector)?)?;
    let fields = Fields::new("the GPT header", &bytes);
    if fields.take(0, 8)? != b"EFI PART" {
        return Ok(None);
    }
    let length = bytes::index(u64::from(fields.le32(12)?))?;
    if length < 92 {
        return Err(Error::integrity(format!("a header of {length} bytes")));
    }
    let mut summed = fields.take(0, length)?.to_vec();
    summed[16..20].fill(0);
    if crc32(&summed) != fields.le32(16)? {
        return Err(Error::integrity("the header's checksum is wrong"));
    }
    let (start, entries, entry) = (fields.le64(72)?, fields.le32(80)?, fields.le32(84)?);
    let length = u64::from(entries) * u64::from(entry);
    if entries > GPT_ENTRIES_MAX || length > GPT_TABLE_MAX || entry < 128 {
        return Err(Error::integrity(format!("a table of {entries} entries of {entry} bytes")));
    }
    let start = start.checked_mul(sector).filter(|start| start.saturating_add(length) <= disk.size());
    let start = start.ok_or_else(|| Error::integrity("the table lies beyond the end of the disk"))?;
    let table = bytes::read(disk, start, bytes::index(length)?)?;
    if crc32(&table) != fields.le32(88)? {
        return Err(Error::integrity("the table's checksum is wrong"));
    }
    let mut found = Table { kind: TableKind::Gpt, ..Table::default() };
    for (number, entry) in (1..).zip(table.chunks_exact(bytes::index(u64::from(entry))?)) {
        let partition = gpt_entry(number, &Fields::new("a GPT entry", entry), sector);
        match partition {
            Ok(Some(partition)) => found.partitions.extend(fit(disk, partition, &mut found.notes)),
            Ok(None) => {}
            Err(error) => found.notes.push(format!("Partition {number} is left out: {error}.")),
        }
    }
    Ok(Some(found))
}

fn gpt_entry(number: u32, fields: &Fields<'_>, sector: u64) -> Result<Option<Partition>> {
    let kind = fields.array(0)?;
    if kind == [0; 16] {
        return Ok(None);
    }
    let (first, last) = (fields.le64(32)?, fields.le64(40)?);
    let start = first.checked_mul(sector);
    let end = last.checked_add(1).and_then(|end| end.checked_mul(sector));
    let range = match (start, end) {
        (Some(start), Some(end)) if start < end => start..end,
        _ => return Err(Error::integrity(format!("it reaches from sector {first} to {last}"))),
    };
    let name: Vec<u16> =
        fields.take(56, 72)?.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).collect();
    let label = String::from_utf16_lossy(name.split(|unit| *unit == 0).next().unwrap_or_default());
    Ok(Some(Partition {
        number,
        range,
        kind: PartitionKind::Gpt(guid(kind)),
        label: Some(label).filter(|label| !label.is_empty()),
        uuid: Some(guid(fields.array(16)?)),
    }))
}

/// A GUID as Microsoft and UEFI store it: the first three groups are little-endian numbers.
pub(crate) fn guid(bytes: [u8; 16]) -> String {
    let [a0, a1, a2, a3, b0, b1, c0, c1, d0, d1, e @ ..] = bytes;
    let tail: String = e.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "{:08x}-{:04x}-{:04x}-{d0:02x}{d1:02x}-{tail}",
        u32::from_le_bytes([a0, a1, a2, a3]),
        u16::from_le_bytes([b0, b1]),
        u16::from_le_bytes([c0, c1])
    )
}
