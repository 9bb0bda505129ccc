//! Random numbers that a seed repeats, and loops over seeds that say which one failed.

use std::ops::Range;

/// xoshiro256** seeded by splitmix64: fast, good enough for tests, the same everywhere and forever.
#[derive(Clone, Debug)]
pub struct Rng([u64; 4]);

impl Rng {
    pub fn new(seed: u64) -> Self {
        let mut state = seed;
        Self(std::array::from_fn(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut mixed = state;
            mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            mixed ^ (mixed >> 31)
        }))
    }

    pub fn next_u64(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.0;
        let result = b.wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        result
    }

    /// A number of `range`, which must not be empty.
    pub fn range(&mut self, range: Range<u64>) -> u64 {
        assert!(range.start < range.end, "an empty range has no number: {range:?}");
        let span = u128::from(range.end - range.start);
        let scaled = (u128::from(self.next_u64()) * span) >> 64;
        range.start + u64::try_from(scaled).unwrap_or_default()
    }

    /// An index below `len`, which must not be 0.
    pub fn below(&mut self, len: usize) -> usize {
        usize::try_from(self.range(0..len as u64)).unwrap_or_default()
    }

    /// True `percent` times of a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.range(0..100) < percent
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.next_u64().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }

    /// `len` random bytes: incompressible, and never equal to others of the same run.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.fill(&mut bytes);
        bytes
    }

    /// One of `choices`, which must not be empty.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }

    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        for last in (1..values.len()).rev() {
            values.swap(last, self.below(last + 1));
        }
    }
}

/// Runs `test` for the seeds that the environment asks for: `MAINSTAY_SEED=7` runs that one, `MAINSTAY_SEEDS=5000`
/// runs that many instead of `count`. The seed of a failure is printed with the line that repeats it.
pub fn for_each_seed(count: u64, mut test: impl FnMut(u64)) {
    for seed in seeds(count) {
        let told = TellSeed(seed);
        test(seed);
        drop(told);
    }
}

/// The seeds of one test run; see [`for_each_seed`].
pub fn seeds(count: u64) -> Range<u64> {
    if let Some(seed) = number_from_environment("MAINSTAY_SEED") {
        return seed..seed.saturating_add(1);
    }
    0..number_from_environment("MAINSTAY_SEEDS").unwrap_or(count)
}

/// Whether tests are to take their time: `cargo xtask test --long`.
pub fn is_long() -> bool {
    number_from_environment("MAINSTAY_LONG").is_some_and(|number| number > 0)
}

#[expect(clippy::disallowed_methods, reason = "the tests' one door to the environment")]
fn number_from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    assert!(number.is_ok(), "{name}={text} is not a number");
    number.ok()
}

/// Speaks when a panic passes by.
struct TellSeed(u64);

impl Drop for TellSeed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            say(&format!("failed with seed {0}; repeat it with MAINSTAY_SEED={0}", self.0));
        }
    }
}

#[expect(clippy::print_stderr, reason = "the test's output is where a person looks for what to repeat")]
pub(crate) fn say(text: &str) {
    eprintln!("{text}");
}

#[cfg(test)]
mod tests {
    use super::Rng;

    #[test]
    fn a_seed_always_gives_the_published_numbers() {
        // xoshiro256** after splitmix64 from 0, as their authors' reference code prints them.
        let mut rng = Rng::new(0);
        let numbers: [u64; 3] = std::array::from_fn(|_| rng.next_u64());
        assert_eq!(numbers, [0x99ec_5f36_cb75_f2b4, 0xbf6e_1f78_4956_452a, 0x1a5f_849d_4933_e6e0]);
    }

    #[test]
    fn ranges_and_shuffles_reach_every_value_and_lose_none() {
        let mut rng = Rng::new(1);
        let mut values: Vec<u64> = (0..10).collect();
        rng.shuffle(&mut values);
        assert_ne!(values, (0..10).collect::<Vec<_>>());
        values.sort_unstable();
        assert_eq!(values, (0..10).collect::<Vec<_>>());
        let seen: std::collections::BTreeSet<u64> = (0..200).map(|_| rng.range(3..7)).collect();
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), [3, 4, 5, 6]);
    }
}
