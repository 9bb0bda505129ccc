//! `--dry-run` of the small verbs: the same checks, a line that says what would be done, and nothing is changed.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::machine::{Machine, files_below};

/// Every file of the test, with its content.
fn everything(machine: &Machine) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = files_below(machine.place.path()).into_iter();
    // What is remembered between runs is no part of any act.
    let files = files.filter(|file| !file.starts_with(machine.at("home/.local/state")));
    files.map(|file| (file.clone(), std::fs::read(file).unwrap())).collect()
}

#[test]
fn the_small_verbs_say_what_they_would_do_and_change_nothing() {
    let machine = Machine::with_repository();
    machine.write("home/d/a", "x");
    machine.run(&["backup", "home/d"]).ok();
    machine.run(&["points", "hold", "latest", "--reason", "audit"]).ok();
    machine.run(&["key", "writer", "add", "laptop", "--out", "laptop.cred"]).ok();
    let keys = machine.run(&["--json", "key", "list"]).ok().json();
    let key = keys[0]["key"].as_str().unwrap();
    let before = everything(&machine);
    for verb in [
        &["points", "tag", "latest", "important"][..],
        &["points", "untag", "latest", "important"],
        &["points", "hold", "latest", "--reason", "case 17"],
        &["points", "release", "latest"],
        &["key", "add"],
        &["key", "add", "--out", "second.key"],
        &["key", "remove", key],
        &["key", "kit"],
        &["key", "kit", "--out", "second.txt"],
        &["key", "writer", "add", "phone", "--out", "phone.cred"],
        &["key", "writer", "revoke", "laptop"],
        &["-r", "elsewhere", "init", "--generate-key"],
        &["-r", "elsewhere", "--key-file", "other.key", "init", "--kit", "other.txt"],
    ] {
        let would = machine.run(&[verb, &["--dry-run", "--json"]].concat()).ok();
        assert!(would.json().len() == 1 && would.only("would_do")["what"].is_string(), "{verb:?}: {would:?}");
        assert!(machine.run(&[verb, &["-n"]].concat()).ok().out.contains("nothing was changed"), "{verb:?}");
        assert!(everything(&machine) == before, "{verb:?} changed something");
    }
    // What could not be done is refused as ever.
    machine.run(&["init", "--generate-key", "-n"]).failed(1, "there is a repository already");
    machine.run(&["points", "tag", "latest", "a\nb", "-n"]).failed(2, "cannot be tagged");
    machine.run(&["points", "release", "latest", "ffff", "-n"]).failed(1, "no such hold");
    machine.run(&["key", "add", "--out", "kit.txt", "-n"]).failed(1, "is there already");
    machine.run(&["key", "remove", "ffff", "-n"]).failed(1, "nothing has an id");
    machine.run(&["key", "writer", "add", "laptop", "--out", "x", "-n"]).failed(1, "already");
}
