//! The reader: looks into points, and a [`mainstay_core::Source`] that yields what they hold.

mod blocks;
mod diff;
mod point;
pub(crate) mod recipe;
pub(crate) mod same;
mod source;
mod stream;

pub use blocks::StoredBlocks;
pub use diff::{Change, ChangeKind, Diff, diff};
pub(crate) use point::Lost;
pub use point::{Entry, PointReader, Walk};
pub use source::PointSource;
