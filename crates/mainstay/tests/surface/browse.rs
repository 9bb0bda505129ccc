//! `points`, `ls`, `cat`, `find`, `verify`: looking into what is kept.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use crate::machine::{Machine, files_below};

/// Three points of one workload: `a` changes in the second, `b` comes in the third.
fn three_points() -> Machine {
    let machine = Machine::with_repository();
    machine.write("home/d/a", "one");
    machine.write("home/d/same", "same");
    machine.run(&["backup", "home/d"]).ok();
    machine.later(3600);
    machine.write("home/d/a", "changed");
    machine.run(&["backup", "home/d"]).ok();
    machine.later(3600);
    machine.write("home/d/b", "new");
    machine.run(&["backup", "home/d"]).ok();
    machine
}

#[test]
fn points_are_listed_shown_and_compared() {
    let machine = three_points();
    let points = machine.run(&["--json", "points"]).ok().json();
    assert_eq!(points.len(), 3);
    assert_eq!(points[1]["parent"], points[0]["point"]);
    assert_eq!(points[0]["moment"], "2096-10-02T07:06:40Z");
    let text = machine.run(&["points"]).ok().out;
    assert!(text.starts_with("POINT     TIME"), "{text}");
    assert!(text.contains(&points[2]["point"].as_str().unwrap()[..8]), "{text}");
    let show = machine.run(&["points", "show", "d~1"]).ok().out;
    assert!(show.contains("2096-10-02 08:06:40") && show.contains("verified  never"), "{show}");

    let changes = machine.run(&["--json", "points", "diff", "d~2", "d", &machine.arg("home/d")]).ok().json();
    let found: Vec<_> = changes
        .iter()
        .map(|line| {
            (line["path"].as_str().unwrap().rsplit('/').next().unwrap(), line["change"].as_str().unwrap())
        })
        .collect();
    assert_eq!(found, [("d", "metadata"), ("a", "content"), ("b", "added")]);
    let text = machine.run(&["points", "diff", "d", "d~2"]).ok().out;
    assert!(text.contains(&format!("- {}", machine.arg("home/d/b"))), "{text}");
}

#[test]
fn addresses_that_find_nothing_name_what_comes_near() {
    let machine = three_points();
    let ran = machine.run(&["ls", "web:f"]).failed(1, "there is no workload");
    assert!(ran.err.contains("did you mean web:d"), "{}", ran.err);
    machine.run(&["ls", "d@1999-01-01"]).failed(1, "no point is as old as");
    machine.run(&["ls", "d~7"]).failed(1, "no point 7 before");
}

#[test]
fn ls_and_cat_show_what_was_there() {
    let machine = three_points();
    let directory = machine.arg("home/d");
    let names: Vec<String> = machine
        .run(&["--json", "ls", "latest", &directory])
        .ok()
        .json()
        .iter()
        .map(|line| line["path"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["a", "b", "same"].map(|name| format!("{directory}/{name}")));
    let (old, new) = (format!("{directory}/a"), format!("{directory}/b"));
    assert_eq!(machine.run(&["cat", "d~2", &old]).ok().bytes, b"one");
    assert_eq!(machine.run(&["cat", "latest", &old, &new]).ok().bytes, b"changednew");
    assert_eq!(machine.run(&["--json", "cat", "latest", &new]).ok().only("content")["base64"], "bmV3");
    assert!(
        machine.run(&["cat", "d~2", &new]).failed(1, "is not in point").err.contains("mainstay find \"b\"")
    );
    machine.run(&["cat", "latest", &directory]).failed(2, "has no content");
}

#[test]
fn names_that_drive_terminals_do_not_and_keep_their_bytes_in_json() {
    let machine = Machine::with_repository();
    machine.write("home/d/a", "x");
    std::fs::write(machine.at("home/d").join(OsStr::from_bytes(b"\x1b[2J\xff")), "x").unwrap();
    machine.run(&["backup", "home/d"]).ok();
    let text = machine.run(&["ls", "latest", "-R"]).ok();
    assert!(!text.bytes.contains(&0x1b) && text.out.contains("\\u{1b}[2J\\xff"), "{}", text.out);
    let found = machine.run(&["--json", "find", "*2J*"]).ok().only("found");
    assert!(found["path_base64"].as_str().unwrap().len() > 8, "{found}");
}

#[test]
fn find_shows_each_state_once() {
    let machine = three_points();
    let states = |pattern: &str| {
        let ran = machine.run(&["--json", "find", pattern]).ok();
        let state =
            |line: &serde_json::Value| (line["size"].as_u64().unwrap(), line["points"].as_u64().unwrap());
        ran.json().iter().map(state).collect::<Vec<_>>()
    };
    assert_eq!(states("a"), [(7, 2), (3, 1)]);
    assert_eq!(states("same"), [(4, 3)]);
    assert_eq!(states("b"), [(3, 1)]);
    std::fs::remove_file(machine.at("home/d/same")).unwrap();
    machine.later(60);
    machine.run(&["backup", "home/d"]).ok();
    let found = machine.run(&["--json", "find", "**/d/same"]).ok().only("found");
    assert_eq!((&found["points"], &found["oldest_moment"]), (&3.into(), &"2096-10-02T07:06:40Z".into()));
    machine.run(&["find", "nothing"]).failed(1, "no point has an item called nothing");
    machine.run(&["find", "[a"]).failed(2, "makes no sense");
}

#[test]
fn tags_and_holds_come_and_go() {
    let machine = three_points();
    machine.run(&["points", "tag", "latest", "good", "weekly"]).ok();
    machine.run(&["points", "untag", "latest", "good"]).ok();
    let point =
        machine.run(&["--json", "points", "hold", "latest", "--reason", "case 17"]).ok().only("point");
    assert_eq!(
        (&point["tags"], &point["holds"][0]["reason"]),
        (&serde_json::json!(["weekly"]), &"case 17".into())
    );
    machine.run(&["points", "hold", "latest", "--reason", "x", "--until", "2097-01-01"]).ok();
    let id = point["holds"][0]["hold"].as_str().unwrap().to_owned();
    let left = machine.run(&["--json", "points", "release", "latest", &id]).ok().only("point");
    assert_eq!(left["holds"][0]["until"], "2097-01-01T23:59:59.999999999Z");
    machine.run(&["points", "release", "latest"]).ok();
    machine.run(&["points", "release", "latest"]).failed(1, "no such hold");
    machine.run(&["points", "tag", "latest", "a\u{1b}b"]).failed(2, "cannot be tagged");
    machine.run(&["points", "hold", "latest", "--reason", "x", "--until", "soon"]).failed(2, "not a time");
}

#[test]
fn verify_notes_what_it_found_sound() {
    let machine = three_points();
    let checked = machine.run(&["--json", "verify", "--read-data", "d~1"]).ok().only("verified");
    assert_eq!(
        (&checked["points"], &checked["sound"], &checked["read_data"]),
        (&1.into(), &1.into(), &true.into())
    );
    let verified: Vec<bool> = machine
        .run(&["--json", "points"])
        .ok()
        .json()
        .iter()
        .map(|point| point["verified"].is_string())
        .collect();
    assert_eq!(verified, [false, true, false]);
    let text = machine.run(&["verify", "--read-data"]).ok().out;
    assert!(
        text.starts_with("verified 3 points, ") && text.contains(": sound (every stored byte read"),
        "{text}"
    );
}

/// Three points and one of so much content that the largest pack holds content, of which a part is damaged.
fn damaged(part: impl Fn(usize) -> std::ops::Range<usize>) -> Machine {
    let machine = three_points();
    let mut rng = mainstay_testkit::Rng::new(7);
    // So varied that it stays large.
    let text: String = (0..40_000).map(|_| rng.next_u64().to_string()).collect();
    machine.write("home/d/big", &text);
    machine.run(&["backup", "home/d"]).ok();
    let packs = files_below(&machine.repository().join("pack"));
    let pack = packs.iter().max_by_key(|pack| pack.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(pack).unwrap();
    let part = part(bytes.len());
    bytes[part].fill(0x55);
    std::fs::remove_file(pack).unwrap();
    std::fs::write(pack, bytes).unwrap();
    machine
}

#[test]
fn damage_that_parity_makes_good_costs_nothing_and_is_told_of() {
    let machine = damaged(|length| length / 2..length / 2 + 4096);
    machine.run(&["restore", "latest", "--to", "back"]).ok();
    let big = machine.arg("home/d/big");
    assert_eq!(machine.read(&format!("back{big}")), machine.read("home/d/big"));
    let ran = machine.run(&["--json", "verify", "--read-data"]).ok();
    let checked = ran.only("verified");
    assert_eq!(
        (&checked["damage"], &checked["rewritten"], &checked["sound"]),
        (&0.into(), &1.into(), &4.into())
    );
    assert!(ran.err.contains("parity makes it good"), "{ran:?}");
    let again = machine.run(&["--json", "verify", "--read-data"]).ok().only("verified");
    assert_eq!((&again["damage"], &again["rewritten"]), (&0.into(), &0.into()));
}

#[test]
fn damage_is_exit_20_and_named() {
    // More than parity makes good.
    let machine = damaged(|length| length / 2..length / 2 + length / 8);
    machine.run(&["verify"]).ok();
    let ran = machine.run(&["--json", "verify", "--read-data"]);
    assert_eq!(ran.exit, 20, "{ran:?}");
    assert!(ran.json().iter().any(|line| line["type"] == "damage"), "{ran:?}");
    assert_eq!(ran.only("failed")["code"], "integrity");
    let big = machine.arg("home/d/big");
    assert!(
        ran.json().iter().any(|line| line["type"] == "damage" && line["path"] == big.as_str()),
        "{ran:?}"
    );
    assert_eq!(ran.only("verified")["sound"], 3);
    machine.run(&["restore", "latest", "--to", "back"]).failed(20, "damaged");
    assert_eq!(machine.read(&format!("back{}", machine.arg("home/d/same"))), "same");
}
