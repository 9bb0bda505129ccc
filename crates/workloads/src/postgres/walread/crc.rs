//! CRC-32C (Castagnoli), eight bytes at a time.

const POLYNOMIAL: u32 = 0x82f6_3b78;
const TABLES: [[u32; 256]; 8] = tables();

const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0_u32; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut value = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { POLYNOMIAL ^ (value >> 1) } else { value >> 1 };
            bit += 1;
        }
        tables[0][byte] = value;
        byte += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut byte = 0;
        while byte < 256 {
            let last = tables[table - 1][byte];
            tables[table][byte] = tables[0][(last & 0xff) as usize] ^ (last >> 8);
            byte += 1;
        }
        table += 1;
    }
    tables
}

/// Of parts that follow each other.
pub(super) fn crc32c(parts: [&[u8]; 2]) -> u32 {
    let [t0, t1, t2, t3, t4, t5, t6, t7] = &TABLES;
    let at = |table: &[u32; 256], value: u32| table[(value & 0xff) as usize];
    let mut crc = !0_u32;
    for part in parts {
        let (eights, rest) = part.as_chunks::<8>();
        for [a, b, c, d, e, f, g, h] in eights {
            let low = crc ^ u32::from_le_bytes([*a, *b, *c, *d]);
            let high = u32::from_le_bytes([*e, *f, *g, *h]);
            crc = at(t7, low)
                ^ at(t6, low >> 8)
                ^ at(t5, low >> 16)
                ^ at(t4, low >> 24)
                ^ at(t3, high)
                ^ at(t2, high >> 8)
                ^ at(t1, high >> 16)
                ^ at(t0, high >> 24);
        }
        for byte in rest {
            crc = at(t0, crc ^ u32::from(*byte)) ^ (crc >> 8);
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::crc32c;

    #[test]
    fn the_published_value_comes_out_however_the_parts_are_cut() {
        // Appendix B.4 of RFC 3720 and the usual check value.
        let text = b"123456789";
        for cut in 0..=text.len() {
            assert_eq!(crc32c([&text[..cut], &text[cut..]]), 0xe306_9283);
        }
        assert_eq!(crc32c([&[0; 32], &[]]), 0x8a91_36aa);
        assert_eq!(crc32c([&[0xff; 32], &[]]), 0x62a8_ab43);
    }
}
