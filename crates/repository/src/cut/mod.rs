//! Content-defined cutting: where a chunk ends depends only on the 64 bytes before the end, and on a key.
//!
//! A position is an end when two tests hold. The *prefilter* looks at 16 bytes with arithmetic that 16-bit vector
//! lanes do well (see [`prefilter`]); about one position in 512 passes. The *confirmation* looks at 64 bytes with a
//! universal hash under a pseudo-random function (see [`confirm`]) and passes few of those: fewer before the
//! average length than after it, which draws lengths together. Between cuts of at least `min` and at most `max`
//! bytes nothing else decides, so an insertion moves the cuts next to it and no others.
//!
//! The definition is scalar and is part of the repository's format; golden cuts in the tests hold it. The vector
//! twins are the same function, faster.
//!
//! # What leaks
//!
//! Lengths of chunks are sealed, but range reads during a restore show some. Whoever sees lengths and knows the
//! content can tell whether a *known file, cut under this key before*, is stored: no deterministic cutter hides
//! that. The key is to keep cuts of content *not seen before* from being predicted. The confirmation alone would
//! give that provably (a universal hash, then a PRF: "Breaking and Fixing Content-Defined Chunking", IACR ePrint
//! 2025/558). The prefilter weakens it: its key of about 160 bits cannot be searched and no linear system gives
//! it away, as happens with Gear, buzhash and Rabin, but its secrecy rests on cryptanalysis not yet done, not
//! on a proof. Were it recovered, an observer would know one byte in 512 as *possible* ends, never which are.

mod prefilter;
#[cfg(target_arch = "x86_64")]
mod x86;

mod confirm;
#[cfg(test)]
mod tests;

use std::fmt;

use confirm::Confirm;
use prefilter::Prefilter;

const CUTTER_CONTEXT: &str = "mainstay 2026 cutter v1";

/// The bytes before an end that decide it.
const WINDOW: usize = 64;

/// Lengths of chunks in bytes: never below `min` (but for the last of a stream), never above `max`, about `average`.
///
/// `min` ≥ 64, `average` a power of two with `min` < `average` < `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    pub min: usize,
    pub average: usize,
    pub max: usize,
}

impl Profile {
    /// 4, 16 and 64 KiB: the knee of size against speed for files, images and databases.
    pub const STREAM: Self = Self { min: 4 << 10, average: 16 << 10, max: 64 << 10 };
    /// 16, 64 and 256 KiB: media, and repositories so large that the index counts.
    pub const ARCHIVE: Self = Self { min: 16 << 10, average: 64 << 10, max: 256 << 10 };
}

/// Names the bytes of a chunk to those who hold the key of the names.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId(pub [u8; 32]);

impl fmt::Display for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ChunkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Keyed BLAKE3 of the chunk's bytes.
pub fn chunk_id(id_key: &[u8; 32], bytes: &[u8]) -> ChunkId {
    ChunkId(*blake3::keyed_hash(id_key, bytes).as_bytes())
}

/// Whether every byte is zero. Reads no further than the first block of 64 bytes that is not.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<64>();
    let zero = |block: &[u8]| block.iter().fold(0, |seen, &byte| seen | byte) == 0;
    blocks.iter().all(|block| zero(block)) && zero(rest)
}

/// Cuts streams into chunks under one key.
#[derive(Clone)]
pub struct Cutter {
    profile: Profile,
    prefilter: Prefilter,
    confirm: Confirm,
    /// Bits of the confirmation that must be zero before the average length, and after it.
    strict_bits: u32,
    loose_bits: u32,
    engine: Engine,
}

/// Which twin looks for candidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Engine {
    /// All that this machine can run, slowest first.
    fn available() -> Vec<Self> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut, reason = "the twins are for x86-64"))]
        let mut engines = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") {
                engines.push(Self::Avx2);
            }
            if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
                engines.push(Self::Avx512);
            }
        }
        engines
    }
}

impl Cutter {
    /// The same key and profile give the same cuts on every machine and in every release.
    pub fn new(key: &[u8; 32], profile: Profile) -> Self {
        debug_assert!(
            profile.min >= WINDOW && profile.min < profile.average && profile.average < profile.max
        );
        let mut stream = KeyStream::new(key);
        let bits = profile.average.max(1).ilog2();
        Self {
            profile,
            prefilter: Prefilter::new(&mut stream),
            confirm: Confirm::new(&mut stream),
            strict_bits: (bits + 2).saturating_sub(prefilter::RATE_BITS),
            loose_bits: bits.saturating_sub(2 + prefilter::RATE_BITS),
            engine: Engine::available().pop().unwrap_or(Engine::Portable),
        }
    }

    pub fn profile(&self) -> Profile {
        self.profile
    }

    /// Length of the first chunk of `data`, which is all that remains of the stream or at least `max` bytes of
    /// it. 0 only for empty data.
    pub fn cut(&self, data: &[u8]) -> usize {
        let end = data.len().min(self.profile.max);
        let data = data.get(..end).unwrap_or_default();
        if end <= self.profile.min {
            return end;
        }
        let accept = |end: usize| self.accepts(data, end);
        // The first possible end lies one past `min`, as a candidate is named by the last byte of its window.
        let found = match self.engine {
            Engine::Portable => self.prefilter.find(data, self.profile.min, accept),
            #[cfg(target_arch = "x86_64")]
            Engine::Avx2 => x86::find_avx2(&self.prefilter, data, self.profile.min, accept),
            #[cfg(target_arch = "x86_64")]
            Engine::Avx512 => x86::find_avx512(&self.prefilter, data, self.profile.min, accept),
        };
        found.unwrap_or(end)
    }

    /// Whether the candidate `end` is confirmed.
    fn accepts(&self, data: &[u8], end: usize) -> bool {
        let Some(window) = data.get(..end).and_then(|before| before.last_chunk::<WINDOW>()) else {
            return false;
        };
        let bits = if end < self.profile.average { self.strict_bits } else { self.loose_bits };
        self.confirm.digest(window).leading_zeros() >= bits
    }
}

impl fmt::Debug for Cutter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cutter")
            .field("profile", &self.profile)
            .field("engine", &self.engine)
            .finish_non_exhaustive()
    }
}

/// Constants drawn one after the other from the key, little-endian.
struct KeyStream(blake3::OutputReader);

impl KeyStream {
    fn new(key: &[u8; 32]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(CUTTER_CONTEXT);
        hasher.update(key);
        Self(hasher.finalize_xof())
    }

    fn next_u16(&mut self) -> u16 {
        let mut bytes = [0; 2];
        self.0.fill(&mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn next_u64(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }
}
