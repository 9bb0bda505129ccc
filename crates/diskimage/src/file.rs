//! A file or a block device of this machine.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};

use mainstay_core::{Blocks, Code, Error, Extent, ExtentKind, Result};
use rustix::fs::{Mode, OFlags, SeekFrom, seek};
use rustix::io::Errno;

use crate::compose::{check_range, check_read, extent, push};

/// A raw file or a block device, as long as it was when it was opened. Holes are those of the file system.
pub struct FileBlocks {
    file: File,
    path: PathBuf,
    size: u64,
}

impl FileBlocks {
    /// Opens for reading. What is neither a regular file nor a block device is refused.
    pub fn open(path: &Path) -> Result<Self> {
        // Opening a FIFO would wait for a writer, so nothing waits.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|error| Error::io(format!("cannot open {}", path.display()), error.into()))?;
        Self::new(File::from(file), path)
    }

    /// Takes an open file; `path` is for messages.
    pub fn new(file: File, path: &Path) -> Result<Self> {
        let failed = |error| Error::io(format!("cannot examine {}", path.display()), error);
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::new(
                Code::Refused,
                format!("{} is neither a file nor a block device", path.display()),
            ));
        }
        // Unlike the metadata, seeking knows the length of a block device too.
        let size = seek(&file, SeekFrom::End(0)).map_err(|error| failed(error.into()))?;
        Ok(Self { file, path: path.to_owned(), size })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the next data or hole begins; far beyond the end when there is none.
    fn next(&self, from: SeekFrom) -> Result<u64> {
        match (seek(&self.file, from), from) {
            (Ok(offset), _) => Ok(offset),
            (Err(Errno::NXIO), _) => Ok(u64::MAX),
            // Block devices and some file systems have no idea of holes: all is data.
            (Err(Errno::INVAL | Errno::OPNOTSUPP), SeekFrom::Data(at)) => Ok(at),
            (Err(Errno::INVAL | Errno::OPNOTSUPP), _) => Ok(u64::MAX),
            (Err(error), _) => {
                Err(Error::io(format!("cannot look for holes in {}", self.path.display()), error.into()))
            }
        }
    }
}

impl Blocks for FileBlocks {
    fn size(&self) -> u64 {
        self.size
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        check_range(self, &range)?;
        let mut extents = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let data = self.next(SeekFrom::Data(at))?.clamp(at, range.end);
            push(&mut extents, extent(at..data, ExtentKind::Hole));
            if data == range.end {
                break;
            }
            // A file that changes meanwhile could answer with the same place for ever.
            let hole = match self.next(SeekFrom::Hole(data))? {
                hole if hole <= data => range.end,
                hole => hole.min(range.end),
            };
            push(&mut extents, extent(data..hole, ExtentKind::Data));
            at = hole;
        }
        Ok(extents)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        check_read(self, offset, buffer.len())?;
        self.file.read_exact_at(buffer, offset).map_err(|error| {
            Error::io(
                format!("cannot read {} bytes at {offset} of {}", buffer.len(), self.path.display()),
                error,
            )
        })
    }
}
