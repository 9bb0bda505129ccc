//! Other programs whose output is read, or input written, as it flows.

use std::collections::VecDeque;
use std::io::Read as _;
use std::process::{Child, ChildStderr, ChildStdout, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use mainstay_core::{Clock, Error, Progress, Result};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::process::Program;

/// What is kept of standard error: its end, in bytes.
const WORDS_MAX: usize = 64 << 10;
const ASK_EVERY: Duration = Duration::from_millis(20);

/// A program that runs. Dropped, it is killed with whatever it started.
pub(crate) struct Flow {
    name: String,
    child: Option<Child>,
    words: Option<JoinHandle<String>>,
}

impl Flow {
    /// Starts it; the time limit of the program does not count.
    pub(crate) fn start(program: &Program, input: Stdio, output: Stdio) -> Result<Self> {
        let mut command = program.command();
        command.stdin(input).stdout(output).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| program.not_started(error))?;
        let errors =
            child.stderr.take().ok_or_else(|| Error::bug("a pipe that was asked for is not there"))?;
        let words = std::thread::Builder::new().name("words".into()).spawn(move || end_of(errors));
        let words = words.map_err(|error| Error::io("cannot start a thread", error))?;
        Ok(Self { name: program.name(), child: Some(child), words: Some(words) })
    }

    pub(crate) fn output(&mut self) -> Result<ChildStdout> {
        let output = self.child.as_mut().and_then(|child| child.stdout.take());
        output.ok_or_else(|| Error::bug("an output that was not asked for"))
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        let Some(child) = &mut self.child else { return Ok(true) };
        let ended =
            child.try_wait().map_err(|error| Error::io(format!("cannot follow {}", self.name), error))?;
        Ok(ended.is_some())
    }

    /// Asks it to end.
    pub(crate) fn ask(&self, signal: Signal) {
        if let Some(child) = &self.child {
            // It may have gone.
            let _gone = rustix::process::kill_process(Pid::from_child(child), signal);
        }
    }

    /// Waits for its end: its status, `None` when a signal ended it, and what it said at last.
    pub(crate) fn wait(
        mut self,
        clock: &dyn Clock,
        progress: &dyn Progress,
    ) -> Result<(Option<i32>, String)> {
        while !self.has_ended()? {
            progress.check()?;
            clock.sleep(ASK_EVERY);
        }
        let status = self.child.take().map(|mut child| child.wait()).transpose();
        let status = status.map_err(|error| Error::io(format!("cannot wait for {}", self.name), error))?;
        let words = self.words.take().map(JoinHandle::join).and_then(std::result::Result::ok);
        Ok((status.and_then(|status| status.code()), words.unwrap_or_default()))
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // Its own group, so that what it has started dies with it.
            let _gone = kill_process_group(Pid::from_child(&child), Signal::KILL);
            let _gone = child.wait();
        }
    }
}

fn end_of(mut errors: ChildStderr) -> String {
    let (mut kept, mut buffer) = (VecDeque::new(), [0; 4096]);
    while let Ok(read @ 1..) = errors.read(&mut buffer) {
        kept.extend(buffer.get(..read).unwrap_or_default());
        kept.drain(..kept.len().saturating_sub(WORDS_MAX));
    }
    String::from_utf8_lossy(kept.make_contiguous()).into_owned()
}
