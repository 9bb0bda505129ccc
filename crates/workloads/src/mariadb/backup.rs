//! The files of a running server, as `mariadb-backup` streams them. Nothing is staged: files that come in turns are stored
//! in parts.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::Read;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mainstay_core::{
    Body, Captured, Clock, Code, Consistency, Error, Item, ItemPath, Kind, Metadata, Next, Open, Piece,
    Position, Progress, Receipt, Result, Source, Stamp, StreamEnd, StreamReader,
};
use serde::{Deserialize, Serialize};

use super::binlog::{Gtid, LogFile, Place};
use super::programs::{GRANTS, Login, Options, last_words};
use super::stream::{Chunk, Chunks, Content};
use super::wire::Connection;
use crate::flow::Flow;
use crate::process::Program;

/// The items with the files, each from its front.
pub const DATA: &str = "data";
/// What came of a file after something else had come between: the item's name is the file's, and a number.
pub const PARTS: &str = "parts";
/// The item that describes the server.
pub const DESCRIPTION: &str = "mainstay-mariadb.json";
const OFFSET: &str = "offset";

/// What comes in between another file is held in memory up to so many bytes.
const BETWEEN_MAX: usize = 32 << 20;
/// The little files in which it says where the log was.
const PLACES: [&str; 2] = ["xtrabackup_binlog_info", "mariadb_backup_binlog_info"];
const MASTERS: [&str; 2] = ["xtrabackup_slave_info", "mariadb_backup_slave_info"];
const NOTE_BYTES_MAX: usize = 64 << 10;

/// How a backup is taken.
#[derive(Clone, Copy, Debug, Default)]
pub struct BackupRequest {
    /// Waits until a replica has no temporary tables open, and records where in its master's log it was.
    pub replica: bool,
}

/// What there is to know of a server beside its files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    pub version: String,
    pub server_id: u32,
    /// Of its log: see [`Place`].
    pub epoch: u32,
    /// What all of its binary logs are called; `None` without one.
    pub log: Option<String>,
    /// The state of the files, once they are prepared.
    pub file: u32,
    pub offset: u64,
    /// As the server writes it: one per domain, by commas.
    pub gtid: String,
    /// How a replica of the same master would be set up, when this was one.
    pub master: Option<String>,
}

impl Description {
    pub fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self)
            .map_err(|error| Error::bug("a server cannot be described").because(error))
    }

    /// Errors: [`Code::Integrity`] for what describes no server.
    pub fn from_json(text: &[u8]) -> Result<Self> {
        serde_json::from_slice(text)
            .map_err(|error| Error::integrity("the description of the server is malformed").because(error))
    }

    /// The state's place in the log.
    pub fn place(&self) -> Place {
        Place { epoch: self.epoch, file: self.file, offset: self.offset }
    }

    /// The last transaction of a domain that the files hold.
    pub fn gtid(&self, domain: u32) -> Option<Gtid> {
        self.gtid
            .split(',')
            .filter_map(|gtid| gtid.trim().parse::<Gtid>().ok())
            .find(|gtid| gtid.domain == domain)
    }
}

/// The place of a part in its file, in bytes.
pub fn part_offset(metadata: &Metadata) -> Option<u64> {
    let value = metadata.attributes.iter().find(|(name, _)| name == OFFSET)?;
    Some(u64::from_le_bytes(value.1.as_slice().try_into().ok()?))
}

/// What is known of a file that comes.
#[derive(Clone, Copy, Debug, Default)]
struct Known {
    next: u64,
    parts: u32,
    done: bool,
}

struct State {
    chunks: Chunks<Box<dyn Read + Send>>,
    files: BTreeMap<ItemPath, Known>,
    /// The part whose body is read.
    current: Option<ItemPath>,
    number: u64,
    /// A head that was read, and whose content was not.
    pending: Option<Chunk>,
    /// What came in between.
    between: VecDeque<(ItemPath, u64, Vec<u8>)>,
    between_bytes: usize,
    between_max: usize,
    /// The little files that are read here as well.
    notes: BTreeMap<ItemPath, Vec<u8>>,
}

/// A backup that streams.
pub struct FilesBackup {
    shared: Arc<Mutex<State>>,
    program: Option<Flow>,
    _options: Options,
    description: Description,
    directories: BTreeSet<ItemPath>,
    last: Option<VecDeque<Item>>,
    clock: Arc<dyn Clock>,
    progress: Arc<dyn Progress>,
}

/// Errors: [`Code::Unsupported`] where `mariadb-backup` is missing, or is of another version than the server.
fn check_version(server: &str) -> Result<()> {
    let outcome = Program::new("mariadb-backup", Duration::from_secs(60)).argument("--version").run();
    let outcome = outcome.map_err(|error| error.hint("apt-get install mariadb-backup"))?;
    let said = String::from_utf8_lossy(&[outcome.output, outcome.errors].concat()).into_owned();
    let own = said
        .split("MariaDB server ")
        .nth(1)
        .and_then(|rest| rest.split(['-', ' ']).next())
        .unwrap_or_default();
    let series = |version: &str| version.split('.').take(2).map(str::to_owned).collect::<Vec<_>>();
    if series(own) == series(server.split('-').next().unwrap_or_default()) {
        return Ok(());
    }
    let what = format!("mariadb-backup {own} does not fit the server's version {}", server.escape_debug());
    Err(Error::new(Code::Unsupported, what).hint("install the mariadb-backup of the server's version"))
}

fn describe(connection: &mut Connection) -> Result<(Description, String)> {
    let version = connection.version().to_owned();
    check_version(&version)?;
    let server_id = connection.value("SELECT @@server_id")?.parse().unwrap_or(0);
    let log = connection.value("SELECT @@log_bin_basename")?;
    let log = log.rsplit('/').next().filter(|name| !name.is_empty()).map(str::to_owned);
    let data = connection.value("SELECT @@datadir")?;
    Ok((Description { version, server_id, log, ..Description::default() }, data))
}

impl FilesBackup {
    /// Begins.
    ///
    /// Errors: [`Code::Unsupported`] where the program is missing, of another version, or far from the files.
    pub fn start(
        connection: &mut Connection,
        login: &Login,
        request: BackupRequest,
        clock: Arc<dyn Clock>,
        progress: Arc<dyn Progress>,
    ) -> Result<Self> {
        let (description, data) = describe(connection)?;
        if std::fs::read_dir(&data).is_err() {
            let what = format!("the server's files in {data} cannot be read here");
            return Err(Error::new(Code::Unsupported, what)
                .hint("run Mainstay on the server's machine, as root or as the server's user"));
        }
        let options = Options::of(login)?;
        let target = options.directory().join("target").display().to_string();
        let mut program = Program::new("mariadb-backup", Duration::MAX)
            .arguments([options.argument(), "--backup".into(), "--stream=mbstream".into()])
            .arguments([format!("--datadir={data}"), format!("--target-dir={target}")]);
        if request.replica {
            program = program.arguments(["--slave-info", "--safe-slave-backup"]);
        }
        let mut program = Flow::start(&program, Stdio::null(), Stdio::piped())?;
        let state = State::of(Box::new(program.output()?));
        Ok(Self {
            shared: Arc::new(Mutex::new(state)),
            program: Some(program),
            _options: options,
            description,
            directories: BTreeSet::new(),
            last: None,
            clock,
            progress,
        })
    }

    /// What is known by now.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// Its log is in this epoch.
    pub fn set_epoch(&mut self, epoch: u32) {
        self.description.epoch = epoch;
    }

    /// The next part of a file; `None` at the end of the stream.
    fn part(&mut self) -> Result<Option<Item>> {
        let mut state = lock(&self.shared);
        state.current = None;
        if let Some((path, offset, bytes)) = state.between.pop_front() {
            state.between_bytes -= bytes.len();
            let number = state.part_number(&path);
            drop(state);
            let body = Body::Stream(Box::new(Bytes { bytes: bytes.into(), at: 0 }));
            return self.item(&path, number, offset, body).map(Some);
        }
        loop {
            let head = match state.pending.take() {
                Some(head) => head,
                None => match state.chunks.head()? {
                    Some(head) => head,
                    None => return Ok(None),
                },
            };
            let Some(content) = head.content else {
                let known = state.files.entry(head.path.clone()).or_default();
                let is_new = known.parts == 0;
                known.done = true;
                if !is_new {
                    continue;
                }
                let number = state.part_number(&head.path);
                drop(state);
                let body = Body::Stream(Box::new(Bytes { bytes: Arc::new([]), at: 0 }));
                return self.item(&head.path, number, 0, body).map(Some);
            };
            state.follows(&head.path, content)?;
            let number = state.part_number(&head.path);
            state.current = Some(head.path.clone());
            state.number += 1;
            let reader = Box::new(PartContent { shared: Arc::clone(&self.shared), number: state.number });
            drop(state);
            let body = if is_pages(&head.path) { Body::Pages(reader) } else { Body::Stream(reader) };
            return self.item(&head.path, number, content.offset, body).map(Some);
        }
    }

    fn item(&mut self, path: &ItemPath, number: u32, offset: u64, body: Body) -> Result<Item> {
        let name = match number {
            0 => [DATA.as_bytes(), b"/", path.as_bytes()].concat(),
            number => [PARTS.as_bytes(), b"/", path.as_bytes(), format!("/{number:06}").as_bytes()].concat(),
        };
        let path = named(name)?;
        let above = std::iter::successors(path.parent(), ItemPath::parent);
        self.directories.extend(above.filter(|path| !path.is_root()));
        let mut metadata = Metadata { mode: 0o660, modified: self.clock.now(), ..Metadata::new(Kind::File) };
        if number > 0 {
            metadata.attributes.push((OFFSET.into(), offset.to_le_bytes().to_vec()));
        }
        Ok(Item { path, metadata, stamp: Stamp::default(), body })
    }

    /// Sees whether the program is content, and what it says of the log.
    fn end(&mut self) -> Result<VecDeque<Item>> {
        let program = self.program.take().ok_or_else(|| Error::bug("a backup that ends twice"))?;
        let (status, said) = program.wait(&*self.clock, self.progress.as_ref())?;
        let is_complete = said.lines().next_back().is_some_and(|line| line.contains("completed OK!"));
        if status != Some(0) || !is_complete {
            return Err(failed(status, &said));
        }
        let state = lock(&self.shared);
        if let Some((path, _)) = state.files.iter().find(|(_, known)| !known.done) {
            return Err(Error::integrity(format!("mariadb-backup's stream ends within {path}")));
        }
        let note = |names: [&str; 2]| {
            let mut found = names.iter().filter_map(|name| state.notes.get(&ItemPath::new(*name).ok()?));
            found.next().map(|text| String::from_utf8_lossy(text).into_owned())
        };
        if let Some(text) = note(PLACES) {
            let mut words = text.split_whitespace();
            let file: Option<LogFile> = words.next().and_then(|name| name.parse().ok());
            let offset = words.next().and_then(|offset| offset.parse().ok());
            let malformed = || Error::integrity("mariadb-backup does not say where the log was");
            let (file, offset) = file.zip(offset).ok_or_else(malformed)?;
            (self.description.file, self.description.offset) = (file.number, offset);
            self.description.log = Some(file.base);
            self.description.gtid = words.collect();
        }
        self.description.master = note(MASTERS).map(|text| text.trim().to_owned());
        drop(state);
        let mut items = VecDeque::new();
        for path in &self.directories {
            let metadata =
                Metadata { mode: 0o700, modified: self.clock.now(), ..Metadata::new(Kind::Directory) };
            items.push_back(Item { path: path.clone(), metadata, stamp: Stamp::default(), body: Body::None });
        }
        let text = self.description.to_json()?;
        let metadata = Metadata {
            size: text.len() as u64,
            mode: 0o600,
            modified: self.clock.now(),
            ..Metadata::new(Kind::Record)
        };
        let body = Body::Stream(Box::new(Bytes { bytes: text.into(), at: 0 }));
        items.push_back(Item { path: named(DESCRIPTION)?, metadata, stamp: Stamp::default(), body });
        Ok(items)
    }
}

fn failed(status: Option<i32>, said: &str) -> Error {
    let how = status.map_or_else(|| "was killed".into(), |status| format!("ended with status {status}"));
    let error = Error::new(Code::Io, format!("mariadb-backup {how}: {}", last_words(said)));
    let lower = said.to_ascii_lowercase();
    if lower.contains("access denied") || lower.contains("privilege") {
        return error.hint(GRANTS);
    }
    error.hint("no point was made")
}

fn named(name: impl Into<Vec<u8>>) -> Result<ItemPath> {
    ItemPath::new(name).map_err(|error| Error::bug("a name of ours is no path").because(error))
}

/// Whether a file is made of pages that change where they are.
fn is_pages(path: &ItemPath) -> bool {
    let name = path.name();
    let ends = [b".ibd".as_slice(), b".new", b".MYD", b".MYI", b".MAD", b".MAI"];
    name.starts_with(b"ibdata") || name.starts_with(b"undo") || ends.iter().any(|end| name.ends_with(end))
}

impl Source for FilesBackup {
    fn next(&mut self) -> Result<Next> {
        if self.last.is_none() {
            match self.part() {
                Ok(Some(item)) => return Ok(Next::Item(Box::new(item))),
                Ok(None) => self.last = Some(self.end()?),
                Err(error) => return Err(self.instead(error)),
            }
        }
        let next = self.last.as_mut().and_then(VecDeque::pop_front);
        Ok(next.map_or(Next::End, |item| Next::Item(Box::new(item))))
    }

    fn seal(&mut self) -> Result<Captured> {
        let place = self.description.place();
        Ok(Captured {
            position: if self.description.log.is_some() { place.position() } else { Position::default() },
            consistency: Consistency::Application,
            moment: self.clock.now(),
        })
    }

    fn commit(self: Box<Self>, _receipt: &Receipt) -> Result<()> {
        Ok(())
    }
}

impl FilesBackup {
    /// A stream that ends early: why it did is what the program said.
    fn instead(&mut self, error: Error) -> Error {
        let Some(mut program) = self.program.take() else { return error };
        self.clock.sleep(Duration::from_millis(500));
        if !program.has_ended().unwrap_or(false) {
            return error;
        }
        match program.wait(&*self.clock, self.progress.as_ref()) {
            Ok((status, said)) if status != Some(0) => failed(status, &said),
            _ => error,
        }
    }
}

impl State {
    fn of(stream: Box<dyn Read + Send>) -> Self {
        Self {
            chunks: Chunks::new(stream),
            files: BTreeMap::new(),
            current: None,
            number: 0,
            pending: None,
            between: VecDeque::new(),
            between_bytes: 0,
            between_max: BETWEEN_MAX,
            notes: BTreeMap::new(),
        }
    }

    /// Counts a part of a file.
    fn part_number(&mut self, path: &ItemPath) -> u32 {
        let known = self.files.entry(path.clone()).or_default();
        known.parts += 1;
        known.parts - 1
    }

    /// Checks that a chunk goes on where its file was, and counts it.
    fn follows(&mut self, path: &ItemPath, content: Content) -> Result<()> {
        let known = self.files.entry(path.clone()).or_default();
        if known.done || known.next != content.offset {
            return Err(Error::integrity(format!(
                "mariadb-backup's stream goes on with {path} at another place"
            )));
        }
        let next = content.offset.checked_add(content.length);
        known.next =
            next.ok_or_else(|| Error::integrity("mariadb-backup's stream has an impossible file"))?;
        Ok(())
    }

    /// Content of the current part; 0 at its end.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let Some(current) = self.current.clone() else { return Ok(0) };
        loop {
            match self.chunks.read(buffer)? {
                0 => {}
                read => {
                    self.note(&current, buffer.get(..read).unwrap_or_default());
                    return Ok(read);
                }
            }
            if self.pending.is_some() {
                return Ok(0);
            }
            let Some(head) = self.chunks.head()? else {
                self.current = None;
                return Ok(0);
            };
            match head.content {
                Some(content) if head.path == current => self.follows(&current, content)?,
                Some(content) if self.fits(content) => self.keep(&head.path, content)?,
                Some(_) => {
                    self.pending = Some(head);
                    return Ok(0);
                }
                None => {
                    let is_current = head.path == current;
                    let known = self.files.entry(head.path.clone()).or_default();
                    known.done = true;
                    if known.parts == 0 && !is_current && known.next == 0 {
                        self.between.push_back((head.path, 0, Vec::new()));
                    } else if is_current {
                        return Ok(0);
                    }
                }
            }
        }
    }

    fn fits(&self, content: Content) -> bool {
        usize::try_from(content.length)
            .is_ok_and(|length| self.between_bytes.saturating_add(length) <= self.between_max)
    }

    /// Takes what comes in between.
    fn keep(&mut self, path: &ItemPath, content: Content) -> Result<()> {
        self.follows(path, content)?;
        let mut bytes = vec![0; usize::try_from(content.length).unwrap_or(0)];
        let mut filled = 0;
        while self.chunks.left() > 0 {
            filled += self.chunks.read(bytes.get_mut(filled..).unwrap_or_default())?;
        }
        self.note(path, &bytes);
        self.between_bytes += bytes.len();
        match self.between.back_mut().filter(|(known, ..)| known == path) {
            Some((.., kept)) => kept.append(&mut bytes),
            None => self.between.push_back((path.clone(), content.offset, bytes)),
        }
        Ok(())
    }

    fn note(&mut self, path: &ItemPath, bytes: &[u8]) {
        let is_one = |name: &&str| name.as_bytes() == path.as_bytes();
        if PLACES.iter().chain(&MASTERS).any(is_one) {
            let note = self.notes.entry(path.clone()).or_default();
            let room = NOTE_BYTES_MAX.saturating_sub(note.len()).min(bytes.len());
            note.extend_from_slice(bytes.get(..room).unwrap_or_default());
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The content of a part: it can be read once, before the next one is asked for.
struct PartContent {
    shared: Arc<Mutex<State>>,
    number: u64,
}

impl Open for PartContent {
    fn open(&self) -> Result<Box<dyn StreamReader>> {
        Ok(Box::new(Self { shared: Arc::clone(&self.shared), number: self.number }))
    }
}

impl StreamReader for PartContent {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece> {
        let mut state = lock(&self.shared);
        if state.number != self.number {
            return Err(Error::bug("a file of a backup is read after the next one was asked for"));
        }
        Ok(match state.read(buffer)? {
            0 => Piece::End,
            read => Piece::Data(read),
        })
    }

    fn finish(self: Box<Self>) -> Result<StreamEnd> {
        // What changed meanwhile is in the log that comes with the files.
        Ok(StreamEnd::Steady)
    }
}

/// What is in memory.
struct Bytes {
    bytes: Arc<[u8]>,
    at: usize,
}

impl Open for Bytes {
    fn open(&self) -> Result<Box<dyn StreamReader>> {
        Ok(Box::new(Self { bytes: Arc::clone(&self.bytes), at: 0 }))
    }
}

impl StreamReader for Bytes {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
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

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::io::Cursor;
    use std::sync::{Arc, Mutex};

    use mainstay_core::{Body, Open, Piece, Result, Silent};
    use mainstay_testkit::{RealClock, Rng};

    use super::{Description, FilesBackup, Login, Options, State, part_offset};
    use crate::mariadb::stream::tests::chunk;

    /// The files that a stream holds, put together as a restore does.
    fn files(stream: Vec<u8>, between_max: usize) -> Result<BTreeMap<String, Vec<u8>>> {
        let mut state = State::of(Box::new(Cursor::new(stream)));
        state.between_max = between_max;
        let login = Login { address: "mariadb://".parse()?, user: "me".into(), password: None };
        let mut backup = FilesBackup {
            shared: Arc::new(Mutex::new(state)),
            program: None,
            _options: Options::of(&login)?,
            description: Description::default(),
            directories: BTreeSet::new(),
            last: None,
            clock: Arc::new(RealClock),
            progress: Arc::new(Silent),
        };
        let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        while let Some(item) = backup.part()? {
            let (Body::Stream(open) | Body::Pages(open)) = item.body else { panic!("no content") };
            let content = read(open.as_ref())?;
            let path = item.path.to_string();
            match part_offset(&item.metadata) {
                None => {
                    let known = files.insert(path.strip_prefix("data/").unwrap().to_owned(), content);
                    assert_eq!(known, None);
                }
                Some(offset) => {
                    let name = path.strip_prefix("parts/").unwrap().rsplit_once('/').unwrap().0;
                    let file = files.get_mut(name).unwrap();
                    assert_eq!(file.len() as u64, offset);
                    file.extend(content);
                }
            }
        }
        Ok(files)
    }

    fn read(open: &dyn Open) -> Result<Vec<u8>> {
        let (mut reader, mut content, mut buffer) = (open.open()?, Vec::new(), [0; 1000]);
        while let Piece::Data(length) = reader.read(&mut buffer)? {
            content.extend_from_slice(&buffer[..length]);
        }
        Ok(content)
    }

    #[test]
    fn files_that_come_in_turns_come_back_whole_whatever_fits_in_between() {
        mainstay_testkit::for_each_seed(200, |seed| {
            let mut rng = Rng::new(seed);
            let names = ["ibdata1", "shop/a.ibd", "shop/b.frm", "ib_logfile0", "empty"];
            let mut expected: BTreeMap<String, Vec<u8>> = BTreeMap::new();
            let mut open: Vec<&str> = names.to_vec();
            let mut stream = Vec::new();
            while !open.is_empty() {
                let index = rng.below(open.len());
                let file = expected.entry(open[index].to_owned()).or_default();
                if open[index] == "empty" || rng.chance(15) {
                    stream.extend(chunk(open[index], 0, None));
                    open.remove(index);
                    continue;
                }
                let length = rng.below(4000);
                let content = rng.bytes(length);
                stream.extend(chunk(open[index], file.len() as u64, Some(&content)));
                file.extend(content);
            }
            for between_max in [0, 3000, 1 << 20] {
                assert!(
                    files(stream.clone(), between_max).unwrap() == expected,
                    "seed {seed}, {between_max}"
                );
            }
        });
    }

    #[test]
    fn a_file_that_goes_on_elsewhere_is_an_error() {
        for stream in [
            [chunk("a", 0, Some(b"xx")), chunk("a", 3, Some(b"y"))].concat(),
            [chunk("a", 0, Some(b"xx")), chunk("a", 0, None), chunk("a", 2, Some(b"y"))].concat(),
            chunk("a", 1, Some(b"xx")),
            chunk("a", u64::MAX, Some(b"xx")),
        ] {
            files(stream, 1 << 20).unwrap_err();
        }
    }
}
