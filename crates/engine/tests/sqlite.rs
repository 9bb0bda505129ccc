//! SQLite databases that another program writes to without a pause: backed up, followed, and brought back to any commit.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_core::{BlobStore as _, Clock, Code, Event, Progress, Silent, Time};
use mainstay_engine::follow::Closing;
use mainstay_engine::sqlite::{
    DatabasesBackup, FollowDatabases, Told, Until, backup_databases, follow_databases, plan_databases,
    restore_databases, spans, workload,
};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::{Options, Repository, Tuning};
use mainstay_testkit::lab::{PATIENCE, SqliteShell, patiently};
use mainstay_testkit::{MemoryStore, RealClock, Rng};
use mainstay_workloads::sqlite::{Database, Place};

const ACCOUNTS: usize = 40;
const TOTAL: &str = "4000";

fn repository() -> Repository {
    repository_in(MemoryStore::new())
}

fn repository_in(store: MemoryStore) -> Repository {
    let options = Options { clock: Arc::new(RealClock), state: None, tuning: Tuning::default() };
    Repository::create(Arc::new(store), KeyRing::create().unwrap(), &[], &options).unwrap()
}

fn clock() -> Arc<dyn Clock> {
    Arc::new(RealClock)
}

fn request(pattern: &Path) -> DatabasesBackup {
    let name = Some("app".to_owned());
    DatabasesBackup { host: "here".into(), name, pattern: pattern.to_owned(), tags: Vec::new(), jobs: 2 }
}

/// A bank: whatever is moved, the sum stays; and every transfer leaves its number.
fn bank(path: &Path, mode: &str) -> SqliteShell {
    let mut shell = SqliteShell::open(path).unwrap();
    shell.ask(&format!("PRAGMA journal_mode = {mode};")).unwrap();
    shell
        .ask(&format!(
            "CREATE TABLE account (id INTEGER PRIMARY KEY, amount INT, filler BLOB);
             CREATE TABLE done (n INTEGER PRIMARY KEY);
             WITH RECURSIVE s(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM s WHERE x < {ACCOUNTS})
             INSERT INTO account SELECT x, 100, randomblob(3000) FROM s;"
        ))
        .unwrap();
    shell
}

/// Moves something; the number of the transfer.
fn transfer(shell: &mut SqliteShell, rng: &mut Rng) -> mainstay_core::Result<u64> {
    let (from, to) = (1 + rng.below(ACCOUNTS), 1 + rng.below(ACCOUNTS));
    let answer = shell.ask(&format!(
        "BEGIN IMMEDIATE;
         UPDATE account SET amount = amount - 1, filler = randomblob(3000) WHERE id = {from};
         UPDATE account SET amount = amount + 1 WHERE id = {to};
         INSERT INTO done SELECT 1 + ifnull(max(n), 0) FROM done RETURNING n; COMMIT; SELECT 'yes';"
    ))?;
    let number = answer.strip_suffix("\nyes").and_then(|number| number.parse().ok());
    number.ok_or_else(|| mainstay_core::Error::new(Code::Io, format!("it answered {answer:?}")))
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

/// Transfers that were acknowledged, and when.
type Acknowledged = Arc<Mutex<Vec<(u64, Time)>>>;

/// How many transfers a restored copy has; its sum must be right and none between may be missing.
fn check(path: &Path) -> u64 {
    let mut copy = SqliteShell::open(path).unwrap();
    assert_eq!(copy.ask("PRAGMA quick_check;").unwrap(), "ok");
    assert_eq!(copy.ask("SELECT sum(amount) FROM account;").unwrap(), TOTAL);
    let done = copy.ask("SELECT count(*), ifnull(max(n), 0) FROM done;").unwrap();
    let (count, last) = done.split_once('|').unwrap();
    assert_eq!(count, last, "a transfer is missing");
    last.parse().unwrap()
}

/// Writes without a pause; the writer's process is killed now and then, and another goes on.
fn write(path: &Path, seed: u64, stop: &Stop, acknowledged: &Acknowledged) {
    let mut rng = Rng::new(seed);
    while !stop.cancelled() {
        let mut shell = SqliteShell::open(path).unwrap();
        for _ in 0..rng.below(400) {
            if stop.cancelled() {
                break;
            }
            let n = transfer(&mut shell, &mut rng).unwrap();
            let mut acknowledged = acknowledged.lock().unwrap();
            acknowledged.push((n, RealClock.now()));
        }
        shell.kill();
    }
}

/// Follows a bank while it is written to without a pause, and takes another point by the way.
fn soak(repository: &Repository, path: &Path, seed: u64) -> Vec<(u64, Time)> {
    let acknowledged = Acknowledged::default();
    let (stop_writer, stop) = (Stop::default(), Arc::new(Stop::default()));
    let progress: Arc<dyn Progress> = stop.clone();
    let closing = Closing { after: Duration::from_millis(100), ..Closing::default() };
    let follow = FollowDatabases { databases: request(path), closing };
    let failures = Mutex::new(Vec::new());
    let told = |told: Told| {
        if let Told::Failed(name, why) = told {
            failures.lock().unwrap().push((name, why));
        }
    };
    std::thread::scope(|scope| {
        let follower = scope.spawn(|| follow_databases(repository, &follow, &clock(), &progress, &told));
        let (stop_writer, acknowledged) = (&stop_writer, &acknowledged);
        let writers = [1, 2, 3]
            .map(|number| scope.spawn(move || write(path, seed ^ number, stop_writer, acknowledged)));
        let enough = |count: usize| {
            patiently("transfers", PATIENCE, || {
                Ok((acknowledged.lock().unwrap().len() >= count || follower.is_finished()).then_some(()))
            })
            .unwrap();
        };
        enough(700);
        // Another point, by somebody else, beside the one that follows.
        let silent: Arc<dyn Progress> = Arc::new(Silent);
        backup_databases(repository, &request(path), &BTreeMap::new(), &clock(), &silent).unwrap();
        enough(5000);
        stop_writer.0.store(true, Ordering::Relaxed);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        RealClock.sleep(Duration::from_secs(3));
        stop.0.store(true, Ordering::Relaxed);
        follower.join().unwrap().unwrap();
    });
    assert_eq!(failures.into_inner().unwrap(), Vec::new());
    let mut acknowledged = acknowledged.lock().unwrap().clone();
    acknowledged.sort_unstable();
    acknowledged
}

/// How many transfers the bank has when it is brought back to there.
fn has_at(repository: &Repository, path: &Path, until: Until) -> mainstay_core::Result<u64> {
    let directory = tempfile::tempdir().unwrap();
    let to = directory.path().join("to");
    let id = workload(repository, &request(path)).unwrap().id;
    let plan = plan_databases(repository, &id, until, None)?;
    let done = restore_databases(repository, &plan, &to, &Silent)?;
    assert_eq!(done.damage, Vec::new());
    Ok(check(&to.join("app.db")))
}

#[test]
fn a_database_that_is_written_to_without_a_pause_comes_back_at_any_commit() {
    let seed = RealClock.now().0 as u64;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.db");
    drop(bank(&path, "wal"));
    let repository = repository();
    let acknowledged = soak(&repository, &path, seed ^ 1);

    let id = workload(&repository, &request(&path)).unwrap().id;
    let spans = spans(&repository, &id).unwrap();
    assert_eq!(spans.len(), 1, "no hole: {spans:?}");
    assert!(spans[0].end.generation > 1, "its log was never moved into the file: {spans:?}");
    assert_eq!(repository.journals().unwrap()[0].holes(), Vec::new());
    let restore = |until| has_at(&repository, &path, until);
    assert!(
        restore(Until::End).unwrap() >= acknowledged.last().unwrap().0,
        "an acknowledged transfer is gone"
    );
    // Places of every generation: what comes back only grows.
    let mut places: Vec<Place> = (0..6)
        .map(|_| {
            let generation = rng.range(1..spans[0].end.generation + 1);
            Place { generation, frame: 1 + rng.below(1000) as u32, ..Place::default() }
        })
        .collect();
    // The end of each, and the first commits of the one after it: what is lost between them is made good later, as a rule.
    let end = |generation| Place { generation, frame: u32::MAX, ..Place::default() };
    let start = |generation| Place { generation, frame: 12, ..Place::default() };
    places
        .extend((1..spans[0].end.generation).flat_map(|generation| [end(generation), start(generation + 1)]));
    places.sort();
    let mut before = 0;
    for place in places {
        match restore(Until::Place(place)) {
            Ok(has) => {
                assert!(has >= before, "{place}: {has} after {before}");
                before = has;
            }
            Err(error) => assert_eq!(error.code(), Code::NotFound, "{place}: {error:?}"),
        }
    }
    assert!(before > 0, "no place could be recovered");
    for _ in 0..4 {
        let (n, time) = *rng.pick(&acknowledged);
        if time < spans[0].from {
            continue;
        }
        let has = restore(Until::Time(time)).unwrap();
        let slack = time.plus(Duration::from_secs(5));
        let next = acknowledged.iter().find(|(_, at)| *at > slack).map_or(u64::MAX, |(n, _)| *n);
        assert!(has <= n + 3, "{has} of {n}: the state of a later time");
        let later = restore(Until::Time(slack)).unwrap();
        assert!(later >= n && later <= next, "{later} of {n} to {next}");
    }
    let early = Until::Time(Time(spans[0].from.0 - 1_000_000_000));
    assert_eq!(restore(early).unwrap_err().code(), Code::NotFound);
}

/// Bytes of all journals.
fn stored(repository: &Repository) -> u64 {
    let journals = repository.journals().unwrap();
    journals.iter().flat_map(|journal| journal.stretches()).map(|stretch| stretch.bytes).sum()
}

#[test]
fn a_log_that_began_anew_unseen_is_a_hole_and_the_follower_takes_a_new_point() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.db");
    let mut shell = bank(&path, "wal");
    let mut rng = Rng::new(7);
    let repository = repository();
    let follow_a_while = |shell: &mut SqliteShell, rng: &mut Rng| {
        let stop = Arc::new(Stop::default());
        let progress: Arc<dyn Progress> = stop.clone();
        let follow = FollowDatabases { databases: request(&path), closing: Closing::default() };
        let points = Mutex::new(0);
        let told = |told: Told| *points.lock().unwrap() += u64::from(matches!(told, Told::Point(_)));
        std::thread::scope(|scope| {
            let follower = scope.spawn(|| follow_databases(&repository, &follow, &clock(), &progress, &told));
            let started = stored(&repository);
            RealClock.sleep(Duration::from_secs(2));
            for _ in 0..5 {
                transfer(shell, rng).unwrap();
            }
            patiently("the journal", PATIENCE, || {
                let bytes: u64 = repository
                    .journals()?
                    .iter()
                    .flat_map(|journal| journal.stretches())
                    .map(|stretch| stretch.bytes)
                    .sum();
                Ok((bytes > started).then_some(()))
            })
            .unwrap();
            RealClock.sleep(Duration::from_secs(2));
            stop.0.store(true, Ordering::Relaxed);
            follower.join().unwrap().unwrap();
        });
        points.into_inner().unwrap()
    };
    assert_eq!(follow_a_while(&mut shell, &mut rng), 1, "the first point");
    assert_eq!(follow_a_while(&mut shell, &mut rng), 0, "it goes on where it was");
    let between = RealClock.now();
    for n in 11..=20 {
        shell.ask(&format!("INSERT INTO done VALUES ({n});")).unwrap();
    }
    shell.ask("PRAGMA wal_checkpoint(TRUNCATE);").unwrap();
    shell.ask("DELETE FROM done WHERE n > 10;").unwrap();
    assert_eq!(follow_a_while(&mut shell, &mut rng), 1, "a new point after the hole");
    let holes = repository.journals().unwrap()[0].holes();
    assert_eq!(holes.len(), 1, "{holes:?}");
    assert!(holes[0].why.contains("anew"), "{holes:?}");
    let id = workload(&repository, &request(&path)).unwrap().id;
    let error = plan_databases(&repository, &id, Until::Time(between), None).err();
    assert_eq!(error.map(|error| error.code()), Some(Code::NotFound));
    let plan = plan_databases(&repository, &id, Until::End, None).unwrap();
    let to = directory.path().join("to");
    restore_databases(&repository, &plan, &to, &Silent).unwrap();
    assert_eq!(check(&to.join("app.db")), 15);
}

#[test]
fn a_journal_that_ends_within_a_transaction_brings_back_what_was_committed_before_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("app.db");
    let mut shell = bank(&path, "wal");
    let mut rng = Rng::new(11);
    let store = MemoryStore::new();
    let repository = repository_in(store.clone());
    let stop = Arc::new(Stop::default());
    let progress: Arc<dyn Progress> = stop.clone();
    // Every change is an object of its own.
    let follow =
        FollowDatabases { databases: request(&path), closing: Closing { bytes: 1, ..Closing::default() } };
    std::thread::scope(|scope| {
        let follower = scope.spawn(|| follow_databases(&repository, &follow, &clock(), &progress, &|_| ()));
        let grown = |enough: u64| {
            patiently("the journal", PATIENCE, || Ok((stored(&repository) > enough).then_some(()))).unwrap();
        };
        patiently("the point", PATIENCE, || Ok((repository.points()?.len() == 1).then_some(()))).unwrap();
        for _ in 0..3 {
            transfer(&mut shell, &mut rng).unwrap();
        }
        grown(0);
        RealClock.sleep(Duration::from_secs(1));
        let before = stored(&repository);
        // More than any change holds.
        shell
            .ask("BEGIN; UPDATE account SET filler = randomblob(100000), amount = amount + 1; INSERT INTO done VALUES (4); COMMIT;")
            .unwrap();
        grown(before + (3 << 20));
        stop.0.store(true, Ordering::Relaxed);
        follower.join().unwrap().unwrap();
    });
    let last = store.snapshot().keys().filter(|name| name.starts_with("journal/")).max().unwrap().clone();
    store.delete(&last).unwrap();
    for until in [Until::End, Until::Time(RealClock.now())] {
        assert_eq!(has_at(&repository, &path, until).unwrap(), 3, "{until:?}");
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a directory that goes away and comes back")]
fn a_follower_that_finds_nothing_any_more_says_so_and_goes_on_when_it_is_back() {
    let directory = tempfile::tempdir().unwrap();
    let (top, away) = (directory.path().join("app"), directory.path().join("away"));
    std::fs::create_dir(&top).unwrap();
    drop(bank(&top.join("one.db"), "wal"));
    let repository = repository();
    let stop = Arc::new(Stop::default());
    let progress: Arc<dyn Progress> = stop.clone();
    let follow = FollowDatabases { databases: request(&top), closing: Closing::default() };
    let heard = Mutex::new(Vec::new());
    let told = |told: Told| {
        heard.lock().unwrap().push(match told {
            Told::Follows(name) => format!("follows {name}"),
            Told::Point(_) => "point".into(),
            Told::Failed(name, _) => format!("failed {name}"),
        });
    };
    std::thread::scope(|scope| {
        let follower = scope.spawn(|| follow_databases(&repository, &follow, &clock(), &progress, &told));
        let hears = |what: &str| {
            let has = || heard.lock().unwrap().iter().any(|line| line == what);
            patiently(what, PATIENCE, || Ok((has() || follower.is_finished()).then_some(()))).unwrap();
            assert!(has(), "{what}: {:?}", heard.lock().unwrap());
        };
        hears("follows one.db");
        hears("point");
        std::fs::rename(&top, &away).unwrap();
        hears(&format!("failed {}", top.display()));
        drop(bank(&away.join("two.db"), "wal"));
        heard.lock().unwrap().clear();
        std::fs::rename(&away, &top).unwrap();
        hears("follows one.db");
        hears("follows two.db");
        hears("point");
        stop.0.store(true, Ordering::Relaxed);
        follower.join().unwrap().unwrap();
    });
}

#[test]
fn databases_below_a_directory_with_and_without_a_log_come_back_and_other_files_are_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let top = directory.path().join("app");
    std::fs::create_dir_all(top.join("a/b")).unwrap();
    std::fs::write(top.join("notes.db"), "no database at all, but long enough for a first page").unwrap();
    let (with, without) = (top.join("a/b/with.sqlite"), top.join("without"));
    // Their programs run on: nothing of the log is in the file yet.
    let mut one = bank(&with, "wal");
    let mut other = bank(&without, "delete");
    let mut rng = Rng::new(3);
    for _ in 1..=3 {
        transfer(&mut one, &mut rng).unwrap();
        transfer(&mut other, &mut rng).unwrap();
    }
    // A reader that stands still keeps the log from being moved, so the point needs it as well.
    let mut reader = SqliteShell::open(&with).unwrap();
    reader.ask("BEGIN; SELECT count(*) FROM done;").unwrap();
    transfer(&mut one, &mut rng).unwrap();
    let repository = repository();
    let progress: Arc<dyn Progress> = Arc::new(Silent);
    let made = backup_databases(&repository, &request(&top), &BTreeMap::new(), &clock(), &progress).unwrap();
    assert_eq!(made.counts.skipped, 0);
    assert_eq!(transfer(&mut other, &mut rng).unwrap(), 4, "the lock was kept");
    let plan = plan_databases(&repository, &made.workload.id, Until::End, None).unwrap();
    let to = directory.path().join("to");
    restore_databases(&repository, &plan, &to, &Silent).unwrap();
    assert_eq!(check(&to.join("a/b/with.sqlite")), 4);
    assert_eq!(check(&to.join("without")), 3);
    let again = restore_databases(&repository, &plan, &to, &Silent).unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);
    let pattern = request(&top.join("**"));
    let all = backup_databases(&repository, &pattern, &BTreeMap::new(), &clock(), &progress).unwrap();
    assert_eq!(all.counts.items, made.counts.items);
}

#[test]
fn what_is_no_database_or_is_locked_is_an_error_that_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let secret = directory.path().join("secret.db");
    std::fs::write(&secret, [0x5a; 8192]).unwrap();
    let repository = repository();
    let back_up = |path: &Path| {
        let progress: Arc<dyn Progress> = Arc::new(Silent);
        backup_databases(&repository, &request(path), &BTreeMap::new(), &clock(), &progress).unwrap_err()
    };
    let error = back_up(&secret);
    assert_eq!(error.code(), Code::Unsupported);
    assert!(error.what().contains("encrypted"), "{error:?}");
    // The first bytes of a database, and nothing that makes sense behind them.
    let hostile = directory.path().join("hostile.db");
    std::fs::write(&hostile, [b"SQLite format 3\0".as_slice(), &[0xff; 4096]].concat()).unwrap();
    assert!(matches!(back_up(&hostile).code(), Code::Unsupported | Code::Integrity));
    assert_eq!(back_up(&directory.path().join("nothing")).code(), Code::NotFound);
    assert!(repository.points().unwrap().is_empty());
}

#[test]
fn links_and_what_never_answers_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (own, theirs) = (directory.path().join("own"), directory.path().join("theirs"));
    std::fs::create_dir(&own).unwrap();
    std::fs::create_dir(&theirs).unwrap();
    drop(bank(&theirs.join("app.db"), "wal"));
    let pipe = |path: &Path| {
        rustix::fs::mknodat(rustix::fs::CWD, path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    };
    let repository = repository();
    let back_up = |path: &Path| {
        let progress: Arc<dyn Progress> = Arc::new(Silent);
        backup_databases(&repository, &request(path), &BTreeMap::new(), &clock(), &progress)
            .unwrap_err()
            .code()
    };
    std::os::unix::fs::symlink(theirs.join("app.db"), own.join("app.db")).unwrap();
    assert_eq!(back_up(&own.join("app.db")), Code::Refused);
    std::os::unix::fs::symlink(&theirs, own.join("more")).unwrap();
    pipe(&own.join("pipe.db"));
    assert_eq!(back_up(&own.join("pipe.db")), Code::Refused);
    assert_eq!(back_up(&own), Code::NotFound, "neither is looked through");
    // Found as a file, and a link by the time that it is opened.
    let error = Database::open(&own.join("more/app.db")).err().unwrap();
    assert_eq!(error.code(), Code::Refused);
    for end in ["-wal", "-journal", "-shm"] {
        let path = own.join(format!("with{end}"));
        drop(bank(&path, "delete"));
        let mut beside = path.clone().into_os_string();
        beside.push(end);
        pipe(Path::new(&beside));
        assert_eq!(back_up(&path), Code::Refused, "{end}");
        std::fs::remove_file(&beside).unwrap();
        std::os::unix::fs::symlink(theirs.join("app.db"), &beside).unwrap();
        assert_eq!(back_up(&path), Code::Refused, "{end}");
    }
    assert!(repository.points().unwrap().is_empty());
}
