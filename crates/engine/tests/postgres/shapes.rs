//! Clusters of every shape.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use mainstay_core::SkipReason;
use mainstay_engine::postgres::Until;
use mainstay_testkit::lab::{Postgres, PostgresPlan};

use crate::common::{back_up, caught_up, directory, following, repository, restore};

/// A relation goes on in another file after so much.
const FILE_BYTES: u64 = 1 << 30;

#[test]
fn every_shape_comes_back_and_the_servers_own_check_accepts_it() {
    let plan = PostgresPlan { segment: 64, checksums: true, ..PostgresPlan::default() };
    let mut server = Postgres::start(&plan).unwrap();
    let space = server.space("space").unwrap();
    for statement in [
        &format!("CREATE TABLESPACE extra LOCATION '{}'", space.display()),
        "CREATE TABLE item (n int PRIMARY KEY) TABLESPACE extra",
        "INSERT INTO item SELECT generate_series(1, 3000)",
        "CREATE UNLOGGED TABLE fleeting AS SELECT generate_series(1, 100) n",
        "CREATE TABLE large (n int)",
        "CREATE DATABASE \"café\" ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0",
        "CREATE ROLE \"Zoë\" LOGIN",
    ] {
        server.ask("postgres", statement).unwrap();
    }
    server.ask("café", "CREATE TABLE \"thé\" AS SELECT 'à la crème'::text t").unwrap();
    let large = server.data().join(server.ask("postgres", "SELECT pg_relation_filepath('large')").unwrap());
    server.stop();
    grow(&large);
    server.resume().unwrap();
    let place = server.ask("postgres", "INSERT INTO large VALUES (7) RETURNING ctid").unwrap();
    assert_eq!(place, "(131199,1)", "in the second file");

    let repository = repository();
    let (followed, made) = following(&repository, &server, Some("mainstay"), || {
        let made = back_up(&repository, &server);
        server.ask("postgres", "INSERT INTO item VALUES (5000); SELECT pg_switch_wal()").unwrap();
        server.ask("postgres", "INSERT INTO item VALUES (5001)").unwrap();
        caught_up(&repository, &server, 1);
        made
    });
    followed.unwrap();
    assert_eq!(made.point.counts.skipped, 0);
    server.stop();
    let directory = directory();
    let to = directory.path().join("again");
    restore(&repository, &made.point.workload.id, Until::End, &to);
    server.run("pg_verifybackup", &[&to.display().to_string()]).unwrap();
    let copy = Postgres::adopt(&to).unwrap();
    for (database, question, answer) in [
        ("postgres", "SELECT count(*), max(n) FROM item", "3002|5001"),
        ("postgres", "SELECT count(*) FROM fleeting", "0"),
        ("postgres", "SELECT ctid, n FROM large", "(131199,1)|7"),
        ("postgres", "SELECT count(*) FROM pg_roles WHERE rolname = 'Zoë'", "1"),
        ("postgres", "SHOW wal_segment_size", "64MB"),
        ("café", "SELECT t FROM \"thé\"", "à la crème"),
        ("café", "SHOW server_encoding", "LATIN1"),
    ] {
        assert_eq!(copy.ask(database, question).unwrap(), answer, "{question}");
    }
    copy.client("pg_amcheck", &["--all", "--install-missing", "--heapallindexed"]).unwrap();
}

/// Makes a relation longer than one file, with pages that were never used and take no room.
fn grow(first: &Path) {
    let owner = std::fs::metadata(first).unwrap();
    File::options().write(true).open(first).unwrap().set_len(FILE_BYTES).unwrap();
    let mut second = first.as_os_str().to_owned();
    second.push(".1");
    File::create(&second).unwrap().set_len(1 << 20).unwrap();
    std::os::unix::fs::chown(&second, Some(owner.uid()), Some(owner.gid())).unwrap();
}

#[test]
fn a_page_that_is_not_what_its_checksum_says_is_named_and_the_backup_goes_on() {
    let mut server = Postgres::start(&PostgresPlan { checksums: true, ..PostgresPlan::default() }).unwrap();
    server
        .ask("postgres", "CREATE TABLE item AS SELECT n, repeat('x', 400) t FROM generate_series(1, 100) n")
        .unwrap();
    let file = server.ask("postgres", "SELECT pg_relation_filepath('item')").unwrap();
    server.ask("postgres", "CHECKPOINT").unwrap();
    server.stop();
    let relation = File::options().write(true).open(server.data().join(&file)).unwrap();
    relation.write_all_at(b"damage", 2 * 8192 + 5000).unwrap();
    server.resume().unwrap();
    let repository = repository();
    let made = back_up(&repository, &server);
    let skips = repository.read(&made.point.id).unwrap().skips().unwrap();
    assert_eq!((made.point.counts.skipped, skips.len()), (1, 1), "{skips:?}");
    assert_eq!(skips[0].reason, SkipReason::Corrupt);
    assert_eq!(skips[0].path.to_string(), format!("data/{file}"));
    assert_eq!(skips[0].detail, "page 2 not as the checksum says");
    // It is there as it is: perhaps something can be read out of it.
    let directory = directory();
    let to = directory.path().join("again");
    restore(&repository, &made.point.workload.id, Until::End, &to);
    let (mut stored, mut damaged) = ([0; 8192], [0; 8192]);
    File::open(to.join(&file)).unwrap().read_exact_at(&mut stored, 2 * 8192).unwrap();
    File::open(server.data().join(&file)).unwrap().read_exact_at(&mut damaged, 2 * 8192).unwrap();
    assert_eq!(stored, damaged);
}
