//! The two checksums of disk formats: CRC-32 (GPT, LVM) and CRC-32C (VHDX). Short tables are all they guard.

const IEEE: [u32; 256] = table(0xEDB8_8320);
const CASTAGNOLI: [u32; 256] = table(0x82F6_3B78);

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

/// CRC-32 as LVM uses it: another start, and the register as it is.
pub(crate) fn lvm(bytes: &[u8]) -> u32 {
    register(&IEEE, 0xF597_A6CF, bytes)
}

/// CRC-32C as VHDX uses it.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    !register(&CASTAGNOLI, !0, bytes)
}

#[cfg(test)]
mod tests {
    use super::{crc32, crc32c};

    #[test]
    fn the_published_check_values() {
        assert_eq!([crc32(b"123456789"), crc32c(b"123456789")], [0xCBF4_3926, 0xE306_9283]);
    }
}
