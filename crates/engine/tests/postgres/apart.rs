//! Configuration outside the data directory, as Debian has it.

use mainstay_core::SkipReason;
use mainstay_engine::postgres::{Until, plan_cluster, restore_cluster};
use mainstay_testkit::lab::{Postgres, PostgresPlan};
use mainstay_workloads::postgres::{Address, Connection};

use crate::common::{back_up, back_up_by, directory, progress, repository, restore};

fn server() -> Postgres {
    let settings = [("include_dir", "'conf.d'"), ("max_connections", "37")];
    let plan = PostgresPlan { apart: true, settings: &settings, ..PostgresPlan::default() };
    let mut server = Postgres::start(&plan).unwrap();
    server.stop();
    server.space("etc/conf.d/empty.d").unwrap();
    let more = server.directory().join("etc/conf.d/more.conf");
    std::fs::write(more, "work_mem = '7MB'\ninclude_dir = 'empty.d'\n").unwrap();
    server.resume().unwrap();
    assert_eq!(server.ask("postgres", "SHOW work_mem").unwrap(), "7MB");
    server
}

#[test]
fn configuration_that_lies_apart_is_in_the_point_and_is_used_again() {
    let server = server();
    let repository = repository();
    let made = back_up(&repository, &server);
    assert_eq!(made.point.counts.skipped, 0);
    let directory = directory();
    let to = directory.path().join("again");
    restore(&repository, &made.point.workload.id, Until::End, &to);
    let etc = server.directory().join("etc");
    drop(server);
    let beside = directory.path().join("again-configuration").join(etc.strip_prefix("/").unwrap());
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf", "conf.d/more.conf"] {
        assert!(beside.join(name).is_file(), "{name}");
    }
    let copy = Postgres::adopt(&to).unwrap();
    for (setting, value) in [("work_mem", "7MB"), ("max_connections", "37")] {
        assert_eq!(copy.ask("postgres", &format!("SHOW {setting}")).unwrap(), value);
    }
    let access = copy.ask("postgres", "SHOW hba_file").unwrap();
    assert_eq!(access, beside.join("pg_hba.conf").display().to_string());
}

#[test]
fn whom_the_server_does_not_let_read_files_is_told_and_the_copy_starts_all_the_same() {
    let server = server();
    for statement in ["CREATE ROLE backup LOGIN REPLICATION", "GRANT pg_monitor TO backup"] {
        server.ask("postgres", statement).unwrap();
    }
    let address: Address = server.address().parse().unwrap();
    let dial = |replication| Connection::open(&address, "backup", None, replication);
    let repository = repository();
    let made = back_up_by(&repository, &dial);
    let skips = repository.read(&made.point.id).unwrap().skips().unwrap();
    assert!(skips.len() >= 3, "{skips:?}");
    for skip in &skips {
        assert_eq!(skip.reason, SkipReason::Unreadable);
        assert!(skip.path.to_string().starts_with("configuration/"), "{skip:?}");
        assert!(skip.detail.contains("pg_read_server_files"), "{skip:?}");
    }
    let directory = directory();
    let to = directory.path().join("again");
    let plan = plan_cluster(&repository, &made.point.workload.id, Until::End).unwrap();
    restore_cluster(&repository, &plan, &to, &progress()).unwrap();
    // The test is not the server's user.
    std::fs::write(to.join("pg_hba.conf"), "local all all trust\n").unwrap();
    let copy = Postgres::adopt(&to).unwrap();
    assert_eq!(copy.ask("postgres", "SHOW max_connections").unwrap(), "37");
    // What the guide says to grant.
    for statement in [
        "GRANT pg_read_server_files TO backup",
        "GRANT EXECUTE ON FUNCTION pg_read_binary_file(text), pg_read_binary_file(text, bigint, bigint, boolean) TO backup",
    ] {
        server.ask("postgres", statement).unwrap();
    }
    assert_eq!(back_up_by(&repository, &dial).point.counts.skipped, 0);
}
