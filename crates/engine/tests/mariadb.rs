//! A real MariaDB server: backed up while it is written to, its binary log followed, brought back to any moment.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_core::{Clock, Code, Event, Progress, Result, Silent, Time};
use mainstay_engine::follow::Closing;
use mainstay_engine::mariadb::{
    FollowServer, ServerBackup, Until, backup_server, follow_server, plan_server, restore_server, spans,
    workload, write_logs,
};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::{Options, Repository, Tuning};
use mainstay_testkit::lab::{MariaDb, PATIENCE, patiently};
use mainstay_testkit::{MemoryStore, RealClock, Rng};
use mainstay_workloads::mariadb::{Gtid, Login, Place};

const LOG: &[&str] = &["--log-bin=bin", "--server-id=7", "--gtid-domain-id=3"];

fn repository() -> Repository {
    let options = Options { clock: Arc::new(RealClock), state: None, tuning: Tuning::default() };
    Repository::create(Arc::new(MemoryStore::new()), KeyRing::create().unwrap(), &[], &options).unwrap()
}

fn clock() -> Arc<dyn Clock> {
    Arc::new(RealClock)
}

fn login(server: &MariaDb) -> Login {
    let address = server.address("root").parse().unwrap();
    Login { address, user: "root".into(), password: None }
}

fn back_up(repository: &Repository, server: &MariaDb) -> Result<mainstay_engine::mariadb::ServerPoint> {
    let request = ServerBackup {
        host: "here".into(),
        name: "shop".into(),
        server: "mariadb:".into(),
        tags: Vec::new(),
        replica: false,
        jobs: 2,
    };
    let progress: Arc<dyn Progress> = Arc::new(Silent);
    backup_server(repository, &login(server), &request, &clock(), &progress)
}

/// Stops when it is told to.
#[derive(Default)]
struct Stop(AtomicBool);

impl Progress for Stop {
    fn event(&self, _: &Event<'_>) {}

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

fn follow_until(repository: &Repository, server: &MariaDb, stop: &Stop) -> Result<()> {
    let closing = Closing { after: Duration::from_millis(100), ..Closing::default() };
    let request = FollowServer { workload: workload("shop"), closing };
    follow_server(repository, &login(server), &request, &clock(), stop)
}

/// A directory that the server's user may go through.
fn open_directory() -> tempfile::TempDir {
    let directory = tempfile::Builder::new().prefix("ms-myr-").tempdir().unwrap();
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// Where the server's log ends, once the journal has it.
fn wait_for_the_log(repository: &Repository, server: &MariaDb, epoch: u32) -> Place {
    let status = server.ask("SHOW MASTER STATUS").unwrap();
    let mut fields = status.split('\t');
    let file = fields.next().unwrap().rsplit('.').next().unwrap().parse().unwrap();
    let offset = fields.next().unwrap().parse().unwrap();
    patiently("the log", PATIENCE, || {
        let journals = repository.journals()?;
        let ends = journals.iter().filter_map(|journal| journal.stretches().pop()).map(|last| last.end);
        let reached = ends.filter_map(|end| Place::from_position(&end)).max();
        Ok(reached.filter(|place| (place.epoch, place.file, place.offset) >= (epoch, file, offset)))
    })
    .unwrap()
}

fn restore(repository: &Repository, until: Until, to: &Path) -> Result<String> {
    let plan = plan_server(repository, &workload("shop").id, until)?;
    let restored = restore_server(repository, &plan, to, &clock(), &Silent)?;
    Ok(restored.place.unwrap_or_default())
}

#[test]
fn a_running_server_comes_back_as_it_was_at_chosen_moments_and_its_log_byte_for_byte() {
    let mut server = MariaDb::start(LOG).unwrap();
    let ask = |sql: &str| server.ask(sql).unwrap();
    ask("CREATE DATABASE shop; USE shop; CREATE TABLE shop.item (n INT PRIMARY KEY, t VARCHAR(100)); CREATE TABLE shop.mark (n INT);
         INSERT INTO shop.item SELECT seq, repeat('x', 100) FROM seq_1_to_20000; CREATE TABLE shop.old (n INT) ENGINE=Aria");
    let repository = repository();
    let stop = Stop::default();
    let made = std::thread::scope(|scope| {
        let follower = scope.spawn(|| follow_until(&repository, &server, &stop));
        let made = back_up(&repository, &server).unwrap();
        assert_eq!(made.point.counts.skipped, 0);
        ask("INSERT INTO shop.mark VALUES (1)");
        RealClock.sleep(Duration::from_millis(2100));
        ask("FLUSH BINARY LOGS");
        ask("DELETE FROM shop.item WHERE n > 10; INSERT INTO shop.mark VALUES (2)");
        // A row larger than a change of a journal may be.
        ask("CREATE TABLE shop.big (b LONGBLOB); SET GLOBAL max_allowed_packet = 67108864");
        ask("INSERT INTO shop.big SELECT repeat('y', 3000000); INSERT INTO shop.mark VALUES (3)");
        wait_for_the_log(&repository, &server, 0);
        stop.0.store(true, Ordering::Relaxed);
        follower.join().unwrap().unwrap();
        made
    });
    let deleted = ask("SELECT UNIX_TIMESTAMP()");
    println!("{deleted} {:?}", made.description);
    let last = ask("SELECT @@gtid_binlog_pos");
    let gtid: Gtid = last.parse().unwrap();
    server.stop();

    let directory = open_directory();
    let spans = spans(&repository, &made.point.workload.id).unwrap();
    assert_eq!(spans.len(), 1, "{spans:?}");
    // The file that the server has left is the one that it had.
    let plan = plan_server(&repository, &made.point.workload.id, Until::End).unwrap();
    let journal = repository.journals().unwrap().remove(0);
    let stretch = journal.stretches().remove(0);
    let logs =
        write_logs(&journal, &stretch, &plan.description, &directory.path().join("logs"), &Silent).unwrap();
    assert!(logs.len() > 1);
    let (_, first) = &logs[0];
    let theirs = std::fs::read(server.data().join(first.file_name().unwrap())).unwrap();
    assert!(std::fs::read(first).unwrap() == theirs, "the log is not what the server has");

    let before_the_delete = Until::Time(made.point.moment.plus(Duration::from_secs(1)));
    for (number, (until, items, marks)) in [
        (Until::Consistent, "20000", "0"),
        (before_the_delete, "20000", "1"),
        (Until::Gtid(gtid), "10", "2"),
        (Until::End, "10", "3"),
    ]
    .into_iter()
    .enumerate()
    {
        let to = directory.path().join(number.to_string());
        let place = restore(&repository, until, &to).unwrap();
        let copy = MariaDb::adopt(&to).unwrap();
        assert_eq!(copy.ask("SELECT count(*) FROM shop.item").unwrap(), items, "{until:?} {place}");
        assert_eq!(copy.ask("SELECT count(*) FROM shop.mark").unwrap(), marks, "{until:?} {place}");
        assert_eq!(copy.ask("SELECT count(*) FROM mysql.user WHERE user LIKE 'mainstay%'").unwrap(), "0");
        assert_eq!(copy.check().unwrap(), "");
    }
    let early = Until::Time(Time(made.point.moment.0 - 5_000_000_000));
    assert_eq!(restore(&repository, early, &directory.path().join("x")).unwrap_err().code(), Code::NotFound);
    let unknown = Until::Gtid(Gtid { sequence: 1 << 40, ..gtid });
    assert_eq!(
        restore(&repository, unknown, &directory.path().join("y")).unwrap_err().code(),
        Code::NotFound
    );
}

#[test]
fn a_log_that_the_server_no_longer_has_is_a_hole_with_a_reason() {
    let server = MariaDb::start(LOG).unwrap();
    let repository = repository();
    let follow_a_while = |epoch| {
        let stop = Stop::default();
        std::thread::scope(|scope| {
            let follower = scope.spawn(|| follow_until(&repository, &server, &stop));
            let place = wait_for_the_log(&repository, &server, epoch);
            stop.0.store(true, Ordering::Relaxed);
            follower.join().unwrap().unwrap();
            place
        })
    };
    server.ask("CREATE DATABASE shop; CREATE TABLE shop.mark (n INT)").unwrap();
    back_up(&repository, &server).unwrap();
    follow_a_while(0);
    server.ask("INSERT INTO shop.mark VALUES (1); FLUSH BINARY LOGS; FLUSH BINARY LOGS").unwrap();
    // Not as long as the server thinks that somebody reads them.
    patiently("the end of old logs", PATIENCE, || {
        server.ask("PURGE BINARY LOGS TO 'bin.000003'")?;
        Ok((!server.ask("SHOW BINARY LOGS")?.contains("bin.000002")).then_some(()))
    })
    .unwrap();
    follow_a_while(0);
    let holes = repository.journals().unwrap()[0].holes();
    assert_eq!(holes.len(), 1, "{holes:?}");
    assert!(holes[0].why.contains("deleted"), "{holes:?}");
    back_up(&repository, &server).unwrap();
    server.ask("RESET MASTER; INSERT INTO shop.mark VALUES (2)").unwrap();
    follow_a_while(1);
    let holes = repository.journals().unwrap()[0].holes();
    assert!(holes[1].why.contains("forget"), "{holes:?}");
    back_up(&repository, &server).unwrap();
    let directory = open_directory();
    let to = directory.path().join("to");
    restore(&repository, Until::End, &to).unwrap();
    assert_eq!(MariaDb::adopt(&to).unwrap().ask("SELECT count(*) FROM shop.mark").unwrap(), "2");
    // Forgotten once more, with a file of the same number: the journal's is of the life before.
    server.ask("RESET MASTER").unwrap();
    let made = back_up(&repository, &server).unwrap();
    assert_eq!(made.description.epoch, 2);
    let plan = plan_server(&repository, &made.point.workload.id, Until::End).unwrap();
    assert!(plan.note.unwrap().contains("no log behind"));
}

/// Transfers between accounts that were acknowledged, and when.
type Acknowledged = Arc<Mutex<Vec<(u64, Time)>>>;

fn transfers(server: &MariaDb, rng: &mut Rng, stop: &Stop, acknowledged: &Acknowledged) {
    while !stop.cancelled() {
        let sql: String = (0..10)
            .map(|_| {
                let (from, to) = (1 + rng.below(20), 1 + rng.below(20));
                format!(
                    "START TRANSACTION; UPDATE bank.account SET amount = amount - 1 WHERE id = {from};
                     UPDATE bank.account SET amount = amount + 1 WHERE id = {to};
                     INSERT INTO bank.done VALUES (); COMMIT; SELECT max(n) FROM bank.done;"
                )
            })
            .collect();
        // The server is killed below it.
        let Ok(answer) = server.ask(&sql) else { continue };
        let last = answer.lines().last().and_then(|line| line.parse().ok()).unwrap_or(0);
        acknowledged.lock().unwrap().push((last, RealClock.now()));
    }
}

fn check_bank(data: &Path) -> u64 {
    let copy = MariaDb::adopt(data).unwrap();
    assert_eq!(copy.ask("SELECT sum(amount) FROM bank.account").unwrap(), "2000");
    copy.ask("SELECT ifnull(max(n), 0) FROM bank.done").unwrap().parse().unwrap()
}

#[test]
fn a_bank_survives_kills_of_its_server_and_its_follower() {
    let seed = RealClock.now().0 as u64;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let settings = [LOG, &["--sync-binlog=1", "--innodb-flush-log-at-trx-commit=1"]].concat();
    let mut server = MariaDb::start(&settings).unwrap();
    server
        .ask(
            "CREATE DATABASE bank; USE bank; CREATE TABLE bank.account (id INT PRIMARY KEY, amount INT);
              CREATE TABLE bank.done (n BIGINT AUTO_INCREMENT PRIMARY KEY);
              INSERT INTO bank.account SELECT seq, 100 FROM seq_1_to_20",
        )
        .unwrap();
    let (repository, acknowledged) = (repository(), Acknowledged::default());
    let mut base = None;
    for round in 0..4 {
        let (stop, stop_follower) = (Stop::default(), Stop::default());
        std::thread::scope(|scope| {
            let follower = scope.spawn(|| follow_until(&repository, &server, &stop_follower));
            let mut rng = Rng::new(seed ^ round);
            let (server, stop, acknowledged) = (&server, &stop, &acknowledged);
            let writer = scope.spawn(move || transfers(server, &mut rng, stop, acknowledged));
            RealClock.sleep(Duration::from_millis(500));
            if round == 1 {
                base = Some(back_up(&repository, server).unwrap());
            }
            RealClock.sleep(Duration::from_millis(500 + rng_delay(seed, round)));
            stop.0.store(true, Ordering::Relaxed);
            writer.join().unwrap();
            if round % 2 == 0 {
                stop_follower.0.store(true, Ordering::Relaxed);
            } else {
                wait_for_the_log(&repository, server, 0);
                stop_follower.0.store(true, Ordering::Relaxed);
            }
            // It may have heard of the server's end first.
            let _ended = follower.join().unwrap();
        });
        server.kill();
        server.resume().unwrap();
    }
    let stop = Stop::default();
    std::thread::scope(|scope| {
        let follower = scope.spawn(|| follow_until(&repository, &server, &stop));
        wait_for_the_log(&repository, &server, 0);
        stop.0.store(true, Ordering::Relaxed);
        follower.join().unwrap().unwrap();
    });
    assert_eq!(repository.journals().unwrap()[0].holes(), Vec::new());
    let moment = base.unwrap().point.moment;
    let acknowledged = acknowledged.lock().unwrap().clone();
    let directory = open_directory();
    let end = directory.path().join("end");
    restore(&repository, Until::End, &end).unwrap();
    assert!(check_bank(&end) >= acknowledged.last().unwrap().0, "an acknowledged transfer is gone");
    let later: Vec<(u64, Time)> = acknowledged.into_iter().filter(|(_, time)| *time > moment).collect();
    for number in 0..2 {
        let (n, time) = *rng.pick(&later);
        let to = directory.path().join(number.to_string());
        // Logs count in whole seconds.
        restore(&repository, Until::Time(Time::from_seconds(time.seconds() + 1)), &to).unwrap();
        assert!(check_bank(&to) >= n, "what was acknowledged before that moment is gone");
    }
}

fn rng_delay(seed: u64, round: u64) -> u64 {
    Rng::new(seed.wrapping_add(round)).range(0..1000)
}
