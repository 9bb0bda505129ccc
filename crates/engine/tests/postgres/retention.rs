//! What expires takes the log along that only it needed, and nothing else.

use mainstay_core::Silent;
use mainstay_engine::postgres::{Until, holes, intervals, plan_cluster, plan_trims, trim};
use mainstay_repository::{GcOptions, Repository};
use mainstay_testkit::lab::{Postgres, PostgresPlan};
use mainstay_workloads::postgres::Lsn;

use crate::common::{back_up, directory, repository, restore};

fn expire(repository: &Repository, number: usize) -> usize {
    let mut points = repository.points().unwrap();
    repository.expire(&[points.remove(number).id], "a test").unwrap();
    let journals = repository.journals().unwrap();
    let (trims, unsure) = plan_trims(repository, &points, &journals).unwrap();
    assert!(unsure.is_empty());
    trim(repository, &journals, &trims).unwrap();
    let options = GcOptions { grace: std::time::Duration::ZERO, ..GcOptions::default() };
    let plan = repository.plan_gc(&options, &Silent).unwrap();
    repository.gc(&plan, &Silent).unwrap();
    trims.len()
}

#[test]
fn log_goes_with_the_last_point_that_needed_it_and_leaves_no_hole() {
    let server = Postgres::start(&PostgresPlan { segment: 1, ..PostgresPlan::default() }).unwrap();
    let repository = repository();
    server.ask("postgres", "CREATE TABLE item (n int, t text)").unwrap();
    let mut made = Vec::new();
    for number in 0..3 {
        let fill =
            format!("INSERT INTO item SELECT {number}, repeat('x', 500) FROM generate_series(1, 8000)");
        server.ask("postgres", &fill).unwrap();
        made.push(back_up(&repository, &server));
    }
    let workload = made[0].point.workload.id;
    let bytes = |repository: &Repository| -> u64 {
        repository.journals().unwrap()[0].stretches().iter().map(|stretch| stretch.bytes).sum()
    };
    let before = bytes(&repository);
    // The one in the middle: all of the log leads on from the oldest.
    expire(&repository, 1);
    assert!(bytes(&repository) > before * 3 / 4, "only what lies before the oldest may go");
    let place = Lsn::from_position(&made[1].point.position).unwrap();
    assert_eq!(plan_cluster(&repository, &workload, Until::Lsn(place)).unwrap().point.id, made[0].point.id);
    // The oldest.
    assert_eq!(expire(&repository, 0), 1);
    assert!(bytes(&repository) < before / 2, "{} of {before}", bytes(&repository));
    let journals = repository.journals().unwrap();
    let spans = intervals(&repository, &repository.points().unwrap(), &journals, &workload);
    assert_eq!(spans.len(), 1);
    assert_eq!(spans[0].1.start, made[2].point.position);
    assert!(holes(&journals, &workload).is_empty());
    plan_cluster(&repository, &workload, Until::Lsn(place)).err().unwrap();
    let directory = directory();
    let to = directory.path().join("again");
    restore(&repository, &workload, Until::End, &to);
    let copy = Postgres::adopt(&to).unwrap();
    assert_eq!(copy.ask("postgres", "SELECT count(*) FROM item").unwrap(), "24000");
    // And it is followed on.
    drop(copy);
    back_up(&repository, &server);
    assert!(holes(&repository.journals().unwrap(), &workload).is_empty());
}
