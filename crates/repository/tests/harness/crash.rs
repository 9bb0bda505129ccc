//! A story of backups, notes, expiry and collection, and a crash after every one of its calls to the store.

use std::sync::Arc;

use mainstay_core::{BlobStore, PointId};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::planted::plant;
use mainstay_repository::{Note, Repository};
use mainstay_testkit::{Blobs, CrashState, CrashStates, MemoryStore, ScriptedClock, TestItem, TracingStore};

use super::{
    Contents, check_packs, check_points, check_small_objects, collect, collect_all, files, open, small,
    try_backup, verify,
};
use crate::common::clock;

/// What the store of the story looks like to the repository: itself, or one that lies.
pub(crate) type Lie = fn(TracingStore<MemoryStore>) -> Arc<dyn BlobStore>;

pub(crate) fn honest(store: TracingStore<MemoryStore>) -> Arc<dyn BlobStore> {
    Arc::new(store)
}

pub(crate) struct Story {
    medium: MemoryStore,
    trace: TracingStore<MemoryStore>,
    base: Blobs,
    /// Operations that came before `base`.
    skipped: usize,
    ring: KeyRing,
    clock: ScriptedClock,
    repository: Repository,
    known: Contents,
    /// When each backup had returned, and when each expiry began and had returned, in operations done.
    acknowledged: Vec<(usize, PointId)>,
    expiring: Vec<(usize, PointId)>,
    expired: Vec<(usize, PointId)>,
}

impl Story {
    pub(crate) fn new(lie: Lie) -> Self {
        let (medium, clock, ring) = (MemoryStore::new(), clock(), KeyRing::create().unwrap());
        let trace = TracingStore::new(medium.clone());
        let repository = Repository::create(lie(trace.clone()), ring.clone(), &[], &small(&clock)).unwrap();
        let base = medium.snapshot();
        Self {
            skipped: trace.ops().len(),
            medium,
            trace,
            base,
            ring,
            clock,
            repository,
            known: Contents::new(),
            acknowledged: Vec::new(),
            expiring: Vec::new(),
            expired: Vec::new(),
        }
    }

    fn now(&self) -> usize {
        self.trace.ops().len()
    }

    /// Crashes before this moment are no longer asked for.
    pub(crate) fn begin(&mut self) {
        self.base = self.medium.snapshot();
        self.skipped = self.now();
    }

    pub(crate) fn backup(&mut self, workload: u8, items: Vec<TestItem>) -> PointId {
        let point = try_backup(&self.repository, workload, items.clone()).unwrap();
        self.known.insert(point, items);
        self.acknowledged.push((self.now(), point));
        point
    }

    pub(crate) fn note(&self, point: &PointId, note: &Note) {
        self.repository.note(point, note).unwrap();
    }

    pub(crate) fn expire(&mut self, points: &[PointId]) {
        let begun = self.now();
        self.repository.expire(points, "test").unwrap();
        let done = self.now();
        self.expiring.extend(points.iter().map(|point| (begun, *point)));
        self.expired.extend(points.iter().map(|point| (done, *point)));
    }

    pub(crate) fn collect(&self) {
        collect(&self.repository).unwrap();
    }

    /// Tries every state that a crash since [`Story::begin`] could have left. Returns how many.
    pub(crate) fn crash_everywhere(&self) -> usize {
        // Whoever comes after the crash makes no mistakes.
        plant(&[]);
        let ops = self.trace.ops()[self.skipped..].to_vec();
        assert!(!ops.is_empty());
        CrashStates::new(self.base.clone(), ops).torn_last(true).for_each(|state| self.recover(state))
    }

    /// What must hold after a crash, whoever comes next.
    fn recover(&self, state: &CrashState) {
        let (what, torn) = (&state.what, state.what.contains("second half"));
        let done = state.done + self.skipped;
        let by = |moments: &[(usize, PointId)], moment: usize| -> Vec<PointId> {
            moments.iter().filter(|(at, _)| *at <= moment).map(|(_, point)| *point).collect()
        };
        // An expiry that had begun may have happened.
        let going = self.expiring.iter().filter(|(at, _)| *at < done).map(|(_, point)| *point);
        let going: Vec<_> = going.collect();
        let mut required = by(&self.acknowledged, done);
        required.retain(|point| !going.contains(point));
        let gone = by(&self.expired, done);

        let store: Arc<dyn BlobStore> = Arc::new(state.store.clone());
        let repository = open(Arc::clone(&store), &self.ring, &self.clock)
            .unwrap_or_else(|error| panic!("{what}: cannot open it: {error:?}"));
        check_points(&repository, &self.known, &required, what);
        let listed = repository.points().unwrap();
        assert!(listed.iter().all(|point| !gone.contains(&point.id)), "{what}: an expired point is back");
        self.check_verify(&repository, what, torn);

        let mut known = self.known.clone();
        let items = files(&[7, 1, 2], 12_000);
        let point = try_backup(&repository, 1, items.clone()).unwrap();
        known.insert(point, items);
        required.push(point);
        collect_all(&repository).unwrap();
        let other = open(Arc::clone(&store), &self.ring, &self.clock).unwrap();
        check_points(&other, &known, &required, &format!("{what}, then a backup and a collection"));
        self.check_verify(&other, what, torn);
        check_packs(&other, &state.store, what);
        check_small_objects(&other, &state.store, what);
    }

    /// Nothing is damaged; of a torn record of the log, that its number was lost.
    fn check_verify(&self, repository: &Repository, what: &str, torn: bool) {
        let report = verify(repository);
        let voids = repository.stats().log_voids;
        assert!(report.lost.is_empty(), "{what}: {:?}", report.lost);
        assert_eq!(report.problems.len() as u64, voids, "{what}: {:?}", report.problems);
        assert!(torn || voids == 0, "{what}: a record is torn though nothing tore it");
        if what.contains("half of log/") {
            assert_eq!(voids, 1, "{what}: nobody noticed");
        }
    }
}

/// Backups: the first, one that changes half, one of other data that shares much.
pub(crate) fn crash_in_backups(lie: Lie) -> usize {
    let mut story = Story::new(lie);
    story.backup(1, files(&[1, 2, 3, 4, 5, 6, 7, 8], 30_000));
    story.backup(1, files(&[1, 9, 3, 9, 5, 6, 7, 9], 30_000));
    story.backup(2, files(&[1, 2, 3, 8], 30_000));
    story.crash_everywhere()
}

/// Tags, holds and expiry.
pub(crate) fn crash_in_notes(lie: Lie) -> usize {
    let mut story = Story::new(lie);
    let first = story.backup(1, files(&[1, 2, 3], 24_000));
    let second = story.backup(1, files(&[1, 9, 3], 24_000));
    story.begin();
    story.note(&second, &Note::Hold { reason: "evidence".into(), until: None });
    story.note(&first, &Note::Tag("weekly".into()));
    story.expire(&[first]);
    story.crash_everywhere()
}

/// Collections: condemning what is dead, repacking what is sparse, deleting; a backup in between.
pub(crate) fn crash_in_collections(lie: Lie) -> usize {
    let mut story = Story::new(lie);
    let first = story.backup(1, files(&[1, 2, 3, 4, 5, 6], 24_000));
    let second = story.backup(1, files(&[1, 9, 3, 9, 5, 6], 24_000));
    story.backup(2, files(&[1, 7, 7, 7, 7, 6], 24_000));
    story.begin();
    story.expire(&[first, second]);
    story.collect();
    let last = story.backup(1, files(&[1, 2, 9, 9], 24_000));
    story.collect();
    story.expire(&[last]);
    story.collect();
    story.collect();
    story.crash_everywhere()
}
