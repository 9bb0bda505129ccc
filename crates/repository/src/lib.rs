//! The repository: recovery points at rest, deduplicated, sealed, and safe from each other's writers.
//!
//! | who | does what | in |
//! |---|---|---|
//! | [`Repository`] | opens, lists, notes, expires | `repository.rs` |
//! | [`PointWriter`] | takes items in, makes a point | `write/` |
//! | [`PointReader`] | looks into a point, yields its items | `read/` |
//! | [`JournalWriter`], [`Journal`] | keep and give back a workload's log | `journal/` |
//! | the log | decides the order of everything | `log/` |
//! | the layouts | bytes of every stored object | `format/` |
//! | the collector, `verify` | free and check stored bytes, set aside what is damaged | `collect/`, `verify.rs`, `mend.rs` |
//!
//! `docs/format.md` specifies the bytes, `docs/concurrency.md` who may run beside whom.

#[cfg(test)]
mod bench;
mod cache;
mod codec;
mod collect;
mod config;
mod copies;
pub mod cut;
mod decisions;
mod fetch;
mod format;
#[cfg(test)]
mod hostile;
mod index;
mod journal;
pub mod keys;
mod log;
mod memory;
mod mend;
mod names;
#[doc(hidden)]
pub mod planted;
mod points;
mod ranges;
mod read;
mod repack;
mod repository;
pub mod seal;
mod shared;
pub mod sign;
pub mod store;
mod tree_copy;
mod verify;
pub mod wrap;
mod write;

pub use collect::{GcOptions, GcPlan, GcReport};
pub use decisions::Decision;
pub use format::pack::PackId;
pub use format::segment::Compression;
pub use journal::{Hole, Journal, JournalWriter, StreamId, Stretch};
pub use keys::FamilyId;
pub use points::{Hold, Note, PointInfo};
pub use read::{Change, ChangeKind, Diff, Entry, PointReader, PointSource, StoredBlocks, Walk, diff};
pub use repository::{Options, Repository, Role, Stats, Unlock, WriterInfo};
pub use shared::Tuning;
pub use verify::{VerifyReport, VerifyScope};
pub use write::{Parent, PointWriter, WriteRequest};
