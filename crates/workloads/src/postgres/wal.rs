//! The write-ahead log as it is written: `START_REPLICATION … PHYSICAL` of the replication protocol, acknowledged once it is
//! durable, so that a server waits for it if it is told to (`synchronous_standby_names`).

use std::time::Duration;

use bytes::Buf as _;
use mainstay_core::{Change, ChangeStream, Clock, Code, Error, Position, Result, Time};

use super::lsn::Lsn;
use super::wire::{Connection, Message, Then};

/// How long `next` waits for something to come.
const WAIT: Duration = Duration::from_millis(100);
/// The server hears from us so often even when there is nothing to tell; it gives up after `wal_sender_timeout`, a minute
/// unless set otherwise.
const STATUS_EVERY: Duration = Duration::from_secs(10);
/// PostgreSQL counts from 2000-01-01.
const EPOCH_SECONDS: i64 = 946_684_800;

#[derive(Clone, Debug)]
pub struct WalRequest {
    /// The slot that keeps what was not acknowledged at the server. It must exist: [`WalStream::create_slot`].
    pub slot: Option<String>,
    pub timeline: u32,
    pub from: Lsn,
}

/// Who a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Of the cluster: the same on all its standbys.
    pub system: String,
    pub timeline: u32,
    /// Its log is durable up to here.
    pub flushed: Lsn,
    pub segment_bytes: u64,
}

/// What follows when the server says that a timeline has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switch {
    pub timeline: u32,
    pub at: Lsn,
}

/// A log that is followed.
pub struct WalStream {
    connection: Connection,
    at: Lsn,
    durable: Lsn,
    /// The server had written so far when it last sent something.
    written: Lsn,
    told: Option<Duration>,
    clock: std::sync::Arc<dyn Clock>,
    switch: Option<Switch>,
}

/// What a server keeps for a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// There is no such slot.
    Missing,
    /// The log from here on.
    Kept(Lsn),
    /// Nothing any more: it was more than the server's `max_slot_wal_keep_size`.
    Lost,
}

impl WalStream {
    /// Asks a server who it is and how far it has written.
    pub fn identify(connection: &mut Connection) -> Result<Identity> {
        let answer = connection.query("IDENTIFY_SYSTEM")?;
        let found = answer.first().and_then(|row| match row.as_slice() {
            [Some(system), Some(timeline), Some(flushed), ..] => {
                Some((system.clone(), timeline.parse().ok()?, flushed.parse().ok()?))
            }
            _ => None,
        });
        let (system, timeline, flushed) =
            found.ok_or_else(|| connection.broken("it does not say who it is"))?;
        let segment = connection.value("SHOW wal_segment_size")?;
        let segment_bytes =
            bytes_of(&segment).ok_or_else(|| connection.broken("its segments have no size"))?;
        Ok(Identity { system, timeline, flushed, segment_bytes })
    }

    /// Makes a slot that keeps the log for as long as this connection lives; its name.
    pub fn temporary_slot(connection: &mut Connection) -> Result<String> {
        let process = connection.process();
        let name = format!("mainstay_{process}");
        connection
            .query(&format!("CREATE_REPLICATION_SLOT \"{name}\" TEMPORARY PHYSICAL (RESERVE_WAL true)"))
            .map(|_| name)
    }

    /// Errors: [`Code::Conflict`] for a slot of logical replication.
    pub fn slot(connection: &mut Connection, name: &str) -> Result<Slot> {
        check_slot(name)?;
        let answer = connection.query(&format!("READ_REPLICATION_SLOT \"{name}\""))?;
        match answer.first().map(Vec::as_slice) {
            Some([Some(_), Some(from), ..]) => {
                let from = from.parse().map_err(|()| connection.broken("a slot is malformed"))?;
                Ok(Slot::Kept(from))
            }
            Some([Some(_), None, ..]) => Ok(Slot::Lost),
            _ => Ok(Slot::Missing),
        }
    }

    /// Lets go of all that a slot keeps, and of the slot.
    pub fn drop_slot(connection: &mut Connection, name: &str) -> Result<()> {
        check_slot(name)?;
        connection.query(&format!("DROP_REPLICATION_SLOT \"{name}\"")).map(drop)
    }

    /// Makes a physical replication slot that keeps the log from now on; no error when it is there already.
    pub fn create_slot(connection: &mut Connection, name: &str) -> Result<()> {
        check_slot(name)?;
        match connection.query(&format!("CREATE_REPLICATION_SLOT \"{name}\" PHYSICAL (RESERVE_WAL true)")) {
            Err(error) if error.chain().iter().any(|line| line.contains("42710")) => Ok(()),
            made => made.map(drop),
        }
    }

    /// Errors: [`Code::NotFound`] when the server no longer has the log from there on.
    pub fn start(
        mut connection: Connection,
        request: &WalRequest,
        clock: std::sync::Arc<dyn Clock>,
    ) -> Result<Self> {
        let slot = match &request.slot {
            Some(name) => {
                check_slot(name)?;
                format!("SLOT \"{name}\" ")
            }
            None => String::new(),
        };
        let command =
            format!("START_REPLICATION {slot}PHYSICAL {} TIMELINE {}", request.from, request.timeline);
        let (sets, then) = connection.ask(&command)?;
        let switch = if then == Then::Copy { None } else { sets.iter().rev().find_map(|rows| switch(rows)) };
        if then != Then::Copy && switch.is_none() {
            return Err(connection.broken("it does not send its log"));
        }
        connection.wait_at_most(WAIT)?;
        let from = request.from;
        Ok(Self { connection, at: from, durable: from, written: from, told: None, clock, switch })
    }

    /// Bytes that the server has written and that are not durable here.
    pub fn behind(&self) -> u64 {
        self.written.0.saturating_sub(self.durable.0)
    }

    /// The timeline that follows, once this one has ended. [`ChangeStream::next`] yields nothing more then.
    pub fn switch(&self) -> Option<Switch> {
        self.switch
    }

    /// Up to where everything came.
    pub fn at(&self) -> Lsn {
        self.at
    }

    fn tell(&mut self) -> Result<()> {
        let mut message = vec![b'd', 0, 0, 0, 38, b'r'];
        for lsn in [self.at, self.durable, Lsn(0)] {
            message.extend_from_slice(&lsn.0.to_be_bytes());
        }
        message.extend_from_slice(&server_time(self.clock.now()).to_be_bytes());
        message.push(0);
        self.told = Some(self.clock.monotonic());
        self.connection.send(&message)
    }

    fn take(&mut self, mut body: bytes::Bytes) -> Result<Option<Change>> {
        let short = |_short| Error::integrity("the server sent a message that is cut short");
        match body.try_get_u8().map_err(short)? {
            b'w' => {
                let start = Lsn(body.try_get_u64().map_err(short)?);
                self.written = Lsn(body.try_get_u64().map_err(short)?);
                let time = body.try_get_i64().map_err(short)?;
                if start != self.at || body.is_empty() || body.len() > Change::BYTES_MAX {
                    return Err(self
                        .connection
                        .broken(format!("it went on at {start} and not at {}", self.at)));
                }
                let end = Lsn(start
                    .0
                    .checked_add(body.len() as u64)
                    .ok_or_else(|| Error::integrity("the server sent a log beyond its end"))?);
                self.at = end;
                Ok(Some(Change {
                    start: start.position(),
                    end: end.position(),
                    time: Some(our_time(time)),
                    bytes: body.to_vec(),
                }))
            }
            b'k' => {
                self.written = Lsn(body.try_get_u64().map_err(short)?);
                let _time = body.try_get_i64().map_err(short)?;
                if body.try_get_u8().map_err(short)? != 0 {
                    self.tell()?;
                }
                Ok(None)
            }
            _ => Ok(None),
        }
    }
}

impl ChangeStream for WalStream {
    fn next(&mut self) -> Result<Option<Change>> {
        if self.switch.is_some() {
            return Ok(None);
        }
        let silent = self.told.map(|told| self.clock.monotonic().saturating_sub(told));
        if silent.is_none_or(|silent| silent >= STATUS_EVERY) {
            self.tell()?;
        }
        let Some(Message { tag, body }) = self.connection.try_message()? else { return Ok(None) };
        match tag {
            b'd' => self.take(body),
            b'c' => {
                // The end of the timeline: what comes next is told after we say that we have understood.
                self.connection.send(&[b'c', 0, 0, 0, 4])?;
                self.connection.wait_at_most(Duration::from_secs(60))?;
                let (sets, _) = self.connection.answers()?;
                self.switch = sets.iter().rev().find_map(|rows| switch(rows));
                match self.switch {
                    Some(_) => Ok(None),
                    None => Err(self.connection.broken("it ended its log and is going down")),
                }
            }
            b'E' => {
                let error = self.connection.refused(&body);
                let gone = error.chain().iter().any(|line| line.contains("58P01"));
                Err(if gone {
                    error.hint("the server has deleted this part of its log: take a new backup")
                } else {
                    error
                })
            }
            _ => Ok(None),
        }
    }

    fn acknowledge(&mut self, durable: &Position) -> Result<()> {
        let durable = Lsn::from_position(durable).ok_or_else(|| Error::bug("a position of another log"))?;
        self.durable = self.durable.max(durable);
        self.tell()
    }
}

/// Such as `16MB`.
pub(super) fn bytes_of(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|letter: char| !letter.is_ascii_digit());
    let unit = match text.get(digits.len()..)? {
        "kB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit).filter(|bytes| bytes.is_power_of_two())
}

fn check_slot(name: &str) -> Result<()> {
    let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    if (1..=63).contains(&name.len()) && name.bytes().all(fits) {
        return Ok(());
    }
    Err(Error::new(Code::Usage, format!("a replication slot cannot be called {name:?}"))
        .hint("use lower-case letters, digits and _, at most 63"))
}

/// The next timeline and where it begins, as the server answers.
fn switch(rows: &[Vec<Option<String>>]) -> Option<Switch> {
    let [Some(timeline), Some(at), ..] = rows.first()?.as_slice() else { return None };
    Some(Switch { timeline: timeline.parse().ok()?, at: at.parse().ok()? })
}

/// Microseconds since 2000 as a time.
fn our_time(server: i64) -> Time {
    Time::from_seconds(EPOCH_SECONDS).plus(Duration::from_micros(u64::try_from(server).unwrap_or(0)))
}

fn server_time(time: Time) -> i64 {
    (time.0 - Time::from_seconds(EPOCH_SECONDS).0) / 1000
}

#[cfg(test)]
mod tests {
    use mainstay_core::Time;

    use super::{bytes_of, our_time, server_time};

    #[test]
    fn sizes_are_read_with_their_units() {
        let read = [("16MB", 16 << 20), ("1GB", 1 << 30), ("512kB", 512 << 10)];
        assert!(read.iter().all(|(text, bytes)| bytes_of(text) == Some(*bytes)));
        assert!(["16", "17MB", "MB", "", "999999999999999999GB"].iter().all(|text| bytes_of(text).is_none()));
    }

    #[test]
    fn times_count_from_the_year_2000() {
        let time = Time::from_seconds(1_763_800_000);
        assert_eq!(our_time(server_time(time)), time);
        assert_eq!(our_time(0).seconds(), 946_684_800);
        assert_eq!(our_time(i64::MIN).seconds(), 946_684_800);
    }
}
