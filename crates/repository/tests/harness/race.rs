//! Writers, an expirer, collectors that wait for nobody and a reader, all at once, in an order that a seed decides.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_core::{BlobStore, Code, PointId, Silent};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::{GcOptions, Repository};
use mainstay_testkit::{Actor, MemoryStore, Rng, ScriptedClock, interleave};

use super::{
    Contents, at_once, check_packs, check_points, collect, collect_all, files, open, small, try_backup,
    verify,
};
use crate::common::{clock, compare, try_restore};

const FILES: usize = 5;
const FILE_BYTES: usize = 12_000;

/// A repository with a past: points of two workloads that share much, some of them expired, some packs condemned.
pub(crate) struct Past {
    medium: MemoryStore,
    ring: KeyRing,
    clock: ScriptedClock,
    known: Contents,
    live: Vec<PointId>,
}

impl Past {
    pub(crate) fn new(seed: u64) -> Self {
        let (medium, clock, ring) = (MemoryStore::new(), clock(), KeyRing::create().unwrap());
        let store: Arc<dyn BlobStore> = Arc::new(medium.clone());
        let repository = Repository::create(store, ring.clone(), &[], &small(&clock)).unwrap();
        let mut rng = Rng::new(seed);
        let (mut known, mut live) = (Contents::new(), Vec::new());
        for round in 0..3 {
            let items = files(&versions(&mut rng, 0), FILE_BYTES);
            let point = try_backup(&repository, 1 + round % 2, items.clone()).unwrap();
            known.insert(point, items);
            live.push(point);
        }
        if rng.chance(70) {
            repository.expire(&[live.remove(0)], "test").unwrap();
        }
        if rng.chance(40) {
            collect(&repository).unwrap();
        }
        Self { medium, ring, clock, known, live }
    }
}

/// Which content each file has: mostly one of a few that many points share.
fn versions(rng: &mut Rng, new: u64) -> Vec<u64> {
    (0..FILES).map(|_| if new > 0 && rng.chance(15) { new } else { rng.range(1..4) }).collect()
}

/// What must be true, kept by those who act.
struct Model {
    known: Contents,
    acknowledged: BTreeSet<PointId>,
    /// Named by an expiry that was begun, and by one that returned.
    expiring: BTreeSet<PointId>,
    expired: BTreeSet<PointId>,
}

struct Race<'a> {
    seed: u64,
    past: &'a Past,
    model: Mutex<Model>,
}

impl Race<'_> {
    fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self, store: Arc<dyn BlobStore>) -> Repository {
        open(store, &self.past.ring, &self.past.clock).unwrap()
    }

    fn rng(&self, actor: u64) -> Rng {
        Rng::new(self.seed.wrapping_mul(31).wrapping_add(actor))
    }

    /// Commits whole, or fails cleanly because the collector was there first.
    fn write(&self, store: Arc<dyn BlobStore>, actor: u64, workload: u8) {
        let (repository, mut rng) = (self.open(store), self.rng(actor));
        for round in 1..=2 {
            let items = files(&versions(&mut rng, actor * 10 + round), FILE_BYTES);
            match try_backup(&repository, workload, items.clone()) {
                Ok(point) => {
                    let mut model = self.model();
                    model.known.insert(point, items);
                    model.acknowledged.insert(point);
                }
                Err(error) => assert_eq!(error.code(), Code::Conflict, "a writer: {error:?}"),
            }
        }
    }

    fn expire(&self, store: Arc<dyn BlobStore>) {
        let (repository, mut rng) = (self.open(store), self.rng(100));
        for _ in 0..2 {
            repository.refresh().unwrap();
            let listed: Vec<_> = repository.points().unwrap().iter().map(|point| point.id).collect();
            if listed.is_empty() {
                return;
            }
            let point = *rng.pick(&listed);
            self.model().expiring.insert(point);
            repository.expire(&[point], "test").unwrap();
            self.model().expired.insert(point);
        }
    }

    fn collect(&self, store: Arc<dyn BlobStore>, alone: bool, repack_bytes_max: u64) {
        let repository = self.open(store);
        let options = GcOptions { repack_bytes_max, ..at_once() };
        for _ in 0..3 {
            let plan = repository.plan_gc(&options, &Silent);
            // Of two collectors one may find that the other took what the points it looked at reached.
            match plan.and_then(|plan| repository.gc(&plan, &Silent)).map(|_| ()) {
                Err(error) if !alone && error.code() == Code::Integrity => {}
                outcome => outcome.unwrap(),
            }
        }
    }

    /// Whatever is not being expired can be restored at any moment.
    fn read(&self, store: Arc<dyn BlobStore>) {
        let (repository, mut rng) = (self.open(store), self.rng(200));
        for _ in 0..2 {
            let model = self.model();
            let there = model.acknowledged.difference(&model.expiring).copied().collect::<Vec<_>>();
            drop(model);
            repository.refresh().unwrap();
            if there.is_empty() {
                continue;
            }
            let point = *rng.pick(&there);
            let restored = try_restore(&repository, &point);
            let model = self.model();
            match restored {
                Ok(restored) if restored.skips.is_empty() => compare(&model.known[&point], &restored),
                other => assert!(model.expiring.contains(&point), "reading {point}: {other:?}"),
            }
        }
    }

    fn check(&self, medium: &MemoryStore) {
        let model = self.model();
        let required: Vec<_> = model.acknowledged.difference(&model.expiring).copied().collect();
        let store: Arc<dyn BlobStore> = Arc::new(medium.clone());
        // What was lost in the race is still lost after everything was collected.
        collect_all(&self.open(Arc::clone(&store))).unwrap();
        let repository = self.open(store);
        check_points(&repository, &model.known, &required, "after the race");
        let listed = repository.points().unwrap();
        assert!(listed.iter().all(|point| !model.expired.contains(&point.id)), "an expired point is back");
        assert_eq!(verify(&repository).problems, Vec::<String>::new());
        check_packs(&repository, medium, "after the race");
    }
}

/// Runs one seed and checks everything. Returns how many points were made.
pub(crate) fn race(past: &Past, seed: u64) -> usize {
    let medium = past.medium.fork();
    let mut rng = Rng::new(seed);
    let model = Model {
        known: past.known.clone(),
        acknowledged: past.live.iter().copied().collect(),
        expiring: BTreeSet::new(),
        expired: BTreeSet::new(),
    };
    let race = Race { seed, past, model: Mutex::new(model) };
    let (alone, same_workload) = (rng.chance(60), rng.chance(30));
    let store = || -> Arc<dyn BlobStore> { Arc::new(medium.clone()) };
    let mut actors = vec![
        Actor::new("writer one", store(), |store| race.write(store, 1, 1)),
        Actor::new("writer two", store(), |store| race.write(store, 2, if same_workload { 1 } else { 2 })),
        Actor::new("expirer", store(), |store| race.expire(store)),
        Actor::new("collector", store(), |store| race.collect(store, alone, u64::MAX)),
    ];
    if !alone {
        // One that may not copy anything condemns what the first one has just copied.
        actors.push(Actor::new("other collector", store(), |store| race.collect(store, alone, 0)));
    }
    if rng.chance(50) {
        actors.push(Actor::new("reader", store(), |store| race.read(store)));
    }
    interleave(seed, actors);
    race.check(&medium);
    let model = race.model();
    model.acknowledged.len() - past.live.len()
}

/// Races seed after seed, with a new past for every few of them.
#[derive(Default)]
pub(crate) struct Races {
    past: Option<(u64, Past)>,
    pub(crate) seeds: usize,
    /// Points that were made.
    pub(crate) points: usize,
}

/// So many seeds have the same past.
pub(crate) const SAME_PAST: u64 = 16;

impl Races {
    pub(crate) fn run(&mut self, seed: u64) {
        let wanted = seed / SAME_PAST;
        if self.past.as_ref().is_none_or(|(known, _)| *known != wanted) {
            self.past = None;
        }
        let (_, past) = self.past.get_or_insert_with(|| (wanted, Past::new(wanted)));
        self.points += race(past, seed);
        self.seeds += 1;
    }
}
