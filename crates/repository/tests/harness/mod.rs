//! The harnesses that prove "nothing lost". They live here, apart from the tests that run them, because
//! `planted.rs` runs them too, against mistakes that they must catch.

#![allow(dead_code, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on says where")]
#![allow(clippy::allow_attributes, reason = "an expectation would fail where all of it is used")]

pub(crate) mod crash;
pub(crate) mod faults;
pub(crate) mod race;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{BlobStore, HardLink, ItemPath, PointId, Result, Silent, Stamp};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::{
    GcOptions, Options, Repository, Tuning, Unlock, VerifyReport, VerifyScope, WriteRequest,
};
use mainstay_testkit::{Part, Rng, ScriptedClock, TestItem, VecSource};

use crate::common::{compare, copy, options, request, restore};

/// Points and what must come back of them.
pub(crate) type Contents = BTreeMap<PointId, Vec<TestItem>>;

/// A collection that waits for nobody.
pub(crate) fn at_once() -> GcOptions {
    GcOptions { grace: Duration::ZERO, ..GcOptions::default() }
}

pub(crate) fn collect(repository: &Repository) -> Result<()> {
    let plan = repository.plan_gc(&at_once(), &Silent)?;
    repository.gc(&plan, &Silent).map(|_| ())
}

/// Condemns, deletes, and deletes what was condemned by repacking.
pub(crate) fn collect_all(repository: &Repository) -> Result<()> {
    (0..3).try_for_each(|_| collect(repository))
}

pub(crate) fn verify(repository: &Repository) -> VerifyReport {
    repository.verify(&VerifyScope { read_data: true, ..VerifyScope::default() }, &Silent).unwrap()
}

/// A backup on the caller's thread alone, so that the store's calls come in the same order every time.
pub(crate) fn try_backup(repository: &Repository, workload: u8, items: Vec<TestItem>) -> Result<PointId> {
    let request = WriteRequest { jobs: 0, ..request(workload) };
    copy(Box::new(VecSource::new(items)), Box::new(repository.write(request)?))
}

/// Files of which each has one of several contents: `versions` says which. Every third has two names.
pub(crate) fn files(versions: &[u64], bytes: usize) -> Vec<TestItem> {
    let mut items = Vec::new();
    for (number, version) in versions.iter().enumerate() {
        let mut rng = Rng::new(version * 1000 + number as u64);
        let length = bytes / 2 + rng.below(bytes);
        let content = vec![Part::Bytes(rng.bytes(length))];
        let names = if number % 3 == 0 { 1..=2 } else { 1..=1 };
        for name in names.clone() {
            let path = ItemPath::new(format!("file-{number:03}-{name}")).unwrap();
            let mut item = TestItem::file(path, content.clone());
            item.stamp = Stamp(version.to_le_bytes().to_vec());
            if names.end() > &1 {
                item.metadata.hard_link = Some(HardLink { device: 1, inode: number as u64 });
            }
            items.push(item);
        }
    }
    items
}

/// Every listed point restores to what was put into it, and `required` are listed.
pub(crate) fn check_points(repository: &Repository, known: &Contents, required: &[PointId], what: &str) {
    let listed: Vec<_> = repository.points().unwrap().iter().map(|point| point.id).collect();
    for point in required {
        assert!(listed.contains(point), "{what}: point {point} is gone");
    }
    for point in &listed {
        let items = known.get(point).unwrap_or_else(|| panic!("{what}: nobody made point {point}"));
        compare(items, &restore(repository, point));
    }
}

/// After collections that waited for nobody: the medium holds the packs that the log knows, and no others.
pub(crate) fn check_packs(repository: &Repository, store: &dyn BlobStore, what: &str) {
    let (mut packs, mut bytes) = (0, 0);
    let mut count = |listed: mainstay_core::Listed| {
        (packs, bytes) = (packs + 1, bytes + listed.size);
        Ok(())
    };
    store.list("pack", &mut count).unwrap();
    let stats = repository.stats();
    assert_eq!((packs, bytes), (stats.packs, stats.pack_bytes), "{what}: packs stored and known differ");
}

/// After the same: index runs that the log still needs and no others, and of expired points at most the newest of each
/// chain, whole.
pub(crate) fn check_small_objects(repository: &Repository, store: &dyn BlobStore, what: &str) {
    let names = |prefix: &str| {
        let mut names = Vec::new();
        let mut note = |listed: mainstay_core::Listed| {
            names.extend(listed.name.rsplit('/').next().map(str::to_owned));
            Ok(())
        };
        store.list(prefix, &mut note).unwrap();
        names.sort();
        names
    };
    let stats = repository.stats();
    assert_eq!(names("index").len() as u64, stats.index_runs, "{what}: index runs stored and needed differ");
    let listed: Vec<_> = repository.points().unwrap().iter().map(|point| point.id.to_string()).collect();
    let stored = names("points");
    assert!(listed.iter().all(|point| stored.contains(point)), "{what}: a live point lost its object");
    let beside = stored.iter().filter(|name| !listed.contains(name)).count();
    // One of each workload, and one that a crash left without a record.
    assert!(beside <= 3, "{what}: {beside} objects of points that nobody needs");
}

/// So little goes into a pack, and so few packs into a registration, that a small backup makes several.
pub(crate) fn small(clock: &ScriptedClock) -> Options {
    Options {
        tuning: Tuning { pack_bytes: 64 << 10, register_packs: 2, ..Tuning::default() },
        ..options(clock)
    }
}

/// Another process on the same medium.
pub(crate) fn open(store: Arc<dyn BlobStore>, ring: &KeyRing, clock: &ScriptedClock) -> Result<Repository> {
    Repository::open(store, &Unlock::Ring(Box::new(ring.clone())), &small(clock))
}
