//! Which chunks the repository holds, and where: a table in memory, built from the index runs of one domain.
//!
//! An entry is a 64-bit tag, a group and a slot. A tag only suggests: the directory of the group has the whole
//! id, and it is compared before a reference is trusted.

use mainstay_core::{DomainId, Error, Id16, Result};

use crate::codec::{Decoder, Encode as _};
use crate::format::segment::{Class, GroupId};
use crate::keys::FamilyId;
use crate::seal::{self, SealKey, Siv};

const MAGIC: &[u8; 4] = b"MSix";
const VERSION: u16 = 1;
/// No run is longer.
pub(crate) const RUN_BYTES_MAX: u64 = 1 << 30;

/// The first eight bytes of a chunk or page id.
pub(crate) fn tag(id: &[u8; 32]) -> u64 {
    let mut tag = [0; 8];
    tag.copy_from_slice(&id[..8]);
    u64::from_le_bytes(tag)
}

/// The tags of one group, in the order of its slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GroupTags {
    pub(crate) group: GroupId,
    pub(crate) class: Class,
    pub(crate) tags: Vec<u64>,
}

fn associated_data(family: &FamilyId, domain: &DomainId, run: &Id16) -> Vec<u8> {
    let mut data = b"mainstay index run 1".to_vec();
    data.fixed(&family.0);
    data.fixed(&domain.0);
    data.fixed(&run.0);
    data
}

pub(crate) fn seal_run(
    index_key: &SealKey,
    family: &FamilyId,
    domain: &DomainId,
    run: &Id16,
    groups: &[GroupTags],
) -> Result<Vec<u8>> {
    let mut message = Vec::new();
    message.varint(groups.len() as u64);
    for group in groups {
        message.fixed(&group.group.0);
        message.u8(group.class as u8);
        message.varint(group.tags.len() as u64);
        group.tags.iter().for_each(|tag| message.u64(*tag));
    }
    let siv = seal::seal(index_key, &associated_data(family, domain, run), &mut message)?;
    let mut out = Vec::with_capacity(message.len() + 54);
    out.fixed(MAGIC);
    out.u16(VERSION);
    out.fixed(&siv.0);
    out.fixed(&message);
    Ok(out)
}

pub(crate) fn open_run(
    index_key: &SealKey,
    family: &FamilyId,
    domain: &DomainId,
    run: &Id16,
    bytes: &[u8],
) -> Result<Vec<GroupTags>> {
    let mut input = Decoder::new("index run", bytes);
    input.expect(MAGIC)?;
    if input.u16()? != VERSION {
        return Err(input.malformed("its version is not 1"));
    }
    let siv = Siv(input.array()?);
    let mut message = input.take(input.remaining())?.to_vec();
    seal::open(index_key, &associated_data(family, domain, run), &siv, &mut message)
        .map_err(|error| error.during(format!("cannot open index run {run}")))?;
    decode_groups(&message)
}

fn decode_groups(message: &[u8]) -> Result<Vec<GroupTags>> {
    let mut input = Decoder::new("index run", message);
    let mut groups = Vec::new();
    for _ in 0..input.count(18)? {
        let (group, class) = (input.id()?, input.u8()?);
        let class = Class::from_number(class).ok_or_else(|| input.malformed("a class is not known"))?;
        let count = input.count(8)?;
        let tags = (0..count).map(|_| input.u64()).collect::<Result<_>>()?;
        groups.push(GroupTags { group, class, tags });
    }
    input.later_fields()?;
    Ok(groups)
}

/// Sixteen bytes a chunk.
#[derive(Clone, Copy, Default)]
struct Entry {
    tag: u64,
    /// Index into [`ChunkIndex::groups`] plus one; 0 marks an empty place.
    group: u32,
    slot: u32,
}

/// An open-addressing table that never forgets and never holds more than four fifths of its places.
#[derive(Default)]
pub(crate) struct ChunkIndex {
    groups: Vec<GroupId>,
    table: Vec<Entry>,
    used: usize,
}

impl ChunkIndex {
    /// The number of a group, for [`ChunkIndex::insert`].
    pub(crate) fn add_group(&mut self, group: GroupId) -> Result<u32> {
        self.groups.push(group);
        u32::try_from(self.groups.len()).map_err(|_range| Error::bug("more groups than the index can number"))
    }

    pub(crate) fn insert(&mut self, tag: u64, group: u32, slot: u32) {
        if (self.used + 1) * 5 > self.table.len() * 4 {
            self.grow();
        }
        self.place(Entry { tag, group, slot });
        self.used += 1;
    }

    fn place(&mut self, entry: Entry) {
        let mask = self.table.len() - 1;
        let mut at = entry.tag as usize & mask;
        loop {
            let Some(place) = self.table.get_mut(at) else { return };
            if place.group == 0 {
                *place = entry;
                return;
            }
            at = (at + 1) & mask;
        }
    }

    fn grow(&mut self) {
        let places = (self.table.len() * 2).max(1024);
        let old = std::mem::replace(&mut self.table, vec![Entry::default(); places]);
        old.into_iter().filter(|entry| entry.group != 0).for_each(|entry| self.place(entry));
    }

    /// Where a chunk with this tag may lie, newest last.
    pub(crate) fn candidates(&self, tag: u64) -> impl Iterator<Item = (GroupId, u32)> {
        let mask = self.table.len().wrapping_sub(1);
        let start = if self.table.is_empty() { 0 } else { tag as usize & mask };
        (0..self.table.len())
            .map(move |step| (start + step) & mask)
            .map_while(|at| self.table.get(at).filter(|entry| entry.group != 0))
            .filter(move |entry| entry.tag == tag)
            .filter_map(|entry| Some((*self.groups.get(entry.group as usize - 1)?, entry.slot)))
    }
}

#[cfg(test)]
mod tests {
    use super::{ChunkIndex, GroupTags, open_run, seal_run};
    use crate::format::segment::Class;
    use crate::keys::FamilyId;
    use crate::seal::SealKey;
    use mainstay_core::Id16;

    #[test]
    fn finds_every_place_of_a_tag_after_growing() {
        let mut index = ChunkIndex::default();
        assert_eq!(index.candidates(7).count(), 0);
        let groups = [index.add_group(Id16([1; 16])).unwrap(), index.add_group(Id16([2; 16])).unwrap()];
        for slot in 0..5000_u32 {
            index.insert(u64::from(slot) << 10, groups[slot as usize % 2], slot);
        }
        index.insert(3 << 10, groups[0], 9999);
        assert_eq!(
            index.candidates(3 << 10).collect::<Vec<_>>(),
            [(Id16([2; 16]), 3), (Id16([1; 16]), 9999)]
        );
        assert_eq!(index.candidates(1).count(), 0);
    }

    #[test]
    fn runs_open_only_under_their_own_name() {
        let key = SealKey::random().unwrap();
        let groups = [GroupTags { group: Id16([3; 16]), class: Class::Data, tags: vec![1, u64::MAX] }];
        let (family, domain, run) = (FamilyId([1; 32]), Id16([2; 16]), Id16([4; 16]));
        let bytes = seal_run(&key, &family, &domain, &run, &groups).unwrap();
        assert_eq!(open_run(&key, &family, &domain, &run, &bytes).unwrap(), groups);
        assert!(open_run(&key, &family, &domain, &Id16([5; 16]), &bytes).is_err());
        assert!(open_run(&key, &family, &Id16([5; 16]), &run, &bytes).is_err());
    }

    #[test]
    fn hostile_runs_are_errors() {
        let mut message = vec![2];
        for group in [3, 4] {
            message.extend([group; 16]);
            message.extend([Class::Data as u8, 5]);
            message.extend([9; 40]);
        }
        assert_eq!(super::decode_groups(&message).unwrap().len(), 2);
        crate::hostile::feed(&message, 1 << 20, |bytes| drop(super::decode_groups(bytes)));
    }
}
