//! Numbers that look random and are the same every time.

use std::io::Write;

use anyhow::Result;

/// SplitMix64 (Steele, Lea and Flood, 2014): enough for test data, and ten lines.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn from_seed(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `limit`, which is not 0. The slight bias does not matter here.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(super) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let number = self.next().to_le_bytes();
            chunk.copy_from_slice(&number[..chunk.len()]);
        }
    }

    pub(super) fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.fill(&mut bytes);
        bytes
    }

    pub(super) fn write(&mut self, to: &mut dyn Write, count: u64) -> Result<()> {
        let mut buffer = vec![0; 1 << 16];
        let mut left = count;
        while left > 0 {
            let part = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            self.fill(&mut buffer[..part]);
            to.write_all(&buffer[..part])?;
            left -= part as u64;
        }
        Ok(())
    }

    /// `count` different numbers below `limit`, or all of them when there are fewer.
    pub(super) fn sample(&mut self, count: u64, limit: u64) -> Vec<u64> {
        let mut chosen = std::collections::BTreeSet::new();
        while (chosen.len() as u64) < count.min(limit) {
            chosen.insert(self.below(limit));
        }
        chosen.into_iter().collect()
    }
}

/// FNV-1a: a stable hash of a name, to choose files by.
pub(super) fn hash(salt: &str, name: &[u8]) -> u64 {
    salt.as_bytes().iter().chain(name).fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn the_sequence_is_the_published_one_and_samples_are_distinct() {
        // First outputs for seed 1234567, as widely published for SplitMix64.
        let mut random = Random::from_seed(1_234_567);
        assert_eq!([random.next(), random.next()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
        assert_eq!(random.sample(5, 5), [0, 1, 2, 3, 4]);
        assert_eq!(random.sample(9, 3).len(), 3);
    }
}
