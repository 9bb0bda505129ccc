//! Taking a recovery point of a running cluster.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use mainstay_core::{
    Captured, Change, ChangeStream, Clock, Code, Error, Event, Next, Position, Progress, Receipt, Result,
    Source, StreamRef, WorkloadKind, WorkloadRef,
};
use mainstay_repository::{Compression, Parent, PointInfo, Repository, WriteRequest};
use mainstay_workloads::postgres::{BaseBackup, BaseRequest, Connection, KIND, Lsn, WalStream};

use super::follow::{FollowCluster, Followed, connect, run_on};
use super::lines::holds;
use super::stream;
use crate::backup::find;
use crate::copy::copy;
use crate::follow::{Closing, follow};
use crate::workload::derived_id;

/// Opens a connection: with `true` one that speaks the replication protocol, else an ordinary one.
pub type Dial<'a> = dyn Fn(bool) -> Result<Connection> + 'a;

/// The log that a backup needs is made durable so often.
const CLOSING: Closing = Closing { bytes: 4 << 20, after: Duration::from_millis(200) };
/// Somebody else who follows the log has so long to bring the journal to where the backup ends.
const OTHERS_LIMIT: Duration = Duration::from_secs(600);
const OTHERS_EVERY: Duration = Duration::from_millis(500);

/// How a cluster is backed up.
#[derive(Clone, Debug)]
pub struct ClusterBackup {
    /// The machine that does the work, for people.
    pub host: String,
    /// The workload's name.
    pub name: String,
    /// The server, for people.
    pub server: String,
    pub tags: Vec<String>,
    pub slot: Option<String>,
    /// Has the server write a checkpoint at once.
    pub fast: bool,
    /// Threads that compress and seal.
    pub jobs: usize,
}

/// What [`backup_cluster`] made.
#[derive(Clone, Debug)]
pub struct ClusterPoint {
    pub point: PointInfo,
    pub version: String,
    /// The log from here on belongs to the point, and up to there it cannot be recovered without.
    pub start: String,
    pub end: String,
    pub timeline: u32,
    /// What a person should know, in clauses.
    pub notes: Vec<String>,
}

/// The workload that a server's cluster is: the same for its primary and all its standbys.
pub fn workload(name: &str, dial: &Dial<'_>) -> Result<WorkloadRef> {
    Ok(workload_of(name, &WalStream::identify(&mut dial(true)?)?.system))
}

pub(super) fn workload_of(name: &str, system: &str) -> WorkloadRef {
    WorkloadRef {
        id: derived_id(&format!("{KIND} {system}"), name),
        kind: WorkloadKind(KIND.into()),
        name: name.to_owned(),
    }
}

/// Takes a recovery point of a running cluster: its files stream straight into the repository, and the log that makes them
/// consistent into the journal.
///
/// Errors: those of the server and the repository. In all of them no point was made.
pub fn backup_cluster(
    repository: &Repository,
    dial: &Dial<'_>,
    request: &ClusterBackup,
    clock: &Arc<dyn Clock>,
    progress: &Arc<dyn Progress>,
) -> Result<ClusterPoint> {
    repository.refresh()?;
    let mut connection = dial(true)?;
    let identity = WalStream::identify(&mut connection)?;
    let workload = workload_of(&request.name, &identity.system);
    let writer = repository.write(WriteRequest {
        workload: workload.clone(),
        host: request.host.clone(),
        roots: vec![request.server.clone()],
        tags: request.tags.clone(),
        reread_one_in: 0,
        any_order: true,
        parent: Parent::None,
        progress: Arc::clone(progress),
        compression: Compression::default(),
        jobs: request.jobs,
    })?;
    let follow = FollowCluster {
        workload: workload.clone(),
        slot: request.slot.clone(),
        max_lag: None,
        closing: CLOSING,
    };
    // The log first: what is written before it is followed could be gone by the time it is asked for.
    let log = Log::start(repository, dial, &follow, clock, progress.as_ref())?;
    let mut notes = Vec::new();
    let sql = dial(false).map_err(|error| notes.push(unsaid(&error))).ok();
    let base = BaseBackup::start(connection, sql, BaseRequest { fast: request.fast }, Arc::clone(clock))?;
    let cluster = base.cluster().clone();
    notes.extend(cluster.from_standby.then(|| "taken from a standby; the primary was not asked".to_owned()));
    let stream = stream(&workload, &cluster.system, cluster.start_timeline);
    let source = WithLog { base, log, repository, stream, clock: Arc::clone(clock), progress };
    progress.event(&Event::Phase(mainstay_core::Phase::Copying));
    let point = copy(Box::new(source), Box::new(writer), progress.as_ref())?;
    let point = find(repository, &point)?;
    let end = Lsn::from_position(&point.position).unwrap_or_default();
    Ok(ClusterPoint {
        point,
        version: cluster.version,
        start: cluster.start,
        end: end.to_string(),
        timeline: cluster.start_timeline,
        notes,
    })
}

fn unsaid(error: &Error) -> String {
    format!(
        "its settings are not recorded, because no ordinary connection is let in: {}",
        error.chain().join(": ")
    )
}

/// Follows the log on a thread of its own while the files are read.
struct Log {
    durable: Receiver<Position>,
    reached: Option<Position>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Log {
    fn start(
        repository: &Repository,
        dial: &Dial<'_>,
        request: &FollowCluster,
        clock: &Arc<dyn Clock>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let (sender, durable) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        // What is missing of timelines that have ended comes before.
        let newest = || -> Result<Followed> {
            loop {
                let mut followed = connect(repository, dial, request, clock)?;
                if followed.is_newest {
                    return Ok(followed);
                }
                if !run_on(&mut followed, request, clock, progress)? {
                    progress.check()?;
                }
            }
        };
        let thread = match newest() {
            Ok(followed) => {
                let (stop, clock) = (Arc::clone(&stop), Arc::clone(clock));
                let thread = std::thread::Builder::new().name("log".into());
                let run = move || run(followed, &sender, &stop, &*clock);
                Some(thread.spawn(run).map_err(|error| Error::io("cannot start a thread", error))?)
            }
            // Somebody else follows it: theirs is as good as ours.
            Err(error) if error.code() == Code::Conflict => None,
            Err(error) => return Err(error),
        };
        Ok(Self { durable, reached: None, stop, thread })
    }

    /// Waits until the log is durable up to `end`. `false` when somebody else sees to that.
    fn wait(&mut self, end: &Position, progress: &dyn Progress) -> Result<bool> {
        while self.reached.as_ref() < Some(end) {
            progress.check()?;
            match self.durable.recv_timeout(Duration::from_millis(100)) {
                Ok(reached) => self.reached = Some(reached),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.ended(),
            }
        }
        Ok(true)
    }

    fn ended(&mut self) -> Result<bool> {
        let Some(thread) = self.thread.take() else { return Ok(false) };
        match thread.join() {
            Ok(Err(error)) if error.code() == Code::Conflict => Ok(false),
            Ok(Err(error)) => Err(error.during("the log that belongs to the backup cannot be followed")),
            Ok(Ok(())) => Err(Error::bug("the log was no longer followed")),
            Err(_panic) => Err(Error::bug("the thread that follows the log panicked")),
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Nobody is left to hear of its error.
            let _ended = thread.join();
        }
    }
}

fn run(
    mut followed: Followed,
    sender: &Sender<Position>,
    stop: &AtomicBool,
    clock: &dyn Clock,
) -> Result<()> {
    let mut stream = Told { stream: &mut followed.stream, sender };
    follow(&mut stream, &mut followed.journal, CLOSING, clock, &Until(stop))
}

/// Says on what is durable.
struct Told<'a> {
    stream: &'a mut WalStream,
    sender: &'a Sender<Position>,
}

impl ChangeStream for Told<'_> {
    fn next(&mut self) -> Result<Option<Change>> {
        let next = self.stream.next()?;
        if next.is_none() && self.stream.switch().is_some() {
            return Err(promoted());
        }
        Ok(next)
    }

    fn acknowledge(&mut self, durable: &Position) -> Result<()> {
        // Whoever listened may have gone.
        let _heard = self.sender.send(durable.clone());
        self.stream.acknowledge(durable)
    }
}

fn promoted() -> Error {
    Error::new(Code::Refused, "the log went on upon another timeline while the backup was taken")
        .hint("a server was promoted meanwhile; run the backup again")
}

struct Until<'a>(&'a AtomicBool);

impl Progress for Until<'_> {
    fn event(&self, _: &Event<'_>) {}

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The files, and at their end the log up to where they are consistent: there is no point before both are durable.
struct WithLog<'a> {
    base: BaseBackup,
    log: Log,
    repository: &'a Repository,
    stream: StreamRef,
    clock: Arc<dyn Clock>,
    progress: &'a Arc<dyn Progress>,
}

impl WithLog<'_> {
    /// Waits for whoever else follows the log.
    fn wait_for_others(&self, end: &Position) -> Result<()> {
        let began = self.clock.monotonic();
        loop {
            let journal = self.repository.journal(&self.stream)?;
            let reached = journal.and_then(|journal| journal.stretches().pop()).map(|stretch| stretch.end);
            if reached.as_ref() >= Some(end) {
                return Ok(());
            }
            self.progress.check()?;
            if self.clock.monotonic().saturating_sub(began) > OTHERS_LIMIT {
                return Err(Error::new(
                    Code::Conflict,
                    "somebody else follows this log, and does not come to its end",
                )
                .hint("see whether `mainstay db follow` for it is running well"));
            }
            self.clock.sleep(OTHERS_EVERY);
        }
    }
}

impl WithLog<'_> {
    /// Nothing may be missing of what brings the files to a consistent state.
    fn check_whole(&self, end: &Position) -> Result<()> {
        let start = self.base.cluster().start.parse::<Lsn>();
        let start = start.map_err(|()| Error::bug("a backup that does not say where it starts"))?.position();
        let journal = self.repository.journal(&self.stream)?;
        let stretches = journal.map(|journal| journal.stretches()).unwrap_or_default();
        if stretches.iter().any(|stretch| holds(stretch, &start, end)) {
            return Ok(());
        }
        let what = "a part of the log that belongs to the backup is not in the journal";
        Err(Error::new(Code::Conflict, what).hint(
            "run the backup again; on a standby once it has made a restart point behind where the journal begins",
        ))
    }
}

impl Source for WithLog<'_> {
    fn next(&mut self) -> Result<Next> {
        self.base.next()
    }

    fn seal(&mut self) -> Result<Captured> {
        let captured = self.base.seal()?;
        let cluster = self.base.cluster();
        if cluster.end_timeline != cluster.start_timeline {
            return Err(promoted());
        }
        if !self.log.wait(&captured.position, self.progress.as_ref())? {
            self.wait_for_others(&captured.position)?;
        }
        self.check_whole(&captured.position)?;
        Ok(captured)
    }

    fn commit(self: Box<Self>, receipt: &Receipt) -> Result<()> {
        let this = *self;
        Box::new(this.base).commit(receipt)
    }
}
