//! The directory of a group: which chunk lies in which slot. Sealed under the index key of the domain, stored
//! at the end of the pack, and copied along with the group.
//!
//! The slots of a group number its chunks from 0 in the order of the stream, across its segments.

use std::ops::Range;

use mainstay_core::{DomainId, Error, Result};

use crate::codec::{Decoder, Encode as _};
use crate::cut::ChunkId;
use crate::format::segment::{GroupId, RAW_BYTES_MAX};
use crate::keys::FamilyId;
use crate::seal::{self, SealKey, Siv};

const MAGIC: &[u8; 4] = b"MSdi";
const VERSION: u8 = 1;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Directory {
    /// Id and length in bytes, by slot.
    chunks: Vec<(ChunkId, u32)>,
    /// By segment ordinal: the slot after its last.
    segment_ends: Vec<u32>,
}

/// Where a chunk lies inside its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) ordinal: u32,
    /// Byte offset in the opened segment.
    pub(crate) offset: u32,
    pub(crate) length: u32,
}

impl Directory {
    /// Appends a chunk to the segment under way and returns its slot.
    pub(crate) fn push(&mut self, id: ChunkId, length: u32) -> u32 {
        self.chunks.push((id, length));
        self.chunks.len() as u32 - 1
    }

    /// Ends the segment under way.
    pub(crate) fn end_segment(&mut self) {
        self.segment_ends.push(self.chunks.len() as u32);
    }

    pub(crate) fn segments(&self) -> u32 {
        self.segment_ends.len() as u32
    }

    pub(crate) fn chunk(&self, slot: u32) -> Option<&(ChunkId, u32)> {
        self.chunks.get(slot as usize)
    }

    pub(crate) fn chunks(&self) -> &[(ChunkId, u32)] {
        &self.chunks
    }

    /// The slots of one segment.
    pub(crate) fn slots_of(&self, ordinal: u32) -> Option<Range<u32>> {
        let end = *self.segment_ends.get(ordinal as usize)?;
        let start = match ordinal.checked_sub(1) {
            Some(before) => *self.segment_ends.get(before as usize)?,
            None => 0,
        };
        Some(start..end)
    }

    /// The segment that holds `slot`. A slot of the segment under way belongs to the next ordinal.
    pub(crate) fn ordinal_of(&self, slot: u32) -> u32 {
        self.segment_ends.partition_point(|end| *end <= slot) as u32
    }

    pub(crate) fn place(&self, slot: u32) -> Option<Place> {
        let (_, length) = self.chunk(slot)?;
        let ordinal = self.ordinal_of(slot);
        let slots = self.slots_of(ordinal)?;
        let before = self.chunks.get(slots.start as usize..slot as usize)?;
        let offset = before.iter().map(|(_, length)| *length).sum();
        Some(Place { ordinal, offset, length: *length })
    }

    /// Rough bytes of memory.
    pub(crate) fn weight(&self) -> usize {
        self.chunks.len() * size_of::<(ChunkId, u32)>() + self.segment_ends.len() * 4
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(8 + self.chunks.len() * 35);
        out.varint(self.segment_ends.len() as u64);
        let mut start = 0;
        for end in &self.segment_ends {
            let chunks = self.chunks.get(start as usize..*end as usize).unwrap_or_default();
            out.varint(chunks.len() as u64);
            for (id, length) in chunks {
                out.fixed(&id.0);
                out.varint(u64::from(*length));
            }
            start = *end;
        }
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        let mut input = Decoder::new("directory", bytes);
        let mut directory = Self::default();
        for _ in 0..input.count(1)? {
            let mut raw = 0_usize;
            for _ in 0..input.count(33)? {
                let id = ChunkId(input.array()?);
                let length = input.varint_u32()?;
                raw = raw.saturating_add(length as usize);
                if length == 0 || raw > RAW_BYTES_MAX {
                    return Err(input.malformed("a segment has an impossible length"));
                }
                directory.push(id, length);
            }
            directory.end_segment();
        }
        input.later_fields()?;
        Ok(directory)
    }
}

fn associated_data(family: &FamilyId, domain: &DomainId, group: &GroupId) -> Vec<u8> {
    let mut data = b"mainstay directory 1".to_vec();
    data.fixed(&family.0);
    data.fixed(&domain.0);
    data.fixed(&group.0);
    data
}

/// The directory as a block of a pack.
pub(crate) fn seal_directory(
    index_key: &SealKey,
    family: &FamilyId,
    domain: &DomainId,
    group: &GroupId,
    directory: &Directory,
) -> Result<Vec<u8>> {
    let mut message = directory.encode();
    let siv = seal::seal(index_key, &associated_data(family, domain, group), &mut message)?;
    let mut out = Vec::with_capacity(53 + message.len());
    out.fixed(MAGIC);
    out.u8(VERSION);
    out.fixed(&group.0);
    out.fixed(&siv.0);
    out.fixed(&message);
    Ok(out)
}

/// Opens the directory of exactly this group.
pub(crate) fn open_directory(
    index_key: &SealKey,
    family: &FamilyId,
    domain: &DomainId,
    group: &GroupId,
    block: &[u8],
) -> Result<Directory> {
    let mut input = Decoder::new("directory", block);
    input.expect(MAGIC)?;
    if input.u8()? != VERSION {
        return Err(input.malformed("its version is not 1"));
    }
    if input.id()? != *group {
        return Err(Error::integrity(format!("the directory of group {group} belongs to another group")));
    }
    let siv = Siv(input.array()?);
    let mut message = input.take(input.remaining())?.to_vec();
    seal::open(index_key, &associated_data(family, domain, group), &siv, &mut message)
        .map_err(|error| error.during(format!("cannot open the directory of group {group}")))?;
    Directory::decode(&message)
}

#[cfg(test)]
mod tests {
    use super::{Directory, Place, open_directory, seal_directory};
    use crate::cut::ChunkId;
    use crate::hostile::feed;
    use crate::keys::FamilyId;
    use crate::seal::SealKey;
    use mainstay_core::Id16;

    fn directory() -> Directory {
        let mut directory = Directory::default();
        for segment in 0..3 {
            for chunk in 0..4_u8 {
                directory.push(ChunkId([segment * 4 + chunk; 32]), 10 + u32::from(chunk));
            }
            directory.end_segment();
        }
        directory
    }

    #[test]
    fn places_chunks_in_their_segments() {
        let directory = directory();
        assert_eq!(directory.place(0), Some(Place { ordinal: 0, offset: 0, length: 10 }));
        assert_eq!(directory.place(6), Some(Place { ordinal: 1, offset: 21, length: 12 }));
        assert_eq!(directory.place(12), None);
        assert_eq!(directory.slots_of(2), Some(8..12));
    }

    #[test]
    fn round_trips_sealed_and_refuses_another_group() {
        let key = SealKey::random().unwrap();
        let (family, domain, group) = (FamilyId([1; 32]), Id16([2; 16]), Id16([3; 16]));
        let block = seal_directory(&key, &family, &domain, &group, &directory()).unwrap();
        assert_eq!(open_directory(&key, &family, &domain, &group, &block).unwrap(), directory());
        for index in 0..block.len() {
            let mut bad = block.clone();
            bad[index] ^= 1;
            assert!(open_directory(&key, &family, &domain, &group, &bad).is_err(), "byte {index}");
        }
        assert!(open_directory(&key, &family, &domain, &Id16([4; 16]), &block).is_err());
    }

    #[test]
    fn hostile_directories_are_errors() {
        feed(&directory().encode(), 1 << 20, |bytes| {
            if let Ok(directory) = Directory::decode(bytes) {
                for slot in 0..20 {
                    directory.place(slot);
                }
            }
        });
    }
}
