//! Virtual machines: their recovery points, and the files inside them.

mod fstab;
mod lean;
mod mixed;
mod source;
mod tree;
mod view;

pub use lean::Leave;
pub use mixed::MixedView;
pub use tree::{Keys, VolumeSeen};
pub use view::MachineView;

/// The kind of the workloads whose points hold the disks of a machine.
pub const KIND: &str = "vm";
