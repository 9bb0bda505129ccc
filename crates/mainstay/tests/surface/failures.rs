//! Every verb when things are not as they should be, with `--json`: the right status, and as the last line why. Each
//! line is held against the schema as it is read.

use std::os::unix::fs::FileExt as _;

use crate::machine::{Machine, files_below};

/// All that needs a repository. The paths are those of [`protected`].
const VERBS: &[&[&str]] = &[
    &["backup", "home/d"],
    &["backup", "home/d", "--dry-run"],
    &["points"],
    &["points", "show", "latest"],
    &["points", "diff", "latest~1", "latest"],
    &["points", "tag", "latest", "tag"],
    &["points", "untag", "latest", "tag"],
    &["points", "hold", "latest", "--reason", "why"],
    &["points", "release", "latest"],
    &["find", "a"],
    &["restore", "latest", "--to", "back"],
    &["restore", "latest", "--dry-run"],
    &["undo", "--yes"],
    &["ls", "latest"],
    &["ls", "latest", "-R"],
    &["cat", "latest", "/home/d/a"],
    &["verify"],
    &["verify", "--read-data"],
    &["expire", "--keep-last", "1", "--yes"],
    &["gc"],
    &["gc", "--dry-run"],
    &["status"],
    &["key", "list"],
    &["key", "add", "--out", "new.key"],
    &["key", "remove", "ff", "--yes"],
    &["key", "kit", "--out", "new.txt"],
    &["key", "test"],
    &["key", "writer", "list"],
    &["key", "writer", "add", "phone", "--out", "phone.cred"],
    &["key", "writer", "revoke", "phone", "--yes"],
];

fn protected() -> Machine {
    let machine = Machine::with_repository();
    for content in ["one", "two"] {
        machine.write("home/d/a", &content.repeat(10_000));
        machine.run(&["backup", "home/d"]).ok();
        machine.later(60);
    }
    machine
}

/// Runs every verb and expects this failure of each.
fn all_fail(machine: &Machine, options: &[&str], exit: u8, code: &str) {
    for verb in VERBS {
        let ran = machine.run(&[options, &["--json"], verb].concat());
        let lines = ran.json();
        let last = lines.last().unwrap_or_else(|| panic!("{verb:?} said nothing: {ran:?}"));
        assert_eq!((ran.exit, last["type"].as_str()), (exit, Some("failed")), "{verb:?}: {ran:?}");
        assert_eq!(
            (last["code"].as_str(), last["exit"].as_u64()),
            (Some(code), Some(exit.into())),
            "{verb:?}"
        );
        assert!(last["hint"].is_string(), "{verb:?} does not say what to do: {ran:?}");
    }
}

#[test]
fn no_verb_opens_with_a_wrong_key() {
    let machine = protected();
    let other = Machine::new();
    other.run(&["-r", "r", "--key-file", "k", "init", "--kit", "kit"]).ok();
    let (key, kit) = (other.arg("k"), other.arg("kit"));
    all_fail(&machine, &["--key-file", &key], 12, "wrong-key");
    all_fail(&machine, &["--with-kit", &kit], 12, "wrong-key");
    std::fs::remove_dir_all(machine.at("home/.config")).unwrap();
    all_fail(&machine, &[], 12, "wrong-key");
}

#[test]
fn every_verb_misses_a_repository_that_is_not_there() {
    all_fail(&protected(), &["-r", "nowhere"], 10, "no-repository");
}

fn damage(machine: &Machine) {
    for pack in files_below(&machine.repository().join("pack")) {
        let length = pack.metadata().unwrap().len();
        let file = std::fs::File::options().write(true).open(&pack).unwrap();
        for at in (0..length).step_by(64) {
            file.write_all_at(&[0xa5], at).unwrap();
        }
    }
}

/// Every pack is damaged in the same way: whoever reads of it says so, whoever does not goes on.
#[test]
fn every_verb_survives_damaged_packs() {
    let machine = protected();
    let state = machine.at("home/.local/state");
    for verb in VERBS {
        damage(&machine);
        // Nothing that was read before the damage may help.
        let _not_there = std::fs::remove_dir_all(&state);
        let ran = machine.run(&[&["--json"], *verb].concat());
        let lines = ran.json();
        match ran.exit {
            0 => assert!(lines.iter().all(|line| line["type"] != "failed"), "{verb:?}: {ran:?}"),
            exit => {
                let last = lines.last().unwrap_or_else(|| panic!("{verb:?} said nothing: {ran:?}"));
                assert_eq!(
                    (last["type"].as_str(), last["exit"].as_u64()),
                    (Some("failed"), Some(exit.into()))
                );
                // What these name is not there, whatever the packs hold.
                let misses = ["undo", "key", "points"].contains(&verb[0]) && exit == 1;
                assert!(exit == 20 || misses, "{verb:?}: {ran:?}");
            }
        }
        let must = ["find", "cat", "verify", "restore"].contains(&verb[0]);
        assert!(!must || ran.exit == 20, "{verb:?} did not notice: {ran:?}");
    }
}
