//! Points of a guest, taken while it writes.

use mainstay_testkit::lab::{Fsck, GuestPlan, Writers, compare};

use crate::home::{Home, modes, plain, references};

#[test]
fn every_point_of_a_running_guest_restores_to_a_moment_of_it_and_boots() {
    let guest = GuestPlan::new().unwrap().data(128).unwrap().start().unwrap();
    let (home, host) = (Home::new(), plain(&guest));
    let writers = Writers::start(guest.inside()).unwrap();
    let mut moments = Vec::new();
    for run in 0..3 {
        let before = writers.rounds().unwrap();
        let line = home.back_up(&host, "web", &[]);
        moments.push((before, writers.rounds().unwrap()));
        assert_eq!(line["consistency"], "file-system", "{line}");
        let expected = if run == 0 { "full" } else { "incremental" };
        assert_eq!(modes(&line), [expected, expected]);
        writers.write_on().unwrap();
    }
    println!("by the guest's clock it stood still for {:?}", guest.standstills());
    for (age, (before, after)) in moments.iter().rev().enumerate() {
        let images = home.restore(&format!("web~{age}"));
        Writers::check(references(&images), Fsck::Clean, *before, *after).unwrap();
    }
    // Bit by bit, once nothing moves.
    writers.rest().unwrap();
    home.back_up(&host, "web", &[]);
    let images = home.restore("web@latest");
    for (disk, image) in images.iter().enumerate() {
        compare(image, guest.disk(disk)).unwrap();
    }
    Writers::go_on(references(&images)).unwrap();
}
