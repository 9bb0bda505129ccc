//! The client's side of the protocol, as far as backups need it: text queries, and a log that is sent without end.
//! <https://mariadb.com/kb/en/clientserver-protocol/>. Unencrypted.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use mainstay_core::{Code, Error, Result};

use super::address::Address;
use super::auth::answer;

const LIMIT: Duration = Duration::from_secs(60);
/// The longest message; no event of a log is longer.
const MESSAGE_BYTES_MAX: usize = 1 << 30;
/// A packet of this length is followed by another one of the same message.
const PACKET_BYTES_MAX: usize = 0xff_ffff;
/// Long passwords and flags, protocol 4.1, transactions, secure passwords, a choice of methods.
const ABILITIES: u32 = 1 | 4 | 0x200 | 0x2000 | 0x8000 | 0x8_0000;
const UTF8: u8 = 45;

/// Rows of text; `None` for NULL.
pub type Rows = Vec<Vec<Option<String>>>;

enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    fn timeout(&self, limit: Duration) -> std::io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(Some(limit)),
            Self::Tcp(stream) => stream.set_read_timeout(Some(limit)),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buffer),
            Self::Tcp(stream) => stream.read(buffer),
        }
    }

    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Unix(stream) => stream.write_all(bytes),
            Self::Tcp(stream) => stream.write_all(bytes),
        }
    }
}

/// A connection to a server.
pub struct Connection {
    socket: Socket,
    server: String,
    version: String,
    received: Vec<u8>,
    sequence: u8,
}

impl Connection {
    /// Errors: [`Code::Refused`] when the server does not let us in.
    pub fn open(address: &Address, user: &str, password: Option<&[u8]>) -> Result<Self> {
        let server = address.display();
        let failed = |error| {
            Error::io(format!("cannot reach the server at {server}"), error)
                .hint("does it run, and listen there? see its socket and bind_address")
        };
        let socket = match &address.host {
            None => Socket::Unix(UnixStream::connect(&address.socket).map_err(failed)?),
            Some(host) => Socket::Tcp(connect(host, address.port).map_err(failed)?),
        };
        socket.timeout(LIMIT).map_err(failed)?;
        let mut this = Self { socket, server, version: String::new(), received: Vec::new(), sequence: 0 };
        this.shake_hands(user, password.unwrap_or_default())?;
        Ok(this)
    }

    /// Of the server, as it says it.
    pub fn version(&self) -> &str {
        &self.version
    }

    fn shake_hands(&mut self, user: &str, password: &[u8]) -> Result<()> {
        let hello = self.message()?.ok_or_else(|| self.broken("it says nothing"))?;
        if hello.first() == Some(&0xff) {
            return Err(self.refused(&hello));
        }
        let mut fields = Fields(&hello);
        if fields.number(1) != Some(10) {
            return Err(self.broken("it is no MariaDB server"));
        }
        let version = fields.text().ok_or_else(|| self.broken("its greeting ends early"))?;
        // Before the real one, for clients that take it for an old server.
        self.version = version.strip_prefix("5.5.5-").unwrap_or(&version).to_owned();
        let parts = (|| {
            fields.take(4)?;
            let first = fields.take(8)?;
            fields.take(1 + 2 + 1 + 2 + 2)?;
            let length = fields.number(1)? as usize;
            fields.take(10)?;
            let second = fields.take(length.saturating_sub(8).max(13))?;
            Some([first, second].concat())
        })();
        let challenge = parts.ok_or_else(|| self.broken("its greeting ends early"))?;
        let method = fields.text().unwrap_or_default();
        // A method that is not known may not be asked for in the end.
        let proof = answer(&method, &challenge, password).unwrap_or_default();
        let mut reply = ABILITIES.to_le_bytes().to_vec();
        reply.extend_from_slice(&(1_u32 << 30).to_le_bytes());
        reply.push(UTF8);
        reply.extend_from_slice(&[0; 23]);
        reply.extend_from_slice(user.as_bytes());
        reply.push(0);
        reply.push(proof.len() as u8);
        reply.extend_from_slice(&proof);
        reply.extend_from_slice(method.as_bytes());
        reply.push(0);
        self.send(&reply)?;
        loop {
            let message = self.message()?.ok_or_else(|| self.broken("it says nothing"))?;
            match message.first() {
                Some(0) => return Ok(()),
                Some(0xfe) => {
                    let mut fields = Fields(message.get(1..).unwrap_or_default());
                    let method = fields.text().unwrap_or_default();
                    let proof = answer(&method, fields.0, password)?;
                    self.send(&proof)?;
                }
                Some(0xff) => return Err(self.refused(&message)),
                _ => return Err(self.broken("it does not say whether we may come in")),
            }
        }
    }

    /// Asks, and waits for all rows.
    pub fn query(&mut self, sql: &str) -> Result<Rows> {
        self.command(3, sql.as_bytes())?;
        let head = self.wait()?;
        match head.first() {
            Some(0) => return Ok(Vec::new()),
            Some(0xff) => return Err(self.refused(&head)),
            _ => {}
        }
        let columns = Fields(&head).length().filter(|columns| *columns <= 4096);
        let columns = columns.ok_or_else(|| self.broken("its answer has impossibly many columns"))?;
        for _ in 0..=columns {
            self.wait()?;
        }
        let mut rows = Vec::new();
        loop {
            let message = self.wait()?;
            match message.first() {
                Some(0xff) => return Err(self.refused(&message)),
                Some(0xfe) if message.len() < 9 => return Ok(rows),
                _ => {}
            }
            let mut fields = Fields(&message);
            let row = (0..columns).map(|_| fields.value()).collect::<Option<Vec<_>>>();
            rows.push(row.ok_or_else(|| self.broken("a row ends early"))?);
        }
    }

    /// The one value that a query answers; empty for NULL.
    pub fn value(&mut self, sql: &str) -> Result<String> {
        let rows = self.query(sql)?;
        let value = rows.into_iter().next().and_then(|row| row.into_iter().next());
        value.map(Option::unwrap_or_default).ok_or_else(|| self.broken("an answer without a row"))
    }

    pub(super) fn command(&mut self, number: u8, rest: &[u8]) -> Result<()> {
        self.sequence = 0;
        self.send(&[&[number], rest].concat())
    }

    /// The answer to a command that has no rows.
    pub(super) fn done(&mut self) -> Result<()> {
        let answer = self.wait()?;
        if answer.first() == Some(&0xff) { Err(self.refused(&answer)) } else { Ok(()) }
    }

    pub(super) fn wait_at_most(&mut self, limit: Duration) -> Result<()> {
        self.socket.timeout(limit).map_err(|error| Error::io("cannot set a limit of time", error))
    }

    fn send(&mut self, message: &[u8]) -> Result<()> {
        if message.len() >= PACKET_BYTES_MAX {
            return Err(Error::bug("a message to a server that is too long"));
        }
        let mut packet = (message.len() as u32).to_le_bytes().to_vec();
        packet.truncate(3);
        packet.push(self.sequence);
        packet.extend_from_slice(message);
        self.sequence = self.sequence.wrapping_add(1);
        self.socket
            .write_all(&packet)
            .map_err(|error| Error::io(format!("the connection to {} is gone", self.server), error))
    }

    fn wait(&mut self) -> Result<Vec<u8>> {
        self.message()?.ok_or_else(|| self.broken("it says nothing for a minute"))
    }

    /// The next message. `None` when none came within the limit of time; what came of it is kept.
    pub(super) fn message(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            if let Some(message) = self.whole()? {
                return Ok(Some(message));
            }
            let mut buffer = [0; 64 << 10];
            match self.socket.read(&mut buffer) {
                Ok(0) => return Err(self.broken("it closed the connection")),
                Ok(length) => self.received.extend_from_slice(buffer.get(..length).unwrap_or_default()),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(Error::io(format!("the connection to {} is gone", self.server), error));
                }
            }
        }
    }

    /// Takes a message out of what was received, once all its packets are there.
    fn whole(&mut self) -> Result<Option<Vec<u8>>> {
        let (mut at, mut total) = (0, 0);
        loop {
            let Some(&[a, b, c, sequence]) = self.received.get(at..).and_then(|rest| rest.first_chunk::<4>())
            else {
                return Ok(None);
            };
            let length = u32::from_le_bytes([a, b, c, 0]) as usize;
            total += length;
            if total > MESSAGE_BYTES_MAX {
                return Err(self.broken("a message is too long"));
            }
            at += 4 + length;
            if self.received.len() < at {
                return Ok(None);
            }
            self.sequence = sequence.wrapping_add(1);
            if length < PACKET_BYTES_MAX {
                break;
            }
        }
        let mut message = Vec::with_capacity(total);
        let mut rest = self.received.get(..at).unwrap_or_default();
        while let Some((&[a, b, c, _], after)) = rest.split_first_chunk::<4>() {
            let (packet, more) =
                after.split_at_checked(u32::from_le_bytes([a, b, c, 0]) as usize).unwrap_or_default();
            message.extend_from_slice(packet);
            rest = more;
        }
        self.received.drain(..at);
        Ok(Some(message))
    }

    pub(super) fn broken(&self, why: &str) -> Error {
        Error::new(Code::Io, format!("the server at {} does not speak as expected: {why}", self.server))
    }

    /// What an error message says.
    pub(super) fn refused(&self, message: &[u8]) -> Error {
        let mut fields = Fields(message.get(1..).unwrap_or_default());
        let number = fields.number(2).unwrap_or(0);
        let text = String::from_utf8_lossy(fields.0);
        let text =
            text.strip_prefix('#').and_then(|text| text.get(5..)).unwrap_or(&text).escape_debug().to_string();
        let what = format!("the server at {} refuses: {text} ({number})", self.server);
        match number {
            1045 | 1698 => Error::new(Code::Refused, what).hint("see user and password: --password-file"),
            1130 => {
                Error::new(Code::Refused, what).hint("the account must be allowed to come from this machine")
            }
            1044 | 1142 | 1227 => Error::new(Code::Refused, what).hint(super::programs::GRANTS),
            1236 => Error::new(Code::NotFound, what),
            _ => Error::new(Code::Io, what),
        }
    }
}

fn connect(host: &str, port: u16) -> std::io::Result<TcpStream> {
    let mut last = std::io::Error::from(ErrorKind::AddrNotAvailable);
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, LIMIT) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// The parts of a message; `None` where it ends early.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (part, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(part)
    }

    /// Of up to eight bytes, little-endian.
    fn number(&mut self, bytes: usize) -> Option<u64> {
        let part = self.take(bytes)?;
        Some(part.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn text(&mut self) -> Option<String> {
        let length = self.0.iter().position(|byte| *byte == 0)?;
        let text = self.take(length)?;
        self.take(1)?;
        Some(String::from_utf8_lossy(text).into_owned())
    }

    fn length(&mut self) -> Option<u64> {
        match self.number(1)? {
            0xfc => self.number(2),
            0xfd => self.number(3),
            0xfe => self.number(8),
            0xfb | 0xff => None,
            short => Some(short),
        }
    }

    fn value(&mut self) -> Option<Option<String>> {
        if self.0.first() == Some(&0xfb) {
            self.take(1)?;
            return Some(None);
        }
        let length = usize::try_from(self.length()?).ok()?;
        Some(Some(String::from_utf8_lossy(self.take(length)?).into_owned()))
    }
}
