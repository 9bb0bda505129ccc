//! Placeholder.
/// The kind of workload whose points hold what a restore was about to overwrite.
pub const UNDO: &str = "undo";
