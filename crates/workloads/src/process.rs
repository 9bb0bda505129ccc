//! The one door to other programs: hooks, and the tools that make snapshots. Every program gets a time limit,
//! an empty standard input and a bounded record of what it said.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Code, Error, Progress, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

/// What is kept of each stream a program writes when nobody asks for more, in bytes; the rest is read and dropped.
const OUTPUT_MAX: usize = 64 << 10;

/// What a pipe holds, in bytes.
const PIPE_BYTES: usize = 64 << 10;

/// What one read takes, in bytes.
const READ_MAX: usize = 4096;

/// How often a run is asked whether it was cancelled while its program is waited for.
const ASK_EVERY: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// How often a program at our terminal is looked at.
const FOREGROUND_EVERY: Duration = Duration::from_millis(50);

/// Set for this process alone; a program started from here has no business with them.
const PRIVATE: [&str; 2] = ["MAINSTAY_PASSPHRASE_FILE", "MAINSTAY_PASSPHRASE_COMMAND"];

/// A program to run, with its arguments.
#[derive(Clone, Debug)]
pub struct Program {
    name: OsString,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    limit: Duration,
    run: Option<Arc<dyn Progress>>,
    output_max: usize,
    /// User and group, where it is not to be ours.
    user: Option<(u32, u32)>,
}

/// How a program ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// `None` when a signal ended it.
    pub status: Option<i32>,
    /// The first 64 KiB of standard output, or as much as was asked for.
    pub output: Vec<u8>,
    /// The same of standard error.
    pub errors: Vec<u8>,
}

impl Program {
    pub fn new(name: impl Into<OsString>, limit: Duration) -> Self {
        Self {
            name: name.into(),
            arguments: Vec::new(),
            environment: Vec::new(),
            limit,
            run: None,
            output_max: OUTPUT_MAX,
            user: None,
        }
    }

    /// A line for `/bin/sh`.
    pub fn shell(line: impl Into<OsString>, limit: Duration) -> Self {
        Self::new("/bin/sh", limit).argument("-c").argument(line)
    }

    #[must_use]
    pub fn argument(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    #[must_use]
    pub fn arguments<T: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    #[must_use]
    pub fn variable(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// It ends with the run that it is a part of: it and whatever it started are killed when that is cancelled.
    #[must_use]
    pub fn part_of(mut self, run: Option<Arc<dyn Progress>>) -> Self {
        self.run = run;
        self
    }

    /// Runs it as another user and group, and in no other group. Only root may.
    #[must_use]
    pub fn as_user(mut self, user: Option<(u32, u32)>) -> Self {
        self.user = user;
        self
    }

    /// Keeps so many bytes of each stream instead of the first 64 KiB.
    #[must_use]
    pub fn keep_output(mut self, bytes: usize) -> Self {
        self.output_max = bytes;
        self
    }

    /// Runs it to its end. When the limit is reached, it and whatever it started are killed.
    ///
    /// Errors: [`Code::Unsupported`] when there is no such program, [`Code::Io`] when it took too long or could
    /// not be started, [`Code::Cancelled`]. A program that says no by its status is no error here.
    pub fn run(&self) -> Result<Outcome> {
        let name = self.name.to_string_lossy();
        let mut child = self.start()?;
        let group = Pid::from_child(&child);
        let watched = self.watch(&mut child, group);
        if !matches!(watched, Ok(Watched { end: End::Itself, .. })) {
            // Its own group, so that what a shell has started dies with it.
            let _already_gone = kill_process_group(group, Signal::KILL);
        }
        let status = child.wait().map_err(|error| Error::io(format!("cannot wait for {name}"), error))?;
        let watched = watched.map_err(|errno| Error::io(format!("cannot follow {name}"), errno.into()))?;
        match watched.end {
            End::Itself => {
                Ok(Outcome { status: status.code(), output: watched.output, errors: watched.errors })
            }
            End::Late => {
                let limit = self.limit.as_secs();
                let what = format!("{name} did not end within {limit} seconds and was killed");
                Err(Error::new(Code::Io, what))
            }
            End::Cancelled => Err(Error::new(Code::Cancelled, "stopped before it was done")),
        }
    }

    /// Runs it and takes any status but 0 for an error, with the last line that it wrote to standard error.
    pub fn run_well(&self) -> Result<Vec<u8>> {
        let outcome = self.run()?;
        if outcome.status == Some(0) {
            return Ok(outcome.output);
        }
        let name = self.name.to_string_lossy();
        let how = outcome
            .status
            .map_or_else(|| "was killed".into(), |status| format!("ended with status {status}"));
        let errors = String::from_utf8_lossy(&outcome.errors);
        let last =
            errors.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("it said nothing");
        Err(Error::new(Code::Io, format!("{name} {how}: {}", last.escape_debug())))
    }

    /// Starts it to stand beside this process: it is told what to do over the pipe, hears when this process is gone,
    /// and is not killed with it. The time limit does not count. `output` becomes its standard output.
    pub(crate) fn attend(&self, output: Option<OwnedFd>) -> Result<(Child, ChildStdin)> {
        let mut command = self.command();
        command.stdin(Stdio::piped()).stderr(Stdio::null());
        command.stdout(output.map_or_else(Stdio::null, Stdio::from));
        let mut child = command.spawn().map_err(|error| self.not_started(error))?;
        let control =
            child.stdin.take().ok_or_else(|| Error::bug("a pipe that was asked for is not there"))?;
        Ok((child, control))
    }

    /// Runs it at our own terminal, with our streams, until it ends or `enough` says that it has to. Its status, `None` when
    /// a signal ended it. The time limit does not count.
    pub fn foreground(&self, enough: &dyn Fn() -> bool) -> Result<Option<i32>> {
        let mut command = self.command();
        // In our group, so that it gets the terminal's signals.
        command.process_group(rustix::process::getpgrp().as_raw_pid());
        let mut child = command.spawn().map_err(|error| self.not_started(error))?;
        loop {
            let ended = child.try_wait().map_err(|error| Error::io("cannot wait for a program", error))?;
            if let Some(status) = ended {
                return Ok(status.code());
            }
            if enough() {
                // It may have ended meanwhile.
                let _sent = rustix::process::kill_process(Pid::from_child(&child), Signal::TERM);
            }
            std::thread::sleep(FOREGROUND_EVERY);
        }
    }

    /// Starts it to stand beside this process, in no directory of ours, with everything that it says in `log`. Whoever
    /// started it ends it. The time limit does not count.
    pub(crate) fn stand(&self, log: File) -> Result<Child> {
        let again = log.try_clone().map_err(|error| Error::io("cannot share a log", error))?;
        let mut command = self.command();
        command.current_dir("/").stdin(Stdio::null()).stdout(log).stderr(again);
        command.spawn().map_err(|error| self.not_started(error))
    }

    /// Starts it with its output in a pipe and everything else that it says in a file. Whoever started it waits for it. The
    /// time limit does not count.
    pub(crate) fn speak(&self, errors: File) -> Result<(Child, ChildStdout)> {
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(errors);
        let mut child = command.spawn().map_err(|error| self.not_started(error))?;
        let output = child.stdout.take();
        Ok((child, output.ok_or_else(|| Error::bug("a pipe that was asked for is not there"))?))
    }

    fn start(&self) -> Result<Child> {
        let mut command = self.command();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().map_err(|error| self.not_started(error))
    }

    /// For people.
    pub(crate) fn name(&self) -> String {
        self.name.to_string_lossy().into_owned()
    }

    pub(crate) fn command(&self) -> std::process::Command {
        #[expect(clippy::disallowed_methods, reason = "this is the door")]
        let mut command = std::process::Command::new(&self.name);
        command.args(&self.arguments).process_group(0);
        PRIVATE.iter().for_each(|name| {
            command.env_remove(name);
        });
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        if let Some((user, group)) = self.user {
            // Without groups of its own the standard library takes away all others of root's.
            command.uid(user).gid(group).current_dir("/");
        }
        command
    }

    pub(crate) fn not_started(&self, error: std::io::Error) -> Error {
        let what = format!("cannot start {}", self.name.to_string_lossy());
        match error.kind() {
            std::io::ErrorKind::NotFound => Error::new(Code::Unsupported, what).because(error),
            _ => Error::io(what, error),
        }
    }

    /// Reads what the program says until it has ended, its time is up, or the run that it is a part of is cancelled.
    fn watch(&self, child: &mut Child, pid: Pid) -> std::result::Result<Watched, Errno> {
        let run = self.run.as_deref();
        let ended = pidfd_open(pid, PidfdFlags::empty())?;
        let alarm = alarm(self.limit)?;
        let mut pipes = [
            (child.stdout.take().map(OwnedFd::from), Vec::new()),
            (child.stderr.take().map(OwnedFd::from), Vec::new()),
        ];
        let end = loop {
            if run.is_some_and(Progress::cancelled) {
                break End::Cancelled;
            }
            let mut fds = vec![PollFd::new(&ended, PollFlags::IN), PollFd::new(&alarm, PollFlags::IN)];
            let open: Vec<usize> = (0..pipes.len()).filter(|index| pipes[*index].0.is_some()).collect();
            fds.extend(
                open.iter().filter_map(|index| Some(PollFd::new(pipes[*index].0.as_ref()?, PollFlags::IN))),
            );
            match poll(&mut fds, run.map(|_| &ASK_EVERY)) {
                Err(Errno::INTR) => continue,
                other => other?,
            };
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            for (index, ready) in open.iter().zip(ready.iter().skip(2)) {
                let (pipe, text) = &mut pipes[*index];
                if *ready && pipe.as_ref().is_some_and(|pipe| !drain(pipe.as_fd(), text, self.output_max)) {
                    *pipe = None;
                }
            }
            match ready.as_slice() {
                // It has ended. What its children still say is not waited for.
                [true, ..] => break End::Itself,
                [_, true, ..] => break End::Late,
                _ => {}
            }
        };
        let [(last_output, mut output), (last_errors, mut errors)] = pipes;
        for (pipe, text) in [(last_output, &mut output), (last_errors, &mut errors)] {
            let Some(pipe) = &pipe else { continue };
            // As much as a pipe holds; a child left behind may go on writing for ever.
            (0..PIPE_BYTES / READ_MAX)
                .take_while(|_| readable(pipe.as_fd()) && drain(pipe.as_fd(), text, self.output_max))
                .count();
        }
        Ok(Watched { end, output, errors })
    }
}

/// Why a program is no longer waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Itself,
    /// Its time was up.
    Late,
    Cancelled,
}

struct Watched {
    end: End,
    output: Vec<u8>,
    errors: Vec<u8>,
}

/// Takes what one read gives; false at the end of the pipe.
fn drain(pipe: BorrowedFd<'_>, text: &mut Vec<u8>, keep: usize) -> bool {
    let mut buffer = [0; READ_MAX];
    match rustix::io::read(pipe, &mut buffer) {
        Ok(0) => false,
        Ok(read) => {
            let room = keep.saturating_sub(text.len());
            let mut part = buffer.get(..read).unwrap_or_default().take(room as u64);
            part.read_to_end(text).is_ok()
        }
        Err(errno) => errno == Errno::INTR,
    }
}

fn readable(pipe: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(&pipe, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}

/// A descriptor that becomes readable when the time is up: programs live in real time, whatever a test's clock says.
pub(crate) fn alarm(limit: Duration) -> std::result::Result<OwnedFd, Errno> {
    let fd = rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
    // A timer of zero would never ring.
    let limit = limit.max(Duration::from_nanos(1));
    let once = Timespec { tv_sec: 0, tv_nsec: 0 };
    let value = Timespec {
        tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    };
    rustix::time::timerfd_settime(
        &fd,
        TimerfdTimerFlags::empty(),
        &Itimerspec { it_interval: once, it_value: value },
    )?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::Program;
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn output_status_and_variables_come_through() {
        let program = Program::shell("echo \"$MAINSTAY_TEST\"; echo why >&2; exit 7", LONG);
        let outcome = program.variable("MAINSTAY_TEST", "value").run().unwrap();
        assert_eq!((outcome.status, outcome.output.as_slice()), (Some(7), b"value\n".as_slice()));
        let error = Program::shell("echo why >&2; exit 7", LONG).run_well().unwrap_err();
        assert_eq!(error.what(), "/bin/sh ended with status 7: why");
    }

    #[test]
    fn endless_output_is_bounded_and_a_late_program_dies_with_its_children() {
        let big = Program::shell("head -c 10000000 /dev/zero", LONG).run().unwrap();
        assert_eq!((big.status, big.output.len()), (Some(0), 64 << 10));
        let marker = tempfile::tempdir().unwrap();
        let file = marker.path().join("alive");
        let line = format!("(sleep 2; touch {0}) & touch {0}.started; wait", file.display());
        let error = Program::shell(line, Duration::from_millis(700)).run().unwrap_err();
        assert!(error.what().contains("was killed"), "{error:?}");
        std::thread::sleep(Duration::from_secs(2));
        assert!(file.with_extension("started").exists() && !file.exists());
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = Program::new("mainstay-no-such-program", LONG).run().unwrap_err();
        assert_eq!(error.code(), mainstay_core::Code::Unsupported);
    }
}
