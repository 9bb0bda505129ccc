//! A least-recently-used cache bounded by weight.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;

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

#[cfg(test)]
mod tests {
    use super::Cache;

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
