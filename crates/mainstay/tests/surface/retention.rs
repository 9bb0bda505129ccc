//! `expire` and `gc` from outside.

use crate::machine::Machine;

fn five_days() -> Machine {
    let machine = Machine::with_repository();
    for day in 0..5 {
        machine.write("home/d/a", &format!("day {day}").repeat(1000));
        machine.run(&["backup", "home/d"]).ok();
        machine.later(24 * 3600);
    }
    machine
}

#[test]
fn expire_shows_what_goes_and_why_the_rest_stays() {
    let machine = five_days();
    let ran = machine.run(&["expire", "--keep-daily", "2", "--dry-run"]).ok();
    assert!(
        ran.out.contains("expire  ") && ran.out.contains("newest of its workload, daily 2096-"),
        "{}",
        ran.out
    );
    assert!(ran.out.contains("would expire 3 points, kept 2"), "{}", ran.out);
    assert!(ran.err.contains("note: web:d loses points though none"), "{}", ran.err);
    assert_eq!(machine.run(&["--json", "points"]).ok().json().len(), 5);
    machine.run(&["expire", "--keep-daily", "2"]).failed(2, "nobody to ask");
    let done = machine.run(&["--json", "expire", "--keep-daily", "2", "--yes"]).ok();
    assert_eq!(done.only("expired")["points"].as_array().unwrap().len(), 3);
    assert_eq!(machine.run(&["--json", "points"]).ok().json().len(), 2);
}

#[test]
fn holds_and_the_last_verified_point_stay() {
    let machine = five_days();
    machine.run(&["verify", "--read-data", "d~4"]).ok();
    machine.run(&["points", "hold", "d~3", "--reason", "case"]).ok();
    machine.run(&["expire", "--keep-last", "1", "--yes"]).ok();
    assert_eq!(machine.run(&["--json", "points"]).ok().json().len(), 3);
    let held = machine.run(&["expire", "d~1", "--yes"]).failed(1, "is held: case");
    assert!(held.err.contains("release"), "{}", held.err);
    machine.run(&["expire", "d~2", "--yes"]).ok();
    assert_eq!(machine.run(&["--json", "points"]).ok().json().len(), 2);
}

#[test]
fn policies_without_sense_are_refused() {
    let machine = five_days();
    machine.run(&["expire"]).failed(2, "names nothing to keep");
    machine.run(&["expire", "--keep-within", "soon"]).failed(2, "not a length of time");
    machine.run(&["--time-zone", "Europe/Atlantis", "expire", "--keep-last", "1"]).failed(2, "no time zone");
    machine.clock.set(mainstay_core::Time::from_seconds(1_000_000));
    machine.run(&["expire", "--keep-last", "1", "--yes"]).failed(1, "the clock of this machine says");
    assert_eq!(machine.run(&["--json", "points"]).ok().json().len(), 5);
}

#[test]
fn gc_condemns_first_and_frees_after_the_grace() {
    let machine = five_days();
    let kept = machine.read("home/d/a");
    machine.run(&["expire", "--keep-last", "1", "--yes"]).ok();
    let plan = machine.run(&["--json", "gc", "--dry-run"]).ok().only("collected");
    assert_eq!((&plan["dry_run"], &plan["freed_bytes"]), (&true.into(), &0.into()));
    assert!(plan["condemned_packs"].as_u64().unwrap() > 0, "{plan}");
    machine.run(&["gc"]).ok();
    machine.later(25 * 3600);
    let freed = machine.run(&["--json", "gc"]).ok().only("collected");
    assert!(freed["freed_bytes"].as_u64().unwrap() > 0, "{freed}");
    machine.run(&["verify", "--read-data"]).ok();
    assert_eq!(machine.run(&["cat", "latest", &machine.arg("home/d/a")]).ok().out, kept);
}
