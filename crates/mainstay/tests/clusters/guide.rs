//! The guide `docs/guides/postgresql.md` is followed to the letter: every line that it tells an administrator to type is
//! typed, at a server of the test's own. What is put in the place of names that are only examples is in
//! [`Stage::as_here`]; nothing else is changed.

use std::time::Duration;

use mainstay_testkit::lab::{Postgres, PostgresPlan, patiently};

use crate::home::{Home, Running};

const GUIDE: &str = include_str!("../../../../docs/guides/postgresql.md");
const ADDRESS: &str = "postgres://backup@db.example/postgres";
const MOMENT: &str = "2026-11-22 10:41:07+01:00";
/// What the tests of `databases.rs` type: it needs servers that are stopped and started.
const ELSEWHERE: [&str; 6] =
    ["--in-place", "db standby", "--offline", "  --stop", "db export", "mainstay cat shop-export"];
const LIMIT: Duration = Duration::from_secs(120);

struct Stage {
    home: Home,
    server: Postgres,
    follower: Option<Running>,
    moment: String,
}

#[test]
fn every_line_of_the_guide_does_what_it_says() {
    let access = "local all postgres trust\n";
    let server = Postgres::start(&PostgresPlan { access, ..PostgresPlan::default() }).unwrap();
    let home = Home::new();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_mainstay"), home.at("mainstay")).unwrap();
    server.ask("postgres", "CREATE TABLE customers (n int)").unwrap();
    server.ask("postgres", "CREATE DATABASE shop").unwrap();
    server.ask("shop", "CREATE TABLE customers AS SELECT n FROM generate_series(1, 2000) n").unwrap();
    let mut stage = Stage { home, server, follower: None, moment: String::new() };
    let blocks = blocks(GUIDE);
    assert!(blocks.len() >= 7, "the guide has become shorter than its test: {blocks:?}");
    for (kind, lines) in blocks {
        for line in lines {
            println!("{kind} {line}");
            match kind {
                "sql" => drop(stage.server.ask("postgres", line).unwrap()),
                "sh" if ELSEWHERE.iter().any(|other| line.contains(other)) => {}
                "sh" => stage.type_in(line),
                _ if line.starts_with("hostssl") => stage.let_in(line),
                _ => assert!(line.contains("db push-wal --name shop %p"), "{line}"),
            }
        }
    }
    let copy = Postgres::adopt(&stage.home.at("again")).unwrap();
    assert_eq!(copy.ask("postgres", "SELECT string_agg(n::text, ' ') FROM customers").unwrap(), "1");
    assert_eq!(stage.follower.take().unwrap().interrupt(), Some(0));
}

fn blocks(guide: &str) -> Vec<(&str, Vec<&str>)> {
    let (mut blocks, mut inside) = (Vec::new(), false);
    for line in guide.lines() {
        match line.strip_prefix("```") {
            Some(_) if inside => inside = false,
            Some(kind) => {
                inside = true;
                blocks.push((kind, Vec::new()));
            }
            None if inside => blocks.last_mut().unwrap().1.push(line),
            None => {}
        }
    }
    blocks
}

impl Stage {
    fn as_here(&self, line: &str) -> String {
        let address = self.server.address().replace("user=postgres", "user=backup");
        let to = self.home.at("again").display().to_string();
        line.replace(ADDRESS, &address)
            .replace("/var/lib/postgresql/15/again", &to)
            .replace(MOMENT, &self.moment)
    }

    /// On a socket, where nothing is encrypted.
    fn let_in(&self, line: &str) {
        let rule = line.replace("hostssl", "local").replace("192.0.2.7/32", "") + "\n";
        let file = self.server.data().join("pg_hba.conf");
        let rules = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, rules + &rule).unwrap();
        self.server.ask("postgres", "SELECT pg_reload_conf()").unwrap();
        // The password that the guide has.
        let passwords = self.home.at(".pgpass");
        std::fs::write(&passwords, "*:*:*:backup:…\n").unwrap();
        std::fs::set_permissions(&passwords, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }

    #[track_caller]
    fn type_in(&mut self, line: &str) {
        if line.contains("db follow") {
            let words = format!("exec {} --json", self.as_here(line));
            self.follower = Some(self.home.start_shell("follow.log", &words));
            return self.work();
        }
        let output = self.home.plain("sh").args(["-c", &self.as_here(line)]).output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        println!("{said}");
        assert!(output.status.success(), "{line}: {:?}\n{said}", output.status);
        let wanted = match line {
            line if line.contains("db status") => "slot mainstay: reserved",
            "mainstay status" => "any moment from",
            _ => "",
        };
        assert!(said.contains(wanted), "{line}: {said}");
    }

    /// Something happens before the moment and behind it, and is stored.
    fn work(&mut self) {
        self.server.ask("postgres", "INSERT INTO customers VALUES (1)").unwrap();
        self.moment = self.server.ask("postgres", "SELECT clock_timestamp()").unwrap();
        self.server.ask("postgres", "INSERT INTO customers VALUES (2)").unwrap();
        let flushed = self.server.ask("postgres", "SELECT pg_current_wal_flush_lsn()").unwrap();
        let place = |text: &str| text.parse::<mainstay_workloads::postgres::Lsn>().ok();
        patiently("the journal", LIMIT, || {
            let promised = self.home.promised("shop").and_then(|end| place(&end));
            Ok((promised >= place(&flushed)).then_some(()))
        })
        .unwrap();
    }
}
