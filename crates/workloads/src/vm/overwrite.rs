//! Images of machines that are shut down, opened for writing by `qemu-nbd`. It holds QEMU's own lock, so that the machine
//! cannot be started meanwhile, and it goes on recording in the bitmaps that an image keeps, so that the next increment
//! knows what was changed here.

use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_core::{Blocks, Code, Error, Extent, Result};
use mainstay_nbd::{Address, Client, Remote, WritableBlocks};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::image_lock;
use super::run_dir::tag;
use crate::process::Program;

/// What `qemu-nbd` may take to open an image.
const OPEN: Duration = Duration::from_secs(60);

/// For each call: the medium may have to write out what it holds.
const LIMIT: Duration = Duration::from_secs(600);

/// How often and how far apart the end of `qemu-nbd` is looked for.
const ENDS: u32 = 600;
const END_PAUSE: Duration = Duration::from_millis(50);

/// A server whose client died lets go of the image a moment later.
const PATIENCE: u32 = 60;

/// An image that is written in place. Let go with [`Overwrite::close`], so that the machine can be started.
pub struct Overwrite {
    remote: Remote,
    path: PathBuf,
    /// `qemu-nbd` keeps machines away, but not another one of its kind.
    lock: File,
}

impl Overwrite {
    /// `format` is what the machine's configuration says: `raw` or `qcow2`. `scratch` is for a socket.
    ///
    /// Errors: [`Code::Conflict`] when the image is in use, [`Code::Unsupported`] for other formats and without
    /// `qemu-nbd`.
    pub fn open(path: &Path, format: &str, scratch: &Path) -> Result<Self> {
        if !matches!(format, "raw" | "qcow2") {
            let what = format!("images of the format {format} are not written in place");
            return Err(Error::new(Code::Unsupported, what).hint("restore as a new machine: --as NAME"));
        }
        let lock = alone(path)?;
        let socket = scratch.join(format!("mainstay-{:016x}", tag()));
        let serve = Program::new("qemu-nbd", OPEN);
        let serve =
            serve.arguments(["--fork", "--shared=8", "--discard=unmap", "--cache=writeback", "-f", format]);
        let serve = serve.arguments(["-x", "disk", "-k"]).argument(&socket).argument("--").argument(path);
        serve.run_well().map_err(|error| {
            let said = error.chain().join(": ");
            match error.code() {
                Code::Unsupported => error.hint("install QEMU's tools: the program qemu-nbd"),
                _ if said.contains("lock") => in_use(path).because(error),
                _ => error.during(format!("cannot open {}", path.display())),
            }
        })?;
        let opened = Client::new(Address::Unix(socket.clone()), "disk").limit(LIMIT).blocks(None);
        // Nobody else is to come.
        let _removed = std::fs::remove_file(&socket);
        Ok(Self { remote: opened?, path: path.to_owned(), lock })
    }

    /// Makes everything durable and waits until nobody holds the image any more.
    pub fn close(self) -> Result<()> {
        self.remote.flush()?;
        let Self { remote, path, lock } = self;
        drop(remote);
        if is_soon_free(&lock, ENDS) {
            return Ok(());
        }
        let what = format!("{} is written, but qemu-nbd does not let go of it", path.display());
        Err(Error::new(Code::Io, what))
    }
}

/// Waits until nobody uses the image, and keeps others like us away from it.
fn alone(path: &Path) -> Result<File> {
    let file =
        File::open(path).map_err(|error| Error::io(format!("cannot open {}", path.display()), error))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Err(in_use(path)),
        Err(errno) => Err(Error::io(format!("cannot lock {}", path.display()), errno.into())),
        Ok(()) if is_soon_free(&file, PATIENCE) => Ok(file),
        Ok(()) => Err(in_use(path)),
    }
}

fn is_soon_free(file: &File, looks: u32) -> bool {
    for _look in 0..looks {
        // A file system without such locks has no users that keep to them.
        if image_lock::is_free(file).unwrap_or(true) {
            return true;
        }
        std::thread::sleep(END_PAUSE);
    }
    false
}

fn in_use(path: &Path) -> Error {
    Error::new(Code::Conflict, format!("{} is in use", path.display()))
        .hint("shut the machine down: --stop does it")
}

impl Blocks for Overwrite {
    fn size(&self) -> u64 {
        self.remote.size()
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        self.remote.extents(range)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.remote.read_at(offset, buffer)
    }
}

impl WritableBlocks for Overwrite {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.remote.write_at(offset, data)
    }

    fn zero(&self, range: Range<u64>) -> Result<()> {
        self.remote.zero(range)
    }

    fn flush(&self) -> Result<()> {
        self.remote.flush()
    }
}
