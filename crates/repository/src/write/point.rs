//! The target that makes a recovery point.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use mainstay_core::{
    Body as ItemBody, Captured, Code, Counts, Error, Event, HardLink, Item, ItemPath, Metadata, PointId,
    Progress, Receipt, Result, Skip, SkipReason, Stamp, StreamEnd, Target, Time, WorkloadId, WorkloadRef,
};

use super::blocks::Before;
use super::commit::{self, Draft};
use super::content::{ContentReader, Moved, Outcome};
use super::groups::Groups;
use super::ingest::{Ingest, MetaSink, References};
use crate::cut::Profile;
use crate::fetch::{Fetch, MetaPages};
use crate::format::item::{Fit, Recipe, StoredItem, encode_skip, fit, path_key};
use crate::format::page::PageRef;
use crate::format::page::{Cursor, MapBuilder, PageKind, for_each_page};
use crate::format::run::Run;
use crate::format::segment::Compression;
use crate::keys::Powers;
use crate::points::{Loaded, Points};
use crate::read::same::Comparison;
use crate::tree_copy::{self, TreeCopy, TreeCopyWriter};

/// More skips than this are counted but not listed one by one.
const SKIPS_LISTED_MAX: u64 = 1 << 20;

/// What the new point is of.
pub struct WriteRequest {
    pub workload: WorkloadRef,
    pub host: String,
    /// What was asked to be protected, for people.
    pub roots: Vec<String>,
    pub tags: Vec<String>,
    /// Of so many unchanged items one is read all the same, so that a changed content behind an unchanged stamp
    /// is found in time. 0: none.
    pub reread_one_in: u32,
    pub parent: Parent,
    pub progress: Arc<dyn Progress>,
    /// Items may come in any order. All of them are read, and what is known of them is kept in memory until the end.
    pub any_order: bool,
    pub compression: Compression,
    /// Threads that compress and seal. 0: no thread is started at all, and storing is the caller's too.
    pub jobs: usize,
}

/// The point whose unchanged items need not be read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// The newest of the same workload.
    Latest,
    None,
    Point(PointId),
}

/// Makes a recovery point. Nothing of it is visible until [`Target::finish`] returns.
pub struct PointWriter {
    request: WriteRequest,
    /// The pages of the parent's tree.
    pages: MetaPages,
    ingest: Ingest,
    content: ContentReader,
    items: MapBuilder,
    skips: MapBuilder,
    skips_listed: u64,
    points: Arc<Points>,
    parent: Option<(PointId, Arc<Loaded>)>,
    previous: Previous,
    last_path: Option<ItemPath>,
    /// Waiting for the others, where items may come in any order.
    waiting: BTreeMap<Vec<u8>, StoredItem>,
    /// Recipes of inodes that have several paths.
    links: HashMap<HardLink, Recipe>,
    counts: Counts,
    started: Time,
}

/// The items of the parent point, walked along with the new ones.
struct Previous {
    cursor: Option<Cursor<MetaPages>>,
    waiting: Option<(Vec<u8>, StoredItem)>,
}

impl Previous {
    /// The parent's item of this key. Keys must be asked for in ascending order. From where the parent's tree is
    /// damaged on, nothing is known of it, and everything is read: that heals what comes after.
    fn find(&mut self, key: &[u8]) -> Result<Option<StoredItem>> {
        unless_damaged(self.step_to(key)).map(|found| {
            found.unwrap_or_else(|| {
                *self = Self { cursor: None, waiting: None };
                None
            })
        })
    }

    fn step_to(&mut self, key: &[u8]) -> Result<Option<StoredItem>> {
        loop {
            match &self.waiting {
                Some((waiting, _)) if waiting.as_slice() > key => return Ok(None),
                Some((waiting, _)) if waiting == key => return Ok(self.waiting.take().map(|(_, item)| item)),
                _ => {}
            }
            let Some(cursor) = &mut self.cursor else { return Ok(None) };
            match cursor.next()? {
                Some((page, index)) => {
                    let item = StoredItem::decode(page.value(index), &page.groups)?;
                    self.waiting = Some((page.key(index).to_vec(), item));
                }
                None => {
                    self.cursor = None;
                    self.waiting = None;
                }
            }
        }
    }
}

/// `None` where stored bytes are damaged.
fn unless_damaged<T>(outcome: Result<T>) -> Result<Option<T>> {
    match outcome {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.code() == Code::Integrity => Ok(None),
        Err(error) => Err(error),
    }
}

/// What to do with the body of an item.
enum Plan {
    Nothing,
    Reuse(Recipe),
    /// Read it.
    Read {
        /// When the stamp had not changed: what the parent holds.
        expected: Option<Recipe>,
        /// What the parent holds of a disk, to take over what the source says is unchanged since that point.
        before: Option<Recipe>,
    },
}

impl Plan {
    const READ: Self = Self::Read { expected: None, before: None };
}

impl PointWriter {
    pub(crate) fn new(fetch: Arc<Fetch>, points: Arc<Points>, request: WriteRequest) -> Result<Self> {
        let shared = Arc::clone(fetch.shared());
        shared.ring.writer(Powers::WRITE)?;
        let domain = Arc::new(shared.domain()?.clone());
        request.progress.event(&Event::Phase(mainstay_core::Phase::Opening));
        let parent = commit::find_parent(&shared, &points, &request)?;
        // Loaded now, so that nothing but what is new must be looked at when everything else is done.
        commit::find_last_own(&shared, &points, &request, &commit::is_about_more)?;
        let groups =
            Groups::new(Arc::clone(&shared), Arc::clone(&domain), request.jobs, request.compression)?;
        let mut ingest = Ingest::new(Arc::clone(&fetch), Arc::clone(&domain), groups)?;
        let (pages, root) = last_tree(&fetch, &mut ingest, &request.workload.id, parent.as_ref())?;
        let cursor = root.map(|root| Cursor::seek(pages.clone(), PageKind::Items, &root, &[]));
        if let Some((_, loaded)) = &parent {
            commit::learn_structure(&mut ingest, loaded)?;
        }
        Ok(Self {
            content: ContentReader::new(&domain.cut_key, Profile::STREAM),
            items: MapBuilder::new(PageKind::Items, &domain.page_key),
            skips: MapBuilder::new(PageKind::Skips, &domain.page_key),
            skips_listed: 0,
            previous: Previous { cursor: cursor.map(unless_damaged).transpose()?.flatten(), waiting: None },
            points,
            parent,
            last_path: None,
            waiting: BTreeMap::new(),
            links: HashMap::new(),
            counts: Counts::default(),
            started: shared.clock.now(),
            request,
            pages,
            ingest,
        })
    }

    fn put_item(&mut self, mut item: Item) -> Result<()> {
        self.request.progress.check()?;
        let is_behind = self.last_path.as_ref().is_some_and(|last| *last >= item.path);
        if is_behind && !self.request.any_order {
            return Err(Error::bug(format!("the source yielded {} out of order", item.path)));
        }
        match fit(&mut item) {
            Fit::Whole => {}
            Fit::Reduced(detail) => {
                self.notice(Skip { path: item.path.clone(), reason: SkipReason::Metadata, detail })?;
            }
            Fit::Refused(detail) => {
                self.last_path = Some(item.path.clone());
                return self.notice(Skip { path: item.path, reason: SkipReason::Unsupported, detail });
            }
        }
        let Item { path, metadata, stamp, body } = item;
        let key = path_key(&path);
        let previous = if self.request.any_order { None } else { self.previous.find(&key)? };
        let plan = self.plan(&key, &metadata, &stamp, &body, previous)?;
        let blocks = matches!(body, ItemBody::Blocks(_));
        self.request.progress.event(&Event::Item(&path));
        let stored = match plan {
            Plan::Nothing => Some((Recipe::None, false)),
            Plan::Reuse(recipe) => {
                self.counts.unchanged += 1;
                Some((recipe, false))
            }
            Plan::Read { expected, before } => self.read(&path, body, expected, before)?,
        };
        if let Some((recipe, changed)) = stored {
            self.add(&key, metadata, stamp, recipe, blocks, changed)?;
        }
        self.last_path = Some(path);
        self.report();
        Ok(())
    }

    fn plan(
        &mut self,
        key: &[u8],
        metadata: &Metadata,
        stamp: &Stamp,
        body: &ItemBody,
        previous: Option<StoredItem>,
    ) -> Result<Plan> {
        if matches!(body, ItemBody::None) {
            return Ok(Plan::Nothing);
        }
        if let Some(recipe) = metadata.hard_link.and_then(|link| self.links.get(&link)) {
            return Ok(Plan::Reuse(recipe.clone()));
        }
        let Some(known) = previous.filter(|known| !known.changed_while_read) else { return Ok(Plan::READ) };
        if stamp.0.is_empty() || known.stamp != *stamp || known.metadata.size != metadata.size {
            // "Unchanged" is said of one point, so it counts only when that point was named.
            let comparable = known.blocks
                && matches!(body, ItemBody::Blocks(_))
                && matches!(self.request.parent, Parent::Point(_));
            return Ok(Plan::Read { expected: None, before: comparable.then_some(known.recipe) });
        }
        let reread = self.request.reread_one_in > 0
            && self.draw(key).is_multiple_of(u64::from(self.request.reread_one_in));
        if reread {
            return Ok(Plan::Read { expected: Some(known.recipe), before: None });
        }
        if unless_damaged(self.reach(&known.recipe))?.unwrap_or(false) {
            Ok(Plan::Reuse(known.recipe))
        } else {
            Ok(Plan::READ)
        }
    }

    /// Another share of the items is drawn in every run.
    fn draw(&self, key: &[u8]) -> u64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.started.0.to_le_bytes());
        hasher.update(key);
        crate::index::tag(hasher.finalize().as_bytes())
    }

    /// Records that the point relies on everything the recipe names; `false` when some of that may no longer be
    /// relied on, and the item must be read.
    fn reach(&mut self, recipe: &Recipe) -> Result<bool> {
        let mut reached = References::new();
        let mut note = |group, first: u32, last: u32| {
            reached.entry(group).or_default().insert(first..last.saturating_add(1));
        };
        match recipe {
            Recipe::None => {}
            Recipe::Inline(runs) => runs.iter().for_each(|run| note_run(run, &mut note)),
            Recipe::Pages { root, .. } => {
                let copy = &mut self.ingest.copy;
                for_each_page(&self.pages, PageKind::Recipe, root, &mut |page_ref, page| {
                    note(page_ref.group, page_ref.segment, page_ref.segment);
                    if let Some(copy) = copy {
                        copy.add(page_ref, page.bytes());
                    }
                    if page.level == 0 {
                        for index in 0..page.len() {
                            note_run(&Run::decode(&mut page.value(index), &page.groups)?, &mut note);
                        }
                    }
                    Ok(true)
                })?;
            }
        }
        for (group, segments) in &reached {
            for segment in segments.iter() {
                if self.ingest.groups.directory(group).is_none() && !self.ingest.is_usable(group, segment) {
                    return Ok(false);
                }
            }
        }
        for (group, segments) in reached {
            self.ingest.references.entry(group).or_default().extend(&segments);
        }
        Ok(true)
    }

    /// Reads a body. `None` when it cannot be read, which is then a skip.
    fn read(
        &mut self,
        path: &ItemPath,
        body: ItemBody,
        expected: Option<Recipe>,
        before: Option<Recipe>,
    ) -> Result<Option<(Recipe, bool)>> {
        let read_before = self.counts.read_bytes;
        let comparison = expected.map(|recipe| Comparison::with(&self.pages, &recipe));
        self.ingest.comparison = comparison.map(unless_damaged).transpose()?.flatten();
        let outcome = self.read_content(body, before)?;
        let comparison = self.ingest.comparison.take();
        let content = match outcome {
            Outcome::Read(content) => content,
            Outcome::Unreadable(error) if error.code() == Code::Cancelled => return Err(error),
            Outcome::Unreadable(error) => {
                let detail = error.chain().join(": ");
                self.notice(Skip { path: path.clone(), reason: SkipReason::Unreadable, detail })?;
                return Ok(None);
            }
        };
        self.counts.read_bytes = read_before + content.read;
        if let Some(at) = content.lied {
            let detail =
                format!("byte {at} had changed where the source says nothing did: everything was read");
            self.notice(Skip { path: path.clone(), reason: SkipReason::SilentChange, detail })?;
        }
        let changed = content.end == StreamEnd::Changed;
        if changed {
            let detail = "it changed while it was read".to_owned();
            self.notice(Skip { path: path.clone(), reason: SkipReason::Changed, detail })?;
        }
        let comparison = comparison.filter(|_| !changed).map(Comparison::ends_here);
        if comparison.map(unless_damaged).transpose()?.flatten() == Some(false) {
            let detail = "its content changed behind an unchanged time and size".to_owned();
            self.notice(Skip { path: path.clone(), reason: SkipReason::SilentChange, detail })?;
        }
        Ok(Some((content.recipe, changed)))
    }

    fn read_content(&mut self, body: ItemBody, before: Option<Recipe>) -> Result<Outcome> {
        let Self { content, ingest, request, counts, .. } = self;
        let before = before.map(|recipe| Before {
            pages: self.pages.clone(),
            recipe,
            compare_one_in: request.reread_one_in,
            salt: self.started.0.cast_unsigned(),
        });
        let read_before = counts.read_bytes;
        let mut watch = |moved: Moved, ingest: &mut Ingest| {
            // One item may be larger than what should be lost when a run is interrupted.
            commit::register(ingest)?;
            counts.read_bytes = read_before + moved.read;
            counts.new_bytes = ingest.new_bytes;
            counts.written_bytes = ingest.groups.written_bytes();
            let done = Counts { bytes: counts.bytes + moved.done, ..*counts };
            request.progress.event(&Event::Done(done));
            request.progress.check()
        };
        match body {
            ItemBody::Stream(open) => match open.open() {
                Ok(reader) => content.stream(reader, ingest, &mut watch),
                Err(error) => Ok(Outcome::Unreadable(error)),
            },
            ItemBody::Pages(open) => match open.open() {
                Ok(reader) => content.pages(reader, ingest, &mut watch),
                Err(error) => Ok(Outcome::Unreadable(error)),
            },
            ItemBody::Blocks(blocks) => content.blocks(blocks.as_ref(), before, ingest, &mut watch),
            ItemBody::None => Err(Error::bug("an item without content is read")),
        }
    }

    fn add(
        &mut self,
        key: &[u8],
        metadata: Metadata,
        stamp: Stamp,
        recipe: Recipe,
        blocks: bool,
        changed_while_read: bool,
    ) -> Result<()> {
        if let Some(link) = metadata.hard_link {
            self.links.entry(link).or_insert_with(|| recipe.clone());
        }
        self.counts.items += 1;
        self.counts.bytes += recipe.bytes();
        let item = StoredItem { metadata, stamp, changed_while_read, blocks, recipe };
        if !self.request.any_order {
            return self.push(key, &item);
        }
        match self.waiting.insert(key.to_vec(), item) {
            None => Ok(()),
            Some(_) => Err(Error::bug("the source yielded an item twice")),
        }
    }

    fn push(&mut self, key: &[u8], item: &StoredItem) -> Result<()> {
        self.items.push(key, &|out, groups| item.encode(out, groups), &mut MetaSink(&mut self.ingest))
    }

    /// Records what this writer found out, and says so; what the source tells was said by whoever copies.
    fn notice(&mut self, skip: Skip) -> Result<()> {
        self.request.progress.event(&Event::Skipped(&skip));
        self.record_skip(skip)
    }

    fn record_skip(&mut self, skip: Skip) -> Result<()> {
        if skip.reason.is_loss() {
            self.counts.skipped += 1;
        } else {
            self.counts.noticed += 1;
        }
        if self.skips_listed == SKIPS_LISTED_MAX {
            return Ok(());
        }
        self.skips_listed += 1;
        let key = self.skips_listed.to_be_bytes();
        self.skips.push(&key, &|out, _| encode_skip(&skip, out), &mut MetaSink(&mut self.ingest))
    }

    fn report(&mut self) {
        self.counts.new_bytes = self.ingest.new_bytes;
        self.counts.written_bytes = self.ingest.groups.written_bytes();
        self.request.progress.event(&Event::Done(self.counts));
    }
}

impl Target for PointWriter {
    type Done = PointId;

    fn put(&mut self, item: Item) -> Result<()> {
        self.put_item(item)?;
        commit::register(&mut self.ingest)
    }

    fn skip(&mut self, skip: Skip) -> Result<()> {
        self.record_skip(skip)
    }

    fn finish(self: Box<Self>, captured: &Captured) -> Result<(Receipt, PointId)> {
        let mut this = *self;
        this.request.progress.event(&Event::Phase(mainstay_core::Phase::Finishing));
        for (key, item) in std::mem::take(&mut this.waiting) {
            this.push(&key, &item)?;
        }
        let items = this.items.finish(&mut MetaSink(&mut this.ingest))?;
        let skips = this.skips.finish(&mut MetaSink(&mut this.ingest))?;
        let draft = Draft {
            request: &this.request,
            points: &this.points,
            parent: this.parent.as_ref().map(|(id, _)| *id),
            items,
            skips,
            started: this.started,
            captured,
        };
        let (point, counts) = commit::commit(&mut this.ingest, draft, this.counts)?;
        if let Some(copy) = this.ingest.copy.take() {
            copy.finish(&point, items.as_ref());
        }
        Ok((Receipt { point: Some(point), counts }, point))
    }
}

/// The pages of the parent's tree and their root: in the repository, or for a writer that cannot read, in its own
/// copy.
fn last_tree(
    fetch: &Arc<Fetch>,
    ingest: &mut Ingest,
    workload: &WorkloadId,
    parent: Option<&(PointId, Arc<Loaded>)>,
) -> Result<(MetaPages, Option<PageRef>)> {
    let shared = fetch.shared();
    let stored = MetaPages::new(fetch);
    if shared.ring.content_secret().is_ok() {
        return Ok((stored, parent.and_then(|(_, loaded)| loaded.body.as_ref()?.items)));
    }
    let Some(folder) = &shared.folder else { return Ok((stored, None)) };
    let path = tree_copy::path(folder, workload);
    let writer = shared.ring.writer(Powers::WRITE)?;
    let copy = TreeCopy::open(&path, &shared.ring, writer);
    // Not being able to keep a copy costs time in the next run, and nothing in this one.
    ingest.copy = TreeCopyWriter::create(&path, &shared.ring, writer).ok();
    match copy {
        Some(copy) if parent.is_some_and(|(id, _)| *id == copy.point) => {
            let root = copy.items;
            Ok((MetaPages::of_copy(fetch, copy), Some(root)))
        }
        _ => Ok((stored, None)),
    }
}

fn note_run(run: &Run, note: &mut impl FnMut(crate::format::segment::GroupId, u32, u32)) {
    if let Run::Chunks { group, segment, last_segment, .. } = run {
        note(*group, *segment, *last_segment);
    }
}
