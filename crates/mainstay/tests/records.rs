//! Single records of a real cluster, by the real program: found in the log, brought back, taken back.

#![cfg(test)]

use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output};

use mainstay_testkit::at_home;
use mainstay_testkit::lab::{Postgres, PostgresPlan};

const SCHEMA: &str = "
CREATE TABLE customers (id int PRIMARY KEY, email text UNIQUE NOT NULL, referred_by int REFERENCES customers ON DELETE SET NULL);
CREATE TABLE orders (id serial PRIMARY KEY, customer int NOT NULL REFERENCES customers ON DELETE CASCADE, total numeric(9,2));
CREATE TABLE tickets (id serial PRIMARY KEY, customer_ref text);
INSERT INTO customers SELECT n, 'jo' || n || '@x.org', nullif(n - 1, 0) FROM generate_series(1, 100) n;
INSERT INTO orders (customer, total) SELECT 1 + n % 100, n FROM generate_series(1, 400) n;
INSERT INTO tickets (customer_ref) SELECT 'CUST-' || n FROM generate_series(1, 100) n";

/// A person with a database and a repository.
struct User {
    directory: tempfile::TempDir,
    server: Postgres,
}

impl User {
    fn new(level: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("ms-rec-").tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let settings = [("wal_level", level), ("fsync", "off"), ("autovacuum", "off")];
        let server =
            Postgres::start(&PostgresPlan { settings: &settings, ..PostgresPlan::default() }).unwrap();
        server.ask("postgres", "CREATE DATABASE shop").unwrap();
        let user = Self { directory, server };
        user.ask(SCHEMA);
        user
    }

    fn ask(&self, sql: &str) -> String {
        self.server.ask("shop", sql).unwrap()
    }

    fn live(&self) -> String {
        self.server.address().replace(":///postgres?", ":///shop?")
    }

    fn output(&self, words: &[&str]) -> Output {
        let mut command: Command = at_home(env!("CARGO_BIN_EXE_mainstay"), self.directory.path());
        let scratch = self.directory.path().display().to_string();
        command.args(words);
        if matches!(words, ["record", "find" | "restore", ..]) {
            command.args(["--scratch", &scratch]);
        }
        command.output().unwrap()
    }

    fn run(&self, words: &[&str]) -> String {
        let output = self.output(words);
        assert!(output.status.success(), "{words:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn back_up(&self) {
        self.run(&["db", "backup", &self.server.address(), "--name", "shop"]);
    }

    /// In one transaction; its number.
    fn commit(&self, sql: &str) -> u64 {
        let told = self.ask(&format!("BEGIN; {sql}; SELECT pg_current_xact_id(); COMMIT"));
        told.lines().last().unwrap().parse().unwrap()
    }

    /// What, and by which transaction.
    fn found(&self, words: &[&str]) -> Vec<(String, u64)> {
        let told = self.run(
            &[&["record", "find", "shop", "customers"], words, &["--database", "shop", "--json"]].concat(),
        );
        let lines = told.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let events = lines.filter(|line| line["type"] == "record_event");
        events
            .map(|line| (line["what"].as_str().unwrap().to_owned(), line["transaction"].as_u64().unwrap()))
            .collect()
    }

    fn image(&self) -> String {
        self.ask("SELECT t FROM customers t ORDER BY id") + &self.ask("SELECT t FROM orders t ORDER BY id")
    }
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_row_is_followed_through_the_log_whatever_its_level() {
    for level in ["replica", "logical"] {
        let user = User::new(level);
        user.back_up();
        let mut expected = Vec::new();
        let mut note = |what: &str, transaction| expected.push((what.to_owned(), transaction));
        note("changed", user.commit("UPDATE customers SET email = 'a@x.org' WHERE id = 42"));
        user.ask("BEGIN; DELETE FROM customers WHERE id = 42; ROLLBACK");
        // A part of a transaction that is undone leaves no trace; what stays of it is one change, by a part of its own.
        user.ask(
            "BEGIN; SAVEPOINT s; UPDATE customers SET email = 'no' WHERE id = 42; ROLLBACK TO s; COMMIT",
        );
        note(
            "changed",
            user.commit(
                "SAVEPOINT s; UPDATE customers SET email = repeat('b', 2000) WHERE id = 42; RELEASE s",
            ) + 1,
        );
        user.ask("UPDATE customers SET email = email || '!' WHERE id <> 42");
        user.ask("VACUUM customers");
        note("deleted", user.commit("DELETE FROM customers WHERE id = 42"));
        user.ask("INSERT INTO customers SELECT n, 'new' || n FROM generate_series(1000, 1400) n");
        user.back_up();
        assert_eq!(user.found(&["id=42"]), expected, "{level}");
        // Its reference was emptied, and everybody's address changed.
        assert_eq!(user.found(&["id=43", "--all"]).len(), 2, "{level}");
        if level == "logical" {
            // Between two points.
            let came = user.commit("INSERT INTO customers VALUES (2000, 'x')");
            let went = user.commit("DELETE FROM customers WHERE id = 2000");
            user.back_up();
            let both = [("inserted".to_owned(), came), ("deleted".to_owned(), went)];
            assert_eq!(user.found(&["id=2000"]), both);
        }
        user.ask("VACUUM FULL customers");
        user.back_up();
        assert!(user.found(&["id=41", "--all"]).iter().any(|(what, _)| what == "rewritten"));
    }
}

#[test]
fn a_deleted_customer_comes_back_from_just_before_and_the_receipt_takes_her_away_again() {
    let user = User::new("replica");
    user.back_up();
    let never = user.image();
    user.ask("DELETE FROM customers WHERE id = 42");
    user.back_up();
    let deleted = user.image();
    let live = user.live();
    let restore = |more: &[&'static str]| {
        [&["record", "restore", "shop", "customers", "id=42", "--server", live.as_str()], more].concat()
    };
    let plan = user.run(&restore(&["--dry-run"]));
    assert!(plan.contains("5 rows come back, 1 refer to it again"), "{plan}");
    assert!(plan.contains("public.orders ×4: comes back"), "{plan}");
    let script = user.run(&restore(&["--sql"]));
    assert!(script.contains("INSERT INTO public.orders"), "{script}");
    let failed = user.output(&restore(&[]));
    assert_eq!(failed.status.code(), Some(2), "nobody can be asked: {}", said(&failed));
    assert_eq!(user.image(), deleted);
    let done = user.run(&restore(&["--apply", "--json"]));
    assert_eq!(user.image(), never);
    let done = done.lines().find(|line| line.contains("record_restored")).unwrap();
    let done: serde_json::Value = serde_json::from_str(done).unwrap();
    let again = user.output(&restore(&["--apply"]));
    assert!(again.status.success() && said(&again).contains("nothing to do"), "{}", said(&again));
    let inverse = user.run(&["cat", done["receipt"].as_str().unwrap(), "take-back.sql"]);
    user.ask(&inverse);
    assert_eq!(user.image(), deleted);
    // By law.
    let list = ["shop", "customers", "id=42", "--database", "shop"];
    user.run(&[&["record", "erased", "--add"][..], &list, &["--why", "request 7"]].concat());
    let refused = user.output(&restore(&["--apply"]));
    assert!(said(&refused).contains("erased by law"), "{}", said(&refused));
    user.run(&[&["record", "erased", "--remove"][..], &list].concat());
    assert_eq!(user.run(&["record", "erased"]), "");
    // A definition that ties what no foreign key does.
    let suggested = user.run(&["record", "define", "customers", "--server", &live]);
    let definition: Vec<&str> = suggested.lines().map(|line| line.trim_start_matches("# ")).collect();
    let from = definition.iter().position(|line| line.starts_with("[[link]]")).unwrap();
    let link = definition[from..from + 3].join("\n");
    let text = format!("version = 1\n{link}\non = \"child.customer_ref = 'CUST-' || parent.id\"\n");
    let file = user.directory.path().join("customer.toml");
    std::fs::write(&file, text).unwrap();
    let plan = user.run(&[&restore(&["--dry-run", "--definition"])[..], &[file.to_str().unwrap()]].concat());
    assert!(plan.contains("public.tickets id=42: is there as it was"), "{plan}");
}

/// Types every `sh` line of the page, with the page's socket moved to where the test's server is.
#[test]
fn every_line_of_the_guide_to_records_does_what_it_says() {
    let user = User::new("replica");
    user.back_up();
    user.ask("DELETE FROM customers WHERE id = 42");
    user.ask("UPDATE customers SET email = 'oops' WHERE id = 43");
    user.back_up();
    user.ask("UPDATE customers SET email = 'oops again' WHERE id = 43");
    let page = include_str!("../../../docs/guides/records.md");
    let blocks = page.split("```sh\n").skip(1).filter_map(|rest| rest.split_once("```"));
    let lines: Vec<&str> = blocks.flat_map(|(block, _)| block.lines()).collect();
    assert_eq!(lines.len(), 8, "the page lost or gained lines");
    for line in lines {
        let line = line.replace("postgres:///shop?host=/var/run/postgresql&user=postgres", &user.live());
        // Words in quotes hold spaces here and there.
        let words: Vec<&str> = line
            .split('\'')
            .enumerate()
            .flat_map(|(index, part)| match index % 2 {
                0 => part.split(' ').filter(|word| !word.is_empty()).collect(),
                _ => vec![part],
            })
            .skip(1)
            .collect();
        let told = user.run(&words);
        let expected = match words.as_slice() {
            ["record", "find", ..] => "deleted by transaction",
            ["record", "restore", .., "--dry-run"] => "5 rows come back",
            ["record", "restore", .., "email", "--apply"] => "1 columns",
            ["record", "restore", ..] => "is back: 5 rows",
            ["record", "define", ..] => "version = 1",
            ["record", "erased", ..] => "never comes back",
            _ => "shop:records",
        };
        assert!(told.contains(expected), "{line}: {told}");
    }
    assert_eq!(user.ask("SELECT email FROM customers WHERE id = 43"), "oops");
    assert_eq!(user.ask("SELECT count(*) FROM orders WHERE customer = 42"), "4");
}
