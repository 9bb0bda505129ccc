//! `mainstay db` for MariaDB as people use it: the real binary, a real server, an account with no more than the guide says.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![expect(clippy::disallowed_methods, reason = "these tests start the program and kill it")]

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use mainstay_core::Clock as _;
use mainstay_testkit::RealClock;
use mainstay_testkit::lab::{MariaDb, PATIENCE, patiently};
use rustix::process::{Pid, Signal, kill_process};

const PASSWORD: &str = "canary 7f3a \"quoted\" \\ horse";
const LOG: &[&str] = &["--log-bin=mariadb-bin", "--server-id=1"];
const GUIDE: &str = include_str!("../../../docs/guides/mariadb.md");

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::Builder::new().prefix("ms-myc-").tempdir().unwrap());
        std::fs::set_permissions(place.0.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let made = place.run(&["init", "--generate-key", "--kit", place.path("kit").to_str().unwrap()]);
        assert!(made.status.success(), "{made:?}");
        std::fs::write(place.path("password"), format!("{PASSWORD}\n")).unwrap();
        std::fs::write(place.path("wrong"), "not this one\n").unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mainstay"));
        let path = format!("{}:/usr/bin:/bin:/usr/sbin:/sbin", self.path("bin").display());
        command.env_clear().env("HOME", self.0.path()).env("PATH", path).args(words);
        command.env("XDG_STATE_HOME", self.path("state")).current_dir(self.0.path()).stdin(Stdio::null());
        command.arg("--repository").arg(self.path("repository")).arg("--key-file").arg(self.path("key"));
        command
    }

    /// Nothing that it says, and nothing that it starts, may hold the password.
    fn run(&self, words: &[&str]) -> Output {
        let output = self.command(words).output().unwrap();
        let said = [output.stdout.as_slice(), &output.stderr].concat();
        assert!(!String::from_utf8_lossy(&said).contains("canary"), "the password was shown");
        output
    }

    fn ok(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn fails(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(!output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stderr).unwrap()
    }
}

/// Makes the account that the guide tells to make.
fn account(server: &MariaDb) {
    let sql = GUIDE.split("```sql\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let password = PASSWORD.replace('\\', "\\\\");
    server.ask(&sql.replace("'…'", &format!("'{password}'"))).unwrap();
}

fn end(mut follower: Child) {
    kill_process(Pid::from_child(&follower), Signal::TERM).unwrap();
    assert!(follower.wait().unwrap().success());
}

/// Types every `sh` line of the page, with the page's paths moved to where the test may write.
#[test]
fn every_line_of_the_guide_to_mariadb_does_what_it_says() {
    let place = Place::new();
    let server = MariaDb::start(LOG).unwrap();
    server
        .ask("CREATE DATABASE shop; CREATE TABLE shop.mark (n INT); INSERT INTO shop.mark VALUES (1)")
        .unwrap();
    account(&server);
    let srv = place.path("srv");
    std::fs::create_dir(&srv).unwrap();
    std::fs::set_permissions(&srv, PermissionsExt::from_mode(0o755)).unwrap();
    let blocks = GUIDE.split("```sh\n").skip(1).filter_map(|rest| rest.split_once("```"));
    let lines: Vec<&str> = blocks.flat_map(|(block, _)| block.lines()).collect();
    assert_eq!(lines.len(), 5, "the page lost or gained lines");
    for line in lines {
        let line = line
            .replace("/run/mysqld/mysqld.sock", server.socket().to_str().unwrap())
            .replace("/etc/mainstay/mariadb", place.path("password").to_str().unwrap())
            .replace("/srv", srv.to_str().unwrap());
        let words: Vec<&str> = line.split(' ').skip(1).map(|word| word.trim_matches('\'')).collect();
        if !words.contains(&"follow") {
            let said = place.ok(&words);
            if words.contains(&"status") {
                assert!(said.contains("any moment from"), "{said}");
            }
            continue;
        }
        // Killed twice, and at last stopped: nothing is missing.
        for number in 2..=4 {
            let mut follower = place.command(&words).stdout(Stdio::null()).spawn().unwrap();
            RealClock.sleep(Duration::from_millis(700));
            server.ask(&format!("INSERT INTO shop.mark VALUES ({number}); FLUSH BINARY LOGS")).unwrap();
            RealClock.sleep(Duration::from_millis(500 * (number - 1)));
            if number < 4 {
                follower.kill().unwrap();
                follower.wait().unwrap();
            } else {
                let log = server.ask("SHOW MASTER STATUS").unwrap();
                let file = log.split('\t').next().unwrap().rsplit('.').next().unwrap().to_owned();
                patiently("the log", PATIENCE, || {
                    Ok(place.ok(&["db", "status"]).contains(&format!(" to {file}:")).then_some(()))
                })
                .unwrap();
                end(follower);
            }
        }
    }
    assert!(!place.ok(&["db", "status"]).contains("HOLE"));
    let scratch = place.path("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let scratch = ["--scratch", scratch.to_str().unwrap()];
    let assertion = ["--check", "SELECT count(*) = 4 FROM shop.mark", "--quick"];
    let said = place.ok(&[&["drill", "shop"], scratch.as_slice(), &assertion].concat());
    assert!(said.contains("1 of the user's queries"), "{said}");
    let wrong = ["--check", "SELECT count(*) = 5 FROM shop.mark", "--quick"];
    let said = place.fails(&[&["drill", "shop"], scratch.as_slice(), &wrong].concat());
    assert!(said.contains("is not proven"), "{said}");
    assert_eq!(std::fs::read_dir(scratch[1]).unwrap().count(), 0, "a drill left something");
    let copy = MariaDb::adopt(&srv.join("again")).unwrap();
    assert_eq!(copy.ask("SELECT count(*), max(n) FROM shop.mark").unwrap(), "4\t4");
}

#[test]
fn what_stands_in_the_way_is_said_with_what_to_do() {
    let place = Place::new();
    let mut server = MariaDb::start(&["--server-id=1", "--plugin-load-add=auth_ed25519"]).unwrap();
    account(&server);
    server.ask("CREATE USER bare@localhost; CREATE USER ed@localhost IDENTIFIED VIA ed25519 USING PASSWORD('not this one')").unwrap();
    let (address, bare) = (server.address("backup"), server.address("bare"));
    let ed = server.address("ed");
    let password = place.path("password").display().to_string();
    let wrong = place.path("wrong").display().to_string();
    let backup = |address: &str, file: &str| {
        place.fails(&["db", "backup", address, "--password-file", file, "--name", "shop"])
    };
    let said = backup(&address, &wrong);
    assert!(said.contains("1045") && said.contains("--password-file"), "{said}");
    let said = place.fails(&["db", "backup", &bare, "--name", "shop"]);
    assert!(said.contains("GRANT RELOAD"), "{said}");
    // By ed25519 it comes in with the right password, and only with that.
    let follow = |file: &str| place.fails(&["db", "follow", &ed, "--password-file", file, "--name", "shop"]);
    let said = follow(&wrong);
    assert!(said.contains("log_bin"), "{said}");
    let said = follow(&password);
    assert!(said.contains("1045"), "{said}");
    let follow = ["db", "follow", &address, "--password-file", &password, "--name", "shop"];
    let said = place.fails(&follow);
    assert!(said.contains("log_bin"), "{said}");
    // A server without a log is backed up all the same.
    let good = ["db", "backup", &address, "--password-file", &password, "--name", "shop"];
    place.ok(&good);

    let bin = place.path("bin");
    std::fs::create_dir(&bin).unwrap();
    let other = bin.join("mariadb-backup");
    std::fs::write(&other, "#!/bin/sh\necho 'mariadb-backup based on MariaDB server 9.9.1-MariaDB' >&2\n")
        .unwrap();
    std::fs::set_permissions(&other, PermissionsExt::from_mode(0o755)).unwrap();
    let said = place.fails(&good);
    assert!(said.contains("9.9.1") && said.contains("server's version"), "{said}");
    std::fs::remove_file(&other).unwrap();

    let occupied = place.path("occupied");
    std::fs::create_dir(&occupied).unwrap();
    std::fs::write(occupied.join("x"), "").unwrap();
    let said = place.fails(&["db", "restore", "shop", "--to", occupied.to_str().unwrap()]);
    assert!(said.contains("is not empty"), "{said}");
    let said = place.fails(&["db", "restore", "shop", "--to", "/proc/nowhere"]);
    assert!(said.contains("cannot make /proc/nowhere"), "{said}");
    let said = place.fails(&["db", "restore", "shop", "--gtid", "0-1-1", "--to", "x"]);
    assert!(said.contains("cannot be recovered") && said.contains("mainstay db follow"), "{said}");
    server.stop();
    let said = place.fails(&good);
    assert!(said.contains("does it run"), "{said}");
    assert_eq!(
        place.ok(&["points"]).lines().filter(|line| line.contains("shop")).count(),
        1,
        "a point was made"
    );
}
