//! Lines of JSON over a socket, with time limits: what QMP and the guest agent have in common. The other side may be a
//! guest, so it is given neither time nor memory without end.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use mainstay_nbd::Stream;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::Value;

use super::endpoint::Endpoint;
use crate::process::alarm;

/// What one read takes, in bytes.
const READ_MAX: usize = 64 << 10;

/// What another machine may take to be connected to.
const CONNECT: Duration = Duration::from_secs(10);

/// One conversation.
pub(super) struct Channel {
    pipe: Pipe,
    /// Read and not yet taken.
    buffer: Vec<u8>,
    /// As much of it as is known to hold no line feed.
    searched: usize,
    /// The longest line that is accepted, in bytes.
    line_max: usize,
    /// For people: whom this speaks to.
    peer: String,
}

enum Pipe {
    Here(UnixStream),
    /// On another machine.
    There(Stream),
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

    /// What is left of it.
    fn rest(&self) -> Duration {
        let value = rustix::time::timerfd_gettime(&self.alarm).map(|set| set.it_value);
        value.ok().and_then(|value| Duration::try_from(value).ok()).unwrap_or_default()
    }

    pub(super) fn is_up(&self) -> bool {
        self.rest().is_zero()
    }
}

impl Channel {
    /// Errors: [`Code::NotFound`] when there is no such socket, [`Code::Conflict`] when nobody accepts.
    pub(super) fn connect(endpoint: &Endpoint, line_max: usize) -> Result<Self> {
        match endpoint {
            Endpoint::Unix(path) => Self::connect_here(path, line_max),
            Endpoint::Tcp { .. } => {
                let (address, tls) = endpoint.dial()?;
                let stream = Stream::open(&address, tls.as_ref(), CONNECT)?;
                Ok(Self::new(Pipe::There(stream), endpoint.to_string(), line_max))
            }
        }
    }

    fn connect_here(path: &Path, line_max: usize) -> Result<Self> {
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
        Ok(Self::new(Pipe::Here(socket), peer, line_max))
    }

    fn new(pipe: Pipe, peer: String, line_max: usize) -> Self {
        Self { pipe, buffer: Vec::new(), searched: 0, line_max, peer }
    }

    pub(super) fn peer(&self) -> &str {
        &self.peer
    }

    /// The socket, if it is one of this machine.
    pub(super) fn socket(&self) -> Option<&UnixStream> {
        match &self.pipe {
            Pipe::Here(socket) => Some(socket),
            Pipe::There(_) => None,
        }
    }

    /// Ends the conversation, also for those who share the socket.
    pub(super) fn hang_up(self) {
        match self.pipe {
            Pipe::Here(socket) => drop(socket.shutdown(std::net::Shutdown::Both)),
            Pipe::There(stream) => stream.close(),
        }
    }

    /// Errors: [`Code::Io`] when the other side does not take it in time.
    pub(super) fn send(&mut self, bytes: &[u8], limit: &Limit) -> Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.pipe.write(rest, limit) {
                Ok(0) => return Err(self.closed()),
                Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::TimedOut => return Err(self.late(limit)),
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
            let mut bytes = [0; READ_MAX];
            match self.pipe.read(&mut bytes, limit) {
                Ok(0) => return Err(self.closed()),
                Ok(read) => self.buffer.extend_from_slice(bytes.get(..read).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::TimedOut => return Ok(None),
                Err(error) => return Err(Error::io(format!("cannot receive from {}", self.peer), error)),
            }
        }
    }

    /// Throws away whatever has been received.
    pub(super) fn forget(&mut self) {
        self.buffer.clear();
        self.searched = 0;
    }

    pub(super) fn late(&self, limit: &Limit) -> Error {
        let what = format!("{} did not answer within {:?}", self.peer, limit.length);
        Error::new(Code::Io, what)
    }

    fn closed(&self) -> Error {
        Error::new(Code::Io, format!("{} hung up", self.peer))
    }
}

impl Pipe {
    /// At least one byte, unless the other side hung up. When the time is up, [`ErrorKind::TimedOut`].
    fn read(&mut self, bytes: &mut [u8], limit: &Limit) -> io::Result<usize> {
        match self {
            Self::Here(socket) => within(socket, PollFlags::IN, limit, |mut socket| socket.read(bytes)),
            Self::There(stream) => {
                stream.all_within(limit.rest())?;
                stream.read(bytes)
            }
        }
    }

    fn write(&mut self, bytes: &[u8], limit: &Limit) -> io::Result<usize> {
        match self {
            Self::Here(socket) => within(socket, PollFlags::OUT, limit, |mut socket| socket.write(bytes)),
            Self::There(stream) => {
                stream.all_within(limit.rest())?;
                stream.write(bytes)
            }
        }
    }
}

/// Does something with a socket that does not block, once that is ready for it.
fn within<'a>(
    socket: &'a UnixStream,
    flags: PollFlags,
    limit: &Limit,
    mut act: impl FnMut(&'a UnixStream) -> io::Result<usize>,
) -> io::Result<usize> {
    loop {
        let mut fds = [PollFd::new(socket, flags), PollFd::new(&limit.alarm, PollFlags::IN)];
        match poll(&mut fds, None) {
            // The alarm counts first, so that endless talk does not outrun it.
            Ok(_) if fds.last().is_some_and(|alarm| !alarm.revents().is_empty()) => {
                return Err(ErrorKind::TimedOut.into());
            }
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        match act(socket) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            done => return done,
        }
    }
}

/// The line that carries a message.
pub(super) fn line_of(message: &Value) -> Vec<u8> {
    format!("{message}\n").into_bytes()
}

/// What an answer holds under a name; nothing if it is no object, since the other side may say anything.
pub(super) fn part(mut answer: Value, name: &str) -> Value {
    answer.get_mut(name).map(Value::take).unwrap_or_default()
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
