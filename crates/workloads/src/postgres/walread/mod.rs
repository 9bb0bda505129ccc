//! What a write-ahead log says: its records, which rows they change, and how transactions end. As `access/xlogrecord.h`,
//! `access/xlog_internal.h`, `access/heapam_xlog.h`, `access/xact.h` and `access/htup_details.h` of PostgreSQL's sources say.
//!
//! The layout is of one major version at a time. Only versions that were tested against their own `pg_waldump` are read;
//! others are refused by name.

mod crc;
mod heap;
mod reader;
mod record;
mod tuple;

pub use heap::{Ending, Image, RowChange, Spot};
pub use reader::WalReader;
pub use record::{Block, Record, Relation};
pub use tuple::{Attribute, KeyShape, Kind};
