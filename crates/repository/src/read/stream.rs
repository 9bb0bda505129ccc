//! Stored content as a stream.

use std::sync::Arc;

use mainstay_core::{Error, Open, Piece, Result, StreamEnd, StreamReader};

use super::recipe::{Runs, check_run};
use crate::fetch::{Fetch, MetaPages, Opened};
use crate::format::directory::Directory;
use crate::format::item::Recipe;
use crate::format::run::Run;
use crate::format::segment::GroupId;

/// Opens the content of a stored item.
pub(crate) struct StoredContent {
    pub(crate) fetch: Arc<Fetch>,
    pub(crate) recipe: Recipe,
}

impl Open for StoredContent {
    fn open(&self) -> Result<Box<dyn StreamReader>> {
        Ok(Box::new(StoredStream {
            runs: Runs::of(&MetaPages::new(&self.fetch), &self.recipe)?,
            fetch: Arc::clone(&self.fetch),
            chunks: None,
            chunk: None,
            zeros: 0,
        }))
    }
}

struct StoredStream {
    fetch: Arc<Fetch>,
    runs: Runs,
    chunks: Option<Chunks>,
    chunk: Option<Chunk>,
    /// Zeros of the run under way that are still to be yielded as data.
    zeros: u64,
}

/// What is left of a run.
struct Chunks {
    group: GroupId,
    directory: Arc<Directory>,
    next: u32,
    end: u32,
}

/// What is left of a chunk: bytes `at..end` of its segment.
struct Chunk {
    segment: Opened,
    at: usize,
    end: usize,
}

impl StreamReader for StoredStream {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece> {
        let mut filled = 0;
        while filled < buffer.len() {
            let space = buffer.get_mut(filled..).unwrap_or_default();
            if let Some(chunk) = &mut self.chunk {
                filled += copy_from(chunk, space);
                if chunk.at == chunk.end {
                    self.chunk = None;
                }
            } else if self.zeros > 0 {
                let length = space.len().min(usize::try_from(self.zeros).unwrap_or(usize::MAX));
                space.get_mut(..length).unwrap_or_default().fill(0);
                self.zeros -= length as u64;
                filled += length;
            } else if let Some(chunk) = self.next_chunk()? {
                self.chunk = Some(chunk);
            } else if filled > 0 {
                // A run of another kind may follow; it comes with the next call.
                return Ok(Piece::Data(filled));
            } else {
                match self.runs.next()? {
                    None => return Ok(Piece::End),
                    Some(Run::Hole(length)) => return Ok(Piece::Hole(length)),
                    Some(Run::Zeros(length)) => self.zeros = length,
                    Some(Run::Chunks { group, first, count, digest, .. }) => {
                        let directory = self.fetch.directory(&group)?;
                        check_run(&directory, &group, first, count, &digest)?;
                        self.chunks = Some(Chunks { group, directory, next: first, end: first + count });
                    }
                }
            }
        }
        Ok(Piece::Data(filled))
    }

    fn finish(self: Box<Self>) -> Result<StreamEnd> {
        Ok(StreamEnd::Steady)
    }
}

fn copy_from(chunk: &mut Chunk, space: &mut [u8]) -> usize {
    let length = space.len().min(chunk.end - chunk.at);
    let from = chunk.segment.get(chunk.at..chunk.at + length).unwrap_or_default();
    if let Some(to) = space.get_mut(..from.len()) {
        to.copy_from_slice(from);
    }
    chunk.at += length;
    length
}

impl StoredStream {
    /// The next chunk of the run under way, checked against its id.
    fn next_chunk(&mut self) -> Result<Option<Chunk>> {
        let Some(chunks) = &mut self.chunks else { return Ok(None) };
        if chunks.next == chunks.end {
            self.chunks = None;
            return Ok(None);
        }
        let slot = chunks.next;
        let missing = || Error::integrity(format!("slot {slot} of group {} cannot be found", chunks.group));
        let place = chunks.directory.place(slot).ok_or_else(missing)?;
        let (id, _) = chunks.directory.chunk(slot).ok_or_else(missing)?;
        let segment = self.fetch.segment(&chunks.group, place.ordinal)?;
        let (at, end) = (place.offset as usize, place.offset as usize + place.length as usize);
        let bytes = segment.get(at..end).ok_or_else(missing)?;
        self.fetch.check_chunk(id, bytes)?;
        chunks.next += 1;
        Ok(Some(Chunk { segment, at, end }))
    }
}
