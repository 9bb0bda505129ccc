//! The drivers for virtual machines against real guests that never stop writing. `cargo xtask setup` brings what they
//! need; each test starts its own.

#![cfg(test)]

mod capture;
mod proxy;
mod qemu;
