//! A store that fails by script.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_core::{BlobStore, Code, Error, Listed, Put, Result, Time};

use crate::delegate::delegate_description;
use crate::{Blobs, snapshot_of};

/// Which method was called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    Put,
    Get,
    Size,
    List,
    Delete,
    Flush,
    /// Releasing and restoring the reserve, sweeping.
    Housekeeping,
}

/// Fails when the script says so, and otherwise does what the inner store does. Clones share script and counters.
///
/// Calls are counted from 1. A test that must survive any single failure loops:
///
/// ```ignore
/// for call in 1.. {
///     let store = FaultyStore::new(MemoryStore::new());
///     store.fail_call(call, Code::Io);
///     let outcome = run(&store);
///     check(&store, outcome);
///     if store.calls() < call { break }        // the fault was never reached: the run is through
/// }
/// ```
#[derive(Clone)]
pub struct FaultyStore<S> {
    inner: S,
    script: Arc<Mutex<Script>>,
}

#[derive(Default)]
struct Script {
    calls: u64,
    calls_by_kind: BTreeMap<Call, u64>,
    by_number: BTreeMap<u64, Code>,
    by_kind: BTreeMap<(Call, u64), Code>,
    lost_replies: BTreeSet<u64>,
    down_from: Option<(u64, Code)>,
    room: Option<Room>,
}

/// A medium of limited size, in bytes.
struct Room {
    left: u64,
    reserve: u64,
}

impl<S: BlobStore> FaultyStore<S> {
    pub fn new(inner: S) -> Self {
        Self { inner, script: Arc::default() }
    }

    pub fn inner(&self) -> &S {
        &self.inner
    }

    /// How many calls were made so far.
    pub fn calls(&self) -> u64 {
        self.script().calls
    }

    pub fn calls_of(&self, call: Call) -> u64 {
        self.script().calls_by_kind.get(&call).copied().unwrap_or(0)
    }

    /// The `number`th call fails and has no effect.
    pub fn fail_call(&self, number: u64, code: Code) {
        self.script().by_number.insert(number, code);
    }

    /// The `number`th call of this kind fails and has no effect.
    pub fn fail_kind(&self, call: Call, number: u64, code: Code) {
        self.script().by_kind.insert((call, number), code);
    }

    /// The `number`th call and every one after it fail: the process is dead, the cable is out.
    pub fn fail_from(&self, number: u64, code: Code) {
        self.script().down_from = Some((number, code));
    }

    /// The `number`th call has its effect, but the caller is told that it failed: the reply was lost.
    pub fn fail_after_effect(&self, number: u64) {
        self.script().lost_replies.insert(number);
    }

    /// Room for this many more bytes; a put beyond it fails with [`Code::Full`] and leaves nothing. Deleting gives
    /// room back. `reserve` bytes more become room when the reserve is released.
    pub fn fill_after(&self, bytes: u64, reserve: u64) {
        self.script().room = Some(Room { left: bytes, reserve });
    }

    /// Forgets every scripted fault and the limit on room; counters go on.
    pub fn heal(&self) {
        let mut script = self.script();
        *script = Script {
            calls: script.calls,
            calls_by_kind: std::mem::take(&mut script.calls_by_kind),
            ..Script::default()
        };
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a call, makes it fail if it must, and tells whether its reply shall be lost.
    fn step(&self, call: Call) -> Result<bool> {
        let mut script = self.script();
        script.calls += 1;
        let number = script.calls;
        let of_kind = script.calls_by_kind.entry(call).or_default();
        *of_kind += 1;
        let of_kind = *of_kind;
        let down = script.down_from.filter(|(from, _)| number >= *from).map(|(_, code)| code);
        let fault = script.by_number.remove(&number).or(script.by_kind.remove(&(call, of_kind))).or(down);
        match fault {
            Some(code) => Err(Error::new(code, format!("scripted fault at call {number} ({call:?})"))),
            None => Ok(script.lost_replies.remove(&number)),
        }
    }

    fn reply<T>(lost: bool, outcome: Result<T>) -> Result<T> {
        if lost && outcome.is_ok() {
            return Err(Error::new(Code::Io, "scripted fault: it was done, but the reply was lost"));
        }
        outcome
    }

    fn take_room(&self, bytes: u64) -> Result<()> {
        match &mut self.script().room {
            Some(room) if room.left < bytes => {
                Err(Error::new(Code::Full, "scripted fault: the medium is full"))
            }
            Some(room) => {
                room.left -= bytes;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn give_room(&self, bytes: u64) {
        if let Some(room) = &mut self.script().room {
            room.left += bytes;
        }
    }
}

/// Damage to what is stored. These are not calls: nothing counts them, no fault hits them.
impl<S: BlobStore> FaultyStore<S> {
    /// The blob is gone.
    pub fn lose(&self, name: &str) -> Result<()> {
        self.inner.delete(name)
    }

    /// The byte at `offset` is combined with `xor` (not 0) by exclusive or.
    pub fn corrupt(&self, name: &str, offset: u64, xor: u8) -> Result<()> {
        let mut bytes = self.inner.get_whole(name, u64::MAX)?;
        let byte = usize::try_from(offset).ok().and_then(|offset| bytes.get_mut(offset));
        *byte.ok_or_else(|| Error::bug(format!("{name} has no byte {offset}")))? ^= xor;
        self.overwrite(name, &bytes)
    }

    /// Only the first `len` bytes are left.
    pub fn truncate(&self, name: &str, len: u64) -> Result<()> {
        let bytes = self.inner.get(name, 0..len)?;
        self.overwrite(name, &bytes)
    }

    /// Each blob has the bytes of the other.
    pub fn swap(&self, one: &str, other: &str) -> Result<()> {
        let bytes = [one, other].map(|name| self.inner.get_whole(name, u64::MAX));
        let [ones, others] = bytes;
        self.overwrite(one, &others?)?;
        self.overwrite(other, &ones?)
    }

    /// The whole medium is back at an earlier moment (see [`snapshot_of`]).
    pub fn roll_back_to(&self, earlier: &Blobs) -> Result<()> {
        let now = snapshot_of(&self.inner)?;
        for (name, bytes) in &now {
            if earlier.get(name) != Some(bytes) {
                self.inner.delete(name)?;
            }
        }
        for (name, bytes) in earlier {
            self.inner.put_new(name, &[bytes])?;
        }
        Ok(())
    }

    fn overwrite(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.inner.delete(name)?;
        self.inner.put_new(name, &[bytes]).map(|_| ())
    }
}

impl<S: BlobStore> BlobStore for FaultyStore<S> {
    fn put_new(&self, name: &str, parts: &[&[u8]]) -> Result<Put> {
        let lost = self.step(Call::Put)?;
        let bytes = parts.iter().map(|part| part.len() as u64).sum();
        self.take_room(bytes)?;
        let outcome = self.inner.put_new(name, parts);
        if !matches!(outcome, Ok(Put::Created)) {
            self.give_room(bytes);
        }
        Self::reply(lost, outcome)
    }

    fn get(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>> {
        let lost = self.step(Call::Get)?;
        Self::reply(lost, self.inner.get(name, range))
    }

    fn size(&self, name: &str) -> Result<u64> {
        let lost = self.step(Call::Size)?;
        Self::reply(lost, self.inner.size(name))
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        let lost = self.step(Call::List)?;
        Self::reply(lost, self.inner.list(prefix, each))
    }

    fn delete(&self, name: &str) -> Result<()> {
        let lost = self.step(Call::Delete)?;
        let bytes = self.inner.size(name).unwrap_or(0);
        let outcome = self.inner.delete(name);
        if outcome.is_ok() {
            self.give_room(bytes);
        }
        Self::reply(lost, outcome)
    }

    fn flush(&self) -> Result<()> {
        let lost = self.step(Call::Flush)?;
        Self::reply(lost, self.inner.flush())
    }

    fn release_reserve(&self) -> Result<bool> {
        let lost = self.step(Call::Housekeeping)?;
        let released = match &mut self.script().room {
            Some(room) => {
                room.left += room.reserve;
                std::mem::take(&mut room.reserve) > 0
            }
            None => false,
        };
        Self::reply(lost, self.inner.release_reserve().map(|inner| inner || released))
    }

    fn restore_reserve(&self) -> Result<()> {
        let lost = self.step(Call::Housekeeping)?;
        Self::reply(lost, self.inner.restore_reserve())
    }

    fn reserve(&self) -> Result<Option<u64>> {
        self.inner.reserve()
    }

    fn sweep_temporary(&self, before: Time) -> Result<u64> {
        let lost = self.step(Call::Housekeeping)?;
        Self::reply(lost, self.inner.sweep_temporary(before))
    }

    delegate_description!();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStore;

    crate::blob_store_suite!(conformance, || ((), FaultyStore::new(MemoryStore::new())));

    fn code<T>(result: Result<T>) -> Option<Code> {
        result.err().map(|error| error.code())
    }

    #[test]
    fn faults_hit_the_scripted_call_and_no_other() {
        let store = FaultyStore::new(MemoryStore::new());
        store.fail_call(2, Code::Conflict);
        store.fail_kind(Call::Flush, 2, Code::Io);
        store.fail_after_effect(3);
        assert_eq!(code(store.put_new("a", &[b"1"])), None);
        assert_eq!(code(store.put_new("b", &[b"2"])), Some(Code::Conflict));
        assert_eq!(code(store.put_new("c", &[b"3"])), Some(Code::Io));
        assert_eq!(store.inner().snapshot().into_keys().collect::<Vec<_>>(), ["a", "c"]);
        assert_eq!(code(store.flush()), None);
        assert_eq!(code(store.flush()), Some(Code::Io));
        assert_eq!((store.calls(), store.calls_of(Call::Put)), (5, 3));
        store.fail_from(6, Code::Io);
        assert_eq!(code(store.size("a")), Some(Code::Io));
        assert_eq!(code(store.size("a")), Some(Code::Io));
        store.heal();
        assert_eq!(code(store.size("a")), None);
    }

    #[test]
    fn a_full_medium_takes_nothing_until_something_goes() {
        let store = FaultyStore::new(MemoryStore::new());
        store.fill_after(10, 5);
        store.put_new("a", &[&[0; 6]]).unwrap();
        assert_eq!(code(store.put_new("b", &[&[0; 5]])), Some(Code::Full));
        assert_eq!(store.put_new("a", &[&[0; 4]]).unwrap(), Put::Exists);
        assert!(store.release_reserve().unwrap());
        assert!(!store.release_reserve().unwrap());
        store.put_new("b", &[&[0; 5]]).unwrap();
        assert_eq!(code(store.put_new("c", &[&[0; 5]])), Some(Code::Full));
        store.delete("a").unwrap();
        store.put_new("c", &[&[0; 5]]).unwrap();
        assert_eq!(store.inner().total_bytes(), 10);
    }

    #[test]
    fn damage_is_what_was_asked_for() {
        let store = FaultyStore::new(MemoryStore::new());
        store.put_new("a", &[b"aaaa"]).unwrap();
        store.put_new("b", &[b"bb"]).unwrap();
        let whole = store.inner().snapshot();
        store.corrupt("a", 3, 1).unwrap();
        store.swap("a", "b").unwrap();
        store.truncate("b", 4).unwrap();
        assert_eq!(
            (store.get("a", 0..2).unwrap(), store.get("b", 0..4).unwrap()),
            (b"bb".into(), b"aaa`".into())
        );
        assert_eq!(code(store.corrupt("a", 2, 1)), Some(Code::Bug));
        store.lose("a").unwrap();
        store.put_new("later", &[]).unwrap();
        store.roll_back_to(&whole).unwrap();
        assert_eq!(store.inner().snapshot(), whole);
    }
}
