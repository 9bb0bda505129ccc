//! `init`, `backup`, `status`: from nothing to a point, and what is said about it.

use std::os::unix::fs::PermissionsExt as _;

use crate::machine::{Machine, files_below};

#[test]
fn the_first_backup_of_a_fresh_machine_needs_nothing_else() {
    let machine = Machine::new();
    machine.write("home/Documents/letter", "dear");
    let ran = machine.run(&["backup", "home/Documents"]).ok();
    assert!(ran.out.contains("point ") && ran.out.contains(" of web:Documents: "), "{}", ran.out);
    assert!(ran.err.contains("mainstay key kit"), "{}", ran.err);
    let keys = files_below(&machine.at("home/.config/mainstay/keys"));
    assert_eq!(keys.len(), 1);
    assert_eq!(keys[0].metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let again = machine.run(&["backup", "home/Documents"]).ok();
    assert!(!again.err.contains("new") && again.out.contains("1 unchanged"), "{again:?}");
    assert!(machine.run(&["restore", "latest", "--to", "back"]).ok().out.contains("restored point"));
    let path = format!("back{}/letter", machine.arg("home/Documents"));
    assert_eq!(machine.read(&path), "dear");
}

#[test]
fn init_prints_the_kit_and_refuses_to_run_twice() {
    let mut machine = Machine::new();
    machine.terminal.input = true;
    machine.answers.will_be(&[crate::machine::PASSPHRASE, crate::machine::PASSPHRASE]);
    let ran = machine.run(&["init"]).ok();
    assert!(ran.out.contains("MAINSTAY RECOVERY KIT") && ran.out.contains("    5: "), "{}", ran.out);
    machine.run(&["init"]).failed(1, "there is a repository already");
    machine.answers.will_be(&[crate::machine::PASSPHRASE]);
    machine.run(&["points"]).ok();
    machine.answers.will_be(&["another passphrase"]);
    machine.run(&["points"]).failed(12, "key slots");
}

#[test]
fn an_unattended_init_says_how_to_give_it_a_key() {
    let machine = Machine::new();
    let ran = machine.run(&["init"]).failed(2, "nobody to ask");
    assert!(ran.err.contains("--generate-key"), "{}", ran.err);
    assert!(!machine.repository().exists());
}

#[test]
fn a_missing_repository_is_exit_10_and_is_not_made_by_reading() {
    let machine = Machine::new();
    for verb in [&["points"][..], &["verify"], &["ls", "latest"], &["status"], &["backup", "-n", "home"]] {
        let ran = machine.run(verb).failed(10, "");
        assert!(ran.err.contains("hint: "), "{}", ran.err);
    }
    machine.run(&["-r", "elsewhere", "backup", "home"]).failed(10, "");
    assert!(!machine.at("elsewhere").exists() && !machine.repository().exists());
}

#[test]
fn a_dry_run_says_what_would_be_read_and_writes_nothing() {
    let machine = Machine::with_repository();
    machine.write("home/d/a", "12345");
    let before = files_below(&machine.repository()).len();
    let first = machine.run(&["--json", "backup", "-n", "home/d"]).ok().only("would_back_up");
    assert_eq!((&first["read_items"], &first["read_bytes"]), (&1.into(), &5.into()));
    assert_eq!(files_below(&machine.repository()).len(), before);
    machine.run(&["backup", "home/d"]).ok();
    machine.write("home/d/b", "678");
    let second = machine.run(&["--json", "backup", "-n", "home/d"]).ok().only("would_back_up");
    assert_eq!((&second["read_items"], &second["read_bytes"]), (&1.into(), &3.into()), "{second}");
}

#[test]
fn excludes_tags_names_and_hooks_reach_the_point() {
    let machine = Machine::with_repository();
    machine.write("home/d/keep", "x");
    machine.write("home/d/drop.o", "x");
    let mark = machine.arg("mark");
    let (quiesce, thaw) = (format!("echo stop >> {mark}"), format!("echo go >> {mark}"));
    let arguments = ["--json", "backup", "home/d", "--exclude", "*.o", "--tag", "nightly", "--name", "docs"];
    let hooks = ["--quiesce", &quiesce, "--thaw", &thaw];
    machine.run(&[&arguments[..], &hooks].concat()).ok();
    assert_eq!(machine.read("mark"), "stop\ngo\n");
    let listed = machine.run(&["--json", "points", "--tag", "nightly"]).ok().only("point");
    assert_eq!((&listed["workload"], &listed["tags"][0]), (&"docs".into(), &"nightly".into()));
    let items = machine.run(&["ls", "docs", "-R"]).ok().out;
    assert!(items.contains("/keep") && !items.contains("drop.o"), "{items}");
    machine.run(&["backup", "home/d", "--quiesce", "exit 7", "--thaw", &thaw]).failed(1, "status 7");
    assert_eq!(machine.read("mark"), "stop\ngo\ngo\n");
    assert_eq!(machine.run(&["--json", "points"]).ok().json().len(), 1);
}

#[test]
fn a_quiesce_may_fail_or_take_too_long_and_tags_are_checked_as_elsewhere() {
    let machine = Machine::with_repository();
    machine.write("home/d/a", "x");
    machine.run(&["backup", "home/d", "--tag", "a\tb"]).failed(2, "cannot be tagged");
    machine.run(&["backup", "home/d", "--tag", ""]).failed(2, "cannot be tagged");
    let late = ["backup", "home/d", "--quiesce", "sleep 600", "--hook-limit", "1s"];
    machine.run(&late).failed(1, "did not end within 1 seconds");
    assert_eq!(machine.run(&["--json", "points"]).ok().json().len(), 0);
    let ran = machine.run(&[&late[..], &["--quiesce-may-fail"]].concat()).ok();
    assert!(ran.err.contains("without being quiesced"), "{ran:?}");
    let shown = machine.run(&["points", "show", "latest"]).ok().out;
    assert!(shown.contains("without being quiesced") && shown.contains("fuzzy"), "{shown}");
    machine
        .run(&["backup", "home/d", "--quiesce", "true", "--hook-limit", "soon"])
        .failed(2, "length of time");
}

#[test]
fn the_repository_never_backs_itself_up() {
    let machine = Machine::with_repository();
    machine.write("home/letter", "x");
    machine.run(&["backup", "home"]).ok();
    let items = machine.run(&["ls", "latest", "-R"]).ok().out;
    assert!(items.contains("/letter") && !items.contains("mainstay/repository/"), "{items}");
    machine
        .run(&["backup", &machine.repository().display().to_string()])
        .failed(2, "recovery points are kept");
}

#[test]
fn paths_that_make_no_sense_are_refused_with_a_reason() {
    let machine = Machine::with_repository();
    machine.run(&["backup", "home/nothing"]).failed(1, "home/nothing");
    machine.run(&["backup", "home", "--name", "a@b"]).failed(2, "cannot be called");
    assert_eq!(machine.run(&["backup"]).exit, 2);
    assert_eq!(machine.run(&["--json", "points"]).ok().json().len(), 0);
}

#[test]
fn status_answers_and_tells_what_is_overdue() {
    let machine = Machine::with_repository();
    machine.write("home/d/a", "x");
    assert!(machine.run(&["status"]).ok().err.contains("Nothing is protected yet"));
    machine.run(&["backup", "home/d"]).ok();
    assert!(machine.run(&["status", "--max-age", "26h"]).ok().err.contains("never verified"));
    machine.run(&["verify", "--read-data"]).ok();
    machine.later(27 * 3600);
    let ran = machine.run(&["--json", "status", "--max-age", "26h"]);
    assert_eq!(ran.exit, 21);
    let workload = ran.only("workload");
    assert_eq!((&workload["overdue"], &workload["age_seconds"]), (&true.into(), &97_200.into()));
    assert!(workload["last_verified"].is_string());
    machine.run(&["status", "d", "--max-age", "2d"]).ok();
    machine.run(&["status", "nobody"]).failed(1, "there is no workload");
    machine.run(&["status", "--max-age", "soon"]).failed(2, "not a length of time");
}

#[test]
fn a_cancelled_backup_leaves_no_point_and_exits_130() {
    let machine = Machine::with_repository();
    machine.write("home/d/a", "x");
    machine.cancel.first.store(true, std::sync::atomic::Ordering::Relaxed);
    machine.run(&["backup", "home/d"]).failed(130, "stopped");
    machine.cancel.first.store(false, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(machine.run(&["--json", "points"]).ok().json().len(), 0);
}

#[test]
fn what_is_new_is_compressed_as_asked() {
    let machine = Machine::with_repository();
    let mut written = Vec::new();
    for (number, how) in ["none", "fast", "balanced", "best", "auto"].into_iter().enumerate() {
        // Words of its own each time, or it would be stored already; lines of one length, so that only this differs.
        let line = |line: u32| format!("{number} {line:>6} the same words again and again\n");
        let text: String = (0..10_000).map(line).collect();
        machine.write("home/d/words", &text);
        let ran = machine.run(&["--json", "backup", "home/d", "--compression", how]).ok();
        written.push(ran.only("backed_up")["written_bytes"].as_u64().unwrap());
        machine.run(&["restore", "latest", "--to", how]).ok();
        assert_eq!(machine.read(&format!("{how}{}", machine.arg("home/d/words"))), text);
    }
    assert!(written[0] > 400_000 && written[1..].iter().all(|packed| packed * 2 < written[0]), "{written:?}");
    machine.run(&["backup", "home/d", "--compression", "harder"]).failed(2, "harder");
}
