//! Looking into a recovery point, whatever lies in it: the items of a point, or the files inside the disks of one.

use std::sync::Arc;

use mainstay_core::{Blocks, Code, Error, ItemPath, Metadata, Result, Skip, Source, Stamp, StreamReader};
use mainstay_repository::{Entry, PointInfo, PointReader};

/// An item that can be looked at, browsed to and restored.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: ItemPath,
    pub metadata: Metadata,
    /// Empty where nothing is known.
    pub stamp: Stamp,
    pub has_body: bool,
    /// What is stored may be a mixture of moments.
    pub changed_while_read: bool,
}

impl From<Entry> for Seen {
    fn from(entry: Entry) -> Self {
        let Entry { path, metadata, stamp, has_body, changed_while_read, .. } = entry;
        Self { path, metadata, stamp, has_body, changed_while_read }
    }
}

/// Items below a path, in order.
pub type SeenWalk<'a> = Box<dyn Iterator<Item = Result<Seen>> + 'a>;

/// A tree of items of one point, read as far as somebody looks.
pub trait PointView: Send + Sync {
    fn info(&self) -> &PointInfo;

    fn lookup(&self, path: &ItemPath) -> Result<Option<Seen>>;

    /// What lies directly in a directory, sorted.
    fn list(&self, directory: &ItemPath) -> Result<Vec<Seen>>;

    /// The item at `within` first, then everything below it. Goes on after [`mainstay_core::Code::Integrity`].
    fn walk(&self, within: &ItemPath) -> Result<SeenWalk<'_>>;

    /// Errors: [`mainstay_core::Code::NotFound`]; [`mainstay_core::Code::Usage`] for what has no content.
    fn open(&self, path: &ItemPath) -> Result<Box<dyn StreamReader>>;

    /// As [`PointView::open`], with random access.
    fn content(&self, path: &ItemPath) -> Result<Arc<dyn Blocks>>;

    /// Why something that is in the point may not be found: a disk that cannot be read.
    fn unread(&self) -> Option<Error> {
        None
    }

    /// What is missing from the point.
    fn skips(&self) -> Result<Vec<Skip>>;

    /// The items of the selection in order, with the directories above them; everything when it is empty.
    ///
    /// Errors: [`mainstay_core::Code::NotFound`] when a selected path is not there.
    fn source(&self, selection: Vec<ItemPath>) -> Result<Box<dyn Source>>;
}

impl PointView for PointReader {
    fn info(&self) -> &PointInfo {
        Self::info(self)
    }

    fn lookup(&self, path: &ItemPath) -> Result<Option<Seen>> {
        Ok(Self::lookup(self, path)?.map(Seen::from))
    }

    fn list(&self, directory: &ItemPath) -> Result<Vec<Seen>> {
        Ok(Self::list(self, directory)?.into_iter().map(Seen::from).collect())
    }

    fn walk(&self, within: &ItemPath) -> Result<SeenWalk<'_>> {
        Ok(Box::new(Self::walk(self, within).map(|entry| entry.map(Seen::from))))
    }

    fn open(&self, path: &ItemPath) -> Result<Box<dyn StreamReader>> {
        let entry = Self::lookup(self, path)?.ok_or_else(|| not_found(self, path))?;
        self.stream(&entry)
    }

    fn content(&self, path: &ItemPath) -> Result<Arc<dyn Blocks>> {
        let entry = Self::lookup(self, path)?.ok_or_else(|| not_found(self, path))?;
        self.blocks(&entry).map(Arc::from)
    }

    fn skips(&self) -> Result<Vec<Skip>> {
        Self::skips(self)
    }

    fn source(&self, selection: Vec<ItemPath>) -> Result<Box<dyn Source>> {
        Ok(Box::new(Self::source(self, selection)?))
    }
}

/// What to say of a path that a point does not have.
pub fn not_found(view: &dyn PointView, path: &ItemPath) -> Error {
    if let Some(why) = view.unread() {
        return why.during(format!("cannot find /{path}"));
    }
    let point = view.info();
    let what = format!("/{path} is not in point {} of {}", point.id, point.workload.name);
    let name = String::from_utf8_lossy(path.name()).into_owned();
    Error::new(Code::NotFound, what).hint(format!("look for it in all points: mainstay find {name:?}"))
}
