//! The verbs: what Mainstay does with a repository and a workload. Nothing here prints.

pub mod address;
pub mod copy;
pub mod retention;
pub mod undo;
pub mod workload;

#[cfg(test)]
mod testing;
