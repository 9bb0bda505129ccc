//! Files of databases that this process has open. POSIX takes all locks of a process on a file away when the process
//! closes *any* descriptor of it, SQLite's among them; so each database's file is opened once, and closed only when
//! nobody here holds a lock on it any more.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_core::{Error, Result};

type Files = BTreeMap<(u64, u64), Arc<File>>;

static FILES: Mutex<Files> = Mutex::new(BTreeMap::new());

fn files() -> MutexGuard<'static, Files> {
    FILES.lock().unwrap_or_else(PoisonError::into_inner)
}

fn identity(metadata: &std::fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
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
        let mut files = files();
        let identity = identity(&std::fs::metadata(path).map_err(failed)?);
        if let Some(file) = files.get(&identity) {
            return Ok(Self { file: Arc::clone(file), identity });
        }
        // Nobody here has it open, so no lock can go if it turns out to be another file by now.
        let file = Arc::new(File::open(path).map_err(failed)?);
        let identity = self::identity(&file.metadata().map_err(failed)?);
        files.insert(identity, Arc::clone(&file));
        Ok(Self { file, identity })
    }

    pub(super) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Whether the path still leads to this file.
    pub(super) fn is_at(&self, path: &Path) -> bool {
        std::fs::metadata(path).is_ok_and(|metadata| identity(&metadata) == self.identity)
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

/// Whether a file is open here already: then nobody may open and close it again.
pub(super) fn holds(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| files().contains_key(&identity(&metadata)))
}
