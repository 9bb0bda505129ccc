//! A recovery point as a source.

use mainstay_core::{Captured, Code, Error, ItemPath, Next, Receipt, Result, Source};

use super::point::{Entry, PointReader, Walk, skip_damaged};

/// Yields the items of a point, or of a selection of it. A damaged part of its tree is one skip, with the directory that
/// holds all of that part as its path.
pub struct PointSource {
    reader: PointReader,
    /// Selected paths still to be walked, last first; none lies within another.
    waiting: Vec<ItemPath>,
    /// The selected path under way, and its ancestors still to be yielded, outermost last.
    ancestors: Vec<ItemPath>,
    walk: Option<Walk>,
    /// The ancestors yielded so far, outermost first.
    yielded: Vec<ItemPath>,
    ended: bool,
}

impl PointSource {
    pub(crate) fn new(reader: PointReader, mut selection: Vec<ItemPath>) -> Result<Self> {
        selection.sort();
        if selection.is_empty() {
            selection.push(ItemPath::root());
        }
        let mut kept: Vec<ItemPath> = Vec::new();
        for path in selection {
            if kept.last().is_some_and(|last| path.is_within(last)) {
                continue;
            }
            if !path.is_root() && is_missing(&reader, &path)? {
                let what = format!("{path} is not in point {}", reader.info().id);
                return Err(Error::new(Code::NotFound, what).hint("list what is there with `mainstay ls`"));
            }
            kept.push(path);
        }
        kept.reverse();
        Ok(Self {
            reader,
            waiting: kept,
            ancestors: Vec::new(),
            walk: None,
            yielded: Vec::new(),
            ended: false,
        })
    }

    fn start_next(&mut self) -> bool {
        let Some(path) = self.waiting.pop() else { return false };
        let mut above = path.parent();
        while let Some(ancestor) = above {
            above = ancestor.parent();
            if !self.yielded.contains(&ancestor) {
                self.ancestors.push(ancestor);
            }
        }
        self.yielded.retain(|ancestor| path.is_within(ancestor));
        self.walk = Some(self.reader.walk(&path));
        true
    }
}

/// Whether there is no such item. What may be in a damaged part of the tree is not missing.
fn is_missing(reader: &PointReader, path: &ItemPath) -> Result<bool> {
    match reader.lookup(path) {
        Err(error) if error.code() == Code::Integrity => Ok(false),
        found => Ok(found?.is_none()),
    }
}

impl PointSource {
    fn item(&self, entry: Entry) -> Next {
        Next::Item(Box::new(entry.into_item(&self.reader.fetch)))
    }
}

impl Source for PointSource {
    fn next(&mut self) -> Result<Next> {
        loop {
            if self.ended {
                return Ok(Next::End);
            }
            if let Some(ancestor) = self.ancestors.pop() {
                self.yielded.push(ancestor.clone());
                match self.reader.lookup(&ancestor) {
                    Ok(Some(entry)) => return Ok(self.item(entry)),
                    Ok(None) => continue,
                    Err(error) => return skip_damaged(&ancestor, error).map(Next::Skipped),
                }
            }
            let Some(walk) = &mut self.walk else {
                self.ended = !self.start_next();
                continue;
            };
            match walk.next() {
                Some(Ok(entry)) => return Ok(self.item(entry)),
                Some(Err(error)) => return walk.loss(error).map(Next::Skipped),
                None => self.walk = None,
            }
        }
    }

    fn seal(&mut self) -> Result<Captured> {
        let info = self.reader.info();
        Ok(Captured { position: info.position.clone(), consistency: info.consistency, moment: info.moment })
    }

    fn commit(self: Box<Self>, _receipt: &Receipt) -> Result<()> {
        Ok(())
    }
}
