//! What of the journals no kept point needs any more.

use std::collections::BTreeMap;

use mainstay_core::{Error, Position, Result, WorkloadRef};
use mainstay_repository::{Journal, PointInfo, Repository};
use mainstay_workloads::postgres::{KIND, Lsn};

use super::lines::timeline_of;
use super::plan::cluster;

/// Log that can go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trim {
    pub workload: WorkloadRef,
    /// The journal's name, and its place among those that were looked at.
    pub log: String,
    pub journal: usize,
    /// What lies before this, and how much that is.
    pub before: Position,
    pub bytes: u64,
}

/// Where a kept point needs its log from.
struct Need {
    timeline: u32,
    start: Lsn,
    end: Position,
}

/// Of each workload, the log that lies before what its oldest kept point needs. `kept` are the points that stay. A workload
/// without any keeps all, and so does one with a point whose description cannot be read; their names come second.
pub fn plan_trims(
    repository: &Repository,
    kept: &[PointInfo],
    journals: &[Journal],
) -> Result<(Vec<Trim>, Vec<String>)> {
    let mut workloads: BTreeMap<_, Vec<&PointInfo>> = BTreeMap::new();
    for point in kept.iter().filter(|point| point.workload.kind.0 == KIND) {
        workloads.entry(point.workload.id).or_default().push(point);
    }
    let (mut trims, mut unsure) = (Vec::new(), Vec::new());
    for (id, points) in workloads {
        let logs: BTreeMap<u32, (usize, &Journal)> = journals
            .iter()
            .enumerate()
            .filter(|(_, journal)| journal.stream().workload.id == id)
            .filter_map(|(number, journal)| Some((timeline_of(journal)?, (number, journal))))
            .collect();
        let needs: Option<Vec<Need>> = points.iter().map(|point| need(repository, point)).collect();
        let Some(needs) = needs else {
            unsure.extend(points.first().map(|point| point.workload.name.clone()));
            continue;
        };
        for (timeline, (number, journal)) in &logs {
            if let Some(before) = unneeded(*timeline, &logs, &needs) {
                let (workload, log) = (journal.stream().workload.clone(), journal.stream().name.clone());
                let bytes = journal.bytes_before(&before);
                trims.push(Trim { workload, log, journal: *number, before, bytes });
            }
        }
    }
    Ok((trims, unsure))
}

fn need(repository: &Repository, point: &PointInfo) -> Option<Need> {
    let cluster = cluster(&repository.read(&point.id).ok()?).ok()?;
    let start = cluster.start.parse::<Lsn>().ok()?.segment_start(cluster.segment_bytes);
    Some(Need { timeline: cluster.start_timeline, start, end: point.position.clone() })
}

/// Up to where the log of a timeline can go; `None` when all of it is needed, or nothing of it lies before.
fn unneeded(timeline: u32, logs: &BTreeMap<u32, (usize, &Journal)>, needs: &[Need]) -> Option<Position> {
    let (_, journal) = logs.get(&timeline)?;
    let stretches = journal.stretches();
    let end = stretches.last()?.end.clone();
    if leads_in(timeline, logs, needs) {
        return None;
    }
    let own = needs.iter().filter(|need| need.timeline == timeline).map(|need| need.start).min();
    let before = match own {
        Some(start) => start.position(),
        // Its next point may come at any time.
        None if logs.last_key_value().is_some_and(|(newest, _)| *newest == timeline) => return None,
        None => end,
    };
    (journal.bytes_before(&before) > 0).then_some(before)
}

/// Whether a point on an earlier timeline leads through the beginning of this one.
fn leads_in(timeline: u32, logs: &BTreeMap<u32, (usize, &Journal)>, needs: &[Need]) -> bool {
    let mut child = timeline;
    while let Some((_, journal)) = logs.get(&child)
        && let Some((name, left)) = &journal.stream().parent
        && let Some((parent, _)) = logs.iter().find(|(_, (_, log))| log.stream().name == *name)
        && *parent < child
    {
        if needs.iter().any(|need| need.timeline == *parent && need.end <= *left) {
            return true;
        }
        child = *parent;
    }
    false
}

/// Gives up what was planned. Needs the power to expire.
pub fn trim(repository: &Repository, journals: &[Journal], trims: &[Trim]) -> Result<()> {
    trims.iter().try_for_each(|trim| {
        let journal = journals.get(trim.journal).ok_or_else(|| Error::bug("a journal has gone"))?;
        repository.trim_journal(journal, &trim.before)
    })
}
