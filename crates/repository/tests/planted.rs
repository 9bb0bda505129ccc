//! Every harness is shown mistakes that it must catch.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![allow(clippy::allow_attributes, reason = "as in the harness")]

mod common;
mod harness;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use harness::crash::{Lie, crash_in_backups, crash_in_collections, honest};
use harness::faults::{Act, Fault, fail_every_call};
use harness::race::Races;
use mainstay_core::{BlobStore, Capabilities, Listed, Put, Result};
use mainstay_repository::planted::{Planted, plant};
use mainstay_testkit::{MemoryStore, TracingStore};

/// Mistakes are planted in the whole process: one test at a time.
static PLANTING: Mutex<()> = Mutex::new(());

/// Whether `harness` fails while `mistakes` are planted.
fn catches(mistakes: &[Planted], harness: impl FnOnce()) -> bool {
    let _one_at_a_time = PLANTING.lock().unwrap_or_else(PoisonError::into_inner);
    plant(mistakes);
    let outcome = catch_unwind(AssertUnwindSafe(harness));
    plant(&[]);
    outcome.is_err()
}

fn crash_catches(mistake: Planted, harness: fn(Lie) -> usize) -> bool {
    catches(&[mistake], || assert!(harness(honest) > 0))
}

fn race_catches(mistakes: &[Planted]) -> bool {
    let mut races = Races::default();
    catches(mistakes, || (0..2000).for_each(|seed| races.run(seed)))
}

#[test]
fn a_commit_before_its_packs_are_durable() {
    assert!(crash_catches(Planted::CommitBeforeFlush, crash_in_backups));
}

#[test]
fn bytes_removed_before_the_log_condemns_them() {
    assert!(crash_catches(Planted::DeleteBeforeCondemning, crash_in_collections));
}

#[test]
fn bytes_removed_without_a_word() {
    assert!(crash_catches(Planted::DeleteWithoutRecord, crash_in_collections));
}

#[test]
fn a_point_without_a_record() {
    assert!(catches(&[Planted::AcknowledgeUnwritten], || {
        assert!(fail_every_call(Act::Backup, Fault::Io) > 0);
    }));
}

#[test]
fn condemning_by_an_old_plan() {
    // Alone it would be made good before anything is deleted.
    assert!(race_catches(&[Planted::CondemnAtAnyHead, Planted::DeleteUnmarked]));
}

#[test]
fn committing_onto_what_was_condemned() {
    assert!(race_catches(&[Planted::CommitUnchecked]));
}

#[test]
fn copies_that_another_collector_condemned() {
    assert!(race_catches(&[Planted::CondemnIntoCondemned, Planted::DeleteUnmarked]));
}

#[test]
fn bytes_removed_under_a_writer() {
    assert!(race_catches(&[Planted::DeleteBeforeCondemning]));
}

/// A medium that breaks one promise.
struct Liar {
    inner: TracingStore<MemoryStore>,
    /// Says that it flushed.
    flushes: bool,
    /// Says that a name was free when it was not, and replaces what was there.
    replaces: bool,
    /// Makes one blob of two: the first half is visible before the second.
    tears: bool,
}

impl BlobStore for Liar {
    fn put_new(&self, name: &str, parts: &[&[u8]]) -> Result<Put> {
        if self.replaces {
            self.inner.delete(name)?;
        }
        if self.tears {
            let whole = parts.concat();
            if self.inner.put_new(name, &[&whole[..whole.len() / 2]])? == Put::Exists {
                return Ok(Put::Exists);
            }
            self.inner.delete(name)?;
            return self.inner.put_new(name, &[&whole]);
        }
        self.inner.put_new(name, parts)
    }

    fn flush(&self) -> Result<()> {
        if self.flushes { self.inner.flush() } else { Ok(()) }
    }

    fn get(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>> {
        self.inner.get(name, range)
    }

    fn size(&self, name: &str) -> Result<u64> {
        self.inner.size(name)
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        self.inner.list(prefix, each)
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.inner.delete(name)
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn location(&self) -> String {
        self.inner.location()
    }
}

#[test]
fn a_medium_that_does_not_flush() {
    let lie: Lie = |inner| Arc::new(Liar { inner, flushes: false, replaces: false, tears: false });
    assert!(catches(&[], || assert!(crash_in_backups(lie) > 0)));
}

#[test]
fn a_medium_that_shows_half_of_a_blob() {
    let lie: Lie = |inner| Arc::new(Liar { inner, flushes: true, replaces: false, tears: true });
    assert!(catches(&[], || assert!(crash_in_backups(lie) > 0)));
}
