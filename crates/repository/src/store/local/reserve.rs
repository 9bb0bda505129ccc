//! Space kept free, so that a full disk can still write the few small records that expiring and collecting need.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;

use mainstay_core::{Code, Error, Result};
use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

use super::failure;

pub(super) const RESERVE: &str = ".reserve";
pub(super) const RESERVE_BYTES: u64 = 16 << 20;

/// Gives the space back; whether there was any.
pub(super) fn release(root: &OwnedFd) -> Result<bool> {
    let what = |error| failure("cannot release the reserve", error);
    let there = size(root)? > 0;
    match rustix::fs::unlinkat(root, RESERVE, AtFlags::empty()) {
        Ok(()) => {}
        Err(Errno::NOENT) => return Ok(false),
        // A copy-on-write file system may lack the space for removing a name, yet can cut a file.
        Err(Errno::NOSPC) => {
            let flags = OFlags::WRONLY | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(root, RESERVE, flags, Mode::empty()).map_err(what)?;
        }
        Err(error) => return Err(what(error)),
    }
    Ok(there)
}

/// Sets the space aside, unless it is already or would be half or more of what is free.
pub(super) fn restore(root: &OwnedFd) -> Result<()> {
    let what = |error| failure("cannot set the reserve aside", error);
    if size(root)? >= RESERVE_BYTES {
        return Ok(());
    }
    let medium = rustix::fs::fstatvfs(root).map_err(what)?;
    if medium.f_bavail.saturating_mul(medium.f_frsize) < 2 * RESERVE_BYTES {
        return Ok(());
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(root, RESERVE, flags, Mode::RUSR | Mode::WUSR).map_err(what)?;
    let filled = match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, RESERVE_BYTES) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => fill(file.into()),
        other => other.map_err(what),
    };
    match filled {
        // Someone else took the room meanwhile.
        Err(error) if error.code() == Code::Full => release(root).map(|_| ()),
        other => other,
    }
}

/// Bytes that are set aside now.
pub(super) fn size(root: &OwnedFd) -> Result<u64> {
    match rustix::fs::statat(root, RESERVE, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(u64::try_from(stat.st_size).unwrap_or(0)),
        Err(Errno::NOENT) => Ok(0),
        Err(error) => Err(failure("cannot look at the reserve", error)),
    }
}

/// Random bytes, because zeros might be compressed away or stored as a hole.
fn fill(mut file: File) -> Result<()> {
    let mut block = vec![0; 1 << 20];
    for _ in 0..RESERVE_BYTES >> 20 {
        getrandom::fill(&mut block)
            .map_err(|error| Error::new(Code::Io, "the kernel gives no random numbers").because(error))?;
        file.write_all(&block).map_err(|error| Error::io("cannot set the reserve aside", error))?;
    }
    file.sync_data().map_err(|error| Error::io("cannot set the reserve aside", error))
}
