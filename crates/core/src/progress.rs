//! What a long act says while it runs. The surface decides whether that becomes a bar, lines of JSON or nothing.

use std::fmt;

use crate::{Code, Counts, Error, ItemPath, Result, Skip};

/// The part of a run that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Opening,
    Scanning,
    Copying,
    Finishing,
    Verifying,
    Collecting,
}

#[derive(Clone, Debug)]
pub enum Event<'a> {
    Phase(Phase),
    /// What is to be done in all, as far as it is known; replaces the earlier figure. `complete` once counting
    /// has ended, so that an ETA may be shown.
    Expect {
        items: u64,
        bytes: u64,
        complete: bool,
    },
    /// What is done so far; replaces the earlier figure. The bytes include those done of the item at work, so that
    /// they reach what was expected and nothing jumps.
    Done(Counts),
    /// The item now at work.
    Item(&'a ItemPath),
    Skipped(&'a Skip),
    /// Something a person should read; not an error.
    Note(&'a str),
}

/// Receives events from whichever thread has them, and can ask for the run to stop.
pub trait Progress: Send + Sync {
    fn event(&self, event: &Event<'_>);

    /// Polled often. Once true, the run unwinds without committing.
    fn cancelled(&self) -> bool {
        false
    }

    /// The error that ends a cancelled run.
    fn check(&self) -> Result<()> {
        if self.cancelled() { Err(Error::new(Code::Cancelled, "stopped before it was done")) } else { Ok(()) }
    }
}

impl fmt::Debug for dyn Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Progress")
    }
}

/// Says nothing and never stops.
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _event: &Event<'_>) {}
}
