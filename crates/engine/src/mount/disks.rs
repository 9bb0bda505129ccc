//! Disks that are written as files of this machine, so that its kernel can mount what lies on them: images of any format,
//! and disks that are written with care.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite,
    Request, WriteFlags,
};
use mainstay_core::{Error, Result};
use mainstay_nbd::WritableBlocks;
use rustix::fs::FallocateFlags;

use super::{Mounted, READ_MAX};

/// Nothing but what is written changes.
const LONG: Duration = Duration::from_secs(24 * 3600);

/// The first error of any disk; the kernel passes few of them on.
type Failed = Arc<Mutex<Option<Error>>>;

/// Disks shown as the files `0`, `1` … of a directory; out of sight when dropped.
pub(crate) struct DiskFiles {
    mounted: Mounted,
    failed: Failed,
}

impl DiskFiles {
    /// Shows them in an empty directory, to whoever shares the mounts of this thread.
    ///
    /// Errors: those of [`Mounted::new`].
    pub(crate) fn new(disks: Vec<Arc<dyn WritableBlocks>>, directory: &Path) -> Result<Self> {
        let failed = Failed::default();
        let mut config = Config::default();
        config.mount_options = vec![MountOption::NoSuid, MountOption::NoDev];
        let server = Server { disks, failed: Arc::clone(&failed) };
        Ok(Self { mounted: Mounted::serve(server, directory, config)?, failed })
    }

    /// The file of the disk with this number.
    pub(crate) fn path(&self, number: usize) -> PathBuf {
        self.mounted.directory.join(number.to_string())
    }

    /// Takes them out of sight, and waits until nobody uses them any more.
    ///
    /// Errors: the first that any disk had since they are shown.
    pub(crate) fn finish(self) -> Result<()> {
        let Self { mounted, failed } = self;
        mounted.detach()?;
        mounted.join()?;
        let first = failed.lock().unwrap_or_else(PoisonError::into_inner).take();
        first.map_or(Ok(()), Err)
    }
}

struct Server {
    disks: Vec<Arc<dyn WritableBlocks>>,
    failed: Failed,
}

impl Server {
    /// The disk of an inode: the first one has the number after the directory's.
    fn disk(&self, number: INodeNo) -> Option<&Arc<dyn WritableBlocks>> {
        self.disks.get(usize::try_from(number.0.checked_sub(INodeNo::ROOT.0 + 1)?).ok()?)
    }

    fn attributes(&self, number: INodeNo) -> Option<FileAttr> {
        let (size, kind, perm) = match self.disk(number) {
            Some(disk) => (disk.size(), FileType::RegularFile, 0o600),
            None if number == INodeNo::ROOT => (0, FileType::Directory, 0o700),
            None => return None,
        };
        let time = SystemTime::UNIX_EPOCH;
        let (ino, blocks) = (number, size.div_ceil(512));
        let (atime, mtime, ctime, crtime) = (time, time, time, time);
        let (nlink, uid, gid, rdev, blksize, flags) = (1, 0, 0, 0, 1 << 17, 0);
        Some(FileAttr {
            ino,
            size,
            blocks,
            atime,
            mtime,
            ctime,
            crtime,
            kind,
            perm,
            nlink,
            uid,
            gid,
            rdev,
            blksize,
            flags,
        })
    }

    /// Does something with a disk; an error is kept for whoever takes the disks out of sight.
    fn with<T>(
        &self,
        number: INodeNo,
        act: impl FnOnce(&dyn WritableBlocks) -> Result<T>,
    ) -> std::result::Result<T, Errno> {
        let disk = self.disk(number).ok_or(Errno::EISDIR)?;
        act(disk.as_ref()).map_err(|error| {
            self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            Errno::EIO
        })
    }
}

fn answer(outcome: std::result::Result<(), Errno>, reply: ReplyEmpty) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

impl Filesystem for Server {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let _most = config.set_max_readahead(READ_MAX);
        let _most = config.set_max_write(READ_MAX);
        Ok(())
    }

    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let index = name.to_str().and_then(|name| name.parse::<u64>().ok());
        let number = index.and_then(|index| index.checked_add(INodeNo::ROOT.0 + 1)).map(INodeNo);
        match number.and_then(|number| self.attributes(number)) {
            Some(attributes) => reply.entry(&LONG, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, number: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(number) {
            Some(attributes) => reply.attr(&LONG, &attributes),
            None => reply.error(Errno::ESTALE),
        }
    }

    fn open(&self, _request: &Request, _number: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
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
        let read = self.with(number, |disk| {
            let length = u64::from(size.min(READ_MAX)).min(disk.size().saturating_sub(offset));
            let mut bytes = vec![0; length as usize];
            disk.read_at(offset, &mut bytes)?;
            Ok(bytes)
        });
        match read {
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
        _written: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.with(number, |disk| disk.write_at(offset, data)) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap_or_default()),
            Err(errno) => reply.error(errno),
        }
    }

    fn fsync(
        &self,
        _request: &Request,
        number: INodeNo,
        _handle: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        answer(self.with(number, |disk| disk.flush()), reply);
    }

    fn fallocate(
        &self,
        _request: &Request,
        number: INodeNo,
        _handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = FallocateFlags::from_bits_retain(mode.cast_unsigned());
        if !mode.intersects(FallocateFlags::PUNCH_HOLE | FallocateFlags::ZERO_RANGE) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let zeroed = self.with(number, |disk| {
            let end = offset.saturating_add(length).min(disk.size());
            if offset < end { disk.zero(offset..end) } else { Ok(()) }
        });
        answer(zeroed, reply);
    }
}
