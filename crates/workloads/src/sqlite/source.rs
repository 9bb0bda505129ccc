//! Databases as items of a point.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{File, Metadata as FileMetadata};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;

use mainstay_core::{
    Body, Captured, Clock, Consistency, Error, Item, ItemPath, Kind, Metadata, Next, Open, Piece, Position,
    Receipt, Result, Skip, SkipReason, Source, Stamp, StreamEnd, StreamReader, Time,
};
use serde::{Deserialize, Serialize};

use super::database::Database;
use super::find::Found;
use super::place::Place;

/// The item that describes the databases of a point.
pub const DESCRIPTION: &str = "mainstay-sqlite.json";

/// What there is to know of the databases of a point beside their bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Of the library that held them.
    pub sqlite: String,
    pub databases: Vec<Base>,
}

/// A database of a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The item with its file; `NAME-wal` holds the log that belongs to it, if there is one. As people read it.
    pub name: String,
    pub page_bytes: u32,
    /// Others wrote through a write-ahead log.
    pub has_log: bool,
    /// The state: where the log ended, without a known generation. `None` when the log was empty.
    pub end: Option<Place>,
    /// How far the journal was known to reach before the state was held.
    pub journal: Option<Place>,
    /// When it was held, in nanoseconds since 1970.
    pub moment: i64,
}

impl Description {
    pub fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self)
            .map_err(|error| Error::bug("databases cannot be described").because(error))
    }

    /// Errors: [`mainstay_core::Code::Integrity`] for what describes no databases.
    pub fn from_json(text: &[u8]) -> Result<Self> {
        let malformed = || Error::integrity("the description of the databases is malformed");
        let description: Self = serde_json::from_slice(text).map_err(|error| malformed().because(error))?;
        let fits =
            |base: &Base| base.page_bytes.is_power_of_two() && (512..=65536).contains(&base.page_bytes);
        if description.databases.iter().all(fits) { Ok(description) } else { Err(malformed()) }
    }
}

/// Databases, one held after the other while its file and its log are read.
pub struct SqliteSource {
    found: VecDeque<Found>,
    directories: BTreeSet<ItemPath>,
    top: Option<std::path::PathBuf>,
    /// How far journals reach, by the name of the database.
    journals: BTreeMap<String, Place>,
    held: Option<Database>,
    ready: VecDeque<Item>,
    description: Description,
    is_described: bool,
    clock: Arc<dyn Clock>,
}

impl SqliteSource {
    /// `top`: the directory below which they are, for the directories between.
    pub fn new(
        found: Vec<Found>,
        top: Option<&Path>,
        journals: BTreeMap<String, Place>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self {
            found: found.into(),
            directories: BTreeSet::new(),
            top: top.map(Path::to_owned),
            journals,
            held: None,
            ready: VecDeque::new(),
            description: Description { sqlite: rusqlite::version().to_owned(), databases: Vec::new() },
            is_described: false,
            clock,
        }
    }

    fn capture(&mut self, found: &Found) -> Result<()> {
        let mut database = Database::open(&found.path)?;
        let held = database.hold()?;
        let name = found.name.to_string();
        self.description.databases.push(Base {
            page_bytes: database.page_bytes(),
            has_log: database.has_log(),
            end: held.end,
            journal: self.journals.get(&name).copied(),
            moment: self.clock.now().0,
            name,
        });
        self.directories(found)?;
        let file = Arc::clone(database.file());
        self.ready.push_back(item(found.name.clone(), file, None, true)?);
        if let (Some(end), false) = (held.end, held.file_is_all) {
            let log = database.log()?.ok_or_else(|| Error::bug("a log that is held has gone"))?;
            let length = 32 + u64::from(end.frame) * (24 + u64::from(database.page_bytes()));
            let path = [found.name.as_bytes(), b"-wal"].concat();
            let path = ItemPath::new(path).map_err(|error| Error::bug("a name is no path").because(error))?;
            self.ready.push_back(item(path, Arc::new(log), Some(length), false)?);
        }
        self.held = Some(database);
        Ok(())
    }

    /// The directories above a database, each once.
    fn directories(&mut self, found: &Found) -> Result<()> {
        let Some(top) = &self.top else { return Ok(()) };
        let above = std::iter::successors(found.name.parent(), ItemPath::parent);
        let mut above: Vec<ItemPath> = above.filter(|path| !path.is_root()).collect();
        above.reverse();
        for path in above {
            if !self.directories.insert(path.clone()) {
                continue;
            }
            use std::os::unix::ffi::OsStrExt as _;
            let at = top.join(std::ffi::OsStr::from_bytes(path.as_bytes()));
            let metadata = std::fs::metadata(&at)
                .map_err(|error| Error::io(format!("cannot read {}", at.display()), error))?;
            let metadata = described(Kind::Directory, &metadata, 0);
            self.ready.push_back(Item { path, metadata, stamp: Stamp::default(), body: Body::None });
        }
        Ok(())
    }

    fn describe(&mut self) -> Result<Item> {
        self.is_described = true;
        let text = self.description.to_json()?;
        let metadata = Metadata {
            size: text.len() as u64,
            mode: 0o600,
            modified: self.clock.now(),
            ..Metadata::new(Kind::Record)
        };
        let path = ItemPath::new(DESCRIPTION)
            .map_err(|error| Error::bug("a name of ours is no path").because(error))?;
        let body = Body::Stream(Box::new(Bytes { text: text.into(), at: 0 }));
        Ok(Item { path, metadata, stamp: Stamp::default(), body })
    }
}

impl Source for SqliteSource {
    fn next(&mut self) -> Result<Next> {
        loop {
            if let Some(item) = self.ready.pop_front() {
                return Ok(Next::Item(Box::new(item)));
            }
            // What was yielded is read by now.
            self.held = None;
            let Some(found) = self.found.pop_front() else {
                return if self.is_described {
                    Ok(Next::End)
                } else {
                    Ok(Next::Item(Box::new(self.describe()?)))
                };
            };
            let alone = self.found.is_empty() && self.description.databases.is_empty();
            match self.capture(&found) {
                Err(error) if !alone => {
                    let detail = error.chain().join(": ");
                    return Ok(Next::Skipped(Skip {
                        path: found.name,
                        reason: SkipReason::Unreadable,
                        detail,
                    }));
                }
                captured => captured?,
            }
        }
    }

    fn seal(&mut self) -> Result<Captured> {
        let consistency = match self.description.databases.len() {
            0 | 1 => Consistency::Application,
            // Each is of one moment, but not all of the same one.
            _ => Consistency::Fuzzy,
        };
        let moments = self.description.databases.iter().map(|base| Time(base.moment));
        let moment = moments.max().unwrap_or_else(|| self.clock.now());
        Ok(Captured { position: Position::default(), consistency, moment })
    }

    fn commit(self: Box<Self>, _receipt: &Receipt) -> Result<()> {
        Ok(())
    }
}

fn described(kind: Kind, metadata: &FileMetadata, size: u64) -> Metadata {
    Metadata {
        size,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        modified: Time::from_parts(metadata.mtime(), metadata.mtime_nsec()),
        ..Metadata::new(kind)
    }
}

fn item(path: ItemPath, file: Arc<File>, length: Option<u64>, is_pages: bool) -> Result<Item> {
    let metadata = file.metadata().map_err(|error| Error::io("cannot read a database", error))?;
    let length = length.unwrap_or(metadata.len());
    let content = Box::new(Front { file, at: 0, length });
    let body = if is_pages { Body::Pages(content) } else { Body::Stream(content) };
    Ok(Item { path, metadata: described(Kind::File, &metadata, length), stamp: Stamp::default(), body })
}

/// A file from its front to a length.
struct Front {
    file: Arc<File>,
    at: u64,
    length: u64,
}

impl Open for Front {
    fn open(&self) -> Result<Box<dyn StreamReader>> {
        Ok(Box::new(Self { file: Arc::clone(&self.file), at: 0, length: self.length }))
    }
}

impl StreamReader for Front {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece> {
        let wanted = buffer.len().min(usize::try_from(self.length - self.at).unwrap_or(usize::MAX));
        if wanted == 0 {
            return Ok(Piece::End);
        }
        let read = self.file.read_at(buffer.get_mut(..wanted).unwrap_or_default(), self.at);
        match read.map_err(|error| Error::io("cannot read a database", error))? {
            // Its log was moved into it, and says how long it is now.
            0 => {
                let rest = self.length - self.at;
                self.at = self.length;
                Ok(Piece::Hole(rest))
            }
            length => {
                self.at += length as u64;
                Ok(Piece::Data(length))
            }
        }
    }

    fn finish(self: Box<Self>) -> Result<StreamEnd> {
        Ok(StreamEnd::Steady)
    }
}

/// A small text.
struct Bytes {
    text: Arc<[u8]>,
    at: usize,
}

impl Open for Bytes {
    fn open(&self) -> Result<Box<dyn StreamReader>> {
        Ok(Box::new(Self { text: Arc::clone(&self.text), at: 0 }))
    }
}

impl StreamReader for Bytes {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece> {
        let rest = self.text.get(self.at..).unwrap_or_default();
        let length = rest.len().min(buffer.len());
        if length == 0 {
            return Ok(Piece::End);
        }
        buffer.get_mut(..length).unwrap_or_default().copy_from_slice(rest.get(..length).unwrap_or_default());
        self.at += length;
        Ok(Piece::Data(length))
    }

    fn finish(self: Box<Self>) -> Result<StreamEnd> {
        Ok(StreamEnd::Steady)
    }
}
