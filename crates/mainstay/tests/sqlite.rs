//! `mainstay db` for SQLite as people use it: the real binary beside a program that writes, killed again and again.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![expect(clippy::disallowed_methods, reason = "these tests start the program and kill it")]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use mainstay_core::Clock as _;
use mainstay_testkit::lab::{PATIENCE, SqliteShell, patiently};
use mainstay_testkit::{RealClock, Rng};

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let made = place.run(&["init", "--generate-key", "--kit", place.path("kit").to_str().unwrap()]);
        assert!(made.status.success(), "{made:?}");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
        command.env_clear().env("HOME", self.0.path()).env("PATH", "/usr/bin:/bin").args(words);
        command.env("XDG_STATE_HOME", self.path("state")).current_dir(self.0.path()).stdin(Stdio::null());
        command.arg("--repository").arg(self.path("repository")).arg("--key-file").arg(self.path("key"));
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    fn ok(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn follow(&self, address: &str) -> Child {
        let words = ["db", "follow", address, "--name", "app", "--every", "100ms"];
        self.command(&words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }
}

fn bank(path: &Path) -> SqliteShell {
    let mut shell = SqliteShell::open(path).unwrap();
    let table = "CREATE TABLE account (id INTEGER PRIMARY KEY, amount INT); CREATE TABLE done (n INTEGER PRIMARY KEY);";
    shell.ask("PRAGMA journal_mode = WAL;").unwrap();
    shell.ask(&format!("{table} INSERT INTO account VALUES (1, 500), (2, 500), (3, 500);")).unwrap();
    shell
}

fn transfer(shell: &mut SqliteShell, rng: &mut Rng) -> u64 {
    let (from, to) = (1 + rng.below(3), 1 + rng.below(3));
    let answer = shell.ask(&format!(
        "BEGIN IMMEDIATE; UPDATE account SET amount = amount - 1 WHERE id = {from};
         UPDATE account SET amount = amount + 1 WHERE id = {to};
         INSERT INTO done SELECT 1 + ifnull(max(n), 0) FROM done RETURNING n; COMMIT;"
    ));
    answer.unwrap().parse().unwrap()
}

/// How many transfers a copy has; none before may be missing and nothing may have come or gone.
fn check(path: &Path) -> u64 {
    let mut copy = SqliteShell::open(path).unwrap();
    assert_eq!(copy.ask("PRAGMA integrity_check;").unwrap(), "ok");
    assert_eq!(copy.ask("SELECT sum(amount) FROM account;").unwrap(), "1500");
    let done = copy.ask("SELECT count(*), ifnull(max(n), 0) FROM done;").unwrap();
    let (count, last) = done.split_once('|').unwrap();
    assert_eq!(count, last, "a transfer is missing");
    last.parse().unwrap()
}

#[test]
fn a_follower_that_is_killed_again_and_again_loses_nothing_that_was_stored_and_names_its_holes() {
    let seed = RealClock.now().0 as u64;
    println!("seed {seed}");
    let mut rng = Rng::new(seed);
    let place = Place::new();
    let database = place.path("app.db");
    let mut shell = bank(&database);
    let address = format!("sqlite:{}", database.display());
    for _ in 0..5 {
        let mut follower = place.follow(&address);
        let end = RealClock.monotonic() + Duration::from_millis(rng.range(300..2500));
        while RealClock.monotonic() < end {
            transfer(&mut shell, &mut rng);
        }
        follower.kill().unwrap();
        follower.wait().unwrap();
        for _ in 0..rng.below(30) {
            transfer(&mut shell, &mut rng);
        }
    }
    let mut follower = place.follow(&address);
    // Long enough for it to have begun, whatever it had to make up for.
    let mut last = 0;
    for number in 0..3 {
        last = transfer(&mut shell, &mut rng);
        let stored = patiently("what was committed", PATIENCE, || {
            let to = place.path(&format!("try-{number}-{}", RealClock.monotonic().as_nanos()));
            let done = place.run(&["db", "restore", "app", "--to", to.to_str().unwrap()]);
            let has = if done.status.success() { check(&to.join("app.db")) } else { 0 };
            let _removed = std::fs::remove_dir_all(&to);
            Ok((has >= last).then_some(has))
        });
        assert_eq!(stored.unwrap(), last);
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&follower), rustix::process::Signal::TERM)
        .unwrap();
    follower.wait().unwrap();
    let status = place.ok(&["db", "status", "app"]);
    let spans = status.lines().filter(|line| line.contains("any moment")).count();
    let holes: Vec<&str> = status.lines().filter(|line| line.contains("HOLE")).collect();
    assert_eq!(spans, holes.len() + 1, "{status}");
    assert!(holes.iter().all(|hole| hole.contains("anew")), "{status}");
    // Any place of any span: the bank is whole.
    for line in status.lines().filter(|line| line.contains("any moment")) {
        let log = line.split("log ").last().unwrap();
        let end = log.split(" to ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        let (generation, frame) = end.split_once(':').unwrap();
        for _ in 0..2 {
            let to = place.path("random");
            let at = format!("{generation}:{}", 1 + rng.below(frame.parse::<usize>().unwrap()));
            let done = place.run(&["db", "restore", "app", "--position", &at, "--to", to.to_str().unwrap()]);
            if done.status.success() {
                assert!(check(&to.join("app.db")) <= last);
                std::fs::remove_dir_all(&to).unwrap();
            } else {
                assert!(String::from_utf8_lossy(&done.stderr).contains("these spans can be"), "{done:?}");
            }
        }
    }
}

#[test]
fn what_stands_in_the_way_of_a_backup_is_said_with_what_to_do() {
    let place = Place::new();
    std::fs::set_permissions(place.0.path(), PermissionsExt::from_mode(0o777)).unwrap();
    let fails = |words: &[&str], uid: Option<u32>| {
        let mut command = place.command(words);
        uid.map(|uid| command.uid(uid).gid(uid));
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let noise = place.path("noise.db");
    std::fs::write(&noise, [7; 5000]).unwrap();
    let said = fails(&["db", "backup", &format!("sqlite:{}", noise.display())], None);
    assert!(said.contains("encrypted") && said.contains("--quiesce"), "{said}");
    let said = fails(&["db", "backup", "sqlite:"], None);
    assert!(said.contains("sqlite:/var/lib/app"), "{said}");
    let said = fails(&["db", "restore", "app", "--to", "x"], None);
    assert!(said.contains("mainstay points"), "{said}");

    let closed = place.path("closed");
    std::fs::create_dir(&closed).unwrap();
    let database = closed.join("app.db");
    let mut shell = bank(&database);
    let address = format!("sqlite:{}", database.display());
    if rustix::process::geteuid().is_root() {
        // Somebody who may read it and nothing else, with a repository that is theirs.
        for path in ["repository", "key", "state"] {
            let _all = Command::new("chown").arg("-R").arg("65534:65534").arg(place.path(path)).status();
        }
        let said = fails(&["db", "backup", &address], Some(65534));
        assert!(said.contains("must be able to write to the database and its directory"), "{said}");
        for path in ["repository", "key", "state"] {
            let _all = Command::new("chown").arg("-R").arg("0:0").arg(place.path(path)).status();
        }
    }
    shell.ask("BEGIN IMMEDIATE;").unwrap();
    let said = fails(&["db", "backup", &address], None);
    assert!(said.contains("another program keeps it locked"), "{said}");
    shell.ask("COMMIT;").unwrap();
    place.ok(&["db", "backup", &address, "--name", "app"]);
    let said = fails(&["db", "restore", "app", "--lsn", "0/1", "--to", "x"], None);
    assert!(said.contains("--position"), "{said}");
    let said = fails(&["db", "restore", "app", "--at", "2001-01-01 00:00:00", "--to", "x"], None);
    assert!(said.contains("cannot be recovered"), "{said}");
}

/// Types every `sh` line of the page, with the page's directories moved to where the test may write.
#[test]
fn every_line_of_the_guide_to_sqlite_does_what_it_says() {
    let place = Place::new();
    let page = include_str!("../../../docs/guides/sqlite.md");
    let (lib, srv) = (place.path("lib"), place.path("srv"));
    std::fs::create_dir_all(lib.join("app")).unwrap();
    std::fs::create_dir_all(lib.join("other")).unwrap();
    std::fs::create_dir(&srv).unwrap();
    let mut shell = bank(&lib.join("app/app.db"));
    drop(bank(&lib.join("other/app.db")));
    let mut rng = Rng::new(1);
    let blocks = page.split("```sh\n").skip(1).filter_map(|rest| rest.split_once("```"));
    let lines: Vec<&str> = blocks.flat_map(|(block, _)| block.lines()).collect();
    assert_eq!(lines.len(), 7, "the page lost or gained lines");
    for line in lines {
        let line = line.replace("/var/lib", lib.to_str().unwrap()).replace("/srv", srv.to_str().unwrap());
        let words: Vec<&str> = line.split(' ').skip(1).map(|word| word.trim_matches('\'')).collect();
        if words.contains(&"follow") {
            let mut follower = place.command(&words).stdout(Stdio::null()).spawn().unwrap();
            RealClock.sleep(Duration::from_secs(2));
            for _ in 0..10 {
                transfer(&mut shell, &mut rng);
            }
            RealClock.sleep(Duration::from_secs(3));
            let pid = rustix::process::Pid::from_child(&follower);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
            assert!(follower.wait().unwrap().success());
            continue;
        }
        let said = place.ok(&words);
        match words.as_slice() {
            ["db", "status", ..] => assert!(said.contains("any moment from"), "{said}"),
            ["drill", ..] => assert!(said.contains("is proven"), "{said}"),
            ["db", "restore", ..] => assert!(said.contains("sound"), "{said}"),
            _ => assert!(said.contains("point"), "{said}"),
        }
    }
    assert_eq!(check(&srv.join("again/app.db")), 10);
}
