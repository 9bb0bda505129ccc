//! The logs of databases into their journals, for as long as it is asked for. A log whose journal has no point behind it
//! is of no use, so points are taken here when they are needed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Duration;

use mainstay_core::{Clock, Code, Error, Progress, Result, WorkloadRef};
use mainstay_repository::{PointInfo, Repository};
use mainstay_workloads::sqlite::{Database, Found, Place, WalLog, find};

use super::backup::{DatabasesBackup, backup_databases, workload};
use super::stream;
use crate::follow::{Closing, follow};

/// How often it is looked for new databases, and tried again with those that failed.
const AGAIN_EVERY: Duration = Duration::from_secs(5);
const WAIT: Duration = Duration::from_millis(100);
/// Each takes a thread.
const DATABASES_MAX: usize = 512;

/// Which databases are followed, and how.
#[derive(Clone, Debug)]
pub struct FollowDatabases {
    pub databases: DatabasesBackup,
    pub closing: Closing,
}

/// What happens while databases are followed.
#[derive(Clone, Debug)]
pub enum Told {
    /// The log of a database is followed from here on.
    Follows(String),
    /// A point was taken, because a log had none behind it.
    Point(Box<PointInfo>),
    /// A database is not followed, or no longer; it is tried again unless it has no log. Under the pattern that names them:
    /// they cannot be looked for, or no point can be taken; both are tried again.
    Failed(String, String),
}

/// Follows the logs of databases until the run is cancelled.
///
/// Errors: those of every database, when none could be followed from the start.
pub fn follow_databases(
    repository: &Repository,
    request: &FollowDatabases,
    clock: &Arc<dyn Clock>,
    progress: &Arc<dyn Progress>,
    told: &dyn Fn(Told),
) -> Result<()> {
    let workload = workload(repository, &request.databases)?;
    let (sender, started) = channel();
    let all = Followers {
        repository,
        request,
        workload,
        clock,
        progress,
        sender,
        started,
        places: BTreeMap::new(),
        hopeless: BTreeSet::new(),
        needs_point: false,
    };
    std::thread::scope(|scope| all.run(scope, told))
}

struct Started {
    name: String,
    place: Place,
    needs_point: bool,
}

struct Followers<'a> {
    repository: &'a Repository,
    request: &'a FollowDatabases,
    workload: WorkloadRef,
    clock: &'a Arc<dyn Clock>,
    progress: &'a Arc<dyn Progress>,
    sender: Sender<Started>,
    started: Receiver<Started>,
    places: BTreeMap<String, Place>,
    /// Those without a log.
    hopeless: BTreeSet<String>,
    needs_point: bool,
}

type Threads<'scope> = BTreeMap<String, ScopedJoinHandle<'scope, Result<()>>>;

impl<'a> Followers<'a> {
    fn run<'scope>(mut self, scope: &'scope Scope<'scope, 'a>, told: &dyn Fn(Told)) -> Result<()>
    where
        'a: 'scope,
    {
        let mut threads: Threads<'scope> = BTreeMap::new();
        let mut ever = false;
        loop {
            // While somebody follows it must not end here: the scope would wait for the others for ever.
            match self.start_missing(scope, &mut threads) {
                Err(error) if !ever && threads.is_empty() => return Err(error),
                Err(error) => told(self.failed(&error)),
                Ok(()) => {}
            }
            self.take_point(told);
            let looked = self.clock.monotonic();
            while self.clock.monotonic().saturating_sub(looked) < AGAIN_EVERY {
                if self.hear(told) {
                    ever = true;
                    self.take_point(told);
                }
                if let Some(error) = self.reap(&mut threads, told).filter(|_| !ever && threads.is_empty()) {
                    return Err(error);
                }
                if self.progress.cancelled() {
                    return ended(threads);
                }
                self.clock.sleep(WAIT);
            }
        }
    }

    fn start_missing<'scope>(
        &self,
        scope: &'scope Scope<'scope, 'a>,
        threads: &mut Threads<'scope>,
    ) -> Result<()>
    where
        'a: 'scope,
    {
        for found in find(&self.request.databases.pattern)? {
            let name = found.name.to_string();
            if threads.contains_key(&name) || self.hopeless.contains(&name) {
                continue;
            }
            if threads.len() >= DATABASES_MAX {
                return Err(Error::new(
                    Code::Unsupported,
                    format!("there are more than {DATABASES_MAX} databases"),
                )
                .hint("follow them in several runs, each with a pattern of its own"));
            }
            let follower = Follower {
                repository: self.repository,
                workload: self.workload.clone(),
                closing: self.request.closing,
                clock: self.clock,
                progress: self.progress,
                sender: self.sender.clone(),
            };
            let thread = std::thread::Builder::new().name("log".into());
            let thread = thread.spawn_scoped(scope, move || follower.run(&found));
            threads.insert(name, thread.map_err(|error| Error::io("cannot start a thread", error))?);
        }
        Ok(())
    }

    /// Hears of what was started. Whether anything was.
    fn hear(&mut self, told: &dyn Fn(Told)) -> bool {
        let mut any = false;
        while let Ok(Started { name, place, needs_point }) = self.started.try_recv() {
            any = true;
            self.needs_point |= needs_point;
            self.places.insert(name.clone(), place);
            told(Told::Follows(name));
        }
        any
    }

    /// Takes the point that a log needs, if one does; later, if it cannot be taken now.
    fn take_point(&mut self, told: &dyn Fn(Told)) {
        if !self.needs_point || self.progress.cancelled() {
            return;
        }
        let (request, places) = (&self.request.databases, &self.places);
        match backup_databases(self.repository, request, places, self.clock, self.progress) {
            Ok(made) => {
                self.needs_point = false;
                self.places.clear();
                told(Told::Point(Box::new(made)));
            }
            Err(_cancelled) if self.progress.cancelled() => {}
            Err(error) => told(self.failed(&error)),
        }
    }

    fn failed(&self, error: &Error) -> Told {
        Told::Failed(self.request.databases.pattern.display().to_string(), error.chain().join(": "))
    }

    /// Takes leave of those that ended. The error of the last one.
    fn reap(&mut self, threads: &mut Threads<'_>, told: &dyn Fn(Told)) -> Option<Error> {
        let done: Vec<String> =
            threads.iter().filter(|(_, thread)| thread.is_finished()).map(|(name, _)| name.clone()).collect();
        let mut last = None;
        for name in done {
            let Some(error) = threads.remove(&name).and_then(|thread| joined(thread).err()) else { continue };
            if error.code() == Code::Unsupported {
                self.hopeless.insert(name.clone());
            }
            told(Told::Failed(name, error.chain().join(": ")));
            last = Some(error);
        }
        last
    }
}

fn joined(thread: ScopedJoinHandle<'_, Result<()>>) -> Result<()> {
    thread.join().unwrap_or_else(|_panic| Err(Error::bug("a thread that follows a log panicked")))
}

fn ended(threads: Threads<'_>) -> Result<()> {
    let mut last = Ok(());
    for (_, thread) in threads {
        if let Err(error) = joined(thread) {
            last = Err(error);
        }
    }
    last
}

struct Follower<'a> {
    repository: &'a Repository,
    workload: WorkloadRef,
    closing: Closing,
    clock: &'a Arc<dyn Clock>,
    progress: &'a Arc<dyn Progress>,
    sender: Sender<Started>,
}

impl Follower<'_> {
    fn run(&self, found: &Found) -> Result<()> {
        let name = found.name.to_string();
        let mut journal = self.repository.append_journal(stream(&self.workload, &name))?;
        let known = journal.end().and_then(Place::from_position);
        let database = Database::open(&found.path)?;
        let (mut log, why) = WalLog::start(database, known, Arc::clone(self.clock))?;
        if let (Some(why), Some(_)) = (why, known) {
            journal.skip(why)?;
        }
        let started = Started { name, place: log.place(), needs_point: why.is_some() };
        // Whoever listened may have gone.
        let _heard = self.sender.send(started);
        follow(&mut log, &mut journal, self.closing, &**self.clock, self.progress.as_ref())
    }
}
