//! The world as a run sees it: its clock, environment, terminal and streams. Tests hand in a scripted one.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::tz::TimeZone;
use mainstay_core::{Clock, Result};
use zeroize::Zeroizing;

/// All that a run may touch beside the file system and child processes.
pub struct Doors {
    pub clock: Arc<dyn Clock>,
    /// This machine's time zone.
    pub zone: TimeZone,
    pub environment: Environment,
    pub host: String,
    /// The identity of the virtual machine that this runs in, as its host knows it.
    pub guest: Option<String>,
    /// The effective user is root.
    pub superuser: bool,
    pub directory: PathBuf,
    /// Data.
    pub out: Box<dyn Write + Send>,
    /// Talk.
    pub err: Box<dyn Write + Send>,
    pub terminal: Terminal,
    pub person: Box<dyn Person>,
    pub cancel: Cancel,
}

/// The variables that count, read once.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    pub repository: Option<OsString>,
    pub key_file: Option<PathBuf>,
    /// Of the repository.
    pub passphrase: Passphrase,
    /// Of encrypted volumes inside images.
    pub volume_passphrase: Passphrase,
    pub no_color: bool,
    /// Who runs this, as the system calls them; for people.
    pub user: Option<String>,
    pub home: Option<PathBuf>,
    pub xdg_data: Option<PathBuf>,
    pub xdg_config: Option<PathBuf>,
    pub xdg_state: Option<PathBuf>,
    /// Where programs are looked for.
    pub path: Vec<PathBuf>,
}

/// Where a passphrase comes from; never the passphrase itself.
#[derive(Clone, Debug, Default)]
pub struct Passphrase {
    pub file: Option<PathBuf>,
    /// Its first line of output.
    pub command: Option<OsString>,
}

/// Which streams a person sits at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Terminal {
    pub input: bool,
    pub output: bool,
    pub errors: bool,
}

/// Whoever sits at the terminal.
pub trait Person: Send {
    /// Asks for a secret without showing it.
    fn secret(&mut self, question: &str) -> Result<Zeroizing<String>>;

    /// Asks for a line.
    fn line(&mut self, question: &str) -> Result<String>;
}

/// Set from outside, by signals, and polled by everything that takes long.
#[derive(Clone, Debug, Default)]
pub struct Cancel {
    pub first: Arc<AtomicBool>,
    /// For what takes the first one for a polite question.
    pub second: Arc<AtomicBool>,
}

impl Cancel {
    pub fn asked(&self) -> bool {
        self.first.load(Ordering::Relaxed)
    }

    pub fn insisted(&self) -> bool {
        self.second.load(Ordering::Relaxed)
    }
}
