//! A base backup streamed out of a server, file by file, with nothing staged: `BASE_BACKUP` of the replication protocol.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Buf as _, Bytes};
use mainstay_core::{
    Body, Captured, Clock, Code, Consistency, Error, Item, ItemPath, Kind, Metadata, Next, Open, Piece,
    Receipt, Result, Source, Stamp, StreamEnd, StreamReader, Time,
};

use super::cluster::{Cluster, Tablespace};
use super::configuration::{self, CONFIGURATION};
use super::lsn::Lsn;
use super::pages;
use super::tar::{self, BLOCK, Content, Member};
use super::wal::{WalStream, bytes_of};
use super::watch::{PageRule, Watch};
use super::wire::{Connection, Message, Then, texts};

/// Directories of a point: the data directory, and each other tablespace under its number.
pub const DATA: &str = "data";
pub const TABLESPACES: &str = "tablespaces";
/// Documents of a point: [`Cluster`], and the list of all files that the server wrote itself.
pub const CLUSTER: &str = "cluster.json";
pub const MANIFEST: &str = "backup_manifest";
/// Where the server keeps its links to tablespaces.
pub(super) const SPACES: &str = "pg_tblspc";
/// The manifest is kept in memory; it names every file in some 150 bytes.
const MANIFEST_BYTES_MAX: usize = 1 << 30;

#[derive(Clone, Copy, Debug)]
pub struct BaseRequest {
    /// Has the server write a checkpoint at once, and not spread over minutes.
    pub fast: bool,
}

/// Reads a running cluster. Where its log has to be followed from, so that what this yields can be brought to a consistent
/// state, is known before the first file: [`BaseBackup::start`].
pub struct BaseBackup {
    shared: Arc<Mutex<Stream>>,
    cluster: Cluster,
    clock: Arc<dyn Clock>,
    /// Tells of settings, and has suspicious pages read again.
    sql: Option<Connection>,
    /// Whom the first member belongs to, and with it the directories that are in no archive.
    owner: Option<Owner>,
    /// Yielded after the archives' own members.
    last: Vec<Next>,
    /// The member now at work.
    number: u64,
    state: State,
}

/// User and group, by number and by name.
type Owner = (u32, u32, Vec<u8>, Vec<u8>);

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Between,
    /// In an archive, of the data directory or of a tablespace.
    Archive(Option<u32>),
    Done,
}

enum Section {
    Archive(Option<u32>),
    Manifest,
}

/// The one stream that all files come in.
struct Stream {
    connection: Connection,
    /// Copied data that was not taken yet.
    data: Bytes,
    /// What begins behind it.
    next: Option<Section>,
    ended: bool,
    /// The member at work, what is left of its content, and of the zeros after it.
    number: u64,
    left: u64,
    padding: u64,
    watch: Watch,
}

impl BaseBackup {
    /// Has the server begin. `sql` is an ordinary connection, if there is one: it tells of settings, and reads pages again
    /// that may have been torn.
    pub fn start(
        mut connection: Connection,
        mut sql: Option<Connection>,
        request: BaseRequest,
        clock: Arc<dyn Clock>,
    ) -> Result<Self> {
        let mut cluster = describe(&mut connection, sql.as_mut())?;
        let file = connection.value("SHOW segment_size")?;
        let file_bytes = bytes_of(&file).ok_or_else(|| connection.broken("its files have no size"))?;
        let checkpoint = if request.fast { "fast" } else { "spread" };
        // The server would end the backup with an error over a page that it finds bad; here it becomes a finding.
        let command = format!(
            "BASE_BACKUP (LABEL 'mainstay', CHECKPOINT '{checkpoint}', WAIT false, MANIFEST 'yes', MANIFEST_CHECKSUMS \
             'SHA256', VERIFY_CHECKSUMS false)"
        );
        let (sets, then) = connection.ask(&command)?;
        let [.., start, spaces] = sets.as_slice() else {
            return Err(connection.broken("it does not say where the backup starts"));
        };
        if then != Then::Copy {
            return Err(connection.broken("it does not send the backup"));
        }
        (cluster.start, cluster.start_timeline) =
            place(start).ok_or_else(|| connection.broken("a place is malformed"))?;
        for row in spaces {
            if let [Some(oid), Some(location), ..] = row.as_slice() {
                let oid = oid.parse().map_err(|_number| connection.broken("a tablespace has no number"))?;
                cluster.tablespaces.push(Tablespace { oid, location: location.clone() });
            }
        }
        let rule = cluster.data_checksums.then_some(PageRule {
            page_bytes: cluster.page_bytes as usize,
            file_bytes,
            start: cluster.start.parse().unwrap_or_default(),
        });
        let stream = Stream {
            connection,
            watch: Watch::new(rule),
            data: Bytes::new(),
            next: None,
            ended: false,
            number: 0,
            left: 0,
            padding: 0,
        };
        let shared = Arc::new(Mutex::new(stream));
        let state = State::Between;
        Ok(Self { shared, cluster, clock, sql, owner: None, last: Vec::new(), number: 0, state })
    }

    /// The cluster as far as it is known by now: where the backup starts, not where it ends.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    fn member(&mut self, space: Option<u32>) -> Result<Option<Next>> {
        let mut stream = lock(&self.shared);
        stream.pass_member()?;
        let Some(block) = stream.block()? else { return Ok(None) };
        let Some(member) = tar::parse(&block)? else {
            // Whatever stands behind the end of an archive means nothing.
            while stream.fill()? {
                stream.data.clear();
            }
            return Ok(None);
        };
        self.number += 1;
        self.owner.get_or_insert_with(|| (member.uid, member.gid, member.user.clone(), member.group.clone()));
        (stream.number, stream.left, stream.padding) = (self.number, member.size, member.padding());
        if member.content == Content::File {
            let top = space.map(|oid| format!("{SPACES}/{oid}/")).unwrap_or_default();
            let path = [top.as_bytes(), &member.path].concat();
            stream.watch.begin(path, is_relation(&member.path, space.is_some()));
        }
        drop(stream);
        self.item(space, member).map(Some)
    }

    fn item(&self, space: Option<u32>, member: Member) -> Result<Next> {
        let top = match space {
            None => DATA.to_owned(),
            Some(oid) => format!("{TABLESPACES}/{oid}"),
        };
        let path = [top.as_bytes(), b"/", &member.path].concat();
        let path = ItemPath::new(path)
            .map_err(|error| Error::integrity("the server named a file impossibly").because(error))?;
        let is_relation = is_relation(&member.path, space.is_some());
        let kind = match member.content {
            Content::File => Kind::File,
            Content::Directory => Kind::Directory,
            Content::Symlink(_) => Kind::Symlink,
        };
        let metadata = Metadata {
            size: member.size,
            mode: member.mode,
            uid: member.uid,
            gid: member.gid,
            user: Some(member.user).filter(|name| !name.is_empty()),
            group: Some(member.group).filter(|name| !name.is_empty()),
            modified: Time::from_seconds(member.modified),
            link_target: match member.content {
                Content::Symlink(target) => Some(target),
                _ => None,
            },
            ..Metadata::new(kind)
        };
        let content = Box::new(MemberContent { shared: Arc::clone(&self.shared), number: self.number });
        let body = match kind {
            Kind::File if is_relation => Body::Pages(content),
            Kind::File => Body::Stream(content),
            _ => Body::None,
        };
        Ok(Next::Item(Box::new(Item { path, metadata, stamp: Stamp::default(), body })))
    }

    fn manifest(&self) -> Result<Next> {
        let mut stream = lock(&self.shared);
        let mut text = Vec::new();
        while stream.fill()? {
            text.extend_from_slice(&stream.data);
            stream.data.clear();
            if text.len() > MANIFEST_BYTES_MAX {
                return Err(Error::new(Code::Unsupported, "the cluster has too many files for one backup"));
            }
        }
        stream.watch.check(&text)?;
        document(MANIFEST, text, &*self.clock)
    }

    /// Reads where the backup ended.
    fn end(&mut self) -> Result<Next> {
        let mut stream = lock(&self.shared);
        let (sets, _) = stream.connection.answers()?;
        let found = sets.iter().rev().find_map(|rows| place(rows));
        let (end, timeline) =
            found.ok_or_else(|| stream.connection.broken("it does not say where the backup ends"))?;
        let suspects = std::mem::take(&mut stream.watch.suspects);
        drop(stream);
        (self.cluster.end, self.cluster.end_timeline) = (end, timeline);
        let page_bytes = self.cluster.page_bytes as usize;
        let start = self.cluster.start.parse().unwrap_or_default();
        let findings = pages::findings(&suspects, self.sql.as_mut(), page_bytes, start)?;
        self.last.extend(findings.into_iter().map(Next::Skipped));
        self.configuration()?;
        let mut directories = vec![DATA.to_owned()];
        if !self.cluster.tablespaces.is_empty() {
            directories.push(TABLESPACES.to_owned());
        }
        let spaces = self.cluster.tablespaces.iter();
        directories.extend(spaces.map(|space| format!("{TABLESPACES}/{}", space.oid)));
        for name in directories {
            self.last.push(Next::Item(Box::new(directory(&name, self.owner.clone())?)));
        }
        document(CLUSTER, self.cluster.to_json()?, &*self.clock)
    }
}

impl BaseBackup {
    /// Reads the configuration that lies elsewhere.
    fn configuration(&mut self) -> Result<()> {
        let Some(sql) = &mut self.sql else { return Ok(()) };
        let found = configuration::read(sql, self.cluster.version_number)?;
        self.last.extend(found.skips.into_iter().map(Next::Skipped));
        let now = self.clock.now();
        for (path, text) in found.files {
            let item = of(held(path, Kind::File, text, now), self.owner.clone());
            self.last.push(Next::Item(Box::new(item)));
        }
        // Those above come first when this is read from its end.
        for path in found.directories.into_iter().rev() {
            let item = directory(CONFIGURATION, self.owner.clone())?;
            self.last.push(Next::Item(Box::new(Item { path, ..item })));
        }
        Ok(())
    }
}

impl Source for BaseBackup {
    fn next(&mut self) -> Result<Next> {
        loop {
            match self.state {
                State::Archive(space) => match self.member(space)? {
                    Some(next) => return Ok(next),
                    None => self.state = State::Between,
                },
                State::Between => {
                    let section = lock(&self.shared).section()?;
                    match section {
                        Some(Section::Archive(space)) => self.state = State::Archive(space),
                        Some(Section::Manifest) => return self.manifest(),
                        None => {
                            self.state = State::Done;
                            return self.end();
                        }
                    }
                }
                State::Done => {
                    return Ok(self.last.pop().unwrap_or(Next::End));
                }
            }
        }
    }

    fn seal(&mut self) -> Result<Captured> {
        let end: Lsn =
            self.cluster.end.parse().map_err(|()| Error::bug("a backup that has not ended is sealed"))?;
        // With the log up to its end this is one moment, and the database's own recovery brings it there.
        Ok(Captured {
            position: end.position(),
            consistency: Consistency::Application,
            moment: self.clock.now(),
        })
    }

    fn commit(self: Box<Self>, _receipt: &Receipt) -> Result<()> {
        Ok(())
    }
}

impl Stream {
    /// Whether there is more data of this section; then some of it is in `data`.
    fn fill(&mut self) -> Result<bool> {
        while self.data.is_empty() && self.next.is_none() && !self.ended {
            let Message { tag, mut body } = self.connection.message()?;
            match tag {
                b'd' if body.first() == Some(&b'd') => {
                    body.advance(1);
                    self.data = body;
                }
                b'd' if body.first() == Some(&b'n') => self.next = Some(self.archive(&body)?),
                b'd' if body.first() == Some(&b'm') => self.next = Some(Section::Manifest),
                b'c' => self.ended = true,
                b'E' => return Err(self.connection.refused(&body)),
                // Progress, notices and settings.
                _ => {}
            }
        }
        Ok(!self.data.is_empty())
    }

    /// `base.tar`, or the number of a tablespace in place of the name.
    fn archive(&self, body: &[u8]) -> Result<Section> {
        let names = texts(body.get(1..).unwrap_or_default());
        let name = names.first().and_then(|name| name.strip_suffix(".tar")).unwrap_or_default();
        if name == "base" {
            return Ok(Section::Archive(None));
        }
        let oid = name
            .parse()
            .map_err(|_number| self.connection.broken("it sends an archive of an unknown name"))?;
        Ok(Section::Archive(Some(oid)))
    }

    /// The next section, once this one has been read. `None` after the last.
    fn section(&mut self) -> Result<Option<Section>> {
        if self.fill()? {
            return Err(self.connection.broken("it sends data that belong to nothing"));
        }
        Ok(self.next.take())
    }

    /// Takes up to `buffer.len()` bytes; 0 at the end of the section.
    fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        if !self.fill()? {
            return Ok(0);
        }
        let length = buffer.len().min(self.data.len());
        self.data.copy_to_slice(buffer.get_mut(..length).unwrap_or_default());
        Ok(length)
    }

    /// The next header; `None` when the section ends.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>> {
        let (mut block, mut filled) = ([0; BLOCK], 0);
        while filled < BLOCK {
            match self.read(block.get_mut(filled..).unwrap_or_default())? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(self.connection.broken("an archive ends in the middle of a header")),
                length => filled += length,
            }
        }
        Ok(Some(block))
    }

    /// Goes to the next header, past what nobody read.
    fn pass_member(&mut self) -> Result<()> {
        while self.left + self.padding > 0 {
            if !self.fill()? {
                return Err(self.connection.broken("an archive ends in the middle of a file"));
            }
            let is_content = self.left > 0;
            let part = if is_content { &mut self.left } else { &mut self.padding };
            let length = (*part).min(self.data.len() as u64);
            *part -= length;
            let passed = self.data.split_to(length as usize);
            if is_content {
                self.watch.bytes(&passed);
            }
        }
        self.watch.end();
        Ok(())
    }
}

/// The content of a member: it can be read once, before the next one is asked for.
struct MemberContent {
    shared: Arc<Mutex<Stream>>,
    number: u64,
}

impl Open for MemberContent {
    fn open(&self) -> Result<Box<dyn StreamReader>> {
        Ok(Box::new(Self { shared: Arc::clone(&self.shared), number: self.number }))
    }
}

impl StreamReader for MemberContent {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece> {
        let mut stream = lock(&self.shared);
        if stream.number != self.number {
            return Err(Error::bug("a file of a base backup is read after the next one was asked for"));
        }
        let wanted = buffer.len().min(usize::try_from(stream.left).unwrap_or(usize::MAX));
        if wanted == 0 {
            return Ok(Piece::End);
        }
        match stream.read(buffer.get_mut(..wanted).unwrap_or_default())? {
            0 => Err(stream.connection.broken("an archive ends in the middle of a file")),
            length => {
                stream.left -= length as u64;
                stream.watch.bytes(buffer.get(..length).unwrap_or_default());
                Ok(Piece::Data(length))
            }
        }
    }

    fn finish(self: Box<Self>) -> Result<StreamEnd> {
        // Pages of it may be torn; the log that belongs to the backup mends them.
        Ok(StreamEnd::Steady)
    }
}

/// A small text.
struct Document(Arc<[u8]>, usize);

impl Open for Document {
    fn open(&self) -> Result<Box<dyn StreamReader>> {
        Ok(Box::new(Self(Arc::clone(&self.0), 0)))
    }
}

impl StreamReader for Document {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece> {
        let rest = self.0.get(self.1..).unwrap_or_default();
        let length = rest.len().min(buffer.len());
        if length == 0 {
            return Ok(Piece::End);
        }
        buffer.get_mut(..length).unwrap_or_default().copy_from_slice(rest.get(..length).unwrap_or_default());
        self.1 += length;
        Ok(Piece::Data(length))
    }

    fn finish(self: Box<Self>) -> Result<StreamEnd> {
        Ok(StreamEnd::Steady)
    }
}

pub(super) fn document(name: &str, text: Vec<u8>, clock: &dyn Clock) -> Result<Next> {
    Ok(Next::Item(Box::new(held(named(name)?, Kind::Record, text, clock.now()))))
}

/// A small text that is there already.
fn held(path: ItemPath, kind: Kind, text: Vec<u8>, modified: Time) -> Item {
    let metadata = Metadata { size: text.len() as u64, mode: 0o600, modified, ..Metadata::new(kind) };
    let body = Body::Stream(Box::new(Document(text.into(), 0)));
    Item { path, metadata, stamp: Stamp::default(), body }
}

fn directory(name: &str, owner: Option<Owner>) -> Result<Item> {
    let metadata = Metadata { mode: 0o700, ..Metadata::new(Kind::Directory) };
    Ok(of(Item { path: named(name)?, metadata, stamp: Stamp::default(), body: Body::None }, owner))
}

/// Gives an item to whom the cluster belongs.
fn of(mut item: Item, owner: Option<Owner>) -> Item {
    let (uid, gid, user, group) = owner.unwrap_or_default();
    (item.metadata.uid, item.metadata.gid) = (uid, gid);
    item.metadata.user = Some(user).filter(|name| !name.is_empty());
    item.metadata.group = Some(group).filter(|name| !name.is_empty());
    item
}

fn named(name: &str) -> Result<ItemPath> {
    ItemPath::new(name).map_err(|error| Error::bug("a name of ours is no path").because(error))
}

fn lock(stream: &Mutex<Stream>) -> MutexGuard<'_, Stream> {
    stream.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A log position and a timeline, as an answer has them.
fn place(rows: &[Vec<Option<String>>]) -> Option<(String, u32)> {
    let [Some(lsn), Some(timeline), ..] = rows.first()?.as_slice() else { return None };
    lsn.parse::<Lsn>().ok()?;
    Some((lsn.clone(), timeline.parse().ok()?))
}

/// Whether a file is made of pages that change where they are: main and other forks of relations.
pub(super) fn is_relation(path: &[u8], in_tablespace: bool) -> bool {
    let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
    let in_place = match parts.as_slice() {
        [b"global", _] | [b"base", _, _] => !in_tablespace,
        [version, _, _] => in_tablespace && version.starts_with(b"PG_"),
        _ => false,
    };
    let name = parts.last().copied().unwrap_or_default();
    in_place && name.first().is_some_and(u8::is_ascii_digit)
}

fn describe(connection: &mut Connection, sql: Option<&mut Connection>) -> Result<Cluster> {
    let version = connection.version().to_owned();
    let number = connection.value("SHOW server_version_num")?;
    let version_number = number.parse().map_err(|_number| connection.broken("its version is no number"))?;
    Cluster::check_version(&version, version_number)?;
    let identity = WalStream::identify(connection)?;
    let page = connection.value("SHOW block_size")?;
    let from_standby = connection.value("SHOW in_hot_standby")? == "on";
    let settings = sql.map_or_else(|| Ok(Vec::new()), settings)?;
    Ok(Cluster {
        version,
        version_number,
        system: identity.system,
        segment_bytes: identity.segment_bytes,
        page_bytes: page.parse().map_err(|_number| connection.broken("its pages have no size"))?,
        data_checksums: connection.value("SHOW data_checksums")? == "on",
        start: String::new(),
        start_timeline: 0,
        end: String::new(),
        end_timeline: 0,
        from_standby,
        tablespaces: Vec::new(),
        settings,
    })
}

fn settings(sql: &mut Connection) -> Result<Vec<(String, String)>> {
    let rows = sql.query(
        "SELECT name, setting FROM pg_catalog.pg_settings WHERE source NOT IN ('default', 'override', 'client', 'session') \
         OR name LIKE '%\\_file' ORDER BY name",
    )?;
    let pair = |row: Vec<Option<String>>| {
        let mut row = row.into_iter();
        Some((row.next()??, row.next()??))
    };
    Ok(rows.into_iter().filter_map(pair).collect())
}

#[cfg(test)]
mod tests {
    use super::is_relation;

    #[test]
    fn files_of_pages_are_told_by_their_place() {
        for yes in ["base/5/16384", "base/5/16384.1", "base/5/16384_vm", "global/1262"] {
            assert!(is_relation(yes.as_bytes(), false), "{yes}");
        }
        assert!(is_relation(b"PG_15_202209061/5/16390_fsm", true));
        for no in
            ["base/5/PG_VERSION", "base/5/pg_filenode.map", "pg_xact/0000", "global/pg_control", "PG_VERSION"]
        {
            assert!(!is_relation(no.as_bytes(), false), "{no}");
        }
    }
}
