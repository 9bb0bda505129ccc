//! How well each workload is protected, from what its points say.

use std::collections::BTreeMap;
use std::time::Duration;

use mainstay_core::{Time, WorkloadId};
use mainstay_repository::PointInfo;

use crate::undo::is_undo;

/// How one workload stands.
#[derive(Clone, Debug)]
pub struct WorkloadStatus<'a> {
    pub points: u64,
    /// The newest point.
    pub last: &'a PointInfo,
    pub last_verified: Option<Time>,
    pub last_proven: Option<Time>,
    /// Of the newest point.
    pub age: Duration,
    /// The newest point is older than it may be.
    pub overdue: bool,
}

/// All workloads, by name.
pub fn status(points: &[PointInfo], max_age: Option<Duration>, now: Time) -> Vec<WorkloadStatus<'_>> {
    let mut workloads: BTreeMap<WorkloadId, WorkloadStatus<'_>> = BTreeMap::new();
    for point in points.iter().filter(|point| !is_undo(point)) {
        let age = now.since(point.moment);
        let overdue = max_age.is_some_and(|max_age| age > max_age);
        let so_far = workloads.remove(&point.workload.id);
        let (points, verified, proven) = so_far
            .map_or((0, None, None), |status| (status.points, status.last_verified, status.last_proven));
        let status = WorkloadStatus {
            points: points + 1,
            last: point,
            last_verified: verified.max(point.verified),
            last_proven: proven.max(point.proven),
            age,
            overdue,
        };
        workloads.insert(point.workload.id, status);
    }
    let mut workloads: Vec<_> = workloads.into_values().collect();
    workloads.sort_by(|one, other| one.last.workload.name.cmp(&other.last.workload.name));
    workloads
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::status;
    use crate::testing::{id, point, time};

    #[test]
    fn the_newest_point_counts_and_verification_of_any() {
        let mut points = vec![
            point(1, "web:etc", "2026-11-01T00:00:00Z"),
            point(2, "db:data", "2026-11-01T00:00:00Z"),
            point(3, "web:etc", "2026-11-02T00:00:00Z"),
            point(4, "web:undo", "2026-11-02T00:00:00Z"),
            point(5, "vm", "2026-11-02T00:00:00Z"),
        ];
        // Put back once, and never captured.
        points[4].workload.kind.0 = "vm".into();
        points[4].tags = vec!["undo".into()];
        points[0].verified = Some(time("2026-11-01T01:00:00Z"));
        points[3].workload.kind.0 = "undo".into();
        let limit = Some(Duration::from_secs(36 * 3600));
        let found = status(&points, limit, time("2026-11-03T00:00:00Z"));
        let summary: Vec<_> = found
            .iter()
            .map(|status| (status.last.id, status.points, status.last_verified, status.overdue))
            .collect();
        assert_eq!(summary, [(id(2), 1, None, true), (id(3), 2, points[0].verified, false)]);
        assert!(status(&points, None, time("2027-01-01T00:00:00Z")).iter().all(|status| !status.overdue));
    }
}
