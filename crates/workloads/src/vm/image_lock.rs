//! The locks that QEMU puts on image files: open-file-description locks on single bytes, one for each thing that a
//! user of the image does and one for each that it does not want others to do. Source: QEMU's `block/file-posix.c`
//! (`RAW_LOCK_PERM_BASE`, `RAW_LOCK_SHARED_BASE`) and `include/block/block-common.h` (`BLK_PERM_*`).

#![expect(unsafe_code, reason = "fcntl with open-file-description locks is wrapped by nobody")]

use std::fs::File;
use std::os::fd::AsRawFd as _;

use rustix::io::Errno;

/// Byte of the first thing that is done, and of the first that is not wanted.
const DONE: i64 = 100;
const UNWANTED: i64 = 200;

/// `BLK_PERM_CONSISTENT_READ`, `BLK_PERM_WRITE` and `BLK_PERM_RESIZE` as bit numbers.
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Whether the image can be read in peace. If so, it stays so as long as this file is open: whoever wants to write to
/// it, a machine that starts, is told that somebody uses it.
///
/// Errors: of the file system, when it has no such locks.
pub(super) fn hold(file: &File) -> Result<bool, Errno> {
    for byte in [DONE + READ, UNWANTED + WRITE, UNWANTED + RESIZE] {
        let mut lock = lock(libc::F_RDLCK, byte);
        match fcntl(file, libc::F_OFD_SETLK, &mut lock) {
            Err(Errno::AGAIN | Errno::ACCESS) => return Ok(false),
            other => other?,
        }
    }
    Ok(!is_held(file, &[UNWANTED + READ, DONE + WRITE, DONE + RESIZE])?)
}

/// Whether nobody uses the image. Nothing is held afterwards.
pub(super) fn is_free(file: &File) -> Result<bool, Errno> {
    let all = [READ, WRITE, RESIZE].map(|permission| [DONE + permission, UNWANTED + permission]);
    Ok(!is_held(file, all.as_flattened())?)
}

/// Whether others hold a lock on one of these bytes.
fn is_held(file: &File, bytes: &[i64]) -> Result<bool, Errno> {
    for byte in bytes {
        // A lock of others, even one that would not exclude ours, says that they do it.
        let mut lock = lock(libc::F_WRLCK, *byte);
        fcntl(file, libc::F_OFD_GETLK, &mut lock)?;
        if i32::from(lock.l_type) != libc::F_UNLCK {
            return Ok(true);
        }
    }
    Ok(false)
}

fn lock(kind: i32, byte: i64) -> libc::flock {
    // The kinds are 0, 1 and 2, and the beginning of the file is 0.
    let kind = i16::try_from(kind).unwrap_or_default();
    libc::flock { l_type: kind, l_whence: 0, l_start: byte, l_len: 1, l_pid: 0 }
}

fn fcntl(file: &File, command: i32, lock: &mut libc::flock) -> Result<(), Errno> {
    // SAFETY: the descriptor is open as long as `file` lives, and the lock commands read and write one `flock`, which
    // the pointer leads to.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) };
    match result {
        -1 => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
        _ => Ok(()),
    }
}
