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
/// A page never has more; a single entry may come near this (a long path with all of its attributes).
pub(crate) const PAGE_BYTES_MAX: usize = 1 << 20 | 1 << 18;
/// A page ends when its keys come to this when spelled out, however much they share: who reads it spells them out.
const KEY_BYTES: usize = 16 << 20;
/// A page whose keys come to more than this is refused.
const KEY_BYTES_MAX: usize = 64 << 20;
/// No tree is deeper: 2^64 entries would not be.
const LEVELS_MAX: u8 = 12;
/// A page of references never ends after fewer entries, or long keys would make a tree deeper than that.
const REFERENCES_LEAST: u64 = 8;

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
    /// Bytes of all keys, spelled out.
    key_bytes: usize,
    last_key: Vec<u8>,
}

impl Open {
    fn new(level: u8) -> Self {
        let (groups, entries, last_key) = (GroupTable::default(), Vec::new(), Vec::new());
        Self { level, count: 0, groups, entries, key_bytes: 0, last_key }
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
        self.key_bytes += key.len();
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
        let full = size >= PAGE_BYTES.most
            || open.key_bytes >= KEY_BYTES
            || (size >= PAGE_BYTES.least && ends_page(&self.split_key, key, grown));
        if full && (level == 0 || open.count >= REFERENCES_LEAST) {
            self.close(level, sink)?;
        }
        Ok(())
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

/// An entry ends its page with a probability that grows with its size.
fn ends_page(split_key: &Secret, key: &[u8], entry_bytes: usize) -> bool {
    let hash = blake3::keyed_hash(split_key, key);
    let mut draw = [0; 4];
    draw.copy_from_slice(&hash.as_bytes()[..4]);
    u64::from(u32::from_le_bytes(draw)) * (PAGE_BYTES.average as u64) < (entry_bytes as u64) << 32
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
            if keys.last().is_some_and(|last| *last >= key) || key_bytes > KEY_BYTES_MAX {
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
        let after = before.or_else(|| place.span.after.clone());
        Place { level: self.level.checked_sub(1), span: Span { after, last: Some(self.key(index).to_vec()) } }
    }

    /// A page that stands anywhere else than in its one place would let a small tree be walked for ever.
    fn check_place(&self, place: &Place) -> Result<()> {
        let Span { after, last } = &place.span;
        let level = place.level.is_none_or(|level| self.level == level);
        let after = after.as_deref().is_none_or(|after| self.key(0) > after);
        let last = last.as_deref().is_none_or(|last| self.key(self.len() - 1) == last);
        if level && after && last {
            Ok(())
        } else {
            Err(Error::integrity("malformed page: it is not what the page above says"))
        }
    }
}

/// A part of a map: what lies after one key, or from the beginning on, up to and including another, or to the end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) after: Option<Vec<u8>>,
    pub(crate) last: Option<Vec<u8>>,
}

/// What the page above says of a page: its level, and the part of the map that it holds. Nothing of a root.
#[derive(Clone, Default)]
struct Place {
    level: Option<u8>,
    span: Span,
}

/// A page on the way down, and the entry in it that is next.
struct Standing {
    page: Arc<Page>,
    at: usize,
    place: Place,
}

/// Pages from the root down, loaded as they are come to. A page that cannot be had is passed over: what was before
/// it and what comes after it is there all the same.
struct Descent<S> {
    source: S,
    kind: PageKind,
    root: Option<PageRef>,
    path: Vec<Standing>,
    /// Entries with smaller keys are passed over.
    from: Vec<u8>,
    /// What the last failure cost.
    lost: Option<Span>,
}

impl<S: PageSource> Descent<S> {
    fn new(source: S, kind: PageKind, root: &PageRef, from: &[u8]) -> Self {
        Self { source, kind, root: Some(*root), path: Vec::new(), from: from.to_vec(), lost: None }
    }

    /// Goes one page deeper; which one that was, and what it holds.
    fn descend(&mut self, page_ref: PageRef, place: Place) -> Result<(PageRef, Arc<Page>)> {
        let load = || {
            let page = Page::parse(self.kind, self.source.load(&page_ref)?)?;
            page.check_place(&place).map(|()| Arc::new(page))
        };
        match load() {
            Ok(page) => {
                let at = page.seek(&self.from);
                self.path.push(Standing { page: Arc::clone(&page), at, place });
                Ok((page_ref, page))
            }
            Err(error) => {
                self.lost = Some(place.span);
                Err(error)
            }
        }
    }

    /// Goes to the root, or from the page reached last to the next one below it or beside it. `None` after the last
    /// page, and in a leaf that has entries left.
    fn step(&mut self) -> Result<Option<(PageRef, Arc<Page>)>> {
        if let Some(root) = self.root.take() {
            return self.descend(root, Place::default()).map(Some);
        }
        while self.path.pop_if(|standing| standing.at >= standing.page.len()).is_some() {}
        let Some(Standing { page, at, place }) = self.path.last_mut() else { return Ok(None) };
        if page.level == 0 {
            return Ok(None);
        }
        let (child, below) = (page.child(*at), page.place_below(*at, place));
        *at += 1;
        match child {
            Ok(child) => self.descend(child, below).map(Some),
            Err(error) => {
                self.lost = Some(below.span);
                Err(error)
            }
        }
    }
}

/// Walks a map in order of keys, from any key on, loading pages as it comes to them.
pub(crate) struct Cursor<S>(Descent<S>);

impl<S: PageSource> Cursor<S> {
    /// Stands before the first entry whose key is `from` or greater.
    ///
    /// Errors: those of loading the root.
    pub(crate) fn seek(source: S, kind: PageKind, root: &PageRef, from: &[u8]) -> Result<Self> {
        let mut cursor = Self::starting(source, kind, root, from);
        cursor.0.step()?;
        Ok(cursor)
    }

    /// The same, with nothing loaded yet.
    pub(crate) fn starting(source: S, kind: PageKind, root: &PageRef, from: &[u8]) -> Self {
        Self(Descent::new(source, kind, root, from))
    }

    /// Moves on to the next entry: the leaf it is in, and its index there. After an error it goes on behind the page
    /// that could not be had; [`Cursor::lost`] tells what that cost.
    pub(crate) fn next(&mut self) -> Result<Option<(Arc<Page>, usize)>> {
        while self.0.step()?.is_some() {}
        let Some(Standing { page, at, .. }) = self.0.path.last_mut() else { return Ok(None) };
        let found = (Arc::clone(page), *at);
        *at += 1;
        Ok(Some(found))
    }

    /// What the last error cost, once.
    pub(crate) fn lost(&mut self) -> Option<Span> {
        self.0.lost.take()
    }

    /// Jumps forward to the first entry whose key is `key` or greater, loading nothing.
    pub(crate) fn skip_to(&mut self, key: &[u8]) {
        if *self.0.from < *key {
            self.0.from = key.to_vec();
            for Standing { page, at, .. } in &mut self.0.path {
                *at = page.seek(key).max(*at);
            }
        }
    }
}

/// What a walk over all pages comes to.
pub(crate) enum Visit<'a> {
    Page(&'a PageRef, &'a Page),
    /// A part that cannot be had, and why.
    Lost(Span, Error),
}

/// Calls `each` for every page of a map, parents first, without their values being read. It says whether the pages
/// below are wanted. Ends at the first page that cannot be had.
pub(crate) fn for_each_page(
    source: &impl PageSource,
    kind: PageKind,
    root: &PageRef,
    each: &mut dyn FnMut(&PageRef, &Page) -> Result<bool>,
) -> Result<()> {
    visit_pages(source, kind, root, &mut |visit| match visit {
        Visit::Page(page_ref, page) => each(page_ref, page),
        Visit::Lost(_, error) => Err(error),
    })
}

/// The same, but leaves it to `each` whether to go on behind a page that cannot be had.
pub(crate) fn visit_pages(
    source: &impl PageSource,
    kind: PageKind,
    root: &PageRef,
    each: &mut dyn FnMut(Visit<'_>) -> Result<bool>,
) -> Result<()> {
    let mut descent = Descent::new(source, kind, root, &[]);
    loop {
        match descent.step() {
            Ok(Some((page_ref, page))) => {
                if !each(Visit::Page(&page_ref, &page))? || page.level == 0 {
                    descent.path.pop();
                }
            }
            Ok(None) => return Ok(()),
            Err(error) => drop(each(Visit::Lost(descent.lost.take().unwrap_or_default(), error))?),
        }
    }
}

#[cfg(test)]
mod tests;
