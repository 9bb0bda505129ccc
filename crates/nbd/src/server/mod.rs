//! The server: offers blocks on a socket.
//!
//! | thread | how many | does |
//! |---|---|---|
//! | acceptor | 1 | lets connections in, up to [`ServerOptions::connections`]; at the end sees them all out |
//! | reader | 1 per connection | handshake; then takes requests in, as far as the connection's budget goes; answers reads of what is at hand while the writer has nothing to do |
//! | writer | 1 per connection | sends replies, and gives their share of the budget back |
//! | worker | [`ServerOptions::workers`] | reads and writes the blocks; never touches a socket |
//!
//! So a peer that does not read, does not write or floods holds up nobody but itself, and its memory is bounded: what
//! it has asked for and not fetched yet counts against its budget.

mod connection;
mod export;
mod handshake;
mod listen;
mod work;

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::Sender;
use mainstay_core::{Code, Error, Result};
use rustix::event::{EventfdFlags, eventfd};

pub use export::{Counters, Export, ReadObserver, Trace};

use crate::address::Address;
use crate::tls::ServerTls;
use connection::Job;
use listen::{Acceptor, Listener};

/// What a server allows. Its memory for requests is at most `connections` times `bytes_per_connection`.
#[derive(Clone)]
pub struct ServerOptions {
    /// TLS is insisted on when it is given.
    pub tls: Option<ServerTls>,
    /// Who may open the unix socket.
    pub socket_mode: u32,
    /// Connections beyond this are closed at once.
    pub connections: usize,
    pub workers: usize,
    pub requests_per_connection: usize,
    pub bytes_per_connection: usize,
    /// The most that one request may carry, in bytes.
    pub payload_max: u32,
    /// For everything before the first request.
    pub handshake_limit: Duration,
    /// For each wait in the middle of a request or a reply.
    pub stall_limit: Duration,
    /// For the next request; `None` waits for ever, as a machine that sleeps demands it.
    pub idle_limit: Option<Duration>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            tls: None,
            socket_mode: 0o600,
            connections: 16,
            workers: 8,
            requests_per_connection: 32,
            bytes_per_connection: 16 << 20,
            payload_max: 8 << 20,
            handshake_limit: Duration::from_secs(10),
            stall_limit: Duration::from_secs(30),
            idle_limit: None,
        }
    }
}

/// A server that runs until it is stopped or dropped.
pub struct Server {
    address: Address,
    exports: Arc<Vec<Export>>,
    running: Option<Running>,
}

struct Running {
    bell: Arc<OwnedFd>,
    acceptor: JoinHandle<bool>,
    workers: Vec<JoinHandle<()>>,
    jobs: Sender<Job>,
}

impl Server {
    /// Listens on `address`. A unix socket that a dead server has left behind is replaced.
    ///
    /// The first export is also the default one, which has no name, unless another is named so.
    pub fn start(address: &Address, exports: Vec<Export>, options: ServerOptions) -> Result<Self> {
        export::check_names(&exports)?;
        let listener = Listener::bind(address, options.socket_mode)?;
        let address = listener.address(address)?;
        let exports = Arc::new(exports);
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map(Arc::new)
            .map_err(|errno| Error::io("cannot make a bell", errno.into()))?;
        let (jobs, waiting) = crossbeam_channel::unbounded::<Job>();
        let mut workers = Vec::new();
        for number in 0..options.workers.max(1) {
            let waiting = waiting.clone();
            workers.push(spawn(format!("nbd-worker-{number}"), move || {
                waiting.iter().for_each(Job::run);
            })?);
        }
        let acceptor = Acceptor {
            listener,
            bell: Arc::clone(&bell),
            exports: Arc::clone(&exports),
            options: Arc::new(options),
            jobs: jobs.clone(),
        };
        let acceptor = spawn("nbd-acceptor".into(), move || acceptor.run())?;
        Ok(Self { address, exports, running: Some(Running { bell, acceptor, workers, jobs }) })
    }

    /// Where it listens; the port is the real one.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// What has been asked of an export so far; nothing when there is none of this name.
    pub fn counters(&self, export: &str) -> Option<Counters> {
        self.exports.iter().find(|candidate| candidate.name() == export).map(Export::counters)
    }

    /// Takes no more connections and no more requests, answers those that are here, and flushes what was written.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        let Some(Running { bell, acceptor, workers, jobs }) = self.running.take() else { return Ok(()) };
        rustix::io::write(&*bell, &1_u64.to_ne_bytes())
            .map_err(|errno| Error::io("cannot ring for the end", errno.into()))?;
        let mut fine = acceptor.join().unwrap_or(false);
        drop(jobs);
        for worker in workers {
            fine &= worker.join().is_ok();
        }
        for export in self.exports.iter() {
            export.flush()?;
        }
        if fine { Ok(()) } else { Err(Error::new(Code::Bug, "a thread of the NBD server panicked")) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _nobody_to_tell = self.end();
    }
}

fn spawn<T: Send + 'static>(name: String, run: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>> {
    thread::Builder::new().name(name).spawn(run).map_err(|error| Error::io("cannot start a thread", error))
}
