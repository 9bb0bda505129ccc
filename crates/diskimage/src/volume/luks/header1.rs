//! The header of LUKS 1 (LUKS On-Disk Format Specification 1.2.3): big-endian fields, eight slots.

use mainstay_core::{Blocks, Error, Result};

use super::cipher::Kind;
use super::{Check, Derivation, Hash, KEY_MAX, Luks, SECTOR, Slot};
use crate::bytes::{self, Fields};

const SLOTS: usize = 8;
const ENABLED: u32 = 0x00AC_71F3;

pub(super) fn read(blocks: &dyn Blocks, head: &[u8]) -> Result<Luks> {
    let fields = Fields::new("the LUKS header", head);
    let kind = Kind::named(&format!("{}-{}", fields.text(8, 32)?, fields.text(40, 32)?))?;
    let hash = Hash::named(&fields.text(72, 32)?)?;
    let start = u64::from(fields.be32(104)?) * SECTOR;
    let key = bytes::index(u64::from(fields.be32(108)?))?;
    if start == 0 || start > blocks.size() || key > KEY_MAX {
        return Err(Error::integrity(format!("data at byte {start} under a key of {key} bytes")));
    }
    let mut slots = Vec::new();
    for number in 0..SLOTS {
        let at = 208 + number * 48;
        if fields.be32(at)? != ENABLED {
            continue;
        }
        slots.push(Slot {
            derivation: Derivation::Pbkdf2 {
                hash,
                rounds: fields.be32(at + 4)?,
                salt: fields.take(at + 8, 32)?.to_vec(),
            },
            offset: u64::from(fields.be32(at + 40)?) * SECTOR,
            kind,
            wrap: key,
            key,
            spread: fields.be32(at + 44)?,
            spread_hash: hash,
        });
    }
    Ok(Luks {
        uuid: fields.text(168, 40)?.to_lowercase(),
        label: None,
        slots,
        check: Check {
            hash,
            rounds: fields.be32(164)?,
            salt: fields.take(132, 32)?.to_vec(),
            digest: fields.take(112, 20)?.to_vec(),
        },
        data: start..whole_sectors(start, blocks.size(), SECTOR),
        kind,
        sector: SECTOR,
        tweak: 0,
    })
}

/// The end of the last whole sector from `start` on.
pub(super) fn whole_sectors(start: u64, end: u64, sector: u64) -> u64 {
    start + (end - start) / sector * sector
}
