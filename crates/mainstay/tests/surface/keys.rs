//! Keys: what opens a repository, what does not, and clients that only write.

use std::os::unix::fs::PermissionsExt as _;

use crate::machine::{Machine, PASSPHRASE, files_below};

#[test]
fn passphrases_come_from_files_and_commands_and_not_from_argv() {
    let mut machine = Machine::new();
    machine.environment.passphrase.file = Some(machine.write("passphrase", &format!("{PASSPHRASE}\n")));
    machine.run(&["init", "--kit", "kit.txt"]).ok();
    machine.run(&["points"]).ok();
    machine.environment.passphrase.file = None;
    machine.environment.passphrase.command = Some(format!("printf %s '{PASSPHRASE}'").into());
    machine.run(&["points"]).ok();
    machine.environment.passphrase.command = Some(format!("echo '{PASSPHRASE}' >&2; exit 1").into());
    machine.run(&["points"]).failed(1, "MAINSTAY_PASSPHRASE_COMMAND failed");
    machine.environment.passphrase.command = Some("echo something else".into());
    machine.run(&["points"]).failed(12, "key slots");
    machine.environment.passphrase.command = None;
    let ran = machine.run(&["points"]).failed(12, "there is no key");
    assert!(ran.err.contains("MAINSTAY_PASSPHRASE_FILE"), "{}", ran.err);
    machine.environment.passphrase.file = Some(machine.at("nothing"));
    machine.run(&["points"]).failed(1, "MAINSTAY_PASSPHRASE_FILE");
}

#[test]
fn the_kit_opens_the_repository_and_no_other() {
    let machine = Machine::with_repository();
    assert_eq!(machine.at("kit.txt").metadata().unwrap().permissions().mode() & 0o777, 0o600);
    std::fs::remove_dir_all(machine.at("home/.config")).unwrap();
    machine.run(&["points"]).failed(12, "there is no key");
    machine.run(&["--with-kit", "kit.txt", "points"]).ok();
    let kit = machine.read("kit.txt");
    machine.write("wrong.txt", &kit.replacen("    2: ", "    2: 0", 1));
    machine.run(&["--with-kit", "wrong.txt", "points"]).failed(2, "line 2");
    let other = Machine::with_repository();
    other.write("foreign.txt", &kit);
    other.run(&["--with-kit", "foreign.txt", "points"]).failed(12, "recovery kit");
}

#[test]
fn keys_are_added_listed_and_removed() {
    let mut machine = Machine::with_repository();
    machine.run(&["key", "add", "--out", "second.key", "--label", "laptop"]).ok();
    let keys = machine.run(&["--json", "key", "list"]).ok().json();
    let kinds: Vec<_> = keys.iter().map(|key| key["kind"].as_str().unwrap().to_owned()).collect();
    assert_eq!(kinds.iter().filter(|kind| *kind == "key-file").count(), 2, "{kinds:?}");
    assert_eq!(kinds.iter().filter(|kind| *kind == "recovery-kit").count(), 1, "{kinds:?}");
    machine.run(&["--key-file", "second.key", "key", "test"]).ok();
    let laptop = keys.iter().find(|key| key["label"] == "laptop").unwrap()["key"].as_str().unwrap();
    machine.run(&["key", "remove", laptop]).failed(2, "nobody to ask");
    machine.run(&["key", "remove", laptop, "--yes"]).ok();
    machine.run(&["--key-file", "second.key", "key", "test"]).failed(12, "second.key");
    machine.run(&["key", "remove", "ffffffffffff", "--yes"]).failed(1, "nothing has an id");
    machine.terminal.input = true;
    machine.answers.will_be(&[PASSPHRASE, "canary-7f3a9c55 mistyped"]);
    machine.run(&["key", "add"]).failed(2, "differ");
    machine.answers.will_be(&[PASSPHRASE, PASSPHRASE]);
    machine.run(&["key", "add"]).ok();
    std::fs::remove_dir_all(machine.at("home/.config")).unwrap();
    machine.answers.will_be(&[PASSPHRASE]);
    machine.run(&["points"]).ok();
}

#[test]
fn a_key_file_that_others_can_read_is_refused() {
    let machine = Machine::with_repository();
    let key = files_below(&machine.at("home/.config")).remove(0);
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let ran = machine.run(&["points"]).failed(1, "can be read by others");
    assert!(ran.err.contains("chmod 600"), "{}", ran.err);
    machine.run(&["-r", "repo", "--key-file", "repo/key", "init"]).failed(2, "lies inside the repository");
}

#[test]
fn another_kit_is_printed_on_demand() {
    let machine = Machine::with_repository();
    let kit = machine.run(&["key", "kit"]).ok().out;
    assert!(kit.contains("MAINSTAY RECOVERY KIT"), "{kit}");
    machine.write("second.txt", &kit);
    machine.run(&["--with-kit", "second.txt", "points"]).ok();
    machine.run(&["--json", "key", "kit", "--out", "third.txt"]).ok();
    machine.run(&["--with-kit", "third.txt", "points"]).ok();
    machine.run(&["key", "kit", "--out", "third.txt"]).failed(1, "third.txt");
    assert_eq!(machine.run(&["--json", "key", "list"]).ok().json().len(), 4);
}

#[test]
fn a_kit_given_to_several_people_opens_with_so_many_of_them() {
    let machine = Machine::with_repository();
    machine.run(&["key", "kit", "--pages", "3", "--needed", "2", "--out", "kit.txt"]).ok();
    let page = |number: u8| std::fs::read_to_string(machine.at(&format!("kit-{number}.txt"))).unwrap();
    machine.write("two.txt", &[page(3), page(1)].concat());
    machine.run(&["--with-kit", "two.txt", "points"]).ok();
    machine.run(&["--with-kit", "kit-2.txt", "points"]).failed(2, "2 pages of this kit are needed");
    machine.run(&["key", "kit", "--pages", "3", "--needed", "2", "--out", "kit.txt"]).failed(1, "kit-1.txt");
    machine.run(&["key", "kit", "--pages", "3", "--needed", "4"]).failed(2, "4 of 3 pages");
    machine.run(&["key", "kit", "--pages", "3"]).failed(2, "--needed");
    // None of these made a key.
    assert_eq!(machine.run(&["--json", "key", "list"]).ok().json().len(), 3);
}

#[test]
fn a_client_that_only_writes_cannot_read() {
    let machine = Machine::with_repository();
    machine.write("home/d/a", "secret of the client");
    machine.run(&["key", "writer", "add", "laptop", "--out", "laptop.cred"]).ok();
    machine.run(&["key", "writer", "add", "laptop", "--out", "other.cred"]).failed(1, "already");
    let client = |arguments: &[&str]| machine.run(&[&["--key-file", "laptop.cred"], arguments].concat());
    assert!(client(&["backup", "home/d"]).ok().out.contains(" of web:"));
    machine.later(60);
    let again = client(&["--json", "backup", "--reread", "0", "home/d"]).ok().only("backed_up");
    assert_eq!(again["unchanged"], 1, "{again}");
    let file = machine.arg("home/d/a");
    for verb in [&["cat", "latest", &file][..], &["ls", "latest"], &["restore", "latest", "--to", "x"]] {
        let ran = client(verb);
        assert_eq!(ran.exit, 12, "{ran:?}");
        assert!(!ran.out.contains("secret of the client"), "{ran:?}");
    }
    assert_eq!(client(&["expire", "latest", "--yes"]).exit, 12);
    assert_eq!(client(&["gc"]).exit, 12);
    // The owner sees one workload, whose points the client made.
    let points = machine.run(&["--json", "points"]).ok().json();
    assert_eq!(points.len(), 2);
    assert!(points.iter().all(|point| point["workload"] == points[0]["workload"]), "{points:?}");
    assert_eq!(machine.run(&["cat", "latest", &file]).ok().out, "secret of the client");

    machine.run(&["key", "writer", "revoke", "laptop", "--yes"]).ok();
    let writers = machine.run(&["--json", "key", "writer", "list"]).ok().json();
    let laptop = writers.iter().find(|writer| writer["name"] == "laptop").unwrap();
    assert_eq!(laptop["revoked"], true);
    let refused = client(&["backup", "home/d"]);
    assert_ne!(refused.exit, 0, "{refused:?}");
    assert_eq!(machine.run(&["--json", "points"]).ok().json().len(), 2);
}
