//! Private copies of a cluster of a real server, by the real program.

#![cfg(test)]
#![expect(clippy::disallowed_methods, reason = "these tests start the program")]

use std::io::BufRead as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use mainstay_testkit::at_home;
use mainstay_testkit::lab::{Postgres, PostgresPlan};

/// A person with a cluster, a repository, and a place for private copies.
struct User {
    directory: tempfile::TempDir,
    server: Postgres,
}

impl User {
    fn new() -> Self {
        let directory = tempfile::Builder::new().prefix("ms-db-").tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::create_dir(directory.path().join("scratch")).unwrap();
        let user = Self { directory, server: Postgres::start(&PostgresPlan::default()).unwrap() };
        let rows = "INSERT INTO item SELECT n, repeat('x', 100) FROM generate_series(1, 5000) n";
        user.ask("CREATE TABLE item (n int PRIMARY KEY, t text)");
        user.ask(rows);
        user
    }

    fn ask(&self, sql: &str) -> String {
        self.server.ask("postgres", sql).unwrap()
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = at_home(env!("CARGO_BIN_EXE_mainstay"), self.directory.path());
        command.args(arguments);
        command
    }

    fn output(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn run(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn back_up(&self) {
        self.run(&["db", "backup", &self.server.address(), "--name", "shop"]);
    }

    /// A verb for private copies.
    fn private<'a>(&self, words: &[&'a str], scratch: &'a str) -> Vec<&'a str> {
        [words, &["--scratch", scratch]].concat()
    }

    fn nothing_is_left(&self) {
        let scratch = self.at("scratch");
        let left: Vec<_> = std::fs::read_dir(&scratch).unwrap().flatten().collect();
        assert!(left.is_empty() && users(&scratch).is_empty(), "{left:?} {:?}", users(&scratch));
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(scratch.to_str().unwrap()), "{mounts}");
    }
}

/// Programs that have something to do with a directory.
fn users(directory: &Path) -> Vec<String> {
    let words = |entry: std::fs::DirEntry| std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
    let all = std::fs::read_dir("/proc").unwrap().flatten().map(words);
    let all = all.map(|words| String::from_utf8_lossy(&words).into_owned());
    all.filter(|words| words.contains(directory.to_str().unwrap()) && words.contains("postgres")).collect()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Starts, and returns when the copy answers.
fn opened(mut command: Command) -> (Child, serde_json::Value) {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let line = lines.find(|line| line.as_ref().unwrap().contains("cluster_opened")).unwrap().unwrap();
    std::thread::spawn(move || lines.for_each(drop));
    (child, serde_json::from_str(&line).unwrap())
}

#[test]
fn a_copy_at_a_moment_is_opened_and_leaves_nothing_even_when_it_is_killed() {
    let user = User::new();
    user.back_up();
    let place = user.ask("SELECT pg_current_wal_insert_lsn()");
    user.ask("DELETE FROM item WHERE n > 10");
    user.back_up();
    let scratch = user.at("scratch").display().to_string();
    let before = format!("shop@{place}");
    let count = "psql -XAtc 'SELECT count(*) FROM item'";
    for (target, full, items) in
        [(before.as_str(), false, "5000"), ("shop", false, "10"), (&before, true, "5000")]
    {
        let mut words = user.private(&["open", target, "--command", count], &scratch);
        words.extend(full.then_some("--full"));
        let told = user.run(&words);
        assert!(told.lines().any(|line| line == items), "{target}: {told}");
    }
    // What the line says of itself is the status.
    let words = user.private(&["open", "shop", "--command", "exit 3"], &scratch);
    let failed = user.output(&words);
    assert_eq!(failed.status.code(), Some(1), "{}", said(&failed));
    user.nothing_is_left();

    let (mut child, told) = opened(user.command(&user.private(&["open", "shop", "--json"], &scratch)));
    assert_eq!((told["lazy"].as_bool(), told["end_of_log"].as_bool()), (Some(true), Some(true)), "{told}");
    assert!(told["address"].as_str().unwrap().starts_with("postgres:///postgres?host=/"), "{told}");
    assert!(told["bytes_fetched"].as_u64() < told["bytes_whole"].as_u64(), "{told}");
    assert!(!users(&user.at("scratch")).is_empty());
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while std::fs::read_dir(user.at("scratch")).unwrap().count() > 0 && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(50));
    }
    user.nothing_is_left();
    // The hold on the point that was killed ends by itself; the one that was not has gone.
    assert!(!user.run(&["points", "show", "shop"]).contains("drilled"));
}

#[test]
fn a_cluster_goes_back_to_a_directory_and_in_place_and_as_a_standby() {
    let mut user = User::new();
    user.back_up();
    let place = user.ask("SELECT pg_current_wal_insert_lsn()");
    user.ask("DELETE FROM item WHERE n > 10");
    user.back_up();
    let (to, standby) = (user.at("again"), user.at("standby"));
    let before = format!("shop@{place}");
    user.run(&["restore", &before, "--to", to.to_str().unwrap()]);
    let copy = Postgres::adopt(&to).unwrap();
    assert_eq!(copy.ask("postgres", "SELECT count(*) FROM item").unwrap(), "5000");
    let address = user.server.address();
    user.run(&["db", "standby", "shop", "--to", standby.to_str().unwrap(), "--primary", &address]);
    let standby = Postgres::adopt_standby(&standby).unwrap();
    assert_eq!(standby.ask("postgres", "SELECT count(*) FROM item").unwrap(), "10");
    drop(standby);
    let data = user.server.data().display().to_string();
    let words = ["db", "restore", "shop", "--in-place", &data, "--lsn", &place, "--yes"];
    let refused = user.output(&words);
    assert!(said(&refused).contains("a server runs"), "{}", said(&refused));
    user.server.stop();
    assert!(said(&user.output(&words)).contains("what was there is"));
    user.server.resume().unwrap();
    assert_eq!(user.ask("SELECT count(*) FROM item"), "5000");
}

#[test]
fn an_export_that_fails_is_none_and_one_that_does_not_is_the_same_database() {
    let user = User::new();
    user.ask("CREATE ROLE seller LOGIN PASSWORD 'secret'");
    user.ask("CREATE DATABASE \"Größe / 1\"");
    let odd = "CREATE TABLE t AS SELECT n, md5(n::text) m FROM generate_series(1, 1000) n";
    user.server.ask("Größe / 1", odd).unwrap();
    user.run(&["db", "export", &user.server.address(), "--name", "dump"]);
    let globals = user.run(&["cat", "dump", "/globals.sql"]);
    assert!(globals.contains("CREATE ROLE seller"), "{globals}");
    let again = Postgres::start(&PostgresPlan::default()).unwrap();
    let sum = "SELECT count(*) || md5(string_agg(t::text, ',' ORDER BY n)) FROM";
    for (name, file, table) in [("postgres", "postgres", "item"), ("Größe / 1", "Größe %2F 1", "t")] {
        if name != "postgres" {
            again.ask("postgres", &format!("CREATE DATABASE \"{name}\"")).unwrap();
        }
        let sql = again.directory().join("dump.sql");
        std::fs::write(&sql, user.run(&["cat", "dump", &format!("/databases/{file}.sql")])).unwrap();
        std::fs::set_permissions(&sql, std::fs::Permissions::from_mode(0o644)).unwrap();
        again.client("psql", &["-X", "-q", "-d", name, "-f", sql.to_str().unwrap()]).unwrap();
        let same = |server: &Postgres| server.ask(name, &format!("{sum} {table} t")).unwrap();
        assert_eq!(same(&again), same(&user.server), "{name}");
    }
    // A second one stores little; one whose program fails is no point.
    user.run(&["db", "export", &user.server.address(), "--name", "dump"]);
    user.ask("CREATE ROLE blind LOGIN");
    let blind = user.server.address().replace("user=postgres", "user=blind");
    let failed = user.output(&["db", "export", &blind, "--name", "dump"]);
    assert_eq!(failed.status.code(), Some(1), "{}", said(&failed));
    assert!(said(&failed).contains("permission denied"), "{}", said(&failed));
    assert_eq!(user.run(&["points", "dump", "--json"]).matches("\"type\":\"point\"").count(), 2);
}

/// The lines that stop and start a server.
fn lines(server: &Postgres) -> (String, String) {
    let (data, place) = (server.data().display(), server.directory().display());
    let stop = format!(
        "kill -INT $(head -1 {data}/postmaster.pid); while [ -e {data}/postmaster.pid ]; do sleep 0.05; done"
    );
    let root =
        if users_are_others() { "setpriv --reuid=postgres --regid=postgres --init-groups " } else { "" };
    let newest = "$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -1)/pg_ctl";
    let options = format!("-o '-k {place} -c listen_addresses='");
    (stop, format!("{root}{newest} -D {data} {options} -l {place}/again.log -w start"))
}

fn users_are_others() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn a_server_that_was_stopped_for_a_backup_runs_again_even_when_that_is_killed() {
    let user = User::new();
    let data = user.server.data().display().to_string();
    let (stop, start) = lines(&user.server);
    let address = user.server.address();
    let words = ["db", "backup", &address, "--name", "shop", "--offline", &data, "--start", &start, "--stop"];
    let told = user.run(&[&words[..], &[&stop, "--json"]].concat());
    assert!(told.contains("\"away_seconds\":"), "{told}");
    assert_eq!(user.ask("SELECT count(*) FROM item"), "5000");
    // Killed while the server is away.
    let (mark, slow) = (user.at("mark"), user.at("scratch"));
    let slowly = format!("{stop}; touch {}; sleep 60 # {}", mark.display(), slow.display());
    let mut child = user.command(&[&words[..], &[&slowly]].concat()).spawn().unwrap();
    while !mark.exists() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while user.server.ask("postgres", "SELECT 1").is_err() {
        assert!(std::time::Instant::now() < deadline, "nobody starts it");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(user.run(&["points", "shop", "--json"]).matches("\"type\":\"point\"").count(), 1);
    user.server.run("pg_ctl", &["-D", &data, "-m", "immediate", "stop"]).unwrap();
}

#[test]
fn a_drill_proves_a_point_or_says_what_failed() {
    let user = User::new();
    user.back_up();
    let scratch = user.at("scratch").display().to_string();
    let file = user.at("assertions.sql");
    std::fs::write(&file, "SELECT count(*) = 5000 FROM item;\nSELECT pg_is_in_recovery();\n").unwrap();
    let file = file.display().to_string();
    let words = ["drill", "shop", "--json", "--checks", &file, "--check", "SELECT max(n) = 5000 FROM item"];
    let told = user.run(&user.private(&words, &scratch));
    let told = told.lines().find(|line| line.contains("\"drilled\"")).unwrap();
    for part in ["3 assertions held", "pg_amcheck found nothing"] {
        assert!(told.contains(part), "{told}");
    }
    let status = user.run(&["status", "--json"]);
    assert!(status.contains("\"last_proven\":\"2"), "{status}");

    let evidence = user.at("evidence").display().to_string();
    let words =
        ["drill", "shop", "--quick", "--check", "SELECT count(*) = 1 FROM item", "--evidence", &evidence];
    let failed = user.output(&user.private(&words, &scratch));
    assert_eq!(failed.status.code(), Some(1), "{}", said(&failed));
    assert!(said(&failed).contains("answered \"f\", not true"), "{}", said(&failed));
    assert!(std::fs::read_to_string(user.at("evidence/server.log")).unwrap().contains("starting PostgreSQL"));
    user.nothing_is_left();
}

#[test]
fn a_copy_whose_content_is_damaged_fails_loudly() {
    let user = User::new();
    // Not in memory and not in the first pages that a server reads.
    user.ask("INSERT INTO item SELECT n, md5(n::text) || repeat(md5((n * 7)::text), 20) FROM generate_series(5001, 60000) n");
    user.back_up();
    let scratch = user.at("scratch").display().to_string();
    let repository = user.run(&["status", "--json"]);
    let at = repository.lines().find_map(|line| {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        Some(line["location"].as_str()?.to_owned())
    });
    let packs = find_packs(Path::new(&at.unwrap()));
    let largest = packs.iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(largest).unwrap();
    let (from, to) = (bytes.len() / 4, bytes.len() * 3 / 4);
    bytes[from..to].iter_mut().for_each(|byte| *byte = !*byte);
    std::fs::set_permissions(largest, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(largest, bytes).unwrap();
    for verb in
        [&["drill", "shop"][..], &["open", "shop", "--command", "psql -Xc 'SELECT sum(length(t)) FROM item'"]]
    {
        let failed = user.output(&user.private(verb, &scratch));
        assert!(!failed.status.success(), "{}", said(&failed));
        assert!(said(&failed).contains("is damaged"), "{}", said(&failed));
    }
    assert!(!user.run(&["status", "--json"]).contains("\"last_proven\":\"2"));
    user.nothing_is_left();
}

fn find_packs(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        match entry.file_type().unwrap().is_dir() {
            true => found.extend(find_packs(&entry.path())),
            false if entry.path().components().any(|part| part.as_os_str() == "pack") => {
                found.push(entry.path());
            }
            false => {}
        }
    }
    found
}
