//! What all these tests begin with.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mainstay_core::{Clock, Event, Progress, Result, Silent, WorkloadId};
use mainstay_engine::follow::Closing;
use mainstay_engine::postgres::{
    ClusterBackup, ClusterPoint, Dial, FollowCluster, Until, backup_cluster, follow_cluster, plan_cluster,
    restore_cluster, workload,
};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::{Options, Repository, Tuning};
use mainstay_testkit::lab::Postgres;
use mainstay_testkit::{MemoryStore, RealClock};
use mainstay_workloads::postgres::{Address, Connection};
use tempfile::TempDir;

pub(crate) fn repository() -> Repository {
    let options = Options { clock: clock(), state: None, tuning: Tuning::default() };
    Repository::create(Arc::new(MemoryStore::new()), KeyRing::create().unwrap(), &[], &options).unwrap()
}

pub(crate) fn dial(server: &Postgres) -> impl Fn(bool) -> Result<Connection> + use<> {
    let address: Address = server.address().parse().unwrap();
    move |replication| Connection::open(&address, "postgres", None, replication)
}

pub(crate) fn request() -> ClusterBackup {
    ClusterBackup {
        host: "here".into(),
        name: "shop".into(),
        server: "postgres:///".into(),
        tags: Vec::new(),
        slot: None,
        fast: true,
        jobs: 2,
    }
}

pub(crate) fn clock() -> Arc<dyn Clock> {
    Arc::new(RealClock)
}

pub(crate) fn progress() -> Arc<dyn Progress> {
    Arc::new(Silent)
}

pub(crate) fn back_up(repository: &Repository, server: &Postgres) -> ClusterPoint {
    back_up_by(repository, &dial(server))
}

pub(crate) fn back_up_by(repository: &Repository, dial: &Dial<'_>) -> ClusterPoint {
    backup_cluster(repository, dial, &request(), &clock(), &progress()).unwrap()
}

/// A directory that the server's user goes through.
pub(crate) fn directory() -> TempDir {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = tempfile::Builder::new().prefix("ms-pgr-").tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// Writes it out; nothing may be missing.
#[track_caller]
pub(crate) fn restore(repository: &Repository, workload: &WorkloadId, until: Until, to: &Path) {
    let plan = plan_cluster(repository, workload, until.clone());
    let plan = plan.map_err(|error| format!("{until:?}: {error:?}; {:?}", error.next_step())).unwrap();
    let restored = restore_cluster(repository, &plan, to, &progress()).unwrap();
    assert_eq!(restored.counts.skipped, 0, "{:?}", restored.skips);
}

struct Stop<'a>(&'a AtomicBool);

impl Progress for Stop<'_> {
    fn event(&self, _: &Event<'_>) {}

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// Follows while `act` runs; with what it ended.
pub(crate) fn following<T>(
    repository: &Repository,
    server: &Postgres,
    slot: Option<&str>,
    act: impl FnOnce() -> T,
) -> (Result<()>, T) {
    let dial = dial(server);
    let request = FollowCluster {
        workload: workload("shop", &dial).unwrap(),
        slot: slot.map(str::to_owned),
        max_lag: None,
        closing: Closing { after: Duration::from_millis(100), ..Closing::default() },
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let follower = scope.spawn(|| follow_cluster(repository, &dial, &request, &clock(), &Stop(&stop)));
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        stop.store(true, Ordering::Relaxed);
        let ended = follower.join().unwrap();
        (ended, outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Up to where the journal of a timeline is durable, as the server writes it.
pub(crate) fn reached(repository: &Repository, timeline: u32) -> Option<String> {
    let journals = repository.journals().unwrap();
    let journal = journals.iter().find(|j| {
        j.stream().name.ends_with(&format!(" timeline {timeline}")) && j.stream().name.starts_with("wal ")
    })?;
    let end = journal.stretches().pop()?.end;
    mainstay_workloads::postgres::Lsn::from_position(&end).map(|end| end.to_string())
}

/// Waits until everything that the server has flushed is durable here.
pub(crate) fn caught_up(repository: &Repository, server: &Postgres, timeline: u32) {
    let flushed = server.ask("postgres", "SELECT pg_current_wal_flush_lsn()").unwrap();
    let wanted: mainstay_workloads::postgres::Lsn = flushed.parse().unwrap();
    mainstay_testkit::lab::patiently("the journal", Duration::from_secs(60), || {
        let reached = reached(repository, timeline).and_then(|reached| reached.parse().ok());
        Ok((reached >= Some(wanted)).then_some(()))
    })
    .unwrap();
}
