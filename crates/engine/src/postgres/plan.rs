//! From points and journals to what can be recovered, and from which.

use std::collections::HashMap;
use std::sync::Arc;

use mainstay_core::{Code, Error, ItemPath, Piece, PointId, Position, Result, Time, WorkloadId};
use mainstay_repository::{Journal, PointInfo, PointReader, Repository, Stretch};
use mainstay_workloads::postgres::{CLUSTER, Cluster, History, KIND, Lsn};

use super::lines::{Leg, Run, holds, runs};
use super::{history, stops};

/// No description of a cluster is longer.
const CLUSTER_BYTES_MAX: usize = 16 << 20;

/// Where recovery stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Until {
    /// At the end of what the journal holds.
    End,
    /// As soon as the files are consistent.
    Consistent,
    /// Before the first commit after this moment.
    Time(Time),
    /// Before what is written here.
    Lsn(Lsn),
    /// Before the commit of this transaction.
    Transaction(u64),
}

/// What a recovery will do.
pub struct ClusterPlan {
    pub point: PointInfo,
    pub cluster: Cluster,
    pub until: Until,
    /// The log that is recovered from: the point's own timeline first.
    pub legs: Vec<Leg>,
    /// Of all timelines that the journal knows, so that no number is given to two.
    histories: Vec<History>,
    pub(super) journals: Arc<Vec<Journal>>,
}

/// Takes a piece of log: which leg it is of, where it begins, its bytes.
type Pieces<'a> = dyn FnMut(usize, Lsn, &[u8]) -> Result<()> + 'a;

impl ClusterPlan {
    /// Where the log is read from, and each timeline that it runs through.
    pub(super) fn start(&self) -> Result<Lsn> {
        let start = self.cluster.start.parse::<Lsn>();
        let start = start.map_err(|()| Error::integrity("the point does not say where it starts"))?;
        Ok(start.segment_start(self.cluster.segment_bytes))
    }

    /// The histories that recovery may ask for.
    ///
    /// Errors: [`Code::Integrity`] when that of its own timeline is missing.
    pub(super) fn histories(&self) -> Result<&[History]> {
        let timeline = self.timeline();
        if timeline > 1 && self.histories.iter().all(|history| history.timeline != timeline) {
            return Err(Error::integrity(format!("the history of timeline {timeline} is not stored")));
        }
        Ok(&self.histories)
    }

    /// Hands on the log from a place on, to where it ends.
    pub(crate) fn read_log(&self, from: Lsn, each: &mut Pieces<'_>) -> Result<()> {
        let place = |position: &Position| {
            Lsn::from_position(position).ok_or_else(|| Error::integrity("a journal of another kind"))
        };
        for (number, leg) in self.legs.iter().enumerate() {
            let journal = self.journals.get(leg.journal).ok_or_else(|| Error::bug("a journal has gone"))?;
            let (from, end) = (from.position().max(leg.stretch.start.clone()), place(&leg.stretch.end)?);
            if from >= leg.stretch.end {
                continue;
            }
            for change in journal.read(&from)? {
                let change = change?;
                let at = place(&change.start)?;
                let wanted = usize::try_from(end.0.saturating_sub(at.0)).unwrap_or(usize::MAX);
                each(number, at, change.bytes.get(..wanted).unwrap_or(&change.bytes))?;
                if change.end >= leg.stretch.end {
                    break;
                }
            }
        }
        Ok(())
    }

    /// The timeline that recovery follows.
    pub fn timeline(&self) -> u32 {
        self.legs.last().map_or(self.cluster.start_timeline, |leg| leg.timeline)
    }
}

/// The spans within which any moment can be recovered: from the end of each point to the end of the log behind it. Points
/// whose log is one stretch make one span, which comes with the name of its log.
pub fn intervals(
    repository: &Repository,
    points: &[PointInfo],
    journals: &[Journal],
    workload: &WorkloadId,
) -> Vec<(String, Stretch)> {
    let runs = runs(journals, workload);
    let ours = |point: &&PointInfo| point.workload.id == *workload && point.workload.kind.0 == KIND;
    let points = points.iter().filter(ours).collect();
    let mut known = Known { repository, points, starts: HashMap::new() };
    let mut spans = Vec::new();
    for run in runs {
        let found = known.oldest_of(&run);
        let (Some((position, moment)), Some(end)) = (found, run.end()) else { continue };
        let name = journals.get(end.journal).map(|journal| journal.stream().name.clone());
        let bytes = run.0.iter().map(|leg| leg.stretch.bytes).sum();
        let span = Stretch { start: position, first: Some(moment), bytes, ..end.stretch.clone() };
        spans.push((name.unwrap_or_default(), span));
    }
    spans
}

/// The points of a workload, and on which timeline each stands and where its log begins. That costs a read.
struct Known<'a> {
    repository: &'a Repository,
    points: Vec<&'a PointInfo>,
    starts: HashMap<PointId, Option<(u32, Position)>>,
}

impl Known<'_> {
    /// `None` when it cannot be read, and may be anywhere.
    fn start(&mut self, point: &PointInfo) -> Option<&(u32, Position)> {
        let read = || {
            let cluster = cluster(&self.repository.read(&point.id).ok()?).ok()?;
            Some((cluster.start_timeline, cluster.start.parse::<Lsn>().ok()?.position()))
        };
        self.starts.entry(point.id).or_insert_with(read).as_ref()
    }

    /// Where and when the oldest point stands that leads to the end of a run.
    fn oldest_of(&mut self, run: &Run) -> Option<(Position, Time)> {
        let mut places: Vec<(usize, &PointInfo)> = Vec::new();
        for (number, leg) in run.0.iter().enumerate() {
            let within = |point: &&&PointInfo| holds(&leg.stretch, &point.position, &point.position);
            places.extend(self.points.iter().filter(within).map(|point| (number, *point)));
        }
        places.sort_by_key(|(leg, point)| (*leg, &point.position));
        let (_, oldest) = places.into_iter().find(|(number, point)| {
            let Some(leg) = run.0.get(*number) else { return false };
            self.start(point).is_none_or(|(timeline, start)| {
                leg.timeline == *timeline && holds(&leg.stretch, start, &point.position)
            })
        })?;
        Some((oldest.position.clone(), oldest.moment))
    }
}

/// Finds the point and the log that lead to `until`: on the newest timeline that does.
///
/// Errors: [`Code::NotFound`] when nothing leads there, with what does; [`Code::Integrity`] for a point whose description
/// is malformed.
pub fn plan_cluster(repository: &Repository, workload: &WorkloadId, until: Until) -> Result<ClusterPlan> {
    plan_cluster_on(repository, workload, until, None)
}

/// As [`plan_cluster`], on the timeline that is named.
pub fn plan_cluster_on(
    repository: &Repository,
    workload: &WorkloadId,
    until: Until,
    timeline: Option<u32>,
) -> Result<ClusterPlan> {
    repository.refresh()?;
    let mut points = repository.points()?;
    points.retain(|point| point.workload.id == *workload && point.workload.kind.0 == KIND && point.readable);
    let journals = repository.journals()?;
    let mut clusters = HashMap::new();
    for point in &points {
        clusters.insert(point.id, cluster(&repository.read(&point.id)?)?);
    }
    for run in runs(&journals, workload) {
        if timeline.is_some_and(|timeline| run.end().is_none_or(|leg| leg.timeline != timeline)) {
            continue;
        }
        if let Some((point, legs)) = leading(&points, &clusters, &run, &until) {
            let (point, legs) = (point.clone(), legs.to_vec());
            let cluster = clusters.remove(&point.id).ok_or_else(|| Error::bug("a point has gone"))?;
            let histories = history::all(&journals, workload)?;
            // A server that comes to the end of its log before it was to stop refuses to start.
            let comes = match until {
                // Of a stopped server there may be nothing behind its files.
                Until::Consistent => legs.last().is_none_or(|leg| leg.stretch.end > point.position),
                _ => stops::comes(&journals, &legs, cluster.segment_bytes, &until)?,
            };
            let until = if comes { until } else { Until::End };
            let journals = Arc::new(journals);
            return Ok(ClusterPlan { point, cluster, until, legs, histories, journals });
        }
    }
    Err(nothing_leads_there(&intervals(repository, &points, &journals, workload), &until))
}

/// The newest point from which a run leads to `until`, and what of the run does.
fn leading<'a>(
    points: &'a [PointInfo],
    clusters: &HashMap<PointId, Cluster>,
    run: &'a Run,
    until: &Until,
) -> Option<(&'a PointInfo, &'a [Leg])> {
    let mut leading = points.iter().rev().filter_map(|point| {
        let cluster = clusters.get(&point.id)?;
        let start = cluster.start.parse::<Lsn>().ok()?.position();
        let legs = run.since(cluster.start_timeline, &start, &point.position)?;
        leads_to(point, legs, until).then_some((point, legs))
    });
    match until {
        // Whether a transaction was committed after a point is not known: the oldest is before it, if any is.
        Until::Transaction(_) => leading.next_back(),
        _ => leading.next(),
    }
}

fn leads_to(point: &PointInfo, legs: &[Leg], until: &Until) -> bool {
    let Some(end) = legs.last() else { return false };
    match until {
        Until::End | Until::Consistent => true,
        Until::Time(time) => point.moment <= *time && end.stretch.last >= Some(*time),
        Until::Lsn(lsn) => point.position <= lsn.position() && lsn.position() <= end.stretch.end,
        // Which one that is the server knows when it comes to it.
        Until::Transaction(_) => true,
    }
}

/// Names the nearest that can be recovered before and behind what was asked for.
fn nothing_leads_there(spans: &[(String, Stretch)], until: &Until) -> Error {
    let error = Error::new(Code::NotFound, "that moment cannot be recovered");
    if spans.is_empty() {
        return error.hint("there is no point with an unbroken log behind it: mainstay db backup");
    }
    let spans = || spans.iter().map(|(_, span)| span);
    let (before, behind) = match until {
        Until::Lsn(lsn) => {
            let at = lsn.position();
            let show = |place: &Position| Lsn::from_position(place).unwrap_or_default().to_string();
            let before = spans().map(|span| &span.end).filter(|end| **end < at).max();
            let behind = spans().map(|span| &span.start).filter(|start| **start > at).min();
            (before.map(show), behind.map(show))
        }
        Until::Time(at) => {
            let before = spans().filter_map(|span| span.last).filter(|last| last < at).max();
            let behind = spans().filter_map(|span| span.first).filter(|first| first > at).min();
            (before.map(shown), behind.map(shown))
        }
        _ => (None, None),
    };
    error.hint(match (before, behind) {
        (Some(before), Some(behind)) => format!("the nearest that can be are {before} and {behind}"),
        (Some(nearest), None) | (None, Some(nearest)) => format!("the nearest that can be is {nearest}"),
        (None, None) => "mainstay db status shows what can be".into(),
    })
}

fn shown(time: Time) -> String {
    let moment = jiff::Timestamp::from_nanosecond(i128::from(time.0));
    moment.map_or_else(|_out_of_range| "?".into(), |moment| moment.strftime("%Y-%m-%d %H:%M:%SZ").to_string())
}

/// What a point says of its cluster.
pub(super) fn cluster(reader: &PointReader) -> Result<Cluster> {
    Cluster::from_json(&document(reader, CLUSTER, CLUSTER_BYTES_MAX)?)
}

/// A document of a point.
///
/// Errors: [`Code::Integrity`] when it is not there or longer than `most` bytes.
pub(super) fn document(reader: &PointReader, name: &str, most: usize) -> Result<Vec<u8>> {
    let path = ItemPath::new(name).map_err(|error| Error::bug("a name of ours is no path").because(error))?;
    let entry = reader.lookup(&path)?;
    let entry = entry.ok_or_else(|| Error::integrity(format!("the point has no {name}")))?;
    let (mut content, mut text, mut buffer) = (reader.stream(&entry)?, Vec::new(), vec![0; 64 << 10]);
    while let Piece::Data(length) = content.read(&mut buffer)? {
        text.extend_from_slice(buffer.get(..length).unwrap_or_default());
        if text.len() > most {
            return Err(Error::integrity(format!("{name} is too long")));
        }
    }
    Ok(text)
}
