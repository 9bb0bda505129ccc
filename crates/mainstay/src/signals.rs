//! Signals. The first one asks the run to unwind. A second one ends the process at once, unless an application is at
//! rest or a snapshot is there that only this process will let go of. A question at the terminal does not wait.

use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mainstay_core::{Code, Error, Result};
use mainstay_workloads::armed::unless_armed;
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use signal_hook::low_level::exit;

use crate::doors::Cancel;

/// What the terminal was like before the question that a person is being asked; `None` when nobody is asked.
static QUESTION: Mutex<Option<Before>> = Mutex::new(None);

/// The controlling terminal, where there is one.
type Before = Option<(OwnedFd, Termios)>;

/// Hears signals from now on, and tells of them through what it returns.
pub(crate) fn listen() -> Result<Cancel> {
    let cancel = Cancel::default();
    let fail = |error| Error::io("cannot listen to signals", error);
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(fail)?;
    let asked = cancel.clone();
    let thread = std::thread::Builder::new().name("signals".into());
    thread.spawn(move || signals.forever().for_each(|_signal| heard(&asked))).map_err(fail)?;
    Ok(cancel)
}

fn heard(cancel: &Cancel) {
    let first = !cancel.first.swap(true, Ordering::Relaxed);
    cancel.second.store(!first, Ordering::Relaxed);
    let question = question();
    if first && question.is_none() {
        return;
    }
    let waits_for = unless_armed(|| {
        if let Some(before) = &*question {
            restore(before);
            say("\nerror: stopped before it was done\n");
        }
        exit(Code::Cancelled.exit().into());
    });
    if let Some(what) = waits_for {
        say(&format!("waiting for {what}; kill -9 would leave it as it is\n"));
    }
}

/// Calls `ask`, which may change how the terminal behaves; a signal meanwhile puts that right and ends the process.
pub(crate) fn asking<T>(ask: impl FnOnce() -> T) -> T {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let terminal = openat(CWD, c"/dev/tty", flags, Mode::empty());
    let before = terminal.and_then(|terminal| tcgetattr(&terminal).map(|before| (terminal, before)));
    *question() = Some(before.ok());
    let answer = ask();
    *question() = None;
    answer
}

fn restore(before: &Before) {
    if let Some((terminal, before)) = before {
        // What cannot be put right now cannot be put right at all.
        let _as_it_is = tcsetattr(terminal, OptionalActions::Now, before);
    }
}

fn say(text: &str) {
    let _lost = std::io::stderr().write_all(text.as_bytes());
}

fn question() -> MutexGuard<'static, Option<Before>> {
    QUESTION.lock().unwrap_or_else(PoisonError::into_inner)
}
