//! File systems made by their own tools, read here and by the kernel, and compared. Needs root and loop devices.

#![cfg(test)]

mod btrfs;
mod changes;
mod ext4;
mod fat;
mod hostile;
mod lab;
mod map;
mod ntfs;
mod oracle;
mod sandbox;
mod trees;
mod xfs;
