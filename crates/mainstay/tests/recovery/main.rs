//! Whole machines back, through the real binary: over their present disks, as new machines, many by a plan. Images in
//! folders play the machines; real guests are in the test binary `guests`.

#![cfg(test)]
#![expect(clippy::disallowed_methods, reason = "these tests start the program and the tools that judge it")]

mod in_place;
mod plan;
mod recreate;
mod user;
