//! The program against real guests that never stop writing. `cargo xtask setup` brings what they need.

#![cfg(test)]

mod guide;
mod home;
mod kills;
mod points;
mod proof;
mod recovered;
mod run;
