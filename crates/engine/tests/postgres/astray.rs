//! Servers that went another way than the journal: nothing of them is taken for what is stored, and nobody waits.

use mainstay_core::Code;
use mainstay_engine::postgres::{Until, backup_cluster, plan_cluster};
use mainstay_testkit::lab::{Postgres, PostgresPlan};

use crate::common::{back_up, caught_up, clock, dial, following, progress, repository, request};

#[test]
fn a_server_that_was_put_back_is_refused_before_and_behind_the_end_of_the_journal() {
    let mut server = Postgres::start(&PostgresPlan::default()).unwrap();
    server.ask("postgres", "CREATE TABLE item (n int)").unwrap();
    server.stop();
    let (data, copy) = (server.data().to_owned(), server.directory().join("copy"));
    copy_tree(&data, &copy);
    server.resume().unwrap();
    let repository = repository();
    back_up(&repository, &server);
    server.ask("postgres", "INSERT INTO item SELECT generate_series(1, 5000)").unwrap();
    following(&repository, &server, None, || caught_up(&repository, &server, 1)).0.unwrap();
    server.kill();
    let mut other = Postgres::adopt(&copy).unwrap();
    for fill in ["INSERT INTO item VALUES (7)", "INSERT INTO item SELECT generate_series(1, 90000)"] {
        other.ask("postgres", fill).unwrap();
        let failed = backup_cluster(&repository, &dial(&other), &request(), &clock(), &progress());
        let error = failed.unwrap_err();
        assert_eq!(error.code(), Code::AlreadyExists, "{error:?}");
        assert!(error.next_step().unwrap().contains("--name"), "{error:?}");
    }
    assert_eq!(repository.points().unwrap().len(), 1);
    other.stop();
    // The first one goes on as before.
    server.resume().unwrap();
    back_up(&repository, &server);
}

fn copy_tree(from: &std::path::Path, to: &std::path::Path) {
    mainstay_testkit::tool("cp", &["-a", from.to_str().unwrap(), to.to_str().unwrap()], "");
}

#[test]
fn no_point_is_made_whose_log_begins_before_the_journal_does() {
    let server = Postgres::start(&PostgresPlan::default()).unwrap();
    let standby = server.standby().unwrap();
    server.ask("postgres", "CREATE TABLE item (n int)").unwrap();
    server.ask("postgres", "SELECT pg_switch_wal()").unwrap();
    server.ask("postgres", "INSERT INTO item VALUES (1)").unwrap();
    arrived(&server, &standby);
    let repository = repository();
    let failed = backup_cluster(&repository, &dial(&standby), &request(), &clock(), &progress());
    let error = failed.unwrap_err();
    assert_eq!(error.code(), Code::Conflict, "{error:?}");
    assert!(error.next_step().unwrap().contains("restart point"), "{error:?}");
    assert!(repository.points().unwrap().is_empty());
    server.ask("postgres", "CHECKPOINT").unwrap();
    arrived(&server, &standby);
    let made = back_up(&repository, &standby);
    plan_cluster(&repository, &made.point.workload.id, Until::End).unwrap();
}

fn arrived(server: &Postgres, standby: &Postgres) {
    let wanted = server.ask("postgres", "SELECT pg_current_wal_flush_lsn()").unwrap();
    let there = format!("SELECT pg_last_wal_replay_lsn() >= '{wanted}'");
    mainstay_testkit::lab::patiently("the standby", std::time::Duration::from_secs(60), || {
        Ok((standby.ask("postgres", &there)? == "t").then_some(()))
    })
    .unwrap();
}

#[test]
fn a_promotion_while_a_backup_is_taken_ends_it_and_the_next_one_is_whole() {
    let server = Postgres::start(&PostgresPlan::default()).unwrap();
    let standby = server.standby().unwrap();
    let repository = repository();
    let open = dial(&standby);
    let promoting = |replication: bool| {
        // By now the log is followed.
        if !replication {
            standby.promote().unwrap();
        }
        open(replication)
    };
    let failed = backup_cluster(&repository, &promoting, &request(), &clock(), &progress());
    assert_eq!(failed.unwrap_err().code(), Code::Refused);
    assert!(repository.points().unwrap().is_empty());
    back_up(&repository, &standby);
}
