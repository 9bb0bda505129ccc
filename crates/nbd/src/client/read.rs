//! One read as several requests, so that a long one keeps the server busy while the first bytes arrive.

use std::collections::VecDeque;

use super::session::{Failure, Head, Outcome, Session};
use crate::wire::{Fields, chunk, command, violation};

/// What one request asks for at most, in bytes. Long enough that its head costs nothing, short enough that a server
/// with several threads can work on a few of them.
const PIECE_LEN: u32 = 1 << 20;
/// How many requests are on their way at once.
const WINDOW: usize = 8;
/// No piece may arrive in more parts than this.
const PARTS_MAX: usize = 4096;

/// The pieces of one read.
pub(super) struct Pieces<'a> {
    offset: u64,
    buffer: &'a mut [u8],
    piece_len: usize,
    asked: usize,
    waiting: VecDeque<Piece>,
    refused: Option<Failure>,
}

struct Piece {
    cookie: u64,
    /// Where it lies in the buffer.
    start: usize,
    len: usize,
    arrived: Arrived,
    failed: bool,
}

impl<'a> Pieces<'a> {
    pub(super) fn new(offset: u64, buffer: &'a mut [u8], payload_max: u32) -> Self {
        let piece_len = payload_max.min(PIECE_LEN) as usize;
        Self { offset, buffer, piece_len, asked: 0, waiting: VecDeque::new(), refused: None }
    }

    pub(super) fn run(mut self, session: &mut Session) -> Outcome<()> {
        loop {
            while self.waiting.len() < WINDOW && self.asked < self.buffer.len() && self.refused.is_none() {
                self.ask(session)?;
            }
            if self.waiting.is_empty() {
                return self.refused.map_or(Ok(()), Err);
            }
            self.receive(session)?;
        }
    }

    fn ask(&mut self, session: &mut Session) -> Outcome<()> {
        let (start, len) = (self.asked, self.piece_len.min(self.buffer.len() - self.asked));
        let length = u32::try_from(len).unwrap_or(u32::MAX);
        let cookie = session.send(command::READ, 0, self.offset + start as u64, length, &[])?;
        self.waiting.push_back(Piece { cookie, start, len, arrived: Arrived::default(), failed: false });
        self.asked += len;
        Ok(())
    }

    fn receive(&mut self, session: &mut Session) -> Outcome<()> {
        let head = session.head()?;
        let (Head::Simple { cookie, .. } | Head::Chunk { cookie, .. }) = head;
        let index = self.waiting.iter().position(|piece| piece.cookie == cookie);
        let index = index.ok_or_else(|| violation("a reply belongs to no request"))?;
        let piece = &mut self.waiting[index];
        let done = match head {
            Head::Simple { .. } if session.is_structured() => {
                return Err(violation("a read is answered in the old form").into());
            }
            Head::Simple { errno: 0, .. } => {
                session.fill(&mut self.buffer[piece.start..piece.start + piece.len])?;
                piece.arrived.add(0, piece.len)?;
                true
            }
            Head::Simple { errno, .. } => {
                piece.failed = true;
                self.refused.get_or_insert(Failure::Refused { errno, message: String::new() });
                true
            }
            Head::Chunk { done, kind, len, .. } => {
                if let Some(failure) = piece.chunk(session, kind, len, self.offset, self.buffer)? {
                    piece.failed = true;
                    self.refused.get_or_insert(failure);
                }
                done
            }
        };
        if done {
            if !piece.failed && piece.arrived.bytes != piece.len {
                return Err(violation("a read is answered in part").into());
            }
            self.waiting.remove(index);
        }
        Ok(())
    }
}

impl Piece {
    /// Takes one chunk of the reply; returns the server's no, if it is one.
    fn chunk(
        &mut self,
        session: &mut Session,
        kind: u16,
        len: usize,
        offset: u64,
        buffer: &mut [u8],
    ) -> Outcome<Option<Failure>> {
        match kind {
            chunk::OFFSET_DATA => {
                let mut at = [0; 8];
                let data_len = len.checked_sub(at.len()).ok_or_else(|| violation("a chunk is too short"))?;
                session.fill(&mut at)?;
                let at = self.place(u64::from_be_bytes(at), data_len, offset)?;
                session.fill(&mut buffer[at..at + data_len])?;
                Ok(None)
            }
            chunk::OFFSET_HOLE => {
                let mut hole = [0; 12];
                if len != hole.len() {
                    return Err(violation("a hole has an impossible length").into());
                }
                session.fill(&mut hole)?;
                let mut fields = Fields(&hole);
                let (at, hole_len) = (fields.u64()?, fields.u32()? as usize);
                let at = self.place(at, hole_len, offset)?;
                buffer[at..at + hole_len].fill(0);
                Ok(None)
            }
            kind => {
                self.arrived.count()?;
                session.no_payload(kind, len)
            }
        }
    }

    /// Where in the buffer the part of the reply lies that starts at `at` on the device, now that it has arrived.
    fn place(&mut self, at: u64, len: usize, offset: u64) -> Outcome<usize> {
        let first = offset + self.start as u64;
        let inside = at.checked_sub(first).and_then(|inside| usize::try_from(inside).ok());
        let inside = inside.filter(|inside| inside.checked_add(len).is_some_and(|end| end <= self.len));
        let inside = inside.ok_or_else(|| violation("it sends bytes that were not asked for"))?;
        self.arrived.add(inside, len)?;
        Ok(self.start + inside)
    }
}

/// Which parts of a piece have arrived: sorted, apart from each other.
#[derive(Default)]
struct Arrived {
    parts: Vec<(usize, usize)>,
    bytes: usize,
    chunks: usize,
}

impl Arrived {
    fn add(&mut self, start: usize, len: usize) -> Outcome<()> {
        self.count()?;
        let end = start + len;
        let index = self.parts.partition_point(|(_, before)| *before <= start);
        if len == 0 || self.parts.get(index).is_some_and(|(next, _)| *next < end) {
            return Err(violation("it sends bytes twice, or none").into());
        }
        let joins_before = index > 0 && self.parts[index - 1].1 == start;
        match (joins_before, self.parts.get(index).is_some_and(|(next, _)| *next == end)) {
            (true, true) => {
                let (_, last) = self.parts.remove(index);
                self.parts[index - 1].1 = last;
            }
            (true, false) => self.parts[index - 1].1 = end,
            (false, true) => self.parts[index].0 = start,
            (false, false) => self.parts.insert(index, (start, end)),
        }
        self.bytes += len;
        Ok(())
    }

    fn count(&mut self) -> Outcome<()> {
        self.chunks += 1;
        if self.chunks > PARTS_MAX {
            return Err(violation("a reply is in too many parts").into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Arrived;

    #[test]
    fn parts_arrive_in_any_order_but_only_once() {
        let mut arrived = Arrived::default();
        for (start, len) in [(10, 5), (0, 5), (20, 2), (15, 5), (5, 5)] {
            assert!(arrived.add(start, len).is_ok());
        }
        assert_eq!((arrived.parts.as_slice(), arrived.bytes), ([(0, 22)].as_slice(), 22));
        for (start, len) in [(0, 1), (21, 1), (19, 5), (30, 0)] {
            assert!(arrived.add(start, len).is_err(), "{start} {len}");
        }
    }
}
