//! One call to the store fails, whichever it is; and a medium that is full.

use std::sync::Arc;

use mainstay_core::{BlobStore, Code, PointId, Result};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::{Note, Repository};
use mainstay_testkit::{FaultyStore, MemoryStore, ScriptedClock, TestItem};

use super::{
    Contents, check_packs, check_points, collect, collect_all, files, open, small, try_backup, verify,
};
use crate::common::{clock, try_restore};

/// A repository in which there is something to write onto, to expire, to condemn, to repack and to delete.
pub(crate) struct Scene {
    pub(crate) medium: MemoryStore,
    ring: KeyRing,
    clock: ScriptedClock,
    pub(crate) known: Contents,
    /// The first one holds what nobody else does.
    pub(crate) live: Vec<PointId>,
}

impl Scene {
    pub(crate) fn new() -> Self {
        let (medium, clock, ring) = (MemoryStore::new(), clock(), KeyRing::create().unwrap());
        let store: Arc<dyn BlobStore> = Arc::new(medium.clone());
        let repository = Repository::create(store, ring.clone(), &[], &small(&clock)).unwrap();
        let mut scene = Self { medium, ring, clock, known: Contents::new(), live: Vec::new() };
        for versions in [[1, 2, 3, 4], [5, 2, 6, 4], [7, 8, 6, 4], [1, 9, 3, 9]] {
            let items = files(&versions, 20_000);
            let point = try_backup(&repository, 1, items.clone()).unwrap();
            scene.known.insert(point, items);
            scene.live.push(point);
        }
        // Something is condemned already, something else is dead but not condemned yet.
        repository.expire(&[scene.live.remove(1)], "test").unwrap();
        collect(&repository).unwrap();
        repository.expire(&[scene.live.remove(1)], "test").unwrap();
        scene
    }

    pub(crate) fn open(&self, store: Arc<dyn BlobStore>) -> Repository {
        open(store, &self.ring, &self.clock).unwrap()
    }

    fn fork(&self) -> Self {
        let (medium, ring, clock) = (self.medium.fork(), self.ring.clone(), self.clock.clone());
        Self { medium, ring, clock, known: self.known.clone(), live: self.live.clone() }
    }

    fn is_listed(&self, point: Option<&PointId>) -> bool {
        let repository = self.open(Arc::new(self.medium.clone()));
        repository.points().unwrap().iter().any(|found| Some(&found.id) == point)
    }

    /// Another process finds everything that was acknowledged, and can tidy up.
    fn check(&self, what: &str) {
        let repository = self.open(Arc::new(self.medium.clone()));
        for what in [what, &format!("{what}, collected")] {
            self.check_points(&repository, what);
            assert_eq!(verify(&repository).problems, Vec::<String>::new(), "{what}");
            collect_all(&repository).unwrap();
        }
        check_packs(&repository, &self.medium, what);
    }

    /// What is listed beyond what was acknowledged is the attempt whose reply was lost, and it is whole.
    fn check_points(&self, repository: &Repository, what: &str) {
        let mut known = self.known.clone();
        for point in repository.points().unwrap() {
            known.entry(point.id).or_insert_with(attempt);
        }
        check_points(repository, &known, &self.live, what);
    }
}

/// What the backup under test stores.
pub(crate) fn attempt() -> Vec<TestItem> {
    files(&[1, 20, 3, 21, 22], 20_000)
}

/// What is tried while a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Act {
    Backup,
    Restore,
    Expire,
    Hold,
    Collect,
}

impl Act {
    /// Does it, and tells the scene what was acknowledged.
    fn run(self, scene: &mut Scene, repository: &Repository) -> Result<()> {
        match self {
            Self::Backup => {
                let point = try_backup(repository, 1, attempt())?;
                scene.known.insert(point, attempt());
                scene.live.push(point);
            }
            Self::Restore => drop(try_restore(repository, &scene.live[0])?),
            Self::Hold => {
                repository.note(&scene.live[0], &Note::Hold { reason: "test".into(), until: None })?;
            }
            Self::Expire => {
                repository.expire(&scene.live[scene.live.len() - 1..], "test")?;
                scene.live.pop();
            }
            Self::Collect => collect(repository)?,
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Io,
    Full,
    LostReply,
}

/// Fails the first call of `act`, then the second, and so on until it is through before a call fails. Returns how
/// many runs that took.
pub(crate) fn fail_every_call(act: Act, fault: Fault) -> u64 {
    let base = Scene::new();
    for call in 1.. {
        let what = format!("{act:?}, {fault:?} at call {call}");
        let mut scene = base.fork();
        let store = FaultyStore::new(scene.medium.clone());
        let repository = scene.open(Arc::new(store.clone()));
        let fails_at = store.calls() + call;
        match fault {
            Fault::Io => store.fail_call(fails_at, Code::Io),
            Fault::Full => store.fail_call(fails_at, Code::Full),
            Fault::LostReply => store.fail_after_effect(fails_at),
        }
        let outcome = act.run(&mut scene, &repository);
        if let Err(error) = &outcome {
            let wanted = if fault == Fault::Full { Code::Full } else { Code::Io };
            assert_eq!(error.code(), wanted, "{what}: {error:?}");
        }
        // The record may stand although its reply was lost.
        let expired = act == Act::Expire && outcome.is_err() && !scene.is_listed(scene.live.last());
        if expired {
            scene.live.pop();
        }
        scene.check(&what);
        // Once more, by the same process or by another one.
        if outcome.is_err() && !expired {
            let again = if call % 2 == 0 { repository } else { scene.open(Arc::new(store.clone())) };
            act.run(&mut scene, &again)
                .unwrap_or_else(|error| panic!("{what}: the second try failed: {error:?}"));
            scene.check(&format!("{what}, done again"));
        }
        if store.calls() < fails_at {
            return call;
        }
    }
    0
}

/// A medium with room for `room` bytes more, and a reserve. Whether the backup filled it.
pub(crate) fn fill(scene: &Scene, room: u64) -> bool {
    let mut scene = scene.fork();
    let store = FaultyStore::new(scene.medium.clone());
    store.fill_after(room, 64 << 10);
    let what = format!("room for {room} bytes");
    let repository = scene.open(Arc::new(store.clone()));
    let outcome = Act::Backup.run(&mut scene, &repository);
    if let Err(error) = &outcome {
        assert_eq!(error.code(), Code::Full, "{what}: {error:?}");
    }
    let repository = scene.open(Arc::new(store.clone()));
    scene.check_points(&repository, &what);
    repository.expire(&[scene.live.remove(0)], "test").unwrap();
    collect_all(&repository).unwrap_or_else(|error| panic!("{what}: cannot collect: {error:?}"));
    scene.check_points(&repository, &what);
    // What was collected makes room again for something of its size.
    let small = files(&[30], 8_000);
    let point = try_backup(&repository, 1, small.clone())
        .unwrap_or_else(|error| panic!("{what}: no room for a small backup: {error:?}"));
    scene.known.insert(point, small);
    scene.live.push(point);
    scene.check(&what);
    outcome.is_err()
}
