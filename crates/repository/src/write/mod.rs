//! The writer: a [`mainstay_core::Target`] that turns items into a recovery point.
//!
//! One thread reads, cuts, hashes and looks up; each new chunk gets its lasting name (group, slot) at once, so
//! recipes and pages are known before anything is compressed. A pool compresses and seals full segments, and one
//! more thread stores finished packs. Everything in flight is bounded.

mod blocks;
mod commit;
mod content;
mod groups;
mod ingest;
mod point;
mod pool;
mod rely;

pub use point::{Parent, PointWriter, WriteRequest};
pub(crate) use pool::store_pack;
