//! A least-recently-used cache bounded by weight.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_core::Result;

pub(crate) struct Cache<K, V> {
    weight_max: usize,
    weight: usize,
    tick: u64,
    values: HashMap<K, (V, usize, u64)>,
    /// Keys by when they were last used.
    order: BTreeMap<u64, K>,
}

impl<K: Hash + Eq + Copy, V: Clone> Cache<K, V> {
    /// Holds values of up to `weight_max` bytes together.
    pub(crate) fn new(weight_max: usize) -> Self {
        Self { weight_max, weight: 0, tick: 0, values: HashMap::new(), order: BTreeMap::new() }
    }

    pub(crate) fn get(&mut self, key: &K) -> Option<V> {
        self.tick += 1;
        let (value, _, used) = self.values.get_mut(key)?;
        self.order.remove(used);
        *used = self.tick;
        self.order.insert(self.tick, *key);
        Some(value.clone())
    }

    pub(crate) fn has(&self, key: &K) -> bool {
        self.values.contains_key(key)
    }

    pub(crate) fn insert(&mut self, key: K, value: V, weight: usize) {
        self.remove(&key);
        self.tick += 1;
        self.weight += weight;
        self.values.insert(key, (value, weight, self.tick));
        self.order.insert(self.tick, key);
        while self.weight > self.weight_max && self.values.len() > 1 {
            let Some((_, oldest)) = self.order.pop_first() else { break };
            if let Some((_, weight, _)) = self.values.remove(&oldest) {
                self.weight -= weight;
            }
        }
    }

    pub(crate) fn remove(&mut self, key: &K) {
        if let Some((_, weight, used)) = self.values.remove(key) {
            self.weight -= weight;
            self.order.remove(&used);
        }
    }
}

/// A cache shared by threads in which a missing value is made once, however many want it at the same moment.
pub(crate) struct SharedCache<K, V> {
    cache: Mutex<Cache<K, V>>,
    /// Keys whose values are being made.
    making: Mutex<HashMap<K, Arc<Mutex<()>>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<K: Hash + Eq + Copy, V: Clone> SharedCache<K, V> {
    pub(crate) fn new(weight_max: usize) -> Self {
        Self { cache: Mutex::new(Cache::new(weight_max)), making: Mutex::default() }
    }

    /// Whether the value is there, which another thread may change.
    pub(crate) fn has(&self, key: &K) -> bool {
        lock(&self.cache).has(key)
    }

    /// The value, or what `make` returns with its weight in bytes. A failure is not remembered.
    pub(crate) fn get_or(&self, key: &K, make: impl FnOnce() -> Result<(V, usize)>) -> Result<V> {
        if let Some(value) = lock(&self.cache).get(key) {
            return Ok(value);
        }
        let turn = Arc::clone(lock(&self.making).entry(*key).or_default());
        let _one_at_a_time = lock(&turn);
        // Somebody may have made it while this thread waited for its turn.
        if let Some(value) = lock(&self.cache).get(key) {
            return Ok(value);
        }
        let made = make();
        lock(&self.making).remove(key);
        let (value, weight) = made?;
        lock(&self.cache).insert(*key, value.clone(), weight);
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::{Cache, SharedCache};

    #[test]
    fn a_value_wanted_by_many_is_made_once() {
        let (cache, made) = (SharedCache::new(100), std::sync::atomic::AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let make = || {
                        made.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        std::thread::sleep(std::time::Duration::from_millis(5));
                        Ok((7, 1))
                    };
                    assert_eq!(cache.get_or(&1, make).unwrap(), 7);
                });
            }
        });
        assert_eq!(made.into_inner(), 1);
    }

    #[test]
    fn drops_what_was_used_longest_ago() {
        let mut cache = Cache::new(3);
        for key in 0..3 {
            cache.insert(key, key, 1);
        }
        cache.get(&0);
        cache.insert(3, 3, 1);
        assert_eq!([0, 1, 2, 3].map(|key| cache.get(&key)), [Some(0), None, Some(2), Some(3)]);
        cache.insert(9, 9, 100);
        assert_eq!(cache.get(&9), Some(9), "one value may be heavier than the cache");
        assert_eq!(cache.get(&3), None);
    }
}
