//! Mounts that nobody else sees, and that end with whoever made them, however it ends.
#![expect(
    unsafe_code,
    reason = "one thread's own mounts take unshare(2), which can break what threads share"
)]

use mainstay_core::{Code, Error, Result};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::process::configure_io_flusher_behavior;
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Runs `work` on a thread whose mounts nobody else sees; programs and threads that it starts do. When the thread is no
/// more, killed or not, neither are its mounts, nor loop devices that were made for them.
///
/// Errors: [`Code::Unsupported`] for whoever may not mount.
pub(super) fn with_own_mounts<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("mounts".into());
        let thread = thread.spawn_scoped(scope, || {
            part().map_err(refuse)?;
            work()
        });
        let thread = thread.map_err(|error| Error::io("cannot start a thread", error))?;
        thread.join().unwrap_or_else(|_panic| Err(Error::bug("the thread that mounts volumes has panicked")))
    })
}

fn part() -> std::result::Result<(), Errno> {
    // SAFETY: only the mounts, the root and the working directory of this new thread part from those of the others; file
    // descriptors stay shared, and nothing here relies on a working directory.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    // Threads from here may answer for disks that are mounted: whoever waits for those must not be waited for by them.
    let _without = configure_io_flusher_behavior(true);
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
}

fn refuse(errno: Errno) -> Error {
    let error = std::io::Error::from(errno);
    Error::new(Code::Unsupported, "this process may not mount volumes").because(error)
}
