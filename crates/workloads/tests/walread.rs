//! The reader of write-ahead logs, beside the server's own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use mainstay_core::{Code, Result};
use mainstay_testkit::lab::{Postgres, PostgresPlan};
use mainstay_testkit::{Rng, for_each_seed};
use mainstay_workloads::postgres::Lsn;
use mainstay_workloads::postgres::walread::{Record, WalReader};

const MANAGERS: [&str; 22] = [
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
];
const FORKS: [&str; 4] = ["", "fork fsm ", "fork vm ", "fork init "];
const SEGMENT: u64 = 1 << 20;

/// As `pg_waldump` writes it, without what it says in words of its own.
fn line(record: &Record<'_>) -> String {
    let place = |lsn: Lsn| format!("{:X}/{:08X}", lsn.0 >> 32, lsn.0 & 0xffff_ffff);
    let blocks = record.blocks.iter().map(|block| {
        let fork = FORKS[usize::from(block.fork)];
        format!(" #{}: rel {} {fork}blk {}", block.id, block.relation, block.number)
    });
    format!(
        "{} {} {} {} {}{}",
        MANAGERS[usize::from(record.manager)],
        record.length,
        record.transaction,
        place(record.start),
        place(record.previous),
        blocks.collect::<String>()
    )
}

fn theirs(dumped: &str) -> Vec<String> {
    let after = |line: &str, name: &str| -> String {
        let rest = line.split_once(name).unwrap().1.trim_start();
        rest.split([',', ' ']).next().unwrap().to_owned()
    };
    let mut lines = Vec::new();
    for line in dumped.lines().filter(|line| line.starts_with("rmgr:")) {
        let total = line.split_once("(rec/tot):").unwrap().1.split_once('/').unwrap().1.trim_start();
        let mut shown = format!(
            "{} {} {} {} {}",
            after(line, "rmgr:"),
            total.split(',').next().unwrap(),
            after(line, ", tx:"),
            after(line, ", lsn:"),
            after(line, ", prev ")
        );
        for block in line.split("blkref ").skip(1) {
            let mut words = block.split([' ', ',']);
            let mut next = || words.next().unwrap_or_default();
            let (id, rel, relation, word) = (next(), next(), next(), next());
            shown += &format!(" {id} {rel} {relation} ");
            if word == "fork" {
                shown += &format!("fork {} ", next());
                next();
            }
            shown += &format!("blk {}", next());
        }
        lines.push(shown);
    }
    lines
}

/// A log with a bit of everything, and where it begins and ends.
fn log(level: &str) -> (Vec<u8>, u64, Vec<String>) {
    let settings = [
        ("fsync", "off"),
        ("wal_level", level),
        ("max_prepared_transactions", "5"),
        ("wal_keep_size", "1GB"),
    ];
    let mut server =
        Postgres::start(&PostgresPlan { segment: 1, settings: &settings, ..PostgresPlan::default() })
            .unwrap();
    let ask = |sql: &str| server.ask("postgres", sql).unwrap();
    let start = ask("SELECT file_name FROM pg_walfile_name_offset(pg_current_wal_insert_lsn())");
    for sql in [
        "CREATE TABLE t (id int PRIMARY KEY, body text, more jsonb)",
        "INSERT INTO t SELECT n, repeat(md5(n::text), n % 200), '{}' FROM generate_series(1, 3000) n",
        "CREATE INDEX ON t USING gin (more)",
        "CHECKPOINT",
        "UPDATE t SET body = body || 'x' WHERE id % 7 = 0",
        "DELETE FROM t WHERE id % 11 = 0",
        "SELECT pg_switch_wal()",
        "BEGIN; SAVEPOINT a; INSERT INTO t VALUES (-1); ROLLBACK TO a; SAVEPOINT b; INSERT INTO t VALUES (-2); COMMIT",
        "BEGIN; DELETE FROM t WHERE id = 5; PREPARE TRANSACTION 'p'",
        "COMMIT PREPARED 'p'",
        "BEGIN; SELECT * FROM t WHERE id = 6 FOR UPDATE; ROLLBACK",
        "COPY (SELECT n, 'y' FROM generate_series(10000, 10500) n) TO '/dev/null'",
        "VACUUM t",
        "CREATE TABLE big AS SELECT string_agg(md5(n::text), '') s FROM generate_series(1, 100000) n",
        "TRUNCATE big",
        "VACUUM FULL t",
        "CREATE DATABASE other",
        "SELECT pg_logical_emit_message(true, 'm', repeat('z', 100000))",
    ] {
        for sql in sql.split("; ").collect::<Vec<_>>().chunks(99) {
            ask(&sql.join("; "));
        }
    }
    let end = ask("SELECT pg_current_wal_insert_lsn()");
    let at = server.data().join("pg_wal");
    let last = ask("SELECT file_name FROM pg_walfile_name_offset(pg_current_wal_insert_lsn())");
    let dumped = server.run("pg_waldump", &["-p", &at.display().to_string(), "-e", &end, &start, &last]);
    let dumped = theirs(&dumped.unwrap());
    server.stop();
    let mut names: Vec<String> = std::fs::read_dir(&at)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.len() == 24 && *name >= start && *name <= last)
        .collect();
    names.sort();
    let bytes = names.iter().flat_map(|name| std::fs::read(at.join(name)).unwrap()).collect();
    let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let begin = (number(&start[8..16]) << 32) | (number(&start[16..24]) * SEGMENT);
    (bytes, begin, dumped)
}

fn read(bytes: &[u8], begin: u64, rng: &mut Rng, told: &mut Vec<String>) -> Result<()> {
    let mut reader = WalReader::new(SEGMENT);
    let (mut at, mut rest) = (begin, bytes);
    let mut each = |record: &Record<'_>| {
        // Looked at, so that it is shown not to panic.
        let _rows = record.rows();
        let _end = record.ending();
        told.push(line(record));
        Ok(())
    };
    while !rest.is_empty() {
        let most = if rng.chance(50) { 50 } else { 70_000 };
        let length = (1 + rng.below(most)).min(rest.len());
        reader.push(Lsn(at), &rest[..length], &mut each)?;
        (at, rest) = (at + length as u64, &rest[length..]);
    }
    reader.finish(&mut each)
}

#[test]
fn the_log_reads_as_the_servers_own_program_reads_it_however_it_is_cut() {
    for level in ["replica", "logical"] {
        let (bytes, begin, dumped) = log(level);
        let mut told = Vec::new();
        read(&bytes, begin, &mut Rng::new(7), &mut told).unwrap();
        assert!(dumped.len() > 5000, "{}", dumped.len());
        for (ours, theirs) in told.iter().zip(&dumped) {
            assert_eq!(ours, theirs);
        }
        // What came while the server went down is behind what it was asked about.
        assert!(told.len() >= dumped.len(), "{} {}", told.len(), dumped.len());
        broken(&bytes, begin, &told);
        other_versions(&bytes, begin);
    }
}

/// Torn and spoiled logs: whatever is told was so in the whole one, and nothing panics.
fn broken(bytes: &[u8], begin: u64, whole: &[String]) {
    let whole: std::collections::HashSet<&String> = whole.iter().collect();
    let (mut refused, mut silent) = (0, 0);
    for_each_seed(150, |seed| {
        let mut rng = Rng::new(seed);
        let from = rng.below(bytes.len() / 8192) * 8192;
        let mut part = bytes[from..(from + 400_000).min(bytes.len())].to_vec();
        for _ in 0..1 + rng.below(3) {
            let at = rng.below(part.len());
            match rng.below(4) {
                0 => part[at] ^= 1 << rng.below(8),
                1 => part.truncate(at.max(1)),
                2 => {
                    let end = (at + rng.below(5000)).min(part.len());
                    rng.fill(&mut part[at..end]);
                }
                // An older page in its place.
                _ => {
                    let page = at / 8192 * 8192;
                    let other = rng.below(bytes.len() / 8192) * 8192;
                    let end = (page + 8192).min(part.len());
                    part[page..end].copy_from_slice(&bytes[other..other + end - page]);
                }
            }
        }
        let mut told = Vec::new();
        match read(&part, begin + from as u64, &mut rng, &mut told) {
            Ok(()) => silent += 1,
            Err(error) => {
                assert!(matches!(error.code(), Code::Integrity | Code::Unsupported), "{error:?}");
                refused += 1;
            }
        }
        assert!(told.iter().all(|line| whole.contains(line)));
    });
    assert!(refused > silent, "{refused} {silent}");
}

fn other_versions(bytes: &[u8], begin: u64) {
    for (magic, version) in [(0xd10d_u16, "14"), (0xd113, "16"), (0xd118, "18")] {
        let mut page = bytes[..8192].to_vec();
        page[..2].copy_from_slice(&magic.to_le_bytes());
        let error = read(&page, begin, &mut Rng::new(1), &mut Vec::new()).unwrap_err();
        assert_eq!(error.code(), Code::Unsupported);
        assert!(error.what().contains(&format!("PostgreSQL {version},")), "{error:?}");
    }
}
