//! An open directory and what is below it, looked at in any order.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Mutex, PoisonError};

use mainstay_core::{Error, ItemPath, Metadata, Result};
use rustix::fs::{Dir, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

use super::inspect::{Inspector, kind, look};

/// A tree of files. No link is followed in it, and no other file system entered.
pub struct OpenTree {
    root: OwnedFd,
    inspector: Mutex<Inspector>,
}

impl OpenTree {
    /// What is below this directory.
    pub fn new(root: OwnedFd) -> Self {
        Self { root, inspector: Mutex::default() }
    }

    /// What is known of the item at a path, if there is one. Attributes that cannot be read are left out.
    pub fn metadata(&self, path: &ItemPath) -> Result<Option<Metadata>> {
        let failed = |errno: Errno| failed(path, errno);
        let (directory, name) = match path.parent() {
            Some(parent) => (parent, CString::new(path.name()).map_err(|_nul| failed(Errno::INVAL))?),
            None => (ItemPath::root(), c".".to_owned()),
        };
        let directory = match self.open(&directory, OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            opened => opened.map_err(failed)?,
        };
        let stat = match look(&directory, &name) {
            Err(Errno::NOENT) => return Ok(None),
            stat => stat.map_err(failed)?,
        };
        let Some(kind) = kind(&stat) else { return Ok(None) };
        let mut inspector = self.inspector.lock().unwrap_or_else(PoisonError::into_inner);
        let (metadata, _hidden) = inspector.metadata(&directory, &name, &stat, kind).map_err(failed)?;
        Ok(Some(metadata))
    }

    /// The names in a directory, sorted.
    pub fn names(&self, directory: &ItemPath) -> Result<Vec<Vec<u8>>> {
        let failed = |errno: Errno| failed(directory, errno);
        let opened = self.open(directory, OFlags::RDONLY | OFlags::DIRECTORY).map_err(failed)?;
        let mut names = Vec::new();
        for entry in Dir::read_from(opened.as_fd()).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_bytes().to_vec();
            if name != b"." && name != b".." {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Opens a regular file to be read.
    pub fn file(&self, path: &ItemPath) -> Result<File> {
        // What is no file must not be waited for.
        let opened = self.open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY);
        opened.map(File::from).map_err(|errno| failed(path, errno))
    }

    fn open(&self, path: &ItemPath, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
        let path = if path.is_root() { b".".as_slice() } else { path.as_bytes() };
        let path = CString::new(path).map_err(|_nul| Errno::INVAL)?;
        open_within(&self.root, &path, flags)
    }
}

fn failed(path: &ItemPath, errno: Errno) -> Error {
    Error::io(format!("cannot read {path}"), errno.into())
}

fn open_within(root: &OwnedFd, path: &CStr, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    loop {
        match openat2(root, path, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}
