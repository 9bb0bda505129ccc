//! Answers the kernel.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyLseek, ReplyOpen, ReplyXattr, Request,
};
use mainstay_core::{Blocks, Code, Error, Extent, ExtentKind, ItemPath, Kind, Metadata, Result, Time};

use super::inodes::{Inodes, ROOT};
use super::{READ_MAX, Shown, Tree, Trouble};

/// How long the kernel may remember what never changes.
const LONG: Duration = Duration::from_secs(24 * 3600);
/// … and what may: which points there are.
const SHORT: Duration = Duration::from_secs(2);
/// What lseek(2) calls its two questions.
const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;
/// Extents are asked for in windows of so many bytes.
const WINDOW: u64 = 1 << 30;

/// Takes the offset behind an entry, its name, and what it is; says whether nothing more fits.
type Put<'a> = dyn FnMut(u64, &[u8], Option<&Shown>) -> bool + 'a;

/// What came of a request.
type Answer<T> = std::result::Result<T, Errno>;

pub(super) struct Server {
    tree: Arc<dyn Tree>,
    trouble: Trouble,
    inodes: Mutex<Inodes>,
    files: Mutex<HashMap<u64, Arc<dyn Blocks>>>,
    directories: Mutex<HashMap<u64, Arc<[Shown]>>>,
    handles: AtomicU64,
}

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    pub(super) fn new(tree: Arc<dyn Tree>, trouble: Trouble) -> Self {
        let metadata = Metadata { mode: 0o755, ..Metadata::new(Kind::Directory) };
        let top = Shown { path: ItemPath::root(), metadata, world: 0, lasting: false };
        let root = tree.look(&ItemPath::root()).ok().flatten().unwrap_or(top);
        Self {
            tree,
            trouble,
            inodes: Mutex::new(Inodes::new(root)),
            files: Mutex::default(),
            directories: Mutex::default(),
            handles: AtomicU64::new(1),
        }
    }

    fn shown(&self, number: INodeNo) -> Answer<Arc<Shown>> {
        lock(&self.inodes).get(number.0).ok_or(Errno::ESTALE)
    }

    /// What the kernel is told of an error; people are told all of it.
    fn told<T>(&self, path: &ItemPath, outcome: Result<T>) -> Answer<T> {
        outcome.map_err(|error| {
            let number = match error.code() {
                Code::NotFound => return Errno::ENOENT,
                Code::Unsupported | Code::Usage => Errno::EOPNOTSUPP,
                Code::NoPower | Code::Refused => Errno::EACCES,
                _ => Errno::EIO,
            };
            (self.trouble)(path, &error);
            number
        })
    }

    fn find(&self, parent: INodeNo, name: &OsStr) -> Answer<Shown> {
        let path = self.shown(parent)?.path.join(name.as_bytes()).map_err(|_impossible| Errno::ENOENT)?;
        self.told(&path, self.tree.look(&path))?.ok_or(Errno::ENOENT)
    }

    fn open_file(&self, number: INodeNo) -> Answer<(u64, bool)> {
        let shown = self.shown(number)?;
        let is_empty = shown.metadata.kind == Kind::File && shown.metadata.size == 0;
        let content =
            if is_empty { Arc::new(Empty) } else { self.told(&shown.path, self.tree.content(&shown.path))? };
        let handle = self.handles.fetch_add(1, Ordering::Relaxed);
        lock(&self.files).insert(handle, content);
        Ok((handle, shown.lasting))
    }

    fn read_file(&self, number: INodeNo, handle: FileHandle, offset: u64, size: u32) -> Answer<Vec<u8>> {
        let content = lock(&self.files).get(&handle.0).map(Arc::clone).ok_or(Errno::EBADF)?;
        let left = content.size().saturating_sub(offset);
        let length = u64::from(size.min(READ_MAX)).min(left);
        let mut bytes = vec![0; length as usize];
        let outcome = content.read_at(offset, &mut bytes);
        if outcome.is_err() {
            self.told(&self.shown(number)?.path, outcome)?;
        }
        Ok(bytes)
    }

    /// Where data or a hole begins from `offset` on, as lseek(2) asks; the end of a file is a hole.
    fn seek(&self, number: INodeNo, handle: FileHandle, offset: u64, whence: i32) -> Answer<u64> {
        let content = lock(&self.files).get(&handle.0).map(Arc::clone).ok_or(Errno::EBADF)?;
        let (size, wants_data) = match whence {
            SEEK_DATA => (content.size(), true),
            SEEK_HOLE => (content.size(), false),
            _ => return Err(Errno::EINVAL),
        };
        let mut at = offset;
        while at < size {
            let window = at..size.min(at.saturating_add(WINDOW));
            let next = window.end;
            let extents = content.extents(window);
            let extents = self.told(&self.shown(number)?.path, extents)?;
            let fits = |extent: &&Extent| (extent.kind != ExtentKind::Hole) == wants_data;
            if let Some(found) = extents.iter().find(fits) {
                return Ok(found.range.start.max(offset));
            }
            at = next;
        }
        if wants_data || offset >= size { Err(Errno::ENXIO) } else { Ok(size) }
    }

    /// A directory is listed once for each time that it is opened.
    fn listed(&self, number: INodeNo, handle: FileHandle) -> Answer<Arc<[Shown]>> {
        if let Some(listed) = lock(&self.directories).get(&handle.0) {
            return Ok(Arc::clone(listed));
        }
        let path = self.shown(number)?.path.clone();
        let listed: Arc<[Shown]> = self.told(&path, self.tree.list(&path))?.into();
        lock(&self.directories).insert(handle.0, Arc::clone(&listed));
        Ok(listed)
    }

    /// Gives entries from `offset` on to `put`, until it says that no more fit: the first two are the directory itself and
    /// the one above.
    fn each(&self, number: INodeNo, handle: FileHandle, offset: u64, put: &mut Put<'_>) -> Answer<()> {
        let listed = self.listed(number, handle)?;
        let dots = [b".".as_slice(), b".."].into_iter().map(|name| (name, None));
        let items = listed.iter().map(|shown| (shown.path.name(), Some(shown)));
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, (name, shown)) in dots.chain(items).enumerate().skip(from) {
            if put(index as u64 + 1, name, shown) {
                break;
            }
        }
        Ok(())
    }
}

/// What an empty file holds.
struct Empty;

impl Blocks for Empty {
    fn size(&self) -> u64 {
        0
    }

    fn extents(&self, _range: std::ops::Range<u64>) -> Result<Vec<Extent>> {
        Ok(Vec::new())
    }

    fn read_at(&self, _offset: u64, buffer: &mut [u8]) -> Result<()> {
        if buffer.is_empty() { Ok(()) } else { Err(Error::bug("an empty file has no bytes")) }
    }
}

fn ttl(shown: &Shown) -> &'static Duration {
    if shown.lasting { &LONG } else { &SHORT }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::File | Kind::Disk | Kind::Record => FileType::RegularFile,
    }
}

fn attributes(number: u64, shown: &Shown) -> FileAttr {
    let metadata = &shown.metadata;
    let time = moment(metadata.modified);
    // What has no mode of its own is for its owner only.
    let is_ours = matches!(metadata.kind, Kind::Disk | Kind::Record) && metadata.mode == 0;
    let (major, minor) = metadata.device.unwrap_or_default();
    let size = match metadata.kind {
        Kind::Symlink => metadata.link_target.as_ref().map_or(0, |target| target.len() as u64),
        _ => metadata.size,
    };
    FileAttr {
        ino: INodeNo(number),
        size,
        blocks: size.div_ceil(512),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(metadata.kind),
        perm: if is_ours { 0o400 } else { (metadata.mode & 0o7777) as u16 },
        // Nobody counted them. Directories have 1, so that programs do not count what is below by it.
        nlink: if metadata.hard_link.is_some() { 2 } else { 1 },
        uid: metadata.uid,
        gid: metadata.gid,
        rdev: (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12),
        blksize: 1 << 17,
        flags: 0,
    }
}

fn moment(time: Time) -> SystemTime {
    let distance = Duration::from_nanos(time.0.unsigned_abs());
    let around = if time.0 < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(distance)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(distance)
    };
    around.unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Answers with bytes whose length the kernel may ask for first.
fn sized(bytes: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(bytes.len()) {
        Ok(length) if size == 0 => reply.size(length),
        Ok(length) if length <= size => reply.data(bytes),
        _ => reply.error(Errno::ERANGE),
    }
}

impl Filesystem for Server {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        for wanted in [
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_PARALLEL_DIROPS,
        ] {
            // An older kernel does without.
            let _missing = config.add_capabilities(wanted);
        }
        let _most = config.set_max_readahead(READ_MAX);
        let _most = config.set_max_write(READ_MAX);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.find(parent, name) {
            Ok(shown) => {
                let number = lock(&self.inodes).tell(shown.clone());
                reply.entry(ttl(&shown), &attributes(number, &shown), Generation(0));
            }
            Err(error) => reply.error(error),
        }
    }

    fn forget(&self, _request: &Request, number: INodeNo, times: u64) {
        lock(&self.inodes).forget(number.0, times);
    }

    fn getattr(&self, _request: &Request, number: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.shown(number) {
            Ok(shown) => reply.attr(ttl(&shown), &attributes(number.0, &shown)),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, _request: &Request, number: INodeNo, reply: ReplyData) {
        match self.shown(number) {
            Ok(shown) => match &shown.metadata.link_target {
                Some(target) => reply.data(target),
                None => reply.error(Errno::EINVAL),
            },
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _request: &Request, number: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.open_file(number) {
            Ok((handle, lasting)) => {
                let keep = if lasting { FopenFlags::FOPEN_KEEP_CACHE } else { FopenFlags::empty() };
                reply.opened(FileHandle(handle), keep);
            }
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _request: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.read_file(number, handle, offset, size) {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(error),
        }
    }

    fn lseek(
        &self,
        _request: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let found = u64::try_from(offset).map_err(|_negative| Errno::EINVAL);
        match found.and_then(|offset| self.seek(number, handle, offset, whence)) {
            Ok(found) => reply.offset(i64::try_from(found).unwrap_or(i64::MAX)),
            Err(error) => reply.error(error),
        }
    }

    fn release(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let closed = lock(&self.files).remove(&handle.0);
        drop(closed);
        reply.ok();
    }

    fn opendir(&self, _request: &Request, number: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let handle = self.handles.fetch_add(1, Ordering::Relaxed);
        // Listed at once: what is damaged fails here, where programs look.
        match self.listed(number, FileHandle(handle)) {
            Ok(_listed) => reply.opened(FileHandle(handle), FopenFlags::empty()),
            Err(error) => reply.error(error),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let done = self.each(number, handle, offset, &mut |next, name, shown| {
            let (number, kind) = match shown {
                Some(shown) => (lock(&self.inodes).number(shown), file_type(shown.metadata.kind)),
                None => (number.0, FileType::Directory),
            };
            reply.add(INodeNo(number), next, kind, OsStr::from_bytes(name))
        });
        match done {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let done = self.shown(number).and_then(|directory| {
            self.each(number, handle, offset, &mut |next, name, shown| {
                // The kernel does not count the two that every directory has.
                let told = shown.map(|shown| lock(&self.inodes).tell(shown.clone()));
                let (number, shown) = (told.unwrap_or(number.0), shown.unwrap_or(&directory));
                let attributes = attributes(number, shown);
                let name = OsStr::from_bytes(name);
                let full = reply.add(INodeNo(number), next, name, ttl(shown), &attributes, Generation(0));
                if full && let Some(told) = told {
                    lock(&self.inodes).forget(told, 1);
                }
                full
            })
        });
        match done {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn releasedir(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        lock(&self.directories).remove(&handle.0);
        reply.ok();
    }

    fn getxattr(&self, _request: &Request, number: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let Ok(shown) = self.shown(number) else { return reply.error(Errno::ESTALE) };
        let found = shown.metadata.xattrs.iter().find(|(known, _)| known == name.as_bytes());
        match found {
            Some((_, value)) => sized(value, size, reply),
            None => reply.error(Errno::ENODATA),
        }
    }

    fn listxattr(&self, _request: &Request, number: INodeNo, size: u32, reply: ReplyXattr) {
        let Ok(shown) = self.shown(number) else { return reply.error(Errno::ESTALE) };
        let names = shown.metadata.xattrs.iter().flat_map(|(name, _)| name.iter().copied().chain([0]));
        sized(&names.collect::<Vec<u8>>(), size, reply);
    }
}

/// The kernel never lets go of the directory that is mounted.
const _: () = assert!(ROOT == INodeNo::ROOT.0);
