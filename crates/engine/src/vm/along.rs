//! Disks on their way into the repository, with what is known of the files on them.

use std::collections::BTreeMap;
use std::sync::Arc;

use mainstay_core::{Blocks, Body, Captured, ItemPath, Next, Receipt, Result, Source};
use mainstay_diskimage::map::{CutMap, DiskMap, Mapped};
use mainstay_diskimage::volume::volumes;

use super::inside::Inside;
use super::lean::{Lean, Leave};

/// The maps of a machine's disks, by the path of their items.
pub(super) struct Maps {
    disks: BTreeMap<ItemPath, Arc<DiskMap>>,
    /// What could not be understood, each a sentence. It costs room and nothing else.
    pub(super) notes: Vec<String>,
}

impl Maps {
    /// Reads what lies on the disks. A disk that nobody understands has an empty map.
    pub(super) fn of(disks: Vec<(ItemPath, Arc<dyn Blocks>)>, inside: &Inside<'_>) -> Self {
        let (paths, disks): (Vec<ItemPath>, Vec<Arc<dyn Blocks>>) = disks.into_iter().unzip();
        let layout = match volumes(&disks, inside.keys) {
            Ok(layout) => layout,
            Err(error) => return Self { disks: BTreeMap::new(), notes: vec![error.chain().join(": ")] },
        };
        let map = CutMap::of(&layout.volumes, disks.len(), inside.open);
        let found =
            paths.into_iter().enumerate().filter_map(|(number, path)| Some((path, map.disk(number)?)));
        Self { disks: found.collect(), notes: layout.notes.into_iter().chain(map.notes).collect() }
    }
}

/// Gives the disks of a source their maps.
pub(super) struct AlongFiles<S> {
    pub(super) inner: S,
    pub(super) maps: Maps,
    pub(super) leave: Leave,
}

impl<S: Source> Source for AlongFiles<S> {
    fn next(&mut self) -> Result<Next> {
        let mut next = self.inner.next()?;
        if let Next::Item(item) = &mut next
            && let Some(map) = self.maps.disks.get(&item.path)
        {
            item.body = match std::mem::replace(&mut item.body, Body::None) {
                Body::Blocks(blocks) => {
                    let mapped: Arc<dyn Blocks> = Arc::new(Mapped::new(Arc::from(blocks), Arc::clone(map)));
                    Body::Blocks(Box::new(Lean::new(mapped, map, self.leave)))
                }
                other => other,
            };
        }
        Ok(next)
    }

    fn seal(&mut self) -> Result<Captured> {
        self.inner.seal()
    }

    fn commit(self: Box<Self>, receipt: &Receipt) -> Result<()> {
        Box::new(self.inner).commit(receipt)
    }
}
