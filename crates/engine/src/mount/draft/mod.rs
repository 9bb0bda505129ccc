//! A tree of files that can be written to, and of which nothing that is written is kept: what lies below is read when
//! somebody looks, what is written goes into a file without a name.

mod content;
mod serve;
mod tree;

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mainstay_core::{Error, ItemPath, Result};

pub use content::Below;

use content::{Content, Scratch};
use tree::{ROOT, Tree, What};

/// Told of what could not be read or kept.
pub type DraftTrouble = Box<dyn Fn(&Error) + Send + Sync>;

/// What lies in the tree at first, put together.
pub struct Draft {
    tree: Tree,
    scratch: Arc<Scratch>,
    read: Arc<AtomicU64>,
    /// User and group of everything in it.
    owner: (u32, u32),
}

/// What a draft has cost so far.
#[derive(Clone)]
pub struct DraftCost {
    scratch: Arc<Scratch>,
    read: Arc<AtomicU64>,
}

impl DraftCost {
    /// Bytes of content that were read from below.
    pub fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Bytes that were written and are still needed.
    pub fn written(&self) -> u64 {
        self.scratch.bytes()
    }
}

impl Draft {
    /// An empty one. `scratch` is a directory in which what is written takes up room.
    pub fn new(scratch: &Path, owner: (u32, u32)) -> Result<Self> {
        Ok(Self { tree: Tree::new(), scratch: Arc::new(Scratch::new(scratch)?), read: Arc::default(), owner })
    }

    pub fn cost(&self) -> DraftCost {
        DraftCost { scratch: Arc::clone(&self.scratch), read: Arc::clone(&self.read) }
    }

    pub fn directory(&mut self, path: &ItemPath, mode: u32) -> Result<()> {
        self.add(path, What::Directory(BTreeMap::new()), mode)
    }

    pub fn symlink(&mut self, path: &ItemPath, target: Vec<u8>) -> Result<()> {
        self.add(path, What::Symlink(target), 0o777)
    }

    pub fn file(&mut self, path: &ItemPath, mode: u32, size: u64, below: Below) -> Result<()> {
        let content = Content::new(size, Some(below), &self.read, &self.scratch);
        self.add(path, What::File(Arc::new(content)), mode)
    }

    /// Adds below a directory that is there; one that is there already stays.
    fn add(&mut self, path: &ItemPath, what: What, mode: u32) -> Result<()> {
        let wrong = |why: &str| Error::integrity(format!("{path} cannot be shown: {why}"));
        let mut at = ROOT;
        let mut components = path.components().peekable();
        while let Some(component) = components.next() {
            let name = OsStr::from_bytes(component);
            at = match (self.tree.find(at, name), components.peek()) {
                (Ok(found), Some(_)) => found,
                (Ok(found), None) if matches!(what, What::Directory(_)) => found,
                (Ok(_), None) => return Err(wrong("it is there twice")),
                (Err(_), None) => {
                    let added = self.tree.add(at, name, what, (mode & 0o7777) as u16);
                    return added.map(drop).map_err(|_errno| wrong("its directory is none"));
                }
                (Err(_), Some(_)) => return Err(wrong("it has no directory")),
            };
        }
        Ok(())
    }
}

/// Answers the kernel.
pub(super) struct Server {
    tree: Mutex<Tree>,
    scratch: Arc<Scratch>,
    read: Arc<AtomicU64>,
    owner: (u32, u32),
    trouble: DraftTrouble,
    /// A directory is listed once for each time that it is opened.
    listed: Mutex<HashMap<u64, Arc<[Listed]>>>,
    handles: AtomicU64,
}

/// A name in a directory, its number and what it is.
type Listed = (Vec<u8>, u64, fuser::FileType);

impl Server {
    pub(super) fn new(draft: Draft, trouble: DraftTrouble) -> Self {
        Self {
            tree: Mutex::new(draft.tree),
            scratch: draft.scratch,
            read: draft.read,
            owner: draft.owner,
            trouble,
            listed: Mutex::default(),
            handles: AtomicU64::new(1),
        }
    }
}
