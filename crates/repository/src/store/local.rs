//! A repository in a directory.
//!
//! | name | what |
//! |---|---|
//! | every name without a leading dot | a blob (0400: nothing writes to it again, not by mistake either) |
//! | `.tmp/` | blobs that are being written, where the file system cannot keep them nameless; it also tells a store from any other directory |
//! | `.reserve` | space kept free for the day the disk is full |
//!
//! What the file system must promise: `link` or `rename` without replacement is atomic, `fdatasync` makes content
//! durable, `fsync` of a directory makes its names durable. Paths are walked component by component without
//! following symbolic links, which needs no newer kernel and holds in every sandbox: the names have no `..`.

mod reserve;
mod temporary;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use mainstay_core::{BlobStore, Capabilities, Code, Error, Listed, Put, Result, Time, check_blob_name};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use temporary::{Publish, Staging};

const STAGING: &str = ".tmp";
const DIRECTORY_MODE: Mode = Mode::RWXU;
const BLOB_MODE: Mode = Mode::RUSR;

/// A directory as a [`BlobStore`]. Any number of processes may use one directory at once.
pub struct LocalStore {
    root: OwnedFd,
    path: PathBuf,
    /// Made by the first put, so that opening writes nothing and works on a read-only medium.
    staging: OnceLock<Staging>,
    directories: Mutex<Directories>,
    /// Held for a whole flush: whoever finds nothing left to sync must wait for the one who is at it.
    flushing: Mutex<()>,
}

/// Which directories have to be synced; `""` is the root.
#[derive(Default)]
struct Directories {
    dirty: BTreeSet<String>,
    /// Those whose own names have been dirty, and so synced, since this store was opened. Another process may
    /// have made them and died before its flush.
    reached: BTreeSet<String>,
    /// After a failed sync the kernel forgets what was lost, so no later one can be believed.
    failed: bool,
}

impl LocalStore {
    /// Makes the directory, or accepts an empty one or one that is a store already, and sets the reserve aside
    /// if there is room.
    ///
    /// Errors: [`Code::Refused`] when the directory holds anything else.
    pub fn create(path: &Path) -> Result<Self> {
        match rustix::fs::mkdirat(CWD, path, DIRECTORY_MODE) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failure(format!("cannot make {}", path.display()), error)),
        }
        let store = Self::open(path)?;
        if !store.is_store_or_empty()? {
            let what = format!("{} is not empty and not a repository", path.display());
            return Err(Error::new(Code::Refused, what).hint("Choose an empty or a new directory."));
        }
        store.staging()?;
        store.restore_reserve()?;
        store.flush()?;
        sync_parent(path);
        Ok(store)
    }

    /// Opens without writing anything.
    ///
    /// Errors: [`Code::NoRepository`] when there is no such directory.
    pub fn open(path: &Path) -> Result<Self> {
        let what = || format!("cannot open {}", path.display());
        let root = match rustix::fs::openat(CWD, path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(root) => root,
            Err(error @ (Errno::NOENT | Errno::NOTDIR)) => {
                return Err(Error::new(Code::NoRepository, what())
                    .because(std::io::Error::from(error))
                    .hint("Make a repository with `mainstay init`, or check that its disk is mounted."));
            }
            Err(error) => return Err(failure(what(), error)),
        };
        Ok(Self {
            root,
            path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
            staging: OnceLock::new(),
            directories: Mutex::default(),
            flushing: Mutex::default(),
        })
    }

    fn is_store_or_empty(&self) -> Result<bool> {
        let mut empty = true;
        for entry in self.read_dir("", &self.root)? {
            match entry?.as_str() {
                STAGING => return Ok(true),
                "lost+found" => {}
                _ => empty = false,
            }
        }
        Ok(empty)
    }

    fn staging(&self) -> Result<&Staging> {
        if let Some(staging) = self.staging.get() {
            return Ok(staging);
        }
        let made =
            Staging::open(&self.root).map_err(|error| error.during(format!("cannot write to {self}")))?;
        self.mark_dirty("");
        Ok(self.staging.get_or_init(|| made))
    }

    /// The directory that holds `name`, and the last component of the name; `None` when there is no such
    /// directory.
    fn parent<'a>(&self, name: &'a str) -> Result<Option<(OwnedFd, &'a str)>> {
        let (directory, leaf) = split(name);
        Ok(self.directory(directory)?.map(|directory| (directory, leaf)))
    }

    /// `""` is the root.
    fn directory(&self, name: &str) -> Result<Option<OwnedFd>> {
        let mut at = self.clone_root()?;
        for component in name.split('/').filter(|component| !component.is_empty()) {
            match step(&at, component, name)? {
                Some(next) => at = next,
                None => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    fn make_directory(&self, name: &str) -> Result<OwnedFd> {
        let mut at = self.clone_root()?;
        for component in name.split('/').filter(|component| !component.is_empty()) {
            if let Some(next) = step(&at, component, name)? {
                at = next;
                continue;
            }
            match rustix::fs::mkdirat(&at, component, DIRECTORY_MODE) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(failure(format!("cannot make the directory {name}"), error)),
            }
            at = step(&at, component, name)?
                .ok_or_else(|| Error::bug(format!("{name} would be both a blob and a directory")))?;
        }
        Ok(at)
    }

    fn clone_root(&self) -> Result<OwnedFd> {
        self.root.try_clone().map_err(|error| Error::io("cannot duplicate a file descriptor", error))
    }

    /// A blob, open for reading, and what `fstat` says.
    fn open_blob(&self, name: &str) -> Result<(OwnedFd, Stat)> {
        check_blob_name(name)?;
        let absent = || Error::new(Code::NotFound, format!("there is no blob {name}"));
        let (parent, leaf) = self.parent(name)?.ok_or_else(absent)?;
        // NONBLOCK: a planted FIFO must not hang the reader.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&parent, leaf, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Err(absent()),
            Err(Errno::LOOP) => return Err(not_a_file(name)),
            Err(error) => return Err(failure(format!("cannot open {name}"), error)),
        };
        let stat =
            rustix::fs::fstat(&file).map_err(|error| failure(format!("cannot examine {name}"), error))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok((file, stat)),
            FileType::Directory => Err(absent()),
            _ => Err(not_a_file(name)),
        }
    }

    /// The names in one directory, those that are not UTF-8 left out.
    fn read_dir(&self, name: &str, directory: &OwnedFd) -> Result<impl Iterator<Item = Result<String>>> {
        let what = format!("cannot list {self}/{name}");
        let entries = readable(directory).and_then(Dir::new).map_err(|error| failure(what.clone(), error))?;
        Ok(entries.filter_map(move |entry| match entry {
            Ok(entry) => match entry.file_name().to_str() {
                Ok("." | "..") | Err(_) => None,
                Ok(name) => Some(Ok(name.to_owned())),
            },
            Err(error) => Some(Err(failure(what.clone(), error))),
        }))
    }

    /// Tells `each` of the blobs directly in `directory`, and adds the directories in it to `pending`.
    fn list_directory(
        &self,
        directory: &str,
        pending: &mut Vec<String>,
        each: &mut dyn FnMut(Listed) -> Result<()>,
    ) -> Result<()> {
        let Some(handle) = self.directory(directory)? else { return Ok(()) };
        for leaf in self.read_dir(directory, &handle)? {
            let leaf = leaf?;
            let name = if directory.is_empty() { leaf.clone() } else { format!("{directory}/{leaf}") };
            if check_blob_name(&name).is_err() {
                continue;
            }
            let stat = match rustix::fs::statat(&handle, leaf, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => stat,
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(failure(format!("cannot examine {name}"), error)),
            };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => each(listed(name, &stat))?,
                FileType::Directory => pending.push(name),
                _ => {}
            }
        }
        Ok(())
    }

    fn mark_dirty(&self, directory: &str) {
        let mut directories = self.directories.lock().unwrap_or_else(PoisonError::into_inner);
        directories.dirty.insert(directory.to_owned());
        let mut at = directory;
        while !at.is_empty() && directories.reached.insert(at.to_owned()) {
            at = split(at).0;
            directories.dirty.insert(at.to_owned());
        }
    }

    fn sync_directory(&self, name: &str) -> Result<()> {
        let Some(directory) = self.directory(name)? else { return Ok(()) };
        let what = || format!("cannot make {self}/{name} durable");
        let directory = readable(&directory).map_err(|error| failure(what(), error))?;
        match rustix::fs::fsync(&directory) {
            // Some network file systems have no such call for directories.
            Err(Errno::INVAL) => rustix::fs::syncfs(&directory),
            other => other,
        }
        .map_err(|error| failure(what(), error))
    }
}

impl BlobStore for LocalStore {
    fn put_new(&self, name: &str, parts: &[&[u8]]) -> Result<Put> {
        check_blob_name(name)?;
        let staging = self.staging()?;
        let (directory, leaf) = split(name);
        let parent = self.make_directory(directory)?;
        let put = if is_taken(&parent, leaf, name)? {
            Put::Exists
        } else {
            let during = |error: Error| error.during(format!("cannot store {name}"));
            let file = staging.write(parts).map_err(during)?;
            staging.publish(file, &parent, leaf).map_err(during)?
        };
        self.mark_dirty(directory);
        Ok(put)
    }

    fn get(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>> {
        let (file, stat) = self.open_blob(name)?;
        if range.start > range.end {
            return Err(Error::bug(format!("the range {range:?} of {name} ends before it starts")));
        }
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let too_short = |size| Error::integrity(format!("{name} has {size} bytes, not {range:?}"));
        if range.end > size {
            return Err(too_short(size));
        }
        let wanted = usize::try_from(range.end - range.start).map_err(|_too_large| too_short(size))?;
        let mut bytes = vec![0; wanted];
        match File::from(file).read_exact_at(&mut bytes, range.start) {
            Ok(()) => Ok(bytes),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Err(too_short(size)),
            Err(error) => {
                let what = format!("cannot read {range:?} of {name}");
                // The medium lost these bytes: damage like any other, so that a second copy is looked for.
                let lost = error.raw_os_error() == Some(Errno::IO.raw_os_error());
                Err(if lost { Error::integrity(what).because(error) } else { Error::io(what, error) })
            }
        }
    }

    fn size(&self, name: &str) -> Result<u64> {
        Ok(u64::try_from(self.open_blob(name)?.1.st_size).unwrap_or(0))
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(Listed) -> Result<()>) -> Result<()> {
        if !prefix.is_empty() {
            check_blob_name(prefix)?;
            match self.open_blob(prefix) {
                Ok((_, stat)) => return each(listed(prefix.to_owned(), &stat)),
                Err(error) if error.code() == Code::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        let mut pending = vec![prefix.to_owned()];
        while let Some(directory) = pending.pop() {
            self.list_directory(&directory, &mut pending, each)?;
        }
        Ok(())
    }

    fn delete(&self, name: &str) -> Result<()> {
        check_blob_name(name)?;
        let Some((parent, leaf)) = self.parent(name)? else { return Ok(()) };
        match rustix::fs::unlinkat(&parent, leaf, AtFlags::empty()) {
            // A directory is no blob, so the blob is absent.
            Ok(()) | Err(Errno::NOENT | Errno::ISDIR) => {}
            Err(error) => return Err(failure(format!("cannot delete {name}"), error)),
        }
        self.mark_dirty(split(name).0);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        let _one_at_a_time = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let lock = || self.directories.lock().unwrap_or_else(PoisonError::into_inner);
        let dirty = {
            let mut directories = lock();
            if directories.failed {
                return Err(Error::new(Code::Io, format!("an earlier write to {self} was lost"))
                    .hint("Check the disk and its cables, then run `mainstay verify`."));
            }
            std::mem::take(&mut directories.dirty)
        };
        for directory in &dirty {
            self.sync_directory(directory).inspect_err(|_| lock().failed = true)?;
        }
        Ok(())
    }

    /// Finding out needs one empty file: on a medium that is full to the last inode, or read-only, the answer is
    /// no until there is room (see [`BlobStore::release_reserve`]).
    fn capabilities(&self) -> Capabilities {
        let create_if_absent = self.staging().is_ok_and(|staging| staging.publish != Publish::Replace);
        Capabilities { create_if_absent, retain_until: false }
    }

    fn location(&self) -> String {
        self.path.display().to_string()
    }

    fn release_reserve(&self) -> Result<bool> {
        reserve::release(&self.root)
    }

    fn restore_reserve(&self) -> Result<()> {
        reserve::restore(&self.root)
    }

    fn reserve(&self) -> Result<Option<u64>> {
        reserve::size(&self.root).map(Some)
    }

    fn sweep_temporary(&self, before: Time) -> Result<u64> {
        self.staging()?.sweep(before)
    }
}

impl fmt::Display for LocalStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.path.display(), f)
    }
}

/// The directory and the last component of a name.
fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('/').unwrap_or(("", name))
}

/// From a directory into one of its directories; `None` when there is none of that name.
fn step(at: &OwnedFd, component: &str, name: &str) -> Result<Option<OwnedFd>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(at, component, flags, Mode::empty()) {
        Ok(next) => Ok(Some(next)),
        Err(Errno::NOENT) => Ok(None),
        Err(Errno::NOTDIR | Errno::LOOP) => match kind_of(at, component, name)? {
            Some(FileType::RegularFile) | None => Ok(None),
            Some(_) => Err(not_a_file(name)),
        },
        Err(error) => Err(failure(format!("cannot open the directory {name}"), error)),
    }
}

/// A directory that was only walked through, open for listing and syncing.
fn readable(directory: &OwnedFd) -> std::result::Result<OwnedFd, Errno> {
    rustix::fs::openat(directory, ".", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Whether `leaf` is a blob in `parent`; an error when it is something that no blob can replace.
fn is_taken(parent: &OwnedFd, leaf: &str, name: &str) -> Result<bool> {
    match kind_of(parent, leaf, name)? {
        None => Ok(false),
        Some(FileType::RegularFile) => Ok(true),
        Some(FileType::Directory) => Err(Error::bug(format!("{name} would be both a blob and a directory"))),
        Some(_) => Err(not_a_file(name)),
    }
}

fn kind_of(parent: &OwnedFd, leaf: &str, name: &str) -> Result<Option<FileType>> {
    match rustix::fs::statat(parent, leaf, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(failure(format!("cannot examine {name}"), error)),
    }
}

fn listed(name: String, stat: &Stat) -> Listed {
    Listed { name, size: u64::try_from(stat.st_size).unwrap_or(0), modified: modified(stat) }
}

fn modified(stat: &Stat) -> Time {
    Time::from_parts(stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(0))
}

/// The name of a new repository's directory, as well as can be: it may lie where nothing may be opened.
fn sync_parent(path: &Path) {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if let Ok(parent) = rustix::fs::openat(CWD, parent, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        let _best_effort = rustix::fs::fsync(parent);
    }
}

fn not_a_file(name: &str) -> Error {
    Error::integrity(format!("{name} leads through something that is neither a file nor a directory"))
        .hint("Symbolic links and special files do not belong in a repository; remove it, then run `mainstay verify`.")
}

fn failure(what: impl Into<String>, error: Errno) -> Error {
    explained(Error::io(what, error.into()))
}

/// Adds what a person can do about a full medium.
fn explained(error: Error) -> Error {
    // A limit on the size of files is to a repository what a full medium is: no pack fits any more.
    let limited = std::error::Error::source(&error)
        .and_then(|cause| cause.downcast_ref::<std::io::Error>())
        .is_some_and(|cause| cause.kind() == ErrorKind::FileTooLarge);
    let error = if limited { Error::new(Code::Full, error.what()).because(error) } else { error };
    match error.code() {
        Code::Full => error.hint(
            "Run `mainstay expire` and then `mainstay gc`: both work on a full disk. Or give it more space.",
        ),
        _ => error,
    }
}
