//! Looking into the disks of machines: the keys of their volumes, and the confined process that parses file systems.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{Blocks, Result};
use mainstay_diskimage::fs::{self, Opened};
use mainstay_diskimage::sandbox::Sandbox;
use mainstay_diskimage::volume::{Secret, VolumeId};
use mainstay_engine::vm::{Inside, or_by_kernel};
use zeroize::Zeroizing;

use crate::args;
use crate::doors::Doors;
use crate::secrets;

/// What a person said about looking into disks.
pub(crate) struct Looking {
    /// Each with the volume that it is for, or for any.
    files: Vec<(Option<String>, Zeroizing<Vec<u8>>)>,
    passphrase: Option<Zeroizing<Vec<u8>>>,
    /// `None` where the images are trusted.
    sandbox: Option<Sandbox>,
    /// What no reader of ours knows is mounted.
    kernel_mount: bool,
}

impl Looking {
    /// Reads key files, and asks for a passphrase if that is wanted.
    pub(crate) fn new(arguments: &args::Inside, doors: &mut Doors) -> Result<Self> {
        let mut files = Vec::new();
        for text in &arguments.volume_key_file {
            let (volume, file) = split(text, &doors.directory);
            files.push((volume, secrets::read_private(&file)?));
        }
        let passphrase = secrets::volume_passphrase(doors, arguments.ask_volume_passphrase)?;
        let sandbox = (!arguments.unconfined).then(|| Sandbox::new([crate::PARSER]));
        Ok(Self { files, passphrase, sandbox, kernel_mount: false })
    }

    /// As [`Looking::new`], for whoever looks at files, and perhaps through the kernel.
    pub(crate) fn within(arguments: &args::Within, doors: &mut Doors) -> Result<Self> {
        let looking = Self::new(&arguments.inside, doors)?;
        Ok(Self { kernel_mount: arguments.kernel_mount, ..looking })
    }

    /// Calls `look` with what it takes to look into disks.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&Inside<'_>) -> T) -> T {
        look(&Inside { keys: &|volume| self.key(volume), open: &|volume| self.open(volume) })
    }

    fn key(&self, volume: &VolumeId) -> Option<Secret> {
        let is_it = |name: &String| {
            *name == volume.name || volume.uuid.as_ref().is_some_and(|uuid| uuid.eq_ignore_ascii_case(name))
        };
        let named = self.files.iter().find(|(name, _)| name.as_ref().is_some_and(is_it));
        let any = || self.files.iter().find(|(name, _)| name.is_none());
        let file = named.or_else(any).map(|(_, key)| key);
        file.or(self.passphrase.as_ref()).map(|key| Secret::Passphrase(key.clone()))
    }

    fn open(&self, volume: Arc<dyn Blocks>) -> Result<Opened> {
        let open = |volume| match &self.sandbox {
            Some(sandbox) => sandbox.open(volume),
            None => fs::open(volume),
        };
        if !self.kernel_mount {
            return open(volume);
        }
        or_by_kernel(open(Arc::clone(&volume)), volume, &std::env::temp_dir())
    }
}

/// `VOLUME=FILE`, or a file whose name may have a `=` as well behind a `/`.
fn split(text: &OsStr, directory: &Path) -> (Option<String>, PathBuf) {
    let bytes = text.as_bytes();
    let parts = bytes.iter().position(|byte| *byte == b'=').map(|at| bytes.split_at(at));
    let named = parts.and_then(|(volume, file)| {
        // The names of logical volumes have a `/`, which is written `-` where they are shown; a path begins otherwise.
        let is_path = volume.first().is_none_or(|first| matches!(first, b'/' | b'.'));
        let volume = std::str::from_utf8(volume).ok().filter(|_| !is_path)?;
        Some((volume.to_owned(), OsStr::from_bytes(file.get(1..)?)))
    });
    match named {
        Some((volume, file)) => (Some(volume), directory.join(file)),
        None => (None, directory.join(text)),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::path::Path;

    use super::split;

    #[test]
    fn a_key_file_may_say_which_volume_it_is_for() {
        for (text, volume, file) in [
            ("key", None, "/here/key"),
            ("vda2=key", Some("vda2"), "/here/key"),
            ("vda2=/keys/a=b", Some("vda2"), "/keys/a=b"),
            ("group/root=key", Some("group/root"), "/here/key"),
            ("/keys/a=b", None, "/keys/a=b"),
            ("./a=b", None, "/here/./a=b"),
        ] {
            let (found, path) = split(OsStr::new(text), Path::new("/here"));
            assert_eq!((found.as_deref(), path.as_path()), (volume, Path::new(file)), "{text}");
        }
    }
}
