//! Checksums of data pages, as PostgreSQL counts them (`src/include/storage/checksum_impl.h` defines the algorithm: 32
//! interleaved sums after FNV-1a).

use super::lsn::Lsn;

const SUMS: usize = 32;
const PRIME: u32 = 16_777_619;
const OFFSETS: [u32; SUMS] = [
    0x5b1f_36e9,
    0xb852_5960,
    0x02ab_50aa,
    0x1de6_6d2a,
    0x79ff_467a,
    0x9bb9_f8a3,
    0x217e_7cd2,
    0x83e1_3d2c,
    0xf8d4_474f,
    0xe39e_b970,
    0x42c6_ae16,
    0x9932_16fa,
    0x7b09_3b5d,
    0x98da_ff3c,
    0xf718_902a,
    0x0b1c_9cdb,
    0xe58f_764b,
    0x1876_36bc,
    0x5d7b_3bb1,
    0xe73d_e7de,
    0x92be_c979,
    0xcca6_c0b2,
    0x304a_0979,
    0x85aa_43d4,
    0x7831_25bb,
    0x6ca8_eaa2,
    0xe407_eac6,
    0x4b5c_fc3e,
    0x9fbf_8c76,
    0x15ca_20be,
    0xf2ca_9fd3,
    0x959b_d756,
];
/// Where a page has its own checksum, and the length of its header.
const AT: usize = 8;
const HEADER_BYTES: usize = 24;

fn mix(sum: u32, value: u32) -> u32 {
    let mixed = sum ^ value;
    mixed.wrapping_mul(PRIME) ^ (mixed >> 17)
}

/// Of the page as block `block` of its relation, its own checksum taken for 0.
fn checksum(page: &[u8], block: u32) -> u16 {
    let mut sums = OFFSETS;
    for (row, words) in page.chunks_exact(4 * SUMS).enumerate() {
        for (column, (sum, word)) in sums.iter_mut().zip(words.as_chunks::<4>().0).enumerate() {
            let word = u32::from_le_bytes(*word);
            let word = if row == 0 && column == AT / 4 { word & 0xffff_0000 } else { word };
            *sum = mix(*sum, word);
        }
    }
    for _ in 0..2 {
        sums.iter_mut().for_each(|sum| *sum = mix(*sum, 0));
    }
    let all = sums.iter().fold(0, |all, sum| all ^ sum) ^ block;
    (all % 65_535 + 1) as u16
}

/// Whether a page is what its checksum says, was never used, or was written after `start`: then it may be torn, and the
/// log since `start` holds it whole.
pub(super) fn is_sound(page: &[u8], block: u32, start: Lsn) -> bool {
    let Some(header) = page.first_chunk::<HEADER_BYTES>() else { return false };
    let half = |at: usize| header.get(at..at + 2).map_or(0, |half| u16::from_le_bytes([half[0], half[1]]));
    let word = |at: usize| u64::from(half(at)) | u64::from(half(at + 2)) << 16;
    let is_new = half(14) == 0;
    is_new || Lsn(word(0) << 32 | word(4)) >= start || checksum(page, block) == half(AT)
}

#[cfg(test)]
mod tests {
    use super::{Lsn, checksum, is_sound};

    #[test]
    fn a_page_is_doubted_only_when_it_is_old_used_and_not_what_it_says() {
        let mut page = vec![7_u8; 8192];
        page[..8].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 1]);
        page[14] = 1;
        let right = checksum(&page, 5);
        page[8..10].copy_from_slice(&right.to_le_bytes());
        let (before, behind) = (Lsn(0x0100_0000), Lsn(0x0100_0001));
        assert!(is_sound(&page, 5, behind));
        assert!(!is_sound(&page, 6, behind), "the page of another place");
        page[4000] ^= 1;
        assert!(!is_sound(&page, 5, behind));
        assert!(is_sound(&page, 5, before), "the log has it");
        assert!(is_sound(&[0; 8192], 5, behind), "never used");
        assert!(!is_sound(&page[..20], 5, before), "no page at all");
    }
}
