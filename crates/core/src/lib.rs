//! The nouns and the traits of Mainstay. No I/O, no threads, no database: everything here can be tested with
//! plain values. The other crates meet only through these types.

mod blocks;
mod change;
mod clock;
mod error;
mod item;
mod point;
mod progress;
mod store;
mod traits;

pub use blocks::BlockStream;
pub use change::{Change, ChangeStream, StreamRef};
pub use clock::{Clock, Time};
pub use error::{Code, Error, Result};
pub use item::{Body, HardLink, Item, ItemPath, Kind, Metadata, PathError, Skip, SkipReason, Stamp};
pub use point::{
    Captured, Consistency, Counts, DomainId, Id16, PointId, Position, Receipt, WorkloadId, WorkloadKind,
    WorkloadRef, WriterId,
};
pub use progress::{Event, Phase, Progress, Silent};
pub use store::{BlobStore, Capabilities, Listed, Put, blob_is_under, check_blob_name};
pub use traits::{
    Blocks, ChangeState, Extent, ExtentKind, Next, Open, Piece, Run, Source, StreamEnd, StreamReader, Target,
};
