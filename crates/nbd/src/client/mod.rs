//! The client: asks a server what it has, and reads and writes an export as blocks.

mod extents;
mod handshake;
mod read;
mod remote;
mod session;

use std::time::Duration;

use mainstay_core::{Code, Error, Result};

pub use remote::Remote;

use crate::address::Address;
use crate::stream::Stream;
use crate::tls::ClientTls;
use crate::wire::{ALLOCATION, flag};
use handshake::Handshake;
use session::Session;

/// How long one call may take when nobody says otherwise.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a connection beyond the first is waited for. It only makes things faster.
const EXTRA_LIMIT: Duration = Duration::from_secs(2);
const CONNECTIONS: usize = 4;

/// A server's export, not connected yet.
#[derive(Clone)]
pub struct Client {
    address: Address,
    export: String,
    tls: Option<ClientTls>,
    limit: Duration,
    connections: usize,
}

/// One line of a server's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    pub name: String,
    /// For people; most servers say nothing.
    pub text: String,
}

/// What a server tells about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// In bytes.
    pub size: u64,
    pub read_only: bool,
    /// Several connections may be used at once and see each other's flushes.
    pub multi_connection: bool,
    /// What every request must be aligned to, in bytes; a power of two.
    pub block_size: u32,
    /// The most that one request may carry, in bytes.
    pub payload_max: u32,
    pub text: String,
    /// The metadata contexts that can be asked for, such as `base:allocation` and `qemu:dirty-bitmap:NAME`.
    pub contexts: Vec<String>,
    pub(crate) flags: u16,
}

impl ExportInfo {
    pub(crate) fn can(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

impl Client {
    /// The empty `export` is the server's default one.
    pub fn new(address: Address, export: impl Into<String>) -> Self {
        Self { address, export: export.into(), tls: None, limit: LIMIT, connections: CONNECTIONS }
    }

    /// Talks TLS, or not at all: a server that cannot is refused.
    #[must_use]
    pub fn tls(mut self, tls: ClientTls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// How long connecting and each call afterwards may take; 60 seconds when not said. A call that takes longer
    /// fails, and the connection with it.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// How many connections to use where the server allows it; 4 when not said.
    #[must_use]
    pub fn connections(mut self, connections: usize) -> Self {
        self.connections = connections.max(1);
        self
    }

    /// The exports that the server lists. It need not list all that it has.
    pub fn list(&self) -> Result<Vec<Description>> {
        let mut handshake = self.greet(self.limit)?;
        let listed = handshake.list().map_err(|error| error.during(self.trouble()))?;
        handshake.abort();
        Ok(listed)
    }

    /// Errors: [`Code::NotFound`] when there is no such export.
    pub fn info(&self) -> Result<ExportInfo> {
        let mut handshake = self.greet(self.limit)?;
        let info = handshake.describe(&self.export).map_err(|error| error.during(self.trouble()))?;
        handshake.abort();
        Ok(info)
    }

    /// Connects. With `dirty`, the full name of a context such as `qemu:dirty-bitmap:NAME`, extents say what has
    /// changed; without, they do not know.
    ///
    /// A connection that breaks stays broken, and so does what this returns: whether the export behind a new one is
    /// still the same cannot be known here.
    ///
    /// Errors: [`Code::NotFound`] when there is no such export or no such context.
    pub fn blocks(&self, dirty: Option<&str>) -> Result<Remote> {
        let first = self.session(self.limit, dirty, true)?;
        if let Some(name) = dirty
            && first.dirty.is_none()
        {
            let what = format!("{self} has no context {}", name.escape_debug());
            return Err(Error::new(Code::NotFound, what)
                .hint("without it every block has to be read; a bitmap must be exported to be seen"));
        }
        let mut sessions = vec![first];
        while sessions.len() < self.connections && sessions[0].info.multi_connection {
            match self.session(self.limit.min(EXTRA_LIMIT), dirty, true) {
                Ok(session) if session.info == sessions[0].info => sessions.push(session),
                // The server may allow fewer; the first connection is enough.
                _ => break,
            }
        }
        Ok(Remote::new(self.clone(), sessions, dirty))
    }

    /// A connection in its transmission phase, with the contexts `dirty` and, if asked for, `base:allocation`.
    fn session(&self, limit: Duration, dirty: Option<&str>, allocation: bool) -> Result<Session> {
        let handshake = self.greet(limit)?;
        let contexts: Vec<&str> = allocation.then_some(ALLOCATION).into_iter().chain(dirty).collect();
        handshake.go(&self.export, &contexts).map_err(|error| error.during(self.trouble()))
    }

    fn greet(&self, limit: Duration) -> Result<Handshake> {
        let attempt = || -> Result<Handshake> {
            let mut stream =
                Stream::connect(&self.address, limit).map_err(|error| Error::io("no connection", error))?;
            stream.all_within(limit).map_err(|error| Error::io("no timer", error))?;
            let mut handshake = Handshake::greet(stream)?;
            if let Some(tls) = &self.tls {
                handshake.start_tls(tls.connection_to(&self.address)?)?;
            }
            Ok(handshake)
        };
        attempt().map_err(|error| error.during(self.trouble()))
    }

    fn trouble(&self) -> String {
        format!("cannot use {self}")
    }
}

impl std::fmt::Display for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.export.as_str() {
            "" => write!(f, "the default export of {}", self.address),
            export => write!(f, "export {} of {}", export.escape_debug(), self.address),
        }
    }
}

/// How the transmission flags and sizes of an export become an [`ExportInfo`].
pub(crate) fn export_info(size: u64, flags: u16) -> ExportInfo {
    ExportInfo {
        size,
        read_only: flags & flag::READ_ONLY != 0,
        multi_connection: flags & flag::MULTI_CONN != 0,
        // The protocol's defaults for servers that do not say.
        block_size: 1,
        payload_max: 32 << 20,
        text: String::new(),
        contexts: Vec::new(),
        flags,
    }
}
