//! Two at once, in orders that a person can follow; and what an interrupted beginning leaves.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

mod common;

use std::sync::Arc;

use common::sample::{COST, PASSPHRASE};
use common::{Bench, backup, clock, compare, large_items, open, options, restore};
use mainstay_core::{BlobStore, Code, Result, Time};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::keys::slot::{self, About};
use mainstay_repository::{Note, Repository, Unlock};
use mainstay_testkit::{CrashStates, MemoryStore, TracingStore};

fn init(store: Arc<dyn BlobStore>) -> Result<Repository> {
    let ring = KeyRing::create().unwrap();
    let about = About { label: "owner".into(), created: Time::default() };
    let slot = slot::seal_with_passphrase(&ring, &about, PASSPHRASE, COST).unwrap();
    Repository::create(store, ring, &[slot], &options(&clock()))
}

fn open_again(store: Arc<dyn BlobStore>) -> Result<Repository> {
    Repository::open(store, &Unlock::Passphrase(PASSPHRASE), &options(&clock()))
}

#[test]
fn a_crash_anywhere_in_init_leaves_a_repository_or_none() {
    let trace = TracingStore::new(MemoryStore::new());
    init(Arc::new(trace.clone())).unwrap();
    let (mut made, mut none) = (0, 0);
    CrashStates::new(MemoryStore::new().snapshot(), trace.ops()).for_each(|state| {
        let store: Arc<dyn BlobStore> = Arc::new(state.store.clone());
        let repository = match open_again(Arc::clone(&store)) {
            Ok(repository) => {
                made += 1;
                repository
            }
            Err(error) => {
                assert_eq!(error.code(), Code::NoRepository, "{}: {error:?}", state.what);
                none += 1;
                init(Arc::clone(&store)).unwrap();
                open_again(Arc::clone(&store)).unwrap()
            }
        };
        let items = large_items(1, 2, 5000);
        let point = backup(&repository, items.clone());
        compare(&items, &restore(&open_again(store).unwrap(), &point));
    });
    assert!(made > 2 && none > 2, "{made} {none}");
}

#[test]
fn of_two_that_begin_one_does() {
    let store: Arc<dyn BlobStore> = Arc::new(MemoryStore::new());
    let first = init(Arc::clone(&store)).unwrap();
    assert_eq!(init(Arc::clone(&store)).map(drop).unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(open_again(store).unwrap().family(), first.family());
}

#[test]
fn of_a_hold_and_an_expiry_the_first_one_counts() {
    let bench = Bench::new(1);
    let [held, gone] = [1, 2].map(|seed| backup(&bench.repository, large_items(seed, 1, 5000)));
    // Both have read the log; neither knows of the other.
    let (one, other) = (open(&bench), open(&bench));
    let hold = Note::Hold { reason: "evidence".into(), until: None };
    one.note(&held, &hold).unwrap();
    let refused = other.expire(&[held], "old").unwrap_err();
    assert_eq!(refused.code(), Code::Refused);
    assert!(refused.to_string().contains("evidence"), "{refused}");
    one.expire(&[gone], "old").unwrap();
    assert_eq!(other.note(&gone, &hold).unwrap_err().code(), Code::NotFound);
    assert_eq!(other.expire(&[gone], "old").unwrap_err().code(), Code::NotFound);
    assert_eq!(open(&bench).points().unwrap().len(), 1);
}
