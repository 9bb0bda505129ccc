//! Databases as the dump programs of their vendors write them: each program's output goes straight into an item, and only
//! when all have ended well there is a point.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::process::{Child, ChildStdout};
use std::sync::{Arc, Mutex, PoisonError};

use mainstay_core::{
    Body, Captured, Clock, Code, Consistency, Error, Item, ItemPath, Kind, Metadata, Next, Open, Piece,
    Position, Receipt, Result, Source, Stamp, StreamEnd, StreamReader, Time,
};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::process::Program;

/// What points of exports are called.
pub const KIND: &str = "export";
/// So much of what a program says is looked at, from the end.
const SAID_BYTES: u64 = 16 << 10;

/// A program whose output becomes an item.
#[derive(Clone, Debug)]
pub struct Dump {
    /// Below a directory, if it has one; see [`Export::new`].
    pub path: String,
    pub program: Program,
}

/// Runs dump programs, one after the other.
pub struct Export {
    left: Vec<Item>,
    began: Time,
    failed: Arc<Mutex<Option<Error>>>,
}

impl Export {
    /// `directories` come before what is in them.
    pub fn new(directories: &[&str], dumps: Vec<Dump>, clock: &dyn Clock) -> Result<Self> {
        let (began, failed) = (clock.now(), Arc::default());
        let mut left = Vec::new();
        for directory in directories {
            left.push(item(directory, Kind::Directory, 0o700, began, Body::None)?);
        }
        for Dump { path, program } in dumps {
            let content = Content { program, path: path.clone(), failed: Arc::clone(&failed) };
            left.push(item(&path, Kind::File, 0o600, began, Body::Stream(Box::new(content)))?);
        }
        left.reverse();
        Ok(Self { left, began, failed })
    }
}

impl Export {
    /// What is only a part is no export.
    fn check(&self) -> Result<()> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).take().map_or(Ok(()), Err)
    }
}

fn item(path: &str, kind: Kind, mode: u32, modified: Time, body: Body) -> Result<Item> {
    let path = ItemPath::new(path).map_err(|error| {
        Error::new(Code::Usage, format!("{path:?} cannot be exported by that name")).because(error)
    })?;
    let metadata = Metadata { mode, modified, ..Metadata::new(kind) };
    Ok(Item { path, metadata, stamp: Stamp::default(), body })
}

impl Source for Export {
    fn next(&mut self) -> Result<Next> {
        self.check()?;
        Ok(self.left.pop().map_or(Next::End, |item| Next::Item(Box::new(item))))
    }

    fn seal(&mut self) -> Result<Captured> {
        self.check()?;
        Ok(Captured {
            position: Position::default(),
            consistency: Consistency::Application,
            moment: self.began,
        })
    }

    fn commit(self: Box<Self>, _receipt: &Receipt) -> Result<()> {
        Ok(())
    }
}

/// What a program will write.
struct Content {
    program: Program,
    path: String,
    failed: Arc<Mutex<Option<Error>>>,
}

impl Open for Content {
    fn open(&self) -> Result<Box<dyn StreamReader>> {
        let fail = |error: Error| self.fail(error);
        let said = rustix::fs::memfd_create("said", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(|errno| fail(Error::io("cannot keep what a program says", errno.into())))?;
        let said = File::from(said);
        let errors = said.try_clone().map_err(|error| fail(Error::io("cannot share a file", error)))?;
        let (child, output) = self.program.speak(errors).map_err(fail)?;
        let (path, failed) = (self.path.clone(), Arc::clone(&self.failed));
        Ok(Box::new(Speaking { child, output, said, path, failed, ended: false }))
    }
}

impl Content {
    /// The first failure is the one that ends the run: what is only a part is no export.
    fn fail(&self, error: Error) -> Error {
        remember(&self.failed, &self.path, error)
    }
}

fn remember(failed: &Mutex<Option<Error>>, path: &str, error: Error) -> Error {
    let shown =
        Error::new(error.code(), format!("{path} was not exported")).because(error.chain().join(": "));
    failed
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get_or_insert(error.during(format!("cannot export {path}")));
    shown
}

/// A program that runs. Dropped, it is killed with whatever it has started.
struct Speaking {
    child: Child,
    output: ChildStdout,
    said: File,
    path: String,
    failed: Arc<Mutex<Option<Error>>>,
    ended: bool,
}

impl Speaking {
    fn check(&mut self) -> Result<()> {
        let status = self.child.wait().map_err(|error| Error::io("cannot wait for a program", error))?;
        self.ended = true;
        if status.success() {
            return Ok(());
        }
        let mut text = Vec::new();
        let length = self.said.metadata().map_or(0, |found| found.len());
        let read = self.said.seek(SeekFrom::Start(length.saturating_sub(SAID_BYTES)));
        // Whatever cannot be read was not said.
        let _length = read.and_then(|_at| (&mut self.said).take(SAID_BYTES).read_to_end(&mut text));
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        // What follows an error is only about it.
        let wrong = lines.iter().find(|line| line.to_ascii_lowercase().contains("error:"));
        let last = wrong.or(lines.last()).copied().unwrap_or("it said nothing");
        Err(Error::new(Code::Io, format!("its program ended with {status}"))
            .because(last.escape_debug().to_string()))
    }
}

impl StreamReader for Speaking {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Piece> {
        let outcome = loop {
            match self.output.read(buffer) {
                Ok(0) if self.ended => return Ok(Piece::End),
                // The end of its output is the end of an export only if it says so by its status.
                Ok(0) => break self.check().map(|()| Piece::End),
                Ok(length) => return Ok(Piece::Data(length)),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => break Err(Error::io("cannot read what a program writes", error)),
            }
        };
        outcome.map_err(|error| remember(&self.failed, &self.path, error))
    }

    fn finish(self: Box<Self>) -> Result<StreamEnd> {
        Ok(StreamEnd::Steady)
    }
}

impl Drop for Speaking {
    fn drop(&mut self) {
        if !self.ended {
            // It may have gone by itself.
            let _gone = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            let _gone = self.child.wait();
        }
    }
}
