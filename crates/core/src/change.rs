//! A workload's log as a stream of changes, and how it is followed.

use crate::{Position, Result, Time, WorkloadRef};

/// Names one unbroken line of changes of a workload: the write-ahead log of a database cluster on one timeline, the binary
/// log of a server, the writes to a virtual disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamRef {
    pub workload: WorkloadRef,
    /// What the line is, unique within the workload: `wal 7388240112 timeline 2`.
    pub name: String,
    /// The line that this one branched off, and where.
    pub parent: Option<(String, Position)>,
}

/// A stretch of a stream. Positions are the workload's; those of one stream sort as bytes, in the order of the changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub start: Position,
    /// Where the next change starts. Greater than `start`.
    pub end: Position,
    /// When it was made, as far as its bytes tell.
    pub time: Option<Time>,
    /// At most [`Change::BYTES_MAX`].
    pub bytes: Vec<u8>,
}

impl Change {
    pub const BYTES_MAX: usize = 1 << 20;
}

/// A log that is followed as it grows.
pub trait ChangeStream: Send {
    /// The next change; `None` when there is none just now. Waits for a moment at most, so that whoever calls can close
    /// what it has gathered.
    fn next(&mut self) -> Result<Option<Change>>;

    /// Everything before `durable` is safe: only now may the workload forget it.
    fn acknowledge(&mut self, durable: &Position) -> Result<()>;
}
