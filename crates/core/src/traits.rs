//! The seams. Whatever moves recovery data is a [`Source`] copied into a [`Target`].

use std::ops::Range;

use crate::{Captured, Item, Receipt, Result, Skip};

/// Yields items in the order of [`crate::ItemPath`]; a directory comes before what is below it.
///
/// Dropped without [`Source::commit`], it abandons: thaws, keeps bitmaps and slots where they were.
pub trait Source: Send {
    fn next(&mut self) -> Result<Next>;

    /// Called once after [`Next::End`]: what was reached. Nothing is released yet.
    fn seal(&mut self) -> Result<Captured>;

    /// Called once the target holds everything durably.
    fn commit(self: Box<Self>, receipt: &Receipt) -> Result<()>;
}

pub enum Next {
    Item(Box<Item>),
    /// Something that is missing from, or was noticed in, this run.
    Skipped(Skip),
    End,
}

/// Accepts items in order. Dropped without [`Target::finish`], it undoes what it staged.
pub trait Target: Send {
    type Done;

    /// May return before the body has been read; an error of an earlier item may surface here or in `finish`.
    fn put(&mut self, item: Item) -> Result<()>;

    /// Records that the source could not yield an item.
    fn skip(&mut self, skip: Skip) -> Result<()>;

    /// Everything is durable when this returns.
    fn finish(self: Box<Self>, captured: &Captured) -> Result<(Receipt, Self::Done)>;
}

/// Opens a stream late, on whichever thread needs it.
pub trait Open: Send {
    fn open(&self) -> Result<Box<dyn StreamReader>>;
}

/// The next part of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// This many bytes were put at the front of the buffer; never 0.
    Data(usize),
    /// This many zero bytes that occupy no space at the source; never 0. The buffer was not touched.
    Hole(u64),
    End,
}

pub trait StreamReader: Send {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece>;

    /// Called after [`Piece::End`]: whether the content moved while it was read.
    fn finish(self: Box<Self>) -> Result<StreamEnd>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    Steady,
    /// What was read may be a mixture of moments.
    Changed,
}

/// A device or page file with random access. Implemented by image files, NBD, relation files and by a *stored*
/// image, so that backup, restore, file browsing and instant recovery share one seam.
pub trait Blocks: Send + Sync {
    /// Length in bytes.
    fn size(&self) -> u64;

    /// Covers `range` without gaps or overlaps, in order.
    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>>;

    /// Fills the whole buffer or fails.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Whether a range can be read without waiting for a medium or a peer. A hint: what knows nothing of itself says no.
    fn is_at_hand(&self, range: Range<u64>) -> bool {
        let _unknown = range;
        false
    }

    /// Runs of files inside the image, for cutting along them; a hint that never changes what is restored.
    fn cuts(&self, range: Range<u64>) -> Result<Vec<Run>> {
        let _no_hint = range;
        Ok(Vec::new())
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    pub range: Range<u64>,
    pub kind: ExtentKind,
    pub change: ChangeState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    Data,
    /// Allocated, reads as zeros.
    Zero,
    /// Not allocated, reads as zeros.
    Hole,
}

/// Since the position that the run started from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeState {
    Changed,
    Unchanged,
    Unknown,
}

/// A stretch of one file inside an image: the bytes `image` hold the file's content from `file_offset` on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    pub image: Range<u64>,
    pub file: u64,
    pub file_offset: u64,
}
