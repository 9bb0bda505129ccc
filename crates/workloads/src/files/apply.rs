//! Gives owner, attributes, mode and times to something that is held open, in the order that keeps them.

use std::ffi::CString;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use mainstay_core::{Kind, Metadata, Time};
use rustix::fs::{
    AtFlags, CWD, Gid, Mode, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags, chmodat, chownat, fchmod,
    fremovexattr, fsetxattr, futimens, removexattr, setxattr, utimensat,
};
use rustix::io::Errno;

use super::decide::xattr_changes;
use super::run::Run;

/// The set-user-id and set-group-id bits.
const SET_ID: u32 = 0o6000;

/// Every file system holds the times between these two, in seconds: 1901 and 2038, the range of 32 bits.
const TIME_MIN: i64 = -(1 << 31) + 1;
const TIME_MAX: i64 = (1 << 31) - 2;

pub(super) const DEFAULT_ACL: &[u8] = b"system.posix_acl_default";

/// Something of which no other program can change what it is.
#[derive(Clone, Copy)]
pub(super) enum Held<'a> {
    /// Open for reading or writing.
    Open(BorrowedFd<'a>),
    /// Held by an `O_PATH` descriptor, which also names symbolic links, devices and what may not be read.
    Place(BorrowedFd<'a>),
}

/// Makes `held` what `metadata` says; `present` is what it is now, if that is known. Returns in words what could
/// not be set. Owner first, since changing it clears capabilities and set-id bits; times last.
pub(super) fn apply(
    run: &Run,
    held: Held<'_>,
    metadata: &Metadata,
    present: Option<&Metadata>,
) -> Option<String> {
    let mut losses = Vec::new();
    let owned = present.map(|present| (present.uid, present.gid));
    let recorded = run.recorded_owner(metadata);
    match run.wanted(metadata).owner {
        Some(wanted) if owned == Some(wanted) => {}
        Some((uid, gid)) => {
            if let Err(errno) = held.chown(uid, gid) {
                losses.push(loss(&format!("owner {uid}:{gid}"), errno));
                // The group alone may be within one's power.
                let _also_lost = held.chown(u32::MAX, gid);
            }
        }
        None if run.euid != 0 && owned.is_none_or(|(_, gid)| gid != recorded.1) => {
            // Granted to the members of that group.
            let _left = held.chown(u32::MAX, recorded.1);
        }
        None => {}
    }
    let mut mode = metadata.mode & 0o7777;
    if mode & SET_ID != 0 && held.owner().ok() != Some(recorded) {
        // A program must not gain the powers of whoever restores it.
        mode &= !SET_ID;
    }
    let nothing = Metadata::new(metadata.kind);
    for (name, value) in xattr_changes(present.unwrap_or(&nothing), metadata) {
        let Ok(text) = CString::new(name) else { continue };
        let result = match value {
            Some(value) => held.set_xattr(&text, value),
            None => held.remove_xattr(&text),
        };
        match result {
            Ok(()) | Err(Errno::NODATA) => {}
            Err(errno) => losses
                .push(loss(&format!("attribute {}", String::from_utf8_lossy(name).escape_debug()), errno)),
        }
    }
    if metadata.kind != Kind::Symlink
        && let Err(errno) = held.chmod(mode)
    {
        losses.push(loss(&format!("mode {mode:o}"), errno));
    }
    if let Err(errno) = held.set_modified(metadata.modified) {
        losses.push(loss("time", errno));
    }
    (!losses.is_empty()).then(|| losses.join("; "))
}

fn loss(what: &str, errno: Errno) -> String {
    format!("{what} could not be set ({})", std::io::Error::from(errno))
}

impl Held<'_> {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Open(fd) | Self::Place(fd) => *fd,
        }
    }

    /// A path that leads to exactly this, whatever kind of thing it is.
    fn magic_path(&self) -> String {
        format!("/proc/self/fd/{}", self.fd().as_raw_fd())
    }

    fn chown(&self, uid: u32, gid: u32) -> Result<(), Errno> {
        let number = |number: u32| (number != u32::MAX).then_some(number);
        let (uid, gid) = (number(uid).map(Uid::from_raw), number(gid).map(Gid::from_raw));
        chownat(self.fd(), c"", uid, gid, AtFlags::EMPTY_PATH)
    }

    fn owner(&self) -> Result<(u32, u32), Errno> {
        super::inspect::look_at_open(self.fd()).map(|stat| (stat.stx_uid, stat.stx_gid))
    }

    pub(super) fn chmod(&self, mode: u32) -> Result<(), Errno> {
        let mode = Mode::from_raw_mode(mode);
        match self {
            Self::Open(fd) => fchmod(fd, mode),
            Self::Place(_) => chmodat(CWD, self.magic_path(), mode, AtFlags::empty()),
        }
    }

    fn set_xattr(&self, name: &CString, value: &[u8]) -> Result<(), Errno> {
        match self {
            Self::Open(fd) => fsetxattr(fd, name, value, XattrFlags::empty()),
            Self::Place(_) => setxattr(self.magic_path(), name, value, XattrFlags::empty()),
        }
    }

    pub(super) fn remove_xattr(&self, name: &CString) -> Result<(), Errno> {
        match self {
            Self::Open(fd) => fremovexattr(fd, name),
            Self::Place(_) => removexattr(self.magic_path(), name),
        }
    }

    fn set_modified(&self, time: Time) -> Result<(), Errno> {
        let last_access = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        let last_modification = Timespec { tv_sec: time.seconds(), tv_nsec: time.subsecond_nanoseconds() };
        let times = Timestamps { last_access, last_modification };
        match self {
            Self::Open(fd) => futimens(fd, &times)?,
            Self::Place(fd) => utimensat(fd, c"", &times, AtFlags::EMPTY_PATH)?,
        }
        // A time that a file system cannot hold is bent to the nearest one without a word.
        if (TIME_MIN..=TIME_MAX).contains(&time.seconds()) || super::inspect::modified(self.fd())? == time {
            return Ok(());
        }
        Err(Errno::OVERFLOW)
    }
}
