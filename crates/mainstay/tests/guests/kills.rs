//! The program dies while it backs a guest up: kill -9.

use std::process::Stdio;
use std::time::Duration;

use mainstay_testkit::Rng;
use mainstay_testkit::lab::{Fsck, Guest, GuestPlan, PATIENCE, Writers, patiently};
use serde_json::json;

use crate::home::{Home, plain, references};

/// When the program dies.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// The agent has been told to freeze.
    Freezing,
    /// So long after the guest was thawed.
    After(Duration),
}

#[test]
fn a_backup_that_is_killed_leaves_the_guest_thawed_and_the_next_point_whole() {
    let guest = GuestPlan::new().unwrap().data(128).unwrap().start().unwrap();
    let (home, host) = (Home::new(), plain(&guest));
    let writers = Writers::start(guest.inside()).unwrap();
    home.back_up(&host, "web", &[]);
    let mut rng = Rng::new(3);
    let after = |rng: &mut Rng| Moment::After(Duration::from_millis(rng.range(0..400)));
    let moments = [Moment::Freezing, after(&mut rng), Moment::Freezing, after(&mut rng), after(&mut rng)];
    for moment in moments {
        kill_at(moment, &guest, &home, &host);
        // Whoever stood by thaws it; nobody else will.
        patiently("a thaw", PATIENCE, || {
            let status = guest.ask_agent("guest-fsfreeze-status", json!({}))?;
            Ok((status == "thawed").then_some(()))
        })
        .unwrap();
        writers.write_on().unwrap();
        let before = writers.rounds().unwrap();
        let line = home.back_up(&host, "web", &[]);
        let after = writers.rounds().unwrap();
        assert_eq!(line["consistency"], "file-system", "{moment:?} {line}");
        let images = home.restore("web@latest");
        Writers::check(references(&images), Fsck::Clean, before, after).unwrap();
        std::fs::remove_dir_all(home.at("restored-web@latest")).unwrap();
        assert_eq!(remains(&guest), [""; 0], "{moment:?}");
    }
}

fn kill_at(moment: Moment, guest: &Guest, home: &Home, host: &str) {
    let count = |what: &str| guest.console().matches(what).count();
    let (frozen, thawed) = (count("HOOK freeze"), count("HOOK thaw"));
    let mut command = home.command(&["vm", "backup", "--host", host, "web"]);
    let mut program = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut ended = || program.try_wait().unwrap().is_some();
    match moment {
        Moment::Freezing => wait_for(&mut || count("HOOK freeze") > frozen || ended()),
        Moment::After(delay) => {
            wait_for(&mut || count("HOOK thaw") > thawed || ended());
            std::thread::sleep(delay);
        }
    }
    println!("{moment:?}: {}", if ended() { "it had ended" } else { "killed" });
    // It may be done already.
    let _gone = program.kill();
    program.wait().unwrap();
}

/// Looks often: the moment is short.
fn wait_for(met: &mut dyn FnMut() -> bool) {
    while !met() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What is ours in the emulator and ought to be gone.
fn remains(guest: &Guest) -> Vec<String> {
    let mut monitor = guest.monitor().unwrap();
    let mut found = Vec::new();
    for (question, key) in
        [("query-block-exports", "id"), ("query-jobs", "id"), ("query-named-block-nodes", "node-name")]
    {
        let answer = monitor.run(question, json!({})).unwrap();
        let names = answer.as_array().unwrap().iter().filter_map(|one| one[key].as_str());
        found.extend(names.filter(|name| name.starts_with("mainstay")).map(str::to_owned));
    }
    found
}
