//! `restore` and `undo`: plan, apply, take back.

use std::collections::BTreeMap;
use std::os::unix::fs::{PermissionsExt as _, symlink};

use crate::machine::{Machine, files_below};

fn protected() -> Machine {
    let machine = Machine::with_repository();
    machine.write("home/d/a", "a");
    machine.write("home/d/sub/b", "b");
    machine.run(&["backup", "home/d"]).ok();
    machine.later(60);
    machine
}

/// The files below, with their content.
fn content(machine: &Machine, path: &str) -> BTreeMap<String, String> {
    let root = machine.at(path);
    let name = |file: &std::path::Path| file.strip_prefix(&root).unwrap().display().to_string();
    files_below(&root).iter().map(|file| (name(file), std::fs::read_to_string(file).unwrap())).collect()
}

fn expect(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}

#[test]
fn a_path_comes_back_below_the_directory_or_stripped() {
    let machine = protected();
    let sub = machine.arg("home/d/sub");
    machine.run(&["restore", "latest", &sub, "--to", "look"]).ok();
    assert_eq!(machine.read(&format!("look{sub}/b")), "b");
    assert!(!machine.at(&format!("look{}", machine.arg("home/d/a"))).exists());
    machine.run(&["restore", "latest", &machine.arg("home/d"), "--to", "bare", "--strip"]).ok();
    assert_eq!(content(&machine, "bare"), expect(&[("a", "a"), ("sub/b", "b")]));
    machine.run(&["restore", "latest", &machine.arg("home/d/sub/b"), "--to", "one", "--strip"]).ok();
    assert_eq!(content(&machine, "one"), expect(&[("b", "b")]));
    machine
        .run(&["restore", "latest", &sub, &machine.arg("home/d/a"), "--to", "x", "--strip"])
        .failed(2, "one path");
    machine.run(&["restore", "latest", "/no/such", "--to", "x"]).failed(1, "/no/such is not in point");
}

#[test]
fn a_directory_with_something_in_it_is_not_written_to_unasked() {
    let machine = protected();
    machine.write("busy/own", "mine");
    let ran = machine.run(&["restore", "latest", "--to", "busy"]).failed(1, "is not empty");
    assert!(ran.err.contains("--mode add, overwrite or mirror"), "{}", ran.err);
    machine.run(&["restore", "latest", "--to", "busy", "--mode", "add"]).ok();
    assert_eq!(machine.read("busy/own"), "mine");
}

#[test]
fn a_restore_that_was_stopped_goes_on_with_what_is_missing() {
    let machine = protected();
    machine.run(&["restore", "latest", "--to", "new/../look"]).ok();
    let sub = machine.arg("home/d/sub");
    std::fs::remove_dir_all(machine.at(&format!("look{sub}"))).unwrap();
    let done =
        machine.run(&["--json", "restore", "latest", "--to", "look", "--mode", "overwrite", "--yes"]).ok();
    let done = done.only("restored");
    assert_eq!((&done["created"], &done["replaced"]), (&2.into(), &0.into()), "{done}");
    assert_eq!(machine.read(&format!("look{sub}/b")), "b");
}

#[test]
fn in_place_needs_a_yes_and_undo_takes_it_back() {
    let machine = protected();
    machine.write("home/d/a", "edited after the point");
    machine.write("home/d/mine", "made after the point");
    std::fs::remove_dir_all(machine.at("home/d/sub")).unwrap();
    let edited = content(&machine, "home/d");

    machine.run(&["restore", "latest"]).failed(2, "nobody to ask");
    assert_eq!(content(&machine, "home/d"), edited);
    let plan = machine.run(&["--json", "restore", "latest", "--dry-run"]).ok();
    let steps: Vec<String> = plan
        .json()
        .iter()
        .filter(|line| line["type"] == "restore_step")
        .map(|line| format!("{} {}", line["action"].as_str().unwrap(), line["path"].as_str().unwrap()))
        .collect();
    let at = |path: &str| machine.arg(path);
    assert!(steps.contains(&format!("replace {}", at("home/d/a"))), "{steps:?}");
    assert!(steps.contains(&format!("create {}", at("home/d/sub/b"))), "{steps:?}");
    assert!(!steps.iter().any(|step| step.contains("mine")), "{steps:?}");
    assert_eq!(content(&machine, "home/d"), edited);

    let done = machine.run(&["--json", "restore", "latest", "--yes"]).ok().only("restored");
    assert_eq!(
        content(&machine, "home/d"),
        expect(&[("a", "a"), ("mine", "made after the point"), ("sub/b", "b")])
    );
    assert!(done["undo_point"].is_string());
    machine.later(60);

    machine.run(&["undo", "--dry-run"]).ok();
    machine.run(&["undo", "--yes"]).ok();
    assert_eq!(content(&machine, "home/d"), edited);
    assert!(!machine.at("home/d/sub").exists());
    machine.later(60);
    machine.run(&["undo", "--yes"]).ok();
    assert_eq!(machine.read("home/d/a"), "a");
    assert_eq!(machine.read("home/d/sub/b"), "b");
}

#[test]
fn mirror_makes_it_as_it_was_and_undo_brings_back_what_it_deleted() {
    let machine = protected();
    machine.write("home/d/extra/deep/file", "not in the point");
    machine.write("home/beside", "outside");
    symlink("nowhere", machine.at("home/d/dangling")).unwrap();
    std::fs::set_permissions(machine.at("home/d/a"), std::fs::Permissions::from_mode(0o600)).unwrap();
    let before = content(&machine, "home/d");
    machine.run(&["restore", "latest", "--mode", "mirror", "--yes"]).ok();
    assert_eq!(content(&machine, "home/d"), expect(&[("a", "a"), ("sub/b", "b")]));
    assert!(machine.at("home/d/dangling").symlink_metadata().is_err());
    assert_eq!(machine.read("home/beside"), "outside");
    machine.later(60);
    machine.run(&["undo", "--yes"]).ok();
    assert_eq!(content(&machine, "home/d"), before);
    assert_eq!(std::fs::read_link(machine.at("home/d/dangling")).unwrap().to_str(), Some("nowhere"));
    assert_eq!(machine.at("home/d/a").metadata().unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn kinds_that_changed_are_replaced_and_come_back() {
    let machine = protected();
    std::fs::remove_file(machine.at("home/d/a")).unwrap();
    machine.write("home/d/a/now/a/directory", "x");
    std::fs::remove_dir_all(machine.at("home/d/sub")).unwrap();
    machine.write("home/d/sub", "now a file");
    let before = content(&machine, "home/d");
    // What a directory holds goes only when a mirror is asked for.
    let plan = machine.run(&["--json", "restore", "latest", "--dry-run"]).ok();
    assert_eq!(plan.only("restore_plan")["blocked"], 1, "{plan:?}");
    let steps = plan.json();
    let step = steps.iter().find(|step| step["path"] == machine.arg("home/d/a").as_str()).unwrap();
    assert_eq!(step["action"], "blocked");
    assert_eq!(machine.run(&["restore", "latest", "--yes"]).exit, 3);
    assert_eq!(machine.read("home/d/a/now/a/directory"), "x");
    machine.run(&["restore", "latest", "--yes", "--mode", "mirror"]).ok();
    assert_eq!(content(&machine, "home/d"), expect(&[("a", "a"), ("sub/b", "b")]));
    machine.later(60);
    machine.run(&["undo", "--yes"]).ok();
    machine.run(&["undo", "web:undo~2", "--yes"]).ok();
    assert_eq!(content(&machine, "home/d"), before);
}

#[test]
fn a_person_is_asked_once_and_no_means_no() {
    let mut machine = protected();
    machine.write("home/d/a", "edited");
    machine.terminal.input = true;
    machine.answers.will_be(&["n"]);
    let ran = machine.run(&["restore", "latest"]).failed(130, "nothing was changed");
    assert!(ran.out.contains("~ 1 changed") && ran.out.contains("undo point"), "{}", ran.out);
    assert_eq!(machine.read("home/d/a"), "edited");
    machine.answers.will_be(&["y"]);
    machine.run(&["restore", "latest"]).ok();
    assert_eq!(machine.read("home/d/a"), "a");
    // What only adds is not asked about.
    std::fs::remove_file(machine.at("home/d/a")).unwrap();
    machine.run(&["restore", "latest", &machine.arg("home/d/a")]).ok();
    assert_eq!(machine.read("home/d/a"), "a");
}

#[test]
fn undo_points_stay_out_of_the_way() {
    let machine = protected();
    machine.run(&["undo"]).failed(1, "nothing to undo");
    machine.write("home/d/a", "edited");
    machine.run(&["restore", "latest", "--yes"]).ok();
    assert_eq!(machine.run(&["--json", "points"]).ok().json().len(), 1);
    assert_eq!(machine.run(&["--json", "points", "--undo"]).ok().json().len(), 2);
    machine.run(&["undo", "latest"]).failed(2, "holds no undo");
    let shown = machine.run(&["ls", "web:undo", "-R"]).ok().out;
    assert!(shown.contains("/before") && shown.contains("/changes"), "{shown}");
    machine.run(&["restore", "latest", "--yes"]).ok();
    assert_eq!(
        machine.run(&["--json", "points", "--undo"]).ok().json().len(),
        2,
        "nothing to do makes no point"
    );
    machine.write("home/d/a", "edited");
    machine.run(&["restore", "latest", "--yes", "--no-undo"]).ok();
    assert_eq!(machine.run(&["--json", "points", "--undo"]).ok().json().len(), 2);
}
