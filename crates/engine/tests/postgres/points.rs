//! Points, and recovery to any place of the log behind them.

use mainstay_core::{Clock as _, Code};
use mainstay_engine::postgres::{Until, plan_cluster};
use mainstay_testkit::RealClock;
use mainstay_testkit::lab::{Postgres, PostgresPlan};
use mainstay_workloads::postgres::Lsn;

use crate::common::{back_up, caught_up, directory, following, repository, restore};

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
    let made = back_up(&repository, &server);
    assert_eq!(made.point.counts.skipped, 0);

    // What comes after is in the log of the second point.
    server.ask("postgres", "DELETE FROM item WHERE n > 10; INSERT INTO mark VALUES (1)").unwrap();
    let place: Lsn = server.ask("postgres", "SELECT pg_current_wal_insert_lsn()").unwrap().parse().unwrap();
    server.ask("postgres", "INSERT INTO mark VALUES (2)").unwrap();
    back_up(&repository, &server);
    server.stop();

    let directory = directory();
    for (number, (until, items, marks)) in [
        (Until::Lsn(Lsn::from_position(&made.point.position).unwrap()), "20000", "0"),
        (Until::Lsn(place), "10", "1"),
        (Until::End, "10", "2"),
    ]
    .into_iter()
    .enumerate()
    {
        let to = directory.path().join(number.to_string());
        restore(&repository, &made.point.workload.id, until.clone(), &to);
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
    let first = back_up(&repository, &server);
    server
        .ask("postgres", "CREATE TABLE item AS SELECT n, repeat('x', 500) FROM generate_series(1, 20000) n")
        .unwrap();
    for _ in 0..3 {
        server.ask("postgres", "CHECKPOINT").unwrap();
        server.ask("postgres", "SELECT pg_switch_wal()").unwrap();
    }
    let second = back_up(&repository, &server);
    let journals = repository.journals().unwrap();
    let holes = journals[0].holes();
    assert_eq!(holes.len(), 1, "{holes:?}");
    assert!(holes[0].why.contains("deleted"), "{holes:?}");
    let workload = &first.point.workload.id;
    let plan = |until| plan_cluster(&repository, workload, until);
    assert_eq!(plan(Until::End).unwrap().point.id, second.point.id);
    let within = Lsn(Lsn::from_position(&holes[0].start).unwrap().0 + 1);
    let error = plan(Until::Lsn(within)).err().unwrap();
    assert_eq!(error.code(), Code::NotFound);
    let place = |position| Lsn::from_position(position).unwrap().to_string();
    let nearest = format!("{} and {}", place(&holes[0].start), place(&second.point.position));
    assert!(error.next_step().unwrap().contains(&nearest), "{error:?}: {:?}", error.next_step());
    let between = first.point.moment.plus(std::time::Duration::from_nanos(1)).max(holes[0].after.unwrap());
    let error = plan(Until::Time(between.plus(std::time::Duration::from_nanos(1)))).err().unwrap();
    assert!(error.next_step().unwrap().contains("the nearest that can be are 20"), "{:?}", error.next_step());
    let directory = directory();
    let to = directory.path().join("again");
    restore(&repository, workload, Until::End, &to);
    let copy = Postgres::adopt(&to).unwrap();
    assert_eq!(copy.ask("postgres", "SELECT count(*) FROM item").unwrap(), "20000");
}

#[test]
fn recovery_stops_just_before_the_commit_of_a_transaction() {
    let server = Postgres::start(&PostgresPlan::default()).unwrap();
    server.ask("postgres", "CREATE TABLE item AS SELECT n FROM generate_series(1, 50) n").unwrap();
    let repository = repository();
    let made = back_up(&repository, &server);
    server.ask("postgres", "INSERT INTO item VALUES (51)").unwrap();
    let deletion = "BEGIN; DELETE FROM item WHERE n > 7; SELECT txid_current(); COMMIT";
    let transaction = server.ask("postgres", deletion).unwrap().parse().unwrap();
    server.ask("postgres", "INSERT INTO item VALUES (52)").unwrap();
    back_up(&repository, &server);
    let directory = directory();
    let to = directory.path().join("again");
    restore(&repository, &made.point.workload.id, Until::Transaction(transaction), &to);
    let copy = Postgres::adopt(&to).unwrap();
    assert_eq!(copy.ask("postgres", "SELECT count(*), max(n) FROM item").unwrap(), "51|51");
}

#[test]
fn a_moment_behind_the_last_commit_is_all_of_the_log() {
    let settings = [("wal_keep_size", "'256MB'")];
    let server = Postgres::start(&PostgresPlan { settings: &settings, ..PostgresPlan::default() }).unwrap();
    server.ask("postgres", "CREATE TABLE item (n int)").unwrap();
    let repository = repository();
    let made = back_up(&repository, &server);
    server.ask("postgres", "INSERT INTO item VALUES (1)").unwrap();
    let before = RealClock.now();
    server.ask("postgres", "INSERT INTO item VALUES (2)").unwrap();
    let behind = RealClock.now();
    // Log without a commit, so that the journal reaches behind both.
    server.ask("postgres", "SELECT pg_switch_wal()").unwrap();
    server.ask("postgres", "CHECKPOINT").unwrap();
    following(&repository, &server, None, || caught_up(&repository, &server, 1)).0.unwrap();
    let end = repository.journals().unwrap()[0].stretches()[0].end.clone();
    let directory = directory();
    for (name, until, wanted) in [
        ("behind", Until::Time(behind), "2"),
        ("before", Until::Time(before), "1"),
        ("end", Until::Lsn(Lsn::from_position(&end).unwrap()), "2"),
    ] {
        let to = directory.path().join(name);
        restore(&repository, &made.point.workload.id, until, &to);
        let copy = Postgres::adopt(&to).unwrap();
        assert_eq!(copy.ask("postgres", "SELECT max(n) FROM item").unwrap(), wanted, "{name}");
    }
}

#[test]
fn what_an_earlier_recovery_left_in_the_settings_stops_no_later_one() {
    let server = Postgres::start(&PostgresPlan::default()).unwrap();
    for setting in [
        "recovery_target = 'immediate'",
        "recovery_target_action = 'shutdown'",
        "recovery_target_timeline = '7'",
        "restore_command = '/bin/false'",
        "work_mem = '7MB'",
    ] {
        server.ask("postgres", &format!("ALTER SYSTEM SET {setting}")).unwrap();
    }
    server.ask("postgres", "CREATE TABLE item AS SELECT 1 AS n").unwrap();
    let repository = repository();
    let made = back_up(&repository, &server);
    server.ask("postgres", "INSERT INTO item VALUES (2)").unwrap();
    let place: Lsn = server.ask("postgres", "SELECT pg_current_wal_insert_lsn()").unwrap().parse().unwrap();
    server.ask("postgres", "INSERT INTO item VALUES (3)").unwrap();
    following(&repository, &server, None, || caught_up(&repository, &server, 1)).0.unwrap();
    let directory = directory();
    for (name, until, wanted) in [("end", Until::End, "3"), ("place", Until::Lsn(place), "2")] {
        let to = directory.path().join(name);
        restore(&repository, &made.point.workload.id, until, &to);
        let copy = Postgres::adopt(&to).unwrap();
        assert_eq!(copy.ask("postgres", "SELECT max(n) FROM item").unwrap(), wanted, "{name}");
        assert_eq!(copy.ask("postgres", "SHOW work_mem").unwrap(), "7MB");
    }
}

#[test]
fn a_log_that_ends_with_its_segment_holds_moments_behind_the_last_commit() {
    let server = Postgres::start(&PostgresPlan::default()).unwrap();
    server.ask("postgres", "CREATE TABLE item (n int)").unwrap();
    let repository = repository();
    let made = back_up(&repository, &server);
    server.ask("postgres", "INSERT INTO item VALUES (1)").unwrap();
    let behind = RealClock.now();
    server.ask("postgres", "SELECT pg_switch_wal()").unwrap();
    following(&repository, &server, None, || caught_up(&repository, &server, 1)).0.unwrap();
    let end = repository.journals().unwrap()[0].stretches()[0].end.clone();
    assert_eq!(Lsn::from_position(&end).unwrap().0 % (16 << 20), 0, "something came behind the switch");
    let directory = directory();
    let to = directory.path().join("again");
    restore(&repository, &made.point.workload.id, Until::Time(behind), &to);
    let copy = Postgres::adopt(&to).unwrap();
    assert_eq!(copy.ask("postgres", "SELECT max(n) FROM item").unwrap(), "1");
}
