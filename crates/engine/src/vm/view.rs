//! The files of a machine whose disks lie in a recovery point, read without restoring, mounting or booting it.
//!
//! The tree is the machine's own, as its `/etc/fstab` joins it. Two directories at the top are ours: `@volumes` has
//! every volume by its name, mounted or not, and `@machine` the items of the point, disks as image files.

use std::collections::HashSet;
use std::sync::Arc;

use mainstay_core::{
    Blocks, Code, Error, ItemPath, Kind, Metadata, Open, Result, Skip, Source, Stamp, StreamReader,
};
use mainstay_repository::{PointInfo, PointReader};

use mainstay_workloads::vm::DISKS;

use super::inside::Inside;
use super::source::{Deep, Selected, Step};
use super::tree::{Leaf, Tree, VolumeSeen};
use crate::view::{PointView, Seen, SeenWalk, not_found};

const MACHINE: &[u8] = b"@machine";
const VOLUMES: &[u8] = b"@volumes";

/// The files of a machine in a recovery point.
#[derive(Clone)]
pub struct MachineView(Arc<Inner>);

struct Inner {
    reader: PointReader,
    tree: Tree,
}

/// What a path means.
enum Place {
    /// One of the directories that are ours.
    Ours,
    Leaf(Leaf),
    Stored(Box<Seen>),
}

impl MachineView {
    /// Opens the disks of the point.
    ///
    /// Errors: those of the repository. What is odd about the disks is in [`MachineView::notes`].
    pub fn open(reader: PointReader, inside: &Inside<'_>) -> Result<Self> {
        let disks = disks(&reader)?;
        Ok(Self(Arc::new(Inner { tree: Tree::of(&disks, inside)?, reader })))
    }

    /// What was found on the disks.
    pub fn volumes(&self) -> &[VolumeSeen] {
        &self.0.tree.volumes
    }

    /// Where walks begin that see every file: the machine's root, volumes that it does not mount, the items of the point.
    pub(crate) fn tops(&self) -> Vec<ItemPath> {
        let ours = |names: &[&[u8]]| ItemPath::new(names.join(&b'/')).unwrap_or_default();
        if !self.0.tree.has_root() {
            return vec![ItemPath::root()];
        }
        let apart = self.volumes().iter().filter(|volume| volume.is_readable() && volume.mounted.is_none());
        let apart = apart.map(|volume| ours(&[VOLUMES, volume.name.as_bytes()]));
        [ItemPath::root(), ours(&[MACHINE])].into_iter().chain(apart).collect()
    }

    /// What could not be understood, each a sentence.
    pub fn notes(&self) -> &[String] {
        &self.0.tree.notes
    }
}

/// The disks of a machine's point, in the order of their names.
pub(super) fn disks(reader: &PointReader) -> Result<Vec<Arc<dyn Blocks>>> {
    let directory = ItemPath::new(DISKS).unwrap_or_default();
    let entries = reader.list(&directory)?;
    let disks = entries.iter().filter(|entry| entry.metadata.kind == Kind::Disk && entry.has_body);
    disks.map(|entry| reader.blocks(entry).map(Arc::from)).collect()
}

impl Inner {
    fn find(&self, path: &ItemPath) -> Result<Option<Place>> {
        let mut names = path.components();
        match (names.next(), names.next()) {
            (Some(VOLUMES), None) => Ok(Some(Place::Ours)),
            (Some(VOLUMES), Some(volume)) => {
                let leaf = self.tree.lookup_volume(volume, &without(path, 2))?;
                Ok(leaf.map(Place::Leaf))
            }
            (Some(MACHINE), None) => Ok(Some(Place::Ours)),
            (Some(MACHINE), _) => {
                let stored = self.reader.lookup(&without(path, 1))?.map(Seen::from);
                Ok(stored.map(|stored| Place::Stored(Box::new(Seen { path: path.clone(), ..stored }))))
            }
            (None, _) if !self.tree.has_root() => Ok(Some(Place::Ours)),
            _ => Ok(self.tree.lookup(path)?.map(Place::Leaf)),
        }
    }

    fn not_found(&self, path: &ItemPath) -> Error {
        match self.tree.unread() {
            Some(why) => why.during(format!("cannot find /{path}")),
            None => not_found(&self.reader, path),
        }
    }

    fn see(&self, path: &ItemPath) -> Result<Option<Seen>> {
        match self.find(path)? {
            None => Ok(None),
            Some(Place::Ours) => Ok(Some(seen(path.clone(), directory()))),
            Some(Place::Stored(stored)) => Ok(Some(*stored)),
            Some(Place::Leaf(leaf)) => Ok(Some(seen(path.clone(), leaf.metadata()?))),
        }
    }

    /// What lies in a directory of a file system.
    fn below(&self, leaf: &Leaf, path: &ItemPath) -> Result<Vec<(Vec<u8>, Option<Leaf>)>> {
        let mounts = (path.components().next() != Some(VOLUMES)).then_some(path);
        let found = self.tree.children(leaf, mounts)?;
        Ok(found.into_iter().map(|(name, leaf)| (name, Some(leaf))).collect())
    }

    /// What lies directly in a directory. What is ours is at the top only of what is listed, not of what is walked.
    fn children(&self, path: &ItemPath) -> Result<Vec<(Vec<u8>, Option<Leaf>)>> {
        let ours = |names: &[&[u8]]| names.iter().map(|name| (name.to_vec(), None)).collect();
        match self.find(path)? {
            None => Err(self.not_found(path)),
            Some(Place::Leaf(leaf)) => self.below(&leaf, path),
            Some(Place::Ours) if path.is_root() => Ok(ours(&[MACHINE, VOLUMES])),
            Some(Place::Ours) if path.name() == VOLUMES => {
                let readable = self.tree.volumes.iter().filter(|volume| volume.is_readable());
                let mut names: Vec<&[u8]> = readable.map(|volume| volume.name.as_bytes()).collect();
                names.sort_unstable();
                Ok(ours(&names))
            }
            Some(Place::Ours | Place::Stored(_)) => {
                let entries = self.reader.list(&without(path, 1))?;
                Ok(entries.iter().map(|entry| (entry.path.name().to_vec(), None)).collect())
            }
        }
    }
}

/// Whether a path is one of the directories at the top that are ours.
pub(super) fn is_ours(path: &ItemPath) -> bool {
    matches!(path.as_bytes(), MACHINE | VOLUMES)
}

/// The path without its first components.
fn without(path: &ItemPath, count: usize) -> ItemPath {
    let rest: Vec<&[u8]> = path.components().skip(count).collect();
    ItemPath::new(rest.join(&b'/')).unwrap_or_default()
}

fn directory() -> Metadata {
    Metadata { mode: 0o755, ..Metadata::new(Kind::Directory) }
}

fn seen(path: ItemPath, metadata: Metadata) -> Seen {
    let has_body = matches!(metadata.kind, Kind::File | Kind::Disk | Kind::Record);
    Seen { path, metadata, stamp: Stamp::default(), has_body, changed_while_read: false }
}

impl PointView for MachineView {
    fn info(&self) -> &PointInfo {
        self.0.reader.info()
    }

    fn lookup(&self, path: &ItemPath) -> Result<Option<Seen>> {
        self.0.see(path)
    }

    fn list(&self, directory: &ItemPath) -> Result<Vec<Seen>> {
        let mut found = Vec::new();
        if directory.is_root() && self.0.tree.has_root() {
            found.extend(self.0.see(&directory.join(MACHINE).unwrap_or_default())?);
            found.extend(self.0.see(&directory.join(VOLUMES).unwrap_or_default())?);
        }
        for (name, leaf) in self.0.children(directory)? {
            let path = directory.join(&name).map_err(impossible)?;
            match leaf {
                Some(leaf) => found.push(seen(path, leaf.metadata()?)),
                None => found.extend(self.0.see(&path)?),
            }
        }
        Ok(found)
    }

    fn walk(&self, within: &ItemPath) -> Result<SeenWalk<'_>> {
        let found = self.0.see(within)?.ok_or_else(|| not_found(self, within))?;
        Ok(Box::new(self.deep(found).map(|step| step.map(|(seen, _)| seen).map_err(|(_, error)| error))))
    }

    fn open(&self, path: &ItemPath) -> Result<Box<dyn StreamReader>> {
        match self.0.find(path)? {
            Some(Place::Leaf(leaf)) => leaf.open(),
            Some(Place::Stored(_)) => PointView::open(&self.0.reader, &without(path, 1)),
            Some(Place::Ours) => Err(Error::new(Code::Usage, format!("/{path} is a directory"))),
            None => Err(not_found(self, path)),
        }
    }

    fn content(&self, path: &ItemPath) -> Result<Arc<dyn Blocks>> {
        match self.0.find(path)? {
            Some(Place::Leaf(leaf)) => leaf.content(),
            Some(Place::Stored(_)) => PointView::content(&self.0.reader, &without(path, 1)),
            Some(Place::Ours) => Err(Error::new(Code::Usage, format!("/{path} is a directory"))),
            None => Err(self.0.not_found(path)),
        }
    }

    fn unread(&self) -> Option<Error> {
        self.0.tree.unread()
    }

    fn skips(&self) -> Result<Vec<Skip>> {
        self.0.reader.skips()
    }

    fn source(&self, selection: Vec<ItemPath>) -> Result<Box<dyn Source>> {
        Ok(Box::new(Selected::new(self.clone(), selection)?))
    }
}

impl Deep for MachineView {
    type Walk = TreeWalk;

    fn deep(&self, from: Seen) -> TreeWalk {
        TreeWalk::new(Arc::clone(&self.0), from)
    }
}

fn impossible(error: mainstay_core::PathError) -> Error {
    Error::integrity("a path on the disks of the machine is impossible").because(error)
}

/// Items below a path, depth first. A directory is entered once: an image that holds one in two places would not end.
pub(super) struct TreeWalk {
    inner: Arc<Inner>,
    /// What is still to come, next one last: directories not yet entered, or what an opened one holds.
    waiting: Vec<(ItemPath, Option<Leaf>)>,
    entered: HashSet<(u64, mainstay_diskimage::fs::Node)>,
}

impl TreeWalk {
    fn new(inner: Arc<Inner>, first: Seen) -> Self {
        Self { inner, waiting: vec![(first.path, None)], entered: HashSet::new() }
    }

    fn step(&mut self, path: &ItemPath, leaf: Option<Leaf>) -> Result<(Seen, Option<Leaf>)> {
        let leaf = match leaf {
            Some(leaf) => Some(leaf),
            None => match self.inner.find(path)? {
                Some(Place::Leaf(leaf)) => Some(leaf),
                _ => None,
            },
        };
        let found = match &leaf {
            Some(leaf) => seen(path.clone(), leaf.metadata()?),
            None => self.inner.see(path)?.ok_or_else(|| self.inner.not_found(path))?,
        };
        Ok((found, leaf))
    }

    fn enter(&mut self, path: &ItemPath, leaf: Option<&Leaf>) -> Result<()> {
        if leaf.is_some_and(|leaf| !self.entered.insert(leaf.identity())) {
            return Err(Error::integrity("it is also another directory of the image"));
        }
        let children = match leaf {
            Some(leaf) => self.inner.below(leaf, path)?,
            None => self.inner.children(path)?,
        };
        for (name, leaf) in children.into_iter().rev() {
            self.waiting.push((path.join(&name).map_err(impossible)?, leaf));
        }
        Ok(())
    }
}

impl Iterator for TreeWalk {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let (path, leaf) = self.waiting.pop()?;
        let (found, leaf) = match self.step(&path, leaf) {
            Ok(found) => found,
            Err(error) => return Some(Err((path, error))),
        };
        if found.metadata.kind == Kind::Directory
            && let Err(error) = self.enter(&path, leaf.as_ref())
        {
            return Some(Err((path, error)));
        }
        Some(Ok((found, Box::new(Opener(Arc::clone(&self.inner), path, leaf)))))
    }
}

/// Opens a file of the machine.
struct Opener(Arc<Inner>, ItemPath, Option<Leaf>);

impl Open for Opener {
    fn open(&self) -> Result<Box<dyn StreamReader>> {
        match &self.2 {
            Some(leaf) => leaf.open(),
            None => MachineView(Arc::clone(&self.0)).open(&self.1),
        }
    }
}
