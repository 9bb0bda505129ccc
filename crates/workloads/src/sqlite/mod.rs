//! SQLite: databases that are files, captured while others write to them, and their write-ahead logs followed.
//!
//! SQLite's own library does what needs its locks: it holds a read transaction, under which the file does not move, and
//! moves what is in the log into the file. The bytes of both are read by us. <https://sqlite.org/fileformat2.html#walformat>

mod database;
mod find;
mod follow;
mod kept;
mod place;
mod source;
mod wal;

pub use database::{Database, Held};
pub use find::{Found, find};
pub use follow::WalLog;
pub use place::Place;
pub use source::{Base, DESCRIPTION, Description, SqliteSource};
pub use wal::{Replay, changes_start, last_commit};

/// What points of databases that are files are called.
pub const KIND: &str = "sqlite";
/// What addresses begin with.
pub const SCHEME: &str = "sqlite:";
