//! A connection to a server: the frontend/backend protocol 3.0, simple queries and copies, as the chapters "Frontend/Backend
//! Protocol" and "Streaming Replication Protocol" of PostgreSQL's documentation say.

use std::io::{self, Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use mainstay_core::{Code, Error, Result};
use postgres_protocol::authentication::sasl::{
    ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256,
};
use postgres_protocol::message::frontend;

use super::address::{Address, Place};
use super::tls::{self, Asked, Encrypted, TlsMode};

/// Nothing longer is believed: rows of catalogs and pieces of a copy are far shorter.
const MESSAGE_BYTES_MAX: usize = 64 << 20;
const READ_BYTES: usize = 256 << 10;
const CONNECT_LIMIT: Duration = Duration::from_secs(30);
/// How long a server may be silent when it owes an answer. A checkpoint may take long.
const ANSWER_LIMIT: Duration = Duration::from_secs(3600);
/// Rows of one answer.
const ROWS_MAX: usize = 1 << 20;

/// An answer: rows of columns, as text.
pub type Rows = Vec<Vec<Option<String>>>;

enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<Encrypted>),
}

impl Socket {
    fn wait_at_most(&self, limit: Duration) -> io::Result<()> {
        match self {
            Self::Unix(socket) => socket.set_read_timeout(Some(limit)),
            Self::Tcp(socket) => socket.set_read_timeout(Some(limit)),
            Self::Tls(socket) => socket.sock.set_read_timeout(Some(limit)),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Unix(socket) => socket.write_all(bytes),
            Self::Tcp(socket) => socket.write_all(bytes),
            Self::Tls(socket) => socket.write_all(bytes).and_then(|()| socket.flush()),
        }
    }

    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => socket.read(buffer),
            Self::Tcp(socket) => socket.read(buffer),
            Self::Tls(socket) => socket.read(buffer),
        }
    }
}

/// A connection to one server.
pub struct Connection {
    socket: Socket,
    buffer: BytesMut,
    scratch: Vec<u8>,
    /// For people.
    peer: String,
    /// What the server said of itself.
    version: String,
    /// The number of its process that serves us.
    process: u32,
}

/// What ends the answers to a query.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    Ready,
    /// Copied data follows.
    Copy,
}

/// One message of the server.
pub(super) struct Message {
    pub(super) tag: u8,
    pub(super) body: Bytes,
}

impl Connection {
    /// `replication` opens a connection that speaks the replication protocol, and can be asked for settings too.
    ///
    /// Errors: [`Code::NotFound`] when nobody listens, [`Code::WrongKey`] for a wrong or missing password, [`Code::Refused`]
    /// for whom the server does not let in.
    pub fn open(address: &Address, user: &str, password: Option<&[u8]>, replication: bool) -> Result<Self> {
        let peer = address.display();
        let socket = connect(address).map_err(|error| unreachable(&peer, error))?;
        let socket = match (socket, &address.place) {
            (Socket::Tcp(plain), Place::Host(host)) if address.tls.mode != TlsMode::Disable => {
                plain.set_read_timeout(Some(CONNECT_LIMIT)).map_err(|error| unreachable(&peer, error))?;
                match tls::ask(plain, host, &address.tls)? {
                    Asked::Encrypted(encrypted) => Socket::Tls(encrypted),
                    Asked::Plain(plain) => Socket::Tcp(plain),
                }
            }
            (socket, _) => socket,
        };
        let mut this = Self {
            socket,
            buffer: BytesMut::new(),
            scratch: vec![0; READ_BYTES],
            peer,
            version: String::new(),
            process: 0,
        };
        this.wait_at_most(CONNECT_LIMIT)?;
        let mut parameters =
            vec![("user", user), ("application_name", "mainstay"), ("client_encoding", "UTF8")];
        if replication {
            parameters.push(("replication", "true"));
        }
        parameters
            .extend(address.database.as_deref().filter(|_| !replication).map(|name| ("database", name)));
        let mut message = BytesMut::new();
        frontend::startup_message(parameters, &mut message).map_err(|error| this.broken(error))?;
        this.send(&message)?;
        this.log_in(user, password)?;
        this.wait_at_most(ANSWER_LIMIT)?;
        Ok(this)
    }

    /// Such as `15.4 (Debian 15.4-1)`.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The number of the server's process for this connection.
    pub(super) fn process(&self) -> u32 {
        self.process
    }

    /// Whether nobody on the way can listen.
    pub fn is_encrypted(&self) -> bool {
        matches!(self.socket, Socket::Tls(_))
    }

    /// For people: whom this speaks to.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    fn log_in(&mut self, user: &str, password: Option<&[u8]>) -> Result<()> {
        let mut scram = None;
        loop {
            let Message { tag, mut body } = self.message()?;
            match tag {
                b'R' if body.len() >= 4 => {
                    let kind = body.get_u32();
                    self.authenticate(kind, &body, (user, password), &mut scram)?;
                }
                b'S' => {
                    let text = texts(&body);
                    if let [name, value, ..] = text.as_slice()
                        && name == "server_version"
                    {
                        self.version.clone_from(value);
                    }
                }
                b'K' if body.len() >= 4 => self.process = body.get_u32(),
                b'E' => return Err(self.refused(&body)),
                b'Z' => return Ok(()),
                _ => {}
            }
        }
    }

    fn authenticate(
        &mut self,
        kind: u32,
        body: &[u8],
        (user, password): (&str, Option<&[u8]>),
        scram: &mut Option<ScramSha256>,
    ) -> Result<()> {
        let needed = || {
            Error::new(Code::WrongKey, format!("{} asks for the password of {user}", self.peer))
                .hint("give it with --password-file, or in ~/.pgpass")
        };
        let mut reply = BytesMut::new();
        let made = match (kind, scram.as_mut()) {
            (0, _) => return Ok(()),
            (5, _) => {
                let salt = body.get(..4).and_then(|salt| salt.try_into().ok());
                let salt = salt.ok_or_else(|| self.broken("a salt is missing"))?;
                let hash = postgres_protocol::authentication::md5_hash(
                    user.as_bytes(),
                    password.ok_or_else(needed)?,
                    salt,
                );
                frontend::password_message(hash.as_bytes(), &mut reply)
            }
            (10, _) => {
                let offered = texts(body).iter().any(|name| name == SCRAM_SHA_256_PLUS);
                let (name, binding) = match (&self.socket, offered) {
                    (Socket::Tls(stream), true) => match tls::binding(stream) {
                        Some(digest) => (SCRAM_SHA_256_PLUS, ChannelBinding::tls_server_end_point(digest)),
                        None => (SCRAM_SHA_256, ChannelBinding::unsupported()),
                    },
                    // A server that would have offered it notices that somebody between us took it away.
                    (Socket::Tls(_), false) => (SCRAM_SHA_256, ChannelBinding::unrequested()),
                    _ => (SCRAM_SHA_256, ChannelBinding::unsupported()),
                };
                let exchange = ScramSha256::new(password.ok_or_else(needed)?, binding);
                let made = frontend::sasl_initial_response(name, exchange.message(), &mut reply);
                *scram = Some(exchange);
                made
            }
            (11, Some(exchange)) => {
                exchange.update(body).map_err(|error| self.broken(error))?;
                frontend::sasl_response(exchange.message(), &mut reply)
            }
            // The server proves that it knows the password too.
            (12, Some(exchange)) => return exchange.finish(body).map_err(|error| self.broken(error)),
            (kind, _) => {
                let what =
                    format!("{} asks for a kind of authentication ({kind}) that is not known", self.peer);
                let hint = "let the role log in with scram-sha-256, or by peer on a socket, in pg_hba.conf";
                return Err(Error::new(Code::Unsupported, what).hint(hint));
            }
        };
        made.map_err(|error| self.broken(error))?;
        self.send(&reply)
    }

    /// How long the server may be silent from now on.
    pub(super) fn wait_at_most(&mut self, limit: Duration) -> Result<()> {
        self.socket.wait_at_most(limit).map_err(|error| self.broken(error))
    }

    pub(super) fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.socket.send(bytes).map_err(|error| self.broken(error))
    }

    /// The next message.
    pub(super) fn message(&mut self) -> Result<Message> {
        match self.try_message()? {
            Some(message) => Ok(message),
            None => Err(self.broken("it has been silent for too long")),
        }
    }

    /// The next message; `None` when it did not come in the time set by [`Connection::wait_at_most`].
    pub(super) fn try_message(&mut self) -> Result<Option<Message>> {
        loop {
            if let [tag, a, b, c, d, ..] = *self.buffer {
                let length = u32::from_be_bytes([a, b, c, d]) as usize;
                if !(4..=MESSAGE_BYTES_MAX).contains(&length) {
                    return Err(self.broken("it sent a message of an impossible length"));
                }
                if self.buffer.len() > length {
                    let mut body = self.buffer.split_to(length + 1).freeze();
                    body.advance(5);
                    return Ok(Some(Message { tag, body }));
                }
                self.buffer.reserve(length + 1 - self.buffer.len());
            }
            match self.socket.read(&mut self.scratch) {
                Ok(0) => return Err(self.broken("it closed the connection")),
                Ok(length) => {
                    self.buffer.extend_from_slice(self.scratch.get(..length).unwrap_or_default());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    return Ok(None);
                }
                Err(error) => return Err(self.broken(error)),
            }
        }
    }

    /// One result set of a query.
    pub fn query(&mut self, text: &str) -> Result<Rows> {
        let (sets, _) = self.ask(text)?;
        sets.into_iter().next_back().ok_or_else(|| self.broken("it answered nothing"))
    }

    /// The single value that a query answers with.
    pub fn value(&mut self, text: &str) -> Result<String> {
        let value = self.query(text)?.into_iter().next().and_then(|row| row.into_iter().next()).flatten();
        value.ok_or_else(|| self.broken("it answered no value"))
    }

    pub(super) fn ask(&mut self, text: &str) -> Result<(Vec<Rows>, Then)> {
        let mut message = BytesMut::new();
        frontend::query(text, &mut message).map_err(|error| self.broken(error))?;
        self.send(&message)?;
        self.answers()
    }

    /// Result sets until the server is ready again or begins to copy.
    pub(super) fn answers(&mut self) -> Result<(Vec<Rows>, Then)> {
        let (mut sets, mut rows, mut failed) = (Vec::new(), Rows::new(), None);
        loop {
            let Message { tag, body } = self.message()?;
            match tag {
                b'T' => rows.clear(),
                b'D' if rows.len() < ROWS_MAX => {
                    rows.push(row(&body).ok_or_else(|| self.broken("a row is cut short"))?);
                }
                b'D' => return Err(self.broken("it answered with too many rows")),
                b'C' => sets.push(std::mem::take(&mut rows)),
                b'E' => failed = failed.or_else(|| Some(self.refused(&body))),
                b'Z' => return failed.map_or(Ok((sets, Then::Ready)), Err),
                b'H' | b'W' => return failed.map_or(Ok((sets, Then::Copy)), Err),
                _ => {}
            }
        }
    }

    pub(super) fn broken(&self, cause: impl ToString) -> Error {
        Error::new(Code::Io, format!("the connection to {} failed", self.peer)).because(cause.to_string())
    }

    /// What the server says went wrong, with what to do about it.
    pub(super) fn refused(&self, body: &[u8]) -> Error {
        let refusal = Refusal::of(body);
        let (code, hint) = meaning(&refusal.state);
        let hint = hint.map(str::to_owned).or_else(|| refusal.hint.clone());
        let error = Error::new(code, format!("{} refused ({})", self.peer, refusal.state)).because(refusal);
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }
}

/// Why a server refused, in its own words: the fields of an `ErrorResponse`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refusal {
    /// Five letters and digits; appendix "PostgreSQL Error Codes".
    pub state: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
}

impl Refusal {
    pub(super) fn of(body: &[u8]) -> Self {
        let field = |wanted: u8| {
            let mut fields = body.split(|byte| *byte == 0);
            let found = fields.find(|field| field.first() == Some(&wanted));
            found.and_then(|field| field.get(1..)).map(|text| String::from_utf8_lossy(text).into_owned())
        };
        Self {
            state: field(b'C').unwrap_or_default(),
            message: field(b'M').unwrap_or_else(|| "it does not say why".into()),
            detail: field(b'D'),
            hint: field(b'H'),
        }
    }

    /// The refusal among the causes of an error.
    pub fn in_error(error: &Error) -> Option<&Self> {
        let mut cause = std::error::Error::source(error);
        while let Some(error) = cause {
            if let Some(refusal) = error.downcast_ref() {
                return Some(refusal);
            }
            cause = error.source();
        }
        None
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)?;
        self.detail.as_ref().map_or(Ok(()), |detail| write!(f, " ({detail})"))
    }
}

impl std::error::Error for Refusal {}

/// From appendix "PostgreSQL Error Codes".
fn meaning(state: &str) -> (Code, Option<&'static str>) {
    match state {
        "28P01" => (Code::WrongKey, Some("the password is wrong; see --password-file and ~/.pgpass")),
        "28000" => (
            Code::Refused,
            Some("let the role in with a line in pg_hba.conf: host replication ROLE ADDRESS scram-sha-256"),
        ),
        "42501" => (
            Code::Refused,
            Some("give the role the right to: ALTER ROLE ROLE REPLICATION; GRANT pg_monitor TO ROLE"),
        ),
        "55006" => (
            Code::Conflict,
            Some("somebody else uses that replication slot; stop them, or choose another --slot"),
        ),
        "58P01" => (Code::NotFound, None),
        "42704" => (Code::NotFound, None),
        "53300" => (
            Code::Conflict,
            Some(
                "raise max_wal_senders (wal_level = replica with it, if that is minimal) or max_connections, or wait \
                 until others have ended",
            ),
        ),
        "57P01" | "57P02" | "57P03" => (Code::Io, Some("the server is stopping or starting; try again")),
        _ => (Code::Refused, None),
    }
}

fn connect(address: &Address) -> io::Result<Socket> {
    match &address.place {
        Place::Socket(directory) => {
            UnixStream::connect(directory.join(format!(".s.PGSQL.{}", address.port))).map(Socket::Unix)
        }
        Place::Host(host) => {
            let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
            for address in (host.as_str(), address.port).to_socket_addrs()? {
                match TcpStream::connect_timeout(&address, CONNECT_LIMIT) {
                    Ok(socket) => {
                        socket.set_nodelay(true)?;
                        return Ok(Socket::Tcp(socket));
                    }
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
}

fn unreachable(peer: &str, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            Error::new(Code::NotFound, format!("no server listens at {peer}"))
                .because(error)
                .hint("is it running? see SHOW unix_socket_directories, listen_addresses and port")
        }
        _ => Error::io(format!("cannot connect to {peer}"), error),
    }
}

/// Texts that each end in NUL.
pub(super) fn texts(bytes: &[u8]) -> Vec<String> {
    bytes.split(|byte| *byte == 0).map(|text| String::from_utf8_lossy(text).into_owned()).collect()
}

fn row(mut body: &[u8]) -> Option<Vec<Option<String>>> {
    let count = body.try_get_u16().ok()?;
    let mut columns = Vec::new();
    for _ in 0..count {
        let length = body.try_get_i32().ok()?;
        let Ok(length) = usize::try_from(length) else {
            columns.push(None);
            continue;
        };
        let (value, rest) = body.split_at_checked(length)?;
        columns.push(Some(String::from_utf8_lossy(value).into_owned()));
        body = rest;
    }
    Some(columns)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{row, texts};

    proptest! {
        #[test]
        fn hostile_rows_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _either = row(&bytes);
            let _texts = texts(&bytes);
        }
    }

    #[test]
    fn rows_are_columns_of_text() {
        let body = [&[0, 3][..], &[0, 0, 0, 1, b'x'], &[255, 255, 255, 255], &[0, 0, 0, 0]].concat();
        assert_eq!(row(&body), Some(vec![Some("x".into()), None, Some(String::new())]));
        assert_eq!(row(&body[..5]), None);
    }
}
