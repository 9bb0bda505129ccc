//! A segment: chunks that were new together, compressed and sealed as one message.
//!
//! A sealed segment carries everything that its opening needs but the key of its group, and nothing that depends
//! on the pack it lies in. The collector copies it as it is.

use mainstay_core::{DomainId, Error, Id16, Result};

use crate::codec::{Decoder, Encode as _};
use crate::keys::FamilyId;
use crate::seal::{self, SealKey, Siv};

/// Bytes of chunks after which a segment is closed.
pub(crate) const SEGMENT_BYTES: usize = 1 << 20;
/// No segment expands to more than this.
pub(crate) const RAW_BYTES_MAX: usize = SEGMENT_BYTES + (512 << 10);
pub(crate) const HEADER_BYTES: usize = 64;
const MAGIC: &[u8; 4] = b"MSsg";
const VERSION: u8 = 1;
/// Codec, raw length, data length.
const INNER_HEADER_BYTES: usize = 9;
const CODEC_RAW: u8 = 0;
const CODEC_ZSTD: u8 = 1;

/// What a group of segments holds. The numbers are part of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub(crate) enum Class {
    /// Content.
    Data = 1,
    /// Tree and recipe pages.
    Meta = 2,
    /// Reference pages, for the collector.
    Structure = 3,
}

impl Class {
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        [Self::Data, Self::Meta, Self::Structure].into_iter().find(|class| *class as u8 == number)
    }
}

/// Names a group of segments that share a key, for as long as the repository exists.
pub(crate) type GroupId = Id16;

/// What every segment of a group is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Binding {
    pub(crate) family: FamilyId,
    pub(crate) domain: DomainId,
    pub(crate) group: GroupId,
    pub(crate) class: Class,
}

impl Binding {
    fn associated_data(&self, ordinal: u32, sealed_length: u32) -> Vec<u8> {
        let mut data = b"mainstay segment 1".to_vec();
        data.fixed(&self.family.0);
        data.fixed(&self.domain.0);
        data.fixed(&self.group.0);
        data.u8(self.class as u8);
        data.u32(ordinal);
        data.u32(sealed_length);
        data
    }
}

/// How hard new content is compressed. What describes it always is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    None,
    /// About half the processor time of [`Compression::Balanced`], and some percent more room.
    Fast,
    #[default]
    Balanced,
    /// Many times the processor time, for some percent less room.
    Best,
}

impl Compression {
    /// In zstd's terms, which count from 1 to 19.
    const fn level(self) -> Option<i32> {
        match self {
            Self::None => None,
            Self::Fast => Some(1),
            Self::Balanced => Some(3),
            Self::Best => Some(12),
        }
    }
}

/// Compressors are costly to make; each worker keeps one for each class.
pub(crate) struct Sealer {
    content: Option<zstd::bulk::Compressor<'static>>,
    pages: zstd::bulk::Compressor<'static>,
    probe: zstd::bulk::Compressor<'static>,
    scratch: Vec<u8>,
}

impl Sealer {
    pub(crate) fn new(compression: Compression) -> Result<Self> {
        let make = |level| {
            zstd::bulk::Compressor::new(level).map_err(|error| Error::io("cannot start a compressor", error))
        };
        let content = compression.level().map(make).transpose()?;
        Ok(Self { content, pages: make(3)?, probe: make(-5)?, scratch: Vec::new() })
    }

    /// The segment as it is stored: header and ciphertext.
    pub(crate) fn seal(
        &mut self,
        key: &SealKey,
        binding: &Binding,
        ordinal: u32,
        raw: &[u8],
    ) -> Result<Vec<u8>> {
        if raw.len() > RAW_BYTES_MAX {
            return Err(Error::bug(format!("a segment of {} bytes", raw.len())));
        }
        let packed = self.compress(binding.class, raw)?;
        let (codec, data) = match packed {
            Some(length) => (CODEC_ZSTD, self.scratch.get(..length).unwrap_or_default()),
            None => (CODEC_RAW, raw),
        };
        let message_length = padded_len(INNER_HEADER_BYTES + data.len());
        let sealed_length = (message_length + seal::TAG_LEN) as u32;
        let mut stored = Vec::with_capacity(HEADER_BYTES + sealed_length as usize);
        stored.resize(HEADER_BYTES, 0);
        stored.u8(codec);
        stored.u32(raw.len() as u32);
        stored.u32(data.len() as u32);
        stored.fixed(data);
        stored.resize(HEADER_BYTES + message_length, 0);
        let siv = seal::seal_from(
            HEADER_BYTES,
            key,
            &binding.associated_data(ordinal, sealed_length),
            &mut stored,
        )?;
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.fixed(MAGIC);
        header.u8(VERSION);
        header.u8(binding.class as u8);
        header.u16(0);
        header.fixed(&binding.group.0);
        header.u32(ordinal);
        header.u32(sealed_length);
        header.fixed(&siv.0);
        if let Some(place) = stored.first_chunk_mut::<HEADER_BYTES>() {
            place.copy_from_slice(&header);
        }
        Ok(stored)
    }

    /// Compresses into the scratch space; how long it became there, or `None` for what is to be kept as it is.
    fn compress(&mut self, class: Class, raw: &[u8]) -> Result<Option<usize>> {
        if (class == Class::Data && self.content.is_none()) || !self.looks_compressible(raw)? {
            return Ok(None);
        }
        let content = self.content.as_mut().filter(|_| class == Class::Data);
        let zstd = content.unwrap_or(&mut self.pages);
        let bound = zstd::zstd_safe::compress_bound(raw.len());
        self.scratch.resize(bound.max(self.scratch.len()), 0);
        let failed = |error| Error::io("cannot compress a segment", error);
        let length = zstd.compress_to_buffer(raw, self.scratch.as_mut_slice()).map_err(failed)?;
        Ok((length < raw.len()).then_some(length))
    }

    /// Tries three samples with the fastest setting: content that does not shrink is not worth zstd's time.
    fn looks_compressible(&mut self, raw: &[u8]) -> Result<bool> {
        const SAMPLE: usize = 4096;
        if raw.len() <= 4 * SAMPLE {
            return Ok(!raw.is_empty());
        }
        self.scratch.resize(zstd::zstd_safe::compress_bound(SAMPLE).max(self.scratch.len()), 0);
        let (mut plain, mut packed) = (0, 0);
        for part in raw.chunks(raw.len() / 3).take(3) {
            let sample = part.get(..SAMPLE.min(part.len())).unwrap_or_default();
            let failed = |error| Error::io("cannot compress a sample", error);
            plain += sample.len();
            packed += self.probe.compress_to_buffer(sample, self.scratch.as_mut_slice()).map_err(failed)?;
        }
        Ok(packed * 100 < plain * 97)
    }
}

/// Hides the exact length. A segment holds many chunks, so steps of 4 KiB say little, and cost less than Padmé's
/// where it is long.
fn padded_len(length: usize) -> usize {
    length.next_multiple_of(4096).min(seal::padded_len(length as u64) as usize)
}

/// What a stored segment says of itself before it is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) class: Class,
    pub(crate) group: GroupId,
    pub(crate) ordinal: u32,
    /// Bytes of ciphertext that follow the header.
    pub(crate) sealed_length: u32,
    pub(crate) siv: Siv,
}

impl Header {
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        let mut input = Decoder::new("segment header", bytes);
        input.expect(MAGIC)?;
        if input.u8()? != VERSION {
            return Err(input.malformed("its version is not 1"));
        }
        let class = input.u8()?;
        let class = Class::from_number(class).ok_or_else(|| input.malformed("its class is not known"))?;
        if input.u16()? != 0 {
            return Err(input.malformed("a reserved field is used"));
        }
        Ok(Self {
            class,
            group: input.id()?,
            ordinal: input.u32()?,
            sealed_length: input.u32()?,
            siv: Siv(input.array()?),
        })
    }
}

/// Opens a stored segment and returns the chunks it holds, back to back.
///
/// Errors: [`mainstay_core::Code::Integrity`] when any byte differs from what was sealed for this group and
/// ordinal.
pub(crate) fn open(key: &SealKey, binding: &Binding, ordinal: u32, stored: &[u8]) -> Result<Vec<u8>> {
    let header = Header::decode(stored)?;
    if (header.class, header.group, header.ordinal) != (binding.class, binding.group, ordinal) {
        return Err(Error::integrity(format!("segment {ordinal} of group {} is another one", binding.group)));
    }
    let mut message = stored.get(HEADER_BYTES..).unwrap_or_default().to_vec();
    if message.len() != header.sealed_length as usize {
        return Err(Error::integrity(format!("segment {ordinal} of group {} is cut short", binding.group)));
    }
    seal::open(key, &binding.associated_data(ordinal, header.sealed_length), &header.siv, &mut message)
        .map_err(|error| error.during(format!("cannot open segment {ordinal} of group {}", binding.group)))?;
    expand(&message)
}

/// The chunks of an opened message.
fn expand(message: &[u8]) -> Result<Vec<u8>> {
    let mut input = Decoder::new("segment", message);
    let codec = input.u8()?;
    let (raw_length, data_length) = (input.u32()? as usize, input.u32()? as usize);
    let data = input.take(data_length)?;
    match codec {
        _ if raw_length > RAW_BYTES_MAX => Err(input.malformed("it expands to too much")),
        CODEC_RAW if raw_length == data_length => Ok(data.to_vec()),
        CODEC_ZSTD => match zstd::bulk::decompress(data, raw_length) {
            Ok(raw) if raw.len() == raw_length => Ok(raw),
            Ok(_) => Err(input.malformed("it expands to another length")),
            Err(error) => Err(input.malformed("it does not decompress").because(error)),
        },
        _ => Err(input.malformed("its codec is not known")),
    }
}

#[cfg(test)]
mod tests {
    use super::{Binding, Class, Compression, HEADER_BYTES, RAW_BYTES_MAX, Sealer, expand, open};
    use crate::hostile::feed;
    use crate::keys::FamilyId;
    use crate::seal::SealKey;
    use mainstay_core::{Code, Id16};

    fn binding() -> Binding {
        Binding { family: FamilyId([1; 32]), domain: Id16([2; 16]), group: Id16([3; 16]), class: Class::Data }
    }

    #[test]
    fn opens_only_as_what_it_was_sealed_as() {
        let key = SealKey::random().unwrap();
        let mut sealer = Sealer::new(Compression::Balanced).unwrap();
        for raw in [
            vec![],
            vec![7; 100],
            vec![9; RAW_BYTES_MAX],
            (0..90_000_u32).map(|x| ((u64::from(x) * u64::from(x)) >> 7) as u8).collect(),
        ] {
            let stored = sealer.seal(&key, &binding(), 5, &raw).unwrap();
            assert_eq!(open(&key, &binding(), 5, &stored).unwrap(), raw);
            let other_domain = Binding { domain: Id16([9; 16]), ..binding() };
            let other_family = Binding { family: FamilyId([9; 32]), ..binding() };
            for wrong in [other_domain, other_family] {
                assert_eq!(open(&key, &wrong, 5, &stored).unwrap_err().code(), Code::Integrity);
            }
            assert_eq!(open(&key, &binding(), 6, &stored).unwrap_err().code(), Code::Integrity);
        }
    }

    #[test]
    fn content_is_compressed_as_asked_and_pages_always() {
        let key = SealKey::random().unwrap();
        let raw: Vec<u8> = (0..200_000_u32).flat_map(|word| (word % 97).to_le_bytes()).collect();
        let pages = Binding { class: Class::Meta, ..binding() };
        let mut lengths = Vec::new();
        for compression in [Compression::None, Compression::Fast, Compression::Balanced, Compression::Best] {
            let mut sealer = Sealer::new(compression).unwrap();
            let stored = sealer.seal(&key, &binding(), 0, &raw).unwrap();
            assert_eq!(open(&key, &binding(), 0, &stored).unwrap(), raw);
            assert_eq!(stored.capacity(), stored.len(), "nothing is copied to make room");
            lengths.push(stored.len());
            assert!(sealer.seal(&key, &pages, 0, &raw).unwrap().len() < raw.len() / 4);
        }
        assert!(lengths[0] > raw.len() && lengths[0] < raw.len() + HEADER_BYTES + 8192, "{lengths:?}");
        assert!(lengths[1..].iter().all(|length| *length < raw.len() / 4), "{lengths:?}");
    }

    #[test]
    fn every_flipped_byte_and_every_truncation_is_refused() {
        let key = SealKey::random().unwrap();
        let stored = Sealer::new(Compression::Fast)
            .unwrap()
            .seal(&key, &binding(), 0, b"some chunk or other")
            .unwrap();
        for index in 0..stored.len() {
            let mut bad = stored.clone();
            bad[index] ^= 0x10;
            assert!(open(&key, &binding(), 0, &bad).is_err(), "byte {index}");
            assert!(open(&key, &binding(), 0, &stored[..index]).is_err(), "length {index}");
        }
    }

    #[test]
    fn hostile_segments_are_errors() {
        let key = SealKey::random().unwrap();
        let stored = Sealer::new(Compression::Fast).unwrap().seal(&key, &binding(), 0, &[7; 3000]).unwrap();
        feed(&stored, 1 << 20, |bytes| drop(open(&key, &binding(), 0, bytes)));
        let packed = zstd::bulk::compress(&[7; 3000], 1).unwrap();
        let sizes = [3000_u32.to_le_bytes(), (packed.len() as u32).to_le_bytes()].concat();
        feed(&[&[super::CODEC_ZSTD][..], &sizes, &packed].concat(), 4 << 20, |bytes| drop(expand(bytes)));
    }
}
