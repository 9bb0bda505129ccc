//! The plan against tables of dates, and its promises against random points and policies.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::tz::TimeZone;
use mainstay_core::{Code, Id16, PointId, Time};
use mainstay_repository::{Hold, PointInfo};
use mainstay_testkit::{Rng, for_each_seed};

use super::{Policy, Why, plan_expire};
use crate::testing::{id, point, point_at, time};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn berlin() -> TimeZone {
    TimeZone::get("Europe/Berlin").unwrap()
}

fn policy(change: impl FnOnce(&mut Policy)) -> Policy {
    let mut policy = Policy::default();
    change(&mut policy);
    policy
}

/// Points of one workload, numbered from 1.
fn series(moments: &[&str]) -> Vec<PointInfo> {
    let number = |index: usize| u32::try_from(index).unwrap() + 1;
    moments.iter().enumerate().map(|(index, moment)| point(number(index), "web:etc", moment)).collect()
}

/// The numbers of the points that stay.
fn kept(points: &[PointInfo], policy: &Policy, zone: &TimeZone) -> Vec<u32> {
    let plan = plan_expire(points, policy, zone, time("2030-01-01")).unwrap();
    let stays = plan.verdicts.iter().filter(|verdict| !verdict.why.is_empty());
    let number = |id: PointId| u32::from_be_bytes(id.0[..4].try_into().unwrap());
    stays.map(|verdict| number(verdict.point.id)).collect()
}

#[test]
fn each_rule_keeps_the_newest_of_its_buckets() {
    let points = series(&[
        "2025-12-31T22:30:00Z", // 23:30 of the last day of 2025 in Berlin
        "2025-12-31T23:30:00Z", // 00:30 of the first day of 2026 there; ISO week 1 as well
        "2026-01-04T12:00:00Z", // Sunday
        "2026-01-05T12:00:00Z", // Monday
        "2026-01-05T12:20:00Z",
        "2026-01-05T13:10:00Z",
        "2026-02-01T00:00:00Z",
    ]);
    for (name, policy, zone, expected) in [
        ("last 2", policy(|policy| policy.last = 2), TimeZone::UTC, &[6, 7][..]),
        ("hourly 3", policy(|policy| policy.hourly = 3), TimeZone::UTC, &[5, 6, 7]),
        ("daily 3", policy(|policy| policy.daily = 3), TimeZone::UTC, &[3, 6, 7]),
        ("daily 9", policy(|policy| policy.daily = 9), TimeZone::UTC, &[2, 3, 6, 7]),
        ("daily 9 in Berlin", policy(|policy| policy.daily = 9), berlin(), &[1, 2, 3, 6, 7]),
        ("weekly 9", policy(|policy| policy.weekly = 9), TimeZone::UTC, &[3, 6, 7]),
        ("monthly 9", policy(|policy| policy.monthly = 9), TimeZone::UTC, &[2, 6, 7]),
        ("yearly 9", policy(|policy| policy.yearly = 9), TimeZone::UTC, &[2, 7]),
        ("yearly 9 in Berlin", policy(|policy| policy.yearly = 9), berlin(), &[1, 7]),
        ("within 27 days", policy(|policy| policy.within = Some(27 * DAY)), TimeZone::UTC, &[4, 5, 6, 7]),
        ("both", policy(|policy| (policy.last, policy.yearly) = (1, 2)), TimeZone::UTC, &[2, 7]),
    ] {
        assert_eq!(kept(&points, &policy, &zone), expected, "{name}");
    }
}

#[test]
fn an_hour_that_comes_twice_is_two_hours() {
    // Clocks in Berlin went from 03:00 back to 02:00 at 01:00 UTC.
    let points = series(&["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z"]);
    assert_eq!(kept(&points, &policy(|policy| policy.hourly = 2), &berlin()), [1, 2]);
}

#[test]
fn one_wild_clock_costs_nobody_a_point_and_stays_itself() {
    let one = policy(|policy| policy.last = 1);
    let mut points = series(&[
        "2026-01-01T00:00:00Z",
        "2099-01-01T00:00:00Z", // ahead
        "2026-01-02T00:00:00Z",
        "1999-01-01T00:00:00Z", // behind
        "2026-01-03T00:00:00Z",
    ]);
    assert_eq!(kept(&points, &one, &TimeZone::UTC), [2, 4, 5]);
    points[4].started = time("2026-01-03T00:00:00Z");
    points[4].committed = time("2025-01-01T00:00:00Z");
    let plan = plan_expire(&points, &one, &TimeZone::UTC, time("2030-01-01")).unwrap();
    assert!(plan.verdicts[4].why.iter().any(|why| matches!(why, Why::Anomaly(_))), "{:?}", plan.verdicts[4]);
}

#[test]
fn clocks_that_differ_by_minutes_are_no_anomaly() {
    let points = series(&["2026-01-01T00:02:00Z", "2026-01-01T00:00:00Z", "2026-01-01T00:03:00Z"]);
    assert_eq!(kept(&points, &policy(|policy| policy.last = 1), &TimeZone::UTC), [3]);
}

#[test]
fn a_clock_behind_the_points_is_refused() {
    let points = series(&["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]);
    let one = policy(|policy| policy.last = 1);
    let error = plan_expire(&points, &one, &TimeZone::UTC, time("2026-01-01T12:00:00Z")).unwrap_err();
    assert_eq!(error.code(), Code::Refused);
    plan_expire(&points, &one, &TimeZone::UTC, time("2026-01-02T00:00:00Z")).unwrap();
    let none = plan_expire(&points, &Policy::default(), &TimeZone::UTC, time("2026-01-03")).unwrap_err();
    assert_eq!(none.code(), Code::Usage);
}

#[test]
fn a_clock_far_ahead_ages_nothing() {
    let mut points = series(&["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z"]);
    let until = Some(time("2026-02-01"));
    points[0].holds.push(Hold {
        id: Id16::default(),
        reason: "audit".into(),
        until,
        placed: Time::default(),
    });
    let plan =
        plan_expire(&points, &policy(|policy| policy.within = Some(DAY)), &TimeZone::UTC, time("2200-01-01"));
    let plan = plan.unwrap();
    assert!(plan.expired().is_empty(), "{:?}", plan.verdicts);
    assert_eq!(plan.verdicts[0].why, [Why::Held("audit".into())]);
}

#[test]
fn the_newest_verified_point_stays_and_a_workload_without_one_is_named() {
    let mut points = series(&["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z"]);
    let one = policy(|policy| policy.last = 1);
    let now = time("2026-01-04");
    let plan = plan_expire(&points, &one, &TimeZone::UTC, now).unwrap();
    assert_eq!(plan.never_verified.len(), 1);
    points[0].verified = Some(now);
    points[1].proven = Some(now);
    let plan = plan_expire(&points, &one, &TimeZone::UTC, now).unwrap();
    assert_eq!((plan.expired(), plan.never_verified.len()), (vec![id(1)], 0));
}

#[test]
fn undo_points_go_by_age_alone() {
    let mut points = series(&["2026-01-01T00:00:00Z", "2026-01-05T00:00:00Z"]);
    points.push(point(3, "web:docs", "2026-01-09T00:00:00Z"));
    for undo in &mut points[..2] {
        undo.workload.kind.0 = "undo".into();
    }
    points[0].verified = Some(time("2026-01-01"));
    assert_eq!(kept(&points, &policy(|policy| policy.last = 9), &TimeZone::UTC), [2, 3]);
}

#[test]
fn what_takes_back_a_restore_of_a_machine_displaces_no_point_of_it() {
    let mut points = series(&[
        "2026-01-01T00:00:00Z",
        "2026-01-02T00:00:00Z",
        "2026-01-05T00:00:00Z",
        "2026-01-09T00:00:00Z",
        "2026-01-09T01:00:00Z",
    ]);
    points.iter_mut().for_each(|point| point.workload.kind.0 = "vm".into());
    for number in [0, 3, 4] {
        points[number].tags.push("undo".into());
    }
    assert_eq!(kept(&points, &policy(|policy| policy.last = 1), &TimeZone::UTC), [3, 4, 5]);
}

fn random_points(rng: &mut Rng) -> Vec<PointInfo> {
    let mut now = 1_767_225_600;
    let mut points = Vec::new();
    for number in 1..=rng.range(1..40) {
        now += i64::try_from(rng.range(0..40 * 3600)).unwrap();
        let wild = if rng.chance(5) { 3_000_000 } else { 0 };
        let mut point = point_at(
            u32::try_from(number).unwrap(),
            ["web:etc", "web:docs", "db:data"][rng.below(3)],
            Time::from_seconds(now - wild),
        );
        if rng.chance(10) {
            let hold = Hold { id: Id16::default(), reason: "case".into(), until: None, placed: point.moment };
            point.holds.push(hold);
        }
        point.verified = rng.chance(15).then_some(point.moment);
        points.push(point);
    }
    points
}

fn random_policy(rng: &mut Rng) -> Policy {
    let mut few = || u32::try_from(rng.range(0..5)).unwrap();
    let mut policy = Policy { last: few(), hourly: few(), daily: few(), ..Policy::default() };
    (policy.weekly, policy.monthly, policy.yearly) = (few(), few(), few());
    let short = rng.chance(30) || !policy.keeps_something();
    policy.within = short.then(|| Duration::from_secs(rng.range(0..1_000_000)));
    if rng.chance(20) {
        // Alone, so short an age leaves some workloads without a point that is young enough.
        policy = Policy { within: Some(Duration::from_secs(rng.range(0..1000))), ..Policy::default() };
    }
    policy
}

fn more(policy: &Policy, rng: &mut Rng) -> Policy {
    let mut more = policy.clone();
    let extra = u32::try_from(rng.range(1..4)).unwrap();
    match rng.below(7) {
        0 => more.last += extra,
        1 => more.hourly += extra,
        2 => more.daily += extra,
        3 => more.weekly += extra,
        4 => more.monthly += extra,
        5 => more.yearly += extra,
        _ => more.within = Some(more.within.unwrap_or_default() + extra * DAY),
    }
    more
}

#[test]
fn whatever_the_points_and_the_policy() {
    for_each_seed(2_000, |seed| {
        let mut rng = Rng::new(seed);
        let points = random_points(&mut rng);
        let less = random_policy(&mut rng);
        let more = more(&less, &mut rng);
        let kept = |policy: &Policy| {
            kept(&points, policy, &berlin()).into_iter().map(id).collect::<BTreeSet<PointId>>()
        };
        let (few, many) = (kept(&less), kept(&more));
        assert!(few.is_subset(&many), "keeping more loses a point: {less:?} {more:?}");
        for point in points.iter().filter(|point| !point.holds.is_empty()) {
            assert!(few.contains(&point.id), "a held point goes");
        }
        for point in &points {
            let same = || points.iter().filter(|other| other.workload == point.workload);
            assert!(same().any(|other| few.contains(&other.id)), "a workload is emptied");
            let verified = same().any(|other| other.verified.is_some());
            let stays = same().any(|other| other.verified.is_some() && few.contains(&other.id));
            assert!(verified == stays, "the last verified point of a workload goes");
        }
    });
}
