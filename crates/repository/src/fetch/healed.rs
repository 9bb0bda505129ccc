//! Packs that are damaged and yet whole: what their parity, or the footer before it, makes good. Found when a read fails
//! and not before, so whoever restores gets the right bytes and `verify` is who says what should be written anew.

use std::sync::Arc;

use mainstay_core::{Code, Error, Result};

use super::Fetch;
use crate::format::pack::{Block, Footer, PackId, TRAILERS_BYTES, Trailer, block_digest};
use crate::names;

/// Repaired packs that are kept, by their bytes.
pub(super) const HEALED_BYTES: usize = 64 << 20;
/// No longer pack is read into memory: none that Mainstay writes comes near.
const PACK_BYTES_MAX: u64 = 512 << 20;

/// `None` when a pack cannot be repaired.
pub(super) type Healed = Option<Arc<Vec<u8>>>;

impl Fetch {
    /// A block that the pack's parity makes good; `damage` is what is wrong with the stored one.
    pub(super) fn healed_block(&self, pack: &PackId, block: &Block, damage: Error) -> Result<Vec<u8>> {
        let Some(healed) = self.healed(pack)? else { return Err(damage) };
        let (start, length) = (block.offset as usize, block.length as usize);
        let bytes = healed.get(start..start + length).filter(|bytes| block_digest(bytes) == block.digest);
        bytes.map(<[u8]>::to_vec).ok_or(damage)
    }

    /// The protected bytes of a pack as they were, or `None` when they cannot be had.
    pub(crate) fn healed(&self, pack: &PackId) -> Result<Healed> {
        self.healed.get_or(pack, || {
            let footer = self.footer(pack)?;
            let (Some(parity), Some((length, hash))) = (&footer.parity, self.entry(pack)) else {
                return Ok((None, 1));
            };
            let bytes = self.whole(pack, length)?;
            // The third footer says where the others were.
            let Some((trailer, _)) = Trailer::search(&bytes, length, &hash) else { return Ok((None, 1)) };
            match parity.repair(&bytes, trailer.footer_offset) {
                Ok(repaired) => {
                    let weight = repaired.len();
                    Ok((Some(Arc::new(repaired)), weight))
                }
                Err(error) if error.code() == Code::Integrity => Ok((None, 1)),
                Err(error) => Err(error),
            }
        })
    }

    /// The footer of a pack whose end is damaged.
    pub(super) fn searched_footer(&self, pack: &PackId, damage: Error) -> Result<(Trailer, Footer)> {
        let Some((length, hash)) = self.entry(pack) else { return Err(damage) };
        Trailer::search(&self.whole(pack, length)?, length, &hash).ok_or(damage)
    }

    /// What there is of a pack, without what may follow its end.
    fn whole(&self, pack: &PackId, length: u64) -> Result<Vec<u8>> {
        let name = names::pack(pack);
        let stored = self.shared.store.size(&name)?.min(length);
        if stored > PACK_BYTES_MAX {
            return Err(Error::integrity(format!("pack {pack} is too long to be repaired")));
        }
        self.shared.store.get(&name, 0..stored)
    }

    /// Whether every block of the pack, its parity and its end are as they were written, by themselves.
    pub(crate) fn is_as_written(&self, pack: &PackId) -> Result<bool> {
        let Some((length, hash)) = self.entry(pack) else { return Ok(false) };
        let (name, store) = (names::pack(pack), self.shared.store.as_ref());
        let check = || -> Result<bool> {
            let footer = self.stored_footer(pack, length, &hash)?.1;
            footer.blocks.iter().try_for_each(|block| self.stored_block(pack, block).map(drop))?;
            let Some(parity) = &footer.parity else { return Ok(true) };
            let tail = store.get(&name, length.saturating_sub(TRAILERS_BYTES as u64)..length)?;
            let trailer = Trailer::find(&tail, length, &hash)?;
            let third = store.get(&name, parity.covered()..parity.shards(trailer.footer_offset).start)?;
            let shards = store.get(&name, parity.shards(trailer.footer_offset))?;
            Ok(parity.damaged_parity(&shards) == 0 && Trailer::search(&third, length, &hash).is_some())
        };
        match check() {
            Err(error) if matches!(error.code(), Code::Integrity | Code::NotFound) => Ok(false),
            other => other,
        }
    }
}
