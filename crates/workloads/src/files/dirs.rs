//! Directories held by descriptor. A directory is reached only from its parent's descriptor, one name at a time
//! and never through a symbolic link, so paths may be of any length and cannot be turned elsewhere.
//!
//! Only so many descriptors stay open; one that was closed is opened again from its nearest open ancestor and
//! must then still be the same directory.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};
use rustix::io::Errno;

/// Open directories of one source or target, beyond those in use at the moment.
const OPEN_MAX: usize = 128;

/// The longest path handed to the kernel at once; its own limit is 4096 with the NUL.
const PATH_MAX: usize = 4000;

/// Names an inode on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FileId {
    pub(super) device: u64,
    pub(super) inode: u64,
}

impl FileId {
    pub(super) fn of(stat: &rustix::fs::Statx) -> Self {
        let device = u64::from(stat.stx_dev_major) << 32 | u64::from(stat.stx_dev_minor);
        Self { device, inode: stat.stx_ino }
    }

    fn of_open(fd: impl AsFd) -> Result<Self, Errno> {
        statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::INO).map(|stat| Self::of(&stat))
    }
}

/// A directory that can be reached as long as this value lives, and stays where it is.
pub(super) struct Dir {
    parent: Option<Arc<Self>>,
    name: CString,
    id: FileId,
    open: Mutex<Option<Arc<OwnedFd>>>,
    pool: Arc<Pool>,
}

/// The open directories, oldest first.
#[derive(Default)]
struct Pool(Mutex<VecDeque<Weak<Dir>>>);

impl Dir {
    /// The top: never closed, and nothing above it is ever looked at.
    pub(super) fn root(fd: OwnedFd) -> Result<Arc<Self>, Errno> {
        let id = FileId::of_open(&fd)?;
        let open = Mutex::new(Some(Arc::new(fd)));
        Ok(Arc::new(Self { parent: None, name: CString::default(), id, open, pool: Arc::default() }))
    }

    pub(super) fn id(&self) -> FileId {
        self.id
    }

    /// Opens the directory `name` inside this one; `access` is `RDONLY` to list it, `PATH` to pass through.
    pub(super) fn enter(self: &Arc<Self>, name: &CStr, access: OFlags) -> Result<Arc<Self>, Errno> {
        let fd = open_beneath(&*self.fd()?, name, access)?;
        let dir = self.adopt(name, fd)?;
        self.pool.register(&dir);
        Ok(dir)
    }

    /// A child that was opened elsewhere (the root of a snapshot). It is never closed, since its name would lead
    /// to another directory.
    pub(super) fn adopt(self: &Arc<Self>, name: &CStr, fd: OwnedFd) -> Result<Arc<Self>, Errno> {
        let id = FileId::of_open(&fd)?;
        Ok(Arc::new(Self {
            parent: Some(Arc::clone(self)),
            name: name.to_owned(),
            id,
            open: Mutex::new(Some(Arc::new(fd))),
            pool: Arc::clone(&self.pool),
        }))
    }

    /// The descriptor. [`Errno::STALE`] when another directory now bears this one's name.
    pub(super) fn fd(self: &Arc<Self>) -> Result<Arc<OwnedFd>, Errno> {
        if let Some(fd) = &*lock(&self.open) {
            return Ok(Arc::clone(fd));
        }
        let (open, names) = self.nearest_open();
        let fd = Arc::new(open_below(open, names.into_iter().rev())?);
        if FileId::of_open(&*fd)? != self.id {
            return Err(Errno::STALE);
        }
        *lock(&self.open) = Some(Arc::clone(&fd));
        self.pool.register(self);
        Ok(fd)
    }

    /// The closest ancestor that is open, and the names from this directory up to just below it.
    fn nearest_open(&self) -> (Arc<OwnedFd>, Vec<&[u8]>) {
        let mut names = Vec::new();
        let mut dir = self;
        loop {
            if let Some(fd) = &*lock(&dir.open) {
                return (Arc::clone(fd), names);
            }
            names.push(dir.name.as_bytes());
            match &dir.parent {
                Some(parent) => dir = parent,
                None => unreachable!("the top is never closed"),
            }
        }
    }

    /// The path from the top, for messages.
    pub(super) fn path(&self) -> Vec<u8> {
        let mut names = Vec::new();
        let mut dir = self;
        while let Some(parent) = &dir.parent {
            names.push(dir.name.as_bytes());
            dir = parent;
        }
        names.reverse();
        names.join(&b'/')
    }
}

impl Drop for Dir {
    /// Lets go of the ancestors one by one: the chain may be far deeper than the stack.
    fn drop(&mut self) {
        let mut next = self.parent.take();
        while let Some(mut dir) = next.and_then(Arc::into_inner) {
            next = dir.parent.take();
        }
    }
}

impl Pool {
    fn register(&self, dir: &Arc<Dir>) {
        let oldest = {
            let mut open = lock(&self.0);
            open.push_back(Arc::downgrade(dir));
            if open.len() > OPEN_MAX { open.pop_front() } else { None }
        };
        // The pool is unlocked by now: closing takes the directory's own lock.
        if let Some(oldest) = oldest.and_then(|oldest| oldest.upgrade()) {
            lock(&oldest.open).take();
        }
    }
}

/// Opens the directory that `names` lead to from `fd`, in as many strides as their length needs.
pub(super) fn open_below<'a>(
    mut fd: Arc<OwnedFd>,
    names: impl Iterator<Item = &'a [u8]>,
) -> Result<OwnedFd, Errno> {
    let mut path = Vec::new();
    for name in names {
        if !path.is_empty() && path.len() + name.len() >= PATH_MAX {
            fd = Arc::new(open_beneath(&*fd, &as_path(&path)?, OFlags::PATH)?);
            path.clear();
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
    }
    if path.is_empty() {
        path.push(b'.');
    }
    open_beneath(&*fd, &as_path(&path)?, OFlags::PATH)
}

fn as_path(bytes: &[u8]) -> Result<CString, Errno> {
    CString::new(bytes).or(Err(Errno::INVAL))
}

/// Opens a directory strictly below `fd`, through directories only.
pub(super) fn open_beneath(fd: impl AsFd, path: &CStr, access: OFlags) -> Result<OwnedFd, Errno> {
    let flags = access | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    loop {
        // EAGAIN: something was renamed meanwhile and the kernel could not be sure.
        match openat2(&fd, path, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
