//! Stored content with random access: what file browsing, instant recovery and the copying of disks read.

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use mainstay_core::{Blocks, ChangeState, Error, Extent, ExtentKind, Result};

use super::recipe::{Located, check_run};
use crate::fetch::{Fetch, MetaPages};
use crate::format::directory::Directory;
use crate::format::item::Recipe;
use crate::format::run::Run;
use crate::format::segment::GroupId;

/// Runs are looked up and kept by the window: from a multiple of so many bytes on, and so many of them at least. Whoever
/// reads here and there, as a machine that boots, comes back to most.
const WINDOW_BYTES: u64 = 4 << 20;
const WINDOW_RUNS: usize = 512;
/// So many windows are kept, which is about 3 MiB.
const WINDOWS: usize = 32;

/// The content of an item, with random access.
pub struct StoredBlocks {
    fetch: Arc<Fetch>,
    recipe: Recipe,
    size: u64,
    /// The one last used first.
    windows: Mutex<VecDeque<Window>>,
}

/// Runs that follow each other.
type Window = Arc<Vec<Place>>;

/// A run and where it lies in the content.
struct Place {
    start: u64,
    run: Run,
    /// Looked up when the first of its bytes are read.
    chunks: OnceLock<Arc<Chunks>>,
}

impl Place {
    fn range(&self) -> Range<u64> {
        self.start..self.start.saturating_add(self.run.length())
    }
}

/// The chunks of a run.
struct Chunks {
    group: GroupId,
    directory: Arc<Directory>,
    first: u32,
    /// Where each ends, counted from the start of the run.
    ends: Vec<u64>,
}

impl StoredBlocks {
    pub(crate) fn new(fetch: Arc<Fetch>, recipe: Recipe) -> Self {
        Self { size: recipe.bytes(), fetch, recipe, windows: Mutex::default() }
    }

    /// Has whatever the ranges need in memory soon, as far as the cache goes, in the order in which packs hold it. Bytes
    /// beyond the end do not count. Returns how many bytes that takes in the cache.
    pub fn warm(&self, ranges: &[Range<u64>]) -> Result<u64> {
        let mut wanted = BTreeSet::new();
        for range in ranges {
            let range = range.start..range.end.min(self.size);
            if range.is_empty() {
                continue;
            }
            for place in self.places(&range)?.iter() {
                let at = place.range();
                let both = at.start.max(range.start)..at.end.min(range.end);
                if both.is_empty() || !matches!(place.run, Run::Chunks { .. }) {
                    continue;
                }
                let chunks = self.chunks(place)?;
                let within = both.start - at.start..both.end - at.start;
                wanted.extend(chunks.segments(&within).map(|ordinal| (chunks.group, ordinal)));
            }
        }
        let segments = wanted.iter().map(|(group, ordinal)| self.fetch.segment(group, *ordinal));
        segments.map(|segment| segment.map(|segment| segment.len() as u64)).sum()
    }

    /// The runs that hold `range`, which is not empty and lies within the content.
    fn places(&self, range: &Range<u64>) -> Result<Window> {
        if let Some(kept) = self.kept(range) {
            return Ok(kept);
        }
        let places = Arc::new(self.load(range)?);
        if !covers(&places, range) {
            return Err(Error::integrity("the runs of a body do not cover it"));
        }
        if places.len() <= 4 * WINDOW_RUNS {
            let mut windows = self.windows();
            windows.truncate(WINDOWS - 1);
            windows.push_front(Arc::clone(&places));
        }
        Ok(places)
    }

    /// The window that holds `range`, if there is one.
    fn kept(&self, range: &Range<u64>) -> Option<Window> {
        let mut windows = self.windows();
        let index = windows.iter().position(|window| covers(window, range))?;
        let window = windows.remove(index)?;
        windows.push_front(Arc::clone(&window));
        Some(window)
    }

    fn windows(&self) -> MutexGuard<'_, VecDeque<Window>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The runs of `range`, and some around it.
    fn load(&self, range: &Range<u64>) -> Result<Vec<Place>> {
        let start = range.start / WINDOW_BYTES * WINDOW_BYTES;
        let mut runs = Located::seek(&MetaPages::new(&self.fetch), &self.recipe, start)?;
        let mut places: Vec<Place> = Vec::new();
        while let Some((start, run)) = runs.next()? {
            let place = Place { start, run, chunks: OnceLock::new() };
            if place.range().end <= start {
                continue;
            }
            if places.last().is_some_and(|last| last.range().end != start) {
                return Err(Error::integrity("the runs of a body do not follow each other"));
            }
            let beyond = place.range().end >= range.end;
            places.push(place);
            if beyond && places.len() >= WINDOW_RUNS {
                break;
            }
        }
        Ok(places)
    }

    fn check(&self, range: &Range<u64>) -> Result<()> {
        if range.start > range.end || range.end > self.size {
            return Err(Error::bug(format!("the content has {} bytes, not {range:?}", self.size)));
        }
        Ok(())
    }

    fn chunks(&self, place: &Place) -> Result<Arc<Chunks>> {
        if let Some(chunks) = place.chunks.get() {
            return Ok(Arc::clone(chunks));
        }
        let Run::Chunks { group, first, count, bytes, digest, .. } = &place.run else {
            return Err(Error::bug("zeros have no chunks"));
        };
        let directory = self.fetch.directory(group)?;
        check_run(&directory, group, *first, *count, digest)?;
        let slots = directory.chunks().get(*first as usize..*first as usize + *count as usize);
        let ends = slots.unwrap_or_default().iter().scan(0, |end, (_, length)| {
            *end += u64::from(*length);
            Some(*end)
        });
        let ends: Vec<u64> = ends.collect();
        if ends.last() != Some(bytes) {
            return Err(Error::integrity(format!("a run is not as long as its chunks in group {group}")));
        }
        let chunks = Arc::new(Chunks { group: *group, directory, first: *first, ends });
        Ok(Arc::clone(place.chunks.get_or_init(|| chunks)))
    }

    /// Fills `buffer` with what lies `offset` bytes into the run.
    fn read_run(&self, place: &Place, offset: u64, mut buffer: &mut [u8]) -> Result<()> {
        if !matches!(place.run, Run::Chunks { .. }) {
            buffer.fill(0);
            return Ok(());
        }
        let chunks = self.chunks(place)?;
        let mut index = chunks.ends.partition_point(|end| *end <= offset);
        let before = index.checked_sub(1).and_then(|before| chunks.ends.get(before)).copied();
        let mut skip = (offset - before.unwrap_or(0)) as usize;
        while !buffer.is_empty() {
            let copied = chunks.copy(&self.fetch, chunks.first + index as u32, skip, buffer)?;
            buffer = buffer.get_mut(copied..).unwrap_or_default();
            (index, skip) = (index + 1, 0);
        }
        Ok(())
    }
}

fn covers(window: &[Place], range: &Range<u64>) -> bool {
    window.first().is_some_and(|first| first.start <= range.start)
        && window.last().is_some_and(|last| last.range().end >= range.end)
}

impl Chunks {
    /// The segments that hold some of the run's bytes.
    fn segments(&self, within: &Range<u64>) -> impl Iterator<Item = u32> {
        let first = self.ends.partition_point(|end| *end <= within.start);
        let last = self.ends.partition_point(|end| *end < within.end);
        let slots = (first..=last).map(|index| self.first.saturating_add(index as u32));
        slots.filter_map(|slot| self.directory.place(slot)).map(|place| place.ordinal)
    }

    /// Copies a chunk from its byte `skip` on to the front of `buffer`. Returns how much that was, never 0.
    fn copy(&self, fetch: &Fetch, slot: u32, skip: usize, buffer: &mut [u8]) -> Result<usize> {
        let missing = || Error::integrity(format!("slot {slot} of group {} cannot be found", self.group));
        let place = self.directory.place(slot).ok_or_else(missing)?;
        let (id, _) = self.directory.chunk(slot).ok_or_else(missing)?;
        let segment = fetch.segment(&self.group, place.ordinal)?;
        let start = place.offset as usize;
        let chunk = segment.get(start..start + place.length as usize).ok_or_else(missing)?;
        fetch.check_chunk(id, chunk)?;
        let rest = chunk.get(skip..).filter(|rest| !rest.is_empty()).ok_or_else(missing)?;
        let length = rest.len().min(buffer.len());
        let (into, from) = (buffer.get_mut(..length), rest.get(..length));
        into.unwrap_or_default().copy_from_slice(from.unwrap_or_default());
        Ok(length)
    }
}

impl Blocks for StoredBlocks {
    fn size(&self) -> u64 {
        self.size
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        self.check(&range)?;
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let places = self.places(&range)?;
        let mut extents: Vec<Extent> = Vec::new();
        for place in places.iter() {
            let at = place.range();
            let both = at.start.max(range.start)..at.end.min(range.end);
            if both.start >= both.end {
                continue;
            }
            let kind = match place.run {
                Run::Hole(_) => ExtentKind::Hole,
                Run::Zeros(_) => ExtentKind::Zero,
                Run::Chunks { .. } => ExtentKind::Data,
            };
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.range.end = both.end,
                _ => extents.push(Extent { range: both, kind, change: ChangeState::Unknown }),
            }
        }
        Ok(extents)
    }

    fn is_at_hand(&self, range: Range<u64>) -> bool {
        if range.is_empty() || self.check(&range).is_err() {
            return true;
        }
        let Some(places) = self.kept(&range) else { return false };
        let touched = places.iter().map(|place| (place, place.range()));
        let mut touched = touched.filter(|(_, at)| at.start < range.end && range.start < at.end);
        touched.all(|(place, at)| match (&place.run, place.chunks.get()) {
            (Run::Chunks { .. }, Some(chunks)) => {
                let within = range.start.max(at.start) - at.start..range.end.min(at.end) - at.start;
                chunks.segments(&within).all(|ordinal| self.fetch.has_segment(&chunks.group, ordinal))
            }
            (Run::Chunks { .. }, None) => false,
            _ => true,
        })
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = offset..offset.saturating_add(buffer.len() as u64);
        self.check(&range)?;
        if range.is_empty() {
            return Ok(());
        }
        let places = self.places(&range)?;
        let first = places.partition_point(|place| place.range().end <= offset);
        let mut at = offset;
        for place in places.iter().skip(first).take_while(|place| place.start < range.end) {
            let end = place.range().end.min(range.end);
            let into = buffer.get_mut((at - offset) as usize..(end - offset) as usize).unwrap_or_default();
            self.read_run(place, at - place.start, into)?;
            at = end;
        }
        Ok(())
    }
}
