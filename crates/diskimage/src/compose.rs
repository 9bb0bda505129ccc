//! Devices made of other devices.

use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{Blocks, ChangeState, Code, Error, Extent, ExtentKind, Result, Run};

/// A part of a device as a device of its own.
pub struct Window {
    base: Arc<dyn Blocks>,
    range: Range<u64>,
}

impl Window {
    /// `range` in bytes of `base`; fails when it does not lie within.
    pub fn new(base: Arc<dyn Blocks>, range: Range<u64>) -> Result<Self> {
        if range.start > range.end || range.end > base.size() {
            return Err(Error::integrity(format!(
                "bytes {} to {} do not lie on a device of {} bytes",
                range.start,
                range.end,
                base.size()
            )));
        }
        Ok(Self { base, range })
    }
}

impl Blocks for Window {
    fn size(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        check_range(self, &range)?;
        let mut extents = self.base.extents(range.start + self.range.start..range.end + self.range.start)?;
        for extent in &mut extents {
            extent.range = extent.range.start - self.range.start..extent.range.end - self.range.start;
        }
        Ok(extents)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        check_read(self, offset, buffer.len())?;
        self.base.read_at(self.range.start + offset, buffer)
    }

    fn cuts(&self, range: Range<u64>) -> Result<Vec<Run>> {
        check_range(self, &range)?;
        let mut runs = self.base.cuts(range.start + self.range.start..range.end + self.range.start)?;
        for run in &mut runs {
            run.image = run.image.start - self.range.start..run.image.end - self.range.start;
        }
        Ok(runs)
    }
}

/// An extent of which nobody knows whether it changed.
pub fn extent(range: Range<u64>, kind: ExtentKind) -> Extent {
    Extent { range, kind, change: ChangeState::Unknown }
}

/// Refuses a question about bytes that `blocks` does not have.
pub fn check_range(blocks: &dyn Blocks, range: &Range<u64>) -> Result<()> {
    if range.start <= range.end && range.end <= blocks.size() {
        return Ok(());
    }
    Err(Error::new(
        Code::Io,
        format!("bytes {} to {} lie beyond the end of a device of {}", range.start, range.end, blocks.size()),
    ))
}

/// As [`check_range`], for `length` bytes from `offset` on.
pub fn check_read(blocks: &dyn Blocks, offset: u64, length: usize) -> Result<()> {
    let end = u64::try_from(length).ok().and_then(|length| offset.checked_add(length)).unwrap_or(u64::MAX);
    check_range(blocks, &(offset..end))
}
