//! Which number the kernel knows an item by, for as long as it does.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use mainstay_core::{HardLink, ItemPath};

use super::Shown;

/// The number of the directory that is mounted.
pub(super) const ROOT: u64 = 1;

/// The items that the kernel knows.
pub(super) struct Inodes {
    known: HashMap<u64, Known>,
}

struct Known {
    shown: Arc<Shown>,
    /// So often the kernel was told of it and has not forgotten it.
    told: u64,
}

/// What makes two items one file.
#[derive(PartialEq, Eq, Hash)]
enum Identity<'a> {
    Path(&'a ItemPath),
    Link(u64, HardLink),
}

impl<'a> Identity<'a> {
    fn of(shown: &'a Shown) -> Self {
        match shown.metadata.hard_link {
            Some(link) => Identity::Link(shown.world, link),
            None => Identity::Path(&shown.path),
        }
    }
}

impl Inodes {
    pub(super) fn new(root: Shown) -> Self {
        Self { known: HashMap::from([(ROOT, Known { shown: Arc::new(root), told: 1 })]) }
    }

    pub(super) fn get(&self, number: u64) -> Option<Arc<Shown>> {
        self.known.get(&number).map(|known| Arc::clone(&known.shown))
    }

    /// The number of an item: the same whenever it is asked for, and for all hard links of one file.
    pub(super) fn number(&self, shown: &Shown) -> u64 {
        let identity = Identity::of(shown);
        let mut hasher = DefaultHasher::new();
        identity.hash(&mut hasher);
        // Small numbers mean something to the kernel.
        let mut number = hasher.finish().max(16);
        while self.known.get(&number).is_some_and(|known| Identity::of(&known.shown) != identity) {
            number = number.wrapping_add(1).max(16);
        }
        number
    }

    /// Counts that the kernel is told of an item, and returns its number.
    pub(super) fn tell(&mut self, shown: Shown) -> u64 {
        let number = self.number(&shown);
        let told = self.known.get(&number).map_or(0, |known| known.told) + 1;
        // What is known already may have changed: the link to the latest point.
        self.known.insert(number, Known { shown: Arc::new(shown), told });
        number
    }

    /// The kernel has forgotten an item that it was told of `times` times.
    pub(super) fn forget(&mut self, number: u64, times: u64) {
        let Some(known) = self.known.get_mut(&number).filter(|_| number != ROOT) else { return };
        known.told = known.told.saturating_sub(times);
        if known.told == 0 {
            self.known.remove(&number);
        }
    }
}

#[cfg(test)]
mod tests {
    use mainstay_core::{HardLink, ItemPath, Kind, Metadata};

    use super::{Inodes, ROOT};
    use crate::mount::Shown;

    fn shown(path: &str, link: Option<u64>) -> Shown {
        let hard_link = link.map(|inode| HardLink { device: 7, inode });
        let metadata = Metadata { hard_link, ..Metadata::new(Kind::File) };
        Shown { path: ItemPath::new(path).unwrap(), metadata, world: 3, lasting: true }
    }

    #[test]
    fn hard_links_are_one_file_and_what_is_forgotten_goes() {
        let mut inodes = Inodes::new(shown("", None));
        let first = inodes.tell(shown("a", Some(5)));
        assert_eq!(inodes.tell(shown("b", Some(5))), first);
        let other = inodes.tell(shown("c", Some(6)));
        let plain = inodes.tell(shown("d", None));
        assert!(first != other && plain != other && inodes.number(&shown("e", None)) != plain);
        assert_eq!(inodes.get(first).unwrap().path.to_string(), "b");
        inodes.forget(first, 1);
        assert!(inodes.get(first).is_some());
        inodes.forget(first, 1);
        assert!(inodes.get(first).is_none());
        // It comes back under the number that programs may have seen.
        assert_eq!(inodes.tell(shown("b", Some(5))), first);
        inodes.forget(ROOT, 9);
        assert!(inodes.get(ROOT).is_some());
    }
}
