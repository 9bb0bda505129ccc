//! The log as a server pushes it and asks for it.

use std::path::{Path, PathBuf};

use mainstay_core::Code;
use mainstay_engine::postgres::{Pushed, Until, aside, fetch_wal, holes, push_wal};
use mainstay_repository::Repository;
use mainstay_testkit::lab::{Postgres, PostgresPlan};

use crate::common::{back_up, caught_up, directory, following, repository, restore};

/// Segments that are full, in order.
fn finished(server: &Postgres) -> Vec<PathBuf> {
    let current = server.ask("postgres", "SELECT pg_walfile_name(pg_current_wal_insert_lsn())").unwrap();
    let entries = std::fs::read_dir(server.data().join("pg_wal")).unwrap();
    let mut files: Vec<PathBuf> =
        entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()).collect();
    files.retain(|path| {
        path.file_name().unwrap().to_str().is_some_and(|name| name.len() == 24 && *name < *current)
    });
    files.sort();
    files
}

fn fill(server: &Postgres, number: u32) {
    let fill = format!("INSERT INTO item SELECT {number}, repeat('x', 500) FROM generate_series(1, 5000)");
    server.ask("postgres", &fill).unwrap();
    server.ask("postgres", "SELECT pg_switch_wal()").unwrap();
}

fn push(repository: &Repository, file: &Path) -> Pushed {
    push_wal(repository, "shop", file).unwrap()
}

#[test]
fn what_is_pushed_and_what_is_followed_are_one_journal() {
    let settings = [("wal_keep_size", "'256MB'")];
    let plan = PostgresPlan { segment: 1, settings: &settings, ..PostgresPlan::default() };
    let mut server = Postgres::start(&plan).unwrap();
    server.ask("postgres", "CREATE TABLE item (n int, t text)").unwrap();
    let repository = repository();
    fill(&server, 1);
    // Followed for a while, and then pushed.
    let made = back_up(&repository, &server);
    following(&repository, &server, None, || caught_up(&repository, &server, 1)).0.unwrap();
    fill(&server, 2);
    let first = &repository.journals().unwrap()[0].stretches()[0].start;
    let first = mainstay_workloads::postgres::Lsn::from_position(first).unwrap().file_name(1, 1 << 20);
    let mut files = finished(&server);
    files.retain(|path| path.file_name().unwrap().to_str() >= Some(first.as_str()));
    let outcomes: Vec<Pushed> = files.iter().map(|file| push(&repository, file)).collect();
    assert_eq!(outcomes.first(), Some(&Pushed::Known), "{outcomes:?}");
    assert_eq!(outcomes.last(), Some(&Pushed::Stored), "{outcomes:?}");
    assert!(files.iter().all(|file| push(&repository, file) == Pushed::Known), "it can be pushed again");
    // And followed again.
    following(&repository, &server, None, || caught_up(&repository, &server, 1)).0.unwrap();
    let workload = &made.point.workload;
    assert!(holes(&repository.journals().unwrap(), &workload.id).is_empty());

    // Another server of the same cluster that went its own way: nothing is lost, and nobody waits.
    let directory = directory();
    let file = files.last().unwrap();
    let name = file.file_name().unwrap().to_str().unwrap();
    let mut bytes = std::fs::read(file).unwrap();
    bytes[5000] ^= 1;
    let other = directory.path().join(name);
    std::fs::write(&other, &bytes).unwrap();
    assert_eq!([push(&repository, &other), push(&repository, &other)], [Pushed::Aside, Pushed::Aside]);
    assert_eq!(aside(&repository.journals().unwrap(), workload), [name]);
    bytes.truncate(5000);
    std::fs::write(&other, &bytes).unwrap();
    assert_eq!(push_wal(&repository, "shop", &other).unwrap_err().code(), Code::Integrity);
    for name in ["000000010000000000000002.00000028.backup", "000000010000000000000002.partial"] {
        assert_eq!(push(&repository, &directory.path().join(name)), Pushed::Unneeded);
    }

    // Given back as it was.
    let to = directory.path().join("RECOVERYXLOG");
    for file in &files {
        let name = file.file_name().unwrap().to_str().unwrap();
        fetch_wal(&repository, "shop", name, &to).unwrap();
        assert!(std::fs::read(&to).unwrap() == std::fs::read(file).unwrap(), "{name}");
    }
    for missing in ["0000000100000000000000FF", "000000020000000000000002", "00000002.history"] {
        assert_eq!(fetch_wal(&repository, "shop", missing, &to).unwrap_err().code(), Code::NotFound);
    }

    // A promotion is pushed too.
    let standby = server.standby().unwrap();
    following(&repository, &server, None, || caught_up(&repository, &server, 1)).0.unwrap();
    server.stop();
    standby.promote().unwrap();
    fill(&standby, 3);
    standby.ask("postgres", "INSERT INTO item VALUES (4)").unwrap();
    let wal = standby.data().join("pg_wal");
    assert_eq!(push(&repository, &wal.join("00000002.history")), Pushed::Stored);
    let files = finished(&standby);
    for file in
        files.iter().filter(|file| file.file_name().unwrap().to_str().unwrap().starts_with("00000002"))
    {
        assert_eq!(push(&repository, file), Pushed::Stored);
    }
    another_promoted(&repository, &standby, files.last().unwrap(), directory.path());
    assert!(aside(&repository.journals().unwrap(), workload).contains(&"00000002.history".to_owned()));
    fetch_wal(&repository, "shop", "00000002.history", &to).unwrap();
    assert_eq!(std::fs::read(&to).unwrap(), std::fs::read(wal.join("00000002.history")).unwrap());
    assert!(holes(&repository.journals().unwrap(), &workload.id).is_empty());
    let to = directory.path().join("again");
    restore(&repository, &workload.id, Until::End, &to);
    let copy = Postgres::adopt(&to).unwrap();
    let counted = copy.ask("postgres", "SELECT string_agg(DISTINCT n::text, ' ') FROM item").unwrap();
    assert_eq!(counted, "1 2 3", "what was not pushed is not there");
}

/// Another one that was promoted, for itself, pushes the history of its timeline and a segment: both are taken.
fn another_promoted(repository: &Repository, standby: &Postgres, segment: &Path, at: &Path) {
    let (wal, global) = (at.join("other/pg_wal"), at.join("other/global"));
    for directory in [&wal, &global] {
        std::fs::create_dir_all(directory).unwrap();
    }
    std::fs::copy(standby.data().join("global/pg_control"), global.join("pg_control")).unwrap();
    let (history, copy) = (wal.join("00000002.history"), wal.join(segment.file_name().unwrap()));
    std::fs::write(&history, "1\t0/1000028\tno recovery target specified\n").unwrap();
    std::fs::copy(segment, &copy).unwrap();
    assert_eq!([push(repository, &history), push(repository, &copy)], [Pushed::Aside, Pushed::Aside]);
}
