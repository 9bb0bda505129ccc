//! What a worker does: one request in, the bytes of its reply out.

use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{Blocks, Code, Error, ExtentKind};

use super::Export;
use super::export::count;
use super::handshake::ALLOCATION_ID;
use crate::blocks::WritableBlocks;
use crate::wire::{
    CHUNK_LEN, Request, SIMPLE_REPLY_MAGIC, STATE_HOLE, STATE_ZERO, chunk, chunk_head, command, errno,
};

/// Reads shorter than this, in bytes, are not worth a look at the extents.
const SPARSE_READ_MIN: u32 = 64 << 10;
/// Holes shorter than this, in bytes, are sent as the zeros they are.
const HOLE_MIN: u64 = 4 << 10;
/// How far one answer about block status reaches at most, in bytes. The client asks again for the rest.
const STATUS_REACH: u64 = 1 << 30;
/// Extents are looked up by this much at first, in bytes, and by twice as much each time after: QEMU wants one extent
/// at a time, and a device of many small ones must not cost much memory.
const STATUS_STEP: u64 = 1 << 20;
const STATUS_STEP_MAX: u64 = 64 << 20;
/// Extents in one answer.
const STATUS_EXTENTS_MAX: usize = 4096;
/// The memory of an answer about block status, in bytes.
pub(super) const STATUS_COST: usize = 8 * STATUS_EXTENTS_MAX;
/// Zeros are written by this much at once, in bytes, when they must not become a hole.
const ZEROS_LEN: usize = 256 << 10;
/// The longest message of an error, in bytes.
const MESSAGE_MAX: usize = 500;

pub(super) struct Task {
    pub(super) exports: Arc<Vec<Export>>,
    pub(super) index: usize,
    pub(super) structured: bool,
    pub(super) allocation: bool,
    pub(super) payload_max: u32,
    pub(super) request: Request,
    pub(super) payload: Vec<u8>,
}

/// Why a request is not done: an error value of the protocol, and words for people.
struct Refusal(u32, String);

impl Refusal {
    fn new(errno: u32, why: &str) -> Self {
        Self(errno, why.into())
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let errno = match error.code() {
            Code::Full => errno::ENOSPC,
            Code::Refused | Code::NoPower => errno::EPERM,
            Code::Usage => errno::EINVAL,
            _ => errno::EIO,
        };
        Self(errno, error.chain().join(": "))
    }
}

type Answer<T> = Result<T, Refusal>;

impl Task {
    pub(super) fn answer(&self) -> Vec<u8> {
        let done = self.check().and_then(|range| match self.request.command {
            command::READ => self.read(range),
            command::BLOCK_STATUS => self.status(range),
            _ => self.change(range).map(|()| self.simple(0)),
        });
        done.unwrap_or_else(|refusal| self.refuse(&refusal))
    }

    /// Whether this is a read of no more than `length_max` bytes that has to wait for nothing.
    pub(super) fn is_at_hand(&self, length_max: u32) -> bool {
        let is_short = self.request.command == command::READ && self.request.length <= length_max;
        is_short && self.check().is_ok_and(|range| self.export().blocks().is_at_hand(range))
    }

    /// For a request that ended in a panic.
    pub(super) fn failed(&self) -> Vec<u8> {
        self.refuse(&Refusal::new(errno::EIO, "the server made a mistake"))
    }

    fn export(&self) -> &Export {
        &self.exports[self.index]
    }

    /// Whether the request can be done at all.
    fn check(&self) -> Answer<Range<u64>> {
        let Request { flags, command, offset, length, .. } = self.request;
        let writable = self.export().writable_blocks().is_some();
        let allowed = match command {
            command::READ if self.structured => command::FLAG_DF,
            command::READ | command::WRITE | command::TRIM | command::FLUSH => 0,
            command::WRITE_ZEROES => command::FLAG_NO_HOLE,
            command::BLOCK_STATUS if self.allocation => command::FLAG_REQ_ONE,
            _ => return Err(Refusal::new(errno::EINVAL, "there is no such command here")),
        };
        let allowed = if writable { allowed | command::FLAG_FUA } else { allowed };
        if flags & !allowed != 0 {
            return Err(Refusal::new(errno::EINVAL, "the command has no such flag here"));
        }
        let writes = matches!(command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        if writes && !writable {
            return Err(Refusal::new(errno::EPERM, "the export is read-only"));
        }
        let range = offset..offset.saturating_add(length.into());
        if range.end > self.export().blocks().size() {
            let errno = if writes { errno::ENOSPC } else { errno::EINVAL };
            return Err(Refusal::new(errno, "the request reaches beyond the end"));
        }
        let carries = matches!(command, command::READ | command::WRITE);
        let provisions = flags & command::FLAG_NO_HOLE != 0;
        if (carries || provisions) && length > self.payload_max {
            return Err(Refusal::new(errno::EOVERFLOW, "the request is too long"));
        }
        Ok(range)
    }

    fn read(&self, range: Range<u64>) -> Answer<Vec<u8>> {
        let export = self.export();
        export.observe(&range);
        let (blocks, length) = (export.blocks(), self.request.length);
        let mut reply = Vec::with_capacity(length as usize + CHUNK_LEN + 8);
        if !self.structured {
            reply.extend(self.simple(0));
            append(&mut reply, blocks, &range)?;
        } else if range.is_empty() {
            reply.extend(chunk_head(chunk::FLAG_DONE, chunk::NONE, self.request.cookie, 0));
        } else {
            let whole = length < SPARSE_READ_MIN || self.request.flags & command::FLAG_DF != 0;
            let parts = if whole { vec![(range.clone(), false)] } else { parts(blocks, range.clone())? };
            for (part, is_hole) in parts {
                self.content(&mut reply, &part, is_hole, part.end == range.end)?;
            }
        }
        count(&export.tally.reads, 1);
        count(&export.tally.bytes_read, length.into());
        Ok(reply)
    }

    /// One chunk of a structured reply to a read.
    fn content(&self, reply: &mut Vec<u8>, part: &Range<u64>, is_hole: bool, last: bool) -> Answer<()> {
        let cookie = self.request.cookie;
        // Everything has been read before anything is sent, so the last chunk can say that it is.
        let flags = if last { chunk::FLAG_DONE } else { 0 };
        let len = u32::try_from(part.end - part.start).unwrap_or(u32::MAX);
        if is_hole {
            reply.extend(chunk_head(flags, chunk::OFFSET_HOLE, cookie, 12));
            reply.extend(part.start.to_be_bytes());
            reply.extend(len.to_be_bytes());
            return Ok(());
        }
        reply.extend(chunk_head(flags, chunk::OFFSET_DATA, cookie, len.saturating_add(8)));
        reply.extend(part.start.to_be_bytes());
        append(reply, self.export().blocks(), part)
    }

    fn status(&self, range: Range<u64>) -> Answer<Vec<u8>> {
        if range.is_empty() {
            return Err(Refusal::new(errno::EINVAL, "a status of nothing"));
        }
        let one = self.request.flags & command::FLAG_REQ_ONE != 0;
        let limit = if one { 1 } else { STATUS_EXTENTS_MAX };
        let extents = status(self.export().blocks(), range, limit)?;
        let len = u32::try_from(4 + 8 * extents.len()).unwrap_or(u32::MAX);
        let mut reply = chunk_head(chunk::FLAG_DONE, chunk::BLOCK_STATUS, self.request.cookie, len).to_vec();
        reply.extend(ALLOCATION_ID.to_be_bytes());
        for (length, state) in extents {
            reply.extend(length.to_be_bytes());
            reply.extend(state.to_be_bytes());
        }
        Ok(reply)
    }

    /// Everything that is answered by yes or no.
    fn change(&self, range: Range<u64>) -> Answer<()> {
        let export = self.export();
        let Some(blocks) = export.writable_blocks() else {
            // A flush of what cannot be written.
            return Ok(());
        };
        let flags = self.request.flags;
        match self.request.command {
            command::WRITE => blocks.write_at(range.start, &self.payload)?,
            command::WRITE_ZEROES if flags & command::FLAG_NO_HOLE != 0 => provision(blocks, range)?,
            command::WRITE_ZEROES | command::TRIM => blocks.zero(range)?,
            _ => {
                blocks.flush()?;
                count(&export.tally.flushes, 1);
                return Ok(());
            }
        }
        if flags & command::FLAG_FUA != 0 {
            blocks.flush()?;
        }
        count(&export.tally.writes, 1);
        count(&export.tally.bytes_written, self.request.length.into());
        Ok(())
    }

    fn simple(&self, errno: u32) -> Vec<u8> {
        let mut reply = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
        reply.extend(errno.to_be_bytes());
        reply.extend(self.request.cookie.to_be_bytes());
        reply
    }

    fn refuse(&self, Refusal(errno, why): &Refusal) -> Vec<u8> {
        count(&self.export().tally.errors, 1);
        if !self.structured {
            return self.simple(*errno);
        }
        let end = why.floor_char_boundary(MESSAGE_MAX);
        let message = why.as_bytes().get(..end).unwrap_or_default();
        let len = u16::try_from(message.len()).unwrap_or(0);
        let head = chunk_head(chunk::FLAG_DONE, chunk::PLAIN_ERROR, self.request.cookie, u32::from(len) + 6);
        let mut reply = head.to_vec();
        reply.extend(errno.to_be_bytes());
        reply.extend(len.to_be_bytes());
        reply.extend(message);
        reply
    }
}

/// Reads `range` to the end of `reply`.
fn append(reply: &mut Vec<u8>, blocks: &dyn Blocks, range: &Range<u64>) -> Answer<()> {
    let start = reply.len();
    let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
    reply.resize(start.saturating_add(len), 0);
    blocks.read_at(range.start, &mut reply[start..])?;
    Ok(())
}

/// A range as data and holes that are worth it; true for a hole.
fn parts(blocks: &dyn Blocks, range: Range<u64>) -> Answer<Vec<(Range<u64>, bool)>> {
    let mut parts: Vec<(Range<u64>, bool)> = Vec::new();
    let mut at = range.start;
    for extent in blocks.extents(range.clone())? {
        let end = extent.range.end.min(range.end);
        if end <= at {
            continue;
        }
        let known = extent.range.start <= at && extent.kind != ExtentKind::Data;
        let is_hole = known && end - at >= HOLE_MIN;
        match parts.last_mut() {
            Some((last, kind)) if *kind == is_hole => last.end = end,
            _ => parts.push((at..end, is_hole)),
        }
        at = end;
    }
    if at < range.end {
        parts.push((at..range.end, false));
    }
    Ok(parts)
}

/// Lengths and states from the start of `range` on, at most `limit` of them; at least one.
fn status(blocks: &dyn Blocks, range: Range<u64>, limit: usize) -> Answer<Vec<(u32, u32)>> {
    let mut told: Vec<(u32, u32)> = Vec::new();
    let end = range.end.min(range.start.saturating_add(STATUS_REACH));
    let (mut at, mut step_len) = (range.start, STATUS_STEP);
    while at < end {
        let step = at..end.min(at.saturating_add(step_len));
        step_len = (2 * step_len).min(STATUS_STEP_MAX);
        let mut extents = blocks.extents(step.clone())?;
        // Blocks that tell nothing hold data.
        let silent = extents.last().is_none_or(|last| last.range.end < step.end);
        extents.truncate(if silent { 0 } else { usize::MAX });
        let known = extents.iter().map(|extent| (extent.range.end.min(step.end), state(extent.kind)));
        for (until, state) in known.chain(silent.then_some((step.end, 0))) {
            let length = u32::try_from(until.saturating_sub(at)).unwrap_or(u32::MAX);
            let full = told.len() == limit;
            match told.last_mut() {
                _ if length == 0 => {}
                Some((last, same)) if *same == state => *last += length,
                _ if full => return Ok(told),
                _ => told.push((length, state)),
            }
            at = until;
        }
    }
    Ok(told)
}

fn state(kind: ExtentKind) -> u32 {
    match kind {
        ExtentKind::Data => 0,
        ExtentKind::Zero => STATE_ZERO,
        ExtentKind::Hole => STATE_HOLE | STATE_ZERO,
    }
}

/// Writes zeros that take up space.
fn provision(blocks: &dyn WritableBlocks, range: Range<u64>) -> Answer<()> {
    let zeros = vec![0; ZEROS_LEN];
    let mut at = range.start;
    while at < range.end {
        let len = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(zeros.len());
        blocks.write_at(at, &zeros[..len])?;
        at += len as u64;
    }
    Ok(())
}
