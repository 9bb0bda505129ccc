//! Looks into one point: finds, lists and walks its items, loading only the pages it needs.

use std::sync::Arc;

use mainstay_core::{
    Blocks, Body, Code, Error, Item, ItemPath, Kind, Metadata, Open as _, Result, Skip, Stamp, StreamReader,
};

use super::blocks::StoredBlocks;
use super::recipe;
use super::source::PointSource;
use super::stream::StoredContent;
use crate::fetch::{Fetch, MetaPages};
use crate::format::item::{Recipe, StoredItem, decode_skip, key_after, path_key, path_of_key};
use crate::format::page::{Cursor, PageKind, PageRef};
use crate::points::PointInfo;

/// Reads one recovery point. Cheap to clone; usable from several threads.
#[derive(Clone)]
pub struct PointReader {
    pub(crate) fetch: Arc<Fetch>,
    info: Arc<PointInfo>,
    pub(crate) items: Option<PageRef>,
    skips: Option<PageRef>,
}

/// An item of a point.
#[derive(Clone, Debug)]
pub struct Entry {
    pub path: ItemPath,
    pub metadata: Metadata,
    pub stamp: Stamp,
    pub has_body: bool,
    pub changed_while_read: bool,
    /// Whether the content is a device's, with random access.
    pub blocks: bool,
    pub(crate) recipe: Recipe,
}

impl Entry {
    pub(crate) fn from_stored(path: ItemPath, stored: StoredItem) -> Self {
        let StoredItem { metadata, stamp, changed_while_read, blocks, recipe } = stored;
        let has_body = recipe != Recipe::None;
        Self { path, metadata, stamp, has_body, changed_while_read, blocks, recipe }
    }

    /// Bytes of content that a restore writes.
    pub fn content_bytes(&self) -> u64 {
        self.recipe.bytes()
    }

    pub(crate) fn into_item(self, fetch: &Arc<Fetch>) -> Item {
        let body = match self.recipe {
            Recipe::None => Body::None,
            recipe if self.blocks => Body::Blocks(Box::new(StoredBlocks::new(Arc::clone(fetch), recipe))),
            recipe => Body::Stream(Box::new(StoredContent { fetch: Arc::clone(fetch), recipe })),
        };
        Item { path: self.path, metadata: self.metadata, stamp: self.stamp, body }
    }
}

/// Items in order of their paths.
pub struct Walk {
    cursor: Option<Cursor<MetaPages>>,
    /// The key at which it ends; none for a walk to the end.
    end: Option<Vec<u8>>,
}

impl Walk {
    fn step(&mut self) -> Result<Option<Entry>> {
        let Some(cursor) = &mut self.cursor else { return Ok(None) };
        let Some((page, index)) = cursor.next()? else { return Ok(None) };
        let key = page.key(index);
        if self.end.as_deref().is_some_and(|end| key >= end) {
            return Ok(None);
        }
        let stored = StoredItem::decode(page.value(index), &page.groups)?;
        Ok(Some(Entry::from_stored(path_of_key(key)?, stored)))
    }

    /// Passes over everything below `path`.
    pub fn skip_below(&mut self, path: &ItemPath) -> Result<()> {
        match &mut self.cursor {
            Some(cursor) if !path.is_root() => cursor.skip_to(&key_after(path)),
            _ => Ok(()),
        }
    }
}

impl Iterator for Walk {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step();
        if !matches!(step, Ok(Some(_))) {
            self.cursor = None;
        }
        step.transpose()
    }
}

impl PointReader {
    pub(crate) fn new(
        fetch: Arc<Fetch>,
        info: PointInfo,
        items: Option<PageRef>,
        skips: Option<PageRef>,
    ) -> Self {
        Self { fetch, info: Arc::new(info), items, skips }
    }

    pub fn info(&self) -> &PointInfo {
        &self.info
    }

    fn cursor(&self, from: &[u8]) -> Result<Option<Cursor<MetaPages>>> {
        let seek = |root: &PageRef| Cursor::seek(MetaPages::new(&self.fetch), PageKind::Items, root, from);
        self.items.as_ref().map(seek).transpose()
    }

    /// The item at exactly this path.
    pub fn lookup(&self, path: &ItemPath) -> Result<Option<Entry>> {
        let key = path_key(path);
        let Some(mut cursor) = self.cursor(&key)? else { return Ok(None) };
        match cursor.next()? {
            Some((page, index)) if page.key(index) == key => {
                let stored = StoredItem::decode(page.value(index), &page.groups)?;
                Ok(Some(Entry::from_stored(path.clone(), stored)))
            }
            _ => Ok(None),
        }
    }

    /// What lies directly in a directory, sorted. Whatever lies deeper is not loaded.
    pub fn list(&self, directory: &ItemPath) -> Result<Vec<Entry>> {
        let mut found = Vec::new();
        let mut walk = self.walk(directory)?;
        while let Some(entry) = walk.step()? {
            if entry.path == *directory {
                continue;
            }
            if entry.path.parent().as_ref() != Some(directory) {
                return Err(Error::integrity(format!("{} has no directory in this point", entry.path)));
            }
            if entry.metadata.kind == Kind::Directory {
                walk.skip_below(&entry.path)?;
            }
            found.push(entry);
        }
        Ok(found)
    }

    /// The item at `within` first, then everything below it.
    pub fn walk(&self, within: &ItemPath) -> Result<Walk> {
        let end = (!within.is_root()).then(|| key_after(within));
        Ok(Walk { cursor: self.cursor(&path_key(within))?, end })
    }

    /// What was skipped or noticed when the point was made, in the order it happened.
    pub fn skips(&self) -> Result<Vec<Skip>> {
        let Some(root) = &self.skips else { return Ok(Vec::new()) };
        let mut cursor = Cursor::seek(MetaPages::new(&self.fetch), PageKind::Skips, root, &[])?;
        let mut skips = Vec::new();
        while let Some((page, index)) = cursor.next()? {
            skips.push(decode_skip(page.value(index))?);
        }
        Ok(skips)
    }

    /// The content of an item of this point.
    pub fn stream(&self, entry: &Entry) -> Result<Box<dyn StreamReader>> {
        if !entry.has_body {
            return Err(Error::new(Code::Usage, format!("{} has no content", entry.path)));
        }
        StoredContent { fetch: Arc::clone(&self.fetch), recipe: entry.recipe.clone() }.open()
    }

    /// The content of an item of this point, with random access. Reads are checked, cached a little, and may come from
    /// several threads.
    pub fn blocks(&self, entry: &Entry) -> Result<Box<dyn Blocks>> {
        if !entry.has_body {
            return Err(Error::new(Code::Usage, format!("{} has no content", entry.path)));
        }
        Ok(Box::new(StoredBlocks::new(Arc::clone(&self.fetch), entry.recipe.clone())))
    }

    /// The items of the selection in order, with the directories above them; everything when it is empty.
    ///
    /// Errors: [`Code::NotFound`] when a selected path is not in the point.
    pub fn source(&self, selection: Vec<ItemPath>) -> Result<PointSource> {
        PointSource::new(self.clone(), selection)
    }

    /// Whether two items have the same content, be they of one point or of two.
    pub fn same_content(&self, entry: &Entry, other: &Entry) -> Result<bool> {
        recipe::same(&MetaPages::new(&self.fetch), None, &entry.recipe, &other.recipe)
    }
}
