//! Pages: a sorted map of byte keys to byte values, split where its content says so and shared between points.
//!
//! One structure serves three uses: the items of a point by path, the runs of a large body by offset, and the
//! groups that a point reaches by id. Leaves hold entries; a page of a higher level holds, for every page below,
//! its last key and a [`PageRef`]. Where a page ends depends only on keys and sizes of entries, so a change in
//! one place leaves the pages elsewhere as they were.

use std::sync::Arc;

use mainstay_core::{Error, Result};

use crate::codec::{Decoder, Encode};
use crate::format::segment::GroupId;
use crate::seal::Secret;

const MAGIC: u8 = b'P';
const VERSION: u8 = 1;
/// Pages end near this many bytes on average, never before the first and hardly after the last.
const PAGE_BYTES: Bounds = Bounds { least: 4 << 10, average: 32 << 10, most: 64 << 10 };
/// A page never has more; a single entry may reach this (a path of 1 MiB with its attributes).
pub(crate) const PAGE_BYTES_MAX: usize = 1 << 20 | 1 << 18;
/// No tree is deeper: 2^64 entries would not be.
const LEVELS_MAX: u8 = 12;

struct Bounds {
    least: usize,
    average: usize,
    most: usize,
}

/// What the entries of a page mean. The numbers are part of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum PageKind {
    /// Key: path with `/` as 0x00 … see [`crate::format::item::path_key`]; value: an item.
    Items = 1,
    /// Key: the offset after the run, big-endian; value: a run.
    Recipe = 2,
    /// Key: group id; value: the segments reached.
    References = 3,
    /// Key: a number, big-endian; value: a skip.
    Skips = 4,
}

/// Names a stored page: where it lies, and the id its bytes must have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PageRef {
    pub(crate) group: GroupId,
    /// The segment that holds it, and its slot; in a structure group both are the same number.
    pub(crate) segment: u32,
    pub(crate) slot: u32,
    pub(crate) id: [u8; 32],
}

impl PageRef {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.fixed(&self.group.0);
        out.u32(self.segment);
        out.u32(self.slot);
        out.fixed(&self.id);
    }

    pub(crate) fn decode(input: &mut Decoder<'_>) -> Result<Self> {
        Ok(Self { group: input.id()?, segment: input.u32()?, slot: input.u32()?, id: input.array()? })
    }
}

/// The groups that a page speaks of; its entries name them by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GroupTable(Vec<GroupId>);

impl GroupTable {
    pub(crate) fn index_of(&mut self, group: &GroupId) -> u64 {
        // Neighbours mostly share a group, so the newest is looked at first.
        if let Some(index) = self.0.iter().rposition(|known| known == group) {
            return index as u64;
        }
        self.0.push(*group);
        self.0.len() as u64 - 1
    }

    pub(crate) fn get(&self, index: u64, input: &Decoder<'_>) -> Result<GroupId> {
        let group = usize::try_from(index).ok().and_then(|index| self.0.get(index));
        group.copied().ok_or_else(|| input.malformed("it names a group that its page does not list"))
    }
}

/// Stores finished pages.
pub(crate) trait PageSink {
    /// Stores a page unless the repository has it already.
    fn store(&mut self, page: Vec<u8>) -> Result<PageRef>;
}

/// Loads stored pages.
pub(crate) trait PageSource {
    /// The bytes of the page; errors when they are not the ones named.
    fn load(&self, page: &PageRef) -> Result<Arc<[u8]>>;
}

impl<S: PageSource> PageSource for &S {
    fn load(&self, page: &PageRef) -> Result<Arc<[u8]>> {
        (*self).load(page)
    }
}

/// A page under construction.
struct Open {
    level: u8,
    count: u64,
    groups: GroupTable,
    entries: Vec<u8>,
    last_key: Vec<u8>,
}

impl Open {
    fn new(level: u8) -> Self {
        Self { level, count: 0, groups: GroupTable::default(), entries: Vec::new(), last_key: Vec::new() }
    }

    fn push(&mut self, key: &[u8], value: &dyn Fn(&mut Vec<u8>, &mut GroupTable)) -> usize {
        let before = self.entries.len();
        let shared = key.iter().zip(&self.last_key).take_while(|(new, old)| new == old).count();
        let shared = if self.count == 0 { 0 } else { shared };
        self.entries.varint(shared as u64);
        self.entries.bytes(key.get(shared..).unwrap_or_default());
        let mut bytes = Vec::with_capacity(128);
        value(&mut bytes, &mut self.groups);
        self.entries.bytes(&bytes);
        self.last_key.clear();
        self.last_key.extend_from_slice(key);
        self.count += 1;
        self.entries.len() - before
    }

    fn finish(&self, kind: PageKind) -> Vec<u8> {
        let mut page = Vec::with_capacity(self.entries.len() + self.groups.0.len() * 16 + 16);
        page.u8(MAGIC);
        page.u8(VERSION);
        page.u8(kind as u8);
        page.u8(self.level);
        page.varint(self.groups.0.len() as u64);
        self.groups.0.iter().for_each(|group| page.fixed(&group.0));
        page.varint(self.count);
        page.fixed(&self.entries);
        page
    }
}

/// Builds the pages of a map from its entries in ascending order of keys.
pub(crate) struct MapBuilder {
    kind: PageKind,
    split_key: Secret,
    /// The page under way of every level, leaves first.
    levels: Vec<Open>,
    started: bool,
}

impl MapBuilder {
    /// `split_key` decides where pages end; whoever lacks it cannot tell pages from their sizes.
    pub(crate) fn new(kind: PageKind, split_key: &Secret) -> Self {
        Self { kind, split_key: split_key.clone(), levels: vec![Open::new(0)], started: false }
    }

    /// Errors: [`mainstay_core::Code::Bug`] when `key` is not greater than the one before.
    pub(crate) fn push(
        &mut self,
        key: &[u8],
        value: &dyn Fn(&mut Vec<u8>, &mut GroupTable),
        sink: &mut dyn PageSink,
    ) -> Result<()> {
        if self.started && self.levels.first().is_some_and(|leaf| leaf.last_key.as_slice() >= key) {
            return Err(Error::bug("entries of a map are out of order"));
        }
        self.started = true;
        self.push_at(0, key, value, sink)
    }

    fn push_at(
        &mut self,
        level: usize,
        key: &[u8],
        value: &dyn Fn(&mut Vec<u8>, &mut GroupTable),
        sink: &mut dyn PageSink,
    ) -> Result<()> {
        if level == self.levels.len() {
            self.levels.push(Open::new(level as u8));
        }
        let Some(open) = self.levels.get_mut(level) else { return Err(Error::bug("a level is missing")) };
        let grown = open.push(key, value);
        let size = open.entries.len();
        let full = size >= PAGE_BYTES.most || (size >= PAGE_BYTES.least && self.ends_page(key, grown));
        // A page of references needs two entries, or levels would not converge.
        if full && (level == 0 || self.levels.get(level).is_some_and(|open| open.count > 1)) {
            self.close(level, sink)?;
        }
        Ok(())
    }

    /// An entry ends its page with a probability that grows with its size.
    fn ends_page(&self, key: &[u8], entry_bytes: usize) -> bool {
        let hash = blake3::keyed_hash(&self.split_key, key);
        let mut draw = [0; 4];
        draw.copy_from_slice(&hash.as_bytes()[..4]);
        u64::from(u32::from_le_bytes(draw)) * (PAGE_BYTES.average as u64) < (entry_bytes as u64) << 32
    }

    fn close(&mut self, level: usize, sink: &mut dyn PageSink) -> Result<()> {
        let Some(open) = self.levels.get_mut(level) else { return Ok(()) };
        let page = open.finish(self.kind);
        let last_key = std::mem::take(&mut open.last_key);
        *open = Open { last_key: last_key.clone(), ..Open::new(level as u8) };
        let stored = sink.store(page)?;
        self.push_at(level + 1, &last_key, &|out, _groups| stored.encode(out), sink)
    }

    /// Closes every open page; `None` for a map without entries.
    pub(crate) fn finish(mut self, sink: &mut dyn PageSink) -> Result<Option<PageRef>> {
        let mut level = 0;
        loop {
            let top = level + 1 == self.levels.len();
            let Some(open) = self.levels.get(level) else { return Err(Error::bug("a level is missing")) };
            if top && open.count == 0 {
                return if level == 0 { Ok(None) } else { Err(Error::bug("the top page is empty")) };
            }
            if top {
                return sink.store(open.finish(self.kind)).map(Some);
            }
            if open.count > 0 {
                self.close(level, sink)?;
            }
            level += 1;
        }
    }
}

/// A parsed page.
pub(crate) struct Page {
    bytes: Arc<[u8]>,
    pub(crate) level: u8,
    pub(crate) groups: GroupTable,
    keys: Vec<Vec<u8>>,
    /// Start and end of each value in `bytes`.
    values: Vec<(u32, u32)>,
}

impl Page {
    pub(crate) fn parse(kind: PageKind, bytes: Arc<[u8]>) -> Result<Self> {
        let mut input = Decoder::new("page", &bytes);
        if bytes.len() > PAGE_BYTES_MAX * 2 {
            return Err(input.malformed("it is too long"));
        }
        if (input.u8()?, input.u8()?) != (MAGIC, VERSION) || input.u8()? != kind as u8 {
            return Err(input.malformed("it is of another kind"));
        }
        let level = input.u8()?;
        if level > LEVELS_MAX {
            return Err(input.malformed("it is too deep"));
        }
        let mut groups = GroupTable::default();
        for _ in 0..input.count(16)? {
            groups.0.push(input.id()?);
        }
        let count = input.count(3)?;
        let (mut keys, mut values) = (Vec::<Vec<u8>>::with_capacity(count), Vec::with_capacity(count));
        let mut key_bytes = 0;
        for _ in 0..count {
            let shared = input.index()?;
            let rest = input.bytes()?;
            let mut key = match keys.last() {
                None if shared == 0 => Vec::with_capacity(rest.len()),
                Some(last) if shared <= last.len() => last.get(..shared).unwrap_or_default().to_vec(),
                _ => return Err(input.malformed("a key shares more than there is")),
            };
            key.extend_from_slice(rest);
            key_bytes += key.len();
            if keys.last().is_some_and(|last| *last >= key) || key_bytes > 64 << 20 {
                return Err(input.malformed("its keys are out of order or too long"));
            }
            keys.push(key);
            let value = input.bytes()?;
            let end = bytes.len() - input.remaining();
            values.push(((end - value.len()) as u32, end as u32));
        }
        input.end()?;
        if count == 0 {
            return Err(Error::integrity("malformed page: it is empty"));
        }
        Ok(Self { bytes, level, groups, keys, values })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn len(&self) -> usize {
        self.keys.len()
    }

    pub(crate) fn key(&self, index: usize) -> &[u8] {
        self.keys.get(index).map(Vec::as_slice).unwrap_or_default()
    }

    pub(crate) fn value(&self, index: usize) -> Decoder<'_> {
        let (start, end) = self.values.get(index).copied().unwrap_or_default();
        Decoder::new("page value", self.bytes.get(start as usize..end as usize).unwrap_or_default())
    }

    /// The first entry whose key is `key` or greater.
    pub(crate) fn seek(&self, key: &[u8]) -> usize {
        self.keys.partition_point(|known| known.as_slice() < key)
    }

    pub(crate) fn child(&self, index: usize) -> Result<PageRef> {
        let mut value = self.value(index);
        let child = PageRef::decode(&mut value)?;
        value.end()?;
        Ok(child)
    }

    /// What the page below entry `index` must be like; `place` is that of this page.
    fn place_below(&self, index: usize, place: &Place) -> Place {
        let before = index.checked_sub(1).map(|before| self.key(before).to_vec());
        Place {
            level: self.level.checked_sub(1),
            after: before.or_else(|| place.after.clone()),
            last: Some(self.key(index).to_vec()),
        }
    }

    /// A page that stands anywhere else than in its one place would let a small tree be walked for ever.
    fn check_place(&self, place: &Place) -> Result<()> {
        let level = place.level.is_none_or(|level| self.level == level);
        let after = place.after.as_deref().is_none_or(|after| self.key(0) > after);
        let last = place.last.as_deref().is_none_or(|last| self.key(self.len() - 1) == last);
        if level && after && last {
            Ok(())
        } else {
            Err(Error::integrity("malformed page: it is not what the page above says"))
        }
    }
}

/// What the page above says of a page: its level, the last key before it and its own last key. Nothing of a root.
#[derive(Clone, Default)]
struct Place {
    level: Option<u8>,
    after: Option<Vec<u8>>,
    last: Option<Vec<u8>>,
}

/// Walks a map in order of keys, from any key on, loading pages as it comes to them.
pub(crate) struct Cursor<S> {
    source: S,
    kind: PageKind,
    /// From the root down to the leaf: the page and the entry in it that is next.
    path: Vec<(Arc<Page>, usize, Place)>,
}

impl<S: PageSource> Cursor<S> {
    /// Stands before the first entry whose key is `from` or greater.
    pub(crate) fn seek(source: S, kind: PageKind, root: &PageRef, from: &[u8]) -> Result<Self> {
        let mut cursor = Self { source, kind, path: Vec::new() };
        cursor.descend(root, Place::default(), from)?;
        Ok(cursor)
    }

    fn descend(&mut self, page: &PageRef, place: Place, from: &[u8]) -> Result<()> {
        let page = Arc::new(Page::parse(self.kind, self.source.load(page)?)?);
        page.check_place(&place)?;
        let at = page.seek(from);
        let below = if page.level > 0 && at < page.len() {
            Some((page.child(at)?, page.place_below(at, &place)))
        } else {
            None
        };
        self.path.push((page, at, place));
        match below {
            Some((child, place)) => self.descend(&child, place, from),
            None => Ok(()),
        }
    }

    /// Moves on to the next entry: the leaf it is in, and its index there.
    pub(crate) fn next(&mut self) -> Result<Option<(Arc<Page>, usize)>> {
        loop {
            let Some((page, at, place)) = self.path.last_mut() else { return Ok(None) };
            if page.level == 0 && *at < page.len() {
                let found = (Arc::clone(page), *at);
                *at += 1;
                return Ok(Some(found));
            }
            if page.level > 0 && *at < page.len() {
                // Only after its child ended: a descent leaves the parent standing at the child it took.
                *at += 1;
                if *at < page.len() {
                    let (child, below) = (page.child(*at)?, page.place_below(*at, place));
                    self.descend(&child, below, &[])?;
                }
                continue;
            }
            self.path.pop();
        }
    }

    /// Jumps forward to the first entry whose key is `key` or greater, loading no page between.
    pub(crate) fn skip_to(&mut self, key: &[u8]) -> Result<()> {
        loop {
            let depth = self.path.len();
            let Some((page, at, place)) = self.path.last_mut() else { return Ok(()) };
            let last = page.len().wrapping_sub(1);
            if page.key(last) >= key {
                let target = page.seek(key).max(*at);
                let moved = target != *at || page.level == 0;
                *at = target;
                if page.level > 0 && moved {
                    let (child, below) = (page.child(target)?, page.place_below(target, place));
                    self.descend(&child, below, key)?;
                }
                return Ok(());
            }
            if depth == 1 {
                *at = page.len();
                return Ok(());
            }
            self.path.pop();
            // The parent still stands at the page just left; its last key is smaller than `key`.
        }
    }
}

/// Calls `each` for every page of a map, parents first, without their values being read.
pub(crate) fn for_each_page(
    source: &impl PageSource,
    kind: PageKind,
    root: &PageRef,
    each: &mut dyn FnMut(&PageRef, &Page) -> Result<bool>,
) -> Result<()> {
    let mut waiting = vec![(*root, Place::default())];
    while let Some((page_ref, place)) = waiting.pop() {
        let page = Page::parse(kind, source.load(&page_ref)?)?;
        page.check_place(&place)?;
        if !each(&page_ref, &page)? {
            continue;
        }
        if page.level > 0 {
            for index in (0..page.len()).rev() {
                waiting.push((page.child(index)?, page.place_below(index, &place)));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
