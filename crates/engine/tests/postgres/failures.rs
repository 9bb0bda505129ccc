//! What goes wrong says what to do about it.

use std::sync::Arc;

use mainstay_core::{Code, Error};
use mainstay_engine::postgres::{Until, backup_cluster, plan_cluster, restore_cluster};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::{Options, Repository, Tuning};
use mainstay_testkit::lab::{Postgres, PostgresPlan};
use mainstay_testkit::{FaultyStore, MemoryStore};
use mainstay_workloads::postgres::{Address, Connection};

use crate::common::{back_up, caught_up, clock, dial, following, progress, repository, request};

#[track_caller]
fn says(error: &Error, code: Code, wanted: &str) {
    let hint = error.next_step().unwrap_or_default();
    assert_eq!(error.code(), code, "{error:?}");
    assert!(hint.contains(wanted), "{error:?}: {hint}");
}

#[test]
fn whom_the_server_does_not_let_in_is_told_why() {
    let access = "local all postgres trust\nlocal replication outside reject\nlocal all all scram-sha-256\n\
                  local replication all scram-sha-256\n";
    let server = Postgres::start(&PostgresPlan { access, ..PostgresPlan::default() }).unwrap();
    for statement in [
        "CREATE ROLE backup LOGIN REPLICATION PASSWORD 'right'",
        "CREATE ROLE outside LOGIN REPLICATION PASSWORD 'right'",
        "CREATE ROLE plain LOGIN PASSWORD 'right'",
    ] {
        server.ask("postgres", statement).unwrap();
    }
    let address: Address = server.address().parse().unwrap();
    let open =
        |user: &str, password: Option<&[u8]>| Connection::open(&address, user, password, true).map(drop);
    open("backup", Some(b"right")).unwrap();
    says(&open("backup", Some(b"wrong")).unwrap_err(), Code::WrongKey, "--password-file");
    says(&open("backup", None).unwrap_err(), Code::WrongKey, "--password-file");
    says(&open("nobody", Some(b"right")).unwrap_err(), Code::WrongKey, "--password-file");
    says(&open("plain", Some(b"right")).unwrap_err(), Code::Refused, "REPLICATION");
    says(&open("outside", Some(b"right")).unwrap_err(), Code::Refused, "pg_hba.conf");
    let nowhere: Address = "postgres:///?host=/nowhere".parse().unwrap();
    says(&Connection::open(&nowhere, "backup", None, true).err().unwrap(), Code::NotFound, "running");
}

#[test]
fn a_server_whose_log_is_not_enough_is_told_of_the_setting() {
    let settings = [("wal_level", "minimal"), ("max_wal_senders", "0")];
    let server = Postgres::start(&PostgresPlan { settings: &settings, ..PostgresPlan::default() }).unwrap();
    says(&dial(&server)(true).err().unwrap(), Code::Conflict, "wal_level = replica");
}

#[test]
fn a_full_repository_makes_no_point_and_with_room_again_the_next_run_does() {
    let server = Postgres::start(&PostgresPlan::default()).unwrap();
    let store = FaultyStore::new(MemoryStore::new());
    let options = Options { clock: clock(), state: None, tuning: Tuning::default() };
    let repository =
        Repository::create(Arc::new(store.clone()), KeyRing::create().unwrap(), &[], &options).unwrap();
    store.fill_after(2 << 20, 0);
    let failed = backup_cluster(&repository, &dial(&server), &request(), &clock(), &progress());
    says(&failed.unwrap_err(), Code::Full, "");
    assert!(repository.points().unwrap().is_empty());
    store.heal();
    back_up(&repository, &server);
}

#[test]
fn a_directory_that_cannot_be_written_to_is_told_of() {
    let server = Postgres::start(&PostgresPlan::default()).unwrap();
    let repository = repository();
    let made = back_up(&repository, &server);
    let plan = plan_cluster(&repository, &made.point.workload.id, Until::End).unwrap();
    // Nobody makes a directory there, not even root.
    let to = std::path::Path::new("/sys/kernel/mainstay-again");
    let error = restore_cluster(&repository, &plan, to, &progress()).err().unwrap();
    says(&error, Code::Io, "--to");
    assert!(!to.exists());
}

#[test]
fn a_slot_that_was_removed_or_given_up_costs_a_hole_with_that_reason() {
    let settings = [("min_wal_size", "2MB"), ("max_wal_size", "2MB"), ("max_slot_wal_keep_size", "1MB")];
    let plan = PostgresPlan { segment: 1, settings: &settings, ..PostgresPlan::default() };
    let server = Postgres::start(&plan).unwrap();
    let repository = repository();
    let fill = || {
        server.ask("postgres", "DROP TABLE IF EXISTS item; CREATE TABLE item AS SELECT n, repeat('x', 500) FROM generate_series(1, 20000) n").unwrap();
        for _ in 0..3 {
            server.ask("postgres", "CHECKPOINT").unwrap();
            server.ask("postgres", "SELECT pg_switch_wal()").unwrap();
        }
    };
    let follow =
        || following(&repository, &server, Some("mainstay"), || caught_up(&repository, &server, 1)).0;
    follow().unwrap();
    server.ask("postgres", "SELECT pg_drop_replication_slot('mainstay')").unwrap();
    fill();
    follow().unwrap();
    fill();
    assert_eq!(server.ask("postgres", "SELECT wal_status FROM pg_replication_slots").unwrap(), "lost");
    follow().unwrap();
    let why: Vec<String> =
        repository.journals().unwrap()[0].holes().into_iter().map(|hole| hole.why).collect();
    assert_eq!(why.len(), 2, "{why:?}");
    assert!(why[0].contains("was not there"), "{why:?}");
    assert!(why[1].contains("max_slot_wal_keep_size"), "{why:?}");
    assert_eq!(server.ask("postgres", "SELECT wal_status FROM pg_replication_slots").unwrap(), "reserved");
}
