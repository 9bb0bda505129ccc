//! The garbage collector: frees what no point reaches. It locks nobody out and asks no clock for correctness.
//!
//! Marking and condemning are one step in the log: the plan is made at a head of the log, and the record that
//! condemns is appended only at that head. Whoever commits before it is marked; whoever commits after it sees it
//! and cannot rely on what it condemned. The grace between condemning and deleting is a comfort for writers that
//! want to rescue what they matched, and for readers; nothing is lost without it.

mod marks;
mod small;
mod sort;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Code, Error, Event, Id16, Phase, PointId, Progress, Result, Time};

use crate::config::Duty;
use crate::format::pack::{BuiltPack, PackId};
use crate::keys::Powers;
use crate::log::record::{Change, PackEntry};
use crate::log::state::{PackState, PackStatus, State};
use crate::names;
use crate::planted::{Planted, planted};
use crate::ranges::Ranges;
use crate::repack::{self, Wanted};
use crate::repository::Repository;
use crate::write::store_pack;
pub(crate) use marks::reference;
use marks::{Live, Marks, View};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GcOptions {
    /// How long a condemned pack, or one that no record names, is left before its bytes go; and how long after it
    /// was registered a pack is left alone, because a writer may be about to commit a point that reaches it.
    pub grace: Duration,
    /// Packs with a smaller share of live segments are repacked, in percent.
    pub repack_below: u8,
    /// No more bytes than this are copied in one run.
    pub repack_bytes_max: u64,
    /// Collects although records of the log are lost: what only they named is then freed for good.
    pub despite_lost_records: bool,
}

impl Default for GcOptions {
    fn default() -> Self {
        Self {
            grace: Duration::from_secs(24 * 3600),
            repack_below: 60,
            repack_bytes_max: 16 << 30,
            despite_lost_records: false,
        }
    }
}

/// What a collection will do. Only valid as long as the log stands where it stood.
#[derive(Clone, Debug, Default)]
pub struct GcPlan {
    /// Number of the next record when this was planned.
    head: u64,
    /// Packs of which nothing is reached.
    pub dead: Vec<PackId>,
    /// Packs of which little is reached, and what of each is copied away.
    sparse: Vec<(PackId, Live)>,
    /// Condemned packs that hold alone what a live point reaches, and what of that can be read: it is copied out. What
    /// cannot be read stays where it is, as long as a point reaches it.
    rescued: Vec<(PackId, Live)>,
    /// Stored packs that no record names.
    pub orphans: Vec<PackId>,
    /// Condemned long enough: their bytes go.
    pub delete: Vec<PackId>,
    /// Blobs of packs that are deleted in the log already.
    leftovers: Vec<PackId>,
    /// Index runs of which nothing is left, and objects of points that expired.
    pub runs: Vec<Id16>,
    pub points: Vec<PointId>,
    /// Objects of journals that nobody needs any more.
    pub(crate) journals: Vec<String>,
    /// Bytes that become free once everything condemned here is deleted, and of those, now.
    pub condemns_bytes: u64,
    pub frees_bytes: u64,
    /// Bytes that are copied, about.
    pub copies_bytes: u64,
    options: GcOptions,
    marks: Arc<Marks>,
}

impl GcPlan {
    /// Packs that are repacked.
    pub fn repacked(&self) -> usize {
        self.sparse.len()
    }

    /// Condemned packs from which something is copied that a point needs.
    pub fn rescued(&self) -> usize {
        self.rescued.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rescued.is_empty()
            && self.condemned().next().is_none()
            && self.delete.is_empty()
            && self.leftovers.is_empty()
    }

    fn condemned(&self) -> impl Iterator<Item = PackId> {
        let sparse = self.sparse.iter().map(|(pack, _)| pack);
        self.dead.iter().chain(sparse).chain(&self.orphans).copied()
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcReport {
    pub condemned: u64,
    pub repacked: u64,
    pub deleted: u64,
    /// Bytes that were removed from the medium.
    pub freed_bytes: u64,
    /// Bytes that were copied.
    pub copied_bytes: u64,
}

impl Repository {
    /// Finds out what could be freed. Needs the collector's power; reads no content.
    pub fn plan_gc(&self, options: &GcOptions, progress: &dyn Progress) -> Result<GcPlan> {
        self.plan(options, Arc::default(), progress)
    }

    fn plan(&self, options: &GcOptions, mut marks: Arc<Marks>, progress: &dyn Progress) -> Result<GcPlan> {
        self.shared.ring.structure_secret()?;
        progress.event(&Event::Phase(Phase::Collecting));
        // What lies in the store is listed before the log is read: a pack that is committed in between is known
        // by then.
        let stored = self.stored_packs()?;
        self.refresh_past_gaps()?;
        let state = self.shared.state().clone();
        state.features().require(Duty::Collect)?;
        if !options.despite_lost_records {
            refuse_gaps(&state)?;
        }
        self.mark(&state, &mut marks, progress)?;
        let view = self.view(&state, &marks)?;
        let mut plan = GcPlan { head: state.next_sequence(), options: options.clone(), ..GcPlan::default() };
        let now = self.shared.clock.now();
        sort::sort_packs(&view, now, &mut plan);
        for (id, size, modified) in stored {
            let Some(pack) = state.pack(&id) else {
                if now.since(modified) >= options.grace {
                    plan.orphans.push(id);
                    plan.condemns_bytes += size;
                }
                continue;
            };
            match pack.status {
                PackStatus::Live => {}
                PackStatus::Deleted => plan.leftovers.push(id),
                PackStatus::Condemned(when) => {
                    let is_due = now.since(when) >= options.grace && pack.entry.retain_until <= now;
                    if self.plan_rescue(&view, pack, &mut plan)? && is_due {
                        plan.delete.push(id);
                        plan.frees_bytes += size;
                    }
                }
            }
        }
        self.plan_small(&state, now, &mut plan)?;
        plan.marks = marks;
        Ok(plan)
    }

    /// No live point reaches into a condemned pack, unless somebody made a mistake or the pack is damaged. Plans to copy
    /// out what can be; whether the pack can go once that is done.
    fn plan_rescue(&self, view: &View<'_>, pack: &PackState, plan: &mut GcPlan) -> Result<bool> {
        if planted(Planted::DeleteUnmarked) {
            return Ok(true);
        }
        let only_here = view.only_in(pack);
        let (mut rescued, mut complete) = (Live::new(), true);
        for group in &pack.entry.groups {
            let Some((id, segments)) = only_here.iter().find(|(id, _)| *id == group.id) else { continue };
            // Copied, a mere claim would be a collector's word.
            let readable = if view.is_trusted(pack, group) {
                repack::readable(&self.fetch, &pack.entry.id, id, segments)?
            } else {
                Ranges::default()
            };
            complete &= readable == *segments;
            if !readable.is_empty() {
                rescued.push((*id, readable));
            }
        }
        if !rescued.is_empty() {
            plan.copies_bytes += pack.entry.length;
            plan.rescued.push((pack.entry.id, rescued));
        }
        Ok(complete)
    }

    fn stored_packs(&self) -> Result<Vec<(PackId, u64, Time)>> {
        let mut packs = Vec::new();
        self.shared.store.list(names::PACKS, &mut |listed| {
            if let Some(id) = names::pack_id(&listed.name) {
                packs.push((id, listed.size, listed.modified));
            }
            Ok(())
        })?;
        Ok(packs)
    }

    /// Carries a plan out. When somebody committed meanwhile, it is made again with what they reach.
    pub fn gc(&self, plan: &GcPlan, progress: &dyn Progress) -> Result<GcReport> {
        let mut report = GcReport::default();
        let mut plan = plan.clone();
        let mut moved = self.copy_live(&mut plan, &mut report, progress)?;
        loop {
            let condemn: Vec<_> = plan.condemned().collect();
            if condemn.is_empty() && moved.is_empty() {
                break;
            }
            if planted(Planted::DeleteBeforeCondemning) {
                condemn.iter().try_for_each(|pack| self.shared.store.delete(&names::pack(pack)))?;
            }
            if self.append_at(plan.head, Change::Condemn { packs: condemn.clone(), moved: moved.clone() })? {
                report.condemned = condemn.len() as u64;
                break;
            }
            plan = self.replan(&plan, &mut moved, progress)?;
        }
        self.delete(&plan, &mut report, progress)?;
        self.shared.store.restore_reserve()?;
        Ok(report)
    }

    /// Appends the change as record `head`; `false` when somebody else got that number.
    fn append_at(&self, head: u64, change: Change) -> Result<bool> {
        let mut stale = false;
        let appended = self.shared.append(Powers::COLLECT, &mut |state| {
            stale = state.next_sequence() != head && !planted(Planted::CondemnAtAnyHead);
            if stale {
                return Err(Error::new(Code::Conflict, "the log went on while garbage was looked for"));
            }
            Ok(change.clone())
        });
        match appended {
            Ok(_) => Ok(true),
            Err(_) if stale => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Plans again at the new head, but condemns nothing that the first plan did not, and no pack of which
    /// something live was not copied.
    fn replan(&self, old: &GcPlan, moved: &mut Vec<PackEntry>, progress: &dyn Progress) -> Result<GcPlan> {
        let mut plan = self.plan(&old.options, Arc::clone(&old.marks), progress)?;
        // To another collector our copies are packs that no record names: what it condemned is of no use.
        if !planted(Planted::CondemnIntoCondemned) {
            moved.retain(|pack| self.shared.state().status(&pack.id).is_none());
        }
        let known: HashSet<_> = old.condemned().collect();
        plan.dead.retain(|pack| known.contains(pack));
        plan.orphans.retain(|pack| known.contains(pack));
        plan.sparse.retain(|(pack, live)| known.contains(pack) && is_copied(live, moved));
        Ok(plan)
    }

    /// Copies what is live in sparse packs, and what is needed of condemned ones. Sparse packs that cannot be read whole
    /// stay as they are, and on a full medium all of them: what is dead goes all the same, and makes room.
    fn copy_live(
        &self,
        plan: &mut GcPlan,
        report: &mut GcReport,
        progress: &dyn Progress,
    ) -> Result<Vec<PackEntry>> {
        let mut moved = Vec::new();
        let mut wanted = Vec::new();
        for (pack, groups) in plan.rescued.iter().chain(&plan.sparse) {
            for (group, segments) in groups {
                wanted.push(Wanted { group: *group, segments: segments.clone(), from: *pack });
            }
        }
        let mut emit = |pack: BuiltPack| {
            progress.check()?;
            store_pack(self.shared.store.as_ref(), &pack)?;
            report.copied_bytes += pack.length;
            moved.push(PackEntry::of(&pack));
            Ok(())
        };
        let mut unreadable = |error: Error| match error.code() {
            Code::Integrity | Code::NotFound => Ok(()),
            _ => Err(error),
        };
        match repack::copy(&self.fetch, &wanted, &mut emit, &mut unreadable) {
            Err(error) if error.code() != Code::Full => return Err(error),
            _ => self.shared.store.flush()?,
        }
        plan.sparse.retain(|(_, live)| is_copied(live, &moved));
        report.repacked = plan.sparse.len() as u64;
        Ok(moved)
    }

    /// Says in the log what goes, and only then removes it.
    fn delete(&self, plan: &GcPlan, report: &mut GcReport, progress: &dyn Progress) -> Result<()> {
        let store = self.shared.store.as_ref();
        if planted(Planted::DeleteWithoutRecord) {
            return plan.delete.iter().try_for_each(|pack| store.delete(&names::pack(pack)));
        }
        let mut marks = Arc::clone(&plan.marks);
        loop {
            self.shared.refresh()?;
            let state = self.shared.state().clone();
            // By now another point may be there, and what was to be rescued may not be.
            self.mark(&state, &mut marks, progress)?;
            let view = self.view(&state, &marks)?;
            let may_go = |pack: &&PackState| {
                let condemned = matches!(pack.status, PackStatus::Condemned(_));
                condemned && (planted(Planted::DeleteUnmarked) || view.only_in(pack).is_empty())
            };
            let packs = plan.delete.iter().filter_map(|pack| state.pack(pack)).filter(may_go);
            let packs: Vec<_> = packs.map(|pack| pack.entry.id).collect();
            if packs.is_empty() || self.append_at(state.next_sequence(), Change::Delete { packs })? {
                break;
            }
        }
        for pack in plan.delete.iter().chain(&plan.leftovers) {
            progress.check()?;
            if self.shared.state().status(pack) == Some(PackStatus::Deleted) {
                let name = names::pack(pack);
                report.freed_bytes += store.size(&name).unwrap_or(0);
                store.delete(&name)?;
                report.deleted += 1;
            }
        }
        report.freed_bytes += self.delete_small(plan, progress)?;
        // What a dead process left behind; a live one that is hit tries again.
        let before = self.shared.clock.now().0.saturating_sub(nanoseconds(plan.options.grace));
        report.freed_bytes += store.sweep_temporary(Time(before))?;
        store.flush()
    }
}

fn nanoseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

/// Whether `moved` holds all of these segments.
fn is_copied(live: &Live, moved: &[PackEntry]) -> bool {
    live.iter().all(|(group, segments)| {
        let mut held = Ranges::default();
        let entries = moved.iter().flat_map(|pack| &pack.groups).filter(|entry| entry.id == *group);
        entries.for_each(|entry| held.extend(&entry.segments));
        held.is_superset(segments)
    })
}

/// A lost record may be the only one that names a point, and everything that point reaches would be garbage. A number
/// that holds nothing valid counts until somebody has written past it: then it was like that before.
fn refuse_gaps(state: &State) -> Result<()> {
    let last = state.next_sequence().checked_sub(1);
    let at_the_end = state.voids().last().filter(|number| Some(**number) == last);
    let Some(number) = state.damage().first().or(at_the_end) else { return Ok(()) };
    let what = format!("the log is damaged at number {number}, so nothing is collected");
    Err(Error::integrity(what)
        .hint("run `mainstay verify`; what a lost record named would be freed for good"))
}
