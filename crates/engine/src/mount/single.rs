//! One point, or one file, as a tree.

use std::sync::Arc;

use mainstay_core::{Blocks, Code, Error, ItemPath, Kind, Metadata, Result};

use super::{Shown, Tree};
use crate::view::{PointView, Seen};

/// The items of one point.
pub struct Point(pub Arc<dyn PointView>);

impl Tree for Point {
    fn look(&self, path: &ItemPath) -> Result<Option<Shown>> {
        match self.0.lookup(path)? {
            Some(seen) => Ok(Some(Shown::from(seen))),
            None if path.is_root() => Ok(Some(top())),
            None => Ok(None),
        }
    }

    fn list(&self, directory: &ItemPath) -> Result<Vec<Shown>> {
        Ok(self.0.list(directory)?.into_iter().map(Shown::from).collect())
    }

    fn content(&self, path: &ItemPath) -> Result<Arc<dyn Blocks>> {
        self.0.content(path)
    }
}

impl From<Seen> for Shown {
    fn from(seen: Seen) -> Self {
        Self { path: seen.path, metadata: seen.metadata, world: 0, lasting: true }
    }
}

/// The directory that is mounted, where the point has no item for it.
fn top() -> Shown {
    let metadata = Metadata { mode: 0o755, ..Metadata::new(Kind::Directory) };
    Shown { path: ItemPath::root(), metadata, world: 0, lasting: true }
}

/// A directory with one file in it.
pub struct OneFile {
    path: ItemPath,
    content: Arc<dyn Blocks>,
}

impl OneFile {
    /// Errors: [`Code::Usage`] when no file can have that name.
    pub fn new(name: &str, content: Arc<dyn Blocks>) -> Result<Self> {
        let path = ItemPath::root().join(name.as_bytes());
        let impossible = |error| Error::new(Code::Usage, "a file cannot be called so").because(error);
        Ok(Self { path: path.map_err(impossible)?, content })
    }

    fn file(&self) -> Shown {
        let metadata = Metadata { mode: 0o400, size: self.content.size(), ..Metadata::new(Kind::File) };
        Shown { path: self.path.clone(), metadata, world: 0, lasting: true }
    }
}

impl Tree for OneFile {
    fn look(&self, path: &ItemPath) -> Result<Option<Shown>> {
        Ok(if path.is_root() { Some(top()) } else { (*path == self.path).then(|| self.file()) })
    }

    fn list(&self, _directory: &ItemPath) -> Result<Vec<Shown>> {
        Ok(vec![self.file()])
    }

    fn content(&self, _path: &ItemPath) -> Result<Arc<dyn Blocks>> {
        Ok(Arc::clone(&self.content))
    }
}
