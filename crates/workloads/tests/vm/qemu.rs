//! The QEMU driver against a real block layer.

use mainstay_testkit::{Rng, for_each_seed};
use mainstay_workloads::vm::Marks;

use mainstay_nbd::WritableBlocks as _;

use crate::daemon::{Daemon, capture, modes, request, whole};

const DISKS: [(&str, &str, usize); 3] =
    [("a", "qcow2", 6 << 20), ("b", "raw", (2 << 20) + 512), ("c", "qcow2-0.10", 1 << 20)];

/// What a run must say of each disk, by what happened since the last committed one.
#[derive(Clone, Copy, PartialEq)]
enum Since {
    Nothing,
    Restart,
    Death,
}

#[test]
fn nothing_is_lost_of_what_is_written_while_a_snapshot_is_taken() {
    let mut rng = Rng::new(3);
    // So large that hardly anything is written twice between two points, which would hide a loss.
    let daemon = Daemon::new(&[("a", "qcow2", 64 << 20)]);
    let (mut marks, mut stored): (Option<Marks>, Vec<Vec<u8>>) = (None, Vec::new());
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = || {
            let (mut rng, guest) = (Rng::new(4), daemon.connect("a"));
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                guest.write_at(rng.range(0..16384) * 4096, &rng.bytes(4096)).unwrap();
            }
        };
        scope.spawn(writer);
        for run in 0..20 {
            let snapshot = daemon.snapshot(&request(&mut rng, marks.as_ref())).unwrap();
            let told = modes(snapshot.as_ref());
            assert_eq!(told, [if run == 0 { "full" } else { "incremental" }]);
            capture(snapshot.as_ref(), &mut stored).unwrap();
            same(&stored, &[whole(snapshot.as_ref(), 0)], &told);
            marks = Some(snapshot.marks().unwrap());
            snapshot.commit().unwrap();
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

/// What the emulator's guest is made to do, takes longer.
const EMULATED: [(&str, &str, usize); 2] = [("a", "qcow2", 2 << 20), ("b", "raw", 1 << 20)];

#[test]
fn points_of_an_emulator_are_what_its_devices_had_written() {
    for_each_seed(2, |seed| {
        let mut rng = Rng::new(seed);
        let mut daemon = Daemon::emulator(&EMULATED);
        let (mut marks, mut stored): (Option<Marks>, Vec<Vec<u8>>) = (None, Vec::new());
        for run in 0..5 {
            daemon.scribble(&mut rng, 8);
            let snapshot = daemon.snapshot(&request(&mut rng, marks.as_ref())).unwrap();
            let expected = daemon.models();
            assert_eq!(daemon.drivers(), ["copy-before-write"; 2], "the filters are not in");
            daemon.scribble(&mut rng, 8);
            let told = modes(snapshot.as_ref());
            assert_eq!(told, [if run == 0 { "full" } else { "incremental" }; 2]);
            let mut captured = stored.clone();
            capture(snapshot.as_ref(), &mut captured).unwrap();
            same(&captured, &expected, &told);
            if run == 0 || rng.chance(60) {
                marks = Some(snapshot.marks().unwrap());
                snapshot.commit().unwrap();
                stored = captured;
            } else {
                drop(snapshot);
            }
            assert_eq!(daemon.drivers(), ["qcow2", "raw"], "the filters are not out");
            assert_eq!(daemon.remains(), [""; 0]);
        }
    });
}

#[test]
fn points_are_what_the_guest_had_written_whatever_happens_in_between() {
    let mut increments = 0;
    for_each_seed(4, |seed| {
        let mut rng = Rng::new(seed);
        let mut daemon = Daemon::new(&DISKS);
        let (mut marks, mut stored): (Option<Marks>, Vec<Vec<u8>>) = (None, Vec::new());
        let mut since = Since::Nothing;
        for _ in 0..8 {
            daemon.scribble(&mut rng, 20);
            let snapshot = daemon.snapshot(&request(&mut rng, marks.as_ref())).unwrap();
            let expected = daemon.models();
            daemon.scribble(&mut rng, 20);
            let told = modes(snapshot.as_ref());
            let wanted = match (&marks, since) {
                (None, _) => ["full"; 3],
                (Some(_), Since::Nothing) => ["incremental"; 3],
                (Some(_), Since::Restart) => ["incremental", "scan: the bitmap", "scan: the bitmap"],
                (Some(_), Since::Death) => ["scan: the bitmap", "scan: the bitmap", "scan: the bitmap"],
            };
            assert!(
                told.iter().zip(wanted).all(|(told, wanted)| told.starts_with(wanted)),
                "{told:?} {wanted:?}"
            );
            increments += told.iter().filter(|told| *told == "incremental").count();
            let mut captured = stored.clone();
            capture(snapshot.as_ref(), &mut captured).unwrap();
            same(&captured, &expected, &told);
            if rng.chance(70) {
                marks = Some(snapshot.marks().unwrap());
                snapshot.commit().unwrap();
                stored = captured;
                since = Since::Nothing;
            } else {
                drop(snapshot);
            }
            assert_eq!(daemon.remains(), [""; 0]);
            match rng.below(4) {
                0 => {
                    daemon.stop();
                    daemon.start();
                    since = if since == Since::Death { since } else { Since::Restart };
                }
                1 => {
                    daemon.kill();
                    daemon.start();
                    since = Since::Death;
                }
                _ => {}
            }
        }
    });
    assert!(increments > 4, "hardly anything was incremental");
}

fn same(captured: &[Vec<u8>], expected: &[Vec<u8>], told: &[String]) {
    for (index, (captured, expected)) in captured.iter().zip(expected).enumerate() {
        if captured != expected {
            let differs = captured.iter().zip(expected).position(|(one, other)| one != other);
            panic!("disk {index} differs at {differs:?}, {told:?}");
        }
    }
}
