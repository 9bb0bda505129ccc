//! Something that must happen whatever becomes of the run: a server that was stopped is started again, also when Mainstay
//! is killed, and at the latest after a time.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin};
use std::time::Duration;

use mainstay_core::{Error, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use serde::{Deserialize, Serialize};

use crate::armed::Armed;
use crate::process::Program;
use crate::vm::GuardProgram;

/// The longest promise that a guard is told, in bytes.
const WORD_MAX: u64 = 64 << 10;
/// A line that fails is tried so often.
const TRIES: u32 = 3;
const AGAIN: Duration = Duration::from_secs(2);

/// What is promised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promised {
    /// For `/bin/sh`.
    pub line: String,
    /// What one try may take, in seconds.
    pub try_seconds: u64,
    /// At the latest after so many seconds.
    pub within_seconds: Option<u64>,
}

/// A promise. Dropped, it is kept.
pub struct Promise {
    promised: Promised,
    guard: Option<(Child, ChildStdin)>,
    is_kept: bool,
    _armed: Armed,
}

impl Promise {
    /// From now on the line will be run. `what` completes the sentence "waiting for …".
    pub fn make(promised: Promised, what: &str, guard: Option<&GuardProgram>) -> Result<Self> {
        let mut this = Self { promised, guard: None, is_kept: true, _armed: Armed::new(what) };
        if let Some(GuardProgram { program, arguments }) = guard {
            let (child, mut control) =
                Program::new(program, Duration::MAX).arguments(arguments).attend(None)?;
            let mut word = serde_json::to_vec(&this.promised)
                .map_err(|error| Error::bug("a promise cannot be written").because(error))?;
            word.push(b'\n');
            control.write_all(&word).map_err(|error| Error::io("the guard of a promise is gone", error))?;
            this.guard = Some((child, control));
        }
        this.is_kept = false;
        Ok(this)
    }

    /// Runs the line. Should it fail, it is tried again.
    pub fn keep(mut self) -> Result<()> {
        self.run()
    }

    fn run(&mut self) -> Result<()> {
        self.is_kept = true;
        let kept = try_to_keep(&self.promised);
        if let Some((mut guard, mut control)) = self.guard.take() {
            // It may have had to do it itself, and be gone.
            let _told = control.write_all(b"done\n");
            drop(control);
            let _ended = guard.wait();
        }
        kept
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        if !self.is_kept {
            // Whatever made us forget it is the error to tell of.
            let _kept = self.run();
        }
    }
}

fn try_to_keep(promised: &Promised) -> Result<()> {
    let program = Program::shell(&promised.line, Duration::from_secs(promised.try_seconds));
    let mut tries = 1;
    loop {
        match program.run_well() {
            Err(_) if tries < TRIES => std::thread::sleep(AGAIN),
            kept => return kept.map(drop),
        }
        tries += 1;
    }
}

/// Stands guard over a promise: `control` says what it is, and `done` once it is kept; its end without that is the run's
/// death.
pub fn attend(control: impl Read + AsFd) -> Result<()> {
    let mut control = BufReader::new(control);
    let fail = |error| Error::io("cannot hear the run that is watched over", error);
    let mut word = Vec::new();
    (&mut control).take(WORD_MAX).read_until(b'\n', &mut word).map_err(fail)?;
    if word.pop() != Some(b'\n') {
        return Ok(());
    }
    let promised: Promised = serde_json::from_slice(&word)
        .map_err(|error| Error::bug("a promise makes no sense").because(error))?;
    let limit = promised
        .within_seconds
        .map(|seconds| Timespec { tv_sec: i64::try_from(seconds).unwrap_or(i64::MAX), tv_nsec: 0 });
    let control_fd = control.get_ref().as_fd();
    let mut fds = [PollFd::new(&control_fd, PollFlags::IN)];
    let heard = rustix::io::retry_on_intr(|| poll(&mut fds, limit.as_ref()));
    if heard.map_err(|errno| fail(errno.into()))? == 0 {
        // The run lives, but its time is up.
        return try_to_keep(&promised);
    }
    word.clear();
    (&mut control).take(WORD_MAX).read_until(b'\n', &mut word).map_err(fail)?;
    if word == b"done\n" { Ok(()) } else { try_to_keep(&promised) }
}
