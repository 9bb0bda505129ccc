//! What a store was told to do, in order, and the states that a crash in the middle could leave behind.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_core::{BlobStore, Listed, Put, Result, Time};

use crate::delegate::delegate_description;
use crate::{Blobs, MemoryStore};

/// One successful call that changes the medium. Who made it is the number of the handle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    PutNew { actor: usize, name: String, bytes: Arc<[u8]>, outcome: Put },
    Delete { actor: usize, name: String },
    Flush { actor: usize },
}

/// Records every mutating call that succeeds. Clones are the same handle of the same trace;
/// [`TracingStore::another`] is a second process on the same medium, whose flush is its own.
#[derive(Clone)]
pub struct TracingStore<S> {
    inner: S,
    actor: usize,
    trace: Arc<Mutex<Trace>>,
}

#[derive(Default)]
struct Trace {
    ops: Vec<Op>,
    actors: usize,
}

impl<S: BlobStore> TracingStore<S> {
    pub fn new(inner: S) -> Self {
        Self { inner, actor: 0, trace: Arc::default() }
    }

    /// A handle of another process. `inner` must be the same medium.
    pub fn another(&self, inner: S) -> Self {
        let mut trace = self.lock();
        trace.actors += 1;
        Self { inner, actor: trace.actors, trace: Arc::clone(&self.trace) }
    }

    /// What was done so far, by all handles.
    pub fn ops(&self) -> Vec<Op> {
        self.lock().ops.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Trace> {
        self.trace.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: BlobStore> BlobStore for TracingStore<S> {
    // The lock is held while the inner store works, so that the trace has the order of the medium.

    fn put_new(&self, name: &str, parts: &[&[u8]]) -> Result<Put> {
        let mut trace = self.lock();
        let outcome = self.inner.put_new(name, parts)?;
        trace.ops.push(Op::PutNew {
            actor: self.actor,
            name: name.to_owned(),
            bytes: parts.concat().into(),
            outcome,
        });
        Ok(outcome)
    }

    fn delete(&self, name: &str) -> Result<()> {
        let mut trace = self.lock();
        self.inner.delete(name)?;
        trace.ops.push(Op::Delete { actor: self.actor, name: name.to_owned() });
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        let mut trace = self.lock();
        self.inner.flush()?;
        trace.ops.push(Op::Flush { actor: self.actor });
        Ok(())
    }

    fn get(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>> {
        self.inner.get(name, range)
    }

    fn size(&self, name: &str) -> Result<u64> {
        self.inner.size(name)
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        self.inner.list(prefix, each)
    }

    fn release_reserve(&self) -> Result<bool> {
        self.inner.release_reserve()
    }

    fn restore_reserve(&self) -> Result<()> {
        self.inner.restore_reserve()
    }

    fn reserve(&self) -> Result<Option<u64>> {
        self.inner.reserve()
    }

    fn sweep_temporary(&self, before: Time) -> Result<u64> {
        self.inner.sweep_temporary(before)
    }

    delegate_description!();
}

/// What the medium may hold after a crash, and how it came about.
pub struct CrashState {
    pub store: MemoryStore,
    /// How many operations of the trace had been done.
    pub done: usize,
    /// For the message of a failing test.
    pub what: String,
}

/// The states that a power cut can leave behind, for every prefix of a trace.
///
/// # Must be survived (a test that sees them must still find every acknowledged point)
///
/// - The cut comes between any two operations.
/// - A put or delete that no flush covers is absent or whole: all of them done, none of them, all but any one, only
///   any one. A flush covers the directories that its handle touched, whoever put what is in them.
/// - Temporary files remain. They have no name in the store, so no state here shows them; the tests of the local
///   store look at real ones.
///
/// # Need not be survived, must be noticed ([`CrashStates::torn_last`] and [`crate::FaultyStore`])
///
/// - A blob is cut short, zeroed, or rotten: the medium broke its promise.
pub struct CrashStates {
    base: Blobs,
    ops: Vec<Op>,
    torn_last: bool,
}

impl CrashStates {
    /// `base` is what the medium held before the first operation.
    pub fn new(base: Blobs, ops: Vec<Op>) -> Self {
        Self { base, ops, torn_last: false }
    }

    /// Also yields states whose last put is cut to its first half, or has only zeros after it.
    #[must_use]
    pub fn torn_last(mut self, torn_last: bool) -> Self {
        self.torn_last = torn_last;
        self
    }

    /// Calls `check` with every state; the number of states.
    pub fn for_each(&self, mut check: impl FnMut(&CrashState)) -> usize {
        let mut count = 0;
        for done in 0..=self.ops.len() {
            for state in self.after(done) {
                check(&state);
                count += 1;
            }
        }
        count
    }

    /// The states of a crash right after the first `done` operations.
    pub fn after(&self, done: usize) -> Vec<CrashState> {
        let ops = &self.ops[..done];
        let durable = durable(ops);
        let pending: Vec<usize> = (0..done).filter(|&op| !durable[op] && changes(&ops[op])).collect();
        let state = |what: String, present: &dyn Fn(usize) -> bool| {
            let mut blobs = self.base.clone();
            let kept = ops.iter().enumerate().filter(|(index, _)| durable[*index] || present(*index));
            kept.for_each(|(_, op)| apply(&mut blobs, op));
            CrashState {
                store: MemoryStore::from_blobs(blobs),
                done,
                what: format!("after {done} operations, {what}"),
            }
        };
        let mut states = vec![state("all done".into(), &|_| true)];
        if !pending.is_empty() {
            states.push(state("nothing unflushed done".into(), &|_| false));
        }
        if pending.len() > 1 {
            for &one in &pending {
                states.push(state(format!("all done but {}", describe(&ops[one])), &|op| op != one));
                states.push(state(format!("of the unflushed only {}", describe(&ops[one])), &|op| op == one));
            }
        }
        if self.torn_last {
            states.extend(self.torn(done));
        }
        states
    }

    fn torn(&self, done: usize) -> Vec<CrashState> {
        let Some(Op::PutNew { name, bytes, outcome: Put::Created, .. }) = self.ops[..done].last() else {
            return Vec::new();
        };
        let half = bytes.len() / 2;
        let mut zeroed = bytes[..half].to_vec();
        zeroed.resize(bytes.len(), 0);
        let torn = [("cut", bytes[..half].to_vec()), ("zeroed", zeroed)];
        let torn = torn.into_iter().filter(|(_, torn)| torn[..] != bytes[..]);
        torn.map(|(how, torn)| {
            let mut blobs = self.base.clone();
            self.ops[..done].iter().for_each(|op| apply(&mut blobs, op));
            blobs.insert(name.clone(), torn.into());
            let what = format!("after {done} operations, the second half of {name} {how}");
            CrashState { store: MemoryStore::from_blobs(blobs), done, what }
        })
        .collect()
    }
}

fn directory(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(directory, _)| directory)
}

/// Which operations a later flush covers.
fn durable(ops: &[Op]) -> Vec<bool> {
    let mut durable = vec![false; ops.len()];
    for (at, op) in ops.iter().enumerate() {
        let Op::Flush { actor: flusher } = op else { continue };
        let touched: Vec<&str> = ops[..at].iter().filter_map(|op| touched_by(op, *flusher)).collect();
        for (earlier, covered) in ops[..at].iter().zip(&mut durable) {
            *covered |= name_of(earlier).is_some_and(|name| touched.contains(&directory(name)));
        }
    }
    durable
}

fn touched_by(op: &Op, flusher: usize) -> Option<&str> {
    match op {
        Op::PutNew { actor, name, .. } | Op::Delete { actor, name } if *actor == flusher => {
            Some(directory(name))
        }
        _ => None,
    }
}

fn name_of(op: &Op) -> Option<&str> {
    match op {
        Op::PutNew { name, .. } | Op::Delete { name, .. } => Some(name),
        Op::Flush { .. } => None,
    }
}

fn changes(op: &Op) -> bool {
    matches!(op, Op::PutNew { outcome: Put::Created, .. } | Op::Delete { .. })
}

fn apply(blobs: &mut Blobs, op: &Op) {
    match op {
        Op::PutNew { name, bytes, outcome: Put::Created, .. } => {
            blobs.insert(name.clone(), Arc::clone(bytes));
        }
        Op::Delete { name, .. } => {
            blobs.remove(name);
        }
        Op::PutNew { outcome: Put::Exists, .. } | Op::Flush { .. } => {}
    }
}

fn describe(op: &Op) -> String {
    match op {
        Op::PutNew { actor, name, bytes, .. } => format!("put {name} ({} bytes) by {actor}", bytes.len()),
        Op::Delete { actor, name } => format!("delete {name} by {actor}"),
        Op::Flush { actor } => format!("flush by {actor}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    crate::blob_store_suite!(conformance, || ((), TracingStore::new(MemoryStore::new())));

    fn names(state: &CrashState) -> String {
        state.store.snapshot().into_keys().collect::<Vec<_>>().join(" ")
    }

    fn states_after(store: &TracingStore<MemoryStore>, done: usize) -> Vec<String> {
        let mut states: Vec<_> =
            CrashStates::new(Blobs::new(), store.ops()).after(done).iter().map(names).collect();
        states.sort();
        states.dedup();
        states
    }

    #[test]
    fn what_is_not_flushed_may_be_missing_one_by_one_and_what_is_flushed_never() {
        let store = TracingStore::new(MemoryStore::new());
        store.put_new("a", &[b"1"]).unwrap();
        store.flush().unwrap();
        store.put_new("b", &[b"2"]).unwrap();
        store.put_new("c", &[b"3"]).unwrap();
        store.put_new("d", &[b"4"]).unwrap();
        store.delete("a").unwrap();
        assert_eq!(states_after(&store, 1), ["", "a"]);
        assert_eq!(states_after(&store, 2), ["a"]);
        assert_eq!(states_after(&store, 5), ["a", "a b", "a b c", "a b c d", "a b d", "a c", "a c d", "a d"]);
        assert!(states_after(&store, 6).contains(&"b c d".to_owned()));
        assert!(states_after(&store, 6).contains(&"a b c d".to_owned()));
    }

    #[test]
    fn a_flush_covers_the_directories_of_its_own_handle_whoever_filled_them() {
        let medium = MemoryStore::new();
        let one = TracingStore::new(medium.clone());
        let two = one.another(medium);
        one.put_new("log/1", &[b"x"]).unwrap();
        one.put_new("pack/1", &[b"x"]).unwrap();
        two.put_new("log/2", &[b"x"]).unwrap();
        two.flush().unwrap();
        assert_eq!(states_after(&one, 4), ["log/1 log/2", "log/1 log/2 pack/1"]);
    }

    #[test]
    fn torn_blobs_come_only_when_asked_for() {
        let store = TracingStore::new(MemoryStore::new());
        store.put_new("a", &[b"1234"]).unwrap();
        let states = CrashStates::new(Blobs::new(), store.ops());
        assert_eq!(states.for_each(|_| {}), 3);
        let mut seen = Vec::new();
        states.torn_last(true).for_each(|state| seen.extend(state.store.snapshot().into_values()));
        seen.sort();
        assert_eq!(seen, [b"12".to_vec(), b"12\0\0".to_vec(), b"1234".to_vec()].map(Arc::<[u8]>::from));
    }
}
