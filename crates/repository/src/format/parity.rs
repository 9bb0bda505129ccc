//! Parity of a pack: shards between its blocks and its footer that make good what is damaged before them.
//!
//! Scheme 1 cuts the bytes up to the end of the last block into shards of one length, the last one filled up with
//! zeros, and adds one shard of parity to every sixteen, in small packs more: as many as a sector touches, but no more than
//! there are of data. Any shards can be lost, as many as there are of parity. Their digests stand in the footer, so that it
//! is known which are. The code is that of Lin, Han and Chung over GF(2^16)
//! ("Novel Polynomial Basis and Its Application to Reed-Solomon Erasure Codes", FOCS 2014) as the crate
//! `reed-solomon-simd` computes it: several gigabytes a second, where a code of our own would be slower or unsafe.

use std::ops::Range;

use mainstay_core::{Error, Result};
use reed_solomon_simd::{ReedSolomonDecoder, ReedSolomonEncoder};

use crate::codec::{Decoder, Encode as _};
use crate::format::pack::short;

/// The number of the scheme in the footer.
pub(crate) const SCHEME: u8 = 1;
/// A pack has at most about so many shards of data.
const SHARDS: u64 = 64;
const SHARD_BYTES_MIN: u64 = 512;
/// What media lose at once: parity is enough for all shards that a stretch of this many bytes can touch.
const SECTOR_BYTES: u64 = 4096;
/// The code works in units of this many bytes.
const UNIT: u64 = 64;
/// Shards of data for each of parity.
const DATA_PER_PARITY: u64 = 16;
/// The code is computed over so many bytes of all shards at a time, which stay in the cache of a processor.
const STRIP_BYTES: usize = 16 << 10;
/// No reader takes more upon itself.
const SHARDS_MAX: usize = 4096;

type Digest = [u8; 16];

/// What the footer says of the shards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Parity {
    /// Bytes from the start of the pack that are protected.
    covered: u64,
    shard_bytes: u64,
    /// Of every shard: those of data, then those of parity.
    data: Vec<Digest>,
    parity: Vec<Digest>,
}

impl Parity {
    /// Makes the shards of parity for the bytes that `parts` are, one after another.
    pub(crate) fn make(parts: &[Vec<u8>]) -> Result<(Self, Vec<Vec<u8>>)> {
        let joined = Joined::new(parts);
        let covered = joined.length;
        let shard_bytes =
            covered.div_ceil(SHARDS).max(SHARD_BYTES_MIN.min(covered)).next_multiple_of(UNIT).max(UNIT);
        let count = covered.div_ceil(shard_bytes).max(1);
        let parity_count =
            count.div_ceil(DATA_PER_PARITY).max(SECTOR_BYTES / shard_bytes + 2).min(count) as usize;
        let mut shards = vec![Vec::with_capacity(shard_bytes as usize); parity_count];
        let mut hashers = vec![blake3::Hasher::new(); count as usize];
        for strip in strips(shard_bytes as usize) {
            let mut encoder =
                ReedSolomonEncoder::new(count as usize, parity_count, strip.len()).map_err(code)?;
            let mut buffer = vec![0; strip.len()];
            for (number, hasher) in hashers.iter_mut().enumerate() {
                joined.read(number as u64 * shard_bytes + strip.start as u64, &mut buffer);
                hasher.update(&buffer);
                encoder.add_original_shard(&buffer).map_err(code)?;
            }
            let encoded = encoder.encode().map_err(code)?;
            shards
                .iter_mut()
                .zip(encoded.recovery_iter())
                .for_each(|(shard, part)| shard.extend_from_slice(part));
        }
        let data = hashers.iter().map(|hasher| short(hasher.finalize().as_bytes())).collect();
        let parity = shards.iter().map(|shard| digest(shard)).collect();
        Ok((Self { covered, shard_bytes, data, parity }, shards))
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.varint(self.covered);
        out.varint(self.shard_bytes);
        out.varint(self.data.len() as u64);
        self.data.iter().for_each(|digest| out.fixed(digest));
        out.varint(self.parity.len() as u64);
        self.parity.iter().for_each(|digest| out.fixed(digest));
    }

    /// `end` is where the footer starts, right behind the shards of parity.
    pub(crate) fn decode(bytes: &[u8], end: u64) -> Result<Self> {
        let mut input = Decoder::new("parity of a pack", bytes);
        let (covered, shard_bytes) = (input.varint()?, input.varint()?);
        let mut lists = [Vec::new(), Vec::new()];
        for list in &mut lists {
            for _ in 0..input.count(16)? {
                list.push(input.array()?);
            }
        }
        input.end()?;
        let [data, parity] = lists;
        let parity_bytes = shard_bytes.saturating_mul(parity.len() as u64);
        let fits = shard_bytes > 0
            && shard_bytes.is_multiple_of(UNIT)
            && covered.div_ceil(shard_bytes) == data.len() as u64
            && !data.is_empty()
            && !parity.is_empty()
            && data.len() + parity.len() <= SHARDS_MAX
            && covered.saturating_add(parity_bytes) <= end;
        if fits {
            Ok(Self { covered, shard_bytes, data, parity })
        } else {
            Err(Decoder::new("parity of a pack", bytes).malformed("its shards lie where they cannot"))
        }
    }

    /// Bytes from the start of the pack that are protected; a footer and a trailer follow them.
    pub(crate) fn covered(&self) -> u64 {
        self.covered
    }

    /// Where the shards of parity lie, when the footer starts at `footer`.
    pub(crate) fn shards(&self, footer: u64) -> Range<u64> {
        footer - self.shard_bytes * self.parity.len() as u64..footer
    }

    /// How many shards of parity are not what they were. `bytes`: [`Parity::shards`].
    pub(crate) fn damaged_parity(&self, bytes: &[u8]) -> usize {
        let shards = bytes.chunks(self.shard_bytes as usize);
        self.parity.len() - shards.zip(&self.parity).filter(|(shard, known)| digest(shard) == **known).count()
    }

    /// The protected bytes as they were. `pack` is the whole pack, with anything in the place of what is lost;
    /// `footer` is where its footer starts.
    ///
    /// Errors: [`mainstay_core::Code::Integrity`] when more is damaged than can be made good.
    pub(crate) fn repair(&self, pack: &[u8], footer: u64) -> Result<Vec<u8>> {
        let size = self.shard_bytes as usize;
        let mut bytes = pack.get(..self.covered as usize).unwrap_or(pack).to_vec();
        bytes.resize(self.data.len() * size, 0);
        let whole: Vec<bool> =
            bytes.chunks(size).zip(&self.data).map(|(shard, known)| digest(shard) == *known).collect();
        let at = self.shards(footer);
        let stored = pack.get(at.start as usize..at.end as usize).unwrap_or_default();
        let helpers: Vec<(usize, &[u8])> = (stored.chunks(size).enumerate())
            .filter(|(number, shard)| self.parity.get(*number).is_some_and(|known| digest(shard) == *known))
            .collect();
        let lost: Vec<usize> =
            (0..whole.len()).filter(|number| !whole.get(*number).is_some_and(|whole| *whole)).collect();
        if lost.len() > helpers.len() {
            return Err(Error::integrity(format!(
                "{} of its {} shards are damaged, and parity makes {} good",
                lost.len(),
                self.data.len(),
                helpers.len()
            )));
        }
        if !lost.is_empty() {
            self.restore(&mut bytes, &whole, &lost, &helpers)?;
        }
        for number in &lost {
            let shard = bytes.get(number * size..(number + 1) * size).unwrap_or_default();
            if self.data.get(*number) != Some(&digest(shard)) {
                return Err(Error::integrity(
                    "what parity makes of the damaged shards is not what they were",
                ));
            }
        }
        bytes.truncate(self.covered as usize);
        Ok(bytes)
    }

    fn restore(
        &self,
        bytes: &mut [u8],
        whole: &[bool],
        lost: &[usize],
        helpers: &[(usize, &[u8])],
    ) -> Result<()> {
        let size = self.shard_bytes as usize;
        for strip in strips(size) {
            let mut decoder =
                ReedSolomonDecoder::new(self.data.len(), self.parity.len(), strip.len()).map_err(code)?;
            for (number, shard) in bytes.chunks(size).enumerate() {
                if whole.get(number).is_some_and(|whole| *whole) {
                    decoder.add_original_shard(number, piece(shard, &strip)).map_err(code)?;
                }
            }
            for (number, shard) in helpers {
                decoder.add_recovery_shard(*number, piece(shard, &strip)).map_err(code)?;
            }
            let restored = decoder.decode().map_err(code)?;
            for number in lost {
                let place = number * size + strip.start..number * size + strip.end;
                if let (Some(found), Some(place)) =
                    (restored.restored_original(*number), bytes.get_mut(place))
                {
                    place.copy_from_slice(found);
                }
            }
        }
        Ok(())
    }
}

fn strips(shard_bytes: usize) -> impl Iterator<Item = Range<usize>> {
    (0..shard_bytes).step_by(STRIP_BYTES).map(move |start| start..(start + STRIP_BYTES).min(shard_bytes))
}

fn piece<'a>(shard: &'a [u8], strip: &Range<usize>) -> &'a [u8] {
    shard.get(strip.clone()).unwrap_or_default()
}

fn digest(bytes: &[u8]) -> Digest {
    short(blake3::hash(bytes).as_bytes())
}

fn code(error: reed_solomon_simd::Error) -> Error {
    Error::bug(format!("parity cannot be computed: {error}"))
}

/// Parts as one run of bytes, followed by zeros.
struct Joined<'a> {
    parts: Vec<(u64, &'a [u8])>,
    length: u64,
}

impl<'a> Joined<'a> {
    fn new(parts: &'a [Vec<u8>]) -> Self {
        let mut length = 0;
        let place = |part: &'a Vec<u8>| {
            let start = length;
            length += part.len() as u64;
            (start, part.as_slice())
        };
        Self { parts: parts.iter().map(place).collect(), length }
    }

    fn read(&self, at: u64, buffer: &mut [u8]) {
        buffer.fill(0);
        let end = at + buffer.len() as u64;
        let first = self.parts.partition_point(|(start, part)| start + part.len() as u64 <= at);
        for (start, part) in self.parts.iter().skip(first).take_while(|(start, _)| *start < end) {
            let from = at.max(*start);
            let until = end.min(start + part.len() as u64);
            let source = part.get((from - start) as usize..(until - start) as usize);
            let target = buffer.get_mut((from - at) as usize..(until - at) as usize);
            if let (Some(source), Some(target)) = (source, target) {
                target.copy_from_slice(source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use mainstay_testkit::Rng;

    use super::{Joined, Parity};

    fn parts(rng: &mut Rng, length: usize) -> Vec<Vec<u8>> {
        let mut parts = vec![rng.bytes(32.min(length))];
        let mut rest = length - parts[0].len();
        while rest > 0 {
            let part = (1 + rng.below(40_000)).min(rest);
            parts.push(rng.bytes(part));
            rest -= part;
        }
        parts
    }

    /// As many shards as there are of parity come back, whichever they are, and one more is refused.
    #[test]
    fn any_shards_come_back_up_to_the_budget_and_never_others() {
        let mut rng = Rng::new(1);
        for length in [32, 33, 4095, 4096, 4097, 70_000, 262_144, 300_001, 3_000_000] {
            let parts = parts(&mut rng, length);
            let (parity, shards) = Parity::make(&parts).unwrap();
            let covered = parts.concat();
            let footer = (length + shards.concat().len()) as u64;
            let whole = [covered.clone(), shards.concat()].concat();
            let mut out = Vec::new();
            parity.encode(&mut out);
            assert_eq!(Parity::decode(&out, footer).unwrap(), parity);
            assert!(Parity::decode(&out, footer - 1).is_err(), "{length}: beyond the footer");
            let budget = parity.parity.len();
            assert!(budget >= parity.data.len().div_ceil(16), "{length}");
            assert!(budget as u64 * parity.shard_bytes >= 4096.min(length as u64), "{length}: a sector");
            for damaged in 0..=(budget + 1).min(parity.data.len()) {
                let mut pack = whole.clone();
                let mut numbers: Vec<usize> = (0..parity.data.len()).collect();
                rng.shuffle(&mut numbers);
                numbers.truncate(damaged);
                numbers.sort_unstable();
                for number in &numbers {
                    let start = number * parity.shard_bytes as usize;
                    let at = start + rng.below((length - start).min(parity.shard_bytes as usize));
                    pack[at] ^= 1 << rng.below(8);
                }
                let repaired = parity.repair(&pack, footer);
                if damaged > budget {
                    assert!(repaired.is_err(), "{length}: {numbers:?}");
                    continue;
                }
                assert!(repaired.unwrap() == covered, "{length}: {numbers:?}");
            }
        }
    }

    #[test]
    fn damaged_parity_helps_nobody_and_is_counted() {
        let mut rng = Rng::new(2);
        let parts = parts(&mut rng, 400_000);
        let (parity, shards) = Parity::make(&parts).unwrap();
        let footer = 400_000 + shards.concat().len() as u64;
        let mut pack = [parts.concat(), shards.concat()].concat();
        assert_eq!(parity.damaged_parity(&pack[400_000..]), 0);
        pack[400_000] ^= 1;
        assert_eq!(parity.damaged_parity(&pack[400_000..]), 1);
        let spread = 400_000 / parity.parity.len();
        (1..parity.parity.len()).for_each(|number| pack[number * spread] ^= 1);
        assert_eq!(parity.repair(&pack, footer).unwrap(), parts.concat());
        pack[0] ^= 1;
        assert!(parity.repair(&pack, footer).is_err());
        // A pack that was cut short has lost its end, and so its parity.
        assert!(parity.repair(&pack[..300_000], footer).is_err());
    }

    /// The code is part of the format: another one could not repair what this one protected.
    #[test]
    fn golden_parity() {
        let parts =
            [(0..10_000u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect()];
        let (parity, shards) = Parity::make(&parts).unwrap();
        assert_eq!((parity.shard_bytes, parity.data.len(), shards.len()), (640, 63, 8));
        let hash = blake3::hash(&shards.concat());
        assert_eq!(
            hash.to_hex().as_str(),
            "ad6ac37587ebfe237bdbe2eaaa64c598f28ccc391501cbb86809b7335d226cc8"
        );
    }

    #[test]
    fn parts_read_as_one() {
        let parts = [vec![1, 2, 3], vec![], vec![4], vec![5, 6]];
        let mut buffer = [9; 5];
        Joined::new(&parts).read(2, &mut buffer);
        assert_eq!(buffer, [3, 4, 5, 6, 0]);
        Joined::new(&parts).read(7, &mut buffer);
        assert_eq!(buffer, [0; 5]);
    }
}
