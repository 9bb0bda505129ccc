//! A local file as the overlay needs it: a seam, so that tests can lose power.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fdatasync, seek};
use rustix::io::Errno;

/// Zeros are written by this much at once where holes cannot be made, in bytes.
const ZEROS_LEN: usize = 64 << 10;

pub(super) trait Medium: Send + Sync {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Another process sees it at once; a power cut may undo it, whole or in parts, until [`Self::sync`].
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes `range` read as zeros, without space if that can be.
    fn punch(&self, range: Range<u64>) -> io::Result<()>;

    /// What was written before survives a power cut after.
    fn sync(&self) -> io::Result<()>;

    /// Where the next hole or the next data begins from the start of `range` on, at its end at last; and which of the
    /// two lies before it: true for data.
    fn next_change(&self, range: &Range<u64>) -> io::Result<(u64, bool)>;
}

impl Medium for File {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(buffer, offset)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            return match fallocate(self, flags, range.start, range.end - range.start) {
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => write_zeros(self, range),
                other => other.map_err(io::Error::from),
            };
        }
    }

    fn sync(&self) -> io::Result<()> {
        fdatasync(self).map_err(io::Error::from)
    }

    fn next_change(&self, range: &Range<u64>) -> io::Result<(u64, bool)> {
        // Nobody uses the position of the file, so moving it disturbs nobody.
        let data = match seek(self, SeekFrom::Data(range.start)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok((range.end, false)),
            Err(errno) => return Err(errno.into()),
        };
        if data > range.start {
            return Ok((data.min(range.end), false));
        }
        let hole = seek(self, SeekFrom::Hole(range.start))?.min(range.end);
        // Not after the start when somebody has punched the data away in between: data is what it was.
        Ok((if hole > range.start { hole } else { range.end }, true))
    }
}

fn write_zeros(file: &File, range: Range<u64>) -> io::Result<()> {
    let zeros = vec![0; ZEROS_LEN];
    let mut at = range.start;
    while at < range.end {
        let len = usize::try_from(range.end - at).unwrap_or(usize::MAX).min(zeros.len());
        file.write_all_at(&zeros[..len], at)?;
        at += len as u64;
    }
    Ok(())
}
