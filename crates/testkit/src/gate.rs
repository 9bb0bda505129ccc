//! Threads that take turns at the store, in an order that a seed decides.

use std::collections::VecDeque;
use std::ops::Range;
use std::panic::resume_unwind;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use mainstay_core::{BlobStore, Listed, Put, Result, Time};

use crate::Rng;
use crate::delegate::delegate_description;

/// One thread of an interleaving: what it does, with its own handle of the medium.
pub struct Actor<'a> {
    name: String,
    store: Arc<dyn BlobStore>,
    act: Box<dyn FnOnce(Arc<dyn BlobStore>) + Send + 'a>,
}

impl<'a> Actor<'a> {
    /// `store` may be one handle shared by all, or one of several on the same medium.
    pub fn new(
        name: &str,
        store: Arc<dyn BlobStore>,
        act: impl FnOnce(Arc<dyn BlobStore>) + Send + 'a,
    ) -> Self {
        Self { name: name.to_owned(), store, act: Box::new(act) }
    }
}

/// Runs all actors at once, each on a thread of its own, and lets them call the store one call at a time. Whenever
/// every actor that is not done waits at the store, `seed` decides who goes next. The same seed gives the same
/// order, as long as each actor makes its calls one after another.
///
/// Returns the calls in order. The panic of an actor ends the test once all are through, after the order was printed.
///
/// An actor must not wait for another one except through the store: nobody would ever be let in again.
pub fn interleave(seed: u64, actors: Vec<Actor<'_>>) -> Vec<String> {
    let names = actors.iter().map(|actor| actor.name.clone()).collect();
    let scheduler = Arc::new(Scheduler::new(seed, names));
    let ends: Vec<_> = std::thread::scope(|scope| {
        let start = |(actor, Actor { store, act, .. })| {
            let handle = GateStore { inner: store, actor, scheduler: Arc::clone(&scheduler) };
            let scheduler = &*scheduler;
            scope.spawn(move || {
                let _at_the_end = Finish { scheduler, actor };
                act(Arc::new(handle));
            })
        };
        let threads: Vec<_> = actors.into_iter().enumerate().map(start).collect();
        threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
    });
    let steps = std::mem::take(&mut scheduler.lock().steps);
    if let Some(panic) = ends.into_iter().find_map(std::result::Result::err) {
        crate::rng::say(&format!("the order of seed {seed} was:\n  {}", steps.join("\n  ")));
        resume_unwind(panic);
    }
    steps
}

struct Scheduler {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    rng: Rng,
    /// How often, of a hundred times, the one who went last goes again: some seeds take long turns, some none.
    sticky: u64,
    actors: Vec<Turns>,
    /// The last one that was let in.
    last: Option<usize>,
    /// Who may come in but has not yet noticed.
    admitted: Option<u64>,
    /// Whether a call is being carried out.
    busy: bool,
    tickets: u64,
    steps: Vec<String>,
}

struct Turns {
    name: String,
    waiting: VecDeque<(u64, String)>,
    finished: bool,
}

impl Scheduler {
    fn new(seed: u64, names: Vec<String>) -> Self {
        let mut rng = Rng::new(seed);
        let sticky = *rng.pick(&[0, 0, 50, 80, 95]);
        let turns = |name| Turns { name, waiting: VecDeque::new(), finished: false };
        let actors = names.into_iter().map(turns).collect();
        let state = State {
            rng,
            sticky,
            actors,
            last: None,
            admitted: None,
            busy: false,
            tickets: 0,
            steps: Vec::new(),
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the turn of `actor`, then makes the call.
    fn pass<T>(&self, actor: usize, what: String, call: impl FnOnce() -> T) -> T {
        let mut state = self.lock();
        state.tickets += 1;
        let ticket = state.tickets;
        state.actors[actor].waiting.push_back((ticket, what));
        self.admit(&mut state);
        while state.admitted != Some(ticket) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.admitted = None;
        state.busy = true;
        drop(state);
        let outcome = call();
        let mut state = self.lock();
        state.busy = false;
        self.admit(&mut state);
        outcome
    }

    /// Lets the next one in, if all who could come have come.
    fn admit(&self, state: &mut State) {
        let all_wait = state.actors.iter().all(|actor| actor.finished || !actor.waiting.is_empty());
        if !all_wait || state.busy || state.admitted.is_some() {
            return;
        }
        let candidates: Vec<usize> =
            (0..state.actors.len()).filter(|&actor| !state.actors[actor].waiting.is_empty()).collect();
        if candidates.is_empty() {
            return;
        }
        let again = state.last.filter(|last| candidates.contains(last) && state.rng.chance(state.sticky));
        let next = again.unwrap_or_else(|| *state.rng.pick(&candidates));
        state.last = Some(next);
        let turns = &mut state.actors[next];
        if let Some((ticket, what)) = turns.waiting.pop_front() {
            state.steps.push(format!("{}: {what}", turns.name));
            state.admitted = Some(ticket);
            self.changed.notify_all();
        }
    }
}

/// Tells the scheduler, panic or not, that an actor will not come again.
struct Finish<'a> {
    scheduler: &'a Scheduler,
    actor: usize,
}

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let mut state = self.scheduler.lock();
        state.actors[self.actor].finished = true;
        self.scheduler.admit(&mut state);
    }
}

/// The store as one actor sees it.
struct GateStore {
    inner: Arc<dyn BlobStore>,
    actor: usize,
    scheduler: Arc<Scheduler>,
}

impl GateStore {
    fn pass<T>(&self, what: impl Into<String>, call: impl FnOnce(&dyn BlobStore) -> T) -> T {
        self.scheduler.pass(self.actor, what.into(), || call(&*self.inner))
    }
}

impl BlobStore for GateStore {
    fn put_new(&self, name: &str, parts: &[&[u8]]) -> Result<Put> {
        self.pass(format!("put {name}"), |store| store.put_new(name, parts))
    }

    fn get(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>> {
        self.pass(format!("get {name} {range:?}"), |store| store.get(name, range))
    }

    fn size(&self, name: &str) -> Result<u64> {
        self.pass(format!("size {name}"), |store| store.size(name))
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        // The listener may use the store, so it is told outside the gate.
        let mut all = Vec::new();
        self.pass(format!("list {prefix}"), |store| {
            store.list(prefix, &mut |listed| {
                all.push(listed);
                Ok(())
            })
        })?;
        all.into_iter().try_for_each(each)
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.pass(format!("delete {name}"), |store| store.delete(name))
    }

    fn flush(&self) -> Result<()> {
        self.pass("flush", |store| store.flush())
    }

    fn release_reserve(&self) -> Result<bool> {
        self.pass("release the reserve", |store| store.release_reserve())
    }

    fn restore_reserve(&self) -> Result<()> {
        self.pass("restore the reserve", |store| store.restore_reserve())
    }

    fn reserve(&self) -> Result<Option<u64>> {
        self.pass("look at the reserve", |store| store.reserve())
    }

    fn sweep_temporary(&self, before: Time) -> Result<u64> {
        self.pass("sweep", |store| store.sweep_temporary(before))
    }

    delegate_description!();
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::MemoryStore;

    /// Two actors that look before they put: who wins, and what they saw.
    fn race(seed: u64) -> (Vec<String>, Vec<Put>) {
        let medium: Arc<dyn BlobStore> = Arc::new(MemoryStore::new());
        let puts = Mutex::new(Vec::new());
        let actor = |name: &'static str| {
            let puts = &puts;
            Actor::new(name, Arc::clone(&medium), move |store| {
                if store.size("it").is_err() {
                    let put = store.put_new("it", &[name.as_bytes()]).unwrap();
                    puts.lock().unwrap().push(put);
                }
                store.list("", &mut |listed| store.size(&listed.name).map(|_| ())).unwrap();
            })
        };
        let steps = interleave(seed, vec![actor("one"), actor("two")]);
        (steps, puts.into_inner().unwrap())
    }

    #[test]
    fn a_seed_repeats_its_order_and_few_seeds_find_every_outcome() {
        let outcomes: BTreeSet<_> = (0..40)
            .map(|seed| {
                let (steps, puts) = race(seed);
                assert_eq!(race(seed), (steps.clone(), puts.clone()), "seed {seed}");
                let winner = steps.iter().find(|step| step.ends_with("put it")).unwrap().clone();
                (winner, puts.len())
            })
            .collect();
        assert_eq!(outcomes.len(), 4, "either wins, alone or after both have looked: {outcomes:?}");
    }

    #[test]
    fn a_panic_stops_nobody_else_and_is_passed_on() {
        let medium = MemoryStore::new();
        let store: Arc<dyn BlobStore> = Arc::new(medium.clone());
        let panics = Actor::new("bad", Arc::clone(&store), |_| panic!("on purpose"));
        let works = Actor::new("good", store, |store| {
            store.put_new("a", &[]).unwrap();
            store.put_new("b", &[]).unwrap();
        });
        let run =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| interleave(1, vec![panics, works])));
        assert_eq!(*run.unwrap_err().downcast::<&str>().unwrap(), "on purpose");
        assert_eq!(medium.snapshot().len(), 2);
    }
}
