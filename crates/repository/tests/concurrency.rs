//! Two writers, an expirer, collectors without any grace and a reader at once, in thousands of orders; and a writer
//! that takes longer than the collector waits.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![allow(clippy::allow_attributes, reason = "as in the harness")]

mod common;
mod harness;

use std::sync::Arc;
use std::time::Duration;

use common::{clock, compare, request, restore};
use harness::race::{Races, SAME_PAST};
use harness::{at_once, files, open, small};
use mainstay_core::{BlobStore, Silent, Source as _, Target as _};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::{GcOptions, Repository, WriteRequest};
use mainstay_testkit::{MemoryStore, VecSource, for_each_seed};

/// Half of the seeds each, so that two processors share them.
fn race_share(share: u64) {
    let mut races = Races::default();
    for_each_seed(1500, |seed| {
        if seed / SAME_PAST % 2 == share {
            races.run(seed);
        }
    });
    let Races { seeds, points, .. } = races;
    assert!(points >= seeds * 2, "of four backups in each of {seeds} races only {points} came through");
}

#[test]
fn nobody_loses_anything_to_anybody() {
    race_share(0);
}

#[test]
fn nobody_loses_anything_to_anybody_in_other_orders() {
    race_share(1);
}

/// A backup during which `meanwhile` is called after every item, with a collector's view of the repository; packs are
/// registered after so many.
fn backup_while(register_packs: usize, mut meanwhile: impl FnMut(&Repository, &MemoryStore)) {
    let (medium, clock, ring) = (MemoryStore::new(), clock(), KeyRing::create().unwrap());
    let store: Arc<dyn BlobStore> = Arc::new(medium.clone());
    let mut options = small(&clock);
    options.tuning.register_packs = register_packs;
    let repository = Repository::create(Arc::clone(&store), ring.clone(), &[], &options).unwrap();
    let collector = open(Arc::clone(&store), &ring, &clock).unwrap();
    let items = files(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 30_000);
    let mut writer = Box::new(repository.write(WriteRequest { jobs: 0, ..request(1) }).unwrap());
    for item in &items {
        writer.put(item.to_item()).unwrap();
        clock.advance(Duration::from_secs(3600));
        meanwhile(&collector, &medium);
    }
    let captured = VecSource::new(Vec::new()).seal().unwrap();
    let (_, point) = writer.finish(&captured).unwrap();
    compare(&items, &restore(&open(store, &ring, &clock).unwrap(), &point));
}

#[test]
fn what_a_slow_writer_registered_is_left_alone_for_the_grace() {
    let mut registered = 0;
    backup_while(2, |collector, _| {
        let plan = collector.plan_gc(&GcOptions::default(), &Silent).unwrap();
        assert!(plan.dead.is_empty() && plan.repacked() == 0, "{plan:?}");
        registered = collector.stats().packs;
    });
    assert!(registered > 1, "nothing was registered before the end");
}

#[test]
fn what_was_condemned_before_it_was_registered_is_rescued() {
    let mut condemned = 0;
    backup_while(2, |collector, medium| {
        let stored = medium.snapshot().into_keys().filter(|name| name.starts_with("pack/")).count() as u64;
        // Only packs that no record names yet, and none is deleted.
        if stored > collector.stats().packs && condemned == 0 {
            let plan = collector.plan_gc(&at_once(), &Silent).unwrap();
            assert!(plan.delete.is_empty());
            condemned = collector.gc(&plan, &Silent).unwrap().condemned;
        }
    });
    assert!(condemned > 0, "nothing was condemned");
}

/// A run that takes longer than the collector waits: what it stored is condemned before a record names it, and by the
/// time of its commit the bytes would be gone.
fn put_back_in_time(register_packs: usize) {
    let (mut condemned, mut deleted) = (false, 0);
    backup_while(register_packs, |collector, medium| {
        let stored = medium.snapshot().into_keys().filter(|name| name.starts_with("pack/")).count() as u64;
        let plan = if stored > collector.stats().packs && !condemned {
            collector.plan_gc(&at_once(), &Silent).unwrap()
        } else if condemned && deleted == 0 {
            let late = GcOptions { grace: Duration::from_secs(7 * 3600), ..GcOptions::default() };
            collector.plan_gc(&late, &Silent).unwrap()
        } else {
            return;
        };
        let done = collector.gc(&plan, &Silent).unwrap();
        condemned |= done.condemned > 0;
        deleted += done.deleted;
    });
    assert!(condemned && deleted > 0, "nothing was condemned and deleted");
}

#[test]
fn what_was_condemned_before_it_was_registered_is_put_back_while_it_is_there() {
    put_back_in_time(2);
}

#[test]
fn packs_are_registered_in_time_however_few_they_are() {
    put_back_in_time(1000);
}
