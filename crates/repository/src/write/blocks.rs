//! Bodies of blocks: disks and page files. Along the files that lie on a disk they are cut as the files themselves would be, so
//! that an image and a file backup of the same system share their chunks; the rest is cut at multiples of 16 KiB. What
//! the source says is unchanged is taken from the parent, chunk by chunk, without being read.

use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{
    Blocks, ChangeState, Code, Error, Extent, ExtentKind, Result, Run as FileRun, StreamEnd,
};

use super::content::{Content, ContentReader, Moved, Outcome, READ_BYTES, RecipeBuilder, Watch, put};
use super::ingest::Ingest;
use crate::cut::chunk_id;
use crate::fetch::MetaPages;
use crate::format::directory::Directory;
use crate::format::item::Recipe;
use crate::format::run::{Run, RunDigest};
use crate::format::segment::GroupId;
use crate::read::recipe::{Located, check_run};

/// Chunks where no file is known: small enough that a changed page costs little.
const BLOCK_BYTES: u64 = 16 << 10;
/// Extents and files are asked for in windows of this length, so that memory does not grow with the device.
const WINDOW_BYTES: u64 = 1 << 30;

/// What the parent point holds of a body.
pub(crate) struct Before {
    pub(crate) pages: MetaPages,
    pub(crate) recipe: Recipe,
    /// Of so many stretches taken over one is compared with the source; 0: none.
    pub(crate) compare_one_in: u32,
    /// Draws other stretches in every run.
    pub(crate) salt: u64,
}

/// A part of a body, in order and without gaps.
enum Part {
    /// Zeros, as a run.
    Zeros(Run),
    /// A run of the parent, at this offset.
    Kept(u64, Run),
    Read(Range<u64>),
}

/// A stretch to be cut in one way.
struct Stretch {
    range: Range<u64>,
    along_file: bool,
}

/// The source said that something is unchanged which is not: where.
struct Lie(u64);

/// What reading a part came to.
type Step = std::result::Result<(), Stop>;

enum Stop {
    /// The source cannot read; the repository is well.
    Source(Error),
    Lie(Lie),
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl ContentReader {
    /// Stores a body of blocks. [`Content::lied`] says where the source's word on what is unchanged was found to be
    /// wrong; then everything was read.
    pub(crate) fn blocks(
        &mut self,
        blocks: &dyn Blocks,
        before: Option<Before>,
        ingest: &mut Ingest,
        watch: Watch<'_>,
    ) -> Result<Outcome> {
        let mut lied = None;
        let mut before = before;
        loop {
            let mut body =
                Body { reader: self, blocks, ingest, watch, recipe: RecipeBuilder::new(), read: 0 };
            match body.run(before.take()) {
                Ok(()) => {
                    let Body { recipe, read, .. } = body;
                    let recipe = recipe.finish(ingest)?;
                    return Ok(Outcome::Read(Content { recipe, read, end: StreamEnd::Steady, lied }));
                }
                Err(Stop::Source(error)) => return Ok(Outcome::Unreadable(error)),
                Err(Stop::Failed(error)) => return Err(error),
                // Once more, and nothing is taken on trust.
                Err(Stop::Lie(Lie(at))) => lied = Some(at),
            }
        }
    }
}

struct Body<'a, 'w> {
    reader: &'a mut ContentReader,
    blocks: &'a dyn Blocks,
    ingest: &'a mut Ingest,
    watch: &'a mut (dyn FnMut(Moved, &mut Ingest) -> Result<()> + 'w),
    recipe: RecipeBuilder,
    read: u64,
}

impl Body<'_, '_> {
    fn run(&mut self, before: Option<Before>) -> Step {
        let size = self.blocks.size();
        let mut keeper = match before {
            Some(before) => Keeper::new(before)?,
            None => None,
        };
        let mut at = 0;
        while at < size {
            let window = at..size.min(at + WINDOW_BYTES);
            let extents = self.blocks.extents(window.clone()).map_err(Stop::Source)?;
            check_cover(&extents, &window)?;
            // Only a hint: without it there is less in common with other points, nothing more.
            let files = in_order(self.blocks.cuts(window.clone()).unwrap_or_default(), &window);
            for part in parts(&extents, keeper.as_mut(), self.ingest)? {
                self.store(part, &files, keeper.as_ref())?;
                self.tell()?;
            }
            at = window.end;
        }
        Ok(())
    }

    fn tell(&mut self) -> Result<()> {
        (self.watch)(Moved { done: self.recipe.bytes(), read: self.read }, self.ingest)
    }

    fn store(&mut self, part: Part, files: &[FileRun], keeper: Option<&Keeper>) -> Step {
        match part {
            Part::Zeros(run) => self.recipe.zeros(run, self.ingest)?,
            Part::Kept(at, run) => {
                if keeper.is_some_and(|keeper| keeper.is_drawn(at)) {
                    self.compare(at, &run)?;
                }
                if let Run::Chunks { group, segment, last_segment, .. } = &run {
                    self.ingest.reach(group, *segment, *last_segment);
                }
                self.recipe.take_over(run, self.ingest)?;
            }
            Part::Read(range) => self.cut(range, files)?,
        }
        Ok(())
    }

    /// Whether the source still holds, at `at`, the chunks of `run`.
    fn compare(&mut self, at: u64, run: &Run) -> Step {
        let Run::Chunks { group, first, count, .. } = run else { return Ok(()) };
        let Some(directory) = directory(self.ingest, group)? else { return Ok(()) };
        let mut at = at;
        for slot in *first..first.saturating_add(*count) {
            let Some((id, length)) = directory.chunk(slot) else { return Ok(()) };
            let Some(buffer) = self.reader.buffer.get_mut(..*length as usize) else { return Ok(()) };
            self.blocks.read_at(at, buffer).map_err(Stop::Source)?;
            self.read += u64::from(*length);
            if chunk_id(&self.ingest.domain.id_key, buffer) != *id {
                return Err(Stop::Lie(Lie(at)));
            }
            at += u64::from(*length);
        }
        Ok(())
    }

    /// Reads a range through the buffer and cuts it.
    fn cut(&mut self, range: Range<u64>, files: &[FileRun]) -> Step {
        // The buffer holds `held` bytes of the device from `base` on.
        let (mut base, mut held) = (range.start, 0);
        for stretch in stretches(&range, files) {
            let mut at = stretch.range.start;
            while at < stretch.range.end {
                let wanted = (stretch.range.end - at).min(self.reader.profile.max as u64);
                if base + held < at + wanted {
                    held = self.refill(at, base, held, range.end)?;
                    base = at;
                }
                let start = (at - base) as usize;
                let end = (stretch.range.end - base).min(held) as usize;
                let data = self.reader.buffer.get(start..end).unwrap_or_default();
                let length = if stretch.along_file {
                    self.reader.cutter.cut(data)
                } else {
                    (BLOCK_BYTES - at % BLOCK_BYTES).min(data.len() as u64) as usize
                };
                put(data.get(..length).unwrap_or_default(), &mut self.recipe, self.ingest)?;
                at += length.max(1) as u64;
            }
        }
        Ok(())
    }

    /// Moves what is left from `at` on to the front of the buffer and reads on behind it, up to `end`. Returns how
    /// many bytes of the device the buffer then holds.
    fn refill(&mut self, at: u64, base: u64, held: u64, end: u64) -> std::result::Result<u64, Stop> {
        self.tell()?;
        let left = (base + held).saturating_sub(at);
        let from = (at - base).min(held) as usize;
        self.reader.buffer.copy_within(from..held as usize, 0);
        let more = (end - at - left).min(READ_BYTES as u64);
        let space = self.reader.buffer.get_mut(left as usize..(left + more) as usize).unwrap_or_default();
        self.blocks.read_at(at + left, space).map_err(Stop::Source)?;
        self.read += more;
        Ok(left + more)
    }
}

/// Errors: a source that does not keep its contract.
fn check_cover(extents: &[Extent], window: &Range<u64>) -> Result<()> {
    let mut at = window.start;
    for extent in extents {
        if extent.range.start != at || extent.range.end <= at {
            return Err(Error::bug(format!("the extents of a body do not cover byte {at}")));
        }
        at = extent.range.end;
    }
    if at == window.end { Ok(()) } else { Err(Error::bug("the extents of a body do not end with it")) }
}

/// The runs of files clipped to the window, in order and apart from each other, those of one file that follow each other
/// joined. They may come from a hostile image.
fn in_order(mut runs: Vec<FileRun>, window: &Range<u64>) -> Vec<FileRun> {
    runs.sort_unstable_by_key(|run| run.image.start);
    let mut kept: Vec<FileRun> = Vec::with_capacity(runs.len());
    for mut run in runs {
        let cut_off = window.start.saturating_sub(run.image.start);
        run.file_offset = run.file_offset.saturating_add(cut_off);
        run.image = run.image.start.max(window.start)..run.image.end.min(window.end);
        if run.image.start >= run.image.end {
            continue;
        }
        match kept.last_mut() {
            Some(last) if run.image.start < last.image.end => {}
            Some(last)
                if run.image.start == last.image.end
                    && run.file == last.file
                    && last.file_offset.checked_add(last.image.end - last.image.start)
                        == Some(run.file_offset) =>
            {
                last.image.end = run.image.end;
            }
            _ => kept.push(run),
        }
    }
    kept
}

/// `range` as stretches along files and stretches between them.
fn stretches(range: &Range<u64>, files: &[FileRun]) -> Vec<Stretch> {
    let first = files.partition_point(|run| run.image.end <= range.start);
    let mut found = Vec::new();
    let mut at = range.start;
    for run in files.iter().skip(first).take_while(|run| run.image.start < range.end) {
        let (start, end) = (run.image.start.max(at), run.image.end.min(range.end));
        if start > at {
            found.push(Stretch { range: at..start, along_file: false });
        }
        found.push(Stretch { range: start..end, along_file: true });
        at = end;
    }
    if at < range.end {
        found.push(Stretch { range: at..range.end, along_file: false });
    }
    found
}

/// Decides what is taken over and what is read.
fn parts(extents: &[Extent], mut keeper: Option<&mut Keeper>, ingest: &mut Ingest) -> Result<Vec<Part>> {
    let mut parts = Vec::new();
    let mut extents = extents.iter().peekable();
    while let Some(extent) = extents.next() {
        let mut range = extent.range.clone();
        let same = |next: &&Extent| next.kind == extent.kind && next.change == extent.change;
        while let Some(next) = extents.next_if(same) {
            range.end = next.range.end;
        }
        let length = range.end - range.start;
        match (extent.kind, extent.change, &mut keeper) {
            (ExtentKind::Hole, ..) => parts.push(Part::Zeros(Run::Hole(length))),
            (ExtentKind::Zero, ..) => parts.push(Part::Zeros(Run::Zeros(length))),
            (ExtentKind::Data, ChangeState::Unchanged, Some(keeper)) => {
                keeper.keep(range, ingest, &mut parts)?;
            }
            (ExtentKind::Data, ..) => push_read(&mut parts, range),
        }
    }
    Ok(parts)
}

fn push_read(parts: &mut Vec<Part>, range: Range<u64>) {
    if range.is_empty() {
        return;
    }
    match parts.last_mut() {
        Some(Part::Read(last)) if last.end == range.start => last.end = range.end,
        _ => parts.push(Part::Read(range)),
    }
}

/// Takes chunks over from the parent.
struct Keeper {
    runs: Located,
    compare_one_in: u32,
    salt: u64,
}

impl Keeper {
    /// `None` when the parent's recipe is damaged: then everything is read.
    fn new(before: Before) -> Result<Option<Self>> {
        let Before { pages, recipe, compare_one_in, salt } = before;
        let runs = unless_damaged(Located::of(&pages, &recipe))?;
        Ok(runs.map(|runs| Self { runs, compare_one_in, salt }))
    }

    fn is_drawn(&self, at: u64) -> bool {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.salt.to_le_bytes());
        hasher.update(&at.to_le_bytes());
        self.compare_one_in > 0
            && crate::index::tag(hasher.finalize().as_bytes()).is_multiple_of(u64::from(self.compare_one_in))
    }

    /// Covers `range`, which is unchanged, with whole chunks of the parent; where there is none, or one reaches beyond
    /// the range or may not be relied on any more, it is read.
    fn keep(&mut self, range: Range<u64>, ingest: &mut Ingest, parts: &mut Vec<Part>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let Some((start, run)) = unless_damaged(self.runs.at(at))?.flatten() else { break };
            let end = range.end.min(start.saturating_add(run.length()));
            match &run {
                Run::Hole(_) => parts.push(Part::Zeros(Run::Hole(end - at))),
                Run::Zeros(_) => parts.push(Part::Zeros(Run::Zeros(end - at))),
                Run::Chunks { .. } => {
                    let within = at..end;
                    match whole_chunks(start, &run, &within, ingest)? {
                        Some((kept_at, kept)) if is_usable(&kept, ingest) => {
                            push_read(parts, at..kept_at);
                            let kept_end = kept_at + kept.length();
                            parts.push(Part::Kept(kept_at, kept));
                            push_read(parts, kept_end..end);
                        }
                        _ => push_read(parts, within),
                    }
                }
            }
            at = end;
        }
        push_read(parts, at..range.end);
        Ok(())
    }
}

fn is_usable(run: &Run, ingest: &mut Ingest) -> bool {
    let Run::Chunks { group, segment, last_segment, .. } = run else { return false };
    ingest.groups.directory(group).is_some()
        || (*segment..=*last_segment).all(|segment| ingest.is_usable(group, segment))
}

/// The chunks of `run`, which starts at `start`, that lie wholly within `range`, as a run, and where it starts.
fn whole_chunks(
    start: u64,
    run: &Run,
    range: &Range<u64>,
    ingest: &mut Ingest,
) -> Result<Option<(u64, Run)>> {
    let Run::Chunks { group, first, count, digest, .. } = run else { return Ok(None) };
    if range.start <= start && start.saturating_add(run.length()) <= range.end {
        return Ok(Some((start, run.clone())));
    }
    let Some(directory) = directory(ingest, group)? else { return Ok(None) };
    if check_run(&directory, group, *first, *count, digest).is_err() {
        return Ok(None);
    }
    let mut at = start;
    let mut kept: Option<(u64, u32)> = None;
    let (mut slots, mut bytes) = (0, 0);
    for slot in *first..first.saturating_add(*count) {
        let length = directory.chunk(slot).map_or(0, |(_, length)| u64::from(*length));
        let end = at + length;
        if at >= range.start && end <= range.end {
            kept.get_or_insert((at, slot));
            slots += 1;
            bytes += length;
        }
        at = end;
    }
    let Some((kept_at, first)) = kept else { return Ok(None) };
    let ids = directory.chunks().get(first as usize..(first + slots) as usize).unwrap_or_default();
    let kept = Run::Chunks {
        group: *group,
        first,
        count: slots,
        segment: directory.ordinal_of(first),
        last_segment: directory.ordinal_of(first + slots - 1),
        bytes,
        digest: RunDigest::of(ids.iter().map(|(id, _)| id)),
    };
    Ok(Some((kept_at, kept)))
}

/// `None` when it is damaged or gone.
fn directory(ingest: &Ingest, group: &GroupId) -> Result<Option<Arc<Directory>>> {
    match ingest.groups.shared_directory(group) {
        Some(directory) => Ok(Some(directory)),
        None => unless_damaged(ingest.fetch.directory(group)),
    }
}

fn unless_damaged<T>(outcome: Result<T>) -> Result<Option<T>> {
    match outcome {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.code() == Code::Integrity => Ok(None),
        Err(error) => Err(error),
    }
}
