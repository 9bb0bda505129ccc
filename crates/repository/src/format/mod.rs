//! The byte layouts of stored objects. `docs/format.md` is their specification; where the two differ, one of
//! them has a bug. Every decoder treats its input as hostile.

pub(crate) mod directory;
pub(crate) mod item;
pub(crate) mod pack;
pub(crate) mod page;
pub(crate) mod parity;
pub(crate) mod point;
pub(crate) mod run;
pub(crate) mod segment;
