//! A pack: the object that segments travel in. Blocks one after another, then a footer that says where each is
//! and what it hashes to, so that anyone can check a pack without a key and the collector can repack it.

use std::ops::Range;

use mainstay_core::{DomainId, Error, Id16, Result, WriterId};

use crate::codec::{Decoder, Encode as _};
use crate::format::parity::{self, Parity};
use crate::format::segment::{Class, GroupId};
use crate::ranges::Ranges;

/// Names a pack. Random, so that it can be used before its content is known, and says nothing about it.
pub type PackId = Id16;

const MAGIC: &[u8; 4] = b"MSpk";
const TRAILER_MAGIC: &[u8; 4] = b"MStr";
const VERSION: u16 = 1;
pub(crate) const HEADER_BYTES: usize = 32;
pub(crate) const TRAILER_BYTES: usize = 64;
/// The trailer is written twice.
pub(crate) const TRAILERS_BYTES: usize = 2 * TRAILER_BYTES;
/// No footer is longer.
pub(crate) const FOOTER_BYTES_MAX: u64 = 64 << 20;
/// No block is longer: a segment is far shorter, and so is the directory of a group, which is closed in time.
const BLOCK_BYTES_MAX: u32 = 128 << 20;
const PARITY_NONE: u8 = 0;
/// So many footers are looked at when one is searched for; a pack has three.
const SEARCHES_MAX: usize = 8;

/// What a block is. The numbers are part of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum BlockKind {
    Segment = 1,
    Directory = 2,
}

/// The key and the origin of a group; copied unchanged when the group is repacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GroupHeader {
    pub(crate) id: GroupId,
    pub(crate) class: Class,
    pub(crate) domain: DomainId,
    pub(crate) writer: WriterId,
    /// The group's key, wrapped to the content key (data, meta) or the structure key of the repository.
    pub(crate) wrapped_key: Vec<u8>,
}

impl GroupHeader {
    fn encode(&self, out: &mut Vec<u8>) {
        out.fixed(&self.id.0);
        out.u8(self.class as u8);
        out.fixed(&self.domain.0);
        out.fixed(&self.writer.0);
        out.bytes(&self.wrapped_key);
    }

    fn decode(input: &mut Decoder<'_>) -> Result<Self> {
        let (id, class) = (input.id()?, input.u8()?);
        let class = Class::from_number(class).ok_or_else(|| input.malformed("a class is not known"))?;
        let (domain, writer) = (input.id()?, input.id()?);
        Ok(Self { id, class, domain, writer, wrapped_key: input.bytes()?.to_vec() })
    }
}

/// Says what a group is: the first 16 bytes of BLAKE3 over its header and the digest of its directory block. The log
/// holds it, so that no later pack can put another key or another directory in the group's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GroupDigest(pub(crate) [u8; 16]);

impl GroupDigest {
    fn of(header: &GroupHeader, directory: Option<&[u8; 16]>) -> Self {
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        bytes.fixed(directory.map(<[u8; 16]>::as_slice).unwrap_or_default());
        Self(short(&blake3::derive_key("mainstay group digest 1", &bytes)))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// Index into [`Footer::groups`].
    pub(crate) group: usize,
    pub(crate) kind: BlockKind,
    /// The segment's ordinal in its group; 0 for a directory.
    pub(crate) ordinal: u32,
    /// Where it starts in the pack, and how many bytes it has.
    pub(crate) offset: u64,
    pub(crate) length: u32,
    /// The first 16 bytes of the BLAKE3 hash of the block.
    pub(crate) digest: [u8; 16],
}

#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Footer {
    pub(crate) groups: Vec<GroupHeader>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) parity: Option<Parity>,
}

impl Footer {
    pub(crate) fn group(&self, id: &GroupId) -> Option<usize> {
        self.groups.iter().position(|group| group.id == *id)
    }

    pub(crate) fn segment(&self, group: usize, ordinal: u32) -> Option<&Block> {
        self.blocks.iter().find(|block| {
            block.group == group && block.kind == BlockKind::Segment && block.ordinal == ordinal
        })
    }

    /// The segments of a group that lie in this pack.
    pub(crate) fn segments(&self, group: &GroupId) -> Ranges {
        let mut segments = Ranges::default();
        let index = self.group(group);
        let blocks = self.blocks.iter().filter(|block| {
            Some(block.group) == index && block.kind == BlockKind::Segment && block.ordinal < u32::MAX
        });
        blocks.for_each(|block| segments.insert(block.ordinal..block.ordinal + 1));
        segments
    }

    pub(crate) fn directory(&self, group: usize) -> Option<&Block> {
        self.blocks.iter().find(|block| block.group == group && block.kind == BlockKind::Directory)
    }

    /// Of a group of this pack.
    pub(crate) fn group_digest(&self, group: usize) -> Option<GroupDigest> {
        let directory = self.directory(group).map(|block| &block.digest);
        self.groups.get(group).map(|header| GroupDigest::of(header, directory))
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.u8(self.parity.as_ref().map_or(PARITY_NONE, |_| parity::SCHEME));
        let mut parameters = Vec::new();
        self.parity.iter().for_each(|parity| parity.encode(&mut parameters));
        out.bytes(&parameters);
        out.varint(self.groups.len() as u64);
        self.groups.iter().for_each(|group| group.encode(&mut out));
        out.varint(self.blocks.len() as u64);
        for block in &self.blocks {
            out.varint(block.group as u64);
            out.u8(block.kind as u8);
            out.varint(u64::from(block.ordinal));
            out.varint(block.offset);
            out.varint(u64::from(block.length));
            out.fixed(&block.digest);
        }
        out
    }

    /// `end` is where the footer starts: no block reaches beyond it, and none overlaps another.
    fn decode(bytes: &[u8], end: u64) -> Result<Self> {
        let mut input = Decoder::new("pack footer", bytes);
        // Parity repairs; what is not known or makes no sense is read without it.
        let (scheme, parameters) = (input.u8()?, input.bytes()?);
        let parity = (scheme == parity::SCHEME).then(|| Parity::decode(parameters, end).ok()).flatten();
        let mut footer = Self { parity, ..Self::default() };
        for _ in 0..input.count(50)? {
            footer.groups.push(GroupHeader::decode(&mut input)?);
        }
        let mut next = HEADER_BYTES as u64;
        for _ in 0..input.count(21)? {
            let group = input.index()?;
            let kind = match input.u8()? {
                1 => BlockKind::Segment,
                2 => BlockKind::Directory,
                _ => return Err(input.malformed("a block is of no known kind")),
            };
            let (ordinal, offset, length) = (input.varint_u32()?, input.varint()?, input.varint_u32()?);
            let block = Block { group, kind, ordinal, offset, length, digest: input.array()? };
            let ends = offset.saturating_add(u64::from(length));
            if group >= footer.groups.len() || offset < next || ends > end || length > BLOCK_BYTES_MAX {
                return Err(input.malformed("a block lies where it cannot"));
            }
            next = offset + u64::from(length);
            footer.blocks.push(block);
        }
        input.later_fields()?;
        Ok(footer)
    }
}

pub(crate) fn block_digest(bytes: &[u8]) -> [u8; 16] {
    short(blake3::hash(bytes).as_bytes())
}

pub(crate) fn short(hash: &[u8; 32]) -> [u8; 16] {
    let mut short = [0; 16];
    short.copy_from_slice(&hash[..16]);
    short
}

/// A pack being put together in memory.
pub(crate) struct PackBuilder {
    id: PackId,
    footer: Footer,
    parts: Vec<Vec<u8>>,
    length: u64,
}

/// A pack ready to be stored.
pub(crate) struct BuiltPack {
    pub(crate) id: PackId,
    pub(crate) parts: Vec<Vec<u8>>,
    pub(crate) length: u64,
    pub(crate) footer_hash: [u8; 32],
    pub(crate) footer: Footer,
}

impl PackBuilder {
    pub(crate) fn new(id: PackId) -> Self {
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.fixed(MAGIC);
        header.u16(VERSION);
        header.u16(0);
        header.fixed(&id.0);
        header.u64(0);
        let length = header.len() as u64;
        Self { id, footer: Footer::default(), parts: vec![header], length }
    }

    /// The index of the group in this pack, for [`PackBuilder::push`].
    pub(crate) fn add_group(&mut self, header: GroupHeader) -> usize {
        self.footer.groups.push(header);
        self.footer.groups.len() - 1
    }

    /// The index of a group that was added.
    pub(crate) fn group(&self, id: &GroupId) -> Option<usize> {
        self.footer.group(id)
    }

    pub(crate) fn push(&mut self, group: usize, kind: BlockKind, ordinal: u32, bytes: Vec<u8>) {
        self.footer.blocks.push(Block {
            group,
            kind,
            ordinal,
            offset: self.length,
            length: bytes.len() as u32,
            digest: block_digest(&bytes),
        });
        self.length += bytes.len() as u64;
        self.parts.push(bytes);
    }

    /// Bytes so far, without the footer.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// With `parity`, shards that make damage good, and a third footer and trailer before them: the others lie next to
    /// each other, where one damaged sector may take them all.
    pub(crate) fn finish(mut self, parity: bool) -> Result<BuiltPack> {
        let mut shards = Vec::new();
        if parity {
            let (made, bytes) = Parity::make(&self.parts)?;
            self.footer.parity = Some(made);
            shards = bytes;
        }
        let footer = self.footer.encode();
        let footer_hash = *blake3::hash(&footer).as_bytes();
        if parity {
            self.length += (footer.len() + TRAILER_BYTES) as u64;
            self.length += shards.iter().map(|shard| shard.len() as u64).sum::<u64>();
        }
        let mut trailer = Vec::with_capacity(TRAILER_BYTES);
        trailer.fixed(TRAILER_MAGIC);
        trailer.u16(VERSION);
        trailer.u16(0);
        trailer.u64(self.length);
        trailer.u64(footer.len() as u64);
        trailer.fixed(&footer_hash);
        trailer.resize(TRAILER_BYTES, 0);
        self.length += (2 * footer.len() + TRAILERS_BYTES) as u64;
        if parity {
            self.parts.extend([footer.clone(), trailer.clone()]);
            self.parts.extend(shards);
        }
        self.parts.extend([footer.clone(), footer, trailer.clone(), trailer]);
        let Self { id, parts, length, footer, .. } = self;
        Ok(BuiltPack { id, parts, length, footer_hash, footer })
    }
}

/// Where the footer is, from either trailer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trailer {
    pub(crate) footer_offset: u64,
    pub(crate) footer_length: u64,
    pub(crate) footer_hash: [u8; 32],
}

impl Trailer {
    /// The trailer of the footer with this hash. `tail` is the end of the pack, at least [`TRAILERS_BYTES`];
    /// `pack_length` its whole length.
    pub(crate) fn find(tail: &[u8], pack_length: u64, footer_hash: &[u8; 32]) -> Result<Self> {
        let mut failed = Error::integrity("the pack is too short to have a trailer");
        for trailer in Self::decode_both(tail, pack_length) {
            match trailer {
                Ok(trailer) if trailer.footer_hash == *footer_hash => return Ok(trailer),
                Ok(_) => failed = Error::integrity("the pack is not the one that was committed"),
                Err(error) => failed = error,
            }
        }
        Err(failed)
    }

    /// A trailer of the footer with this hash and right behind that footer, anywhere in a whole pack: what is left when the
    /// end of the pack is not.
    pub(crate) fn search(pack: &[u8], pack_length: u64, footer_hash: &[u8; 32]) -> Option<(Self, Footer)> {
        // A hostile pack could hold a great many that each want many bytes hashed.
        let mut tries = 0..SEARCHES_MAX;
        let places =
            (0..pack.len()).filter(|at| pack.get(*at..).is_some_and(|rest| rest.starts_with(TRAILER_MAGIC)));
        places.into_iter().find_map(|at| {
            let trailer = Self::decode(pack.get(at..at + TRAILER_BYTES)?, pack_length).ok()?;
            let footer = pack.get(at.checked_sub(trailer.footer_length as usize)?..at)?;
            if trailer.footer_hash != *footer_hash || tries.next().is_none() {
                return None;
            }
            trailer.footer(footer).ok().map(|footer| (trailer, footer))
        })
    }

    /// Both trailers, each by itself.
    pub(crate) fn decode_both(tail: &[u8], pack_length: u64) -> Vec<Result<Self>> {
        let start = tail.len().saturating_sub(TRAILERS_BYTES);
        let trailers = tail.get(start..).unwrap_or_default().chunks(TRAILER_BYTES);
        trailers.map(|bytes| Self::decode(bytes, pack_length)).collect()
    }

    fn decode(bytes: &[u8], pack_length: u64) -> Result<Self> {
        let mut input = Decoder::new("pack trailer", bytes);
        input.expect(TRAILER_MAGIC)?;
        if input.u16()? != VERSION || input.u16()? != 0 {
            return Err(input.malformed("its version is not 1"));
        }
        let trailer =
            Self { footer_offset: input.u64()?, footer_length: input.u64()?, footer_hash: input.array()? };
        let Self { footer_offset, footer_length, .. } = trailer;
        let footers = footer_length.checked_mul(2).and_then(|both| both.checked_add(footer_offset));
        let fits = footers.and_then(|end| end.checked_add(TRAILERS_BYTES as u64)) == Some(pack_length);
        if !fits || footer_length > FOOTER_BYTES_MAX || footer_offset < HEADER_BYTES as u64 {
            return Err(input.malformed("it points outside the pack"));
        }
        if input.u64()? != 0 {
            return Err(input.malformed("a reserved field is used"));
        }
        input.end()?;
        Ok(trailer)
    }

    /// Where the footer stands, twice.
    pub(crate) fn footers(&self) -> [Range<u64>; 2] {
        let middle = self.footer_offset + self.footer_length;
        [self.footer_offset..middle, middle..middle + self.footer_length]
    }

    /// Checks the footer's bytes against the hash and reads them.
    pub(crate) fn footer(&self, bytes: &[u8]) -> Result<Footer> {
        if blake3::hash(bytes).as_bytes() != &self.footer_hash {
            return Err(Error::integrity("the footer of the pack does not match its hash"));
        }
        Footer::decode(bytes, self.footer_offset)
    }
}

/// Checks the fixed header of a pack.
pub(crate) fn check_header(bytes: &[u8], id: &PackId) -> Result<()> {
    let mut input = Decoder::new("pack header", bytes);
    input.expect(MAGIC)?;
    if input.u16()? != VERSION || input.u16()? != 0 {
        return Err(input.malformed("its version is not 1"));
    }
    if input.id()? != *id {
        return Err(input.malformed("it names another pack"));
    }
    if input.u64()? == 0 { Ok(()) } else { Err(input.malformed("a reserved field is used")) }
}

#[cfg(test)]
mod tests {
    use super::{BlockKind, Class, GroupHeader, PackBuilder, Trailer};
    use crate::hostile::feed;
    use mainstay_core::Id16;

    fn built(parity: bool) -> (Vec<u8>, super::Footer, [u8; 32]) {
        let mut builder = PackBuilder::new(Id16([1; 16]));
        let group = builder.add_group(GroupHeader {
            id: Id16([2; 16]),
            class: Class::Data,
            domain: Id16([3; 16]),
            writer: Id16([4; 16]),
            wrapped_key: vec![5; 60],
        });
        builder.push(group, BlockKind::Segment, 0, vec![6; 4096]);
        builder.push(group, BlockKind::Directory, 0, vec![7; 99]);
        let pack = builder.finish(parity).unwrap();
        (pack.parts.concat(), pack.footer, pack.footer_hash)
    }

    fn read(bytes: &[u8], hash: &[u8; 32]) -> mainstay_core::Result<super::Footer> {
        let trailer = Trailer::find(bytes, bytes.len() as u64, hash)?;
        let [first, second] = trailer.footers().map(|at| &bytes[at.start as usize..at.end as usize]);
        trailer.footer(first).or_else(|_damaged| trailer.footer(second))
    }

    #[test]
    fn no_single_damage_takes_the_footer_away() {
        let (bytes, footer, hash) = built(false);
        for index in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[index] ^= 1;
            assert_eq!(read(&bytes, &hash).unwrap(), footer, "byte {index}");
        }
    }

    /// As wide as a sector: the end of a small pack.
    #[test]
    fn a_footer_before_the_parity_is_there_when_the_end_is_not() {
        let (bytes, footer, hash) = built(true);
        let length = bytes.len() as u64;
        assert_eq!(read(&bytes, &hash).unwrap(), footer);
        for lost in [1000, 4096] {
            let mut damaged = bytes.clone();
            let end = damaged.len() - lost;
            damaged[end..].fill(0);
            assert!(read(&damaged, &hash).is_err());
            assert_eq!(Trailer::search(&damaged, length, &hash).unwrap().1, footer);
            assert_eq!(Trailer::search(&damaged[..end], length, &hash).unwrap().1, footer);
        }
        assert!(Trailer::search(&bytes, length, &[0; 32]).is_none());
        assert!(Trailer::search(&bytes, length - 1, &hash).is_none());
    }

    #[test]
    fn nothing_else_is_taken_for_the_footer() {
        let (bytes, _, hash) = built(false);
        assert!(Trailer::find(&bytes, bytes.len() as u64 + 1, &hash).is_err());
        assert!(Trailer::find(&bytes, bytes.len() as u64, &[0; 32]).is_err());
        for length in 0..bytes.len() {
            assert!(read(&bytes[..length], &hash).is_err(), "length {length}");
        }
    }

    #[test]
    fn parity_and_fields_of_later_versions_are_passed_over() {
        let (_, footer, _) = built(false);
        let mut bytes = footer.encode();
        assert_eq!(bytes[..2], [0, 0]);
        bytes.splice(..2, [7, 3, 1, 2, 3]);
        bytes.extend([200, 1, 9]);
        assert_eq!(super::Footer::decode(&bytes, 1 << 20).unwrap(), footer);
    }

    #[test]
    fn hostile_packs_are_errors() {
        let (bytes, footer, hash) = built(false);
        feed(&bytes[4096..], 1 << 20, |bytes| {
            let _either = Trailer::find(bytes, bytes.len() as u64 + 4096, &hash);
            let _either = super::check_header(bytes, &Id16([1; 16]));
        });
        feed(&footer.encode(), 1 << 20, |bytes| {
            if let Ok(footer) = super::Footer::decode(bytes, 1 << 20) {
                assert!((0..footer.groups.len()).all(|group| footer.group_digest(group).is_some()));
            }
        });
    }
}
