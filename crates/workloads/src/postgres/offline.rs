//! The files of a cluster whose server is stopped, as a base backup has them.

use std::fs::{DirEntry, File};
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use mainstay_core::{
    Body, Captured, Clock, Code, Error, Item, ItemPath, Kind, Metadata, Next, Open, Piece, Receipt, Result,
    Source, Stamp, StreamEnd, StreamReader, Time,
};

use super::base::{CLUSTER, DATA, TABLESPACES, document, is_relation};
use super::cluster::{Cluster, Tablespace};
use super::lsn::Lsn;
use super::programs::Programs;

/// A shutdown checkpoint, with the head of its record: PostgreSQL 15 and later.
const RECORD_HEAD: usize = 4;
const RECORD_BYTES_MAX: u64 = 1 << 16;
const PAGE: u64 = 8192;
const PAGE_HEAD: u64 = 24;
const SEGMENT_HEAD: u64 = 40;
/// Directories whose content means nothing to another start: see "Backup of a cluster at the file system level".
const EMPTIED: [&str; 8] = [
    "pg_wal",
    "pg_replslot",
    "pg_dynshmem",
    "pg_notify",
    "pg_serial",
    "pg_snapshots",
    "pg_stat_tmp",
    "pg_subtrans",
];
const LOG: &str = "data/pg_wal";
const LEFT_OUT: [&str; 4] = ["postmaster.pid", "postmaster.opts", "pg_internal.init", "current_logfiles.tmp"];

/// How `pg_controldata` says that a standby has ended.
const STATE: &str = "Database cluster state";
const STANDBY: &str = "shut down in recovery";

/// What a server must not have less of than the one that wrote the log, as `pg_controldata` and as the settings name it.
const LIMITS: [(&str, &str); 5] = [
    ("max_connections setting", "max_connections"),
    ("max_worker_processes setting", "max_worker_processes"),
    ("max_wal_senders setting", "max_wal_senders"),
    ("max_prepared_xacts setting", "max_prepared_transactions"),
    ("max_locks_per_xact setting", "max_locks_per_transaction"),
];

/// A stopped cluster.
pub struct OfflineFiles {
    cluster: Cluster,
    moment: Time,
    /// What is still to be yielded, last first.
    left: Vec<Left>,
}

enum Left {
    /// A directory that was listed, or a file, and its path in the point.
    Path(PathBuf, ItemPath),
    Item(Box<Item>),
}

/// Describes a stopped cluster by its own files.
///
/// Errors: [`Code::Integrity`] when the control file makes no sense, [`Code::Refused`] for a standby.
pub fn describe_offline(data: &Path, programs: &Programs) -> Result<Cluster> {
    let control = programs.control(data)?;
    let field = |name: &str| {
        control
            .get(name)
            .cloned()
            .ok_or_else(|| Error::integrity(format!("the control file has no {name:?}")))
    };
    if field(STATE)? == STANDBY {
        return Err(is_standby(data));
    }
    let number = |name: &str| {
        let value = field(name)?;
        value
            .parse::<u64>()
            .map_err(|error| Error::integrity(format!("{name:?} is {value:?}")).because(error))
    };
    let said = programs.run("postgres", &["--version"])?;
    let version = said.split_once(") ").map_or(said.as_str(), |(_, version)| version).trim().to_owned();
    let mut digits =
        version.split(|sign: char| !sign.is_ascii_digit()).map(|part| part.parse::<u32>().unwrap_or(0));
    let version_number = digits.next().unwrap_or(0) * 10_000 + digits.next().unwrap_or(0);
    Cluster::check_version(&version, version_number)?;
    let segment_bytes = number("Bytes per WAL segment")?;
    let timeline = u32::try_from(number("Latest checkpoint's TimeLineID")?).unwrap_or(0);
    let place = |name: &str| {
        field(name)?.parse::<Lsn>().map_err(|()| Error::integrity(format!("{name:?} is no place")))
    };
    let checkpoint = place("Latest checkpoint location")?;
    let end = record_end(data, checkpoint, timeline, segment_bytes)?;
    let mut tablespaces = Vec::new();
    let links = data.join("pg_tblspc");
    for entry in list(&links)? {
        let Some(oid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let location = std::fs::read_link(entry.path())
            .map_err(|error| Error::io(format!("cannot read {}", entry.path().display()), error))?;
        tablespaces.push(Tablespace { oid, location: location.display().to_string() });
    }
    let cluster = Cluster {
        version,
        version_number,
        system: field("Database system identifier")?,
        segment_bytes,
        page_bytes: u32::try_from(number("Database block size")?).unwrap_or(0),
        data_checksums: number("Data page checksum version")? != 0,
        start: place("Latest checkpoint's REDO location")?.to_string(),
        start_timeline: timeline,
        end: end.to_string(),
        end_timeline: timeline,
        from_standby: false,
        tablespaces,
        settings: LIMITS
            .iter()
            .filter_map(|(said, name)| Some(((*name).to_owned(), control.get(*said)?.clone())))
            .collect(),
    };
    // What reads it back checks more.
    Cluster::from_json(&cluster.to_json()?)
}

/// A standby's files are consistent only behind its last checkpoint, which lies in its primary's log.
pub fn is_standby(data: &Path) -> Error {
    let what =
        format!("the server on {} is a standby, which is not backed up while it is stopped", data.display());
    Error::new(Code::Refused, what).hint("back it up while it runs: without --offline")
}

/// Where the record at `start` ends.
fn record_end(data: &Path, start: Lsn, timeline: u32, segment_bytes: u64) -> Result<Lsn> {
    let mut head = [0; RECORD_HEAD];
    read_log(data, start, timeline, segment_bytes, &mut head)?;
    let mut left = u64::from(u32::from_ne_bytes(head));
    if left < RECORD_HEAD as u64 || left > RECORD_BYTES_MAX {
        return Err(Error::integrity("the last record of the log has an impossible length"));
    }
    let mut at = start.0;
    loop {
        let room = PAGE - at % PAGE;
        if left <= room {
            return Ok(Lsn((at + left).next_multiple_of(8)));
        }
        (at, left) = (at + room, left - room);
        at += if at.is_multiple_of(segment_bytes) { SEGMENT_HEAD } else { PAGE_HEAD };
    }
}

/// Fills `buffer` with the log of a stopped cluster from `at` on. It lies within one segment.
pub fn read_log(data: &Path, at: Lsn, timeline: u32, segment_bytes: u64, buffer: &mut [u8]) -> Result<()> {
    let start = at.segment_start(segment_bytes);
    let path = data.join("pg_wal").join(start.file_name(timeline, segment_bytes));
    File::open(&path)
        .and_then(|file| file.read_exact_at(buffer, at.0 - start.0))
        .map_err(|error| Error::io(format!("cannot read {}", path.display()), error))
}

/// The directory itself, where a path leads to it by links: what is kept must not be the link.
fn directory_at(path: &Path) -> Result<PathBuf> {
    let found = std::fs::canonicalize(path);
    let found = found.map_err(|error| Error::io(format!("cannot find {}", path.display()), error))?;
    if found.is_dir() {
        return Ok(found);
    }
    Err(Error::new(Code::Refused, format!("{} is no directory", path.display())))
}

impl OfflineFiles {
    /// Of a server that has ended just now.
    pub fn new(data: &Path, cluster: Cluster, clock: &dyn Clock) -> Result<Self> {
        let mut left = Vec::new();
        if let Next::Item(document) = document(CLUSTER, cluster.to_json()?, clock)? {
            left.push(Left::Item(document));
        }
        let spaces = cluster.tablespaces.iter();
        for space in spaces {
            let path = path(format!("{TABLESPACES}/{}", space.oid).as_bytes())?;
            left.push(Left::Path(directory_at(Path::new(&space.location))?, path));
        }
        if !cluster.tablespaces.is_empty() {
            let metadata = Metadata { mode: 0o700, ..metadata_of(data)? };
            let item = Item {
                path: path(TABLESPACES.as_bytes())?,
                metadata,
                stamp: Stamp::default(),
                body: Body::None,
            };
            left.push(Left::Item(Box::new(item)));
        }
        left.push(Left::Path(directory_at(data)?, path(DATA.as_bytes())?));
        Ok(Self { cluster, moment: clock.now(), left })
    }

    fn item(&mut self, at: PathBuf, name: ItemPath) -> Result<Option<Item>> {
        let components: Vec<&[u8]> = name.components().collect();
        let mut metadata = metadata_of(&at)?;
        if name.as_bytes() == LOG.as_bytes() {
            // It may lie elsewhere; a restore has it in its place.
            let own = Metadata::new(Kind::Directory);
            metadata = Metadata { mode: 0o700, uid: metadata.uid, gid: metadata.gid, ..own };
        }
        let (body, below) = match metadata.kind {
            Kind::Directory => (Body::None, is_kept(&components)),
            Kind::File => {
                let (in_space, depth) = match components.first() {
                    Some(top) if *top == TABLESPACES.as_bytes() => (true, 2),
                    _ => (false, 1),
                };
                let rest = components.get(depth..).unwrap_or_default().join(&b'/');
                let content = Box::new(Content(at.clone()));
                (
                    if is_relation(&rest, in_space) { Body::Pages(content) } else { Body::Stream(content) },
                    false,
                )
            }
            Kind::Symlink => (Body::None, false),
            // Sockets and the like are of a server that has gone.
            _ => return Ok(None),
        };
        if below {
            for entry in list(&at)? {
                let child = name.join(entry.file_name().as_bytes());
                let child =
                    child.map_err(|error| Error::integrity("a file is named impossibly").because(error))?;
                if !is_left_out(&entry) {
                    self.left.push(Left::Path(entry.path(), child));
                }
            }
        }
        Ok(Some(Item { path: name, metadata, stamp: Stamp::default(), body }))
    }
}

/// Whether what is in a directory is kept; of some only the directory itself is.
fn is_kept(components: &[&[u8]]) -> bool {
    let [_, directory] = components else { return true };
    !EMPTIED.iter().any(|emptied| emptied.as_bytes() == *directory)
}

fn is_left_out(entry: &DirEntry) -> bool {
    let name = entry.file_name();
    LEFT_OUT.iter().any(|left_out| *left_out == name) || name.as_bytes().starts_with(b"pgsql_tmp")
}

impl Source for OfflineFiles {
    fn next(&mut self) -> Result<Next> {
        while let Some(left) = self.left.pop() {
            match left {
                Left::Item(item) => return Ok(Next::Item(item)),
                Left::Path(at, name) => {
                    if let Some(item) = self.item(at, name)? {
                        return Ok(Next::Item(Box::new(item)));
                    }
                }
            }
        }
        Ok(Next::End)
    }

    fn seal(&mut self) -> Result<Captured> {
        let end: Lsn = self.cluster.end.parse().map_err(|()| Error::bug("a cluster without an end"))?;
        let consistency = mainstay_core::Consistency::Application;
        Ok(Captured { position: end.position(), consistency, moment: self.moment })
    }

    fn commit(self: Box<Self>, _receipt: &Receipt) -> Result<()> {
        Ok(())
    }
}

fn list(directory: &Path) -> Result<Vec<DirEntry>> {
    let failed = |error| Error::io(format!("cannot list {}", directory.display()), error);
    std::fs::read_dir(directory).map_err(failed)?.map(|entry| entry.map_err(failed)).collect()
}

fn metadata_of(at: &Path) -> Result<Metadata> {
    let failed = |error| Error::io(format!("cannot look at {}", at.display()), error);
    let found = std::fs::symlink_metadata(at).map_err(failed)?;
    let kind = match found.file_type() {
        kind if kind.is_dir() => Kind::Directory,
        kind if kind.is_file() => Kind::File,
        kind if kind.is_symlink() => Kind::Symlink,
        _ => Kind::Socket,
    };
    let link_target = match kind {
        Kind::Symlink => Some(std::fs::read_link(at).map_err(failed)?.into_os_string().as_bytes().to_vec()),
        _ => None,
    };
    Ok(Metadata {
        size: if kind == Kind::File { found.len() } else { 0 },
        mode: found.mode() & 0o7777,
        uid: found.uid(),
        gid: found.gid(),
        modified: Time::from_parts(found.mtime(), found.mtime_nsec()),
        link_target,
        ..Metadata::new(kind)
    })
}

fn path(text: &[u8]) -> Result<ItemPath> {
    ItemPath::new(text).map_err(|error| Error::bug("a name of ours is no path").because(error))
}

/// A file that is opened when it is read.
struct Content(PathBuf);

impl Open for Content {
    fn open(&self) -> Result<Box<dyn StreamReader>> {
        let file = File::open(&self.0);
        let file = file.map_err(|error| Error::io(format!("cannot open {}", self.0.display()), error))?;
        Ok(Box::new(Reading(file, self.0.clone())))
    }
}

struct Reading(File, PathBuf);

impl StreamReader for Reading {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece> {
        loop {
            match self.0.read(buffer) {
                Ok(0) => return Ok(Piece::End),
                Ok(length) => return Ok(Piece::Data(length)),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io(format!("cannot read {}", self.1.display()), error)),
            }
        }
    }

    fn finish(self: Box<Self>) -> Result<StreamEnd> {
        Ok(StreamEnd::Steady)
    }
}
