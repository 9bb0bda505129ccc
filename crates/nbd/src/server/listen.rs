//! The listening socket, and the thread that lets connections in and sees them out.

use std::io;
use std::net::{Shutdown, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender};
use mainstay_core::{Error, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, chmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use rustix::time::Timespec;

use super::connection::{Job, serve};
use super::{Export, ServerOptions};
use crate::address::Address;
use crate::stream::Socket;

/// Connections that the kernel keeps waiting.
const BACKLOG: i32 = 64;
/// How long nobody is let in after the system refused to.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How long connections have to fetch their last replies when the server stops.
const GRACE: Duration = Duration::from_secs(5);

pub(super) enum Listener {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

impl Listener {
    pub(super) fn bind(address: &Address, mode: u32) -> Result<Self> {
        let bound = match address {
            Address::Unix(path) => bind_unix(path, mode).map(|listener| Self::Unix(listener, path.clone())),
            Address::Tcp { host, port } => TcpListener::bind((host.as_str(), *port)).and_then(|listener| {
                listener.set_nonblocking(true)?;
                Ok(Self::Tcp(listener))
            }),
        };
        bound.map_err(|error| Error::io(format!("cannot listen on {address}"), error))
    }

    /// `asked` with the port that was given.
    pub(super) fn address(&self, asked: &Address) -> Result<Address> {
        match (self, asked) {
            (Self::Tcp(listener), Address::Tcp { host, .. }) => {
                let bound =
                    listener.local_addr().map_err(|error| Error::io("cannot tell the port", error))?;
                Ok(Address::tcp(host.clone(), bound.port()))
            }
            _ => Ok(asked.clone()),
        }
    }

    fn accept(&self) -> io::Result<Socket> {
        match self {
            Self::Unix(listener, _) => listener.accept().map(|(stream, _)| Socket::Unix(stream)),
            Self::Tcp(listener) => listener.accept().map(|(stream, _)| Socket::Tcp(stream)),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(listener, _) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            let _gone_already = std::fs::remove_file(path);
        }
    }
}

/// Nobody can connect before the mode is set, because nobody listens yet.
fn bind_unix(path: &Path, mode: u32) -> io::Result<UnixListener> {
    remove_if_dead(path)?;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&fd, &SocketAddrUnix::new(path)?)?;
    chmod(path, Mode::from_raw_mode(mode))?;
    listen(&fd, BACKLOG)?;
    let listener = UnixListener::from(fd);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Removes a socket that nobody listens on, and nothing else.
fn remove_if_dead(path: &Path) -> io::Result<()> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let refuses = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    if is_socket && UnixStream::connect(path).is_err_and(refuses) {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

pub(super) struct Acceptor {
    pub(super) listener: Listener,
    /// Rings once, for the end.
    pub(super) bell: Arc<OwnedFd>,
    pub(super) exports: Arc<Vec<Export>>,
    pub(super) options: Arc<ServerOptions>,
    pub(super) jobs: Sender<Job>,
}

/// A connection as the acceptor knows it.
struct Guest {
    socket: Socket,
    thread: JoinHandle<()>,
}

impl Acceptor {
    /// False when a connection ended in a panic.
    pub(super) fn run(self) -> bool {
        let mut fine = true;
        let mut guests: Vec<Guest> = Vec::new();
        // Nothing is ever sent: the channel closes when the last guest has dropped its end.
        let (inside, outside) = crossbeam_channel::bounded::<()>(0);
        while let Ok(false) = self.rung(None) {
            for gone in guests.extract_if(.., |guest| guest.thread.is_finished()) {
                fine &= gone.thread.join().is_ok();
            }
            match self.listener.accept() {
                // Dropped, and so closed, when there are too many already.
                Ok(socket) if guests.len() < self.options.connections => {
                    guests.extend(self.let_in(socket, inside.clone()));
                }
                Ok(_) => {}
                Err(error) if temporary(&error) => {}
                // Out of descriptors, most likely. Trying again at once would only burn the processor.
                Err(_) => drop(self.rung(Some(&PAUSE))),
            }
        }
        drop((self.listener, inside, self.jobs));
        // No more requests; the replies to those that are here still go out.
        guests.iter().for_each(|guest| guest.socket.shut(Shutdown::Read));
        if outside.recv_timeout(GRACE) == Err(RecvTimeoutError::Timeout) {
            guests.iter().for_each(|guest| guest.socket.shut(Shutdown::Both));
        }
        for guest in guests {
            fine &= guest.thread.join().is_ok();
        }
        fine
    }

    fn let_in(&self, socket: Socket, inside: Sender<()>) -> Option<Guest> {
        let handle = socket.try_clone().ok()?;
        let (exports, options) = (Arc::clone(&self.exports), Arc::clone(&self.options));
        let jobs = self.jobs.clone();
        let run = move || {
            let _inside = inside;
            serve(socket, &exports, &options, &jobs);
        };
        let thread = thread::Builder::new().name("nbd-reader".into()).spawn(run).ok()?;
        Some(Guest { socket: handle, thread })
    }

    /// Waits for somebody at the door, or with a `limit` for the end alone; true when it is the end.
    fn rung(&self, limit: Option<&Timespec>) -> io::Result<bool> {
        let mut fds = [PollFd::new(&*self.bell, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
        let watched = if limit.is_some() { 1 } else { 2 };
        match poll(&mut fds[..watched], limit) {
            Err(Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
            Ok(_) => Ok(!fds[0].revents().is_empty()),
        }
    }
}

fn temporary(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}
