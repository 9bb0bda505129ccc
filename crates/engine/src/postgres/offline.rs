//! Taking a recovery point of a cluster while its server is stopped, and starting it again whatever happens.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{
    Captured, Change, Clock, Code, Error, Event, Next, Phase, Progress, Receipt, Result, Source, StreamRef,
    Time, WorkloadRef,
};
use mainstay_repository::{Compression, Parent, Repository, WriteRequest};
use mainstay_workloads::postgres::{
    Cluster, History, Lsn, OfflineFiles, Programs, describe_offline, is_standby, read_log,
};
use mainstay_workloads::process::Program;
use mainstay_workloads::promise::{Promise, Promised};
use mainstay_workloads::vm::GuardProgram;

use super::backup::{ClusterPoint, workload_of};
use super::in_place::check_stopped;
use super::{history, stream};
use crate::backup::find;
use crate::copy::copy;

/// How a cluster is backed up while it does not run.
#[derive(Clone, Debug)]
pub struct OfflineBackup {
    /// The machine that does the work, for people.
    pub host: String,
    /// The workload's name.
    pub name: String,
    pub tags: Vec<String>,
    pub data: PathBuf,
    /// Lines for `/bin/sh` that stop the server in order and start it, and what each may take.
    pub stop: String,
    pub start: String,
    pub limit: Duration,
    /// After this long the server is started even if the backup is not done; that makes no point then.
    pub max_downtime: Option<Duration>,
    /// Where PostgreSQL's programs are; `None` looks for those of the right version, also in `path`.
    pub programs: Option<PathBuf>,
    pub path: Vec<PathBuf>,
    /// Threads that compress and seal.
    pub jobs: usize,
    /// Starts the server should this process be killed.
    pub guard: Option<GuardProgram>,
}

/// Stops a server, copies its files, and starts it again: before the point is written to its end, after every error, and when
/// this process is killed. How long it was away comes with the point.
///
/// Errors: [`Code::Refused`] when it did not end in order, when it is a standby, and when it was away for too long. In all of them no point was made.
pub fn backup_cluster_offline(
    repository: &Repository,
    request: &OfflineBackup,
    clock: &Arc<dyn Clock>,
    progress: &Arc<dyn Progress>,
) -> Result<(ClusterPoint, Duration)> {
    repository.refresh()?;
    if request.data.join("standby.signal").exists() {
        // Before it is stopped for nothing.
        return Err(is_standby(&request.data));
    }
    let programs = Programs::find(major(&request.data)?, request.programs.as_deref(), &request.path, None)?;
    let promised = Promised {
        line: request.start.clone(),
        try_seconds: request.limit.as_secs(),
        within_seconds: request.max_downtime.map(|limit| limit.as_secs()),
    };
    let mut down = Down {
        promise: Some(Promise::make(promised, "the database to be started again", request.guard.as_ref())?),
        since: clock.monotonic(),
        limit: request.max_downtime,
        took: Duration::ZERO,
    };
    progress.event(&Event::Note("the server is stopped"));
    Program::shell(&request.stop, request.limit).run_well()?;
    check_stopped(&request.data)?;
    let cluster = describe_offline(&request.data, &programs)?;
    let workload = workload_of(&request.name, &cluster.system);
    keep_log(repository, &workload, &request.data, &cluster, clock.now())?;
    let writer = repository.write(WriteRequest {
        workload,
        host: request.host.clone(),
        roots: vec![request.data.display().to_string()],
        tags: request.tags.clone(),
        reread_one_in: 0,
        any_order: true,
        compression: Compression::default(),
        parent: Parent::None,
        progress: Arc::clone(progress),
        jobs: request.jobs,
    })?;
    progress.event(&Event::Phase(Phase::Copying));
    let files = OfflineFiles::new(&request.data, cluster.clone(), &**clock)?;
    let source = Stopped { files, down: &mut down, data: &request.data, clock };
    let point = copy(Box::new(source), Box::new(writer), progress.as_ref())?;
    let point = find(repository, &point)?;
    let made = ClusterPoint {
        point,
        version: cluster.version,
        start: cluster.start,
        end: cluster.end,
        timeline: cluster.start_timeline,
        notes: Vec::new(),
    };
    Ok((made, down.took))
}

fn major(data: &Path) -> Result<u32> {
    let path = data.join("PG_VERSION");
    let text = std::fs::read_to_string(&path).map_err(|error| {
        Error::io(format!("cannot read {}", path.display()), error).hint("name the data directory")
    })?;
    text.trim()
        .parse()
        .map_err(|error| Error::integrity(format!("{} makes no sense", path.display())).because(error))
}

/// Puts into the journal what it lacks up to where the server ended, so that the point leads on to every moment after it.
fn keep_log(
    repository: &Repository,
    workload: &WorkloadRef,
    data: &Path,
    cluster: &Cluster,
    moment: Time,
) -> Result<()> {
    let place = |text: &str| text.parse::<Lsn>().map_err(|()| Error::bug("a place of ours is none"));
    let (start, end) = (place(&cluster.start)?.segment_start(cluster.segment_bytes), place(&cluster.end)?);
    let mut journal = repository.append_journal(stream_of(repository, workload, data, cluster)?)?;
    let read = |at: Lsn, buffer: &mut [u8]| {
        read_log(data, at, cluster.start_timeline, cluster.segment_bytes, buffer)
    };
    let mut at = match journal.end() {
        None => start,
        Some(known) => {
            let known =
                Lsn::from_position(known).ok_or_else(|| Error::integrity("a journal of another kind"))?;
            if known >= end {
                return Ok(());
            }
            match read(known, &mut [0]) {
                Ok(()) => known,
                Err(_) if known < start => {
                    journal.skip("the server had deleted that part of its log before it was read")?;
                    start
                }
                Err(error) => return Err(error),
            }
        }
    };
    while at < end {
        let segment_end = at.segment_start(cluster.segment_bytes).0 + cluster.segment_bytes;
        let next = Lsn(end.0.min(segment_end).min(at.0 + Change::BYTES_MAX as u64));
        let mut bytes = vec![0; usize::try_from(next.0 - at.0).unwrap_or(Change::BYTES_MAX)];
        read(at, &mut bytes)?;
        journal.append(&Change { start: at.position(), end: next.position(), time: Some(moment), bytes })?;
        at = next;
    }
    journal.close().map(drop)
}

/// The stream of the log that the server ended on. Where its timeline came from is in a file beside the log, and is stored.
fn stream_of(
    repository: &Repository,
    workload: &WorkloadRef,
    data: &Path,
    cluster: &Cluster,
) -> Result<StreamRef> {
    let (system, timeline) = (&cluster.system, cluster.start_timeline);
    let mut reference = stream(workload, system, timeline);
    if timeline > 1 {
        let path = data.join("pg_wal").join(History::file_name(timeline));
        let text = std::fs::read(&path).map_err(|error| {
            Error::io(format!("cannot read {}", path.display()), error)
                .hint("no recovery goes without it; back up online, or put it back from an archive")
        })?;
        let history = History::parse(timeline, text)?;
        history::store(repository, workload, system, &history)?;
        let last = history.before.last();
        reference.parent =
            last.map(|(parent, left)| (stream(workload, system, *parent).name, left.position()));
    }
    Ok(reference)
}

/// A server that is away.
struct Down {
    promise: Option<Promise>,
    since: Duration,
    limit: Option<Duration>,
    took: Duration,
}

impl Down {
    fn check(&self, clock: &dyn Clock) -> Result<()> {
        let away = clock.monotonic().saturating_sub(self.since);
        match self.limit.filter(|limit| away >= *limit) {
            None => Ok(()),
            Some(limit) => {
                let what = format!(
                    "the backup was not done within {} seconds, and the server starts again",
                    limit.as_secs()
                );
                Err(Error::new(Code::Refused, what).hint("allow more with --max-downtime, or back up online"))
            }
        }
    }
}

/// The files of a stopped server; at their end it is started.
struct Stopped<'a> {
    files: OfflineFiles,
    down: &'a mut Down,
    data: &'a Path,
    clock: &'a Arc<dyn Clock>,
}

impl Source for Stopped<'_> {
    fn next(&mut self) -> Result<Next> {
        self.down.check(&**self.clock)?;
        self.files.next()
    }

    fn seal(&mut self) -> Result<Captured> {
        self.down.check(&**self.clock)?;
        // Whoever started it meanwhile has changed what was copied.
        check_stopped(self.data)?;
        if let Some(promise) = self.down.promise.take() {
            promise.keep().map_err(|error| error.during("the server does not start again"))?;
        }
        self.down.took = self.clock.monotonic().saturating_sub(self.down.since);
        self.files.seal()
    }

    fn commit(self: Box<Self>, _receipt: &Receipt) -> Result<()> {
        Ok(())
    }
}
