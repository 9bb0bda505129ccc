//! For tests only: conformance suites, stores that fail on purpose, a scripted clock, random items, a laboratory with
//! real guests.

pub mod lab;
pub mod suite;
pub mod tree;

mod clock;
mod delegate;
mod faulty;
mod gate;
mod items;
mod memory;
mod program;
mod rng;
mod trace;

pub use clock::{RealClock, ScriptedClock};
pub use faulty::{Call, FaultyStore};
pub use gate::{Actor, interleave};
pub use items::{
    Arrived, Content, Finished, MemoryBlocks, Part, TestItem, VecSource, VecTarget, random_items, read_body,
};
pub use memory::{Blobs, MemoryStore, snapshot_of};
pub use program::{at_home, settle, tool};
pub use rng::{Rng, for_each_seed, is_long, seeds};
pub use trace::{CrashState, CrashStates, Op, TracingStore};
