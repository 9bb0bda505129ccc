//! Looks after the scratch space of a run. QEMU before 10.1, and with it libvirt, answers the guest's write with an
//! error when what it would overwrite cannot be copied away; so the snapshot is given up while there is still room.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use mainstay_core::{Blocks, Code, Error, Extent, Result, Run};
/// More than a guest writes until the next look at what is free, in bytes.
pub(super) const RESERVE: u64 = 512 << 20;

/// A file system with less is as good as full, in bytes.
const LEAST: u64 = 4 << 20;

/// How often the space is looked at.
const PERIOD: Duration = Duration::from_millis(50);

/// Set once the snapshot was given up.
pub(super) type Broken = Arc<OnceLock<()>>;

/// Ends with the value.
pub(super) struct Watch {
    _stop: Sender<()>,
}

impl Watch {
    /// Calls `give_up` once less than `reserve` bytes are free in `scratch`.
    pub(super) fn start(
        scratch: &Path,
        reserve: u64,
        broken: &Broken,
        give_up: impl FnOnce() + Send + 'static,
    ) -> Result<Self> {
        let (stop, stopped) = bounded::<()>(0);
        let (scratch, broken) = (scratch.to_owned(), Arc::clone(broken));
        let watch = move || {
            while stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                if free(&scratch).is_some_and(|free| free < reserve) {
                    let _first = broken.set(());
                    return give_up();
                }
            }
        };
        let thread = std::thread::Builder::new().name("scratch".into()).spawn(watch);
        thread.map_err(|error| Error::io("cannot watch the scratch space", error))?;
        Ok(Self { _stop: stop })
    }
}

/// Refuses a place that is full already.
pub(super) fn check(scratch: &Path, reserve: u64) -> Result<()> {
    match free(scratch) {
        Some(free) if free < reserve => Err(full(scratch)),
        _ => Ok(()),
    }
}

fn full(scratch: &Path) -> Error {
    let what = format!("there is too little room in {} for what the guest overwrites", scratch.display());
    Error::new(Code::Full, what).hint("name another directory for scratch files, on a larger file system")
}

/// Bytes that are free, if the file system says so.
fn free(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(path).ok()?;
    Some(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// A disk of a snapshot that may be given up.
pub(super) struct Watched {
    pub(super) disk: Box<dyn Blocks>,
    pub(super) broken: Broken,
    pub(super) scratch: PathBuf,
}

/// Why reading fails, if it does since the snapshot was given up.
pub(super) fn explain(broken: &Broken, scratch: &Path, error: Error) -> Error {
    // QEMU may have given it up before we have seen why.
    if broken.get().is_some() || free(scratch).is_some_and(|free| free < LEAST) {
        return full(scratch).because(error);
    }
    error
}

impl Blocks for Watched {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        self.disk.extents(range).map_err(|error| explain(&self.broken, &self.scratch, error))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.disk.read_at(offset, buffer).map_err(|error| explain(&self.broken, &self.scratch, error))
    }

    fn cuts(&self, range: Range<u64>) -> Result<Vec<Run>> {
        self.disk.cuts(range)
    }
}
