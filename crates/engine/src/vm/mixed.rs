//! Mixed mode: the image of a machine, and over it the newer files that its agent backed up. Where the agent looked, its
//! point is the truth, and what it no longer has is gone; everywhere else the image shows, or what lies over it already.

use std::collections::BTreeMap;
use std::sync::Arc;

use mainstay_core::{Blocks, Error, ItemPath, Kind, Open, Result, Skip, Source, StreamReader};
use mainstay_repository::{PointInfo, PointReader};
use mainstay_workloads::files::{CACHE_TAG, LeftOut};

use super::source::{Deep, Selected, Step};
use crate::view::{PointView, Seen, SeenWalk, not_found};

/// The newest state of a machine's files.
#[derive(Clone)]
pub struct MixedView(Arc<Inner>);

struct Inner {
    /// The image, perhaps with other files over it.
    below: Arc<dyn PointView>,
    files: PointReader,
    captured: LeftOut,
    /// What the agent could not read: there the image shows.
    lost: Vec<ItemPath>,
}

impl MixedView {
    /// Puts the point of a machine's files over what there is of the machine. `None` when the point does not tell what it left out, so that
    /// nobody knows which files are gone.
    pub fn new(below: Arc<dyn PointView>, files: PointReader) -> Result<Option<Self>> {
        let Some(captured) = LeftOut::parse(&files.info().position.0) else { return Ok(None) };
        let skips = files.skips()?;
        let lost = skips.into_iter().filter(|skip| skip.reason.is_loss()).map(|skip| skip.path).collect();
        Ok(Some(Self(Arc::new(Inner { below, files, captured, lost }))))
    }
}

/// Which of the two shows at a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layer {
    Files,
    Below,
}

impl Inner {
    /// Whether the agent looked at this path and, if it is not in its point, found nothing there.
    fn is_captured(&self, path: &ItemPath) -> Result<bool> {
        let mut roots = self.captured.roots.iter();
        Ok(roots.any(|root| path.is_within(&root.real))
            && !self.captured.keeps(path)
            && !self.lost.iter().any(|lost| path.is_within(lost))
            && !self.is_in_cache(path)?)
    }

    /// Whether a directory above the path was left out as a cache, of which only its tag was captured.
    fn is_in_cache(&self, path: &ItemPath) -> Result<bool> {
        if !self.captured.leaves_caches() {
            return Ok(false);
        }
        for above in std::iter::successors(path.parent(), ItemPath::parent) {
            let tag = above.join(CACHE_TAG).unwrap_or_default();
            if tag != *path && self.files.lookup(&tag)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn find(&self, path: &ItemPath) -> Result<Option<(Layer, Seen)>> {
        let inside = self.captured.roots.iter().any(|root| path.is_within(&root.real));
        if inside && let Some(entry) = self.files.lookup(path)? {
            return Ok(Some((Layer::Files, Seen::from(entry))));
        }
        if self.is_captured(path)? {
            return Ok(None);
        }
        Ok(self.below.lookup(path)?.map(|seen| (Layer::Below, seen)))
    }
}

impl PointView for MixedView {
    fn info(&self) -> &PointInfo {
        self.0.below.info()
    }

    fn lookup(&self, path: &ItemPath) -> Result<Option<Seen>> {
        Ok(self.0.find(path)?.map(|(_, seen)| seen))
    }

    fn list(&self, directory: &ItemPath) -> Result<Vec<Seen>> {
        let (_, seen) = self.0.find(directory)?.ok_or_else(|| not_found(self, directory))?;
        let mut found = BTreeMap::new();
        if seen.metadata.kind != Kind::Directory {
            return Ok(Vec::new());
        }
        let is_directory =
            |seen: Option<Seen>| seen.is_some_and(|seen| seen.metadata.kind == Kind::Directory);
        if is_directory(self.0.below.lookup(directory)?) {
            for seen in self.0.below.list(directory)? {
                if !self.0.is_captured(&seen.path)? {
                    found.insert(seen.path.clone(), seen);
                }
            }
        }
        let on_the_way = self.0.captured.roots.iter().any(|root| root.real.is_within(directory));
        if on_the_way || is_directory(self.0.files.lookup(directory)?.map(Seen::from)) {
            for entry in self.0.files.list(directory)? {
                if self.0.captured.roots.iter().any(|root| entry.path.is_within(&root.real)) {
                    found.insert(entry.path.clone(), Seen::from(entry));
                }
            }
        }
        Ok(found.into_values().collect())
    }

    fn walk(&self, within: &ItemPath) -> Result<SeenWalk<'_>> {
        let found = self.lookup(within)?.ok_or_else(|| not_found(self, within))?;
        Ok(Box::new(self.deep(found).map(|step| step.map(|(seen, _)| seen).map_err(|(_, error)| error))))
    }

    fn open(&self, path: &ItemPath) -> Result<Box<dyn StreamReader>> {
        match self.0.find(path)? {
            Some((Layer::Files, _)) => PointView::open(&self.0.files, path),
            Some((Layer::Below, _)) => self.0.below.open(path),
            None => Err(not_found(self, path)),
        }
    }

    fn content(&self, path: &ItemPath) -> Result<Arc<dyn Blocks>> {
        match self.0.find(path)? {
            Some((Layer::Files, _)) => PointView::content(&self.0.files, path),
            Some((Layer::Below, _)) => self.0.below.content(path),
            None => Err(not_found(self, path)),
        }
    }

    fn unread(&self) -> Option<Error> {
        self.0.below.unread()
    }

    fn skips(&self) -> Result<Vec<Skip>> {
        let mut skips = self.0.below.skips()?;
        skips.extend(self.0.files.skips()?);
        Ok(skips)
    }

    fn source(&self, selection: Vec<ItemPath>) -> Result<Box<dyn Source>> {
        Ok(Box::new(Selected::new(self.clone(), selection)?))
    }
}

impl Deep for MixedView {
    type Walk = MixedWalk;

    fn deep(&self, from: Seen) -> MixedWalk {
        MixedWalk { view: self.clone(), waiting: vec![from] }
    }
}

/// Items below a path, depth first.
pub(super) struct MixedWalk {
    view: MixedView,
    /// Next one last.
    waiting: Vec<Seen>,
}

struct Opener(MixedView, ItemPath);

impl Open for Opener {
    fn open(&self) -> Result<Box<dyn StreamReader>> {
        self.0.open(&self.1)
    }
}

impl Iterator for MixedWalk {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let seen = self.waiting.pop()?;
        let path = seen.path.clone();
        if seen.metadata.kind == Kind::Directory {
            match self.view.list(&path) {
                // What is ours at the top is not part of the machine.
                Ok(below) => self
                    .waiting
                    .extend(below.into_iter().rev().filter(|seen| !super::view::is_ours(&seen.path))),
                Err(error) => return Some(Err((path, error))),
            }
        }
        Some(Ok((seen, Box::new(Opener(self.view.clone(), path)))))
    }
}
