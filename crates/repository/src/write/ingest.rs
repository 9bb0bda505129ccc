//! Puts chunks and pages into the repository unless it has them, and keeps count of what the point reaches.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use mainstay_core::{Code, Result};

use super::groups::{Groups, Spot};
use crate::cut::{ChunkId, chunk_id};
use crate::fetch::{Fetch, structure_page_id};
use crate::format::directory::Directory;
use crate::format::page::{PageRef, PageSink};
use crate::format::segment::{Class, GroupId};
use crate::index::{self, ChunkIndex};
use crate::keys::DomainKeys;
use crate::log::record::PackEntry;
use crate::names;
use crate::ranges::Ranges;
use crate::read::same::{Comparison, Part};
use crate::tree_copy::TreeCopyWriter;

/// The segments that a point reaches, by group.
pub(crate) type References = BTreeMap<GroupId, Ranges>;

pub(crate) struct Ingest {
    pub(crate) fetch: Arc<Fetch>,
    pub(crate) domain: Arc<DomainKeys>,
    pub(crate) groups: Groups,
    pub(crate) references: References,
    /// A writer that cannot read keeps the pages of the tree it makes.
    pub(crate) copy: Option<TreeCopyWriter>,
    /// Packs of this run that hold what was condemned under it.
    pub(crate) rescued: Vec<PackEntry>,
    /// What the body under way should be, while that is so.
    pub(crate) comparison: Option<Comparison>,
    index: ChunkIndex,
    /// Numbers of the groups of this run in `index`.
    numbers: HashMap<GroupId, u32>,
    /// Segments of older groups that may be relied on, as the log last said.
    usable: HashMap<GroupId, Ranges>,
    /// Reference pages of the parent point, by id.
    structure: HashMap<[u8; 32], PageRef>,
    /// Those of them that the new point shares.
    reused: Vec<PageRef>,
    /// The chunk after the last one found is most often the next one wanted.
    last_hit: Option<(GroupId, Arc<Directory>, u32)>,
    pub(crate) new_bytes: u64,
}

impl Ingest {
    pub(crate) fn new(fetch: Arc<Fetch>, domain: Arc<DomainKeys>, groups: Groups) -> Result<Self> {
        let index = load_index(&fetch, &domain)?;
        Ok(Self {
            fetch,
            domain,
            groups,
            references: References::new(),
            copy: None,
            rescued: Vec::new(),
            comparison: None,
            index,
            numbers: HashMap::new(),
            usable: HashMap::new(),
            structure: HashMap::new(),
            reused: Vec::new(),
            last_hit: None,
            new_bytes: 0,
        })
    }

    /// Reference pages that need not be written again.
    pub(crate) fn know_structure(&mut self, page: PageRef) {
        self.structure.insert(page.id, page);
    }

    /// Reference pages of the parent that the new point shares.
    pub(crate) fn reused_structure(&self) -> impl Iterator<Item = &PageRef> {
        self.reused.iter()
    }

    /// Forgets what the log said about older groups, because it says more now.
    pub(crate) fn forget_usable(&mut self) {
        self.usable.clear();
        self.last_hit = None;
    }

    /// Compares the next piece of the body under way with what it should be, as long as that can be read.
    pub(crate) fn compare(&mut self, part: Part) -> Result<()> {
        match self.comparison.as_mut().map(|comparison| comparison.feed(part)) {
            Some(Err(error)) if error.code() == Code::Integrity => self.comparison = None,
            Some(outcome) => outcome?,
            None => {}
        }
        Ok(())
    }

    /// Stores content unless the repository has it. Returns its id and where it is.
    pub(crate) fn put_chunk(&mut self, bytes: &[u8]) -> Result<(ChunkId, Spot)> {
        let id = chunk_id(&self.domain.id_key, bytes);
        let spot = self.put(Class::Data, id, bytes)?;
        self.reach(&spot.group, spot.segment, spot.segment);
        Ok((id, spot))
    }

    /// Records that the point relies on segments `first` to `last` of a group.
    pub(crate) fn reach(&mut self, group: &GroupId, first: u32, last: u32) {
        self.references.entry(*group).or_default().insert(first..last.saturating_add(1));
    }

    fn put(&mut self, class: Class, id: ChunkId, bytes: &[u8]) -> Result<Spot> {
        if let Some(spot) = self.find(&id)? {
            return Ok(spot);
        }
        let spot = self.groups.append(class, id, bytes)?;
        let number = match self.numbers.get(&spot.group) {
            Some(number) => *number,
            None => {
                let number = self.index.add_group(spot.group)?;
                self.numbers.insert(spot.group, number);
                number
            }
        };
        self.index.insert(index::tag(&id.0), number, spot.slot);
        if class == Class::Data {
            self.new_bytes += bytes.len() as u64;
        }
        Ok(spot)
    }

    /// Where a chunk with exactly this id lies in a place that a new point may rely on.
    fn find(&mut self, id: &ChunkId) -> Result<Option<Spot>> {
        if let Some((group, directory, slot)) = &self.last_hit
            && directory.chunk(slot + 1).is_some_and(|(known, _)| known == id)
        {
            let (group, directory, slot) = (*group, Arc::clone(directory), slot + 1);
            let segment = directory.ordinal_of(slot);
            if self.is_usable(&group, segment) {
                self.last_hit = Some((group, directory, slot));
                return Ok(Some(Spot { group, segment, slot }));
            }
        }
        let candidates: Vec<_> = self.index.candidates(index::tag(&id.0)).collect();
        for (group, slot) in candidates {
            if let Some(directory) = self.groups.directory(&group) {
                if directory.chunk(slot).is_some_and(|(known, _)| known == id) {
                    return Ok(Some(Spot { group, segment: directory.ordinal_of(slot), slot }));
                }
                continue;
            }
            if self.usable(&group).is_empty() {
                // Its packs were collected; the index run that names it outlived them.
                continue;
            }
            let directory = match self.fetch.directory(&group) {
                Ok(directory) => directory,
                // A damaged or vanished pack: storing the chunk again heals the next points.
                Err(error) if error.code() == Code::Integrity => continue,
                Err(error) => return Err(error),
            };
            let segment = directory.ordinal_of(slot);
            if directory.chunk(slot).is_some_and(|(known, _)| known == id) && self.is_usable(&group, segment)
            {
                self.last_hit = Some((group, directory, slot));
                return Ok(Some(Spot { group, segment, slot }));
            }
        }
        Ok(None)
    }

    /// Whether a new point may rely on a segment of an older group.
    pub(crate) fn is_usable(&mut self, group: &GroupId, segment: u32) -> bool {
        self.usable(group).contains(segment)
    }

    fn usable(&mut self, group: &GroupId) -> &Ranges {
        let fetch = &self.fetch;
        self.usable.entry(*group).or_insert_with(|| {
            // A group whose owner cannot be asked is nobody's.
            let owner = fetch.owner(group).ok().flatten();
            fetch.shared().state().live_segments(group, owner.as_ref())
        })
    }
}

/// Reads every index run of the domain.
fn load_index(fetch: &Fetch, domain: &DomainKeys) -> Result<ChunkIndex> {
    let shared = fetch.shared();
    let runs: Vec<_> = shared.state().runs().filter(|run| run.domain == domain.domain).cloned().collect();
    let mut index = ChunkIndex::default();
    for run in runs {
        let name = names::index_run(&run.id);
        let bytes = match shared.store.get_whole(&name, index::RUN_BYTES_MAX) {
            Ok(bytes) if *blake3::hash(&bytes).as_bytes() == run.hash => bytes,
            // Without a run its chunks are stored once more; nothing is lost.
            Ok(_) => continue,
            Err(error) if matches!(error.code(), Code::NotFound | Code::Integrity) => continue,
            Err(error) => return Err(error),
        };
        let Ok(groups) = index::open_run(&domain.index_key, shared.family(), &run.domain, &run.id, &bytes)
        else {
            continue;
        };
        for group in groups {
            let number = index.add_group(group.group)?;
            for (slot, tag) in group.tags.iter().enumerate() {
                index.insert(*tag, number, slot as u32);
            }
        }
    }
    Ok(index)
}

/// Stores tree, recipe and skip pages.
pub(crate) struct MetaSink<'a>(pub(crate) &'a mut Ingest);

impl PageSink for MetaSink<'_> {
    fn store(&mut self, page: Vec<u8>) -> Result<PageRef> {
        let id = *blake3::keyed_hash(&self.0.domain.page_key, &page).as_bytes();
        let spot = self.0.put(Class::Meta, ChunkId(id), &page)?;
        self.0.reach(&spot.group, spot.segment, spot.segment);
        let stored = PageRef { group: spot.group, segment: spot.segment, slot: spot.slot, id };
        if let Some(copy) = &mut self.0.copy {
            copy.add(&stored, &page);
        }
        Ok(stored)
    }
}

/// Stores reference pages.
pub(crate) struct StructureSink<'a>(pub(crate) &'a mut Ingest);

impl PageSink for StructureSink<'_> {
    fn store(&mut self, page: Vec<u8>) -> Result<PageRef> {
        let id = structure_page_id(&page);
        if let Some(known) = self.0.structure.get(&id).copied()
            && (self.0.groups.directory(&known.group).is_some()
                || self.0.is_usable(&known.group, known.segment))
        {
            self.0.reused.push(known);
            return Ok(known);
        }
        let spot = self.0.groups.append(Class::Structure, ChunkId(id), &page)?;
        let page = PageRef { group: spot.group, segment: spot.segment, slot: spot.segment, id };
        self.0.structure.insert(id, page);
        Ok(page)
    }
}
