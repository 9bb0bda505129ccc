//! A database that others write to: held still, and its log moved into it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use super::kept::{Kept, There};
use super::place::Place;
use super::wal::Header;

/// Other programs may hold their locks for so long before a backup gives up.
const PATIENCE: Duration = Duration::from_secs(20);
/// And before a follower tries again later.
const SHORT: Duration = Duration::from_millis(200);

/// A database. Two connections take turns at holding it, a third one writes the log into the file.
pub struct Database {
    path: PathBuf,
    /// Where the holding connection is in this list.
    turn: usize,
    readers: [Connection; 2],
    writer: Connection,
    has_log: bool,
    page_bytes: u32,
    /// The last to go: see there.
    kept: Kept,
}

/// What a held database is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Where its log ends: the state that is held. `None` without a log, or when that was empty.
    pub end: Option<Place>,
    /// The file alone is that state: everything in the log is in it as well.
    pub file_is_all: bool,
}

impl Database {
    /// `path`: without links; see [`super::find`].
    ///
    /// Errors: [`Code::Unsupported`] for what is no database that can be read; [`Code::Refused`] for a link, or what is no
    /// file, there or beside it; [`Code::Io`] where SQLite's files beside it cannot be made.
    pub fn open(path: &Path) -> Result<Self> {
        let kept = Kept::open(path)?;
        // SQLite would wait for ever for what never answers.
        for end in ["-journal", "-wal", "-shm"] {
            There::find(&beside(path, end))?;
        }
        let readers = [connect(path)?, connect(path)?];
        let writer = connect(path)?;
        if !kept.is_at(path) {
            let what = format!("{} became another file while it was opened", path.display());
            return Err(Error::new(Code::Conflict, what));
        }
        let asked = |name: &str| {
            let value = writer
                .query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, rusqlite::types::Value>(0));
            value.map_err(|error| failed(path, "cannot read", error))
        };
        let has_log = asked("journal_mode")? == rusqlite::types::Value::Text("wal".into());
        let rusqlite::types::Value::Integer(page_bytes) = asked("page_size")? else {
            return Err(Error::bug("a size of pages that is no number"));
        };
        let page_bytes = u32::try_from(page_bytes)
            .map_err(|error| Error::integrity("a database with impossible pages").because(error))?;
        Ok(Self { path: path.to_owned(), turn: 0, readers, writer, has_log, page_bytes, kept })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether changes go through a write-ahead log, so that it can be followed and nobody waits for a backup.
    pub fn has_log(&self) -> bool {
        self.has_log
    }

    pub fn page_bytes(&self) -> u32 {
        self.page_bytes
    }

    pub(super) fn file(&self) -> &Arc<File> {
        self.kept.file()
    }

    /// Whether the path still leads to this database.
    pub(super) fn is_in_place(&self) -> bool {
        self.kept.is_at(&self.path)
    }

    /// The log, if there is one. It holds no locks, so it can be opened and closed at will.
    pub(super) fn log(&self) -> Result<Option<File>> {
        let path = beside(&self.path, "-wal");
        let file = There::find(&path)?.map(|there| there.open());
        file.transpose().map_err(|error| Error::io(format!("cannot open {}", path.display()), error))
    }

    /// Holds the database as it is now, for a backup: until [`Database::release`] its file does not move, and nothing
    /// that is in its log now is overwritten. Others go on writing, unless it has no log: then they wait.
    ///
    /// Errors: [`Code::Conflict`] when another program keeps it locked.
    pub fn hold(&mut self) -> Result<Held> {
        if !self.has_log {
            self.begin(self.turn, PATIENCE)?;
            return Ok(Held { end: None, file_is_all: true });
        }
        // Most of it while nobody waits.
        self.checkpoint()?;
        self.lock(PATIENCE)?;
        let held = self.hold_locked();
        self.unlock();
        held
    }

    fn hold_locked(&self) -> Result<Held> {
        let moved = self.checkpoint()?;
        self.begin(self.turn, SHORT)?;
        Ok(Held { end: self.end(moved.frames)?, file_is_all: moved.is_all })
    }

    /// Lets go of what was held.
    pub fn release(&mut self) {
        self.end_of(self.turn);
    }

    /// Holds the newest state instead of the one held; in between nothing is lost.
    pub(super) fn hold_newest(&mut self) -> Result<()> {
        let next = 1 - self.turn;
        self.begin(next, SHORT)?;
        self.end_of(self.turn);
        self.turn = next;
        Ok(())
    }

    /// Sees to it that nobody can write until [`Database::unlock`]. `false` when others are busy.
    pub(super) fn try_lock(&self) -> Result<bool> {
        match self.lock(SHORT) {
            Err(error) if error.code() == Code::Conflict => Ok(false),
            locked => locked.map(|()| true),
        }
    }

    fn lock(&self, patience: Duration) -> Result<()> {
        let Some(other) = self.readers.get(1 - self.turn) else { return Ok(()) };
        let locked = other.busy_timeout(patience).and_then(|()| other.execute_batch("BEGIN IMMEDIATE"));
        locked.map_err(|error| failed(&self.path, "cannot lock", error))
    }

    pub(super) fn unlock(&self) {
        self.end_of(1 - self.turn);
    }

    /// Under the lock: holds the state at the end of the log. With `restart` the log is moved into the file first, so that
    /// the next writer begins it from the front.
    pub(super) fn settle(&self, restart: bool) -> Result<()> {
        // The connection with the lock holds the newest state meanwhile.
        self.end_of(self.turn);
        if restart {
            self.checkpoint()?;
        }
        self.begin(self.turn, SHORT)
    }

    /// Under the lock: where the log ends.
    pub(super) fn log_end(&self) -> Result<Option<Place>> {
        self.end(None)
    }

    /// Where the log ends, under the lock: behind so many frames as SQLite says, or where its frames end.
    fn end(&self, frames: Option<u32>) -> Result<Option<Place>> {
        let Some(file) = self.log()? else { return Ok(None) };
        let Some(header) = Header::read(&file)? else { return Ok(None) };
        if let Some(frames) = frames.filter(|frames| *frames > 0) {
            return header.place(&file, frames).map(Some).ok_or_else(|| {
                let what = format!("the log of {} is not what SQLite says", self.path.display());
                Error::new(Code::Io, what)
                    .hint("is it on a file system of another machine? SQLite's logs need a local one")
            });
        }
        // A log that was given up and not begun again yet: everything in it is in the file.
        let mut at = header.start(0);
        while let Some(last) = header.scan(&file, &at, 64 << 20)?.last() {
            at = *last;
        }
        Ok(Some(at))
    }

    /// Moves as much of the log into the file as others allow.
    pub(super) fn checkpoint(&self) -> Result<Moved> {
        let row = self.writer.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| {
            Ok((row.get::<_, i64>(1)?, row.get::<_, i64>(2)?))
        });
        let (frames, moved) = match row {
            Err(error) if is_busy(&error) => (-1, 0),
            row => row.map_err(|error| failed(&self.path, "cannot write the log into", error))?,
        };
        Ok(Moved { frames: u32::try_from(frames).ok(), is_all: frames >= 0 && frames == moved })
    }

    fn begin(&self, reader: usize, patience: Duration) -> Result<()> {
        let Some(connection) = self.readers.get(reader) else { return Ok(()) };
        let begun = connection.busy_timeout(patience).and_then(|()| {
            connection.execute_batch("BEGIN")?;
            // Only now are the locks taken. It reads the first page and trusts nothing in it.
            connection.query_row("PRAGMA schema_version", [], |row| row.get::<_, i64>(0))
        });
        begun.map(drop).map_err(|error| {
            self.end_of(reader);
            failed(&self.path, "cannot hold", error)
        })
    }

    fn end_of(&self, reader: usize) {
        if let Some(connection) = self.readers.get(reader).filter(|connection| !connection.is_autocommit()) {
            // What cannot be rolled back is not held.
            let _ended = connection.execute_batch("ROLLBACK");
        }
    }

    /// SQLite's own check of a database that nobody else uses. What is wrong, if anything is.
    pub fn quick_check(path: &Path) -> Result<Vec<String>> {
        let path = &std::fs::canonicalize(path)
            .map_err(|error| Error::io(format!("cannot find {}", path.display()), error))?;
        let kept = Kept::open(path)?;
        let connection = connect(path)?;
        let check = |connection: &Connection| {
            let mut statement = connection.prepare("PRAGMA quick_check(20)")?;
            let rows = statement.query_map([], |row| row.get::<_, String>(0))?;
            rows.collect::<rusqlite::Result<Vec<String>>>()
        };
        let lines = check(&connection).map_err(|error| failed(path, "cannot check", error))?;
        drop(connection);
        drop(kept);
        Ok(lines.into_iter().filter(|line| line != "ok").collect())
    }
}

pub(super) struct Moved {
    /// In the log; `None` when SQLite did not say.
    frames: Option<u32>,
    is_all: bool,
}

/// What SQLite keeps beside a database.
fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.to_owned().into_os_string();
    name.push(end);
    name.into()
}

fn connect(path: &Path) -> Result<Connection> {
    let flags =
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let open = || {
        let connection = Connection::open_with_flags(path, flags)?;
        // Whoever closes last would otherwise move the log and delete it, behind the back of the one who follows it.
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
        connection.busy_timeout(PATIENCE)?;
        connection.pragma_update(None, "wal_autocheckpoint", 0)?;
        Ok(connection)
    };
    open().map_err(|error| failed(path, "cannot open", error))
}

fn is_busy(error: &rusqlite::Error) -> bool {
    matches!(error.sqlite_error_code(), Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked))
}

fn failed(path: &Path, what: &str, error: rusqlite::Error) -> Error {
    let (code, hint) = match error.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
            (Code::Conflict, "another program keeps it locked; try again, or end that program's transaction")
        }
        Some(ErrorCode::NotADatabase) => (
            Code::Unsupported,
            "it is no SQLite database, or it is encrypted: protect it as a file, with its application at rest",
        ),
        Some(ErrorCode::DatabaseCorrupt) => {
            (Code::Integrity, "restore it from a point, or salvage it: sqlite3 FILE .recover")
        }
        Some(ErrorCode::CannotOpen | ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => (
            Code::Io,
            "whoever runs Mainstay must be able to write to the database and its directory, where SQLite keeps its locks",
        ),
        Some(ErrorCode::DiskFull) => (Code::Full, "make room where the database lies"),
        _ => (Code::Io, "see whether the database's own program can open it"),
    };
    Error::new(code, format!("{what} {}", path.display())).because(error).hint(hint)
}
