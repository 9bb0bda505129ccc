//! One connection in its transmission phase: a thread that takes requests in, one that sends replies, and a budget
//! between them.

use std::io::{self, BufRead as _, BufReader, Read, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crossbeam_channel::{Receiver, Sender};
use mainstay_core::{Error, Result};

use super::export::count;
use super::handshake::{Chosen, Handshake};
use super::work::{STATUS_COST, Task};
use super::{Export, ServerOptions};
use crate::stream::{Socket, Stream};
use crate::wire::{REQUEST_LEN, Request, command};

/// Requests and small payloads come in by this much at once, in bytes.
const BUFFER_LEN: usize = 32 << 10;

/// Reads up to this length, in bytes, are answered by the reader itself where they are at hand: to go through two more
/// threads takes longer than that.
const QUICK_MAX: u32 = 256 << 10;

/// A request on its way through a worker.
pub(super) struct Job {
    task: Task,
    replies: Sender<Reply>,
    permit: Permit,
}

struct Reply {
    bytes: Vec<u8>,
    /// Given back when the bytes have left.
    _permit: Permit,
}

impl Job {
    /// Never panics, whatever the blocks do: a worker that is lost would be missed by everybody.
    pub(super) fn run(self) {
        let Self { task, replies, permit } = self;
        if permit.budget.used().over {
            return;
        }
        let bytes = answer(&task);
        let _nobody_waits = replies.send(Reply { bytes, _permit: permit });
    }

    /// Answers here and now what needs no wait. `None` when that is done, or the connection is lost by it.
    fn unless_quick(self, outlet: &Mutex<Stream>) -> Option<Self> {
        if !self.task.is_at_hand(QUICK_MAX) {
            return Some(self);
        }
        // Behind a reply that goes out slowly, this one can wait for its turn without holding up the requests.
        let Ok(mut stream) = outlet.try_lock() else { return Some(self) };
        if stream.write_all(&answer(&self.task)).is_err() {
            stream.close();
            self.permit.budget.end();
        }
        None
    }
}

/// The reply, whatever the blocks do.
fn answer(task: &Task) -> Vec<u8> {
    catch_unwind(AssertUnwindSafe(|| task.answer())).unwrap_or_else(|_| task.failed())
}

/// Talks to one client until either has enough.
pub(super) fn serve(socket: Socket, exports: &Arc<Vec<Export>>, options: &ServerOptions, jobs: &Sender<Job>) {
    let Ok(mut stream) = Stream::new(socket) else { return };
    if stream.all_within(options.handshake_limit).is_ok()
        && let Ok(Some(chosen)) = Handshake::new(&mut stream, exports, options).run()
        && let Ok(writing) = stream.second()
    {
        transmit(&mut stream, writing, &chosen, exports, options, jobs);
    }
    stream.close();
}

fn transmit(
    reading: &mut Stream,
    mut writing: Stream,
    chosen: &Chosen,
    exports: &Arc<Vec<Export>>,
    options: &ServerOptions,
    jobs: &Sender<Job>,
) {
    count(&exports[chosen.index].tally.connections, 1);
    let (replies, waiting) = crossbeam_channel::unbounded();
    let budget = Arc::new(Budget::new(options));
    writing.each_within(options.stall_limit);
    let outlet = Mutex::new(writing);
    thread::scope(|scope| {
        let writer = thread::Builder::new().name("nbd-writer".into());
        if writer.spawn_scoped(scope, || write_replies(&outlet, waiting, &budget)).is_err() {
            return;
        }
        let mut reader = Reader { stream: BufReader::with_capacity(BUFFER_LEN, reading), options };
        // However it ends, the replies to what came before still go out.
        while let Ok(Some((request, payload, permit))) = reader.next(&budget) {
            let task = Task {
                exports: Arc::clone(exports),
                index: chosen.index,
                structured: chosen.structured,
                allocation: chosen.allocation,
                payload_max: options.payload_max,
                request,
                payload,
            };
            let job = Job { task, replies: replies.clone(), permit };
            if job.unless_quick(&outlet).is_some_and(|job| jobs.send(job).is_err()) {
                break;
            }
        }
        drop(replies);
    });
}

/// When one cannot be sent, nothing that was asked for matters any longer.
fn write_replies(outlet: &Mutex<Stream>, replies: Receiver<Reply>, budget: &Budget) {
    for reply in &replies {
        let mut stream = outlet.lock().unwrap_or_else(PoisonError::into_inner);
        if stream.write_all(&reply.bytes).is_err() {
            stream.close();
            // In this order: the replies that are left give back their shares, and then nobody gets another.
            drop((stream, replies));
            budget.end();
            return;
        }
    }
}

struct Reader<'a> {
    stream: BufReader<&'a mut Stream>,
    options: &'a ServerOptions,
}

impl Reader<'_> {
    /// The next request with its payload; `None` when the client says goodbye or has gone.
    fn next(&mut self, budget: &Arc<Budget>) -> Result<Option<(Request, Vec<u8>, Permit)>> {
        match self.options.idle_limit {
            Some(limit) => self.stream.get_mut().each_within(limit),
            None => self.stream.get_mut().wait_for_ever(),
        }
        if self.stream.fill_buf().map_err(lost)?.is_empty() {
            return Ok(None);
        }
        self.stream.get_mut().each_within(self.options.stall_limit);
        let mut head = [0; REQUEST_LEN];
        self.stream.read_exact(&mut head).map_err(lost)?;
        let request = Request::decode(&head)?;
        let payload_len = match request.command {
            command::DISCONNECT => return Ok(None),
            command::WRITE => request.length,
            _ => 0,
        };
        if payload_len > self.options.payload_max {
            // Read past, so that the client can be told.
            let mut dropped = self.stream.by_ref().take(payload_len.into());
            io::copy(&mut dropped, &mut io::sink()).map_err(lost)?;
            return Ok(Budget::take(budget, 0).map(|permit| (request, Vec::new(), permit)));
        }
        let cost = match request.command {
            command::READ => request.length.min(self.options.payload_max) as usize,
            command::BLOCK_STATUS => STATUS_COST,
            _ => payload_len as usize,
        };
        let Some(permit) = Budget::take(budget, cost) else { return Ok(None) };
        let mut payload = vec![0; payload_len as usize];
        self.stream.read_exact(&mut payload).map_err(lost)?;
        Ok(Some((request, payload, permit)))
    }
}

fn lost(error: io::Error) -> Error {
    Error::io("a client left", error)
}

/// How much a connection may have asked for without having fetched it.
struct Budget {
    used: Mutex<Used>,
    freed: Condvar,
    requests_max: usize,
    bytes_max: usize,
}

#[derive(Default)]
struct Used {
    requests: usize,
    bytes: usize,
    /// The client will fetch nothing more.
    over: bool,
}

/// A share of the budget, given back when it is dropped.
struct Permit {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Budget {
    fn new(options: &ServerOptions) -> Self {
        Self {
            used: Mutex::default(),
            freed: Condvar::new(),
            requests_max: options.requests_per_connection.max(1),
            // One request of the largest size always fits.
            bytes_max: options.bytes_per_connection.max(options.payload_max as usize).max(STATUS_COST),
        }
    }

    /// Waits until there is room. Workers and the writer make room, each within its own limits. `None` when it is over.
    fn take(budget: &Arc<Self>, bytes: usize) -> Option<Permit> {
        let fits =
            |used: &Used| used.requests < budget.requests_max && used.bytes + bytes <= budget.bytes_max;
        let full = |used: &mut Used| !used.over && !fits(used);
        let waited = budget.freed.wait_while(budget.used(), full);
        let mut used = waited.unwrap_or_else(PoisonError::into_inner);
        if used.over {
            return None;
        }
        used.requests += 1;
        used.bytes += bytes;
        Some(Permit { budget: Arc::clone(budget), bytes })
    }

    fn end(&self) {
        self.used().over = true;
        self.freed.notify_all();
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut used = self.budget.used();
        used.requests -= 1;
        used.bytes -= self.bytes;
        self.budget.freed.notify_one();
    }
}
