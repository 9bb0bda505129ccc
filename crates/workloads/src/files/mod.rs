//! File trees of a Linux machine: [`FilesSource`] reads them, [`FilesTarget`] writes them.

mod dirs;
mod inspect;
mod names;
mod owners;
mod paths;
mod xattr;

mod hooks;
mod left_out;
mod lvm;
mod mounts;
mod reader;
mod roots;
mod scope;
mod snapshot;
mod source;

mod apply;
mod decide;
mod open_dir;
mod place;
mod remove;
mod run;
mod target;
mod tree;
mod write;

/// The name of this kind of workload.
pub const KIND: &str = "files";

pub use decide::{Action, Change, Existing, RestoreMode, RestoreRules, Trace, diff};
pub use hooks::Hooks;
pub use left_out::{CapturedRoot, LeftOut};
pub use mounts::mount_points;
pub use paths::PathSet;
pub use place::Place;
pub use run::{Changes, OwnerRule, Restored};
pub use scope::CACHE_TAG;
pub use snapshot::SnapshotRule;
pub use source::{FilesRequest, FilesSource};
pub use target::{FilesPlan, FilesTarget};
pub use tree::OpenTree;
