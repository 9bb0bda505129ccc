//! The log: what was received is what the server archives.

use mainstay_testkit::lab::{Postgres, PostgresPlan};
use mainstay_workloads::postgres::Lsn;

use crate::common::{caught_up, following, repository};

const SEGMENT: u64 = 1 << 20;

#[test]
fn what_was_received_is_what_the_server_archives_byte_for_byte() {
    let archive = crate::common::directory();
    std::fs::set_permissions(archive.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let command = format!("'cp %p {}/%f'", archive.path().display());
    let settings = [("archive_mode", "on"), ("archive_command", command.as_str())];
    let plan = PostgresPlan { segment: 1, settings: &settings, ..PostgresPlan::default() };
    let server = Postgres::start(&plan).unwrap();
    let repository = repository();
    let (followed, ()) = following(&repository, &server, Some("mainstay"), || {
        server.ask("postgres", "CREATE TABLE item AS SELECT n FROM generate_series(1, 60000) n").unwrap();
        for number in 0..4 {
            // One that ends early, and pages that were used before.
            server.ask("postgres", &format!("UPDATE item SET n = -n WHERE n % 4 = {number}")).unwrap();
            server.ask("postgres", "SELECT pg_switch_wal()").unwrap();
            server.ask("postgres", "CHECKPOINT").unwrap();
        }
        caught_up(&repository, &server, 1);
        let switched = server.ask("postgres", "SELECT last_archived_wal FROM pg_stat_archiver");
        drop(switched);
    });
    followed.unwrap();
    let journals = repository.journals().unwrap();
    let stretch = &journals[0].stretches()[0];
    let (start, end) =
        (Lsn::from_position(&stretch.start).unwrap().0, Lsn::from_position(&stretch.end).unwrap().0);
    let mut received = vec![0; (end - start) as usize];
    for change in journals[0].read(&stretch.start).unwrap() {
        let change = change.unwrap();
        let at = (Lsn::from_position(&change.start).unwrap().0 - start) as usize;
        received[at..at + change.bytes.len()].copy_from_slice(&change.bytes);
    }
    let mut compared = 0;
    for (number, segment) in received.chunks_exact(SEGMENT as usize).enumerate() {
        let name = Lsn(start + number as u64 * SEGMENT).file_name(1, SEGMENT);
        let Ok(archived) = std::fs::read(archive.path().join(&name)) else { continue };
        assert!(archived == segment, "{name} differs");
        compared += 1;
    }
    assert!(compared >= 8, "only {compared} segments were archived");
}
