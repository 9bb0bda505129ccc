//! The lab's door to other programs.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use mainstay_core::{Code, Error, Result};
use rustix::process::Signal;

use super::{SETUP, io};

/// A command with nothing on its standard input. What only root has on its path is found as well.
#[expect(clippy::disallowed_methods, reason = "the lab's door to other programs")]
pub(super) fn command<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(program);
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    path.push(":/usr/sbin:/sbin");
    command.args(arguments).env("PATH", path).stdin(Stdio::null());
    command
}

/// Runs it to its end; its standard output. Any status but 0 is an error with all that it said.
pub(super) fn run<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> Result<String> {
    let (status, text) = run_any(program, arguments)?;
    if status == Some(0) {
        return Ok(text);
    }
    Err(Error::new(Code::Io, format!("{program} ended with {status:?}: {text}")).hint(SETUP))
}

/// Runs it to its end; its status, and its standard output with its errors after it.
pub(super) fn run_any<A: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = A>,
) -> Result<(Option<i32>, String)> {
    let output = command(program, arguments)
        .output()
        .map_err(|error| Error::io(format!("cannot start {program}"), error).hint(SETUP))?;
    let text = [output.stdout, output.stderr].concat();
    Ok((output.status.code(), String::from_utf8_lossy(&text).into_owned()))
}

/// A program that runs beside the test, and no longer than its value lives.
#[derive(Debug)]
pub(super) struct Daemon {
    name: String,
    words: Vec<OsString>,
    log: PathBuf,
    child: Option<Child>,
}

impl Daemon {
    /// Starts it; whatever it says goes to a file `log`.
    pub(super) fn start<A: Into<OsString>>(
        program: &str,
        words: impl IntoIterator<Item = A>,
        log: &Path,
    ) -> Result<Self> {
        let words = words.into_iter().map(Into::into).collect();
        let mut daemon = Self { name: program.to_owned(), words, log: log.to_owned(), child: None };
        daemon.start_again()?;
        Ok(daemon)
    }

    /// Starts the same again, after it has ended.
    pub(super) fn start_again(&mut self) -> Result<()> {
        self.kill();
        let log =
            File::options().create(true).append(true).open(&self.log).map_err(io("cannot make a log"))?;
        let errors = log.try_clone().map_err(io("cannot make a log"))?;
        let child = command(&self.name, &self.words).stdout(log).stderr(errors).spawn();
        let child =
            child.map_err(|error| Error::io(format!("cannot start {}", self.name), error).hint(SETUP))?;
        self.child = Some(child);
        Ok(())
    }

    /// Its number; 0 when it has ended.
    pub(super) fn pid(&self) -> u32 {
        self.child.as_ref().map_or(0, Child::id)
    }

    /// Whether it still runs; an error with its last words when it should and does not.
    pub(super) fn check(&mut self) -> Result<()> {
        if self.has_ended()? {
            return Err(Error::new(Code::Io, format!("{} has ended: {}", self.name, self.words())));
        }
        Ok(())
    }

    pub(super) fn has_ended(&mut self) -> Result<bool> {
        let Some(child) = &mut self.child else { return Ok(true) };
        let ended = child.try_wait().map_err(io(format!("cannot look after {}", self.name)))?;
        Ok(ended.is_some())
    }

    /// What it has said.
    pub(super) fn words(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Ends it as a power cut would: SIGKILL. Returns when it is gone.
    pub(super) fn kill(&mut self) {
        self.end(Signal::KILL);
    }

    /// Sends a signal and waits for the end.
    pub(super) fn end(&mut self, signal: Signal) {
        let Some(mut child) = self.child.take() else { return };
        let pid = rustix::process::Pid::from_child(&child);
        // Either may find it gone already.
        let _gone = rustix::process::kill_process(pid, signal);
        let _gone = child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}
