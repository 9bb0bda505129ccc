//! The drivers for virtual machines, most of them against `qemu-storage-daemon`.

#![cfg(test)]

mod agent;
mod daemon;
mod folder;
mod libvirt;
mod qemu;
mod trouble;
