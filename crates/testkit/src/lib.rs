//! For tests only: conformance suites, stores that fail on purpose, a scripted clock, random items.

pub mod suite;

mod clock;
mod delegate;
mod faulty;
mod memory;
mod rng;
mod trace;

pub use clock::ScriptedClock;
pub use faulty::{Call, FaultyStore};
pub use memory::{Blobs, MemoryStore, snapshot_of};
pub use rng::{Rng, for_each_seed, seeds};
pub use trace::{CrashState, CrashStates, Op, TracingStore};
