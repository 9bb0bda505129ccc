//! Image files: what a hypervisor keeps a disk in. Formats are told by content, not by name.
//!
//! An image may name other files: the base that it is a layer on, the parts that it consists of. Who wrote the image
//! chose those names, so they are followed only where a [`Companions`] allows it.

mod files;
mod qcow2;
mod vhdx;
mod vmdk;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{Blocks, Code, Error, Result};

pub use files::{Alone, Companions, Directories};

use crate::bytes;
use crate::file::FileBlocks;

/// Layers of one image. QEMU has no limit; every read may go through all of them.
const DEPTH_MAX: usize = 64;

/// Files of one image: a disk of 2 TB in the parts of 2 GB that VMware cuts it into.
const FILES_MAX: usize = 1024;

/// What is read to tell formats apart.
const HEAD: usize = 4096;

/// How an image file keeps a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    Raw,
    Qcow2,
    Vmdk,
    Vhdx,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "VMDK",
            Self::Vhdx => "VHDX",
        })
    }
}

/// A disk, out of its container.
pub struct OpenedImage {
    /// Of the outermost file.
    pub format: Format,
    pub blocks: Arc<dyn Blocks>,
    /// Every file that the disk is read from: the image, then its parts and what it is a layer on.
    pub files: Vec<PathBuf>,
    /// What a person should know about the image, each a sentence.
    pub notes: Vec<String>,
}

/// Opens an image file.
///
/// `format` is what the hypervisor's configuration says. Without it the content decides, and with it a guest that
/// writes the header of another format on its raw disk. Files that the image names are opened by `companions`;
/// [`Directories::of`] allows those beside it.
pub fn open(path: &Path, format: Option<Format>, companions: &dyn Companions) -> Result<OpenedImage> {
    open_blocks(Arc::new(FileBlocks::open(path)?), path, format, companions)
}

/// As [`open`], for an image file that lies elsewhere: in a repository, behind a network. `path` is what names in the
/// image are relative to.
pub fn open_blocks(
    base: Arc<dyn Blocks>,
    path: &Path,
    format: Option<Format>,
    companions: &dyn Companions,
) -> Result<OpenedImage> {
    let mut opening =
        Opening { companions, chain: Vec::new(), files: vec![path.to_owned()], notes: Vec::new() };
    let (format, blocks) = opening.layer(base, path, format, Naming::Allowed)?;
    Ok(OpenedImage { format, blocks, files: opening.files, notes: opening.notes })
}

/// What the content says about the format; formats that are known but not read are an error in words.
pub fn probe(base: &dyn Blocks) -> Result<Format> {
    let head = bytes::read_up_to(base, 0, HEAD)?;
    let unread = |name: &str| {
        Err(Error::new(Code::Unsupported, format!("{name} images are not read"))
            .hint("Convert it with `qemu-img convert -O qcow2`, or say that it is raw if it is."))
    };
    match head.as_slice() {
        [b'Q', b'F', b'I', 0xFB, 0, 0, 0, 1, ..] => unread("old qcow (version 1)"),
        [b'Q', b'F', b'I', 0xFB, ..] => Ok(Format::Qcow2),
        [b'v', b'h', b'd', b'x', b'f', b'i', b'l', b'e', ..] => Ok(Format::Vhdx),
        [b'K', b'D', b'M', b'V', ..] => Ok(Format::Vmdk),
        [b'C', b'O', b'W', b'D', ..] => unread("old VMDK (COWD)"),
        [b'Q', b'E', b'D', 0, ..] => unread("QED"),
        text if text.starts_with(b"# Disk DescriptorFile") => Ok(Format::Vmdk),
        vhd if vhd.starts_with(b"conectix") => unread("VHD"),
        vdi if vdi.get(0x40..0x44) == Some(&[0x7F, 0x10, 0xDA, 0xBE]) => unread("VDI"),
        parallels
            if parallels.starts_with(b"WithoutFreeSpace") || parallels.starts_with(b"WithouFreSpacExt") =>
        {
            unread("Parallels")
        }
        _ => Ok(Format::Raw),
    }
}

/// Whether an image may name other files.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Naming {
    Allowed,
    /// The format of this layer is a guess, perhaps at what a guest wrote to be guessed.
    Refused,
}

/// An image while its files are opened.
struct Opening<'a> {
    companions: &'a dyn Companions,
    /// The files from the outermost layer to this one.
    chain: Vec<PathBuf>,
    files: Vec<PathBuf>,
    notes: Vec<String>,
}

impl Opening<'_> {
    /// Opens one layer and, through the reader of its format, what it lies on.
    fn layer(
        &mut self,
        base: Arc<dyn Blocks>,
        path: &Path,
        format: Option<Format>,
        naming: Naming,
    ) -> Result<(Format, Arc<dyn Blocks>)> {
        if self.chain.iter().any(|known| known == path) {
            return Err(Error::integrity(format!("{} is a layer on itself", path.display())));
        }
        if self.chain.len() >= DEPTH_MAX {
            return Err(Error::new(
                Code::Refused,
                format!("{} lies below {DEPTH_MAX} other layers", path.display()),
            ));
        }
        self.chain.push(path.to_owned());
        let failed = |error: Error| error.during(format!("cannot open the image {}", path.display()));
        let format = match format {
            Some(format) => format,
            None => probe(&*base).map_err(failed)?,
        };
        let blocks = match format {
            Format::Raw => base,
            Format::Qcow2 => qcow2::open(self, base, path, naming).map_err(failed)?,
            Format::Vmdk => vmdk::open(self, base, path, naming).map_err(failed)?,
            Format::Vhdx => vhdx::open(&base).map_err(failed)?,
        };
        self.chain.pop();
        Ok((format, blocks))
    }

    /// Opens a file that the image at `path` names, as bytes.
    fn companion(&mut self, path: &Path, name: &[u8], naming: Naming) -> Result<(PathBuf, Arc<dyn Blocks>)> {
        let shown = String::from_utf8_lossy(name).into_owned();
        if naming == Naming::Refused {
            return Err(Error::new(
                Code::Refused,
                format!("{} is read as an image only by the look of it, and names {shown}", path.display()),
            )
            .hint(
                "Tell the base's format in the layer above it: `qemu-img rebase -u -F FORMAT -b BASE IMAGE`.",
            ));
        }
        if self.files.len() >= FILES_MAX {
            return Err(Error::new(
                Code::Refused,
                format!("the image consists of more than {FILES_MAX} files"),
            ));
        }
        let name = files::local_name(name)?;
        let (path, blocks) = self.companions.open(path, &name)?;
        if !self.files.contains(&path) {
            self.files.push(path.clone());
        }
        Ok((path, blocks))
    }

    /// Opens the layer that the image at `path` lies on. A format that is not told is guessed, and the guess is not
    /// trusted to name further files.
    fn backing(
        &mut self,
        path: &Path,
        name: &[u8],
        format: Option<Format>,
        naming: Naming,
    ) -> Result<Arc<dyn Blocks>> {
        let (path, base) = self.companion(path, name, naming)?;
        let naming = if format.is_some() { Naming::Allowed } else { Naming::Refused };
        Ok(self.layer(base, &path, format, naming)?.1)
    }
}
