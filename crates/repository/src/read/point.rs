//! Looks into one point: finds, lists and walks its items, loading only the pages it needs.

use std::sync::Arc;

use mainstay_core::{
    Blocks, Body, Code, Error, Item, ItemPath, Kind, Metadata, Open as _, Result, Skip, SkipReason, Stamp,
    StreamReader,
};

use super::blocks::StoredBlocks;
use super::same::same;
use super::source::PointSource;
use super::stream::StoredContent;
use crate::fetch::{Fetch, MetaPages};
use crate::format::item::{Recipe, StoredItem, decode_skip, key_after, path_key, path_of_key};
use crate::format::page::{Cursor, PageKind, PageRef, Span};
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

/// Items in order of their paths. After [`Code::Integrity`] it goes on with what comes behind the damage; any other
/// error ends it.
pub struct Walk {
    cursor: Option<Cursor<MetaPages>>,
    /// The item it began with.
    within: ItemPath,
    /// The key at which it ends; none for a walk to the end.
    end: Option<Vec<u8>>,
    lost: ItemPath,
}

impl Walk {
    fn step(&mut self) -> Result<Option<Entry>> {
        let Some(cursor) = &mut self.cursor else { return Ok(None) };
        let is_beyond = |key: &[u8]| self.end.as_deref().is_some_and(|end| key >= end);
        let (page, index) = match cursor.next() {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(None),
            Err(error) => {
                let lost = cursor.lost().unwrap_or_default();
                if lost.after.as_deref().is_some_and(is_beyond) {
                    return Ok(None);
                }
                let Lost { directory, words } = Lost::of(&lost);
                self.lost = if directory.is_within(&self.within) { directory } else { self.within.clone() };
                return Err(error.during(words));
            }
        };
        if is_beyond(page.key(index)) {
            return Ok(None);
        }
        let path = path_of_key(page.key(index)).inspect_err(|_| self.lost.clone_from(&self.within))?;
        match StoredItem::decode(page.value(index), &page.groups) {
            Ok(stored) => Ok(Some(Entry::from_stored(path, stored))),
            Err(error) => {
                let words = format!("cannot read what is known of {path}");
                self.lost = path;
                Err(error.during(words))
            }
        }
    }

    /// What the last error cost, if it was [`Code::Integrity`]; the error itself if not. The path is that of the item, or
    /// of the deepest directory that all of the lost items are in.
    pub(crate) fn loss(&self, error: Error) -> Result<Skip> {
        skip_damaged(&self.lost, error)
    }

    /// Passes over everything below `path`.
    pub fn skip_below(&mut self, path: &ItemPath) {
        if let Some(cursor) = self.cursor.as_mut().filter(|_| !path.is_root()) {
            cursor.skip_to(&key_after(path));
        }
    }
}

impl Iterator for Walk {
    type Item = Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step();
        let goes_on = match &step {
            Ok(found) => found.is_some(),
            Err(error) => error.code() == Code::Integrity,
        };
        if !goes_on {
            self.cursor = None;
        }
        step.transpose()
    }
}

/// The skip that damage comes to.
pub(crate) fn skip_damaged(path: &ItemPath, error: Error) -> Result<Skip> {
    match error.code() {
        Code::Integrity => {
            let detail = error.chain().join(": ");
            Ok(Skip { path: path.clone(), reason: SkipReason::Damaged, detail })
        }
        _ => Err(error),
    }
}

/// A part of a tree that cannot be read, for people.
pub(crate) struct Lost {
    /// The deepest directory that holds all of it.
    pub(crate) directory: ItemPath,
    pub(crate) words: String,
}

impl Lost {
    pub(crate) fn of(span: &Span) -> Self {
        let path = |key: &Option<Vec<u8>>| key.as_deref().and_then(|key| path_of_key(key).ok());
        let (after, last) = (path(&span.after), path(&span.last));
        let words = match (&after, &last) {
            (None, None) => "the tree cannot be read".to_owned(),
            (None, Some(last)) => format!("the part of the tree up to {last} cannot be read"),
            (Some(after), None) => format!("the part of the tree after {after} cannot be read"),
            (Some(after), Some(last)) => {
                format!("the part of the tree after {after} up to {last} cannot be read")
            }
        };
        let directory = after.zip(last).and_then(|(after, last)| {
            std::iter::successors(Some(last), ItemPath::parent).find(|directory| after.is_within(directory))
        });
        Self { directory: directory.unwrap_or_default(), words }
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

    fn cursor(&self, from: &[u8]) -> Option<Cursor<MetaPages>> {
        let pages = MetaPages::new(&self.fetch);
        self.items.as_ref().map(|root| Cursor::starting(pages, PageKind::Items, root, from))
    }

    /// The item at exactly this path.
    ///
    /// Errors: [`Code::Integrity`] when nobody can tell, because that part of the tree is damaged.
    pub fn lookup(&self, path: &ItemPath) -> Result<Option<Entry>> {
        let key = path_key(path);
        let Some(mut cursor) = self.cursor(&key) else { return Ok(None) };
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
        let mut walk = self.walk(directory);
        while let Some(entry) = walk.next().transpose()? {
            if entry.path == *directory {
                continue;
            }
            if entry.path.parent().as_ref() != Some(directory) {
                return Err(Error::integrity(format!("{} has no directory in this point", entry.path)));
            }
            if entry.metadata.kind == Kind::Directory {
                walk.skip_below(&entry.path);
            }
            found.push(entry);
        }
        Ok(found)
    }

    /// The item at `within` first, then everything below it.
    pub fn walk(&self, within: &ItemPath) -> Walk {
        let end = (!within.is_root()).then(|| key_after(within));
        let cursor = self.cursor(&path_key(within));
        Walk { cursor, within: within.clone(), end, lost: ItemPath::root() }
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
        Ok(Box::new(self.stored_blocks(entry)?))
    }

    /// Like [`PointReader::blocks`], for who wants to have something read ahead.
    pub fn stored_blocks(&self, entry: &Entry) -> Result<StoredBlocks> {
        if !entry.has_body {
            return Err(Error::new(Code::Usage, format!("{} has no content", entry.path)));
        }
        Ok(StoredBlocks::new(Arc::clone(&self.fetch), entry.recipe.clone()))
    }

    /// Bytes of packs that were fetched so far, by this reader and every other one of the same open repository.
    pub fn bytes_fetched(&self) -> u64 {
        self.fetch.bytes_fetched()
    }

    /// The items of the selection in order, with the directories above them; everything when it is empty.
    ///
    /// Errors: [`Code::NotFound`] when a selected path is not in the point.
    pub fn source(&self, selection: Vec<ItemPath>) -> Result<PointSource> {
        PointSource::new(self.clone(), selection)
    }

    /// Whether two items have the same content, be they of one point or of two.
    pub fn same_content(&self, entry: &Entry, other: &Entry) -> Result<bool> {
        same(&MetaPages::new(&self.fetch), &entry.recipe, &other.recipe)
    }
}
