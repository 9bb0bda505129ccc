use proptest::prelude::*;

use super::prefilter::{IGNORED_BITS, SPAN};
use super::*;

const SMALL: Profile = Profile { min: 64, average: 2048, max: 8192 };

/// Bytes that look random and never change, from a 64-bit state.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut stream = KeyStream::new(&std::array::from_fn(|i| seed.to_le_bytes()[i % 8]));
    let mut bytes = vec![0; len];
    stream.0.fill(&mut bytes);
    bytes
}

fn lengths(cutter: &Cutter, mut data: &[u8]) -> Vec<usize> {
    let mut lengths = Vec::new();
    while !data.is_empty() {
        let len = cutter.cut(data);
        lengths.push(len);
        data = &data[len..];
    }
    lengths
}

/// The definition, word for word as docs/format.md has it.
fn defined_cut(cutter: &Cutter, data: &[u8]) -> usize {
    let profile = cutter.profile;
    let limit = data.len().min(profile.max);
    for end in profile.min + 1..=limit {
        let window: &[u8; SPAN] = data[..end].last_chunk().unwrap();
        let candidate = cutter.prefilter.value(window) >> IGNORED_BITS == cutter.prefilter.target;
        let digest = cutter.confirm.digest(data[..end].last_chunk().unwrap());
        let bits = if end < profile.average { cutter.strict_bits } else { cutter.loose_bits };
        if candidate && digest.leading_zeros() >= bits {
            return end;
        }
    }
    limit
}

fn twins(key: u8, profile: Profile) -> Vec<Cutter> {
    let cutter = Cutter::new(&[key; 32], profile);
    Engine::available().into_iter().map(|engine| Cutter { engine, ..cutter.clone() }).collect()
}

fn assert_twins_agree(key: u8, data: &[u8]) {
    for profile in [SMALL, Profile { min: 71, average: 1 << 13, max: (1 << 15) + 5 }] {
        let twins = twins(key, profile);
        let mut rest = data;
        while !rest.is_empty() {
            let expected = defined_cut(&twins[0], rest);
            for twin in &twins {
                assert_eq!(
                    twin.cut(rest),
                    expected,
                    "{:?}, key {key}, {} bytes left",
                    twin.engine,
                    rest.len()
                );
            }
            rest = &rest[expected..];
        }
    }
}

fn structured() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        (any::<u8>(), 1..3000usize).prop_map(|(byte, len)| vec![byte; len]),
        (any::<[u8; 3]>(), 1..1000usize).prop_map(|(unit, times)| unit.repeat(times)),
        (any::<u64>(), 1..5000usize).prop_map(|(seed, len)| noise(seed, len)),
        (any::<u64>(), 1..3000usize).prop_map(|(seed, len)| noise(seed, len).iter().map(|b| b & 1).collect()),
    ];
    prop::collection::vec(piece, 0..6).prop_map(|pieces| pieces.concat())
}

proptest! {
    #[test]
    fn every_twin_follows_the_definition(key: u8, data in structured(), skip in 0..40usize) {
        assert_twins_agree(key, data.get(skip..).unwrap_or_default());
    }
}

#[test]
fn twins_agree_where_vectors_end() {
    let data = noise(5, 9000);
    for len in (0..200).chain(8100..8300) {
        assert_twins_agree(1, &data[..len]);
    }
}

/// Data made to be a candidate nearly everywhere: a period whose windows all pass the prefilter half the time.
#[test]
fn twins_agree_on_data_full_of_candidates() {
    let cutter = Cutter::new(&[9; 32], SMALL);
    let pool = noise(77, 1 << 20);
    let hits = pool.windows(SPAN).filter(|window| {
        let window: &[u8; SPAN] = (*window).try_into().unwrap();
        cutter.prefilter.value(window) >> IGNORED_BITS == cutter.prefilter.target
    });
    let data = hits.flatten().copied().collect::<Vec<u8>>();
    assert!(data.len() > 20_000);
    assert_twins_agree(9, &data);
}

/// Under a target taken as it comes, four keys in ten would have such a run.
#[test]
fn under_no_key_is_a_run_of_one_byte_a_candidate() {
    for key in 0..64 {
        let filter = Cutter::new(&[key; 32], SMALL).prefilter;
        let hit = |byte: &u8| filter.value(&[*byte; SPAN]) >> IGNORED_BITS == filter.target;
        assert_eq!((0..=255).find(hit), None, "key {key}");
    }
}

#[test]
fn contract_of_lengths() {
    let cutter = Cutter::new(&[1; 32], Profile::STREAM);
    let data = noise(3, 200_000);
    assert_eq!(cutter.cut(&[]), 0);
    for len in [1, 63, 64, 4095, 4096] {
        assert_eq!(cutter.cut(&data[..len]), len);
    }
    let first = cutter.cut(&data);
    assert!(first > 4096 && first <= 65_536);
    assert_eq!(cutter.cut(&data[..65_536]), first, "bytes beyond the longest chunk decide nothing");
    for byte in 0..=255 {
        assert_eq!(cutter.cut(&vec![byte; 100_000]), 65_536, "runs of one byte are never cut short");
    }
}

#[test]
fn lengths_are_spread_as_the_profile_says() {
    for (profile, len) in [(Profile::STREAM, 48 << 20), (Profile::ARCHIVE, 64 << 20)] {
        let lengths = lengths(&Cutter::new(&[4; 32], profile), &noise(11, len));
        let mean = len / lengths.len();
        assert!(mean > profile.average && mean < profile.average * 3 / 2, "mean {mean}");
        let share = |keep: &dyn Fn(usize) -> bool| {
            lengths.iter().filter(|len| keep(**len)).count() * 100 / lengths.len()
        };
        assert!(share(&|len| len == profile.max) < 2, "few chunks reach the longest length");
        assert!((10..25).contains(&share(&|len| len < profile.average)), "few are shorter than the average");
        assert!(lengths[..lengths.len() - 1].iter().all(|len| *len > profile.min && *len <= profile.max));
    }
}

/// Text has little entropy per byte and much repetition; its chunks must still look like those of noise.
#[test]
fn poor_text_is_cut_like_noise() {
    let words = ["the ", "index ", "of ", "a ", "pack ", "is ", "sealed, ", "and ", "then ", "read\n"];
    let text: Vec<u8> =
        noise(8, 4 << 20).iter().flat_map(|byte| words[usize::from(*byte) % words.len()].bytes()).collect();
    for key in 0..4 {
        let lengths = lengths(&Cutter::new(&[key; 32], Profile::STREAM), &text);
        let mean = text.len() / lengths.len();
        assert!((12_000..28_000).contains(&mean), "mean {mean} under key {key}");
    }
}

#[test]
fn an_edit_moves_only_the_cuts_beside_it() {
    let cutter = Cutter::new(&[2; 32], Profile::STREAM);
    let before = noise(21, 8 << 20);
    let ends = |data: &[u8]| {
        let mut end = 0;
        lengths(&cutter, data)
            .into_iter()
            .map(move |len| {
                end += len;
                end
            })
            .collect::<Vec<_>>()
    };
    let old = ends(&before);
    for at in [0, 1_000_003, 5 << 20] {
        let mut after = before.clone();
        after.splice(at..at, noise(at as u64 + 1, 1001));
        let moved: std::collections::HashSet<usize> =
            old.iter().map(|end| if *end > at { end + 1001 } else { *end }).collect();
        let new = ends(&after);
        let strange = new.iter().filter(|end| !moved.contains(end)).count();
        assert!(strange <= 12, "{strange} of {} ends moved by an insertion at {at}", new.len());
    }
}

#[test]
fn another_key_cuts_elsewhere() {
    let data = noise(30, 4 << 20);
    let all = |key: u8| lengths(&Cutter::new(&[key; 32], Profile::STREAM), &data);
    assert_ne!(all(1)[..20], all(2)[..20]);
}

/// Format: these cuts never change. Whoever changes them makes every repository store everything again.
#[test]
fn golden_cuts() {
    let key = std::array::from_fn(|i| i as u8);
    let first = |profile, count| {
        let mut all = lengths(&Cutter::new(&key, profile), &noise(42, 4 << 20));
        all.truncate(count);
        all
    };
    assert_eq!(first(Profile::STREAM, 8), [22836, 26458, 20559, 25910, 20355, 17345, 20387, 18106]);
    assert_eq!(first(Profile::ARCHIVE, 5), [70644, 104900, 98961, 25681, 91094]);
    assert_eq!(
        chunk_id(&key, b"mainstay").to_string(),
        "81dde171e6696b956a24e9e4e0296af540c1db2c79a62588983fbb2084a9fab1"
    );
}

#[test]
fn zero_test_sees_every_byte() {
    assert!(is_zero(&[]));
    for len in [1, 63, 64, 65, 4096, 5001] {
        let mut bytes = vec![0; len];
        assert!(is_zero(&bytes));
        for at in (0..len).step_by(7).chain([len - 1]) {
            bytes[at] = 0x80;
            assert!(!is_zero(&bytes), "byte {at} of {len}");
            bytes[at] = 0;
        }
    }
}
