//! The tables of an image, read a page at a time and kept within a bound.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use mainstay_core::{Blocks, Error, Result};

use crate::bytes;

/// Bytes of a page. A multiple of every entry size, so that no entry lies on two pages.
pub(crate) const PAGE: u64 = 16 << 10;

/// Pages kept: 4 MiB, which are the tables of 32 GiB of a qcow2 image as QEMU makes them.
const KEPT: usize = 256;

/// Reads small pieces of a device, most of them again and again.
pub(crate) struct Pages {
    base: Arc<dyn Blocks>,
    kept: Mutex<Kept<u64>>,
}

impl Pages {
    pub(crate) fn new(base: Arc<dyn Blocks>) -> Self {
        Self { base, kept: Mutex::new(Kept::new(KEPT)) }
    }

    /// The bytes from `offset` to the end of its page or of the device; not empty.
    pub(crate) fn from(&self, offset: u64) -> Result<Page> {
        let size = self.base.size();
        if offset >= size {
            return Err(Error::integrity(format!("a table lies at byte {offset} of {size}")));
        }
        let number = offset / PAGE;
        let skip = bytes::index(offset % PAGE)?;
        if let Some(page) = self.lock().get(&number) {
            return Ok(Page { page, skip });
        }
        let page: Arc<[u8]> = bytes::read_up_to(&*self.base, number * PAGE, bytes::index(PAGE)?)?.into();
        self.lock().put(number, Arc::clone(&page));
        Ok(Page { page, skip })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Kept<u64>> {
        // A panic elsewhere leaves whole pages behind, or none.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Part of a page.
pub(crate) struct Page {
    page: Arc<[u8]>,
    skip: usize,
}

impl Page {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.page[self.skip..]
    }
}

/// The few things that were wanted last.
pub(crate) struct Kept<K> {
    most: usize,
    clock: u64,
    things: HashMap<K, (u64, Arc<[u8]>)>,
}

impl<K: std::hash::Hash + Eq + Copy> Kept<K> {
    pub(crate) fn new(most: usize) -> Self {
        Self { most, clock: 0, things: HashMap::new() }
    }

    pub(crate) fn get(&mut self, key: &K) -> Option<Arc<[u8]>> {
        self.clock += 1;
        let (used, thing) = self.things.get_mut(key)?;
        *used = self.clock;
        Some(Arc::clone(thing))
    }

    pub(crate) fn put(&mut self, key: K, thing: Arc<[u8]>) {
        if self.things.len() >= self.most {
            let oldest = self.things.iter().min_by_key(|(_, (used, _))| *used).map(|(key, _)| *key);
            oldest.and_then(|key| self.things.remove(&key));
        }
        self.clock += 1;
        self.things.insert(key, (self.clock, thing));
    }
}

#[cfg(test)]
mod tests {
    use super::Kept;

    #[test]
    fn what_was_not_wanted_for_longest_goes_first() {
        let mut kept = Kept::new(2);
        kept.put(1, vec![1].into());
        kept.put(2, vec![2].into());
        assert!(kept.get(&1).is_some());
        kept.put(3, vec![3].into());
        assert_eq!([1, 2, 3].map(|key| kept.get(&key).is_some()), [true, false, true]);
    }
}
