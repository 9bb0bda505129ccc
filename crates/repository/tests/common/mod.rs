//! What the tests of the repository share: a repository in memory, one loop, and comparisons.

#![allow(dead_code, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![allow(clippy::allow_attributes, reason = "an expectation would fail where all of it is used")]

pub(crate) mod sample;

use std::sync::Arc;

use mainstay_core::{
    BlobStore, Id16, Next, PointId, Result, Silent, Source, Target, Time, WorkloadKind, WorkloadRef,
};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::{Compression, Options, Parent, Repository, Tuning, Unlock, WriteRequest};
use mainstay_testkit::{Arrived, Finished, MemoryStore, Rng, ScriptedClock, TestItem, VecSource, VecTarget};

/// A repository in memory, its keys and its clock.
pub(crate) struct Bench {
    pub(crate) store: MemoryStore,
    pub(crate) clock: ScriptedClock,
    pub(crate) ring: KeyRing,
    pub(crate) repository: Repository,
}

impl Bench {
    pub(crate) fn new(_seed: u64) -> Self {
        let (store, clock) = (MemoryStore::new(), clock());
        let ring = KeyRing::create().unwrap();
        let repository =
            Repository::create(Arc::new(store.clone()), ring.clone(), &[], &options(&clock)).unwrap();
        Self { store, clock, ring, repository }
    }
}

pub(crate) fn clock() -> ScriptedClock {
    ScriptedClock::at(Time::from_seconds(1_800_000_000))
}

pub(crate) fn options(clock: &ScriptedClock) -> Options {
    // Damage is to cost something: what parity makes good has tests of its own.
    let tuning = Tuning { parity: false, ..Tuning::default() };
    Options { clock: Arc::new(clock.clone()), state: None, tuning }
}

/// Opens the same store as another process would.
pub(crate) fn open(bench: &Bench) -> Repository {
    open_store(Arc::new(bench.store.clone()), &bench.ring, &bench.clock).unwrap()
}

pub(crate) fn open_store(
    store: Arc<dyn BlobStore>,
    ring: &KeyRing,
    clock: &ScriptedClock,
) -> Result<Repository> {
    Repository::open(store, &Unlock::Ring(Box::new(ring.clone())), &options(clock))
}

pub(crate) fn workload(number: u8) -> WorkloadRef {
    WorkloadRef {
        id: Id16([number; 16]),
        kind: WorkloadKind("test".into()),
        name: format!("workload-{number}"),
    }
}

pub(crate) fn request(number: u8) -> WriteRequest {
    WriteRequest {
        workload: workload(number),
        host: "here".into(),
        roots: vec!["/".into()],
        tags: Vec::new(),
        reread_one_in: 0,
        any_order: false,
        parent: Parent::Latest,
        progress: Arc::new(Silent),
        compression: Compression::default(),
        jobs: 2,
    }
}

/// The loop of `engine::copy`, which this crate does not know.
pub(crate) fn copy<T: Target>(mut source: Box<dyn Source>, mut target: Box<T>) -> Result<T::Done> {
    loop {
        match source.next()? {
            Next::Item(item) => target.put(*item)?,
            Next::Skipped(skip) => target.skip(skip)?,
            Next::End => break,
        }
    }
    let captured = source.seal()?;
    let (receipt, done) = target.finish(&captured)?;
    source.commit(&receipt)?;
    Ok(done)
}

pub(crate) fn backup(repository: &Repository, items: Vec<TestItem>) -> PointId {
    try_backup(repository, 1, items).unwrap()
}

pub(crate) fn try_backup(repository: &Repository, workload: u8, items: Vec<TestItem>) -> Result<PointId> {
    copy(Box::new(VecSource::new(items)), Box::new(repository.write(request(workload))?))
}

pub(crate) fn restore(repository: &Repository, point: &PointId) -> Finished {
    try_restore(repository, point).unwrap()
}

pub(crate) fn try_restore(repository: &Repository, point: &PointId) -> Result<Finished> {
    copy(Box::new(repository.read(point)?.source(Vec::new())?), Box::new(VecTarget::new()))
}

pub(crate) fn compare(wanted: &[TestItem], got: &Finished) {
    let wanted: Vec<_> = wanted.iter().map(Arrived::from).collect();
    for (wanted, got) in wanted.iter().zip(&got.items) {
        assert!(
            wanted == got,
            "{:?} came back as {:?}: {:?} / {:?}",
            wanted.path,
            got.path,
            wanted.metadata,
            got.metadata
        );
    }
    assert_eq!(wanted.len(), got.items.len());
}

/// A few large files that share much, so that several packs and increments come about.
pub(crate) fn large_items(seed: u64, files: usize, bytes: usize) -> Vec<TestItem> {
    let mut rng = Rng::new(seed);
    (0..files)
        .map(|number| {
            let path = mainstay_core::ItemPath::new(format!("file-{number:04}")).unwrap();
            TestItem::file(path, vec![mainstay_testkit::Part::Bytes(rng.bytes(bytes))])
        })
        .collect()
}
