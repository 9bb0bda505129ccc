//! A device read from front to back.

use crate::{Blocks, Error, ExtentKind, Piece, Result, StreamEnd, StreamReader};

/// Extents are asked for in windows of so many bytes, so that memory does not grow with the device.
const WINDOW_BYTES: u64 = 1 << 30;

/// Yields the bytes of `blocks` in order; zeros that occupy no space, and those that do, as holes.
pub struct BlockStream<'a> {
    blocks: &'a dyn Blocks,
    at: u64,
    window_end: u64,
    /// What is left of the window, last first: where each extent ends, and whether it holds data.
    extents: Vec<(u64, bool)>,
}

impl<'a> BlockStream<'a> {
    pub fn new(blocks: &'a dyn Blocks) -> Self {
        Self { blocks, at: 0, window_end: 0, extents: Vec::new() }
    }

    fn extent(&mut self) -> Result<Option<(u64, bool)>> {
        while self.extents.last().is_some_and(|(end, _)| *end <= self.at) {
            self.extents.pop();
        }
        if self.extents.is_empty() {
            if self.at >= self.blocks.size() {
                return Ok(None);
            }
            self.window_end = self.blocks.size().min(self.at.saturating_add(WINDOW_BYTES));
            let found = self.blocks.extents(self.at..self.window_end)?;
            self.extents.extend(found.iter().rev().map(|it| (it.range.end, it.kind == ExtentKind::Data)));
        }
        match self.extents.last() {
            Some(extent) if extent.0 > self.at => Ok(Some(*extent)),
            _ => Err(Error::bug("the extents of a device do not cover it")),
        }
    }
}

impl StreamReader for BlockStream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece> {
        let Some((end, is_data)) = self.extent()? else { return Ok(Piece::End) };
        let left = end - self.at;
        if !is_data {
            self.at = end;
            return Ok(Piece::Hole(left));
        }
        let length = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.blocks.read_at(self.at, buffer.get_mut(..length).unwrap_or_default())?;
        self.at += length as u64;
        Ok(Piece::Data(length))
    }

    fn finish(self: Box<Self>) -> Result<StreamEnd> {
        Ok(StreamEnd::Steady)
    }
}
