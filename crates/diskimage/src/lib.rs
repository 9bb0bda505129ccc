//! Disk images read without mounting, booting or privileges: containers (raw, qcow2, VMDK, VHDX), partitions, volumes
//! (LVM2, LUKS) and what lies on them. It knows nothing of backups; it meets the rest through [`mainstay_core::Blocks`].
//!
//! Everything here was written by somebody else, perhaps by a guest that wants out: what does not parse is an error,
//! and neither memory nor time grows with a number that was read from an image.

mod bytes;
mod checksum;
pub mod compose;
pub mod container;
mod file;
pub mod fs;
pub mod map;
mod mapped;
mod pages;
pub mod partition;
mod qcow2_writer;
pub mod sandbox;
mod unpack;
pub mod volume;

pub use file::FileBlocks;
pub use qcow2_writer::Qcow2Writer;
