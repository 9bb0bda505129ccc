//! A selection of what a view shows, as a source.

use std::collections::HashSet;

use mainstay_core::{
    Body, Captured, Code, Error, Item, ItemPath, Next, Open, Receipt, Result, Skip, SkipReason, Source,
};

use crate::view::{PointView, Seen, not_found};

/// An item with what opens its content, or what failed at a path.
pub(super) type Step = std::result::Result<(Seen, Box<dyn Open>), (ItemPath, Error)>;

/// A view that can be walked without being borrowed.
pub(super) trait Deep: PointView + 'static {
    type Walk: Iterator<Item = Step> + Send;

    /// `from` first, then everything below it, in order. Goes on after an error.
    fn deep(&self, from: Seen) -> Self::Walk;
}

/// Yields the selected items, each after the directories above it.
pub(super) struct Selected<V: Deep> {
    view: V,
    /// Selected paths still to be walked, last first; none lies within another.
    waiting: Vec<ItemPath>,
    /// To be yielded before the walk goes on, outermost last.
    ancestors: Vec<ItemPath>,
    yielded: HashSet<ItemPath>,
    walk: Option<V::Walk>,
}

impl<V: Deep> Selected<V> {
    /// Errors: [`Code::NotFound`] when a selected path is not there.
    pub(super) fn new(view: V, mut selection: Vec<ItemPath>) -> Result<Self> {
        selection.sort();
        if selection.is_empty() {
            selection.push(ItemPath::root());
        }
        let mut waiting: Vec<ItemPath> = Vec::new();
        for path in selection {
            if waiting.last().is_some_and(|last| path.is_within(last)) {
                continue;
            }
            if view.lookup(&path)?.is_none() {
                return Err(not_found(&view, &path));
            }
            waiting.push(path);
        }
        waiting.reverse();
        Ok(Self { view, waiting, ancestors: Vec::new(), yielded: HashSet::new(), walk: None })
    }

    fn begin(&mut self) -> Result<bool> {
        let Some(path) = self.waiting.pop() else { return Ok(false) };
        let above = std::iter::successors(path.parent(), ItemPath::parent);
        self.ancestors = above.filter(|path| !self.yielded.contains(path)).collect();
        let found = self.view.lookup(&path)?.ok_or_else(|| not_found(&self.view, &path))?;
        self.walk = Some(self.view.deep(found));
        Ok(true)
    }
}

impl<V: Deep> Source for Selected<V> {
    fn next(&mut self) -> Result<Next> {
        loop {
            if let Some(path) = self.ancestors.pop() {
                self.yielded.insert(path.clone());
                let found = self.view.lookup(&path)?.ok_or_else(|| not_found(&self.view, &path))?;
                return Ok(item(found, Body::None));
            }
            match self.walk.as_mut().and_then(Iterator::next) {
                Some(Ok((found, open))) => {
                    let body = if found.has_body { Body::Stream(open) } else { Body::None };
                    return Ok(item(found, body));
                }
                Some(Err((path, error))) if is_of_the_image(&error) => {
                    let detail = error.chain().join(": ");
                    return Ok(Next::Skipped(Skip { path, reason: SkipReason::Unreadable, detail }));
                }
                Some(Err((_, error))) => return Err(error),
                None if self.begin()? => {}
                None => return Ok(Next::End),
            }
        }
    }

    fn seal(&mut self) -> Result<Captured> {
        let info = self.view.info();
        Ok(Captured { position: info.position.clone(), consistency: info.consistency, moment: info.moment })
    }

    fn commit(self: Box<Self>, _receipt: &Receipt) -> Result<()> {
        Ok(())
    }
}

fn item(found: Seen, body: Body) -> Next {
    let Seen { path, metadata, stamp, .. } = found;
    Next::Item(Box::new(Item { path, metadata, stamp, body }))
}

/// Whether the rest can be read all the same.
fn is_of_the_image(error: &Error) -> bool {
    matches!(error.code(), Code::Integrity | Code::Unsupported | Code::NotFound)
}
