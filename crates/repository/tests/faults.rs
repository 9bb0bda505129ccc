//! Any single call to the store may fail, and the medium may be full: errors are clean, nothing acknowledged is lost,
//! and doing it again works.

mod common;
mod harness;

use harness::faults::{Act, Fault, Scene, fail_every_call, fill};

fn every_fault(act: Act, calls: u64) {
    for fault in [Fault::Io, Fault::Full, Fault::LostReply] {
        let runs = fail_every_call(act, fault);
        assert!(runs > calls, "{act:?} took only {runs} calls with {fault:?}");
    }
}

#[test]
fn any_call_of_a_backup_may_fail() {
    every_fault(Act::Backup, 25);
}

#[test]
fn any_call_of_a_restore_may_fail() {
    every_fault(Act::Restore, 10);
}

#[test]
fn any_call_of_an_expiry_or_a_hold_may_fail() {
    every_fault(Act::Expire, 3);
    every_fault(Act::Hold, 3);
}

#[test]
fn any_call_of_a_collection_may_fail() {
    every_fault(Act::Collect, 20);
}

#[test]
fn a_full_medium_can_list_restore_expire_and_collect() {
    let scene = Scene::new();
    let full = (0..260_000).step_by(13_000).filter(|room| fill(&scene, *room)).count();
    assert!((5..19).contains(&full), "the medium was full {full} times");
}
