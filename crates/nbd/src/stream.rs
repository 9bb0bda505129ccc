//! Bytes to and from a peer, plain or under TLS, with a limit on every wait.
//!
//! The socket never blocks by itself. A [`Stream`] tries, and when there is nothing to do it waits in `poll` for as
//! long as its [`Patience`] allows. Network peers live in real time, whatever a test's clock says, so the limits are
//! the kernel's timers.

use std::hash::{Hash as _, Hasher as _};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, ToSocketAddrs as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use mainstay_core::{Error, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, socket_with};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use rustls::Connection;

use crate::address::Address;
use crate::tls::ClientTls;

/// After so many reads that did not have to wait, the timer is looked at: a peer that never stops talking does not
/// escape it.
const READS_BETWEEN_LOOKS: u32 = 64;

/// A peer from which nothing has come for so long, not even that it received what was sent, is gone.
const ALIVE: Duration = Duration::from_secs(20);

/// The ports of ours that long conversations come from: below those that systems hand out.
const FIRST_PORT: u16 = 20_000;
const PORTS: u16 = 10_000;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Patience {
    /// Waits as long as it takes.
    Endless,
    /// Each wait for one more byte has this limit.
    Stall(Duration),
    /// Everything until the next change of patience happens before the timer rings.
    Total,
}

/// One end of a connection. Two of them may share it: one reads while the other writes.
///
/// Public for the protocols that stand beside NBD on a hypervisor's sockets, such as its monitor.
pub struct Stream {
    shared: Arc<Shared>,
    timer: OwnedFd,
    patience: Patience,
    reads: u32,
}

struct Shared {
    socket: Socket,
    tls: OnceLock<Mutex<Connection>>,
}

pub(crate) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    /// Connects and, with `tls`, shakes hands, all within `limit`. The next reads and writes have what is left of it,
    /// unless [`Stream::all_within`] says otherwise.
    pub fn open(address: &Address, tls: Option<&ClientTls>, limit: Duration) -> Result<Self> {
        let fail = |error| Error::io(format!("cannot connect to {address}"), error);
        let mut stream = Self::connect_again(address, limit).map_err(fail)?;
        stream.all_within(limit).map_err(fail)?;
        if let Some(tls) = tls {
            let shaken = stream.start_tls(tls.connection_to(address)?);
            shaken.map_err(|error| {
                fail(error).hint("are the certificates of both sides signed by one authority?")
            })?;
        }
        Ok(stream)
    }

    /// The name of a TCP host is resolved by the system, under the system's own limits.
    pub(crate) fn connect(address: &Address, limit: Duration) -> io::Result<Self> {
        match address {
            Address::Unix(path) => {
                let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
                // On Linux this also limits how long `connect` waits for a full queue.
                set_socket_timeout(&fd, Timeout::Send, Some(limit))?;
                connect(&fd, &SocketAddrUnix::new(path.as_path())?).map_err(|errno| match errno {
                    Errno::AGAIN => io::Error::from(io::ErrorKind::TimedOut),
                    errno => errno.into(),
                })?;
                Self::new(Socket::Unix(fd.into()))
            }
            Address::Tcp { host, port } => {
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, limit) {
                        Ok(stream) => return Self::over_tcp(stream),
                        Err(error) => last = error,
                    }
                }
                Err(last)
            }
        }
    }

    /// Like [`Self::connect`]; over TCP always from the same port of ours, if that is free. A peer that takes one
    /// client may still believe in a connection of ours that was cut. When it hears from the same port, the systems
    /// find out that the old one is dead, and end it (RFC 9293, 3.5.1: half-open connections).
    fn connect_again(address: &Address, limit: Duration) -> io::Result<Self> {
        let Address::Tcp { host, port } = address else { return Self::connect(address, limit) };
        let mut hasher = std::hash::DefaultHasher::new();
        address.to_string().hash(&mut hasher);
        let first = FIRST_PORT + u16::try_from(hasher.finish() % u64::from(PORTS)).unwrap_or(0);
        for address in (host.as_str(), *port).to_socket_addrs()? {
            // Taken, or closed in order just now: then there is no old connection to end.
            if let Ok(stream) = connect_from(first, &address, limit) {
                return Self::over_tcp(stream);
            }
        }
        Self::connect(address, limit)
    }

    /// A peer that is gone without a word is noticed.
    fn over_tcp(stream: TcpStream) -> io::Result<Self> {
        sockopt::set_socket_keepalive(&stream, true)?;
        sockopt::set_tcp_keepidle(&stream, ALIVE / 4)?;
        sockopt::set_tcp_keepintvl(&stream, ALIVE / 4)?;
        sockopt::set_tcp_keepcnt(&stream, 3)?;
        sockopt::set_tcp_user_timeout(&stream, u32::try_from(ALIVE.as_millis()).unwrap_or(u32::MAX))?;
        Self::new(Socket::Tcp(stream))
    }

    pub(crate) fn new(socket: Socket) -> io::Result<Self> {
        match &socket {
            Socket::Unix(stream) => stream.set_nonblocking(true)?,
            Socket::Tcp(stream) => {
                stream.set_nonblocking(true)?;
                stream.set_nodelay(true)?;
            }
        }
        Self::over(Arc::new(Shared { socket, tls: OnceLock::new() }))
    }

    fn over(shared: Arc<Shared>) -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Self { shared, timer, patience: Patience::Endless, reads: 0 })
    }

    /// A second end, with a patience of its own.
    pub(crate) fn second(&self) -> io::Result<Self> {
        Self::over(Arc::clone(&self.shared))
    }

    pub(crate) fn wait_for_ever(&mut self) {
        self.patience = Patience::Endless;
    }

    /// From now on, each wait for one more byte has this limit.
    pub(crate) fn each_within(&mut self, limit: Duration) {
        self.patience = Patience::Stall(limit);
    }

    /// All that follows has to happen within `limit` from now.
    ///
    /// Reads and writes that do not are [`io::ErrorKind::TimedOut`].
    pub fn all_within(&mut self, limit: Duration) -> io::Result<()> {
        // A timer of zero would never ring.
        let limit = timespec(limit.max(Duration::from_nanos(1)));
        let setting = Itimerspec { it_interval: timespec(Duration::ZERO), it_value: limit };
        rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &setting)?;
        self.patience = Patience::Total;
        Ok(())
    }

    /// Goes over to TLS and shakes hands. Nothing may have been read ahead.
    pub(crate) fn start_tls(&self, connection: Connection) -> io::Result<()> {
        let tls = self.shared.tls.get_or_init(|| Mutex::new(connection));
        loop {
            let mut connection = lock(tls);
            if !connection.is_handshaking() {
                break;
            }
            let writing = connection.wants_write();
            let moved = if writing {
                connection.write_tls(&mut &self.shared.socket).map(|_| ())
            } else {
                receive(&mut connection, &self.shared.socket)
            };
            drop(connection);
            match moved {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(if writing { PollFlags::OUT } else { PollFlags::IN })?;
                }
                other => other?,
            }
        }
        self.flush_tls(tls)
    }

    pub(crate) fn is_tls(&self) -> bool {
        self.shared.tls.get().is_some()
    }

    /// Says goodbye as far as that needs no waiting, and ends the connection for both ends.
    pub fn close(&self) {
        if let Some(tls) = self.shared.tls.get() {
            let mut connection = lock(tls);
            connection.send_close_notify();
            let _best_effort = connection.write_tls(&mut &self.shared.socket);
        }
        self.shared.socket.shut(Shutdown::Both);
    }

    /// Waits until the socket can be read or written, or the patience ends.
    fn wait(&self, events: PollFlags) -> io::Result<()> {
        loop {
            let mut fds = [PollFd::new(&self.shared.socket, events), PollFd::new(&self.timer, PollFlags::IN)];
            let (watched, limit) = match self.patience {
                Patience::Endless => (1, None),
                Patience::Stall(limit) => (1, Some(timespec(limit))),
                Patience::Total => (2, None),
            };
            match poll(&mut fds[..watched], limit.as_ref()) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok(_) if fds[0].revents().is_empty() => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => return Ok(()),
            }
        }
    }

    fn look_at_the_timer(&mut self) -> io::Result<()> {
        self.reads = self.reads.wrapping_add(1);
        if !matches!(self.patience, Patience::Total) || !self.reads.is_multiple_of(READS_BETWEEN_LOOKS) {
            return Ok(());
        }
        let mut fds = [PollFd::new(&self.timer, PollFlags::IN)];
        match poll(&mut fds, Some(&timespec(Duration::ZERO))) {
            Ok(rung) if rung > 0 => Err(io::ErrorKind::TimedOut.into()),
            _ => Ok(()),
        }
    }

    fn read_tls(&self, tls: &Mutex<Connection>, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut connection = lock(tls);
            match connection.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            if connection.wants_write() {
                // An answer to a change of keys. If it cannot go now, the next write takes it along.
                let _later = connection.write_tls(&mut &self.shared.socket);
            }
            let received = receive(&mut connection, &self.shared.socket);
            drop(connection);
            match received {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::IN)?,
                other => other?,
            }
        }
    }

    fn flush_tls(&self, tls: &Mutex<Connection>) -> io::Result<()> {
        loop {
            let mut connection = lock(tls);
            if !connection.wants_write() {
                return Ok(());
            }
            let sent = connection.write_tls(&mut &self.shared.socket);
            drop(connection);
            match sent {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::OUT)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                other => drop(other?),
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.look_at_the_timer()?;
        if let Some(tls) = self.shared.tls.get() {
            return self.read_tls(tls, buffer);
        }
        loop {
            match (&self.shared.socket).read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::IN)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if let Some(tls) = self.shared.tls.get() {
            // What is taken leaves before this returns, so there is room the next time.
            let taken = lock(tls).writer().write(buffer)?;
            self.flush_tls(tls)?;
            return Ok(taken);
        }
        loop {
            match (&self.shared.socket).write(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::OUT)?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn connect_from(port: u16, to: &SocketAddr, limit: Duration) -> io::Result<TcpStream> {
    let (family, any): (_, IpAddr) = match to {
        SocketAddr::V4(_) => (AddressFamily::INET, Ipv4Addr::UNSPECIFIED.into()),
        SocketAddr::V6(_) => (AddressFamily::INET6, Ipv6Addr::UNSPECIFIED.into()),
    };
    let socket = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    // On Linux this also limits how long `connect` waits.
    set_socket_timeout(&socket, Timeout::Send, Some(limit))?;
    bind(&socket, &SocketAddr::new(any, port))?;
    connect(&socket, to)?;
    Ok(socket.into())
}

/// Takes what has arrived into the connection, or says that nothing has.
fn receive(connection: &mut Connection, mut socket: &Socket) -> io::Result<()> {
    let received = match connection.read_tls(&mut socket) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
        other => other?,
    };
    if let Err(error) = connection.process_new_packets() {
        // The peer is told why.
        let _best_effort = connection.write_tls(&mut socket);
        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
    }
    if received == 0 && connection.is_handshaking() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

impl Socket {
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
        }
    }

    pub(crate) fn shut(&self, how: Shutdown) {
        let _gone_already = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => (&*stream).read(buffer),
            Socket::Tcp(stream) => (&*stream).read(buffer),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(stream) => (&*stream).write(buffer),
            Socket::Tcp(stream) => (&*stream).write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: duration.subsec_nanos().into(),
    }
}
