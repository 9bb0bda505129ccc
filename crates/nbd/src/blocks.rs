//! Blocks that can be written.

use std::ops::Range;

use mainstay_core::{Blocks, Code, Error, Result};

/// A device that is written at random places, from several threads at once.
pub trait WritableBlocks: Blocks {
    /// Writes all of `data` or fails. Other threads see it when this returns; it is durable after [`Self::flush`].
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()>;

    /// Makes `range` read as zeros; may free the space.
    fn zero(&self, range: Range<u64>) -> Result<()>;

    /// Makes durable whatever was written before this was called.
    fn flush(&self) -> Result<()>;
}

/// Errors: [`Code::Usage`] when `range` is not within a device of `size` bytes.
pub(crate) fn check(size: u64, range: &Range<u64>) -> Result<()> {
    if range.start <= range.end && range.end <= size {
        return Ok(());
    }
    let what = format!("bytes {} to {} are not on a device of {size} bytes", range.start, range.end);
    Err(Error::new(Code::Usage, what))
}
