//! What to keep and what to expire: grandfather, father, son, counted in buckets of a named time zone.
//!
//! Pure: [`plan_expire`] looks at points and returns a plan; carrying it out is `Repository::expire`. Times are
//! claims of whoever wrote the point, and the local clock is a claim as well, so neither alone makes anything go:
//! a point whose time contradicts the order of the log is kept and named, ages count from the newest point, and a
//! clock that is behind the points is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use jiff::tz::TimeZone;
use jiff::{Timestamp, Zoned};
use mainstay_core::{Code, Error, PointId, Result, Time, WorkloadId, WorkloadRef};
use mainstay_repository::PointInfo;

use crate::address::show_time;
use crate::undo::is_undo;

/// Clocks of healthy machines differ by less.
const CLOCKS_DIFFER: Duration = Duration::from_secs(5 * 60);

/// How many points of each kind to keep, per workload. A point is kept if any rule keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The newest so many.
    pub last: u32,
    /// The newest of each hour, for the newest so many hours that have a point; likewise below.
    pub hourly: u32,
    pub daily: u32,
    /// Weeks begin on Monday.
    pub weekly: u32,
    pub monthly: u32,
    pub yearly: u32,
    /// All that are younger than this, counted back from the newest point.
    pub within: Option<Duration>,
    /// Any moment of this time counted back from the newest point is to stay recoverable, where there is a log: the newest
    /// point that is older.
    pub interval: Option<Duration>,
    /// How long undo points are kept; the rules above do not count for them.
    pub undo: Duration,
}

impl Default for Policy {
    /// Keeps nothing but undo points of a week.
    fn default() -> Self {
        let undo = Duration::from_secs(7 * 24 * 3600);
        Self {
            last: 0,
            hourly: 0,
            daily: 0,
            weekly: 0,
            monthly: 0,
            yearly: 0,
            within: None,
            interval: None,
            undo,
        }
    }
}

impl Policy {
    pub fn keeps_something(&self) -> bool {
        let Self { last, hourly, daily, weekly, monthly, yearly, within, interval, undo: _ } = self;
        [last, hourly, daily, weekly, monthly, yearly].iter().any(|count| **count > 0)
            || within.is_some()
            || interval.is_some()
    }
}

/// Why a point stays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// The newest of its workload is never expired.
    Newest,
    /// The newest of its workload that was verified is never expired.
    Verified,
    /// A hold with its reason.
    Held(String),
    /// Its time contradicts the order of the log.
    Anomaly(String),
    /// By count: the how manyeth of the newest.
    Last(usize),
    /// The newest of a bucket: the rule's name and the bucket's.
    Bucket(&'static str, String),
    Within,
    /// The log since it leads to every moment that is to stay recoverable.
    Interval,
    /// An undo point that is still young.
    Undo,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Newest => f.write_str("newest of its workload"),
            Self::Verified => f.write_str("newest that was verified"),
            Self::Held(reason) => write!(f, "held: {reason}"),
            Self::Anomaly(what) => write!(f, "doubtful time: {what}"),
            Self::Last(number) => write!(f, "last {number}"),
            Self::Bucket(rule, bucket) => write!(f, "{rule} {bucket}"),
            Self::Within => f.write_str("young enough"),
            Self::Interval => f.write_str("where the log starts that is kept"),
            Self::Undo => f.write_str("young undo point"),
        }
    }
}

/// A point and what becomes of it.
#[derive(Clone, Debug)]
pub struct Verdict<'a> {
    pub point: &'a PointInfo,
    /// Why it stays; it is expired when there is no reason.
    pub why: Vec<Why>,
}

/// What [`plan_expire`] found, for every point in the order of the log.
#[derive(Clone, Debug)]
pub struct ExpirePlan<'a> {
    pub verdicts: Vec<Verdict<'a>>,
    /// Workloads that lose points though none of their points was ever verified.
    pub never_verified: Vec<WorkloadRef>,
}

impl ExpirePlan<'_> {
    /// The points to expire, in the order of the log.
    pub fn expired(&self) -> Vec<PointId> {
        self.verdicts
            .iter()
            .filter(|verdict| verdict.why.is_empty())
            .map(|verdict| verdict.point.id)
            .collect()
    }
}

/// Decides about all of `points`, which are in the order of the log. `now` is what the local clock says.
///
/// Errors: [`Code::Usage`] for a policy without a rule, [`Code::Refused`] when the local clock is behind the points.
pub fn plan_expire<'a>(
    points: &'a [PointInfo],
    policy: &Policy,
    zone: &TimeZone,
    now: Time,
) -> Result<ExpirePlan<'a>> {
    if !policy.keeps_something() {
        return Err(Error::new(Code::Usage, "the policy names nothing to keep")
            .hint("say what to keep, for example --keep-daily 7 --keep-weekly 5 --keep-monthly 12"));
    }
    let anomalies = anomalies(points, zone);
    let sound = |point: &&PointInfo| !anomalies.contains_key(&point.id);
    let newest = points.iter().filter(sound).max_by_key(|point| point.moment);
    if let Some(point) = newest.filter(|point| point.moment > now.plus(CLOCKS_DIFFER)) {
        return Err(clock_is_behind(point, zone, now));
    }
    let reference = newest.map_or(now, |point| point.moment.min(now));
    let mut why: BTreeMap<PointId, Vec<Why>> = BTreeMap::new();
    for workload in workloads(points) {
        let own = points.iter().filter(|point| point.workload.id == workload && !is_undo(point));
        let own = own.collect::<Vec<_>>();
        let sound = own.iter().copied().filter(|point| sound(point)).rev().collect::<Vec<_>>();
        let kept = rules(&sound, policy, zone, reference);
        for (id, reason) in promises(&own).into_iter().chain(kept) {
            why.entry(id).or_default().push(reason);
        }
    }
    let undo = points.iter().filter(|point| is_undo(point) && sound(point)).collect::<Vec<_>>();
    for (id, reason) in young_undo(&undo, policy, reference) {
        why.entry(id).or_default().push(reason);
    }
    for point in points {
        let held = point.holds.iter().filter(|hold| hold.until.is_none_or(|until| until >= reference));
        let held = held.map(|hold| Why::Held(hold.reason.clone()));
        let doubt = anomalies.get(&point.id).map(|what| Why::Anomaly(what.clone()));
        why.entry(point.id).or_default().extend(held.chain(doubt));
    }
    let verdicts: Vec<_> = points
        .iter()
        .map(|point| Verdict { point, why: why.remove(&point.id).unwrap_or_default() })
        .collect();
    Ok(ExpirePlan { never_verified: never_verified(&verdicts), verdicts })
}

/// The points whose time contradicts the order of the log, with the words for it.
///
/// What counts is when a point says it was committed, for that is when it entered the log. The longest run of
/// points whose times agree with the log is believed, so that one wild clock is the exception and not everything
/// that follows it; a point beside that run is doubtful when it is out of place by more than clocks differ.
fn anomalies(points: &[PointInfo], zone: &TimeZone) -> BTreeMap<PointId, String> {
    let believed = longest_run(points);
    let mut doubtful = BTreeMap::new();
    for (index, point) in points.iter().enumerate() {
        let after = believed.range(index..).next().and_then(|next| points.get(*next));
        let before = believed.range(..=index).next_back().and_then(|last| points.get(*last));
        let too_early = before.is_some_and(|before| before.committed > point.committed.plus(CLOCKS_DIFFER));
        let too_late = after.is_some_and(|after| point.committed > after.committed.plus(CLOCKS_DIFFER));
        let impossible = point.moment > point.committed.plus(CLOCKS_DIFFER);
        let order = match (too_early, too_late) {
            (true, _) => "an earlier time than points before it",
            (_, true) => "a later time than points after it",
            _ if impossible => "a moment after its own commit",
            _ => continue,
        };
        doubtful.insert(point.id, format!("it says {}, {order}", show_time(point.moment, zone)));
    }
    doubtful
}

/// The indices of a longest run of points whose commits claim times in the order of the log: the patience method.
fn longest_run(points: &[PointInfo]) -> BTreeSet<usize> {
    // The last index of the run of each length that ends earliest, and the predecessor of each point.
    let mut ends: Vec<usize> = Vec::new();
    let mut before: Vec<Option<usize>> = Vec::with_capacity(points.len());
    let committed = |index: &usize| points.get(*index).map(|point| point.committed);
    for (index, point) in points.iter().enumerate() {
        let length = ends.partition_point(|end| committed(end) <= Some(point.committed));
        before.push(length.checked_sub(1).and_then(|shorter| ends.get(shorter).copied()));
        match ends.get_mut(length) {
            Some(end) => *end = index,
            None => ends.push(index),
        }
    }
    let predecessor = |index: &usize| before.get(*index).copied().flatten();
    std::iter::successors(ends.last().copied(), predecessor).collect()
}

fn clock_is_behind(point: &PointInfo, zone: &TimeZone, now: Time) -> Error {
    let what = format!(
        "the clock of this machine says {}, but point {} is of {}",
        show_time(now, zone),
        point.id,
        show_time(point.moment, zone)
    );
    Error::new(Code::Refused, what).hint(
        "set this machine's clock right; if the other clock was wrong, expire that point by its id first",
    )
}

fn workloads(points: &[PointInfo]) -> BTreeSet<WorkloadId> {
    points.iter().map(|point| point.workload.id).collect()
}

type Kept = Vec<(PointId, Why)>;

/// What no policy gives up. `own` is in the order of the log.
fn promises(own: &[&PointInfo]) -> Kept {
    let newest = own.last().map(|point| (point.id, Why::Newest));
    let verified = own.iter().rfind(|point| point.verified.is_some() || point.proven.is_some());
    newest.into_iter().chain(verified.map(|point| (point.id, Why::Verified))).collect()
}

fn young_undo(points: &[&PointInfo], policy: &Policy, reference: Time) -> Kept {
    let young = points.iter().filter(|point| reference.since(point.moment) <= policy.undo);
    young.map(|point| (point.id, Why::Undo)).collect()
}

fn rules(newest_first: &[&PointInfo], policy: &Policy, zone: &TimeZone, reference: Time) -> Kept {
    let last = newest_first.iter().take(count(policy.last)).enumerate();
    let mut kept: Kept = last.map(|(index, point)| (point.id, Why::Last(index + 1))).collect();
    let buckets: [(&'static str, u32, &'static str); 5] = [
        ("hourly", policy.hourly, "%Y-%m-%d %H:00%:z"),
        ("daily", policy.daily, "%Y-%m-%d"),
        ("weekly", policy.weekly, "%G-W%V"),
        ("monthly", policy.monthly, "%Y-%m"),
        ("yearly", policy.yearly, "%Y"),
    ];
    for (rule, wanted, format) in buckets {
        let mut seen = BTreeSet::new();
        for point in newest_first {
            if seen.len() == count(wanted) {
                break;
            }
            let bucket = local(point.moment, zone).strftime(format).to_string();
            if seen.insert(bucket.clone()) {
                kept.push((point.id, Why::Bucket(rule, bucket)));
            }
        }
    }
    if let Some(within) = policy.within {
        let young = newest_first.iter().filter(|point| reference.since(point.moment) <= within);
        kept.extend(young.map(|point| (point.id, Why::Within)));
    }
    if let Some(interval) = policy.interval {
        let older = newest_first.iter().find(|point| reference.since(point.moment) >= interval);
        kept.extend(older.map(|point| (point.id, Why::Interval)));
    }
    kept
}

fn count(wanted: u32) -> usize {
    usize::try_from(wanted).unwrap_or(usize::MAX)
}

fn local(time: Time, zone: &TimeZone) -> Zoned {
    Timestamp::from_nanosecond(i128::from(time.0)).unwrap_or_default().to_zoned(zone.clone())
}

fn never_verified(verdicts: &[Verdict<'_>]) -> Vec<WorkloadRef> {
    let mut named: BTreeMap<WorkloadId, &WorkloadRef> = BTreeMap::new();
    let lost = |verdict: &&Verdict<'_>| verdict.why.is_empty() && !is_undo(verdict.point);
    for verdict in verdicts.iter().filter(lost) {
        named.insert(verdict.point.workload.id, &verdict.point.workload);
    }
    for verdict in verdicts {
        let point = verdict.point;
        if point.verified.is_some() || point.proven.is_some() {
            named.remove(&point.workload.id);
        }
    }
    named.into_values().cloned().collect()
}

#[cfg(test)]
mod tests;
