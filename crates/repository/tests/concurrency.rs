//! Two writers, an expirer, collectors without any grace and a reader at once, in thousands of orders.

mod common;
mod harness;

use harness::race::{Races, SAME_PAST};
use mainstay_testkit::for_each_seed;

/// Half of the seeds each, so that two processors share them.
fn race_share(share: u64) {
    let mut races = Races::default();
    for_each_seed(2000, |seed| {
        if seed / SAME_PAST % 2 == share {
            races.run(seed);
        }
    });
    let Races { seeds, points, .. } = races;
    assert!(points >= seeds * 2, "of four backups in each of {seeds} races only {points} came through");
}

#[test]
fn nobody_loses_anything_to_anybody() {
    race_share(0);
}

#[test]
fn nobody_loses_anything_to_anybody_in_other_orders() {
    race_share(1);
}
