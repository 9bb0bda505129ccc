//! For tests only: conformance suites, stores that fail on purpose, a scripted clock, random items.

pub mod suite;

mod clock;
mod memory;
mod rng;

pub use clock::ScriptedClock;
pub use memory::{Blobs, MemoryStore, snapshot_of};
pub use rng::{Rng, for_each_seed, seeds};
