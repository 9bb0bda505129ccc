//! Writing a blob where nobody sees it, and giving it its name in one step.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use mainstay_core::{Code, Error, Id16, Put, Result, Time};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::{BLOB_MODE, DIRECTORY_MODE, STAGING, explained, failure, modified};

/// How a finished blob gets its name, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Publish {
    /// The file has no name until it is linked: a crash leaves nothing.
    Unnamed,
    /// The file has a temporary name and is linked to the final one (NFS).
    Link,
    /// It is renamed, but never onto another (FAT, SMB).
    Rename,
    /// The medium cannot decide between two writers: look, then rename.
    Replace,
}

/// The directory `.tmp`, and what its file system can do.
pub(super) struct Staging {
    directory: OwnedFd,
    pub(super) publish: Publish,
}

/// A blob without its final name; removed when dropped.
pub(super) struct Temporary<'a> {
    file: File,
    /// In the staging directory; `None` when the file has no name, or no longer.
    name: Option<String>,
    directory: &'a OwnedFd,
}

impl Staging {
    /// Makes the directory if it is missing and tries what works in it.
    pub(super) fn open(root: &OwnedFd) -> Result<Self> {
        match rustix::fs::mkdirat(root, STAGING, DIRECTORY_MODE) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failure("cannot make the directory .tmp", error)),
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(root, STAGING, flags, Mode::empty())
            .map_err(|error| failure("cannot open the directory .tmp", error))?;
        let mut staging = Self { directory, publish: Publish::Replace };
        for publish in [Publish::Unnamed, Publish::Link, Publish::Rename] {
            staging.publish = publish;
            if staging.works()? {
                return Ok(staging);
            }
        }
        staging.publish = Publish::Replace;
        Ok(staging)
    }

    #[cfg(test)]
    pub(super) fn with(root: &OwnedFd, publish: Publish) -> Result<Self> {
        Ok(Self { publish, ..Self::open(root)? })
    }

    /// Whether the first of two files gets a name and the second finds it taken.
    fn works(&self) -> Result<bool> {
        let name = random_name()?;
        let attempt = || self.publish(self.create()?, &self.directory, &name);
        let outcome = attempt().and_then(|first| Ok((first, attempt()?)));
        // Absent unless the first attempt worked.
        let _absent = rustix::fs::unlinkat(&self.directory, &name, AtFlags::empty());
        match outcome {
            Ok(outcome) => Ok(outcome == (Put::Created, Put::Exists)),
            // Said by the disk, not by the method.
            Err(error) if is_final(&error) => Err(error),
            Err(_) => Ok(false),
        }
    }

    fn create(&self) -> Result<Temporary<'_>> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let (name, file) = if self.publish == Publish::Unnamed {
            (None, rustix::fs::openat(&self.directory, ".", flags | OFlags::TMPFILE, BLOB_MODE))
        } else {
            let (name, flags) = (random_name()?, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW);
            let file = rustix::fs::openat(&self.directory, &name, flags, BLOB_MODE);
            (Some(name), file)
        };
        let file = file.map_err(|error| failure("cannot make a temporary file", error))?;
        Ok(Temporary { file: file.into(), name, directory: &self.directory })
    }

    /// A file with the bytes of `parts`, durable but for its name.
    pub(super) fn write(&self, parts: &[&[u8]]) -> Result<Temporary<'_>> {
        let temporary = self.create()?;
        let write = || {
            let mut writer = BufWriter::with_capacity(128 << 10, &temporary.file);
            parts.iter().try_for_each(|part| writer.write_all(part))?;
            writer.flush()?;
            // Never tried twice: after a failed sync the kernel may call lost pages clean.
            temporary.file.sync_data()
        };
        match write() {
            Ok(()) => Ok(temporary),
            Err(error) => Err(explained(Error::io("cannot write a temporary file", error))),
        }
    }

    /// Names the file, unless the name is taken.
    pub(super) fn publish(&self, mut temporary: Temporary<'_>, parent: &OwnedFd, leaf: &str) -> Result<Put> {
        let from = temporary.name.as_deref().unwrap_or_default();
        let outcome = match self.publish {
            Publish::Unnamed => {
                let open_file = format!("/proc/self/fd/{}", temporary.file.as_raw_fd());
                rustix::fs::linkat(CWD, open_file, parent, leaf, AtFlags::SYMLINK_FOLLOW)
            }
            Publish::Link => rustix::fs::linkat(&self.directory, from, parent, leaf, AtFlags::empty()),
            Publish::Rename => {
                rustix::fs::renameat_with(&self.directory, from, parent, leaf, RenameFlags::NOREPLACE)
            }
            Publish::Replace => match rustix::fs::statat(parent, leaf, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(_) => Err(Errno::EXIST),
                Err(_) => rustix::fs::renameat(&self.directory, from, parent, leaf),
            },
        };
        match outcome {
            Ok(()) => {
                if matches!(self.publish, Publish::Rename | Publish::Replace) {
                    temporary.name = None;
                }
                Ok(Put::Created)
            }
            // Over a network the answer to the first try may have been lost: is it this very file?
            Err(Errno::EXIST) if temporary.is(parent, leaf) => Ok(Put::Created),
            Err(Errno::EXIST) => Ok(Put::Exists),
            Err(Errno::NOENT) if temporary.was_swept() => {
                Err(Error::new(Code::Conflict, "a temporary file was swept away while it was being written")
                    .hint("Run it again; if it happens again, compare the clocks of the machines."))
            }
            Err(error) => Err(failure("cannot name a temporary file", error)),
        }
    }

    /// Removes what dead processes left; see [`mainstay_core::BlobStore::sweep_temporary`].
    pub(super) fn sweep(&self, before: Time) -> Result<u64> {
        let what = |error| failure("cannot sweep the directory .tmp", error);
        let mut freed = 0;
        for entry in Dir::read_from(&self.directory).map_err(what)? {
            let entry = entry.map_err(what)?;
            let Ok(stat) = rustix::fs::statat(&self.directory, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)
            else {
                continue;
            };
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || modified(&stat) >= before {
                continue;
            }
            match rustix::fs::unlinkat(&self.directory, entry.file_name(), AtFlags::empty()) {
                Ok(()) => freed += u64::try_from(stat.st_size).unwrap_or(0),
                Err(Errno::NOENT) => {}
                Err(error) => return Err(what(error)),
            }
        }
        Ok(freed)
    }
}

impl Temporary<'_> {
    fn is(&self, parent: &OwnedFd, leaf: &str) -> bool {
        let named = rustix::fs::statat(parent, leaf, AtFlags::SYMLINK_NOFOLLOW);
        let own = rustix::fs::fstat(&self.file);
        own.is_ok_and(|own| named.is_ok_and(|named| (own.st_dev, own.st_ino) == (named.st_dev, named.st_ino)))
    }

    fn was_swept(&self) -> bool {
        self.name.is_some() && rustix::fs::fstat(&self.file).is_ok_and(|stat| stat.st_nlink == 0)
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            // Nothing to be done about a failure here; the sweep comes by later.
            let _swept_later = rustix::fs::unlinkat(self.directory, name, AtFlags::empty());
        }
    }
}

fn is_final(error: &Error) -> bool {
    let kind = std::error::Error::source(error)
        .and_then(|source| source.downcast_ref::<std::io::Error>())
        .and_then(Errno::from_io_error);
    error.code() == Code::Full || matches!(kind, Some(Errno::ROFS | Errno::ACCESS | Errno::IO))
}

fn random_name() -> Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| Error::new(Code::Io, "the kernel gives no random numbers").because(error))?;
    Ok(Id16(bytes).to_string())
}
