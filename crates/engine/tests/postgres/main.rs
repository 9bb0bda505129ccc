//! Clusters of a real server: backed up while it works, followed, and brought back. `cargo xtask setup` brings it.

#![cfg(test)]

mod apart;
mod astray;
mod common;
mod failures;
mod log;
mod points;
mod push;
mod retention;
mod shapes;
mod timelines;
mod tls;
