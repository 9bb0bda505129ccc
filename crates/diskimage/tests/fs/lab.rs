//! Images of file systems, made and mounted by the system's own tools.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use mainstay_diskimage::FileBlocks;
use mainstay_diskimage::fs::{self, FileSystem, Opened};
use tempfile::TempDir;

/// An image in a directory of its own.
pub(crate) struct Image {
    pub(crate) directory: TempDir,
    pub(crate) path: PathBuf,
}

impl Image {
    /// An empty one of `mebibytes`, given to `program` with `arguments`.
    pub(crate) fn make(program: &str, arguments: &[&str], mebibytes: u64) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("image");
        File::create(&path).unwrap().set_len(mebibytes << 20).unwrap();
        let image = Self { directory, path };
        run(program, arguments, &[&image.path]);
        image
    }

    /// Mounted for writing.
    pub(crate) fn mount(&self, options: &str) -> Mounted {
        Mounted::new(&self.path, &self.directory.path().join("mounted"), &format!("loop,{options}"))
    }

    /// Mounted by the kernel, the second reader.
    pub(crate) fn mount_read_only(&self) -> Mounted {
        Mounted::new(&self.path, &self.directory.path().join("mounted"), "loop,ro")
    }

    /// What it holds at this moment, as a power cut would leave it.
    pub(crate) fn copy(&self) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("image");
        run("cp", &["--sparse=always"], &[&self.path, &path]);
        Self { directory, path }
    }

    pub(crate) fn blocks(&self) -> Arc<FileBlocks> {
        Arc::new(FileBlocks::open(&self.path).unwrap())
    }

    pub(crate) fn open(&self) -> Arc<dyn FileSystem> {
        match fs::open(self.blocks()).unwrap() {
            Opened::FileSystem(file_system) => file_system,
            Opened::Other(other) => panic!("this is {}, not a file system", other.name()),
        }
    }
}

/// Unmounted when dropped.
pub(crate) struct Mounted(pub(crate) PathBuf);

impl Mounted {
    pub(crate) fn new(what: &Path, at: &Path, options: &str) -> Self {
        std::fs::create_dir_all(at).unwrap();
        run("mount", &["-o", options], &[what, at]);
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &[], &[&self.0]);
    }
}

/// Runs a program of the system, which must succeed.
#[expect(clippy::disallowed_methods, reason = "these tests make and mount file systems")]
pub(crate) fn run(program: &str, arguments: &[&str], paths: &[&Path]) {
    let needed = format!(
        "{program} is needed, and root with a free loop device to mount what it makes; \
         `cargo xtask setup` installs the programs"
    );
    let done = Command::new(program).args(arguments).args(paths).output().expect(&needed);
    let told = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{program} {arguments:?} {paths:?}: {told}\n({needed})");
}

/// What a program of the system prints.
#[expect(clippy::disallowed_methods, reason = "these tests ask the tools of file systems")]
pub(crate) fn output(program: &str, arguments: &[&str], paths: &[&Path]) -> String {
    let needed = format!("{program} is needed; `cargo xtask setup` installs it");
    let done = Command::new(program).args(arguments).args(paths).output().expect(&needed);
    String::from_utf8(done.stdout).unwrap()
}
