//! File systems parsed in a process of their own: hostile images meet nothing but a parser without network, files,
//! privileges or much memory. It asks its parent for every byte, and is believed nothing that does not fit.
//!
//! The program starts itself again under a hidden subcommand, which calls [`serve`]; [`Sandbox::open`] talks to it
//! over the socket that is its standard input. One sandbox parses one volume and ends with the last handle to it.

mod child;
mod confine;
mod remote;
mod wire;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Blocks, Error, Result};

pub use child::serve;

use crate::fs::Opened;

/// [`Sandbox::silence`] unless told.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// How a sandboxed parser is started.
#[derive(Clone, Debug)]
pub struct Sandbox {
    program: PathBuf,
    arguments: Vec<OsString>,
    variables: Vec<(OsString, OsString)>,
    silence: Duration,
}

impl Sandbox {
    /// This program again, with arguments that make it call [`serve`] and nothing else. It gets no environment.
    pub fn new<T: Into<OsString>>(arguments: impl IntoIterator<Item = T>) -> Self {
        Self {
            program: PathBuf::from("/proc/self/exe"),
            arguments: arguments.into_iter().map(Into::into).collect(),
            variables: Vec::new(),
            silence: SILENCE_MAX,
        }
    }

    /// With one environment variable.
    #[must_use]
    pub fn variable(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    /// How long the parser may think without asking for anything or answering; two minutes unless told.
    #[must_use]
    pub fn silence(mut self, longest: Duration) -> Self {
        self.silence = longest;
        self
    }

    /// As [`crate::fs::open`], in a new process.
    ///
    /// Errors: those of [`crate::fs::open`]; [`mainstay_core::Code::Integrity`] when the parser broke the rules, died
    /// or fell silent, as it would on an image made to break it;
    /// [`mainstay_core::Code::Unsupported`] where the kernel cannot confine a process.
    pub fn open(&self, volume: Arc<dyn Blocks>) -> Result<Opened> {
        let failed = |error| Error::io("cannot start the sandboxed parser of file systems", error);
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        ours.set_read_timeout(Some(self.silence)).map_err(failed)?;
        ours.set_write_timeout(Some(self.silence)).map_err(failed)?;
        let child = self.start(theirs.into()).map_err(failed)?;
        remote::open(Process { child }, ours, volume)
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "the door to the one process that this crate starts: itself"
    )]
    fn start(&self, socket: OwnedFd) -> std::io::Result<Child> {
        std::process::Command::new(&self.program)
            .args(&self.arguments)
            .env_clear()
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .current_dir("/")
            .stdin(Stdio::from(socket))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
    }
}

/// The parser's process; ended when dropped.
struct Process {
    child: Child,
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be gone already; that is all the same now.
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}
