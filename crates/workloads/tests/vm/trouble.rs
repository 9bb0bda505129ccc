//! What goes wrong on a host ends in a right point or a clear failure, with the guest alive and nothing left behind.

use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use mainstay_core::{Code, Consistency, Id16};
use mainstay_testkit::Rng;
use mainstay_workloads::vm::{GuardProgram, Hypervisor as _, Marks, Owner, QemuMachine, SnapshotRequest};
use rustix::process::Signal;
use serde_json::json;

use crate::agent::{Manner, serve};
use crate::daemon::{Daemon, Monitor, OWNER, capture, host_of, id, modes, request, run, wait_for};

const TWO: [(&str, &str, usize); 2] = [("a", "qcow2", 2 << 20), ("b", "qcow2", 1 << 20)];

/// A daemon with one point taken of it.
fn begun(rng: &mut Rng) -> (Daemon, Marks, Vec<Vec<u8>>) {
    let mut daemon = Daemon::new(&TWO);
    daemon.scribble(rng, 20);
    let mut stored = Vec::new();
    let marks = point(&daemon, rng, None, &mut stored, &["full", "full"]);
    daemon.scribble(rng, 10);
    (daemon, marks, stored)
}

/// Takes a point that must be right, and be taken as `wanted` says.
fn point(
    daemon: &Daemon,
    rng: &mut Rng,
    since: Option<&Marks>,
    stored: &mut Vec<Vec<u8>>,
    wanted: &[&str],
) -> Marks {
    let snapshot = daemon.snapshot(&request(rng, since)).unwrap();
    let told = modes(snapshot.as_ref());
    assert_eq!(told.len(), wanted.len());
    assert!(told.iter().zip(wanted).all(|(told, wanted)| told.contains(wanted)), "{told:?} {wanted:?}");
    capture(snapshot.as_ref(), stored).unwrap();
    assert!(*stored == daemon.models(), "the point differs from what the guest had written");
    let marks = snapshot.marks().unwrap();
    snapshot.commit().unwrap();
    assert_eq!(daemon.remains(), [""; 0]);
    marks
}

fn ours(daemon: &Daemon, disk: &str) -> String {
    let mut names = daemon.bitmaps(disk);
    names.retain(|name| name.starts_with("mainstay-"));
    assert_eq!(names.len(), 1, "{names:?}");
    names.remove(0)
}

#[test]
fn a_lost_bitmap_costs_one_disk_one_scan() {
    let mut rng = Rng::new(1);
    let (mut daemon, marks, mut stored) = begun(&mut rng);
    daemon.run("block-dirty-bitmap-remove", json!({ "node": "a", "name": ours(&daemon, "a") }));
    let marks = point(&daemon, &mut rng, Some(&marks), &mut stored, &["is missing", "incremental"]);
    daemon.scribble(&mut rng, 10);
    point(&daemon, &mut rng, Some(&marks), &mut stored, &["incremental", "incremental"]);
}

#[test]
fn a_bitmap_that_stopped_recording_or_serves_somebody_else_is_not_believed() {
    let mut rng = Rng::new(2);
    let (mut daemon, marks, mut stored) = begun(&mut rng);
    daemon.run("block-dirty-bitmap-disable", json!({ "node": "a", "name": ours(&daemon, "a") }));
    daemon.scribble(&mut rng, 10);
    daemon.run("block-dirty-bitmap-enable", json!({ "node": "a", "name": ours(&daemon, "a") }));
    daemon.run("block-dirty-bitmap-disable", json!({ "node": "a", "name": ours(&daemon, "a") }));
    // An export takes hold of the bitmap.
    let name = ours(&daemon, "b");
    daemon.run("block-dirty-bitmap-disable", json!({ "node": "b", "name": name }));
    daemon.run(
        "block-export-add",
        json!({ "type": "nbd", "id": "other", "node-name": "b", "name": "other", "bitmaps": [name] }),
    );
    let snapshot = daemon.snapshot(&request(&mut rng, Some(&marks))).unwrap();
    let told = modes(snapshot.as_ref());
    assert!(told[0].contains("was not recording") && told[1].contains("in use"), "{told:?}");
    capture(snapshot.as_ref(), &mut stored).unwrap();
    assert!(stored == daemon.models());
    // The old bitmap of `b` cannot be let go; the point is whole all the same.
    let error = snapshot.commit().unwrap_err();
    assert!(error.what().contains("everything is stored"), "{error:?}");
}

#[test]
fn what_others_keep_on_the_disks_stays_and_other_repositories_have_their_own() {
    let mut rng = Rng::new(3);
    let (mut daemon, marks, mut stored) = begun(&mut rng);
    daemon.run("block-dirty-bitmap-add", json!({ "node": "a", "name": "foreign", "persistent": true }));
    let other = Owner { repository: Id16([7; 16]), ..OWNER };
    let first = daemon.snapshot(&SnapshotRequest { owner: other, ..request(&mut rng, None) }).unwrap();
    let other_marks = first.marks().unwrap();
    first.commit().unwrap();
    daemon.scribble(&mut rng, 10);
    point(&daemon, &mut rng, Some(&marks), &mut stored, &["incremental", "incremental"]);
    daemon.scribble(&mut rng, 10);
    let second = SnapshotRequest { owner: other, ..request(&mut rng, Some(&other_marks)) };
    let second = daemon.snapshot(&second).unwrap();
    assert_eq!(modes(second.as_ref()), ["incremental", "incremental"]);
    drop(second);
    let mut kept = daemon.bitmaps("a");
    kept.retain(|name| !name.starts_with("mainstay-"));
    assert_eq!((kept, daemon.bitmaps("a").len()), (vec!["foreign".to_owned()], 3));
}

#[test]
fn a_resized_disk_is_scanned_and_a_new_one_read_in_full() {
    let mut rng = Rng::new(4);
    let (mut daemon, marks, mut stored) = begun(&mut rng);
    daemon.stop();
    run("qemu-img", &["resize", "-q", daemon.path("a").to_str().unwrap(), "3M"]);
    daemon.disks[0].model.resize(3 << 20, 0);
    daemon.add_disk("c", "qcow2", 1 << 20);
    daemon.start();
    daemon.scribble(&mut rng, 20);
    let why = "had 2097152 bytes and now has 3145728";
    let marks = point(&daemon, &mut rng, Some(&marks), &mut stored, &[why, "incremental", "full"]);
    daemon.scribble(&mut rng, 20);
    point(&daemon, &mut rng, Some(&marks), &mut stored, &["incremental"; 3]);
}

#[test]
fn disks_that_changed_places_are_scanned() {
    let mut rng = Rng::new(5);
    let mut daemon = Daemon::new(&[("a", "qcow2", 1 << 20), ("b", "qcow2", 1 << 20)]);
    daemon.scribble(&mut rng, 20);
    let mut stored = Vec::new();
    let marks = point(&daemon, &mut rng, None, &mut stored, &["full", "full"]);
    daemon.stop();
    for (from, to) in [("a", "x"), ("b", "a"), ("x", "b")] {
        run("mv", &[daemon.path(from).to_str().unwrap(), daemon.path(to).to_str().unwrap()]);
    }
    let (first, second) = daemon.disks.split_at_mut(1);
    std::mem::swap(&mut first[0].model, &mut second[0].model);
    daemon.start();
    point(&daemon, &mut rng, Some(&marks), &mut stored, &["another file", "another file"]);
}

#[test]
fn everything_is_read_every_so_often() {
    let mut rng = Rng::new(6);
    let (mut daemon, mut marks, mut stored) = begun(&mut rng);
    let mut told = Vec::new();
    for _ in 0..5 {
        daemon.scribble(&mut rng, 5);
        let asked = SnapshotRequest { scan_every: 3, ..request(&mut rng, Some(&marks)) };
        let snapshot = daemon.snapshot(&asked).unwrap();
        told.push(modes(snapshot.as_ref()).remove(0).chars().next().unwrap());
        capture(snapshot.as_ref(), &mut stored).unwrap();
        assert!(stored == daemon.models());
        marks = snapshot.marks().unwrap();
        snapshot.commit().unwrap();
    }
    assert_eq!(told.iter().collect::<String>(), "iisii");
}

#[test]
fn one_disk_can_be_asked_for_and_one_that_is_not_there_is_named() {
    let mut rng = Rng::new(7);
    let daemon = Daemon::new(&TWO);
    let only = SnapshotRequest { disks: vec!["b".into()], ..request(&mut rng, None) };
    assert_eq!(daemon.snapshot(&only).unwrap().disks()[0].name, "b");
    let wrong = SnapshotRequest { disks: vec!["z".into()], ..request(&mut rng, None) };
    let error = daemon.snapshot(&wrong).map(drop).unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    assert_eq!(error.next_step(), Some("its disks are a, b"));
    assert_eq!((daemon.remains(), daemon.bitmaps("a")), (vec![], vec![]));
}

#[test]
fn a_daemon_that_dies_during_a_run_ends_it_and_the_next_one_is_right() {
    let mut rng = Rng::new(8);
    let (mut daemon, marks, mut stored) = begun(&mut rng);
    let snapshot = daemon.snapshot(&request(&mut rng, Some(&marks))).unwrap();
    daemon.kill();
    capture(snapshot.as_ref(), &mut stored.clone()).unwrap_err();
    drop(snapshot);
    daemon.start();
    daemon.scribble(&mut rng, 10);
    point(&daemon, &mut rng, Some(&marks), &mut stored, &["scan: the bitmap", "scan: the bitmap"]);
    assert_eq!(std::fs::read_dir(daemon.scratch()).unwrap().count(), 0);
}

#[test]
fn when_the_scratch_space_runs_out_the_run_fails_and_the_guest_goes_on() {
    let mut rng = Rng::new(9);
    let (mut daemon, marks, mut stored) = begun(&mut rng);
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    let free = rustix::fs::statvfs(place.path()).map(|stat| stat.f_bavail * stat.f_frsize).unwrap();
    let host = |reserve| host_of(daemon.machine(), place.path().into()).scratch_reserve(reserve);
    let error =
        host(free + (1 << 30)).snapshot(&id(), &request(&mut rng, Some(&marks))).map(drop).unwrap_err();
    assert_eq!(error.code(), Code::Full);
    let host = host(free - (16 << 20));
    let snapshot = host.snapshot(&id(), &request(&mut rng, Some(&marks))).unwrap();
    std::fs::write(place.path().join("big"), vec![1; 32 << 20]).unwrap();
    let mut error = None;
    wait_for(|| {
        error = capture(snapshot.as_ref(), &mut stored.clone()).err();
        error.is_some()
    });
    assert_eq!(error.unwrap().code(), Code::Full);
    daemon.scribble(&mut rng, 10);
    drop(snapshot);
    point(&daemon, &mut rng, Some(&marks), &mut stored, &["incremental", "incremental"]);
}

struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &["--lazy", self.0.to_str().unwrap()]);
    }
}

#[test]
fn filters_give_the_snapshot_up_and_not_the_guest() {
    if !rustix::process::geteuid().is_root() {
        println!("NOT RUN: only root can mount a file system that is full at once");
        return;
    }
    let mut rng = Rng::new(14);
    let mut daemon = Daemon::emulator(&[("a", "qcow2", 4 << 20)]);
    daemon.write(0, 0, &vec![7; 4 << 20]);
    let scratch = daemon.scratch();
    let small = ["-t", "tmpfs", "-o", "size=1m", "none", scratch.to_str().unwrap()];
    run("mount", &small);
    let mounted = Mounted(scratch.clone());
    let host = || host_of(daemon.machine(), scratch.clone()).scratch_reserve(0);
    let first = host().snapshot(&id(), &request(&mut rng, None)).unwrap();
    let marks = first.marks().unwrap();
    let mut stored = Vec::new();
    capture(first.as_ref(), &mut stored).unwrap();
    first.commit().unwrap();
    let snapshot = host().snapshot(&id(), &request(&mut rng, Some(&marks))).unwrap();
    daemon.write(0, 0, &vec![8; 3 << 20]);
    let error = snapshot.open(0).unwrap().read_at(0, &mut [0; 4096]).unwrap_err();
    assert_eq!(error.code(), Code::Full, "{error:?}");
    drop(snapshot);
    drop(mounted);
    let last = daemon.snapshot(&request(&mut rng, Some(&marks))).unwrap();
    assert_eq!(modes(last.as_ref()), ["incremental"]);
    capture(last.as_ref(), &mut stored).unwrap();
    assert!(stored == daemon.models());
}

#[test]
fn a_monitor_that_speaks_to_somebody_else_is_a_conflict() {
    let daemon = Daemon::new(&TWO);
    let _busy = Monitor::connect(&daemon.path("monitor"));
    let error = daemon.host().list().unwrap_err();
    assert_eq!(error.code(), Code::Conflict);
}

#[test]
fn a_guest_is_frozen_for_the_moment_only() {
    let mut rng = Rng::new(10);
    let daemon = Daemon::new(&TWO);
    let guest = serve(daemon.path("agent"), Manner::Willing);
    let machine = QemuMachine { agent: Some(daemon.path("agent").into()), ..daemon.machine() };
    let host = host_of(machine, daemon.scratch());
    let reached = |asked: SnapshotRequest| {
        let snapshot = host.snapshot(&id(), &asked).unwrap();
        assert!(!guest.frozen.load(Ordering::SeqCst));
        assert_eq!(snapshot.notes(), [""; 0]);
        snapshot.reached()
    };
    assert_eq!(reached(request(&mut rng, None)), Consistency::FileSystem);
    let hooked = SnapshotRequest { hooked: true, trim: true, ..request(&mut rng, None) };
    assert_eq!(reached(hooked), Consistency::Application);
    assert_eq!((guest.freezes.load(Ordering::SeqCst), guest.trims.load(Ordering::SeqCst)), (2, 1));
    let crash = SnapshotRequest { want: Consistency::Crash, ..request(&mut rng, None) };
    assert_eq!(reached(crash), Consistency::Crash);
    assert_eq!(guest.freezes.load(Ordering::SeqCst), 2);
}

#[test]
fn a_guest_that_does_not_freeze_is_captured_as_it_is_and_thawed_in_any_case() {
    for manner in [Manner::Silent, Manner::SlowToFreeze, Manner::Unable, Manner::Endless, Manner::Babbling] {
        let mut rng = Rng::new(11);
        let mut daemon = Daemon::new(&TWO);
        daemon.scribble(&mut rng, 5);
        let guest = serve(daemon.path("agent"), manner);
        let machine = QemuMachine { agent: Some(daemon.path("agent").into()), ..daemon.machine() };
        let asked = SnapshotRequest { freeze_limit: Duration::from_millis(200), ..request(&mut rng, None) };
        let snapshot = host_of(machine, daemon.scratch()).snapshot(&id(), &asked).unwrap();
        assert_eq!(snapshot.reached(), Consistency::Crash, "{manner:?}");
        assert!(snapshot.notes()[0].starts_with("the guest was"), "{:?}", snapshot.notes());
        let mut stored = Vec::new();
        capture(snapshot.as_ref(), &mut stored).unwrap();
        assert!(stored == daemon.models());
        assert!(!guest.frozen.load(Ordering::SeqCst), "{manner:?}");
        assert_eq!(guest.freezes.load(Ordering::SeqCst), usize::from(manner == Manner::SlowToFreeze));
    }
}

#[test]
fn a_host_that_hangs_while_the_guest_is_frozen_has_it_thawed_and_says_so() {
    let mut rng = Rng::new(12);
    let daemon = Daemon::new(&TWO);
    let guest = serve(daemon.path("agent"), Manner::Willing);
    let machine = QemuMachine { agent: Some(daemon.path("agent").into()), ..daemon.machine() };
    let host = host_of(machine, daemon.scratch());
    let asked = SnapshotRequest { freeze_limit: Duration::from_millis(100), ..request(&mut rng, None) };
    // From the freeze on the daemon does nothing more.
    *guest.stops.lock().unwrap() = Some(daemon.pid());
    let snapshot = std::thread::scope(|scope| {
        let taken = scope.spawn(|| host.snapshot(&id(), &asked).unwrap());
        wait_for(|| guest.freezes.load(Ordering::SeqCst) == 1);
        wait_for(|| !guest.frozen.load(Ordering::SeqCst));
        daemon.signal(Signal::CONT);
        taken.join().unwrap()
    });
    assert_eq!(snapshot.reached(), Consistency::Crash);
    assert_eq!(snapshot.notes(), ["the guest was thawed before the disks were held"]);
}

const KILLED: &str = "this run is to be killed";

/// The run of the next test, in a process of its own.
#[test]
fn process_that_is_killed_in_the_middle_of_a_run() {
    let here = std::env::current_dir().unwrap();
    if !here.join(KILLED).exists() {
        return;
    }
    let machine = QemuMachine {
        name: "daemon".into(),
        named: true,
        monitor: here.join("monitor").into(),
        agent: Some(here.join("agent")).filter(|agent| agent.exists()).map(Into::into),
        server: Some(here.join("server")).filter(|server| server.exists()),
        link: None,
    };
    let program = std::env::current_exe().unwrap();
    let arguments = ["--exact", "trouble::process_that_stands_guard", "--nocapture"].map(Into::into).to_vec();
    let host = host_of(machine, here.join("scratch")).guarded_by(GuardProgram { program, arguments });
    let marks = std::fs::read(here.join("marks")).unwrap();
    let since = Marks::from_position(&mainstay_core::Position(marks)).unwrap();
    let asked = SnapshotRequest {
        freeze_limit: Duration::from_secs(3600),
        ..request(&mut Rng::new(99), Some(&since))
    };
    let _snapshot = host.snapshot(&id(), &asked).unwrap();
    std::fs::write(here.join("reached"), "").unwrap();
    std::thread::sleep(Duration::from_secs(3600));
}

/// The guard of that run.
#[test]
fn process_that_stands_guard() {
    mainstay_workloads::vm::attend_at_standard_streams().unwrap();
}

#[expect(clippy::disallowed_methods, reason = "the test starts itself again, to kill it")]
fn start_run(daemon: &Daemon) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "trouble::process_that_is_killed_in_the_middle_of_a_run"])
        .current_dir(daemon.directory.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_run_that_is_killed_leaves_a_thawed_guest_a_clean_host_and_its_marks() {
    for while_frozen in [false, true] {
        let mut rng = Rng::new(13);
        let (mut daemon, marks, mut stored) = begun(&mut rng);
        daemon.scratch();
        std::fs::write(daemon.path(KILLED), "").unwrap();
        std::fs::write(daemon.path("marks"), marks.to_position().unwrap().0).unwrap();
        let manner = if while_frozen { Manner::Speechless } else { Manner::Willing };
        let guest = serve(daemon.path("agent"), manner);
        let mut child = start_run(&daemon);
        match while_frozen {
            true => wait_for(|| guest.frozen.load(Ordering::SeqCst)),
            false => wait_for(|| daemon.path("reached").exists()),
        }
        child.kill().unwrap();
        child.wait().unwrap();
        wait_for(|| !guest.frozen.load(Ordering::SeqCst));
        wait_for(|| std::fs::read_dir(daemon.scratch()).unwrap().count() == 0);
        assert_eq!(daemon.remains(), [""; 0]);
        daemon.scribble(&mut rng, 10);
        point(&daemon, &mut rng, Some(&marks), &mut stored, &["incremental", "incremental"]);
        ours(&daemon, "a");
    }
}

#[test]
fn the_devices_of_a_run_that_is_killed_get_their_disks_back() {
    let mut rng = Rng::new(15);
    let mut daemon = Daemon::emulator(&[("a", "qcow2", 1 << 20), ("b", "raw", 1 << 20)]);
    let first = daemon.snapshot(&request(&mut rng, None)).unwrap();
    let marks = first.marks().unwrap();
    let mut stored = Vec::new();
    capture(first.as_ref(), &mut stored).unwrap();
    first.commit().unwrap();
    std::fs::write(daemon.path(KILLED), "").unwrap();
    std::fs::write(daemon.path("marks"), marks.to_position().unwrap().0).unwrap();
    let mut child = start_run(&daemon);
    wait_for(|| daemon.path("reached").exists());
    assert_eq!(daemon.drivers(), ["copy-before-write"; 2]);
    daemon.scribble(&mut rng, 5);
    // As if it were in the middle of putting the filters in.
    let mut monitor = Monitor::connect(&daemon.path("writes"));
    monitor.ask("stop", json!({}));
    let directory = std::fs::read_dir(daemon.scratch()).unwrap().next().unwrap().unwrap().path();
    std::fs::write(directory.join("stopped"), "").unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    wait_for(|| std::fs::read_dir(daemon.scratch()).unwrap().count() == 0);
    assert_eq!(monitor.ask("query-status", json!({}))["status"], "running");
    drop(monitor);
    assert_eq!((daemon.drivers(), daemon.remains()), (vec!["qcow2".into(), "raw".into()], vec![]));
    daemon.scribble(&mut rng, 5);
    let last = daemon.snapshot(&request(&mut rng, Some(&marks))).unwrap();
    assert_eq!(modes(last.as_ref()), ["incremental"; 2]);
    capture(last.as_ref(), &mut stored).unwrap();
    assert!(stored == daemon.models());
}

#[test]
fn hostile_monitors_end_in_errors() {
    let lines: [&[u8]; 6] = [
        b"",
        b"hello\n",
        b"{}\n",
        b"{\"QMP\":{\"version\":{\"qemu\":{\"major\":10,\"minor\":0}}}}\n\n",
        b"{\"QMP\":{\"version\":{\"qemu\":{\"major\":10,\"minor\":0}}}}\n{\"return\":{},\"id\":1}\n{\"return\":[[[[",
        &[b'['; 100_000],
    ];
    for line in lines {
        let directory = tempfile::tempdir().unwrap();
        let monitor = directory.path().join("monitor");
        let listener = std::os::unix::net::UnixListener::bind(&monitor).unwrap();
        let line = line.to_vec();
        let serving = std::thread::spawn(move || {
            use std::io::Write as _;
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(&line).unwrap();
            // Closed by turns: the other side must not wait for more.
            drop(OwnedFd::from(stream));
        });
        let machine = QemuMachine {
            name: "m".into(),
            named: true,
            monitor: monitor.into(),
            agent: None,
            server: None,
            link: None,
        };
        host_of(machine, directory.path().into()).list().map(drop).unwrap_err();
        serving.join().unwrap();
    }
}
