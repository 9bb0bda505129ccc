//! What stands between a backup and a guest that stays frozen: whoever freezes a guest has somebody beside him who
//! thaws it when the time is up or when he is gone, and who clears away what he left on the host.
//!
//! Best is a process of its own, since it outlives `kill -9` of ours; the surface says which program that is
//! ([`GuardProgram`]), and that program calls [`attend`]. Without one a thread does what a thread can.

use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread::JoinHandle;
use std::time::Duration;

use mainstay_core::{Clock, Error, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::FileType;
use rustix::io::Errno;
use rustix::time::Timespec;
use serde::{Deserialize, Serialize};

use crate::process::Program;

use super::agent::Agent;
use super::endpoint::Endpoint;
use super::run_dir::{Plan, clear_after_death};

/// The longest word of the conversation between a run and its guard, in bytes: a path.
const WORD_MAX: u64 = 64 << 10;

/// What a thaw may take before it is tried anew.
const THAW: Duration = Duration::from_secs(10);

/// How often a thaw is tried.
const THAW_TRIES: u32 = 30;

/// The program that stands guard: it is to call [`attend`] with its standard input and output.
#[derive(Clone, Debug)]
pub struct GuardProgram {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
}

/// How a guest is thawed by whoever comes after.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Thaw {
    /// Over the channel of its agent.
    Agent { socket: Endpoint },
    /// By the program `virsh`.
    Virsh { uri: String, domain: String },
}

/// Something that can hold a guest still.
pub(super) trait Freezer {
    fn freeze(&mut self, limit: Duration) -> Result<()>;

    /// Whether anything was still frozen.
    fn thaw(&mut self) -> Result<bool>;
}

impl Freezer for Agent {
    fn freeze(&mut self, limit: Duration) -> Result<()> {
        match Self::freeze(self, limit)? {
            0 => Err(Error::new(mainstay_core::Code::Unsupported, "the guest has no file system to freeze")),
            _ => Ok(()),
        }
    }

    fn thaw(&mut self) -> Result<bool> {
        Ok(Self::thaw(self, THAW)? > 0)
    }
}

/// The guard of one run, as the run sees it.
pub(super) struct Guard {
    control: Option<Box<dyn std::io::Write + Send>>,
    /// The guest may stand still.
    frozen: bool,
    process: Option<Child>,
    thread: Option<JoinHandle<()>>,
}

impl Guard {
    /// Starts somebody who watches over the run in `directory`. `agent` is the connection that a guest would be thawed
    /// over; such a socket takes one client, so the guard has to share it.
    pub(super) fn start(
        program: Option<&GuardProgram>,
        directory: &Path,
        agent: Option<&UnixStream>,
    ) -> Result<Self> {
        let fail = |error| Error::io("cannot start the guard of a backup", error);
        let agent = agent.map(UnixStream::try_clone).transpose().map_err(fail)?;
        let mut guard = match program {
            Some(GuardProgram { program, arguments }) => {
                let program = Program::new(program, Duration::MAX).arguments(arguments);
                let (child, control) = program.attend(agent.map(OwnedFd::from))?;
                Self { control: Some(Box::new(control)), frozen: false, process: Some(child), thread: None }
            }
            None => {
                let (reader, writer) = std::io::pipe().map_err(fail)?;
                let stands = move || {
                    // Nobody hears what it says: the run itself notices that the guest was thawed.
                    let _stood = attend(reader, agent);
                };
                let thread = std::thread::Builder::new().name("guard".into()).spawn(stands).map_err(fail)?;
                Self { control: Some(Box::new(writer)), frozen: false, process: None, thread: Some(thread) }
            }
        };
        guard.say(&[directory.as_os_str().as_encoded_bytes(), b"\n"].concat())?;
        Ok(guard)
    }

    /// Ends the watch: all is as it should be.
    pub(super) fn dismiss(mut self) {
        self.end();
    }

    fn say(&mut self, word: &[u8]) -> Result<()> {
        let control = self.control.as_mut().ok_or_else(|| Error::bug("the guard was dismissed"))?;
        control.write_all(word).map_err(|error| Error::io("the guard of a backup is gone", error))
    }

    fn end(&mut self) {
        if self.frozen {
            // Whoever froze could not thaw. The guard hears the end without `done`, and goes on trying.
            self.control = None;
            return;
        }
        let _told = self.say(b"done\n");
        self.control = None;
        if let Some(mut process) = self.process.take() {
            // It has nothing left to do, so it need not be waited for.
            let _gone = process.kill();
            let _ended = process.wait();
        }
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if self.control.is_some() {
            self.end();
        }
    }
}

/// A guest that stands still. Dropped, it is thawed.
pub(super) struct Frozen<'a> {
    freezer: &'a mut dyn Freezer,
    guard: &'a mut Guard,
    clock: &'a dyn Clock,
    since: Duration,
    over: bool,
}

impl<'a> Frozen<'a> {
    /// Freezes. When all is not over within `limit`, the guard thaws; the freeze itself may take half of it.
    pub(super) fn begin(
        freezer: &'a mut dyn Freezer,
        guard: &'a mut Guard,
        clock: &'a dyn Clock,
        limit: Duration,
    ) -> Result<Self> {
        guard.say(b"freeze\n")?;
        guard.frozen = true;
        let frozen = Self { freezer, guard, clock, since: clock.monotonic(), over: false };
        // When it fails, the drop thaws: the guest may freeze after all.
        frozen.freezer.freeze(limit / 2)?;
        Ok(frozen)
    }

    /// Thaws: for how long the guest stood still, and whether it did so until now.
    pub(super) fn end(mut self) -> Result<(Duration, bool)> {
        let held = self.thaw()?;
        Ok((self.clock.monotonic().saturating_sub(self.since), held))
    }

    fn thaw(&mut self) -> Result<bool> {
        let held = self.freezer.thaw()?;
        self.over = true;
        self.guard.frozen = false;
        // Should the guard be gone, there is nothing left that it could do.
        let _told = self.guard.say(b"thawed\n");
        Ok(held)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if !self.over {
            // Should it fail, the guard goes on trying.
            let _thawed = self.thaw();
        }
    }
}

/// Stands guard over one run. `control` is the run's voice: the line with its directory, then `freeze` and `thawed`,
/// and `done` at last; its end without that is the run's death. `agent` is the run's connection to the guest agent.
///
/// Errors: what the dead run left could not be cleared away; the next run tries again.
pub fn attend(control: impl Read + std::os::fd::AsFd, agent: Option<UnixStream>) -> Result<()> {
    let mut post = Post { control: BufReader::new(control), agent };
    let mut directory = post.word()?;
    if directory.pop() != Some(b'\n') {
        return Ok(());
    }
    let directory = PathBuf::from(OsString::from_vec(directory));
    let plan = Plan::read(&directory)?;
    let (mut frozen, mut in_time) = (false, true);
    loop {
        if frozen && in_time && !post.hears(plan.freeze_limit())? {
            // Unless it is dead it hears the answer, and says that it did.
            in_time = false;
            post.thaw_beside(&plan);
        }
        match post.word()?.as_slice() {
            b"freeze\n" => (frozen, in_time) = (true, true),
            b"thawed\n" => frozen = false,
            b"done\n" => return Ok(()),
            _ => break,
        }
    }
    if frozen {
        post.thaw(&plan);
    }
    clear_after_death(&directory)
}

/// [`attend`] for a program of its own, with the standard streams that [`GuardProgram`] was given.
pub fn attend_at_standard_streams() -> Result<()> {
    let fail = |error| Error::io("cannot use the standard streams", error);
    let control = std::io::stdin().as_fd().try_clone_to_owned().map_err(fail)?;
    let output = std::io::stdout().as_fd().try_clone_to_owned().map_err(fail)?;
    let kind = rustix::fs::fstat(&output).map(|stat| FileType::from_raw_mode(stat.st_mode));
    let agent = kind.is_ok_and(FileType::is_socket).then(|| UnixStream::from(output));
    attend(std::io::PipeReader::from(control), agent)
}

struct Post<R: Read> {
    control: BufReader<R>,
    agent: Option<UnixStream>,
}

impl<R: Read + std::os::fd::AsFd> Post<R> {
    /// The next line, with its line feed; without one at the end.
    fn word(&mut self) -> Result<Vec<u8>> {
        let mut word = Vec::new();
        let read = (&mut self.control).take(WORD_MAX).read_until(b'\n', &mut word);
        read.map_err(|error| Error::io("cannot hear the run that is watched over", error))?;
        Ok(word)
    }

    /// Whether the run says something, or ends, before the time is up.
    fn hears(&self, limit: Duration) -> Result<bool> {
        if !self.control.buffer().is_empty() {
            return Ok(true);
        }
        let control = self.control.get_ref().as_fd();
        let mut fds = [PollFd::new(&control, PollFlags::IN)];
        let limit = Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        };
        loop {
            match poll(&mut fds, Some(&limit)) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(errno) => {
                    return Err(Error::io("cannot wait for the run that is watched over", errno.into()));
                }
            }
        }
    }

    /// Thaws while the run lives but has other things to do.
    fn thaw_beside(&mut self, plan: &Plan) {
        // Should it fail, the run itself or its death comes next.
        let _tried = match self.agent.as_ref().map(UnixStream::try_clone) {
            Some(Ok(shared)) => Agent::over(shared).and_then(|mut agent| agent.thaw_unheard()),
            _ => self.thaw_once(plan),
        };
    }

    /// Tries until the guest says that it is thawed.
    fn thaw(&mut self, plan: &Plan) {
        for _attempt in 0..THAW_TRIES {
            if self.thaw_once(plan).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn thaw_once(&mut self, plan: &Plan) -> Result<()> {
        match plan.thaw() {
            None => Ok(()),
            Some(Thaw::Virsh { uri, domain }) => {
                let virsh = Program::new("virsh", THAW).arguments(["-q", "-c", uri, "domfsthaw", domain]);
                virsh.run_well().map(drop)
            }
            Some(Thaw::Agent { socket }) => {
                let mut agent = match self.agent.take() {
                    Some(connected) => Agent::over(connected)?,
                    None => Agent::connect(socket)?,
                };
                agent.thaw(THAW).map(drop)
            }
        }
    }
}
