//! One connection in its transmission phase: requests out, replies in.

use std::io::{BufReader, Read as _, Write as _};
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Code, Error, Result};

use super::ExportInfo;
use super::read::Pieces;
use crate::stream::Stream;
use crate::wire::{
    CHUNK_MAGIC, Fields, Request, SIMPLE_REPLY_MAGIC, STRING_MAX, chunk, command, errno, violation,
};

/// A little more than the head of a reply and its offset; data goes past the buffer.
const BUFFER_LEN: usize = 8 << 10;
/// The longest reply to a question about block status: 2^20 extents, which the protocol names as the limit.
const STATUS_MAX: usize = 4 + (8 << 20);
/// The longest error chunk: its fields and the longest string.
const ERROR_MAX: usize = 14 + STRING_MAX;

pub(super) struct Session {
    stream: BufReader<Stream>,
    pub(super) info: Arc<ExportInfo>,
    structured: bool,
    /// Which number `base:allocation` has here.
    pub(super) allocation: Option<u32>,
    /// Which number the context of changes has here.
    pub(super) dirty: Option<u32>,
    /// A late part of a reply may be on its way, so no other request must follow.
    pub(super) spoiled: bool,
    cookie: u64,
}

/// Why a request failed.
pub(super) enum Failure {
    /// The server said no to this one; the connection lives.
    Refused { errno: u32, message: String },
    /// The connection cannot be used any longer.
    Broken(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Broken(error)
    }
}

pub(super) type Outcome<T> = std::result::Result<T, Failure>;

/// Consecutive stretches: length in bytes, flags.
pub(super) type Stretches = Vec<(u32, u32)>;

/// What a reply begins with.
pub(super) enum Head {
    Simple { errno: u32, cookie: u64 },
    Chunk { done: bool, kind: u16, cookie: u64, len: usize },
}

impl Session {
    pub(super) fn new(
        stream: Stream,
        info: Arc<ExportInfo>,
        structured: bool,
        allocation: Option<u32>,
        dirty: Option<u32>,
    ) -> Self {
        let stream = BufReader::with_capacity(BUFFER_LEN, stream);
        Self { stream, info, structured, allocation, dirty, spoiled: false, cookie: 0 }
    }

    /// All that is asked from now on has to be answered within `limit`.
    pub(super) fn within(&mut self, limit: Duration) -> Outcome<()> {
        let timer = self.stream.get_mut().all_within(limit);
        timer.map_err(|error| Failure::Broken(Error::io("cannot set a timer", error)))
    }

    /// Fills `buffer` from `offset` on; both are aligned to the block size.
    pub(super) fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Outcome<()> {
        Pieces::new(offset, buffer, self.info.payload_max).run(self)
    }

    /// A request that is answered by yes or no. `payload` goes with [`command::WRITE`] only.
    pub(super) fn act(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> Outcome<()> {
        let cookie = self.send(command, flags, offset, length, payload)?;
        let mut refused = None;
        loop {
            match self.head()? {
                Head::Simple { errno: 0, cookie: theirs } if theirs == cookie => return Ok(()),
                Head::Simple { errno, cookie: theirs } if theirs == cookie => {
                    return Err(Failure::Refused { errno, message: String::new() });
                }
                Head::Chunk { done, kind, cookie: theirs, len } if theirs == cookie => {
                    match self.no_payload(kind, len)? {
                        Some(_) if refused.is_some() => {
                            return Err(violation("it fails one request twice").into());
                        }
                        None if !done => return Err(violation("a last chunk is not the last").into()),
                        None => {}
                        failure => refused = failure,
                    }
                    if done {
                        return refused.map_or(Ok(()), Err);
                    }
                }
                _ => return Err(violation("a reply belongs to no request").into()),
            }
        }
    }

    /// The status of what lies from `offset` on: for `base:allocation` and for the context of changes, each when it
    /// was agreed on. The server may tell less than `length`, but at least one stretch of each.
    pub(super) fn status(
        &mut self,
        offset: u64,
        length: u32,
    ) -> Outcome<(Option<Stretches>, Option<Stretches>)> {
        let cookie = self.send(command::BLOCK_STATUS, 0, offset, length, &[])?;
        let (mut allocation, mut dirty, mut refused) = (None, None, None);
        loop {
            let Head::Chunk { done, kind, cookie: theirs, len } = self.head()? else {
                return Err(violation("a question about blocks is answered without any").into());
            };
            if theirs != cookie {
                return Err(violation("a reply belongs to no request").into());
            }
            if kind == chunk::BLOCK_STATUS {
                let (id, stretches) = self.stretches(len, length)?;
                let place = match Some(id) {
                    id if id == self.allocation => &mut allocation,
                    id if id == self.dirty => &mut dirty,
                    _ => return Err(violation("it tells about a context nobody asked for").into()),
                };
                if place.replace(stretches).is_some() {
                    return Err(violation("it tells about a context twice").into());
                }
            } else if let Some(failure) = self.no_payload(kind, len)? {
                if refused.replace(failure).is_some() {
                    return Err(violation("it fails one request twice").into());
                }
            } else if !done {
                return Err(violation("a last chunk is not the last").into());
            }
            if done {
                break;
            }
        }
        if let Some(failure) = refused {
            // QEMU says that this was all, and then goes on with the other context.
            self.spoiled = self.allocation.is_some() && self.dirty.is_some();
            return Err(failure);
        }
        if allocation.is_some() != self.allocation.is_some() || dirty.is_some() != self.dirty.is_some() {
            return Err(violation("it does not tell about every context").into());
        }
        Ok((allocation, dirty))
    }

    fn stretches(&mut self, len: usize, asked: u32) -> Outcome<(u32, Stretches)> {
        if !(12..=STATUS_MAX).contains(&len) || !(len - 4).is_multiple_of(8) {
            return Err(violation("a list of extents has an impossible length").into());
        }
        let payload = self.payload(len)?;
        let mut fields = Fields(&payload);
        let id = fields.u32()?;
        let mut stretches = Vec::with_capacity((len - 4) / 8);
        let mut told = 0_u64;
        while !fields.0.is_empty() {
            let (length, flags) = (fields.u32()?, fields.u32()?);
            if length == 0 || told >= asked.into() {
                return Err(violation("an extent is empty or not asked for").into());
            }
            told += u64::from(length);
            stretches.push((length, flags));
        }
        Ok((id, stretches))
    }

    pub(super) fn send(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> Outcome<u64> {
        self.cookie = self.cookie.wrapping_add(1);
        let request = Request { flags, command, cookie: self.cookie, offset, length };
        let stream = self.stream.get_mut();
        stream
            .write_all(&request.encode())
            .and_then(|()| stream.write_all(payload))
            .map_err(|error| Failure::Broken(Error::io("cannot send a request", error)))?;
        Ok(self.cookie)
    }

    pub(super) fn head(&mut self) -> Outcome<Head> {
        let mut head = [0; 16];
        self.fill(&mut head)?;
        let mut fields = Fields(&head);
        match fields.u32()? {
            SIMPLE_REPLY_MAGIC => Ok(Head::Simple { errno: fields.u32()?, cookie: fields.u64()? }),
            CHUNK_MAGIC if self.structured => {
                let (flags, kind, cookie) = (fields.u16()?, fields.u16()?, fields.u64()?);
                let mut len = [0; 4];
                self.fill(&mut len)?;
                let len = u32::from_be_bytes(len) as usize;
                Ok(Head::Chunk { done: flags & chunk::FLAG_DONE != 0, kind, cookie, len })
            }
            _ => Err(violation("a reply does not begin as one").into()),
        }
    }

    /// Reads the rest of a chunk that carries no content: nothing at all, or the server's no.
    pub(super) fn no_payload(&mut self, kind: u16, len: usize) -> Outcome<Option<Failure>> {
        if kind == chunk::NONE && len == 0 {
            return Ok(None);
        }
        if kind & chunk::ERROR == 0 || !(6..=ERROR_MAX).contains(&len) {
            return Err(violation("a chunk is of no kind that fits the request").into());
        }
        let payload = self.payload(len)?;
        let mut fields = Fields(&payload);
        let errno = fields.u32()?;
        let text_len = fields.u16()?.into();
        let message = String::from_utf8_lossy(fields.bytes(text_len)?).into_owned();
        Ok(Some(Failure::Refused { errno, message }))
    }

    pub(super) fn is_structured(&self) -> bool {
        self.structured
    }

    /// `len` has been checked.
    fn payload(&mut self, len: usize) -> Outcome<Vec<u8>> {
        let mut payload = vec![0; len];
        self.fill(&mut payload)?;
        Ok(payload)
    }

    pub(super) fn fill(&mut self, buffer: &mut [u8]) -> Outcome<()> {
        self.stream
            .read_exact(buffer)
            .map_err(|error| Failure::Broken(Error::io("the server's reply did not come", error)))
    }
}

impl Drop for Session {
    /// Says goodbye. Nobody waits for an answer, because there is none.
    fn drop(&mut self) {
        if self.within(Duration::from_secs(1)).is_ok() {
            let _best_effort = self.send(command::DISCONNECT, 0, 0, 0, &[]);
        }
        self.stream.get_ref().close();
    }
}

impl Failure {
    pub(super) fn into_error(self) -> Error {
        let (errno, message) = match self {
            Self::Broken(error) => return error,
            Self::Refused { errno, message } => (errno, message),
        };
        let (code, why) = match errno {
            errno::EPERM => (Code::Refused, "is not allowed".to_owned()),
            errno::EIO => (Code::Io, "failed in the server".to_owned()),
            errno::EINVAL => (Code::Io, "is invalid to the server".to_owned()),
            errno::ENOSPC => (Code::Full, "found no space".to_owned()),
            errno::EOVERFLOW => (Code::Io, "is too large for the server".to_owned()),
            errno::ESHUTDOWN => (Code::Io, "came while the server goes down".to_owned()),
            other => (Code::Io, format!("failed with error {other}")),
        };
        let error = Error::new(code, format!("the request {why}"));
        match message.trim() {
            "" => error,
            said => error.because(format!("the server says: {}", said.escape_debug())),
        }
    }
}

/// For callers that make no difference.
pub(super) fn plain<T>(outcome: Outcome<T>) -> Result<T> {
    outcome.map_err(Failure::into_error)
}
