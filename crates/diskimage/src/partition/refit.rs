//! Making the content of one disk fit another of a different size.

use mainstay_core::{Blocks, Code, Error, Result};

use super::{GPT_TABLE_MAX, SECTOR, TableKind, partitions};
use crate::bytes::{self, Fields};
use crate::checksum::crc32;

/// What to write on a disk of another size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refit {
    /// So many bytes of the old disk are copied.
    pub copied: u64,
    /// Bytes to write over them afterwards, and where.
    pub patches: Vec<(u64, Vec<u8>)>,
}

/// Moves the backup of a GPT to the end of a disk of `size` bytes. Partitions stay as they are.
///
/// Errors: [`Code::Refused`] when a partition, or a disk without a table, does not fit; [`Code::Integrity`] when the GPT
/// cannot be read well enough to write it anew.
pub fn refit(disk: &dyn Blocks, size: u64) -> Result<Refit> {
    if size == disk.size() {
        return Ok(Refit { copied: size, patches: Vec::new() });
    }
    let table = partitions(disk)?;
    let end = match table.kind {
        TableKind::Whole => disk.size(),
        TableKind::Mbr | TableKind::Gpt => {
            table.partitions.iter().map(|partition| partition.range.end).max().unwrap_or(SECTOR)
        }
    };
    let room = if table.kind == TableKind::Gpt { 33 * SECTOR } else { 0 };
    if end.saturating_add(room) > size {
        let what = format!("what is on the disk reaches to byte {end}, and the new disk has only {size}");
        return Err(Error::new(Code::Refused, what)
            .hint("choose a disk that is large enough, or make the last file system and its partition smaller first"));
    }
    let patches = if table.kind == TableKind::Gpt { move_backup(disk, size)? } else { Vec::new() };
    Ok(Refit { copied: disk.size().min(size), patches })
}

/// A GPT as it stands at the start of a disk.
struct Gpt {
    sector: u64,
    header: Vec<u8>,
    entries: Vec<u8>,
    /// First sector of the entries.
    entries_at: u64,
}

fn read_gpt(disk: &dyn Blocks) -> Result<Gpt> {
    for sector in [SECTOR, 4096] {
        if disk.size() < 4 * sector {
            continue;
        }
        let header = bytes::read(disk, sector, bytes::index(sector)?)?;
        let fields = Fields::new("the GPT header", &header);
        let length = bytes::index(u64::from(fields.le32(12)?))?;
        if fields.take(0, 8)? != b"EFI PART" || !(92..=header.len()).contains(&length) {
            continue;
        }
        let table = u64::from(fields.le32(80)?) * u64::from(fields.le32(84)?);
        let entries_at = fields.le64(72)?;
        let start = entries_at.checked_mul(sector).filter(|_| table <= GPT_TABLE_MAX);
        let start = start.ok_or_else(|| Error::integrity("the GPT has an impossible table"))?;
        let entries = bytes::read(disk, start, bytes::index(table)?)?;
        return Ok(Gpt { sector, header, entries, entries_at });
    }
    Err(Error::integrity(
        "the first copy of the GPT cannot be read, so it cannot be written for another size",
    )
    .hint("repair it on a disk of the old size first, with sgdisk or gdisk"))
}

fn move_backup(disk: &dyn Blocks, size: u64) -> Result<Vec<(u64, Vec<u8>)>> {
    let Gpt { sector, header, entries, entries_at } = read_gpt(disk)?;
    let last = (size / sector).saturating_sub(1);
    let table_sectors = (entries.len() as u64).div_ceil(sector);
    let backup_at = last.saturating_sub(table_sectors);
    let sealed = |my: u64, other: u64, table: u64| -> Result<Vec<u8>> {
        let mut copy = header.clone();
        let mut put = |at: usize, value: &[u8]| {
            if let Some(field) = copy.get_mut(at..at + value.len()) {
                field.copy_from_slice(value);
            }
        };
        put(16, &[0; 4]);
        put(24, &my.to_le_bytes());
        put(32, &other.to_le_bytes());
        put(48, &backup_at.saturating_sub(1).to_le_bytes());
        put(72, &table.to_le_bytes());
        put(88, &crc32(&entries).to_le_bytes());
        let length = bytes::index(u64::from(Fields::new("the GPT header", &copy).le32(12)?))?;
        let sum = crc32(copy.get(..length).unwrap_or_default());
        if let Some(field) = copy.get_mut(16..20) {
            field.copy_from_slice(&sum.to_le_bytes());
        }
        Ok(copy)
    };
    // The protective MBR tells old tools how much of the disk is taken.
    let covered = u32::try_from(last).unwrap_or(u32::MAX);
    Ok(vec![
        (458, covered.to_le_bytes().to_vec()),
        (sector, sealed(1, last, entries_at)?),
        (backup_at * sector, entries.clone()),
        (last * sector, sealed(last, 1, backup_at)?),
    ])
}
