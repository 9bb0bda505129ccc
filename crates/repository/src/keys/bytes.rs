//! Reading little-endian bytes that may be hostile.

use mainstay_core::{Error, Result};

/// What is left to read, and of what.
pub(super) struct Bytes<'a> {
    rest: &'a [u8],
    whole: &'static str,
}

impl<'a> Bytes<'a> {
    /// `whole` names the thing in errors: "key ring".
    pub(super) const fn new(bytes: &'a [u8], whole: &'static str) -> Self {
        Self { rest: bytes, whole }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.rest.len()
    }

    pub(super) fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or_else(|| self.broken("ends too early"))?;
        self.rest = rest;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or_else(|| self.broken("ends too early"))?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8> {
        self.array().map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// The rest, which must be exactly `N` bytes.
    pub(super) fn last<const N: usize>(&mut self) -> Result<[u8; N]> {
        let array = self.array()?;
        self.end()?;
        Ok(array)
    }

    pub(super) fn end(&self) -> Result<()> {
        if self.is_empty() { Ok(()) } else { Err(self.broken("is longer than it says")) }
    }

    pub(super) fn broken(&self, how: &str) -> Error {
        Error::integrity(format!("the {} {how}", self.whole))
    }
}
