//! The content of a regular file, opened late and read from front to back.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use mainstay_core::{Code, Error, ItemPath, Open, Piece, Result, StreamEnd, StreamReader, Time};
use rustix::fs::{Advice, Mode, OFlags, SeekFrom, Statx, fadvise, openat, seek};
use rustix::io::{Errno, pread};

use super::dirs::{Dir, FileId};
use super::inspect::{kind, look_at_open, time};

/// Files of the kernel (`/proc`, `/sys`) claim to be empty; this much is read of them, in bytes.
const SYNTHETIC_MAX: u64 = 16 << 20;

/// From this size on the kernel is told that the file will be read in sequence, in bytes.
const ADVISE_FROM: u64 = 1 << 20;

/// What the walk saw of a file: reading it later must find the same.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Seen {
    size: u64,
    modified: Time,
    changed: Time,
}

impl Seen {
    fn of(stat: &Statx) -> Self {
        Self { size: stat.stx_size, modified: time(stat.stx_mtime), changed: time(stat.stx_ctime) }
    }
}

/// A name in a directory.
#[derive(Clone)]
struct Place {
    dir: Arc<Dir>,
    name: CString,
}

impl Place {
    /// For messages.
    fn path(&self) -> String {
        let mut path = self.dir.path();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(self.name.as_bytes());
        ItemPath::new(path).map_or_else(|_| "a file".into(), |path| format!("/{path}"))
    }
}

pub(super) struct FileOpener {
    place: Place,
    id: FileId,
    seen: Seen,
    /// Fewer blocks than bytes: there are holes, or the file system compresses.
    sparse: bool,
    /// The time of access may be left alone: only the owner and root can ask for that.
    leave_atime: bool,
}

impl FileOpener {
    pub(super) fn new(dir: Arc<Dir>, name: CString, stat: &Statx, euid: u32) -> Self {
        Self {
            place: Place { dir, name },
            id: FileId::of(stat),
            seen: Seen::of(stat),
            sparse: stat.stx_blocks.saturating_mul(512) < stat.stx_size,
            leave_atime: euid == 0 || euid == stat.stx_uid,
        }
    }

    fn open_file(&self) -> std::result::Result<OwnedFd, Errno> {
        // NONBLOCK: should a FIFO have taken the name, opening it must not wait for a writer.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let Place { dir, name } = &self.place;
        let dir = dir.fd()?;
        if self.leave_atime {
            match openat(&*dir, &**name, flags | OFlags::NOATIME, Mode::empty()) {
                Err(Errno::PERM) => {}
                other => return other,
            }
        }
        openat(&*dir, &**name, flags, Mode::empty())
    }
}

impl Open for FileOpener {
    /// Errors: [`Code::NotFound`] when the file is gone or another one has taken its name, [`Code::Io`] when it
    /// cannot be read. Both mean that this item is to be skipped.
    fn open(&self) -> Result<Box<dyn StreamReader>> {
        let fail = |errno: Errno| Error::io(format!("cannot open {}", self.place.path()), errno.into());
        let fd = self.open_file().map_err(fail)?;
        let stat = look_at_open(&fd).map_err(fail)?;
        if FileId::of(&stat) != self.id || kind(&stat) != Some(mainstay_core::Kind::File) {
            let what = format!("{} was replaced by another file since it was listed", self.place.path());
            return Err(Error::new(Code::NotFound, what));
        }
        if stat.stx_size >= ADVISE_FROM {
            // Advice only: a file system that does not take it reads all the same.
            let _advised = fadvise(&fd, 0, None, Advice::Sequential);
        }
        let limit = if stat.stx_size == 0 { SYNTHETIC_MAX } else { stat.stx_size };
        let data_end = if self.sparse { Some(0) } else { None };
        Ok(Box::new(FileReader {
            fd,
            place: self.place.clone(),
            offset: 0,
            limit,
            data_end,
            seen: self.seen,
        }))
    }
}

struct FileReader {
    fd: OwnedFd,
    place: Place,
    offset: u64,
    /// Where to stop, so that a file that grows while it is read has an end.
    limit: u64,
    /// For sparse files, where the data that `offset` is in ends.
    data_end: Option<u64>,
    seen: Seen,
}

impl FileReader {
    /// The length of the hole at the offset; 0 in data.
    fn hole(&mut self) -> std::result::Result<u64, Errno> {
        if self.data_end.is_none_or(|end| self.offset < end) {
            return Ok(0);
        }
        let data = match seek(&self.fd, SeekFrom::Data(self.offset)) {
            Ok(data) => data.min(self.limit),
            Err(Errno::NXIO) => self.limit,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                self.data_end = None;
                return Ok(0);
            }
            Err(errno) => return Err(errno),
        };
        if data == self.offset {
            let end = seek(&self.fd, SeekFrom::Hole(self.offset))?;
            self.data_end = Some(end.clamp(self.offset + 1, self.limit.max(self.offset + 1)));
        }
        Ok(data - self.offset)
    }

    fn next(&mut self, buffer: &mut [u8]) -> std::result::Result<Piece, Errno> {
        if self.offset >= self.limit {
            return Ok(Piece::End);
        }
        let hole = self.hole()?;
        if hole > 0 {
            self.offset += hole;
            return Ok(Piece::Hole(hole));
        }
        let room = self.data_end.unwrap_or(self.limit).min(self.limit) - self.offset;
        let room = usize::try_from(room).unwrap_or(usize::MAX).min(buffer.len());
        let read = loop {
            match pread(&self.fd, &mut buffer[..room], self.offset) {
                Err(Errno::INTR) => {}
                other => break other?,
            }
        };
        self.offset += read as u64;
        Ok(if read == 0 { Piece::End } else { Piece::Data(read) })
    }
}

impl StreamReader for FileReader {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece> {
        self.next(buffer)
            .map_err(|errno| Error::io(format!("cannot read {}", self.place.path()), errno.into()))
    }

    fn finish(self: Box<Self>) -> Result<StreamEnd> {
        let fail = |errno: Errno| Error::io(format!("cannot look at {}", self.place.path()), errno.into());
        let now = Seen::of(&look_at_open(&self.fd).map_err(fail)?);
        // A file of the kernel has no length; one that was not read to its end is not whole.
        let whole = self.offset == now.size || (now.size == 0 && self.offset < SYNTHETIC_MAX);
        Ok(if now == self.seen && whole { StreamEnd::Steady } else { StreamEnd::Changed })
    }
}
