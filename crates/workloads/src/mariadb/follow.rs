//! The binary log as it is written, received as a replica receives it.
//! <https://mariadb.com/kb/en/com_binlog_dump/>

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Change, ChangeStream, Clock, Code, Error, Position, Result, Time};

use super::binlog::{self, ARTIFICIAL, Event, FILE_START, LogFile, Place};
use super::wire::Connection;

const REGISTER: u8 = 0x15;
const DUMP: u8 = 0x12;
/// Rows come with the statement that made them.
const ANNOTATE: u16 = 2;
/// How long `next` waits for something to come.
const WAIT: Duration = Duration::from_millis(100);
/// Events are gathered for so long, or so many bytes, to be one change.
const GATHER: Duration = Duration::from_millis(100);
const GATHER_BYTES: usize = 512 << 10;
/// The server sends a sign of life this often, in nanoseconds; without one for long the connection is taken for dead.
const HEARTBEAT_NANOSECONDS: u64 = 5_000_000_000;
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// A log that is followed.
pub struct BinlogStream {
    connection: Connection,
    base: String,
    /// Where the change that is gathered starts.
    from: Place,
    at: Place,
    gathered: Vec<u8>,
    since: Duration,
    time: Option<Time>,
    ready: VecDeque<Change>,
    has_sums: bool,
    heard: Duration,
    clock: Arc<dyn Clock>,
}

impl BinlogStream {
    /// Follows the log from a place on. `server` is the number by which we are known among the server's replicas.
    ///
    /// Errors: [`Code::NotFound`] from [`ChangeStream::next`] when the server no longer has that place.
    pub fn start(
        mut connection: Connection,
        base: &str,
        from: Place,
        server: u32,
        clock: Arc<dyn Clock>,
    ) -> Result<Self> {
        connection
            .query("SET @mariadb_slave_capability = 4, @master_binlog_checksum = @@global.binlog_checksum")?;
        connection.query(&format!("SET @master_heartbeat_period = {HEARTBEAT_NANOSECONDS}"))?;
        let has_sums = connection.value("SELECT @@global.binlog_checksum")? != "NONE";
        let mut register = server.to_le_bytes().to_vec();
        // Neither host, user nor password; no port, no rank, no master.
        register.extend_from_slice(&[0; 3 + 2 + 4 + 4]);
        connection.command(REGISTER, &register)?;
        connection.done()?;
        let offset = u32::try_from(from.offset).map_err(|error| {
            Error::new(Code::Unsupported, "a binary log of more than 4 GiB").because(error)
        })?;
        let mut dump = offset.to_le_bytes().to_vec();
        dump.extend_from_slice(&ANNOTATE.to_le_bytes());
        dump.extend_from_slice(&server.to_le_bytes());
        dump.extend_from_slice(LogFile { base: base.to_owned(), number: from.file }.to_string().as_bytes());
        connection.command(DUMP, &dump)?;
        connection.wait_at_most(WAIT)?;
        let (now, ready) = (clock.monotonic(), VecDeque::new());
        Ok(Self {
            connection,
            base: base.to_owned(),
            from,
            at: from,
            gathered: Vec::new(),
            since: now,
            time: None,
            ready,
            has_sums,
            heard: now,
            clock,
        })
    }

    fn event(&mut self, bytes: &[u8]) -> Result<()> {
        let event = Event::first(bytes).filter(|event| event.bytes.len() == bytes.len());
        let event = event.ok_or_else(|| self.connection.broken("it sends what is no event"))?;
        if event.kind == binlog::HEARTBEAT {
            return Ok(());
        }
        if event.kind == binlog::DESCRIPTION {
            self.has_sums = event.has_sums();
        }
        if event.flags & ARTIFICIAL != 0 || event.end == 0 {
            return self.artificial(&event);
        }
        if event.kind == binlog::ENCRYPTION {
            return Err(Error::new(Code::Unsupported, "the server's binary logs are encrypted").hint(
                "they are sent decrypted, so that files cannot come back as they were: encrypt_binlog = OFF",
            ));
        }
        if self.has_sums && !event.is_sound() {
            return Err(
                Error::integrity("an event of the binary log arrived damaged").hint("follow it again")
            );
        }
        let end = self.at.offset + bytes.len() as u64;
        if event.end != end as u32 {
            return Err(Error::integrity("an event of the binary log does not follow the one before it"));
        }
        if self.gathered.is_empty() {
            self.since = self.clock.monotonic();
        }
        self.at.offset = end;
        self.gathered.extend_from_slice(bytes);
        self.time = self.time.max(event.time());
        if event.kind == binlog::ROTATE {
            let next = event.next_file(self.has_sums);
            self.go_on(next)?;
        }
        Ok(())
    }

    /// What is in no file: where the server is, and how it writes.
    fn artificial(&mut self, event: &Event<'_>) -> Result<()> {
        if event.kind != binlog::ROTATE {
            return Ok(());
        }
        // Sent before the description, it ends with a checksum only if the server thinks that we want one.
        let file = event.next_file(self.has_sums).filter(|file| file.base == self.base);
        let file = file.or_else(|| event.next_file(!self.has_sums));
        if file.as_ref().is_some_and(|file| file.base == self.base && file.number == self.at.file) {
            return Ok(());
        }
        self.go_on(file)
    }

    fn go_on(&mut self, file: Option<LogFile>) -> Result<()> {
        let fits = |file: &LogFile| file.base == self.base && file.number == self.at.file.wrapping_add(1);
        let file = file.filter(fits);
        let file = file.ok_or_else(|| {
            Error::new(Code::NotFound, "the server goes on in a log that is not the next one")
        })?;
        self.gathered()?;
        self.at = Place { file: file.number, offset: FILE_START.len() as u64, ..self.at };
        Ok(())
    }

    /// Makes changes of what was gathered.
    fn gathered(&mut self) -> Result<()> {
        let bytes = std::mem::take(&mut self.gathered);
        let mut offset = self.at.offset - bytes.len() as u64;
        for piece in bytes.chunks(Change::BYTES_MAX) {
            offset += piece.len() as u64;
            let end = Place { offset, ..self.at };
            let (start, position) = (self.from.position(), end.position());
            self.ready.push_back(Change { start, end: position, time: self.time, bytes: piece.to_vec() });
            self.from = end;
        }
        self.time = None;
        Ok(())
    }
}

impl ChangeStream for BinlogStream {
    fn next(&mut self) -> Result<Option<Change>> {
        while self.ready.is_empty() {
            let message = self.connection.message()?;
            let now = self.clock.monotonic();
            let Some(message) = message else {
                if now.saturating_sub(self.heard) > SILENCE_LIMIT {
                    return Err(self.connection.broken("it has fallen silent"));
                }
                self.gathered()?;
                break;
            };
            self.heard = now;
            match message.split_first() {
                Some((0, event)) => self.event(event)?,
                Some((0xff, _)) => return Err(self.connection.refused(&message)),
                _ => return Err(self.connection.broken("it ended its log")),
            }
            let is_due = now.saturating_sub(self.since) >= GATHER || self.gathered.len() >= GATHER_BYTES;
            if is_due && !self.gathered.is_empty() {
                self.gathered()?;
            }
        }
        Ok(self.ready.pop_front())
    }

    fn acknowledge(&mut self, _durable: &Position) -> Result<()> {
        // A server keeps its logs for as long as it is set to, whoever reads them.
        Ok(())
    }
}
