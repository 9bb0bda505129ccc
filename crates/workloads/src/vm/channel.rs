//! Lines of JSON over a Unix socket, with time limits: what QMP and the guest agent have in common. The other side
//! may be a guest, so it is given neither time nor memory without end.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::Value;

use crate::process::alarm;

/// What one read takes, in bytes.
const READ_MAX: usize = 64 << 10;

/// One conversation.
pub(super) struct Channel {
    socket: UnixStream,
    /// Read and not yet taken.
    buffer: Vec<u8>,
    /// As much of it as is known to hold no line feed.
    searched: usize,
    /// The longest line that is accepted, in bytes.
    line_max: usize,
    /// For people: whom this speaks to.
    peer: String,
}

/// The time for an exchange. Real time, whatever a test's clock says: so is what happens at the other end.
pub(super) struct Limit {
    alarm: OwnedFd,
    length: Duration,
}

impl Limit {
    pub(super) fn new(length: Duration) -> Result<Self> {
        let alarm = alarm(length).map_err(|errno| Error::io("cannot set a time limit", errno.into()))?;
        Ok(Self { alarm, length })
    }
}

impl Channel {
    /// Errors: [`Code::NotFound`] when there is no such socket, [`Code::Conflict`] when nobody accepts.
    pub(super) fn connect(path: &Path, line_max: usize) -> Result<Self> {
        let peer = path.display().to_string();
        let fail = |errno: Errno| match errno {
            Errno::AGAIN => busy(&peer),
            Errno::CONNREFUSED => {
                let what = format!("nobody listens at {peer}");
                Error::new(Code::NotFound, what).hint("is the machine running?")
            }
            errno => Error::io(format!("cannot connect to {peer}"), errno.into()),
        };
        let address = SocketAddrUnix::new(path).map_err(fail)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(fail)?;
        connect(&socket, &address).map_err(fail)?;
        Self::over(UnixStream::from(socket), peer, line_max)
    }

    /// Speaks over a socket that is connected.
    pub(super) fn over(socket: UnixStream, peer: String, line_max: usize) -> Result<Self> {
        let set = socket.set_nonblocking(true);
        set.map_err(|error| Error::io(format!("cannot speak to {peer}"), error))?;
        Ok(Self { socket, buffer: Vec::new(), searched: 0, line_max, peer })
    }

    pub(super) fn peer(&self) -> &str {
        &self.peer
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Errors: [`Code::Io`] when the other side does not take it in time.
    pub(super) fn send(&mut self, bytes: &[u8], limit: &Limit) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match (&self.socket).write(rest) {
                Ok(0) => return Err(self.closed()),
                Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    if !self.wait(PollFlags::OUT, limit)? {
                        return Err(self.late(limit));
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io(format!("cannot send to {}", self.peer), error)),
            }
        }
        Ok(())
    }

    /// The next line without its line feed; `None` when the time is up.
    ///
    /// Errors: [`Code::Io`] when the other side hung up or its line is longer than any should be.
    pub(super) fn line(&mut self, limit: &Limit) -> Result<Option<Vec<u8>>> {
        loop {
            let new = self.buffer.get(self.searched..).unwrap_or_default();
            if let Some(at) = new.iter().position(|&byte| byte == b'\n') {
                let mut line: Vec<u8> = self.buffer.drain(..=self.searched + at).collect();
                line.pop();
                self.searched = 0;
                return Ok(Some(line));
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > self.line_max {
                let what = format!("{} sent a line longer than {} bytes", self.peer, self.line_max);
                return Err(Error::new(Code::Io, what));
            }
            if !self.wait(PollFlags::IN, limit)? {
                return Ok(None);
            }
            self.fill()?;
        }
    }

    /// Throws away whatever has been received.
    pub(super) fn forget(&mut self) {
        self.buffer.clear();
        self.searched = 0;
    }

    fn fill(&mut self) -> Result<()> {
        let mut bytes = [0; READ_MAX];
        match (&self.socket).read(&mut bytes) {
            Ok(0) => Err(self.closed()),
            Ok(read) => {
                self.buffer.extend_from_slice(bytes.get(..read).unwrap_or_default());
                Ok(())
            }
            Err(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(Error::io(format!("cannot receive from {}", self.peer), error)),
        }
    }

    /// Whether the socket is ready before the time is up.
    fn wait(&self, flags: PollFlags, limit: &Limit) -> Result<bool> {
        let socket = self.socket.as_fd();
        let mut fds = [PollFd::new(&socket, flags), PollFd::new(&limit.alarm, PollFlags::IN)];
        loop {
            match poll(&mut fds, None) {
                Ok(_) => {
                    // The alarm counts first, so that endless talk does not outrun it.
                    return Ok(fds.last().is_some_and(|alarm| alarm.revents().is_empty()));
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::io(format!("cannot wait for {}", self.peer), errno.into())),
            }
        }
    }

    pub(super) fn late(&self, limit: &Limit) -> Error {
        let what = format!("{} did not answer within {:?}", self.peer, limit.length);
        Error::new(Code::Io, what)
    }

    fn closed(&self) -> Error {
        Error::new(Code::Io, format!("{} hung up", self.peer))
    }
}

/// The line that carries a message.
pub(super) fn line_of(message: &Value) -> Vec<u8> {
    format!("{message}\n").into_bytes()
}

/// Such a socket speaks to one client at a time.
pub(super) fn busy(peer: &str) -> Error {
    let what = format!("{peer} does not answer: somebody else speaks to it");
    Error::new(Code::Conflict, what)
        .hint("give Mainstay a monitor socket of its own, or wait for the other to end")
}

/// For people: text from a peer, without what could drive a terminal, and not without end.
pub(super) fn clean(text: &str) -> String {
    text.chars()
        .take(400)
        .flat_map(|letter| {
            let plain = !letter.is_control();
            plain
                .then_some(letter)
                .into_iter()
                .chain((!plain).then(|| letter.escape_default()).into_iter().flatten())
        })
        .collect()
}
