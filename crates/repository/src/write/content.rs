//! Cuts content into chunks and chunks into runs.

use mainstay_core::{Error, Piece, Result, StreamEnd, StreamReader};

use super::groups::Spot;
use super::ingest::{Ingest, MetaSink};
use crate::cut::{ChunkId, Cutter, Profile, is_zero};
use crate::format::item::{INLINE_RUNS_MAX, Recipe};
use crate::format::page::{MapBuilder, PageKind};
use crate::format::run::{Run, RunDigest};
use crate::read::same::Part;

/// How much is read at once.
pub(crate) const READ_BYTES: usize = 2 << 20;

/// Collects runs; many of them move into pages of their own, so that memory does not grow with the content.
pub(crate) struct RecipeBuilder {
    runs: Vec<Run>,
    open: Option<OpenRun>,
    pages: Option<MapBuilder>,
    bytes: u64,
}

struct OpenRun {
    first: Spot,
    last: Spot,
    count: u32,
    bytes: u64,
    ids: Vec<ChunkId>,
}

/// Ids of a run under way are kept until its digest is taken; this bounds them.
const RUN_CHUNKS_MAX: u32 = 1 << 14;

impl RecipeBuilder {
    pub(crate) fn new() -> Self {
        Self { runs: Vec::new(), open: None, pages: None, bytes: 0 }
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes + self.open.as_ref().map_or(0, |open| open.bytes)
    }

    fn chunk(&mut self, id: ChunkId, spot: Spot, bytes: u64, ingest: &mut Ingest) -> Result<()> {
        ingest.compare(Part::Chunk(id))?;
        if let Some(open) = &mut self.open
            && open.last.group == spot.group
            && open.last.slot + 1 == spot.slot
            && open.count < RUN_CHUNKS_MAX
        {
            open.last = spot;
            open.count += 1;
            open.bytes += bytes;
            open.ids.push(id);
            return Ok(());
        }
        self.end_run(ingest)?;
        self.open = Some(OpenRun { first: spot, last: spot, count: 1, bytes, ids: vec![id] });
        Ok(())
    }

    fn end_run(&mut self, ingest: &mut Ingest) -> Result<()> {
        let Some(open) = self.open.take() else { return Ok(()) };
        let OpenRun { first, last, count, bytes, ids } = open;
        let run = Run::Chunks {
            group: first.group,
            first: first.slot,
            count,
            segment: first.segment,
            last_segment: last.segment,
            bytes,
            digest: RunDigest::of(&ids),
        };
        self.push(run, ingest)
    }

    /// Zeros, allocated or not; joined with zeros of the same kind before them.
    pub(crate) fn zeros(&mut self, run: Run, ingest: &mut Ingest) -> Result<()> {
        if run.length() == 0 {
            return Ok(());
        }
        ingest.compare(Part::Zeros(run.length()))?;
        self.end_run(ingest)?;
        match (self.runs.last_mut(), &run) {
            (Some(Run::Hole(length)), Run::Hole(more)) | (Some(Run::Zeros(length)), Run::Zeros(more)) => {
                *length += more;
                self.bytes += more;
                Ok(())
            }
            _ => self.push(run, ingest),
        }
    }

    /// A run of the parent, as it is.
    pub(crate) fn take_over(&mut self, run: Run, ingest: &mut Ingest) -> Result<()> {
        self.end_run(ingest)?;
        self.push(run, ingest)
    }

    /// A finished run.
    fn push(&mut self, run: Run, ingest: &mut Ingest) -> Result<()> {
        self.bytes += run.length();
        self.runs.push(run);
        if self.runs.len() <= INLINE_RUNS_MAX {
            return Ok(());
        }
        // The newest run stays, since zeros may still join it.
        let Some(newest) = self.runs.pop() else { return Ok(()) };
        let end = self.bytes - newest.length();
        self.spill(end, ingest)?;
        self.runs.push(newest);
        Ok(())
    }

    /// Moves the collected runs, which end at byte `end`, into pages.
    fn spill(&mut self, end: u64, ingest: &mut Ingest) -> Result<()> {
        let split_key = &ingest.domain.page_key;
        let pages = self.pages.get_or_insert_with(|| MapBuilder::new(PageKind::Recipe, split_key));
        let mut offset = end - self.runs.iter().map(Run::length).sum::<u64>();
        for run in self.runs.drain(..) {
            offset += run.length();
            pages.push(
                &offset.to_be_bytes(),
                &|out, groups| run.encode(out, groups),
                &mut MetaSink(ingest),
            )?;
        }
        Ok(())
    }

    pub(crate) fn finish(mut self, ingest: &mut Ingest) -> Result<Recipe> {
        self.end_run(ingest)?;
        if self.pages.is_none() {
            return Ok(Recipe::Inline(self.runs));
        }
        self.spill(self.bytes, ingest)?;
        let Some(pages) = self.pages else { return Ok(Recipe::Inline(self.runs)) };
        match pages.finish(&mut MetaSink(ingest))? {
            Some(root) => Ok(Recipe::Pages { root, bytes: self.bytes }),
            None => Ok(Recipe::Inline(Vec::new())),
        }
    }
}

/// Pages that change where they are: a multiple of every page size of a database, small enough that a changed one costs
/// little.
const PAGES_BYTES: usize = 16 << 10;

#[derive(Clone, Copy)]
enum Cuts {
    AlongContent,
    Fixed,
}

/// Reads whole bodies through one buffer.
pub(crate) struct ContentReader {
    pub(super) cutter: Cutter,
    pub(super) profile: Profile,
    pub(super) buffer: Vec<u8>,
}

/// How far a body is, in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Moved {
    /// Of its length.
    pub(crate) done: u64,
    /// Read from the source.
    pub(crate) read: u64,
}

/// Told how far a body is, as often as a buffer is full.
pub(crate) type Watch<'a> = &'a mut dyn FnMut(Moved, &mut Ingest) -> Result<()>;

/// What became of a body.
pub(crate) enum Outcome {
    Read(Content),
    /// The source could not read it; the repository is well.
    Unreadable(Error),
}

pub(crate) struct Content {
    pub(crate) recipe: Recipe,
    /// Bytes read from the source; the rest was taken over from the parent.
    pub(crate) read: u64,
    pub(crate) end: StreamEnd,
    /// Where the source was found to be wrong about what is unchanged.
    pub(crate) lied: Option<u64>,
}

impl ContentReader {
    pub(crate) fn new(cut_key: &[u8; 32], profile: Profile) -> Self {
        Self { cutter: Cutter::new(cut_key, profile), profile, buffer: vec![0; READ_BYTES + profile.max] }
    }

    pub(crate) fn stream(
        &mut self,
        reader: Box<dyn StreamReader>,
        ingest: &mut Ingest,
        watch: Watch<'_>,
    ) -> Result<Outcome> {
        self.front_to_back(reader, Cuts::AlongContent, ingest, watch)
    }

    /// As [`ContentReader::stream`], cut at multiples of [`PAGES_BYTES`].
    pub(crate) fn pages(
        &mut self,
        reader: Box<dyn StreamReader>,
        ingest: &mut Ingest,
        watch: Watch<'_>,
    ) -> Result<Outcome> {
        self.front_to_back(reader, Cuts::Fixed, ingest, watch)
    }

    fn front_to_back(
        &mut self,
        mut reader: Box<dyn StreamReader>,
        cuts: Cuts,
        ingest: &mut Ingest,
        watch: Watch<'_>,
    ) -> Result<Outcome> {
        let mut recipe = RecipeBuilder::new();
        let mut held = 0;
        loop {
            let space = self.buffer.get_mut(held..).unwrap_or_default();
            let piece = match reader.read(space) {
                Ok(piece) => piece,
                Err(error) => return Ok(Outcome::Unreadable(error)),
            };
            match piece {
                Piece::Data(length) => {
                    held += length.min(space.len());
                    if held + self.profile.max > self.buffer.len() {
                        held = self.cut(held, (cuts, false), &mut recipe, ingest)?;
                        watch(Moved { done: recipe.bytes(), read: recipe.bytes() }, ingest)?;
                    }
                }
                Piece::Hole(length) => {
                    self.cut(held, (cuts, true), &mut recipe, ingest)?;
                    held = 0;
                    recipe.zeros(Run::Hole(length), ingest)?;
                    watch(Moved { done: recipe.bytes(), read: recipe.bytes() }, ingest)?;
                }
                Piece::End => break,
            }
        }
        self.cut(held, (cuts, true), &mut recipe, ingest)?;
        let end = match reader.finish() {
            Ok(end) => end,
            Err(error) => return Ok(Outcome::Unreadable(error)),
        };
        let read = recipe.bytes();
        Ok(Outcome::Read(Content { recipe: recipe.finish(ingest)?, read, end, lied: None }))
    }

    /// Cuts the first `held` bytes of the buffer; unless they are the `last`, keeps what may not be cut yet.
    /// Returns how many are kept.
    fn cut(
        &mut self,
        held: usize,
        (cuts, last): (Cuts, bool),
        recipe: &mut RecipeBuilder,
        ingest: &mut Ingest,
    ) -> Result<usize> {
        let mut start = 0;
        while start < held && (last || held - start >= self.profile.max) {
            let data = self.buffer.get(start..held).unwrap_or_default();
            let length = match cuts {
                Cuts::AlongContent => self.cutter.cut(data),
                Cuts::Fixed => data.len().min(PAGES_BYTES),
            };
            put(data.get(..length).unwrap_or_default(), recipe, ingest)?;
            start += length.max(1);
        }
        self.buffer.copy_within(start..held, 0);
        Ok(held - start)
    }
}

pub(crate) fn put(chunk: &[u8], recipe: &mut RecipeBuilder, ingest: &mut Ingest) -> Result<()> {
    if is_zero(chunk) {
        return recipe.zeros(Run::Zeros(chunk.len() as u64), ingest);
    }
    let (id, spot) = ingest.put_chunk(chunk)?;
    recipe.chunk(id, spot, chunk.len() as u64, ingest)
}
