//! SQLite's own shell as the program that a database belongs to. In a process of its own, since SQLite's locks are those
//! of a process, and so that it can be killed.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use mainstay_core::{Code, Error, Result};

use super::process::command;
use super::{SETUP, io};

const MARK: &str = "-- the answer ends here --";

/// A shell that is asked one thing after the other.
#[derive(Debug)]
pub struct SqliteShell {
    child: Child,
    questions: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl SqliteShell {
    /// Opens a database, or makes it.
    pub fn open(path: &Path) -> Result<Self> {
        let mut child = command("sqlite3", ["-batch".as_ref(), path.as_os_str()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| Error::io("cannot start sqlite3", error).hint(SETUP))?;
        let missing = || Error::bug("a pipe that was asked for is not there");
        let questions = child.stdin.take().ok_or_else(missing)?;
        let answers = BufReader::new(child.stdout.take().ok_or_else(missing)?);
        let mut this = Self { child, questions, answers };
        this.ask(".timeout 60000")?;
        Ok(this)
    }

    /// What it answers: columns by `|`, rows by line.
    pub fn ask(&mut self, sql: &str) -> Result<String> {
        writeln!(self.questions, "{sql}\n.print '{MARK}'").map_err(io("the shell is gone"))?;
        self.questions.flush().map_err(io("the shell is gone"))?;
        let mut answer = String::new();
        loop {
            let mut line = String::new();
            if self.answers.read_line(&mut line).map_err(io("cannot hear the shell"))? == 0 {
                return Err(Error::new(Code::Io, "the shell has ended"));
            }
            if line.trim_end() == MARK {
                return Ok(answer.trim_end().to_owned());
            }
            answer.push_str(&line);
        }
    }

    /// Ends it as a power cut of its process would: SIGKILL.
    pub fn kill(mut self) {
        // It may have gone already.
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

impl Drop for SqliteShell {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}
