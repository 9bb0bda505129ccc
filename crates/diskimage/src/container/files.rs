//! The files that an image names, and where they may lie.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{Blocks, Code, Error, Result};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::file::FileBlocks;

/// Opens the files that images name.
pub trait Companions {
    /// `name` as it stands in the image `from`; relative names are relative to the folder of `from`. Returns the path
    /// that the file is known by: two names of one file give the same.
    fn open(&self, from: &Path, name: &Path) -> Result<(PathBuf, Arc<dyn Blocks>)>;
}

/// For images that must consist of one file.
pub struct Alone;

impl Companions for Alone {
    fn open(&self, from: &Path, name: &Path) -> Result<(PathBuf, Arc<dyn Blocks>)> {
        Err(refused(from, name))
    }
}

/// Files below certain directories of this machine, wherever links lead on the way.
pub struct Directories(Vec<PathBuf>);

impl Directories {
    /// Fails when one of them cannot be found.
    pub fn new(directories: &[PathBuf]) -> Result<Self> {
        directories.iter().map(|directory| real(directory)).collect::<Result<_>>().map(Self)
    }

    /// The directory that an image itself lies in.
    pub fn of(image: &Path) -> Result<Self> {
        let image = real(image)?;
        Ok(Self(image.parent().map(Path::to_owned).into_iter().collect()))
    }
}

impl Companions for Directories {
    fn open(&self, from: &Path, name: &Path) -> Result<(PathBuf, Arc<dyn Blocks>)> {
        let from = real(from)?;
        let path = real(&from.parent().unwrap_or(Path::new("/")).join(name))?;
        let within = |directory: &&PathBuf| path.starts_with(directory);
        let Some(directory) = self.0.iter().find(within) else {
            return Err(refused(&from, name));
        };
        let file = open_beneath(directory, path.strip_prefix(directory).unwrap_or(&path))
            .map_err(|error| Error::io(format!("cannot open {}", path.display()), error))?;
        Ok((path.clone(), Arc::new(FileBlocks::new(file, &path)?)))
    }
}

fn refused(from: &Path, name: &Path) -> Error {
    Error::new(
        Code::Refused,
        format!("{} names {}, which lies where no image is expected", from.display(), name.display()),
    )
    .hint("If it belongs to the machine, allow its directory.")
}

fn real(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|error| Error::io(format!("cannot find {}", path.display()), error))
}

/// Opens what was found to lie below `directory`, and nothing else should links change meanwhile.
fn open_beneath(directory: &Path, path: &Path) -> std::io::Result<File> {
    let folder =
        rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(File::from(openat2(&folder, path, flags, Mode::empty(), resolve)?))
}

/// The path in a file name as QEMU writes it into an image; names of what is no file are refused.
pub(super) fn local_name(name: &[u8]) -> Result<PathBuf> {
    let plain = name.strip_prefix(b"file:").unwrap_or(name);
    let head = plain.split(|byte| *byte == b'/').next().unwrap_or_default();
    if plain.is_empty() || plain.contains(&0) || head.contains(&b':') {
        let shown = String::from_utf8_lossy(name);
        return Err(Error::new(
            Code::Refused,
            format!("the image names {shown}, which is no file of this machine"),
        )
        .hint("Make the image stand alone first: `qemu-img convert -O qcow2`."));
    }
    Ok(PathBuf::from(OsStr::from_bytes(plain)))
}
