//! The program against real database servers. `cargo xtask setup` brings them.

#![cfg(test)]

mod bank;
mod crash;
mod guide;
mod home;
