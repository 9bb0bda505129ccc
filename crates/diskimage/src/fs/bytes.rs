//! Numbers out of a structure from disk, and the checksum that file systems share.

use mainstay_core::{Error, Result};

/// Fields of a structure by their byte offset. One that lies beyond the end is an error, never a panic.
pub(crate) trait Bytes {
    fn field<const N: usize>(&self, at: usize) -> Result<[u8; N]>;
    fn part(&self, at: usize, length: usize) -> Result<&[u8]>;
    fn part_mut(&mut self, at: usize, length: usize) -> Result<&mut [u8]>;

    fn byte(&self, at: usize) -> Result<u8> {
        Ok(u8::from_le_bytes(self.field(at)?))
    }

    fn le16(&self, at: usize) -> Result<u16> {
        Ok(u16::from_le_bytes(self.field(at)?))
    }

    fn le32(&self, at: usize) -> Result<u32> {
        Ok(u32::from_le_bytes(self.field(at)?))
    }

    fn le64(&self, at: usize) -> Result<u64> {
        Ok(u64::from_le_bytes(self.field(at)?))
    }

    fn be16(&self, at: usize) -> Result<u16> {
        Ok(u16::from_be_bytes(self.field(at)?))
    }

    fn be32(&self, at: usize) -> Result<u32> {
        Ok(u32::from_be_bytes(self.field(at)?))
    }
}

impl Bytes for [u8] {
    fn field<const N: usize>(&self, at: usize) -> Result<[u8; N]> {
        self.get(at..).and_then(|rest| rest.first_chunk()).copied().ok_or_else(ends_early)
    }

    fn part(&self, at: usize, length: usize) -> Result<&[u8]> {
        at.checked_add(length).and_then(|end| self.get(at..end)).ok_or_else(ends_early)
    }

    fn part_mut(&mut self, at: usize, length: usize) -> Result<&mut [u8]> {
        at.checked_add(length).and_then(|end| self.get_mut(at..end)).ok_or_else(ends_early)
    }
}

fn ends_early() -> Error {
    Error::integrity("a structure of the file system ends too early")
}

/// The bytes before the first NUL.
pub(crate) fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// A name in UTF-16 as bytes: UTF-8, and half pairs, which no text has but names may, as if they were characters, so
/// that different names stay different.
pub(crate) fn from_utf16(units: impl Iterator<Item = u16>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for character in char::decode_utf16(units) {
        match character {
            Ok(character) => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
            Err(half) => {
                let unit = half.unpaired_surrogate();
                let tail = |shift: u16| 0x80 | (unit >> shift & 0x3f) as u8;
                bytes.extend_from_slice(&[0xe0 | (unit >> 12) as u8, tail(6), tail(0)]);
            }
        }
    }
    bytes
}

/// The sixteen bytes of a UUID as people write it; empty for the nil UUID.
pub(crate) fn uuid(bytes: [u8; 16]) -> String {
    if bytes == [0; 16] {
        return String::new();
    }
    let mut text = String::with_capacity(36);
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// CRC-32C (Castagnoli) going on from `crc`, without the complement before and after: the form that ext4 stores.
pub(crate) fn crc32c(mut crc: u32, bytes: &[u8]) -> u32 {
    let (words, rest) = bytes.as_chunks::<8>();
    for word in words {
        let low = u32::from_le_bytes([word[0], word[1], word[2], word[3]]) ^ crc;
        let [a, b, c, d] = low.to_le_bytes();
        let [.., e, f, g, h] = *word;
        crc = CRC32C[7][usize::from(a)]
            ^ CRC32C[6][usize::from(b)]
            ^ CRC32C[5][usize::from(c)]
            ^ CRC32C[4][usize::from(d)]
            ^ CRC32C[3][usize::from(e)]
            ^ CRC32C[2][usize::from(f)]
            ^ CRC32C[1][usize::from(g)]
            ^ CRC32C[0][usize::from(h)];
    }
    for byte in rest {
        crc = CRC32C[0][usize::from(crc as u8 ^ byte)] ^ (crc >> 8);
    }
    crc
}

/// `CRC32C[k][b]` is the remainder of the byte `b` followed by `k` zero bytes.
static CRC32C: [[u32; 256]; 8] = crc32c_tables();

const fn crc32c_tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut remainder = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            remainder = if remainder & 1 == 1 { (remainder >> 1) ^ 0x82f6_3b78 } else { remainder >> 1 };
            bit += 1;
        }
        tables[0][byte] = remainder;
        byte += 1;
    }
    let mut zeros = 1;
    while zeros < 8 {
        let mut byte = 0;
        while byte < 256 {
            let shorter = tables[zeros - 1][byte];
            tables[zeros][byte] = tables[0][(shorter & 0xff) as usize] ^ (shorter >> 8);
            byte += 1;
        }
        zeros += 1;
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::{crc32c, uuid};

    #[test]
    fn the_checksum_agrees_with_the_published_vectors() {
        // RFC 3720, B.4, complemented there before and after.
        let published = |bytes: &[u8]| !crc32c(!0, bytes);
        assert_eq!(published(&[0; 32]), 0x8a91_36aa);
        assert_eq!(published(&[0xff; 32]), 0x62a8_ab43);
        let rising: Vec<u8> = (0..32).collect();
        assert_eq!(published(&rising), 0x46dd_794e);
        assert_eq!(published(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn uuids_are_written_as_the_tools_write_them() {
        let bytes = std::array::from_fn(|index| index as u8 * 17);
        assert_eq!(uuid(bytes), "00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(uuid([0; 16]), "");
    }
}
