//! Files of databases that this process has open. POSIX takes all locks of a process on a file away when the process
//! closes *any* descriptor of it, SQLite's among them; so each database's file is opened once, and closed only when
//! nobody here holds a lock on it any more.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_core::{Code, Error, Result};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;

type Files = BTreeMap<(u64, u64), Arc<File>>;

static FILES: Mutex<Files> = Mutex::new(BTreeMap::new());

fn files() -> MutexGuard<'static, Files> {
    FILES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file that is there, found without following a link anywhere in its path, and not opened: whoever owns the directory
/// may put a link to somebody else's file there, or what never answers.
pub(super) struct There {
    fd: OwnedFd,
    identity: (u64, u64),
}

impl There {
    /// `None` when there is nothing.
    ///
    /// Errors: [`Code::Refused`] for a link and for what is no file.
    pub(super) fn find(path: &Path) -> Result<Option<Self>> {
        let failed = |errno: Errno| Error::io(format!("cannot open {}", path.display()), errno.into());
        let refused = |what: &str| {
            Error::new(Code::Refused, format!("{} {what}", path.display()))
                .hint("a database and what SQLite keeps beside it are files; name them where they really are")
        };
        // Without access nothing waits, and no lock goes when it is closed.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = loop {
            match openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
                Ok(fd) => break fd,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::NOENT) => return Ok(None),
                Err(Errno::LOOP) => return Err(refused("is reached through a link")),
                Err(errno) => return Err(failed(errno)),
            }
        };
        let found = fstat(&fd).map_err(failed)?;
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
            return Err(refused("is no file"));
        }
        Ok(Some(Self { fd, identity: (found.st_dev, found.st_ino) }))
    }

    /// Opens this very file, whatever its path leads to by now.
    pub(super) fn open(&self) -> std::io::Result<File> {
        File::open(format!("/proc/self/fd/{}", self.fd.as_raw_fd()))
    }

    /// Whether it is open here already: then nobody may open and close it again.
    pub(super) fn is_kept(&self) -> bool {
        files().contains_key(&self.identity)
    }
}

/// The one descriptor of a file. To be dropped after every lock on it was.
#[derive(Debug)]
pub(super) struct Kept {
    file: Arc<File>,
    identity: (u64, u64),
}

impl Kept {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let failed = |error| Error::io(format!("cannot open {}", path.display()), error);
        let there = There::find(path)?.ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))?;
        let (mut files, identity) = (files(), there.identity);
        if let Some(file) = files.get(&identity) {
            return Ok(Self { file: Arc::clone(file), identity });
        }
        let file = Arc::new(there.open().map_err(failed)?);
        files.insert(identity, Arc::clone(&file));
        Ok(Self { file, identity })
    }

    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Whether the path still leads to this file.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        There::find(path).is_ok_and(|there| there.is_some_and(|there| there.identity == self.identity))
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let mut files = files();
        // Its own, and that of the map.
        if files.get(&self.identity).is_some_and(|file| Arc::strong_count(file) <= 2) {
            files.remove(&self.identity);
        }
    }
}
