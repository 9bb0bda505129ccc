//! A pack: the object that segments travel in. Blocks one after another, then a footer that says where each is
//! and what it hashes to, so that anyone can check a pack without a key and the collector can repack it.

use mainstay_core::{DomainId, Error, Id16, Result, WriterId};

use crate::codec::{Decoder, Encode as _};
use crate::format::segment::{Class, GroupId};

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

    pub(crate) fn directory(&self, group: usize) -> Option<&Block> {
        self.blocks.iter().find(|block| block.group == group && block.kind == BlockKind::Directory)
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        // Parity scheme: none. Others come with a length and their shards between the blocks and the footer.
        out.u8(0);
        out.varint(self.groups.len() as u64);
        for group in &self.groups {
            out.fixed(&group.id.0);
            out.u8(group.class as u8);
            out.fixed(&group.domain.0);
            out.fixed(&group.writer.0);
            out.bytes(&group.wrapped_key);
        }
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
        if input.u8()? != 0 {
            return Err(Error::new(
                mainstay_core::Code::TooNew,
                "the pack has a parity scheme of a newer version",
            ));
        }
        let mut footer = Self::default();
        for _ in 0..input.count(50)? {
            let id = input.id()?;
            let class = input.u8()?;
            let class = Class::from_number(class).ok_or_else(|| input.malformed("a class is not known"))?;
            let (domain, writer) = (input.id()?, input.id()?);
            let wrapped_key = input.bytes()?.to_vec();
            footer.groups.push(GroupHeader { id, class, domain, writer, wrapped_key });
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
            if group >= footer.groups.len() || offset < next || offset.saturating_add(u64::from(length)) > end
            {
                return Err(input.malformed("a block lies where it cannot"));
            }
            next = offset + u64::from(length);
            footer.blocks.push(block);
        }
        input.end()?;
        Ok(footer)
    }
}

pub(crate) fn block_digest(bytes: &[u8]) -> [u8; 16] {
    let mut digest = [0; 16];
    digest.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    digest
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

    pub(crate) fn finish(mut self) -> BuiltPack {
        let footer = self.footer.encode();
        let footer_hash = *blake3::hash(&footer).as_bytes();
        let mut trailer = Vec::with_capacity(TRAILER_BYTES);
        trailer.fixed(TRAILER_MAGIC);
        trailer.u16(VERSION);
        trailer.u16(0);
        trailer.u64(self.length);
        trailer.u64(footer.len() as u64);
        trailer.fixed(&footer_hash);
        trailer.resize(TRAILER_BYTES, 0);
        self.length += (footer.len() + TRAILERS_BYTES) as u64;
        self.parts.extend([footer, trailer.clone(), trailer]);
        BuiltPack { id: self.id, parts: self.parts, length: self.length, footer_hash }
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
    /// `tail` is the end of the pack, at least [`TRAILERS_BYTES`]; `pack_length` its whole length.
    pub(crate) fn decode(tail: &[u8], pack_length: u64) -> Result<Self> {
        let start = tail.len().saturating_sub(TRAILERS_BYTES);
        let trailers = tail.get(start..).unwrap_or_default();
        let second = trailers.get(TRAILER_BYTES..).unwrap_or_default();
        Self::decode_one(second, pack_length).or_else(|_damaged| Self::decode_one(trailers, pack_length))
    }

    fn decode_one(bytes: &[u8], pack_length: u64) -> Result<Self> {
        let mut input = Decoder::new("pack trailer", bytes);
        input.expect(TRAILER_MAGIC)?;
        if input.u16()? != VERSION || input.u16()? != 0 {
            return Err(input.malformed("its version is not 1"));
        }
        let trailer =
            Self { footer_offset: input.u64()?, footer_length: input.u64()?, footer_hash: input.array()? };
        let end = trailer.footer_offset.checked_add(trailer.footer_length);
        let fits = end.and_then(|end| end.checked_add(TRAILERS_BYTES as u64)) == Some(pack_length);
        if !fits || trailer.footer_length > FOOTER_BYTES_MAX || trailer.footer_offset < HEADER_BYTES as u64 {
            return Err(input.malformed("it points outside the pack"));
        }
        Ok(trailer)
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
    use super::{BlockKind, Class, GroupHeader, PackBuilder, TRAILER_BYTES, TRAILERS_BYTES, Trailer};
    use mainstay_core::Id16;

    fn built() -> (Vec<u8>, super::Footer) {
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
        let footer = builder.footer.clone();
        (builder.finish().parts.concat(), footer)
    }

    #[test]
    fn the_footer_is_found_from_either_trailer() {
        let (bytes, footer) = built();
        for damaged in [0, bytes.len() - 1, bytes.len() - TRAILER_BYTES - 10] {
            let mut bytes = bytes.clone();
            bytes[damaged] ^= 1;
            let Ok(trailer) = Trailer::decode(&bytes, bytes.len() as u64) else { panic!("byte {damaged}") };
            let start = trailer.footer_offset as usize;
            let end = bytes.len() - TRAILERS_BYTES;
            if trailer.footer_hash == *blake3::hash(&bytes[start..end]).as_bytes() {
                assert_eq!(trailer.footer(&bytes[start..end]).unwrap(), footer);
            }
        }
    }

    #[test]
    fn a_damaged_footer_or_length_is_refused() {
        let (bytes, _) = built();
        let trailer = Trailer::decode(&bytes, bytes.len() as u64).unwrap();
        assert!(Trailer::decode(&bytes, bytes.len() as u64 + 1).is_err());
        let start = trailer.footer_offset as usize;
        for index in start..start + trailer.footer_length as usize {
            let mut bad = bytes[start..start + trailer.footer_length as usize].to_vec();
            bad[index - start] ^= 1;
            assert!(trailer.footer(&bad).is_err());
        }
    }
}
