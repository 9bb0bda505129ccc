//! Points of a guest, taken while it writes.

use std::time::Duration;

use mainstay_testkit::lab::{Fsck, Guest, GuestPlan, Writers, compare};

use crate::home::{Home, modes, plain, references};

#[test]
fn every_point_of_a_running_guest_restores_to_a_moment_of_it_and_boots() {
    let plan = GuestPlan::new().unwrap().data(128).unwrap();
    // What the person calls it counts more.
    let guest = plan.words(["-name", "other"]).start().unwrap();
    let (home, host) = (Home::new(), plain(&guest));
    let writers = Writers::start(guest.inside()).unwrap();
    let mut moments = Vec::new();
    for run in 0..3 {
        let before = writers.rounds().unwrap();
        let line = home.back_up(&host, "web", &[]);
        moments.push((before, writers.rounds().unwrap()));
        assert_eq!(line["consistency"], "file-system", "{line}");
        assert_eq!(line["workload"], "web");
        let expected = if run == 0 { "full" } else { "incremental" };
        assert_eq!(modes(&line), [expected, expected]);
        writers.write_on().unwrap();
    }
    for (age, (before, after)) in moments.iter().rev().enumerate() {
        let images = home.restore(&format!("web~{age}"));
        Writers::check(references(&images), Fsck::Clean, *before, *after).unwrap();
    }
    stands_still(&home, &host, &guest);
    // Bit by bit, once nothing moves.
    writers.rest().unwrap();
    home.back_up(&host, "web", &[]);
    let images = home.restore("web@latest");
    for (disk, image) in images.iter().enumerate() {
        compare(image, guest.disk(disk)).unwrap();
    }
    Writers::go_on(references(&images)).unwrap();
}

/// Measures, over more points, for how long a guest under load is held still. A figure, not a promise of this machine.
fn stands_still(home: &Home, host: &str, guest: &Guest) {
    let before = guest.standstills().len();
    let held = |_| home.back_up(host, "web", &[])["frozen_milliseconds"].as_u64().unwrap();
    let mut held: Vec<u64> = (0..20).map(held).collect();
    let mut felt: Vec<u128> = guest.standstills().iter().skip(before).map(Duration::as_millis).collect();
    assert_eq!(felt.len(), held.len(), "each point freezes once, and thaws");
    held.sort_unstable();
    felt.sort_unstable();
    println!("held still for {} ms at the median, {} ms at most", held[held.len() / 2], held[held.len() - 1]);
    println!("by the guest's clock for {} ms, {} ms at most", felt[felt.len() / 2], felt[felt.len() - 1]);
}
