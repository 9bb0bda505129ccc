//! An export over the network as blocks, with several connections.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use mainstay_core::{Blocks, ChangeState, Code, Error, Extent, ExtentKind, Result};

use super::extents::Extents;
use super::session::{Failure, Outcome, Session, plain};
use super::{Client, ExportInfo};
use crate::blocks::{WritableBlocks, check};
use crate::wire::{command, errno, flag};

/// What one request to zero or to trim covers, in bytes; aligned to every block size.
const ZERO_MAX: u64 = 1 << 30;

/// A connected export. Calls from several threads run side by side, one on each connection. Each call has the limit
/// of [`Client::limit`]; a call that waits for a free connection waits that long at most.
pub struct Remote {
    client: Client,
    info: Arc<ExportInfo>,
    pool: Mutex<Pool>,
    freed: Condvar,
    dirty: Option<String>,
    /// Asks for changes alone. Opened when the server does not tell about the rest.
    changes: Mutex<Option<Session>>,
    /// The server refuses to tell whether what has not changed is allocated.
    clean_is_opaque: AtomicBool,
    has_status: bool,
}

struct Pool {
    idle: Vec<Session>,
    /// Why this export can no longer be used.
    broken: Option<(Code, String)>,
}

impl Remote {
    pub(super) fn new(client: Client, sessions: Vec<Session>, dirty: Option<&str>) -> Self {
        let first = &sessions[0];
        Self {
            info: Arc::clone(&first.info),
            has_status: first.allocation.is_some() || first.dirty.is_some(),
            pool: Mutex::new(Pool { idle: sessions, broken: None }),
            freed: Condvar::new(),
            dirty: dirty.map(str::to_owned),
            changes: Mutex::new(None),
            clean_is_opaque: AtomicBool::new(false),
            client,
        }
    }

    pub fn info(&self) -> &ExportInfo {
        &self.info
    }

    /// How many connections are open and not in use.
    pub fn idle_connections(&self) -> usize {
        self.pool().idle.len()
    }

    /// Makes `range` read as zeros. With `allocate` the space stays reserved, where the server knows how.
    pub fn write_zeroes(&self, range: Range<u64>, allocate: bool) -> Result<()> {
        self.writing(&range)?;
        if !self.info.can(flag::WRITE_ZEROES) {
            return self.write_zeroes_by_hand(range);
        }
        // A server may have to write zeros that take up space, and then they are as long as a payload.
        let (flags, most) = match allocate {
            true => (command::FLAG_NO_HOLE, self.info.payload_max.into()),
            false => (0, ZERO_MAX),
        };
        self.each(range, most, |session, offset, length| {
            session.act(command::WRITE_ZEROES, flags, offset, length, &[])
        })
    }

    /// Tells the server that `range` is no longer needed; afterwards it may read as anything. Nothing happens where
    /// the server does not want to know.
    pub fn trim(&self, range: Range<u64>) -> Result<()> {
        self.writing(&range)?;
        if !self.info.can(flag::TRIM) {
            return Ok(());
        }
        self.each(range, ZERO_MAX, |session, offset, length| {
            session.act(command::TRIM, 0, offset, length, &[])
        })
    }

    fn write_zeroes_by_hand(&self, range: Range<u64>) -> Result<()> {
        let zeros = vec![0; self.info.payload_max.min(1 << 20) as usize];
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(zeros.len());
            self.write_at(at, &zeros[..len])?;
            at += len as u64;
        }
        Ok(())
    }

    fn each(
        &self,
        range: Range<u64>,
        most: u64,
        act: impl Fn(&mut Session, u64, u32) -> Outcome<()>,
    ) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(most);
            let length = u32::try_from(len).unwrap_or(u32::MAX);
            self.with(|session| act(session, at, length))?;
            at += len;
        }
        Ok(())
    }

    fn writing(&self, range: &Range<u64>) -> Result<()> {
        check(self.info.size, range)?;
        if self.info.read_only {
            return Err(Error::new(Code::Refused, format!("{} is read-only", self.client)));
        }
        let block = u64::from(self.info.block_size);
        if !range.start.is_multiple_of(block) || !range.end.is_multiple_of(block) {
            let what = format!("{} is written in whole blocks of {block} bytes only", self.client);
            return Err(Error::new(Code::Unsupported, what));
        }
        Ok(())
    }

    /// Runs `act` on a connection of its own.
    fn with<T>(&self, act: impl FnOnce(&mut Session) -> Outcome<T>) -> Result<T> {
        plain(self.attempt(act)).map_err(|error| self.trouble(error))
    }

    fn trouble(&self, error: Error) -> Error {
        error.during(format!("trouble with {}", self.client))
    }

    fn attempt<T>(&self, act: impl FnOnce(&mut Session) -> Outcome<T>) -> Outcome<T> {
        let mut session = self.take()?;
        let outcome = session.within(self.client.limit).and_then(|()| act(&mut session));
        let next = match &outcome {
            Err(Failure::Broken(error)) => Err((error.code(), error.chain().join(": "))),
            _ if session.spoiled => {
                // First, for servers that count connections.
                drop(session);
                self.reopen(None).map_err(|error| (error.code(), error.chain().join(": ")))
            }
            _ => Ok(session),
        };
        match next {
            Ok(session) => {
                self.pool().idle.push(session);
                self.freed.notify_one();
            }
            Err(why) => {
                self.pool().broken.get_or_insert(why);
                self.freed.notify_all();
            }
        }
        outcome
    }

    /// A connection with one context alone: `dirty`, or else `base:allocation`.
    fn reopen(&self, dirty: Option<&str>) -> Result<Session> {
        let session = self.client.session(self.client.limit, dirty, dirty.is_none())?;
        if session.dirty.is_some() != dirty.is_some() || session.info != self.info {
            return Err(Error::new(Code::Io, format!("{} is no longer what it was", self.client)));
        }
        Ok(session)
    }

    fn take(&self) -> Result<Session> {
        let waiting = |pool: &mut Pool| pool.idle.is_empty() && pool.broken.is_none();
        let (mut pool, _) = self
            .freed
            .wait_timeout_while(self.pool(), self.client.limit, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((code, why)) = &pool.broken {
            return Err(Error::new(*code, "the connection was lost earlier").because(why.clone()));
        }
        pool.idle.pop().ok_or_else(|| Error::new(Code::Io, "every connection stayed busy for too long"))
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For servers that tell what is allocated only where something has changed: asks for the changes alone, and then
    /// for each of them.
    fn extents_by_changes(&self, range: Range<u64>, dirty: &str) -> Result<Vec<Extent>> {
        let mut extents = Extents::new(range.clone());
        for Extent { range, change, .. } in self.changes(range, dirty)? {
            let mut inside = Extents::new(range.clone());
            let told = match change {
                ChangeState::Changed => self.attempt(|session| inside.ask(session)),
                _ => Ok(()),
            };
            match told {
                // What the server does not want to tell is read; so is the rest of what it told in part.
                Ok(()) | Err(Failure::Refused { .. }) => inside.push(range.end, ExtentKind::Data, change),
                Err(failure) => plain(Err(failure))?,
            }
            for extent in inside.into_list() {
                extents.push(extent.range.end, extent.kind, change);
            }
        }
        Ok(extents.into_list())
    }

    fn changes(&self, range: Range<u64>, dirty: &str) -> Result<Vec<Extent>> {
        let mut place = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut session = place.take().map_or_else(|| self.reopen(Some(dirty)), Ok)?;
        let mut changes = Extents::new(range);
        plain(session.within(self.client.limit).and_then(|()| changes.ask(&mut session)))?;
        *place = Some(session);
        Ok(changes.into_list())
    }
}

impl Blocks for Remote {
    fn size(&self) -> u64 {
        self.info.size
    }

    /// One call has one limit, so ask for what the server can tell in that time: a few GiB, not a whole large disk.
    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        check(self.info.size, &range)?;
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let mut extents = Extents::new(range.clone());
        if !self.has_status {
            extents.push(range.end, ExtentKind::Data, ChangeState::Unknown);
            return Ok(extents.into_list());
        }
        if !self.clean_is_opaque.load(Ordering::Relaxed) {
            match (self.attempt(|session| extents.ask(session)), &self.dirty) {
                (Ok(()), _) => return Ok(extents.into_list()),
                // QEMU's snapshot-access with a bitmap answers so for all that is not in the bitmap.
                (Err(Failure::Refused { errno: errno::EINVAL, .. }), Some(_)) => {
                    self.clean_is_opaque.store(true, Ordering::Relaxed);
                }
                (Err(failure), _) => return Err(self.trouble(failure.into_error())),
            }
        }
        self.extents_by_changes(range, self.dirty.as_deref().unwrap_or_default())
            .map_err(|error| self.trouble(error))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let range = offset..offset.saturating_add(buffer.len() as u64);
        check(self.info.size, &range)?;
        let block = u64::from(self.info.block_size);
        if range.start.is_multiple_of(block) && range.end.is_multiple_of(block) {
            return self.with(|session| session.read(offset, buffer));
        }
        let start = range.start / block * block;
        let skip = usize::try_from(range.start - start).unwrap_or_default();
        let whole = range.end.next_multiple_of(block) - start;
        let whole =
            usize::try_from(whole).map_err(|error| Error::bug("a read is too long").because(error))?;
        let mut blocks = vec![0; whole];
        self.with(|session| session.read(start, &mut blocks))?;
        buffer.copy_from_slice(&blocks[skip..skip + buffer.len()]);
        Ok(())
    }
}

impl WritableBlocks for Remote {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.writing(&(offset..offset.saturating_add(data.len() as u64)))?;
        let mut at = offset;
        for part in data.chunks(self.info.payload_max as usize) {
            let length = u32::try_from(part.len()).unwrap_or(u32::MAX);
            self.with(|session| session.act(command::WRITE, 0, at, length, part))?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn zero(&self, range: Range<u64>) -> Result<()> {
        self.write_zeroes(range, false)
    }

    fn flush(&self) -> Result<()> {
        if !self.info.can(flag::FLUSH) {
            return Ok(());
        }
        self.with(|session| session.act(command::FLUSH, 0, 0, 0, &[]))
    }
}
