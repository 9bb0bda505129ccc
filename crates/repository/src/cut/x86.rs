//! The prefilter's twins for x86-64: one vector of positions a step, nothing computed twice. Each level adds to a
//! vector the one that ends 1, 2, 4 or 8 positions earlier, shifted in from the step before. Steps go in groups
//! without a branch or a call between them, so that constants and vectors stay in registers.

#![expect(unsafe_code, reason = "vector loads, and calls of functions that need a processor feature")]

use std::arch::x86_64::*;

use super::prefilter::{IGNORED_BITS, Prefilter, SPAN};

/// Steps of a group. Half a group is thrown away at a cut, on average.
const GROUP: usize = 8;

/// [`Prefilter::find`] with AVX-512BW; as that, when the machine lacks it.
pub(super) fn find_avx512(
    filter: &Prefilter,
    data: &[u8],
    from: usize,
    accept: impl Fn(usize) -> bool,
) -> Option<usize> {
    if !is_x86_feature_detected!("avx512bw") || !is_x86_feature_detected!("avx512f") {
        return filter.find(data, from, accept);
    }
    // SAFETY: the features were just detected.
    unsafe { avx512(filter, data, from, accept) }
}

/// [`Prefilter::find`] with AVX2; as that, when the machine lacks it.
pub(super) fn find_avx2(
    filter: &Prefilter,
    data: &[u8],
    from: usize,
    accept: impl Fn(usize) -> bool,
) -> Option<usize> {
    if !is_x86_feature_detected!("avx2") {
        return filter.find(data, from, accept);
    }
    // SAFETY: the feature was just detected.
    unsafe { avx2(filter, data, from, accept) }
}

#[target_feature(enable = "avx512f,avx512bw")]
fn avx512(filter: &Prefilter, data: &[u8], from: usize, accept: impl Fn(usize) -> bool) -> Option<usize> {
    const LANES: usize = 32;
    let splat = |value: u16| _mm512_set1_epi16(value.cast_signed());
    let fold = |v| _mm512_xor_si512(v, _mm512_srli_epi16::<8>(v));
    let mix =
        |later, a, earlier, b| _mm512_add_epi16(_mm512_mullo_epi16(later, a), _mm512_mullo_epi16(earlier, b));
    // Lane i of a permutation of two vectors takes lane i - k of the newer one, or of the older one's end.
    let lanes: [u16; LANES] = std::array::from_fn(|lane| lane as u16);
    // SAFETY: an array of 32 lanes of 16 bits is one vector; the load needs no alignment.
    let lanes = unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) };
    let back = |k: u16| _mm512_add_epi16(lanes, splat(32 - k));
    let (by1, by2, by4, by8) = (back(1), back(2), back(4), back(8));
    let [(a1, b1), (a2, b2), (a4, b4), (a8, b8)] = filter.levels.map(|(a, b)| (splat(a), splat(b)));
    let (xor, product) = (splat(filter.leaf.0), splat(filter.leaf.1));
    let (mask, target) = (splat(u16::MAX << IGNORED_BITS), splat(filter.target << IGNORED_BITS));

    let zero = _mm512_setzero_si512();
    let (mut leaves, mut pairs, mut fours, mut eights) = (zero, zero, zero, zero);
    // One step more than needed goes ahead, to fill the vectors that later steps look back on.
    let mut at = from.checked_sub(LANES)?;
    let steps = data.get(at..)?.as_chunks::<LANES>().0;
    for group in steps.chunks(GROUP) {
        let mut hits = [0u32; GROUP];
        for (bytes, hits) in group.iter().zip(&mut hits) {
            // SAFETY: `bytes` are 32 bytes; the load needs no alignment.
            let raw = unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) };
            let leaf = fold(_mm512_mullo_epi16(_mm512_xor_si512(_mm512_cvtepu8_epi16(raw), xor), product));
            let pair = fold(mix(leaf, a1, _mm512_permutex2var_epi16(leaves, by1, leaf), b1));
            let four = fold(mix(pair, a2, _mm512_permutex2var_epi16(pairs, by2, pair), b2));
            let eight = fold(mix(four, a4, _mm512_permutex2var_epi16(fours, by4, four), b4));
            let value = mix(eight, a8, _mm512_permutex2var_epi16(eights, by8, eight), b8);
            (leaves, pairs, fours, eights) = (leaf, pair, four, eight);

            *hits = _mm512_cmpeq_epi16_mask(_mm512_and_si512(value, mask), target);
        }
        for (mut hits, _step) in hits.into_iter().zip(group) {
            while hits != 0 && at >= from {
                let end = at + hits.trailing_zeros() as usize + 1;
                if accept(end) {
                    return Some(end);
                }
                hits &= hits - 1;
            }
            at += LANES;
        }
    }
    filter.find(data, at.max(from), accept)
}

#[target_feature(enable = "avx2")]
fn avx2(filter: &Prefilter, data: &[u8], from: usize, accept: impl Fn(usize) -> bool) -> Option<usize> {
    const LANES: usize = SPAN;
    let splat = |value: u16| _mm256_set1_epi16(value.cast_signed());
    let fold = |v| _mm256_xor_si256(v, _mm256_srli_epi16::<8>(v));
    let mix =
        |later, a, earlier, b| _mm256_add_epi16(_mm256_mullo_epi16(later, a), _mm256_mullo_epi16(earlier, b));
    // The upper half of the older vector before the lower half of the newer one.
    let seam = |older, newer| _mm256_permute2x128_si256::<0x21>(older, newer);
    let [(a1, b1), (a2, b2), (a4, b4), (a8, b8)] = filter.levels.map(|(a, b)| (splat(a), splat(b)));
    let (xor, product) = (splat(filter.leaf.0), splat(filter.leaf.1));
    let (mask, target) = (splat(u16::MAX << IGNORED_BITS), splat(filter.target << IGNORED_BITS));

    let zero = _mm256_setzero_si256();
    let (mut leaves, mut pairs, mut fours, mut eights) = (zero, zero, zero, zero);
    // One step more than needed goes ahead, to fill the vectors that later steps look back on.
    let mut at = from.checked_sub(LANES)?;
    let steps = data.get(at..)?.as_chunks::<LANES>().0;
    for group in steps.chunks(GROUP) {
        let mut hits = [0u32; GROUP];
        for (bytes, hits) in group.iter().zip(&mut hits) {
            // SAFETY: `bytes` are 16 bytes; the load needs no alignment.
            let raw = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
            let leaf = fold(_mm256_mullo_epi16(_mm256_xor_si256(_mm256_cvtepu8_epi16(raw), xor), product));
            let pair = fold(mix(leaf, a1, _mm256_alignr_epi8::<14>(leaf, seam(leaves, leaf)), b1));
            let four = fold(mix(pair, a2, _mm256_alignr_epi8::<12>(pair, seam(pairs, pair)), b2));
            let eight = fold(mix(four, a4, _mm256_alignr_epi8::<8>(four, seam(fours, four)), b4));
            let value = mix(eight, a8, seam(eights, eight), b8);
            (leaves, pairs, fours, eights) = (leaf, pair, four, eight);

            // Two equal bits for each lane; one of them is kept.
            let equal = _mm256_cmpeq_epi16(_mm256_and_si256(value, mask), target);
            *hits = _mm256_movemask_epi8(equal).cast_unsigned() & 0x5555_5555;
        }
        for (mut hits, _step) in hits.into_iter().zip(group) {
            while hits != 0 && at >= from {
                let end = at + hits.trailing_zeros() as usize / 2 + 1;
                if accept(end) {
                    return Some(end);
                }
                hits &= hits - 1;
            }
            at += LANES;
        }
    }
    filter.find(data, at.max(from), accept)
}
