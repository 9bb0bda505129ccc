//! What is known of one name in an open directory.

use std::ffi::CStr;
use std::os::fd::AsFd;

use mainstay_core::{HardLink, Kind, Metadata, Stamp, Time};
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags, StatxTimestamp, readlinkat, statx};
use rustix::io::Errno;

use super::dirs::FileId;
use super::owners::Owners;
use super::xattr::XattrBuffer;

/// All that is asked of `statx`: the basic values but the time of access.
const MASK: StatxFlags = StatxFlags::BASIC_STATS.difference(StatxFlags::ATIME);

/// Looks at `name` without following it and without starting an automount.
pub(super) fn look(dir: impl AsFd, name: &CStr) -> Result<Statx, Errno> {
    statx(dir, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT, MASK)
}

pub(super) fn look_at_open(fd: impl AsFd) -> Result<Statx, Errno> {
    statx(fd, c"", AtFlags::EMPTY_PATH, MASK)
}

/// The time of modification of something open.
pub(super) fn modified(fd: impl AsFd) -> Result<Time, Errno> {
    statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::MTIME).map(|stat| time(stat.stx_mtime))
}

pub(super) fn kind(stat: &Statx) -> Option<Kind> {
    Some(match FileType::from_raw_mode(u32::from(stat.stx_mode)) {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
        FileType::CharacterDevice => Kind::CharDevice,
        FileType::BlockDevice => Kind::BlockDevice,
        FileType::Unknown => return None,
    })
}

pub(super) fn time(stamp: StatxTimestamp) -> Time {
    Time::from_parts(stamp.tv_sec, i64::from(stamp.tv_nsec))
}

/// Evidence of unchanged content: size, inode and both times. Empty when it was touched at `settled` or later.
/// The device is left out: a snapshot of the same file system has another one each time.
pub(super) fn stamp(stat: &Statx, settled: Time) -> Stamp {
    let (modified, changed) = (time(stat.stx_mtime), time(stat.stx_ctime));
    if modified.max(changed) >= settled {
        return Stamp::default();
    }
    let parts = [stat.stx_ino, stat.stx_size, modified.0.cast_unsigned(), changed.0.cast_unsigned()];
    let mut bytes = Vec::with_capacity(32);
    parts.iter().for_each(|part| bytes.extend_from_slice(&part.to_le_bytes()));
    Stamp(bytes)
}

/// Turns what the kernel says into [`Metadata`]. The default one knows no names of owners.
#[derive(Default)]
pub(super) struct Inspector {
    pub(super) owners: Owners,
    xattrs: XattrBuffer,
}

impl Inspector {
    pub(super) fn new(owners: Owners) -> Self {
        Self { owners, xattrs: XattrBuffer::default() }
    }

    /// The metadata of `name`, of which `stat` is known already; with the error that hid a part of it, if any.
    pub(super) fn metadata(
        &mut self,
        dir: impl AsFd,
        name: &CStr,
        stat: &Statx,
        kind: Kind,
    ) -> Result<(Metadata, Option<Errno>), Errno> {
        let (xattrs, trouble) = self.xattrs.read(&dir, name);
        let link_target = match kind {
            Kind::Symlink => Some(readlinkat(&dir, name, Vec::new())?.into_bytes()),
            _ => None,
        };
        let shared = stat.stx_nlink > 1 && kind != Kind::Directory;
        let FileId { device, inode } = FileId::of(stat);
        let is_device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
        let metadata = Metadata {
            size: if kind == Kind::File { stat.stx_size } else { 0 },
            mode: u32::from(stat.stx_mode) & 0o7777,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            user: self.owners.user(stat.stx_uid),
            group: self.owners.group(stat.stx_gid),
            modified: time(stat.stx_mtime),
            hard_link: shared.then_some(HardLink { device, inode }),
            link_target,
            device: is_device.then_some((stat.stx_rdev_major, stat.stx_rdev_minor)),
            xattrs,
            ..Metadata::new(kind)
        };
        Ok((metadata, trouble))
    }
}
