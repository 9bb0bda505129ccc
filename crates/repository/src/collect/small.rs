//! Objects that nobody needs any more: index runs whose groups are gone, expired points, trimmed journals.
//!
//! That they are free follows from records that stand in the log already, and never changes.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use mainstay_core::{Code, Id16, PointId, Progress, Result, Time, WorkloadId, WriterId};

use super::GcPlan;
use crate::log::state::State;
use crate::names;
use crate::repository::Repository;

/// A run that no record names may be about to be named. Should its writer take longer, its chunks are stored again.
const UNNAMED_RUN_GRACE: Duration = Duration::from_secs(24 * 3600);

impl Repository {
    pub(super) fn plan_small(&self, state: &State, now: Time, plan: &mut GcPlan) -> Result<()> {
        let freed = state.freed_runs();
        let waits = plan.options.grace.max(UNNAMED_RUN_GRACE);
        self.shared.store.list(names::RUNS, &mut |listed| {
            let Some(id) = names::run_id(&listed.name) else { return Ok(()) };
            let goes = freed.get(&id).copied().unwrap_or_else(|| now.since(listed.modified) >= waits);
            if goes {
                plan.runs.push(id);
                plan.frees_bytes += listed.size;
            }
            Ok(())
        })?;
        self.shared.store.list(names::JOURNALS, &mut |listed| {
            if let Some((stream, number)) = names::journal_object(&listed.name)
                && number < state.trimmed(&stream)
            {
                plan.journals.push(listed.name);
                plan.frees_bytes += listed.size;
            }
            Ok(())
        })?;
        let stored = self.stored_points()?;
        let newest = self.newest_of_chains(state, &stored)?;
        for (id, size) in stored {
            let Some(point) = state.point(&id).filter(|point| point.expired) else { continue };
            if now.since(point.expired_at) >= plan.options.grace
                && !newest.values().any(|(_, kept)| *kept == id)
            {
                plan.points.push(id);
                plan.frees_bytes += size;
            }
        }
        Ok(())
    }

    /// With the bytes of both copies.
    fn stored_points(&self) -> Result<BTreeMap<PointId, u64>> {
        let mut points = BTreeMap::new();
        for prefix in [names::POINTS.to_owned(), names::copy_of(names::POINTS)] {
            self.shared.store.list(&prefix, &mut |listed| {
                if let Some(id) = names::point_id(&listed.name) {
                    *points.entry(id).or_default() += listed.size;
                }
                Ok(())
            })?;
        }
        Ok(points)
    }

    /// The newest point of each writer and workload, by its place in the log: the next one names its hash and counts on
    /// from it, whether it is expired or not.
    fn newest_of_chains(
        &self,
        state: &State,
        stored: &BTreeMap<PointId, u64>,
    ) -> Result<HashMap<(WriterId, WorkloadId), (u64, PointId)>> {
        let mut newest = HashMap::new();
        for point in state.all_points().filter(|point| stored.contains_key(&point.entry.id)) {
            let header = match self.points.load(&point.entry.id) {
                Ok(loaded) => loaded.header.clone(),
                // Nobody goes on from what cannot be read.
                Err(error) if matches!(error.code(), Code::Integrity | Code::TooNew) => continue,
                Err(error) => return Err(error),
            };
            let place = (point.sequence, point.entry.id);
            let known = newest.entry((header.writer, header.workload)).or_insert(place);
            *known = (*known).max(place);
        }
        Ok(newest)
    }

    /// Removes what was planned; the number of bytes.
    pub(super) fn delete_small(&self, plan: &GcPlan, progress: &dyn Progress) -> Result<u64> {
        let point = |id: &Id16| [names::copy_of(&names::point(id)), names::point(id)];
        let names = plan.points.iter().flat_map(point).chain(plan.runs.iter().map(names::index_run));
        let names = names.chain(plan.journals.iter().cloned());
        let mut freed = 0;
        for name in names {
            progress.check()?;
            freed += self.shared.store.size(&name).unwrap_or(0);
            self.shared.store.delete(&name)?;
        }
        Ok(freed)
    }
}
