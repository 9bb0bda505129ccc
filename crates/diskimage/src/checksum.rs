//! The checksum of GPT. Short tables are all it guards.

const IEEE: [u32; 256] = table(0xEDB8_8320);

const fn table(polynomial: u32) -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut value = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 0 { value >> 1 } else { value >> 1 ^ polynomial };
            bit += 1;
        }
        table[byte] = value;
        byte += 1;
    }
    table
}

fn register(table: &[u32; 256], start: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(start, |value, byte| value >> 8 ^ table[usize::from(value as u8 ^ byte)])
}

/// CRC-32 as GPT uses it.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    !register(&IEEE, !0, bytes)
}

#[cfg(test)]
mod tests {
    use super::crc32;

    #[test]
    fn the_published_check_value() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
    }
}
