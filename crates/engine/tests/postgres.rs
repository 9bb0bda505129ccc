//! Clusters of a real server: backed up while it writes, brought back to any moment.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::sync::Arc;

use mainstay_core::{Clock, Code, Progress, Result, Silent};
use mainstay_engine::postgres::{ClusterBackup, Until, backup_cluster, plan_cluster, restore_cluster};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::{Options, Repository, Tuning};
use mainstay_testkit::lab::{Postgres, PostgresPlan};
use mainstay_testkit::{MemoryStore, RealClock};
use mainstay_workloads::postgres::{Address, Connection, Lsn};

fn repository() -> Repository {
    let options = Options { clock: Arc::new(RealClock), state: None, tuning: Tuning::default() };
    Repository::create(Arc::new(MemoryStore::new()), KeyRing::create().unwrap(), &[], &options).unwrap()
}

fn dial(server: &Postgres) -> impl Fn(bool) -> Result<Connection> {
    let address: Address = server.address().parse().unwrap();
    move |replication| Connection::open(&address, "postgres", None, replication)
}

fn request() -> ClusterBackup {
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

fn clock() -> Arc<dyn Clock> {
    Arc::new(RealClock)
}

fn progress() -> Arc<dyn Progress> {
    Arc::new(Silent)
}

#[test]
fn a_running_cluster_comes_back_as_it_was_at_chosen_places() {
    let mut server = Postgres::start(&PostgresPlan::default()).unwrap();
    let space = server.space("space").unwrap();
    server.ask("postgres", &format!("CREATE TABLESPACE extra LOCATION '{}'", space.display())).unwrap();
    server
        .ask(
            "postgres",
            "CREATE TABLE item (n int PRIMARY KEY, t text) TABLESPACE extra; CREATE TABLE mark (n int)",
        )
        .unwrap();
    server
        .ask("postgres", "INSERT INTO item SELECT n, repeat('x', 100) FROM generate_series(1, 20000) n")
        .unwrap();
    let repository = repository();
    let made = backup_cluster(&repository, &dial(&server), &request(), &clock(), &progress()).unwrap();
    assert_eq!(made.point.counts.skipped, 0);

    // What comes after is in the log of the second point.
    server.ask("postgres", "DELETE FROM item WHERE n > 10; INSERT INTO mark VALUES (1)").unwrap();
    let place: Lsn = server.ask("postgres", "SELECT pg_current_wal_insert_lsn()").unwrap().parse().unwrap();
    server.ask("postgres", "INSERT INTO mark VALUES (2)").unwrap();
    backup_cluster(&repository, &dial(&server), &request(), &clock(), &progress()).unwrap();
    server.stop();

    let directory = tempfile::Builder::new().prefix("ms-pgr-").tempdir().unwrap();
    open_up(directory.path());
    for (number, (until, items, marks)) in [
        (Until::Lsn(Lsn::from_position(&made.point.position).unwrap()), "20000", "0"),
        (Until::Lsn(place), "10", "1"),
        (Until::End, "10", "2"),
    ]
    .into_iter()
    .enumerate()
    {
        let to = directory.path().join(number.to_string());
        let plan = plan_cluster(&repository, &made.point.workload.id, until.clone()).unwrap();
        let restored = restore_cluster(&repository, &plan, &to, &progress()).unwrap();
        assert_eq!(restored.counts.skipped, 0);
        let copy = Postgres::adopt(&to).unwrap();
        assert_eq!(copy.ask("postgres", "SELECT count(*) FROM item").unwrap(), items, "{until:?}");
        assert_eq!(copy.ask("postgres", "SELECT count(*) FROM mark").unwrap(), marks, "{until:?}");
        copy.client("pg_amcheck", &["--all", "--install-missing", "--heapallindexed"]).unwrap();
    }
}

#[test]
fn a_log_that_the_server_no_longer_has_is_a_hole_with_a_reason_and_the_next_backup_is_whole() {
    let settings = [("min_wal_size", "2MB"), ("max_wal_size", "2MB")];
    let server =
        Postgres::start(&PostgresPlan { segment: 1, settings: &settings, ..PostgresPlan::default() })
            .unwrap();
    let repository = repository();
    let back_up = || backup_cluster(&repository, &dial(&server), &request(), &clock(), &progress()).unwrap();
    let first = back_up();
    server
        .ask("postgres", "CREATE TABLE item AS SELECT n, repeat('x', 500) FROM generate_series(1, 20000) n")
        .unwrap();
    for _ in 0..3 {
        server.ask("postgres", "CHECKPOINT").unwrap();
        server.ask("postgres", "SELECT pg_switch_wal()").unwrap();
    }
    let second = back_up();
    let journals = repository.journals().unwrap();
    let holes = journals[0].holes();
    assert_eq!(holes.len(), 1, "{holes:?}");
    assert!(holes[0].why.contains("deleted"), "{holes:?}");
    let workload = &first.point.workload.id;
    let plan = |until| plan_cluster(&repository, workload, until);
    assert_eq!(plan(Until::End).unwrap().point.id, second.point.id);
    let within = Lsn(Lsn::from_position(&holes[0].start).unwrap().0 + 1);
    assert_eq!(plan(Until::Lsn(within)).err().map(|error| error.code()), Some(Code::NotFound));
    let directory = tempfile::Builder::new().prefix("ms-pgr-").tempdir().unwrap();
    open_up(directory.path());
    let to = directory.path().join("again");
    restore_cluster(&repository, &plan(Until::End).unwrap(), &to, &progress()).unwrap();
    let copy = Postgres::adopt(&to).unwrap();
    assert_eq!(copy.ask("postgres", "SELECT count(*) FROM item").unwrap(), "20000");
}

/// The server's user goes through it.
fn open_up(directory: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755)).unwrap();
}
