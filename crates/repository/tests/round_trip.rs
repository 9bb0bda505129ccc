//! Points go in and come out the same: random trees, unchanged items, increments, expiry and collection.

mod common;

use common::{Bench, backup, compare, open, restore};
use mainstay_core::Silent;
use mainstay_repository::{GcOptions, VerifyScope};
use mainstay_testkit::{for_each_seed, random_items};

#[test]
fn random_trees_come_back_as_they_went_in() {
    for_each_seed(20, |seed| {
        let bench = Bench::new(seed);
        let items = random_items(seed, 40);
        let point = backup(&bench.repository, items.clone());
        compare(&items, &restore(&bench.repository, &point));
        // Another process, knowing nothing but the store and the key.
        compare(&items, &restore(&open(&bench), &point));
        let report = bench
            .repository
            .verify(&VerifyScope { read_data: true, ..VerifyScope::default() }, &Silent)
            .unwrap();
        assert_eq!(report.problems, Vec::<String>::new());
    });
}

#[test]
fn expired_points_are_collected_and_the_others_stay_whole() {
    for_each_seed(10, |seed| {
        let bench = Bench::new(seed);
        let mut kept = Vec::new();
        let mut gone = Vec::new();
        for round in 0..6_u64 {
            let items = random_items(seed.wrapping_mul(31) + round / 2, 25);
            let point = backup(&bench.repository, items.clone());
            if round % 2 == 0 { gone.push(point) } else { kept.push((point, items)) }
        }
        let before = bench.repository.stats().pack_bytes;
        bench.repository.expire(&gone, "test").unwrap();
        bench.repository.expire(&[kept.remove(0).0], "test").unwrap();
        let options = GcOptions { grace: std::time::Duration::ZERO, ..GcOptions::default() };
        for _condemn_then_delete in 0..3 {
            let plan = bench.repository.plan_gc(&options, &Silent).unwrap();
            bench.repository.gc(&plan, &Silent).unwrap();
        }
        assert!(bench.repository.stats().pack_bytes < before, "nothing was freed");
        let other = open(&bench);
        assert_eq!(other.points().unwrap().len(), kept.len());
        for (point, items) in &kept {
            compare(items, &restore(&other, point));
        }
        let report =
            other.verify(&VerifyScope { read_data: true, ..VerifyScope::default() }, &Silent).unwrap();
        assert_eq!(report.problems, Vec::<String>::new());
    });
}
