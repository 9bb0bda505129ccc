//! Stretches of a cluster's log without a hole, over the timelines that they run through.

use std::collections::BTreeMap;

use mainstay_core::{Position, WorkloadId};
use mainstay_repository::{Hole, Journal, Stretch};

use super::PREFIX;

/// A part of a run on one timeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leg {
    pub timeline: u32,
    /// Its place among the journals.
    pub journal: usize,
    /// What of it counts: its end is where the timeline was left, if it was.
    pub stretch: Stretch,
}

/// Log without a hole. The first leg is the oldest; each other one begins with the segment in which the one before it was
/// left, and holds that whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run(pub(super) Vec<Leg>);

impl Run {
    /// What of it leads on from a base backup on `timeline` that reads the log from `start` on and is consistent at `end`.
    pub(super) fn since(&self, timeline: u32, start: &Position, end: &Position) -> Option<&[Leg]> {
        let first = self.0.iter().position(|leg| leg.timeline == timeline)?;
        let leg = self.0.get(first)?;
        if holds(&leg.stretch, start, end) { self.0.get(first..) } else { None }
    }

    pub(super) fn end(&self) -> Option<&Leg> {
        self.0.last()
    }
}

/// Whether nothing is missing of what a base backup needs that reads the log from `start` on and is consistent at `end`.
pub(super) fn holds(stretch: &Stretch, start: &Position, end: &Position) -> bool {
    stretch.start <= *start && stretch.end >= *end
}

/// The timeline that a journal is of; `None` for one that is no log.
pub(super) fn timeline_of(journal: &Journal) -> Option<u32> {
    let name = &journal.stream().name;
    name.strip_prefix(PREFIX)?.rsplit_once(" timeline ")?.1.parse().ok()
}

/// What is missing of a workload's log, with the name of the journal that it is missing from: within timelines, and where
/// one goes on from another.
pub fn holes(journals: &[Journal], workload: &WorkloadId) -> Vec<(String, Hole)> {
    let mut found = Vec::new();
    let ours: Vec<&Journal> = journals
        .iter()
        .filter(|journal| journal.stream().workload.id == *workload && timeline_of(journal).is_some())
        .collect();
    for journal in &ours {
        let name = &journal.stream().name;
        found.extend(journal.holes().into_iter().map(|hole| (name.clone(), hole)));
        let Some((parent, left)) = &journal.stream().parent else { continue };
        let Some(parent) = ours.iter().find(|journal| journal.stream().name == *parent) else { continue };
        let before = parent.stretches().into_iter().rfind(|stretch| stretch.start < *left);
        let (Some(before), Some(first)) = (before, journal.stretches().into_iter().next()) else { continue };
        if before.end < first.start || first.start > *left {
            let hole = Hole {
                start: before.end.min(left.clone()),
                end: first.start,
                after: before.last,
                before: first.first,
                why: "a server was promoted before all of its log was read".into(),
            };
            found.push((name.clone(), hole));
        }
    }
    found
}

/// All runs of a workload: those of its newest timeline first, and of each timeline the newest first. What another run
/// goes on from is not told twice.
pub(super) fn runs(journals: &[Journal], workload: &WorkloadId) -> Vec<Run> {
    let mut logs: BTreeMap<u32, (usize, Vec<Stretch>)> = BTreeMap::new();
    for (number, journal) in journals.iter().enumerate() {
        if journal.stream().workload.id == *workload
            && let Some(timeline) = timeline_of(journal)
        {
            logs.insert(timeline, (number, journal.stretches()));
        }
    }
    let parent = |journal: usize| {
        let (name, left) = journals.get(journal)?.stream().parent.as_ref()?;
        let (timeline, _) = logs
            .iter()
            .find(|(_, (number, _))| journals.get(*number).is_some_and(|j| j.stream().name == *name))?;
        Some((*timeline, left.clone()))
    };
    let logs: Vec<Log> = logs
        .iter()
        .map(|(timeline, (journal, stretches))| Log {
            timeline: *timeline,
            journal: *journal,
            stretches: stretches.clone(),
            parent: parent(*journal),
        })
        .collect();
    of(&logs)
}

/// The log of one timeline.
#[derive(Clone, Debug)]
struct Log {
    timeline: u32,
    journal: usize,
    stretches: Vec<Stretch>,
    /// The timeline that it came from, and where it left that.
    parent: Option<(u32, Position)>,
}

/// `logs` are in the order of their timelines.
fn of(logs: &[Log]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for log in logs.iter().rev() {
        for stretch in log.stretches.iter().rev() {
            let leg = |log: &Log, stretch| Leg { timeline: log.timeline, journal: log.journal, stretch };
            let mut legs = vec![leg(log, stretch.clone())];
            let (mut child, mut start) = (log, &stretch.start);
            while let Some((timeline, left)) = &child.parent
                && start <= left
                && let Some(parent) =
                    logs.iter().find(|log| log.timeline == *timeline && *timeline < child.timeline)
                && let Some(before) =
                    parent.stretches.iter().find(|before| before.start <= *start && before.end >= *start)
            {
                legs.insert(
                    0,
                    leg(parent, Stretch { end: before.end.clone().min(left.clone()), ..before.clone() }),
                );
                (child, start) = (parent, &before.start);
            }
            let goes_on = |run: &Run| {
                let mut earlier = run.0.iter().rev().skip(1);
                earlier.any(|leg| leg.timeline == log.timeline && leg.stretch == *stretch)
            };
            if !runs.iter().any(goes_on) {
                runs.push(Run(legs));
            }
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use mainstay_core::Position;

    use super::{Log, Stretch, of};

    fn at(place: u8) -> Position {
        Position(vec![place])
    }

    fn log(timeline: u32, stretches: &[(u8, u8)], parent: Option<(u32, u8)>) -> Log {
        let stretch = |(start, end): &(u8, u8)| Stretch {
            start: at(*start),
            end: at(*end),
            first: None,
            last: None,
            bytes: 0,
        };
        Log {
            timeline,
            journal: timeline as usize,
            stretches: stretches.iter().map(stretch).collect(),
            parent: parent.map(|(timeline, left)| (timeline, at(left))),
        }
    }

    fn shape(logs: &[Log]) -> Vec<Vec<(u32, u8, u8)>> {
        let leg = |leg: &super::Leg| (leg.timeline, leg.stretch.start.0[0], leg.stretch.end.0[0]);
        of(logs).iter().map(|run| run.0.iter().map(leg).collect()).collect()
    }

    #[test]
    fn a_run_goes_over_promotions_and_ends_at_holes() {
        // Followed to its end, then the next two.
        let logs = [
            log(1, &[(0, 25)], None),
            log(2, &[(20, 45)], Some((1, 25))),
            log(3, &[(40, 50)], Some((2, 45))),
        ];
        assert_eq!(shape(&logs), [vec![(1, 0, 25), (2, 20, 45), (3, 40, 50)]]);
        // A hole on the second.
        let logs = [log(1, &[(0, 25)], None), log(2, &[(20, 30), (35, 45)], Some((1, 25)))];
        assert_eq!(shape(&logs), [vec![(2, 35, 45)], vec![(1, 0, 25), (2, 20, 30)]]);
        // The first was not read to where the second begins.
        let logs = [log(1, &[(0, 10)], None), log(2, &[(20, 30)], Some((1, 25)))];
        assert_eq!(shape(&logs), [vec![(2, 20, 30)], vec![(1, 0, 10)]]);
        // What the old server wrote after it was left stays a run of its own.
        let logs = [log(1, &[(0, 40)], None), log(2, &[(20, 30)], Some((1, 25)))];
        assert_eq!(shape(&logs), [vec![(1, 0, 25), (2, 20, 30)], vec![(1, 0, 40)]]);
        // The second was followed too late.
        let logs = [log(1, &[(0, 40)], None), log(2, &[(30, 50)], Some((1, 25)))];
        assert_eq!(shape(&logs), [vec![(2, 30, 50)], vec![(1, 0, 40)]]);
        // Nonsense ends.
        let logs = [log(1, &[(0, 40)], Some((1, 20))), log(2, &[(0, 5)], Some((9, 5)))];
        assert_eq!(shape(&logs).len(), 2);
    }
}
