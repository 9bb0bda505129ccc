//! What the kernel asks of a draft.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow,
    WriteFlags,
};
use mainstay_core::{Code, Error};

use super::content::Content;
use super::tree::{Answer, ROOT, Tree, What};
use super::{Listed, Server};

/// Whatever changes, changes through the kernel.
const LONG: Duration = Duration::from_secs(24 * 3600);
const GENERATION: Generation = Generation(0);
/// The most that is read or written in one go, in bytes.
const PIECE_MAX: u32 = 1 << 20;
/// Blocks of 4 KiB that are said to be free.
const ROOMY: u64 = 1 << 36;

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kind(what: &What) -> FileType {
    match what {
        What::Directory(_) => FileType::Directory,
        What::File(_) => FileType::RegularFile,
        What::Symlink(_) => FileType::Symlink,
    }
}

impl Server {
    fn tree(&self) -> MutexGuard<'_, Tree> {
        lock(&self.tree)
    }

    /// What the kernel is told of an error; people are told all of it.
    fn told<T>(&self, outcome: mainstay_core::Result<T>) -> Answer<T> {
        outcome.map_err(|error: Error| {
            (self.trouble)(&error);
            if error.code() == Code::Full { Errno::ENOSPC } else { Errno::EIO }
        })
    }

    fn attributes(&self, tree: &Tree, number: u64) -> Answer<FileAttr> {
        let node = tree.get(number)?;
        let size = match &node.what {
            What::Directory(_) => 0,
            What::File(content) => content.size(),
            What::Symlink(target) => target.len() as u64,
        };
        Ok(FileAttr {
            ino: INodeNo(number),
            size,
            blocks: size.div_ceil(512),
            atime: SystemTime::UNIX_EPOCH,
            mtime: SystemTime::UNIX_EPOCH,
            ctime: SystemTime::UNIX_EPOCH,
            crtime: SystemTime::UNIX_EPOCH,
            kind: kind(&node.what),
            perm: node.mode,
            nlink: node.links,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: 8192,
            flags: 0,
        })
    }

    /// Tells the kernel of something.
    fn enter(&self, tree: &mut Tree, number: Answer<u64>) -> Answer<FileAttr> {
        let number = number?;
        let attributes = self.attributes(tree, number)?;
        tree.tell(number);
        Ok(attributes)
    }

    fn entry(&self, reply: ReplyEntry, act: impl FnOnce(&mut Tree) -> Answer<u64>) {
        let mut tree = self.tree();
        let number = act(&mut tree);
        match self.enter(&mut tree, number) {
            Ok(attributes) => reply.entry(&LONG, &attributes, GENERATION),
            Err(errno) => reply.error(errno),
        }
    }

    fn set(&self, number: u64, mode: Option<u32>, size: Option<u64>) -> Answer<FileAttr> {
        if let Some(size) = size {
            let content = self.tree().file(number)?;
            self.told(content.set_size(size))?;
        }
        let mut tree = self.tree();
        if let Some(mode) = mode {
            tree.get_mut(number)?.mode = (mode & 0o7777) as u16;
        }
        self.attributes(&tree, number)
    }

    fn list(&self, number: u64) -> Answer<Arc<[Listed]>> {
        let tree = self.tree();
        let dots = [b".".to_vec(), b"..".to_vec()].map(|name| (name, number, FileType::Directory));
        let mut listed = dots.to_vec();
        for (name, number) in tree.names(number)? {
            listed.push((name.clone(), *number, kind(&tree.get(*number)?.what)));
        }
        Ok(listed.into())
    }
}

fn answer(outcome: Answer<()>, reply: ReplyEmpty) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for Server {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // An older kernel does without.
        let _missing = config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS);
        let _most = config.set_max_write(PIECE_MAX);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.entry(reply, |tree| tree.find(parent.0, name));
    }

    fn forget(&self, _request: &Request, number: INodeNo, times: u64) {
        self.tree().forget(number.0, times);
    }

    fn getattr(&self, _request: &Request, number: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(&self.tree(), number.0) {
            Ok(attributes) => reply.attr(&LONG, &attributes),
            Err(errno) => reply.error(errno),
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        number: INodeNo,
        mode: Option<u32>,
        _user: Option<u32>,
        _group: Option<u32>,
        size: Option<u64>,
        _read: Option<TimeOrNow>,
        _modified: Option<TimeOrNow>,
        _changed: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _created: Option<SystemTime>,
        _change: Option<SystemTime>,
        _backup: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match self.set(number.0, mode, size) {
            Ok(attributes) => reply.attr(&LONG, &attributes),
            Err(errno) => reply.error(errno),
        }
    }

    fn readlink(&self, _request: &Request, number: INodeNo, reply: ReplyData) {
        match self.tree().get(number.0).map(|node| &node.what) {
            Ok(What::Symlink(target)) => reply.data(target),
            Ok(_) => reply.error(Errno::EINVAL),
            Err(errno) => reply.error(errno),
        }
    }

    fn symlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, target: &Path, reply: ReplyEntry) {
        let target = target.as_os_str().as_bytes().to_vec();
        self.entry(reply, |tree| tree.add(parent.0, name, What::Symlink(target), 0o777));
    }

    fn link(&self, _request: &Request, number: INodeNo, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.entry(reply, |tree| tree.link(number.0, parent.0, name).map(|()| number.0));
    }

    fn mkdir(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let mode = (mode & !umask & 0o7777) as u16;
        self.entry(reply, |tree| tree.add(parent.0, name, What::Directory(BTreeMap::new()), mode));
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(self.tree().remove(parent.0, name, false), reply);
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(self.tree().remove(parent.0, name, true), reply);
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        to: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let outcome = match flags.is_empty() {
            true => self.tree().rename((parent.0, name), (to.0, new_name)),
            false => Err(Errno::EINVAL),
        };
        answer(outcome, reply);
    }

    fn open(&self, _request: &Request, number: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.tree().file(number.0) {
            Ok(_content) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
            Err(errno) => reply.error(errno),
        }
    }

    fn create(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let content = Arc::new(Content::new(0, None, &self.read, &self.scratch));
        let mut tree = self.tree();
        let number = tree.add(parent.0, name, What::File(content), (mode & !umask & 0o7777) as u16);
        match self.enter(&mut tree, number) {
            Ok(attributes) => {
                let keep = FopenFlags::FOPEN_KEEP_CACHE;
                reply.created(&LONG, &attributes, GENERATION, FileHandle(0), keep);
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn read(
        &self,
        _request: &Request,
        number: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let content = self.tree().file(number.0);
        let size = size.min(PIECE_MAX) as usize;
        match content.and_then(|content| self.told(content.read(offset, size))) {
            Ok(bytes) => reply.data(&bytes),
            Err(errno) => reply.error(errno),
        }
    }

    fn write(
        &self,
        _request: &Request,
        number: INodeNo,
        _handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let content = self.tree().file(number.0);
        match content.and_then(|content| self.told(content.write(offset, data))) {
            Ok(()) => reply.written(data.len() as u32),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(
        &self,
        _request: &Request,
        _number: INodeNo,
        _handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn fsync(
        &self,
        _request: &Request,
        _number: INodeNo,
        _handle: FileHandle,
        _data: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        _number: INodeNo,
        _handle: FileHandle,
        _data: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn opendir(&self, _request: &Request, number: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.list(number.0) {
            Ok(listed) => {
                let handle = self.handles.fetch_add(1, Ordering::Relaxed);
                lock(&self.listed).insert(handle, listed);
                reply.opened(FileHandle(handle), FopenFlags::empty());
            }
            Err(errno) => reply.error(errno),
        }
    }

    fn readdir(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let Some(listed) = lock(&self.listed).get(&handle.0).map(Arc::clone) else {
            return reply.error(Errno::EBADF);
        };
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, (name, number, kind)) in listed.iter().enumerate().skip(from) {
            if reply.add(INodeNo(*number), index as u64 + 1, *kind, OsStr::from_bytes(name)) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _request: &Request,
        _number: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        lock(&self.listed).remove(&handle.0);
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _number: INodeNo, reply: ReplyStatfs) {
        reply.statfs(ROOMY, ROOMY, ROOMY, ROOMY, ROOMY, 4096, 255, 4096);
    }
}

/// The kernel never lets go of the directory that is mounted.
const _: () = assert!(ROOT == INodeNo::ROOT.0);
