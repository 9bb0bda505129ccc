//! Disk images from outside, made and judged by the tools that everybody uses.

#![cfg(test)]

mod partitions;
mod qcow2;
mod refit;
mod tools;
