//! The log of a database as it grows. While it is followed a read transaction is always held, so that nobody begins the log
//! from the front unseen; now and then it is moved into the file on purpose, with everything in it read before.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Change, ChangeStream, Clock, Code, Error, Position, Result};

use super::database::Database;
use super::place::Place;
use super::wal::{Header, changes_start};

/// How often it is looked whether the log has grown.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// What one look takes at most, but for a single larger transaction.
const LOOK_BYTES: usize = 8 << 20;
/// The log is moved into the file when it is so long, as SQLite itself would do by default (in frames)…
const FRAMES_MAX: u32 = 1000;
/// … but tried no more often than this, since writers wait meanwhile.
const RESTART_EVERY: Duration = Duration::from_millis(250);

/// What is read while writers wait, at most: so many changes of up to 1 MiB.
const REST_CHANGES_MAX: usize = 64;

/// A log that is followed.
pub struct WalLog {
    database: Database,
    at: Place,
    /// Everything that was in the log when it was held last is read: if it begins from the front now, nothing is lost.
    sure: bool,
    ready: VecDeque<Change>,
    tried: Duration,
    clock: Arc<dyn Clock>,
}

impl WalLog {
    /// Follows the log of a database from `known` on, where an earlier run came to. The second value says why that cannot
    /// be, if so: then it begins with a new generation, and what is in the file already is in no log.
    ///
    /// Errors: [`Code::Unsupported`] for a database without a log; [`Code::Conflict`] while others keep it locked.
    pub fn start(
        database: Database,
        known: Option<Place>,
        clock: Arc<dyn Clock>,
    ) -> Result<(Self, Option<&'static str>)> {
        if !database.has_log() {
            let what = format!("{} has no write-ahead log that could be followed", database.path().display());
            return Err(Error::new(Code::Unsupported, what)
                .hint("its program can switch it on, once and for good: PRAGMA journal_mode = WAL"));
        }
        if !database.try_lock()? {
            let what = format!("another program keeps {} locked", database.path().display());
            return Err(Error::new(Code::Conflict, what));
        }
        let started = Self::start_locked(&database, known);
        let (at, why) = match started {
            Ok(started) => started,
            Err(error) => {
                database.unlock();
                return Err(error);
            }
        };
        let tried = clock.monotonic();
        let mut this = Self { database, at, sure: false, ready: VecDeque::new(), tried, clock };
        let rest = this.read_rest();
        this.database.unlock();
        this.sure = rest?;
        Ok((this, why))
    }

    fn start_locked(database: &Database, known: Option<Place>) -> Result<(Place, Option<&'static str>)> {
        database.settle(false)?;
        let log = database.log()?;
        let header = log.as_ref().map(Header::read).transpose()?.flatten();
        let holds =
            |known: &Place| header.zip(log.as_ref()).is_some_and(|(header, log)| header.holds(log, known));
        if let Some(known) = known.filter(holds) {
            return Ok((known, None));
        }
        let generation = known.map_or(1, |known| known.generation + 1);
        let at = Place { generation, ..database.log_end()?.unwrap_or_default() };
        Ok((at, Some("its log began anew while nobody followed it")))
    }

    /// Under the lock: reads all that there is. `false` when that is too much to hold others up for.
    fn read_rest(&mut self) -> Result<bool> {
        while self.look()? {
            if self.ready.len() > REST_CHANGES_MAX {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Up to where it was read.
    pub fn place(&self) -> Place {
        self.at
    }

    /// Reads what was committed since. Whether there was anything.
    fn look(&mut self) -> Result<bool> {
        let before = self.at;
        let Some(file) = self.newest_log()? else { return Ok(false) };
        let Some(header) = Header::read(&file)? else { return Ok(false) };
        let mut from = self.at;
        if header.salts != self.at.salts {
            if !self.sure {
                return Err(Error::new(Code::Conflict, "the log began anew before it was read to its end"));
            }
            from = header.start(self.at.generation + u64::from(self.at.salts != [0, 0]));
        }
        let ends = header.scan(&file, &from, LOOK_BYTES)?;
        let now = self.clock.now();
        for end in ends {
            let Some(frames) = header.piece(&file, &from, &end)? else {
                // Somebody takes an unfinished transaction back; the next look sees what became of it.
                break;
            };
            let (start, bytes) = if changes_start(&self.at, &end) {
                (self.at, [header.bytes.as_slice(), &frames].concat())
            } else {
                (from, frames)
            };
            let (start, position) = (start.position(), end.position());
            self.ready.push_back(Change { start, end: position, time: Some(now), bytes });
            (self.at, from) = (end, end);
        }
        Ok(self.at != before)
    }

    /// The file of the log.
    fn newest_log(&self) -> Result<Option<File>> {
        if !self.database.is_in_place() {
            let what = format!("{} is another file by now", self.database.path().display());
            return Err(Error::new(Code::Conflict, what));
        }
        self.database.log()
    }

    /// Moves the log into the file if it is long, with everything in it read; otherwise makes sure of the hold.
    fn settle(&mut self) -> Result<()> {
        let now = self.clock.monotonic();
        let restart = self.at.frame >= FRAMES_MAX;
        if (self.sure && !restart) || now.saturating_sub(self.tried) < RESTART_EVERY {
            return Ok(());
        }
        self.tried = now;
        // Most of it while nobody waits.
        self.database.checkpoint()?;
        if !self.database.try_lock()? {
            return Ok(());
        }
        let settled = self.settle_locked(restart);
        self.database.unlock();
        settled
    }

    fn settle_locked(&mut self, restart: bool) -> Result<()> {
        if self.read_rest()? {
            self.database.settle(restart)?;
            self.sure = true;
        }
        Ok(())
    }
}

impl ChangeStream for WalLog {
    fn next(&mut self) -> Result<Option<Change>> {
        if let Some(change) = self.ready.pop_front() {
            return Ok(Some(change));
        }
        let has_grown = self.look()?;
        if has_grown && self.sure {
            // So that others can move what was read into the file.
            match self.database.hold_newest() {
                Err(error) if error.code() == Code::Conflict => {}
                held => held?,
            }
        }
        self.settle()?;
        if self.ready.is_empty() {
            self.clock.sleep(LOOK_EVERY);
        }
        Ok(self.ready.pop_front())
    }

    fn acknowledge(&mut self, _durable: &Position) -> Result<()> {
        Ok(())
    }
}
