//! Disk images from outside, made and judged by the tools that everybody uses.

#![cfg(test)]

mod chains;
mod compose;
mod containers;
mod hostile;
mod hostile_volumes;
mod luks;
mod lvm;
mod partitions;
mod qcow2;
mod refit;
mod tools;
mod vhdx_log;
mod written;
