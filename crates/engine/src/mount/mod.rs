//! Recovery points as directories of this machine, by FUSE: read-only, read as far as somebody looks.

mod all;
mod disks;
mod draft;
mod inodes;
mod lease;
mod serve;
mod single;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fuser::{BackgroundSession, Config, Filesystem, MountOption, Session, SessionACL};
use mainstay_core::{Blocks, Code, Error, ItemPath, Metadata, Result};
use mainstay_workloads::process::Program;
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

pub use all::{All, OpenPoint};
pub(crate) use disks::DiskFiles;
pub use draft::{Below, Draft, DraftCost, DraftTrouble};
pub use lease::Lease;
pub use single::{OneFile, Point};

/// Threads that answer the kernel.
const THREADS: usize = 4;
/// The most that is read or written in one go, in bytes.
const READ_MAX: u32 = 1 << 20;
/// How long the helper that unmounts for ordinary users may take.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(30);

/// What is shown, by path.
pub trait Tree: Send + Sync + 'static {
    fn look(&self, path: &ItemPath) -> Result<Option<Shown>>;

    /// What lies directly in a directory.
    fn list(&self, directory: &ItemPath) -> Result<Vec<Shown>>;

    /// The content of what has any.
    fn content(&self, path: &ItemPath) -> Result<Arc<dyn Blocks>>;
}

/// A file or directory as it is shown.
#[derive(Clone, Debug)]
pub struct Shown {
    pub path: ItemPath,
    pub metadata: Metadata,
    /// Hard links are the same file only within one of these.
    pub world: u64,
    /// It never changes, so that the kernel may remember it.
    pub lasting: bool,
}

/// Told of what could not be read.
pub type Trouble = Box<dyn Fn(&ItemPath, &Error) + Send + Sync>;

/// A tree that is mounted; unmounted when dropped.
pub struct Mounted {
    session: Option<BackgroundSession>,
    directory: PathBuf,
}

impl Mounted {
    /// Mounts `tree` on an empty directory. With `everybody`, other users may look into it as owners and modes allow;
    /// without, only whoever mounts, and into everything.
    ///
    /// Errors: [`Code::NotFound`], [`Code::Conflict`] when the directory is not empty or a dead mount is in its place,
    /// [`Code::Unsupported`] where there is no FUSE or no right to use it.
    pub fn new(tree: Arc<dyn Tree>, directory: &Path, everybody: bool, trouble: Trouble) -> Result<Self> {
        let mut config = Config::default();
        config.mount_options =
            vec![MountOption::RO, MountOption::NoSuid, MountOption::NoDev, MountOption::NoAtime];
        if everybody {
            config.mount_options.push(MountOption::DefaultPermissions);
            config.acl = SessionACL::All;
        }
        Self::serve(serve::Server::new(tree, trouble), directory, config)
    }

    /// Mounts a tree that can be written to, for its owner, on an empty directory.
    ///
    /// Errors: as of [`Mounted::new`].
    pub fn draft(draft: Draft, directory: &Path, trouble: DraftTrouble) -> Result<Self> {
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::RW,
            MountOption::NoSuid,
            MountOption::NoDev,
            MountOption::NoExec,
            MountOption::NoAtime,
        ];
        if rustix::process::geteuid().is_root() {
            // The owner is another than who mounts; the directory around it keeps out everybody else.
            config.mount_options.push(MountOption::DefaultPermissions);
            config.acl = SessionACL::All;
        }
        Self::serve(draft::Server::new(draft, trouble), directory, config)
    }

    /// Has the kernel ask `server` for what is in an empty directory.
    fn serve<F: Filesystem>(server: F, directory: &Path, mut config: Config) -> Result<Self> {
        check_place(directory)?;
        config.mount_options.push(MountOption::FSName("mainstay".to_owned()));
        (config.n_threads, config.clone_fd) = (Some(THREADS), true);
        let refused = |error: std::io::Error| {
            let code = match error.kind() {
                ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::Other => Code::Unsupported,
                _ => Code::Io,
            };
            Error::new(code, format!("cannot mount on {}", directory.display())).because(error).hint(
                "it takes /dev/fuse, and for ordinary users fusermount3 (package fuse3); with --everybody they need \
                 user_allow_other in /etc/fuse.conf",
            )
        };
        let session = Session::new(server, directory, &config).map_err(refused)?;
        let session = session.spawn().map_err(refused)?;
        Ok(Self { session: Some(session), directory: directory.to_owned() })
    }

    /// Whether somebody has unmounted it.
    pub fn is_over(&self) -> bool {
        self.session.as_ref().is_none_or(|session| session.guard.is_finished())
    }

    /// Takes it out of sight. It is over when the last who still reads in it has gone.
    pub fn detach(&self) -> Result<()> {
        if self.is_over() { Ok(()) } else { detach(&self.directory) }
    }

    /// Waits until it is over, however it ends.
    pub fn join(mut self) -> Result<()> {
        let failed = |error| Error::io(format!("{} did not end well", self.directory.display()), error);
        self.session.take().map_or(Ok(()), BackgroundSession::join).map_err(failed)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(session) = self.session.take().filter(|session| !session.guard.is_finished()) {
            // Nobody is left to be told; the session goes with the value in any case.
            let _told = detach(&self.directory);
            drop(session);
        }
    }
}

/// Takes a mount out of sight at once; it ends when nobody uses it any more.
fn detach(directory: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(format!("cannot unmount {}", directory.display()), error);
    match unmount(directory, UnmountFlags::DETACH) {
        Ok(()) => Ok(()),
        Err(Errno::PERM) => {
            let program = Program::new("fusermount3", UNMOUNT_LIMIT);
            program.arguments(["-u", "-z", "--"]).argument(directory).run_well().map(|_output| ())
        }
        Err(error) => Err(failed(error.into())),
    }
}

/// Refuses a place that cannot be mounted on, or that would be hidden.
fn check_place(directory: &Path) -> Result<()> {
    let shown = directory.display();
    let mut entries = std::fs::read_dir(directory).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::new(Code::NotFound, format!("there is no directory {shown}"))
            .hint(format!("make it: mkdir {shown}")),
        ErrorKind::NotConnected => {
            let what = format!("{shown} is a mount whose program is gone");
            let how = if rustix::process::geteuid().is_root() { "umount -l" } else { "fusermount3 -u -z" };
            Error::new(Code::Conflict, what).hint(format!("clear it: {how} {shown}"))
        }
        _ => Error::io(format!("cannot mount on {shown}"), error),
    })?;
    if entries.next().is_none() {
        return Ok(());
    }
    Err(Error::new(Code::Conflict, format!("{shown} is not empty, and what is in it would be hidden"))
        .hint("mount on an empty directory"))
}
