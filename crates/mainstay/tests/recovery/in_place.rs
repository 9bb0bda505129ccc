//! `vm restore --in-place`.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use mainstay_testkit::Rng;
use mainstay_testkit::lab::{PATIENCE, StorageDaemon, patiently};

use crate::user::{User, same, tool};

const SIZE: u64 = 48 << 20;
const RESTORE: [&str; 5] = ["vm", "restore", "--in-place", "--host", "dir:images"];

/// A machine of two disks, and what they were when its first point was taken.
struct Web {
    user: User,
    raw: PathBuf,
    qcow2: PathBuf,
    was: PathBuf,
}

fn web(random: &mut Rng) -> Web {
    let user = User::new();
    std::fs::create_dir_all(user.at("images/web")).unwrap();
    let (raw, qcow2) = (user.at("images/web/a.raw"), user.at("images/web/b.qcow2"));
    let file = std::fs::File::create(&raw).unwrap();
    file.set_len(SIZE).unwrap();
    // The head of the disk, its middle and its end; the rest is a hole.
    for at in [0, 20 << 20, SIZE - (9 << 20)] {
        file.write_all_at(&random.bytes(9 << 20), at).unwrap();
    }
    file.sync_all().unwrap();
    let was = user.at("was.raw");
    std::fs::copy(&raw, &was).unwrap();
    tool("qemu-img", &["convert", "-O", "qcow2", raw.to_str().unwrap(), qcow2.to_str().unwrap()]);
    user.run(&["vm", "backup", "--host", "dir:images", "web"]);
    Web { user, raw, qcow2, was }
}

/// Writes through QEMU's own tools, as a guest would.
fn scribble(disk: &Path, format: &str) {
    let writes = ["write -P 7 100000 70000", "write -P 8 21m 3000", "write -z 41m 2m", "write -P 9 10m 1m"];
    let mut words = vec!["-f", format, disk.to_str().unwrap()];
    words.extend(writes.iter().flat_map(|write| ["-c", write]));
    tool("qemu-io", &words);
}

impl Web {
    fn restore(&self, point: &str) -> serde_json::Value {
        self.user.only("machine_put_back", &[RESTORE.as_slice(), &[point, "--yes"]].concat())
    }

    fn is_as(&self, raw: &Path, qcow2: &Path) {
        same(&self.raw, raw);
        same(&self.qcow2, qcow2);
        tool("qemu-img", &["check", "-q", self.qcow2.to_str().unwrap()]);
    }
}

#[test]
fn what_differs_is_written_and_the_undo_point_takes_it_back() {
    let web = web(&mut Rng::new(1));
    let user = &web.user;
    scribble(&web.raw, "raw");
    scribble(&web.qcow2, "qcow2");
    let (raw, qcow2) = (user.at("changed.raw"), user.at("changed.qcow2"));
    std::fs::copy(&web.raw, &raw).unwrap();
    std::fs::copy(&web.qcow2, &qcow2).unwrap();

    let plan = user.run(&[RESTORE.as_slice(), &["web@latest", "--dry-run"]].concat());
    assert!(plan.contains("tagged undo") && plan.contains("a.raw"), "{plan}");
    user.fails(&[RESTORE.as_slice(), &["web@latest"]].concat(), 2, "nobody to ask");
    web.is_as(&raw, &qcow2);

    let done = web.restore("web@latest");
    web.is_as(&web.was, &web.was);
    let written = done["written_bytes"].as_u64().unwrap();
    assert!(written > 0 && written < 2 * (5 << 20), "{written} bytes were written");
    // The same again has nothing to do, and `latest` is still what was captured, not the undo point.
    assert_eq!(web.restore("web@latest")["written_bytes"], 0);
    let undo = done["undo"].as_str().unwrap();
    let points = user.run(&["points", "--json"]);
    assert!(points.lines().any(|line| line.contains(undo) && line.contains("\"undo\"")), "{points}");
    web.restore(&format!("web@{undo}"));
    web.is_as(&raw, &qcow2);
}

#[test]
fn a_restore_that_is_killed_leaves_no_machine_that_boots_and_the_next_run_finishes() {
    let mut random = Rng::new(2);
    let web = web(&mut random);
    // Much to write, so that there is time to die.
    let file = std::fs::OpenOptions::new().write(true).open(&web.raw).unwrap();
    file.write_all_at(&random.bytes(SIZE as usize), 0).unwrap();
    drop(file);
    let changed = web.user.at("changed.raw");
    std::fs::copy(&web.raw, &changed).unwrap();
    let head = || {
        let mut head = vec![0; 1 << 20];
        std::fs::File::open(&web.raw).unwrap().read_exact_at(&mut head, 0).unwrap();
        head
    };
    let was = std::fs::read(&web.was).unwrap();
    let mut killed = 0;
    while killed < 3 {
        let mut child = web.user.start(&[RESTORE.as_slice(), &["web@latest", "--yes"]].concat());
        while !head().starts_with(b"MAINSTAY RESTORE") && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        for _ in 0..killed {
            head();
        }
        child.kill().unwrap();
        let ended = child.wait().unwrap();
        if ended.success() {
            // It was quicker. Again, from where it was.
            web.user.run(&[RESTORE.as_slice(), &[&undo_of(&web), "--yes"]].concat());
            continue;
        }
        let head = head();
        if !head.starts_with(b"MAINSTAY RESTORE") && std::fs::read(&web.raw).unwrap() == was {
            // It died when it was done with this disk. Again, from where it was.
            let undo = undo_of(&web);
            web.restore("web@latest");
            web.user.run(&[RESTORE.as_slice(), &[&undo, "--yes"]].concat());
            continue;
        }
        killed += 1;
        assert!(head.starts_with(b"MAINSTAY RESTORE 1\nundo "), "{:?}", head.get(..100));
        // What wrote for it may still be letting the disks go.
        patiently("a backup says why it is refused", PATIENCE, || {
            let output = web.user.try_run(&["vm", "backup", "--host", "dir:images", "web"]);
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{said}");
            assert!(said.contains("was interrupted") || said.contains("in use"), "{said}");
            Ok(said.contains("was interrupted").then_some(()))
        })
        .unwrap();
        // Nothing else is written before the rest of the head is gone, and nothing after it is back.
        let gone = head[4096..].iter().all(|byte| *byte == 0);
        let rest = std::fs::read(&web.raw).unwrap().split_off(4096);
        let whole = rest == was[4096..] || rest == std::fs::read(&changed).unwrap()[4096..];
        assert!(gone || whole, "it could come up half restored");
    }
    // As long as the disks name it, the undo point does not expire.
    let undo = undo_of(&web).replace("web@", "");
    let held = |user: &User| {
        let points = user.run(&["points", "--json"]);
        points.lines().any(|line| line.contains(&undo) && line.contains("is not finished"))
    };
    assert!(held(&web.user));
    web.user.fails(&["expire", "--yes", &undo], 1, "is held");
    let done = web.restore("web@latest");
    assert!(!held(&web.user));
    web.is_as(&web.was, &web.was);
    // The undo point is of the state before the first of them, not of what they left behind.
    web.restore(&format!("web@{}", done["undo"].as_str().unwrap()));
    same(&web.raw, &changed);
}

fn undo_of(web: &Web) -> String {
    let points = web.user.run(&["points", "--json"]);
    let lines = points.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let mut undo =
        lines.filter(|line| line["tags"].as_array().is_some_and(|tags| tags.iter().any(|tag| tag == "undo")));
    format!("web@{}", undo.next_back().unwrap()["point"].as_str().unwrap())
}

#[test]
fn what_cannot_be_put_back_in_place_is_refused_before_anything_changes() {
    let web = web(&mut Rng::new(3));
    let restore = [RESTORE.as_slice(), &["web@latest", "--yes"]].concat();
    // Hosts whose disks are not here, or not ours while they are off: neither is even spoken to.
    for host in ["qmp:nowhere.sock", "qemu+ssh://nowhere/system"] {
        let words = ["vm", "restore", "--in-place", "--host", host, "web@latest", "--yes", "--stop"];
        web.user.fails(&words, 1, "not written over from here");
    }
    // In use, as a machine that runs has it.
    let daemon = StorageDaemon::start(&[&web.qcow2]).unwrap();
    web.user.fails(&restore, 1, "in use");
    drop(daemon);
    same(&web.raw, &web.was);
    // A disk that is gone.
    std::fs::rename(&web.qcow2, web.user.at("elsewhere")).unwrap();
    web.user.fails(&restore, 1, "--same-identity");
    std::fs::rename(web.user.at("elsewhere"), &web.qcow2).unwrap();
    // A note that the guest wrote: no point of ours is named by it, so the disks are captured as they are.
    let file = std::fs::OpenOptions::new().write(true).open(&web.raw).unwrap();
    file.write_all_at(b"MAINSTAY RESTORE 1\nundo 00112233445566778899aabbccddeeff\n", 0).unwrap();
    drop(file);
    let noted = web.user.at("noted.raw");
    std::fs::copy(&web.raw, &noted).unwrap();
    let done = web.restore("web@latest");
    same(&web.raw, &web.was);
    web.restore(&format!("web@{}", done["undo"].as_str().unwrap()));
    same(&web.raw, &noted);
}
