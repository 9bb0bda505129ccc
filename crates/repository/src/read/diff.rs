//! What differs between two points. Pages that both share are never loaded.

use std::collections::HashSet;
use std::sync::Arc;

use mainstay_core::{ItemPath, Result};

use super::point::{Entry, PointReader};
use super::same::same;
use crate::fetch::{Fetch, MetaPages};
use crate::format::item::{StoredItem, key_after, path_key, path_of_key};
use crate::format::page::{Page, PageKind, PageRef, PageSource as _, for_each_page};

#[derive(Clone, Debug)]
pub struct Change {
    pub path: ItemPath,
    pub kind: ChangeKind,
    /// Absent when it was added.
    pub old: Option<Entry>,
    /// Absent when it was removed.
    pub new: Option<Entry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    Added,
    Removed,
    /// Its content or its kind.
    Content,
    /// Only what is known of it.
    Metadata,
}

/// The changes in order of their paths.
pub struct Diff {
    fetch: Arc<Fetch>,
    old: Side,
    new: Side,
}

/// The entries of the leaves that only one point has.
struct Side {
    pages: MetaPages,
    /// Last first.
    leaves: Vec<PageRef>,
    page: Option<(Page, usize)>,
    from: Vec<u8>,
    end: Option<Vec<u8>>,
    waiting: Option<(Vec<u8>, Entry)>,
}

/// Compares everything at and below `within`.
pub fn diff(old: &PointReader, new: &PointReader, within: &ItemPath) -> Result<Diff> {
    let (old_leaves, new_leaves) = (leaves(old)?, leaves(new)?);
    let old_ids: HashSet<_> = old_leaves.iter().map(|leaf| leaf.id).collect();
    let shared: HashSet<_> =
        new_leaves.iter().map(|leaf| leaf.id).filter(|id| old_ids.contains(id)).collect();
    let side = |reader: &PointReader, leaves: Vec<PageRef>| Side {
        pages: MetaPages::new(&reader.fetch),
        leaves: leaves.into_iter().rev().filter(|leaf| !shared.contains(&leaf.id)).collect(),
        page: None,
        from: path_key(within),
        end: (!within.is_root()).then(|| key_after(within)),
        waiting: None,
    };
    Ok(Diff { fetch: Arc::clone(&new.fetch), old: side(old, old_leaves), new: side(new, new_leaves) })
}

fn leaves(reader: &PointReader) -> Result<Vec<PageRef>> {
    let Some(root) = &reader.items else { return Ok(Vec::new()) };
    let mut leaves = Vec::new();
    let pages = MetaPages::new(&reader.fetch);
    for_each_page(&pages, PageKind::Items, root, &mut |page_ref, page| {
        match page.level {
            0 => leaves.push(*page_ref),
            1 => {
                for index in 0..page.len() {
                    leaves.push(page.child(index)?);
                }
            }
            _ => {}
        }
        // The children of a page of level 1 are the leaves; they need not be loaded.
        Ok(page.level > 1)
    })?;
    Ok(leaves)
}

impl Side {
    /// The entry it stands at.
    fn peek(&mut self) -> Result<Option<&(Vec<u8>, Entry)>> {
        while self.waiting.is_none() {
            match &mut self.page {
                Some((page, at)) if *at < page.len() => {
                    let (key, index) = (page.key(*at), *at);
                    *at += 1;
                    if key < self.from.as_slice() {
                        continue;
                    }
                    if self.end.as_deref().is_some_and(|end| key >= end) {
                        self.leaves.clear();
                        self.page = None;
                        return Ok(None);
                    }
                    let key = key.to_vec();
                    let stored = StoredItem::decode(page.value(index), &page.groups)?;
                    let entry = Entry::from_stored(path_of_key(&key)?, stored);
                    self.waiting = Some((key, entry));
                }
                _ => match self.leaves.pop() {
                    Some(leaf) => {
                        self.page = Some((Page::parse(PageKind::Items, self.pages.load(&leaf)?)?, 0));
                    }
                    None => return Ok(None),
                },
            }
        }
        Ok(self.waiting.as_ref())
    }

    fn take(&mut self) -> Option<Entry> {
        self.waiting.take().map(|(_, entry)| entry)
    }
}

impl Diff {
    fn step(&mut self) -> Result<Option<Change>> {
        loop {
            let old = self.old.peek()?.map(|(key, _)| key.clone());
            let new = self.new.peek()?.map(|(key, _)| key);
            let (takes_old, takes_new) = match (&old, new) {
                (None, None) => return Ok(None),
                (Some(old), Some(new)) => (old <= new, old >= new),
                (old, new) => (old.is_some(), new.is_some()),
            };
            let old = if takes_old { self.old.take() } else { None };
            let new = if takes_new { self.new.take() } else { None };
            if let Some(change) = self.compare(old, new)? {
                return Ok(Some(change));
            }
        }
    }

    fn compare(&self, old: Option<Entry>, new: Option<Entry>) -> Result<Option<Change>> {
        let kind = match (&old, &new) {
            (None, None) => return Ok(None),
            (None, Some(_)) => ChangeKind::Added,
            (Some(_), None) => ChangeKind::Removed,
            (Some(old), Some(new)) => {
                let same_kind = old.metadata.kind == new.metadata.kind;
                let same_target = old.metadata.link_target == new.metadata.link_target;
                if !same_kind
                    || !same_target
                    || !same(&MetaPages::new(&self.fetch), &old.recipe, &new.recipe)?
                {
                    ChangeKind::Content
                } else if old.metadata != new.metadata {
                    ChangeKind::Metadata
                } else {
                    return Ok(None);
                }
            }
        };
        let path = new.as_ref().or(old.as_ref()).map(|entry| entry.path.clone()).unwrap_or_default();
        Ok(Some(Change { path, kind, old, new }))
    }
}

impl Iterator for Diff {
    type Item = Result<Change>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}
