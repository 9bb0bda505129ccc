//! Throwaway servers that show a cluster of a real server at a moment.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::path::Path;
use std::sync::Arc;

use mainstay_core::{Clock, Code, Progress, Result, Silent};
use mainstay_engine::postgres::{
    ClusterBackup, ClusterPoint, Fill, Instance, InstanceRequest, OfflineBackup, StandbyRequest, Until,
    backup_cluster, backup_cluster_offline, create_standby, plan_cluster, restore_cluster,
    restore_cluster_in_place,
};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::{Options, Repository, Tuning};
use mainstay_testkit::lab::{Postgres, PostgresPlan};
use mainstay_testkit::{MemoryStore, RealClock};
use mainstay_workloads::postgres::{Address, Connection, Lsn};

struct Scene {
    server: Postgres,
    repository: Repository,
    scratch: tempfile::TempDir,
}

impl Scene {
    fn new(settings: &[(&str, &str)]) -> Self {
        let options = Options { clock: Arc::new(RealClock), state: None, tuning: Tuning::default() };
        let ring = KeyRing::create().unwrap();
        let repository = Repository::create(Arc::new(MemoryStore::new()), ring, &[], &options).unwrap();
        let scratch = tempfile::Builder::new().prefix("ms-inst-").tempdir().unwrap();
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(scratch.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let server = Postgres::start(&PostgresPlan { settings, ..PostgresPlan::default() }).unwrap();
        Self { server, repository, scratch }
    }

    fn back_up(&self) -> ClusterPoint {
        self.back_up_from(&self.server)
    }

    fn back_up_from(&self, server: &Postgres) -> ClusterPoint {
        let request = ClusterBackup {
            host: "here".into(),
            name: "shop".into(),
            server: "postgres:///".into(),
            tags: Vec::new(),
            slot: None,
            fast: true,
            jobs: 2,
        };
        let address: Address = server.address().parse().unwrap();
        let dial = |replication| Connection::open(&address, "postgres", None, replication);
        backup_cluster(&self.repository, &dial, &request, &clock(), &progress()).unwrap()
    }

    fn instance(&self, point: &ClusterPoint, fill: Fill, until: Until) -> Result<Instance> {
        let plan = plan_cluster(&self.repository, &point.point.workload.id, until)?;
        Instance::start(&self.repository, &plan, &request(self.scratch.path(), fill), &clock(), &progress())
    }

    /// What a server answers on files that were restored.
    fn restored(&self, point: &ClusterPoint, until: Until, sql: &str) -> String {
        let plan = plan_cluster(&self.repository, &point.point.workload.id, until).unwrap();
        assert_eq!(plan.point.id, point.point.id);
        let place = tempfile::Builder::new().prefix("ms-back-").tempdir_in(self.scratch.path()).unwrap();
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(place.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let to = place.path().join("data");
        restore_cluster(&self.repository, &plan, &to, &progress()).unwrap();
        let server = Postgres::adopt(&to).unwrap();
        server.ask("postgres", sql).unwrap()
    }

    fn nothing_is_left(&self) {
        assert_eq!(std::fs::read_dir(self.scratch.path()).unwrap().count(), 0);
        let place = self.scratch.path().display().to_string();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let words = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
            assert!(!String::from_utf8_lossy(&words).contains(&place), "{:?}", entry.path());
        }
    }
}

fn request(scratch: &Path, fill: Fill) -> InstanceRequest {
    InstanceRequest {
        fill,
        scratch: scratch.to_owned(),
        programs: None,
        path: Vec::new(),
        user: None,
        role: "postgres".into(),
        preload: Vec::new(),
        guard: None,
        evidence: None,
    }
}

fn clock() -> Arc<dyn Clock> {
    Arc::new(RealClock)
}

fn progress() -> Arc<dyn Progress> {
    Arc::new(Silent)
}

fn count(instance: &Instance, table: &str) -> String {
    instance.connect("postgres").unwrap().value(&format!("SELECT count(*) FROM {table}")).unwrap()
}

#[test]
fn a_throwaway_server_stands_still_where_it_was_told_and_leaves_nothing() {
    let scene = Scene::new(&[("archive_mode", "on"), ("archive_command", "'false'")]);
    let space = scene.server.space("space").unwrap();
    let ask = |sql: &str| scene.server.ask("postgres", sql).unwrap();
    ask(&format!("CREATE TABLESPACE extra LOCATION '{}'", space.display()));
    ask("CREATE TABLE item (n int PRIMARY KEY, t text) TABLESPACE extra");
    ask("INSERT INTO item SELECT n, repeat('x', 100) FROM generate_series(1, 5000) n");
    // These would hang a copy, or have it look for others.
    ask("ALTER SYSTEM SET synchronous_standby_names = ''");
    ask("ALTER SYSTEM SET primary_conninfo = 'host=192.0.2.1'");
    scene.back_up();
    let place: Lsn = ask("SELECT pg_current_wal_insert_lsn()").parse().unwrap();
    // What psql is given at once is one transaction.
    let transaction: u64 = ask("DELETE FROM item WHERE n > 10; SELECT txid_current()").parse().unwrap();
    ask("SELECT pg_sleep(0.2)");
    let moment = ask("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint");
    let moment = mainstay_core::Time(moment.parse::<i64>().unwrap() * 1000);
    ask("SELECT pg_sleep(0.2)");
    ask("DELETE FROM item");
    let second = scene.back_up();

    for (until, items, is_end) in [
        (Until::Lsn(place), "5000", false),
        (Until::Transaction(transaction), "5000", false),
        (Until::Time(moment), "10", false),
        (Until::End, "0", true),
    ] {
        let instance = scene.instance(&second, Fill::Lazy, until.clone()).unwrap();
        assert!(instance.is_lazy());
        assert_eq!(count(&instance, "item"), items, "{until:?}");
        assert_eq!(instance.reached().end_of_log, is_end, "{until:?}");
        let error = instance.connect("postgres").unwrap().query("INSERT INTO item VALUES (0)").unwrap_err();
        assert!(error.chain().join(" ").contains("25006"), "{error:?}");
    }
    for fill in [Fill::Lazy, Fill::Full] {
        let mut instance = scene.instance(&second, fill, Until::Lsn(place)).unwrap();
        assert_eq!((count(&instance, "item").as_str(), instance.is_lazy()), ("5000", fill == Fill::Lazy));
        instance.promote().unwrap();
        let sql = "DELETE FROM item; VACUUM FULL item; INSERT INTO item VALUES (1); CHECKPOINT; DROP TABLE IF EXISTS y";
        for sql in sql.split("; ") {
            instance.connect("postgres").unwrap().query(sql).unwrap();
        }
        assert_eq!(count(&instance, "item"), "1");
        instance.check_content().unwrap();
        let cost = instance.cost();
        println!("{fill:?}: {:?}, {cost:?}", instance.reached().took);
        if fill == Fill::Lazy {
            assert!(cost.fetched < cost.whole && cost.read > 0 && cost.written > 0, "{cost:?}");
        }
    }
    let error = scene.instance(&second, Fill::Lazy, Until::Transaction(4_000_000)).err().unwrap();
    assert_eq!(error.code(), Code::NotFound, "{error:?}");
    scene.nothing_is_left();
}

#[test]
fn a_primary_whose_limits_were_raised_since_the_point_is_followed() {
    let kept = ("wal_keep_size", "64MB");
    let mut scene = Scene::new(&[("max_connections", "20"), ("max_wal_senders", "5"), kept]);
    let first = scene.back_up();
    scene.server.ask("postgres", "ALTER SYSTEM SET max_connections = 150").unwrap();
    scene.server.stop();
    scene.server.resume().unwrap();
    scene.server.ask("postgres", "CREATE TABLE item AS SELECT generate_series(1, 7) n").unwrap();
    let second = scene.back_up();
    assert_ne!(first.point.id, second.point.id);
    let plan = |point: &ClusterPoint| Until::Lsn(Lsn::from_position(&point.point.position).unwrap());
    // Between the two: from the files of the first, through the log of what came after.
    let between = Lsn(Lsn::from_position(&second.point.position).unwrap().0 - 1);
    let instance = scene.instance(&first, Fill::Lazy, Until::Lsn(between)).unwrap();
    assert_eq!(count(&instance, "item"), "7");
    assert!(instance.log().contains("insufficient parameter settings"), "{}", instance.log());
    drop(instance);
    drop(scene.instance(&second, Fill::Full, plan(&second)).unwrap());
    scene.nothing_is_left();
}

#[test]
fn a_standby_out_of_the_repository_catches_up_and_is_backed_up_itself() {
    let scene = Scene::new(&[]);
    let ask = |sql: &str| scene.server.ask("postgres", sql).unwrap();
    ask("CREATE TABLE item AS SELECT generate_series(1, 100) n");
    // Of a recovery that the primary itself came out of.
    ask("ALTER SYSTEM SET recovery_target = 'immediate'");
    ask("ALTER SYSTEM SET recovery_target_action = 'promote'");
    let first = scene.back_up();
    ask("INSERT INTO item VALUES (101)");
    let plan = plan_cluster(&scene.repository, &first.point.workload.id, Until::End).unwrap();
    let to = scene.scratch.path().join("standby");
    let primary = scene.server.address();
    let request = StandbyRequest { primary, slot: None, restore_command: None };
    create_standby(&scene.repository, &plan, &to, &request, &progress()).unwrap();
    let standby = Postgres::adopt_standby(&to).unwrap();
    ask("INSERT INTO item VALUES (102)");
    let caught_up = |count: &str| {
        let deadline = clock().monotonic() + std::time::Duration::from_secs(60);
        while standby.ask("postgres", "SELECT count(*) FROM item").unwrap() != count {
            assert!(clock().monotonic() < deadline, "it stays behind: {}", standby.log());
            clock().sleep(std::time::Duration::from_millis(50));
        }
    };
    caught_up("102");
    assert_eq!(
        ask("SELECT state FROM pg_stat_replication WHERE application_name = 'walreceiver'"),
        "streaming"
    );
    let lag = "SELECT pg_current_wal_lsn() - replay_lsn FROM pg_stat_replication WHERE application_name = 'walreceiver'";
    let deadline = clock().monotonic() + std::time::Duration::from_secs(60);
    while ask(lag) != "0" {
        assert!(clock().monotonic() < deadline, "it lags behind");
    }

    // The primary is not asked for anything.
    let before = ask("SELECT checkpoints_req FROM pg_stat_bgwriter");
    let point = scene.back_up_from(&standby);
    assert_eq!(ask("SELECT checkpoints_req FROM pg_stat_bgwriter"), before);
    assert_eq!(point.point.workload.id, first.point.workload.id);
    assert!(point.notes.iter().any(|note| note.contains("standby")), "{:?}", point.notes);
    let instance = scene.instance(&point, Fill::Lazy, Until::End).unwrap();
    assert_eq!(count(&instance, "item"), "102");
    assert!(
        plan_cluster(&scene.repository, &point.point.workload.id, Until::End).unwrap().cluster.from_standby
    );
}

#[test]
fn a_restore_in_place_moves_aside_what_was_there_and_refuses_a_running_server() {
    let mut scene = Scene::new(&[]);
    scene.server.ask("postgres", "CREATE TABLE item AS SELECT generate_series(1, 100) n").unwrap();
    let point = scene.back_up();
    scene.server.ask("postgres", "DELETE FROM item; CHECKPOINT").unwrap();
    let plan = plan_cluster(&scene.repository, &point.point.workload.id, Until::Consistent).unwrap();
    let data = scene.server.data().to_owned();
    let restore = || restore_cluster_in_place(&scene.repository, &plan, &data, &RealClock, &progress());
    assert_eq!(restore().unwrap_err().code(), Code::Refused);
    scene.server.stop();
    let aside = restore().unwrap().aside;
    scene.server.resume().unwrap();
    assert_eq!(scene.server.ask("postgres", "SELECT count(*) FROM item").unwrap(), "100");
    let former = Postgres::adopt(&aside).unwrap();
    assert_eq!(former.ask("postgres", "SELECT count(*) FROM item").unwrap(), "0");
    scene.server.kill();
    assert_eq!(restore().unwrap_err().code(), Code::Refused, "it did not end in order");
}

/// The lines that stop and start the server of a lab.
fn lines(server: &Postgres) -> (String, String) {
    let (data, place) = (server.data().display(), server.directory().display());
    let stop = format!(
        "kill -INT $(head -1 {data}/postmaster.pid); while [ -e {data}/postmaster.pid ]; do sleep 0.05; done"
    );
    let root = if rustix::process::geteuid().is_root() {
        "setpriv --reuid=postgres --regid=postgres --init-groups "
    } else {
        ""
    };
    let newest = "$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1)/pg_ctl";
    let options = format!("-o '-k {place} -c listen_addresses='");
    (stop, format!("{root}{newest} -D {data} {options} -l {place}/again.log -w start"))
}

fn offline(server: &Postgres) -> OfflineBackup {
    let (stop, start) = lines(server);
    OfflineBackup {
        host: "here".into(),
        name: "shop".into(),
        tags: Vec::new(),
        data: server.data().to_owned(),
        stop,
        start,
        limit: std::time::Duration::from_secs(60),
        max_downtime: None,
        programs: None,
        path: Vec::new(),
        jobs: 2,
        guard: None,
    }
}

#[test]
fn a_stopped_server_is_backed_up_and_started_again_whatever_happens() {
    let scene = Scene::new(&[]);
    let space = scene.server.space("space").unwrap();
    let ask = |sql: &str| scene.server.ask("postgres", sql).unwrap();
    // By a link, which is not what is to be kept.
    let linked = space.with_file_name("linked");
    std::os::unix::fs::symlink(&space, &linked).unwrap();
    ask(&format!("CREATE TABLESPACE extra LOCATION '{}'", linked.display()));
    ask("CREATE TABLE item TABLESPACE extra AS SELECT generate_series(1, 1000) n");
    let request = offline(&scene.server);
    let back_up =
        |request: &OfflineBackup| backup_cluster_offline(&scene.repository, request, &clock(), &progress());
    let (point, away) = back_up(&request).unwrap();
    assert!(!away.is_zero());
    for until in [Until::End, Until::Consistent] {
        assert_eq!(scene.restored(&point, until, "SELECT count(*) FROM item"), "1000");
    }
    assert_eq!(ask("SELECT count(*) FROM item"), "1000");
    // Not in time, and not stopped: no point, and the server runs.
    let late = OfflineBackup { max_downtime: Some(std::time::Duration::ZERO), ..request.clone() };
    assert_eq!(back_up(&late).unwrap_err().code(), Code::Refused);
    assert_eq!(ask("SELECT count(*) FROM item"), "1000");
    let runs_on = OfflineBackup { stop: "true".into(), ..request.clone() };
    assert_eq!(back_up(&runs_on).unwrap_err().code(), Code::Refused);
    assert_eq!(scene.repository.points().unwrap().len(), 1);

    // It leads on to what came after, by the log that others follow.
    ask("DELETE FROM item WHERE n > 10");
    let place: Lsn = ask("SELECT pg_current_wal_insert_lsn()").parse().unwrap();
    let online = scene.back_up();
    assert_eq!(online.point.workload.id, point.point.workload.id);
    for (until, items) in
        [(Until::Lsn(Lsn::from_position(&point.point.position).unwrap()), "1000"), (Until::Lsn(place), "10")]
    {
        for fill in [Fill::Lazy, Fill::Full] {
            let instance = scene.instance(&point, fill, until.clone()).unwrap();
            assert_eq!(count(&instance, "item"), items, "{until:?} {fill:?}");
        }
    }
    scene
        .server
        .run("pg_ctl", &["-D", &scene.server.data().display().to_string(), "-m", "immediate", "stop"])
        .unwrap();
}

#[test]
fn a_stopped_server_that_was_promoted_once_leads_on_from_its_old_timeline() {
    let mut scene = Scene::new(&[]);
    scene.server.ask("postgres", "CREATE TABLE item AS SELECT generate_series(1, 10) n").unwrap();
    let standby = scene.server.standby().unwrap();
    let back_up = |server| backup_cluster_offline(&scene.repository, &offline(server), &clock(), &progress());
    // It is not even stopped.
    let error = back_up(&standby).unwrap_err();
    assert!(error.code() == Code::Refused && error.what().contains("is a standby"), "{error:?}");
    standby.ask("postgres", "SELECT 1").unwrap();
    scene.back_up();
    // All that the primary wrote is in the journal, and comes to the standby.
    scene.server.stop();
    standby.promote().unwrap();
    standby.ask("postgres", "INSERT INTO item VALUES (11)").unwrap();
    let (point, _) = back_up(&standby).unwrap();
    let until = || Until::Lsn(Lsn::from_position(&point.point.position).unwrap());
    assert_eq!(
        (point.timeline, scene.restored(&point, Until::End, "SELECT sum(n) FROM item")),
        (2, "66".into())
    );
    standby.ask("postgres", "DELETE FROM item").unwrap();
    scene.back_up_from(&standby);
    let plan = plan_cluster(&scene.repository, &point.point.workload.id, until()).unwrap();
    let timelines: Vec<u32> = plan.legs.iter().map(|leg| leg.timeline).collect();
    assert_eq!((plan.point.id, timelines), (point.point.id, vec![2]));
    let journals = scene.repository.journals().unwrap();
    let parents: Vec<_> = journals.iter().filter_map(|journal| journal.stream().parent.clone()).collect();
    assert!(matches!(parents.as_slice(), [(name, _)] if name.ends_with("timeline 1")), "{parents:?}");
    let data = standby.data().display().to_string();
    standby.run("pg_ctl", &["-D", &data, "-m", "immediate", "stop"]).unwrap();
}
