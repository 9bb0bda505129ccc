//! Promotions: the log goes on upon another timeline, and recovery goes with it.

use mainstay_engine::postgres::{Until, intervals, plan_cluster, plan_cluster_on, restore_cluster};
use mainstay_repository::Repository;
use mainstay_testkit::lab::{Postgres, PostgresPlan};
use mainstay_workloads::postgres::Lsn;

use crate::common::{back_up, caught_up, directory, following, progress, repository, restore};

fn place(server: &Postgres) -> Lsn {
    server.ask("postgres", "SELECT pg_current_wal_insert_lsn()").unwrap().parse().unwrap()
}

fn insert(server: &Postgres, number: u32) {
    server.ask("postgres", &format!("INSERT INTO item VALUES ({number})")).unwrap();
}

fn items(server: &Postgres) -> String {
    server.ask("postgres", "SELECT string_agg(n::text, ' ' ORDER BY n) FROM item").unwrap()
}

fn spans(repository: &Repository) -> Vec<String> {
    let (points, journals) = (repository.points().unwrap(), repository.journals().unwrap());
    let spans = intervals(repository, &points, &journals, &points[0].workload.id);
    spans.into_iter().map(|(log, _)| log.rsplit(' ').next().unwrap().to_owned()).collect()
}

fn primary() -> Postgres {
    let settings = [("wal_keep_size", "'256MB'")];
    let primary = Postgres::start(&PostgresPlan { settings: &settings, ..PostgresPlan::default() }).unwrap();
    primary.ask("postgres", "CREATE TABLE item (n int)").unwrap();
    primary
}

/// A new standby has no log from before it was made: that has to be stored by then.
fn standby_of(repository: &Repository, server: &Postgres, timeline: u32) -> Postgres {
    let standby = server.standby().unwrap();
    following(repository, server, None, || caught_up(repository, server, timeline)).0.unwrap();
    standby
}

#[test]
fn two_promotions_are_followed_and_any_place_on_either_timeline_comes_back() {
    let mut primary = primary();
    let repository = repository();
    let made = back_up(&repository, &primary);
    let mut standby = standby_of(&repository, &primary, 1);
    // The follower is there while its server is promoted.
    let (followed, second_place) = following(&repository, &standby, None, || {
        insert(&primary, 1);
        caught_up(&repository, &primary, 1);
        primary.stop();
        standby.promote().unwrap();
        let second_place = place(&standby);
        insert(&standby, 2);
        caught_up(&repository, &standby, 2);
        second_place
    });
    followed.unwrap();
    // And not there while this happens.
    insert(&standby, 3);
    let second = standby_of(&repository, &standby, 2);
    standby.stop();
    second.promote().unwrap();
    insert(&second, 4);
    let (followed, ()) = following(&repository, &second, Some("mainstay"), || {
        caught_up(&repository, &second, 3);
    });
    followed.unwrap();
    assert_eq!(spans(&repository), ["3"], "one span over three timelines");
    let directory = directory();
    for (name, until, wanted) in [
        ("end", Until::End, "1 2 3 4"),
        ("middle", Until::Lsn(second_place), "1"),
        ("point", Until::Lsn(Lsn::from_position(&made.point.position).unwrap()), ""),
    ] {
        let to = directory.path().join(name);
        restore(&repository, &made.point.workload.id, until, &to);
        let copy = Postgres::adopt(&to).unwrap();
        assert_eq!(items(&copy), wanted, "{name}");
        let timeline = copy.ask("postgres", "CHECKPOINT; SELECT timeline_id FROM pg_control_checkpoint()");
        assert_eq!(timeline.unwrap(), "4", "a number that no other timeline has");
    }
    let newer = back_up(&repository, &second);
    let to = directory.path().join("newer");
    restore(&repository, &newer.point.workload.id, Until::End, &to);
    assert_eq!(items(&Postgres::adopt(&to).unwrap()), "1 2 3 4");
}

#[test]
fn what_the_old_server_wrote_after_it_was_left_stays_on_its_own_timeline() {
    let mut primary = primary();
    let repository = repository();
    let made = back_up(&repository, &primary);
    let mut standby = standby_of(&repository, &primary, 1);
    standby.stop();
    let (followed, ()) = following(&repository, &primary, None, || {
        insert(&primary, 1);
        caught_up(&repository, &primary, 1);
    });
    followed.unwrap();
    primary.kill();
    standby.resume_standby().unwrap();
    standby.promote().unwrap();
    let (followed, ()) = following(&repository, &standby, None, || {
        insert(&standby, 2);
        caught_up(&repository, &standby, 2);
    });
    followed.unwrap();
    assert_eq!(spans(&repository), ["2", "1"]);
    let directory = directory();
    let workload = &made.point.workload.id;
    for (timeline, wanted) in [(None, "2"), (Some(1), "1")] {
        let plan = plan_cluster_on(&repository, workload, Until::End, timeline).unwrap();
        let to = directory.path().join(wanted);
        restore_cluster(&repository, &plan, &to, &progress()).unwrap();
        assert_eq!(items(&Postgres::adopt(&to).unwrap()), wanted, "{timeline:?}");
    }
    assert_eq!(plan_cluster(&repository, workload, Until::End).unwrap().timeline(), 2);
}
