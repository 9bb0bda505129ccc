//! Little-endian bytes in and out. Every stored structure is written by [`Encode`] methods and read back by a
//! [`Decoder`] that can run out of input but never out of bounds.

use mainstay_core::{Code, Error, Id16, Result};

/// Appends fields to a byte vector.
pub(crate) trait Encode {
    fn u8(&mut self, value: u8);
    fn u16(&mut self, value: u16);
    fn u32(&mut self, value: u32);
    fn u64(&mut self, value: u64);
    fn i64(&mut self, value: i64);
    /// Seven bits a byte, least significant first, the high bit set on all but the last.
    fn varint(&mut self, value: u64);
    fn fixed(&mut self, bytes: &[u8]);
    /// A varint length, then the bytes.
    fn bytes(&mut self, bytes: &[u8]);
}

impl Encode for Vec<u8> {
    fn u8(&mut self, value: u8) {
        self.push(value);
    }

    fn u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn i64(&mut self, value: i64) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        self.push(value as u8);
    }

    fn fixed(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.varint(bytes.len() as u64);
        self.extend_from_slice(bytes);
    }
}

/// Reads fields from the front of a slice; every error is [`mainstay_core::Code::Integrity`] and names `what`.
#[derive(Clone)]
pub(crate) struct Decoder<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { rest: bytes, what }
    }

    pub(crate) fn malformed(&self, why: &str) -> Error {
        Error::integrity(format!("malformed {}: {why}", self.what))
    }

    pub(crate) fn take(&mut self, length: usize) -> Result<&'a [u8]> {
        let Some((head, rest)) = self.rest.split_at_checked(length) else {
            return Err(self.malformed("it ends too early"));
        };
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(crate) fn id(&mut self) -> Result<Id16> {
        Ok(Id16(self.array()?))
    }

    pub(crate) fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(crate) fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(crate) fn i64(&mut self) -> Result<i64> {
        Ok(i64::from_le_bytes(self.array()?))
    }

    /// Refuses encodings longer than needed, so that every value has one spelling.
    pub(crate) fn varint(&mut self) -> Result<u64> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits || (byte == 0 && shift > 0) {
                return Err(self.malformed("a number is not in its shortest form"));
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.malformed("a number is longer than 64 bits"))
    }

    pub(crate) fn varint_u32(&mut self) -> Result<u32> {
        let value = self.varint()?;
        u32::try_from(value).map_err(|_range| self.malformed("a number is larger than 32 bits"))
    }

    /// A number that is compared with something already in memory before it is used.
    pub(crate) fn index(&mut self) -> Result<usize> {
        Ok(usize::try_from(self.varint()?).unwrap_or(usize::MAX))
    }

    /// A count of things of which each takes at least `least` bytes: bounded by what is left, so that a hostile
    /// count cannot reserve memory.
    pub(crate) fn count(&mut self, least: usize) -> Result<usize> {
        let count = usize::try_from(self.varint()?).unwrap_or(usize::MAX);
        if count > self.rest.len() / least.max(1) {
            return Err(self.malformed("a count is larger than what follows"));
        }
        Ok(count)
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8]> {
        let length = self.count(1)?;
        self.take(length)
    }

    /// UTF-8 text with a varint length.
    pub(crate) fn text(&mut self) -> Result<String> {
        let bytes = self.bytes()?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(self.malformed("text is not UTF-8")),
        }
    }

    pub(crate) fn expect(&mut self, magic: &[u8]) -> Result<()> {
        if self.take(magic.len())? == magic { Ok(()) } else { Err(self.malformed("its magic is missing")) }
    }

    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// Passes over what a later version appended: fields of a tag, a length and that many bytes. One with a tag below
    /// 128 must be understood: [`Code::TooNew`].
    pub(crate) fn later_fields(self) -> Result<()> {
        // No field has this tag, since one must understand it.
        self.later_field(0).map(drop)
    }

    /// As [`Decoder::later_fields`]; the value of the last one with the tag `known`.
    pub(crate) fn later_field(mut self, known: u8) -> Result<Option<&'a [u8]>> {
        let mut found = None;
        while !self.is_empty() {
            let (tag, value) = (self.u8()?, self.bytes()?);
            if tag == known && tag >= 128 {
                found = Some(value);
            } else if tag < 128 {
                let what =
                    format!("the {} has a field of kind {tag}, which this version does not know", self.what);
                return Err(Error::new(Code::TooNew, what).hint("use a newer Mainstay for this repository"));
            }
        }
        Ok(found)
    }

    pub(crate) fn end(self) -> Result<()> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.malformed("bytes follow its end")) }
    }
}

#[cfg(test)]
mod tests {
    use super::{Code, Decoder, Encode as _};

    #[test]
    fn numbers_have_one_spelling_and_bounds() {
        for value in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX] {
            let mut bytes = Vec::new();
            bytes.varint(value);
            assert_eq!(Decoder::new("test", &bytes).varint().unwrap(), value);
        }
        for bad in [
            &[0x80, 0x00][..],
            &[0x80],
            &[0xff; 10],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2],
        ] {
            assert!(Decoder::new("test", bad).varint().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn later_fields_are_passed_over_unless_they_must_be_understood() {
        let fields = |tag| {
            let mut bytes = vec![200, 0];
            bytes.u8(tag);
            bytes.bytes(b"something new");
            bytes
        };
        Decoder::new("test", &fields(128)).later_fields().unwrap();
        assert_eq!(Decoder::new("test", &fields(127)).later_fields().unwrap_err().code(), Code::TooNew);
        let cut = &fields(128)[..10];
        assert_eq!(Decoder::new("test", cut).later_fields().unwrap_err().code(), Code::Integrity);
    }

    #[test]
    fn a_hostile_count_reserves_nothing() {
        let mut bytes = Vec::new();
        bytes.varint(u64::MAX);
        assert!(Decoder::new("test", &bytes).bytes().is_err());
        assert!(Decoder::new("test", &bytes).count(16).is_err());
    }
}
