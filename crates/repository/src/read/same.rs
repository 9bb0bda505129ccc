//! Whether two recipes make the same content: the same chunks in the same order, wherever they lie and however their
//! runs are divided.

use std::sync::Arc;

use mainstay_core::{Error, Result};

use super::recipe::Runs;
use crate::cut::ChunkId;
use crate::fetch::MetaPages;
use crate::format::directory::Directory;
use crate::format::item::Recipe;
use crate::format::run::Run;

/// A piece of content. Zeros may come in any number of pieces.
#[derive(Clone, Copy)]
pub(crate) enum Part {
    Chunk(ChunkId),
    Zeros(u64),
}

pub(crate) fn same(pages: &MetaPages, left: &Recipe, right: &Recipe) -> Result<bool> {
    if left == right {
        return Ok(true);
    }
    if left.bytes() != right.bytes() {
        return Ok(false);
    }
    let mut comparison = Comparison::with(pages, left)?;
    let mut runs = Runs::of(pages, right)?;
    while comparison.is_same
        && let Some(run) = runs.next()?
    {
        comparison.run(&run)?;
    }
    comparison.ends_here()
}

/// Content that comes piece by piece, compared with that of a recipe. Holds one run of the recipe at a time.
pub(crate) struct Comparison {
    pages: MetaPages,
    runs: Runs,
    /// What is left of the run under way.
    open: Option<Open>,
    is_same: bool,
}

enum Open {
    Chunks { directory: Arc<Directory>, next: u32, end: u32 },
    Zeros(u64),
}

impl Comparison {
    pub(crate) fn with(pages: &MetaPages, recipe: &Recipe) -> Result<Self> {
        Ok(Self { pages: pages.clone(), runs: Runs::of(pages, recipe)?, open: None, is_same: true })
    }

    /// Errors: those of reading the recipe that is compared with.
    pub(crate) fn feed(&mut self, part: Part) -> Result<()> {
        match part {
            Part::Chunk(id) => self.chunk(&id),
            Part::Zeros(length) => self.zeros(length),
        }
    }

    /// Whether everything was the same, and nothing is left.
    pub(crate) fn ends_here(mut self) -> Result<bool> {
        Ok(self.is_same && self.open()?.is_none())
    }

    fn run(&mut self, run: &Run) -> Result<()> {
        let Run::Chunks { group, first, count, digest, .. } = run else { return self.zeros(run.length()) };
        if self.open.is_none() {
            match self.runs.next()? {
                // Mostly the runs are divided alike, and no directory is needed.
                Some(Run::Chunks { count: known, digest: other, .. })
                    if (known, other) == (*count, *digest) =>
                {
                    return Ok(());
                }
                Some(other) => self.open = Some(self.begin(&other)?),
                None => self.is_same = false,
            }
        }
        let directory = self.pages.fetch.directory(group)?;
        for slot in *first..first.saturating_add(*count) {
            if !self.is_same {
                break;
            }
            self.chunk(&chunk_at(&directory, slot)?)?;
        }
        Ok(())
    }

    fn begin(&self, run: &Run) -> Result<Open> {
        Ok(match run {
            Run::Hole(length) | Run::Zeros(length) => Open::Zeros(*length),
            Run::Chunks { group, first, count, .. } => {
                let directory = self.pages.fetch.directory(group)?;
                Open::Chunks { directory, next: *first, end: first.saturating_add(*count) }
            }
        })
    }

    /// What is left of the run under way, or the next one.
    fn open(&mut self) -> Result<Option<&mut Open>> {
        if self.open.is_none()
            && let Some(run) = self.runs.next()?
        {
            self.open = Some(self.begin(&run)?);
        }
        Ok(self.open.as_mut())
    }

    fn chunk(&mut self, id: &ChunkId) -> Result<()> {
        let is_same = match self.open()? {
            Some(Open::Chunks { directory, next, end }) => {
                let is_same = chunk_at(directory, *next)? == *id;
                *next += 1;
                if next == end {
                    self.open = None;
                }
                is_same
            }
            Some(Open::Zeros(_)) | None => false,
        };
        self.is_same &= is_same;
        Ok(())
    }

    fn zeros(&mut self, mut length: u64) -> Result<()> {
        while length > 0 && self.is_same {
            match self.open()? {
                Some(Open::Zeros(left)) => {
                    let common = length.min(*left);
                    length -= common;
                    *left -= common;
                    if *left == 0 {
                        self.open = None;
                    }
                }
                Some(Open::Chunks { .. }) | None => self.is_same = false,
            }
        }
        Ok(())
    }
}

fn chunk_at(directory: &Directory, slot: u32) -> Result<ChunkId> {
    let chunk = directory.chunk(slot).map(|(id, _)| *id);
    chunk.ok_or_else(|| Error::integrity("a recipe names a slot that its group does not have"))
}
