//! Many paths, asked in order.

use std::collections::BTreeSet;

use mainstay_core::ItemPath;

/// Paths of which each stands for all that lies below it too, so that none lies within another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PathSet(BTreeSet<ItemPath>);

impl PathSet {
    pub fn insert(&mut self, path: ItemPath) {
        if self.covers(&path) {
            return;
        }
        while let Some(below) = self.first_within(&path).cloned() {
            self.0.remove(&below);
        }
        self.0.insert(path);
    }

    /// Whether `path` is one of these or lies within one.
    pub fn covers(&self, path: &ItemPath) -> bool {
        // In the order by component nothing stands between a path and what is below it but more of that.
        self.0.range(..=path).next_back().is_some_and(|last| path.is_within(last))
    }

    /// Whether one of these is `path`, lies within it or is above it.
    pub fn touches(&self, path: &ItemPath) -> bool {
        self.covers(path) || self.first_within(path).is_some()
    }

    fn first_within(&self, path: &ItemPath) -> Option<&ItemPath> {
        self.0.range(path..).next().filter(|next| next.is_within(path))
    }
}

impl Extend<ItemPath> for PathSet {
    fn extend<T: IntoIterator<Item = ItemPath>>(&mut self, paths: T) {
        paths.into_iter().for_each(|path| self.insert(path));
    }
}

impl FromIterator<ItemPath> for PathSet {
    fn from_iter<T: IntoIterator<Item = ItemPath>>(paths: T) -> Self {
        let mut set = Self::default();
        set.extend(paths);
        set
    }
}

#[cfg(test)]
mod tests {
    use mainstay_core::ItemPath;
    use mainstay_testkit::{Rng, for_each_seed};

    use super::PathSet;

    /// Short paths over few names, so that they meet: one of them sorts before `/` as a byte.
    fn path(rng: &mut Rng) -> ItemPath {
        let names = [&b"a"[..], b"a b", b"a-", b"b"];
        let depth = rng.range(0..5);
        let name = |_| names[usize::try_from(rng.range(0..4)).unwrap()];
        let names: Vec<&[u8]> = (0..depth).map(name).collect();
        ItemPath::new(names.join(&b'/')).unwrap()
    }

    #[test]
    fn the_set_says_what_asking_each_path_would() {
        for_each_seed(200, |seed| {
            let mut rng = Rng::new(seed);
            let paths: Vec<ItemPath> = (0..rng.range(0..8)).map(|_| path(&mut rng)).collect();
            let set: PathSet = paths.iter().cloned().collect();
            for _ in 0..50 {
                let asked = path(&mut rng);
                let covers = paths.iter().any(|path| asked.is_within(path));
                let holds = paths.iter().any(|path| path.is_within(&asked));
                assert_eq!(set.covers(&asked), covers, "{asked} in {paths:?}");
                assert_eq!(set.touches(&asked), covers || holds, "{asked} in {paths:?}");
            }
        });
    }
}
