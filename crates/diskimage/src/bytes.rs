//! Fixed-size fields of what lies on a disk. A field beyond the end is an error, never a panic.

use mainstay_core::{Blocks, Error, Result};

/// Bytes read from an image, and what they are in words ("the qcow2 header").
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    what: &'a str,
    bytes: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(crate) fn new(what: &'a str, bytes: &'a [u8]) -> Self {
        Self { what, bytes }
    }

    pub(crate) fn take(&self, at: usize, length: usize) -> Result<&'a [u8]> {
        at.checked_add(length).and_then(|end| self.bytes.get(at..end)).ok_or_else(|| {
            Error::integrity(format!("{} ends within its fields ({} bytes)", self.what, self.bytes.len()))
        })
    }

    pub(crate) fn array<const N: usize>(&self, at: usize) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(at, N)?);
        Ok(array)
    }

    pub(crate) fn be16(&self, at: usize) -> Result<u16> {
        self.array(at).map(u16::from_be_bytes)
    }

    pub(crate) fn be32(&self, at: usize) -> Result<u32> {
        self.array(at).map(u32::from_be_bytes)
    }

    pub(crate) fn be64(&self, at: usize) -> Result<u64> {
        self.array(at).map(u64::from_be_bytes)
    }

    pub(crate) fn le16(&self, at: usize) -> Result<u16> {
        self.array(at).map(u16::from_le_bytes)
    }

    pub(crate) fn le32(&self, at: usize) -> Result<u32> {
        self.array(at).map(u32::from_le_bytes)
    }

    pub(crate) fn le64(&self, at: usize) -> Result<u64> {
        self.array(at).map(u64::from_le_bytes)
    }

    /// A field of text that ends at its first NUL; what is not UTF-8 is replaced.
    pub(crate) fn text(&self, at: usize, length: usize) -> Result<String> {
        let field = self.take(at, length)?;
        let end = field.iter().position(|byte| *byte == 0).unwrap_or(length);
        Ok(String::from_utf8_lossy(&field[..end]).into_owned())
    }
}

/// `length` bytes from `offset` on. The caller has bounded `length`; bytes beyond the end are an error.
pub(crate) fn read(blocks: &dyn Blocks, offset: u64, length: usize) -> Result<Vec<u8>> {
    crate::compose::check_read(blocks, offset, length)?;
    let mut bytes = vec![0; length];
    blocks.read_at(offset, &mut bytes)?;
    Ok(bytes)
}

/// As [`read`], but only as much as there is.
pub(crate) fn read_up_to(blocks: &dyn Blocks, offset: u64, length: usize) -> Result<Vec<u8>> {
    let there = usize::try_from(blocks.size().saturating_sub(offset)).unwrap_or(usize::MAX);
    read(blocks, offset, length.min(there))
}

/// The index of something that lies in memory already.
pub(crate) fn index(number: u64) -> Result<usize> {
    usize::try_from(number)
        .map_err(|error| Error::integrity(format!("{number} fits no memory")).because(error))
}
