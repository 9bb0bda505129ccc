//! A crash at every operation of the store loses nothing that was acknowledged, and stops nobody who comes next.

mod common;
mod harness;

use harness::crash::{crash_in_backups, crash_in_collections, crash_in_notes, honest};

#[test]
fn a_crash_anywhere_in_backups() {
    let states = crash_in_backups(honest);
    assert!(states > 250, "only {states} states");
}

#[test]
fn a_crash_anywhere_in_notes_and_expiry() {
    let states = crash_in_notes(honest);
    assert!(states > 30, "only {states} states");
}

#[test]
fn a_crash_anywhere_in_collections() {
    let states = crash_in_collections(honest);
    assert!(states > 100, "only {states} states");
}
