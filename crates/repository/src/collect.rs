//! The garbage collector: frees what no point reaches. It locks nobody out and asks no clock for correctness.
//!
//! Marking and condemning are one step in the log: the plan is made at a head of the log, and the record that
//! condemns is appended only at that head. Whoever commits before it is marked; whoever commits after it sees it
//! and cannot rely on what it condemned. The grace between condemning and deleting is a comfort for writers that
//! want to rescue what they matched, and for readers; nothing is lost without it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Code, Error, Event, Phase, PointId, Progress, Result, Time};

use crate::config::Duty;
use crate::fetch::StructurePages;
use crate::format::pack::{BuiltPack, PackId};
use crate::format::page::{PageKind, for_each_page};
use crate::format::segment::GroupId;
use crate::keys::Powers;
use crate::log::record::{Change, PackEntry};
use crate::log::state::{PackState, PackStatus, State};
use crate::names;
use crate::planted::{Planted, planted};
use crate::ranges::Ranges;
use crate::repack::{self, Wanted};
use crate::repository::Repository;
use crate::write::store_pack;

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
    sparse: Vec<(PackId, Vec<(GroupId, Ranges)>)>,
    /// Stored packs that no record names.
    pub orphans: Vec<PackId>,
    /// Condemned long enough: their bytes go.
    pub delete: Vec<PackId>,
    /// Blobs of packs that are deleted in the log already.
    leftovers: Vec<PackId>,
    /// Bytes that become free once everything condemned here is deleted, and of those, now.
    pub condemns_bytes: u64,
    pub frees_bytes: u64,
    /// Bytes that are copied, about.
    pub copies_bytes: u64,
    options: GcOptions,
}

impl GcPlan {
    /// Packs that are repacked.
    pub fn repacked(&self) -> usize {
        self.sparse.len()
    }

    pub fn is_empty(&self) -> bool {
        self.condemned().next().is_none() && self.delete.is_empty() && self.leftovers.is_empty()
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

/// What live points reach.
#[derive(Default)]
struct Marks {
    live: HashMap<GroupId, Ranges>,
    pages: HashSet<[u8; 32]>,
    points: HashSet<PointId>,
}

impl Repository {
    /// Finds out what could be freed. Needs the collector's power; reads no content.
    pub fn plan_gc(&self, options: &GcOptions, progress: &dyn Progress) -> Result<GcPlan> {
        self.plan(options, &mut Marks::default(), progress)
    }

    fn plan(&self, options: &GcOptions, marks: &mut Marks, progress: &dyn Progress) -> Result<GcPlan> {
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
        self.mark(&state, marks, progress)?;
        let mut plan = GcPlan { head: state.next_sequence(), options: options.clone(), ..GcPlan::default() };
        let now = self.shared.clock.now();
        sort_packs(&state, marks, now, &mut plan);
        for (pack, size, modified) in stored {
            match state.status(&pack) {
                None if now.since(modified) >= options.grace => {
                    plan.orphans.push(pack);
                    plan.condemns_bytes += size;
                }
                Some(PackStatus::Deleted) => plan.leftovers.push(pack),
                Some(PackStatus::Condemned(when)) if now.since(when) >= options.grace => {
                    let retained = state.pack(&pack).is_some_and(|known| known.entry.retain_until > now);
                    if !retained {
                        plan.delete.push(pack);
                        plan.frees_bytes += size;
                    }
                }
                _ => {}
            }
        }
        Ok(plan)
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

    /// Adds what points reach that were not marked before. A reference page shared by many is read once.
    fn mark(&self, state: &State, marks: &mut Marks, progress: &dyn Progress) -> Result<()> {
        let pages = StructurePages(Arc::clone(&self.fetch));
        for point in state.live_points() {
            let id = point.entry.id;
            if !marks.points.insert(id) {
                continue;
            }
            progress.check()?;
            let Some(root) = self.points.load(&id)?.header.references else { continue };
            let live = &mut marks.live;
            let seen = &mut marks.pages;
            for_each_page(&pages, PageKind::References, &root, &mut |page_ref, page| {
                let segments = live.entry(page_ref.group).or_default();
                segments.insert(page_ref.segment..page_ref.segment.saturating_add(1));
                if !seen.insert(page_ref.id) {
                    return Ok(false);
                }
                if page.level == 0 {
                    for index in 0..page.len() {
                        let (group, segments) = reference(page, index)?;
                        live.entry(group).or_default().extend(&segments);
                    }
                }
                Ok(true)
            })
            .map_err(|error| {
                error.during(format!("cannot tell what point {id} reaches, so nothing is collected"))
            })?;
        }
        Ok(())
    }

    /// Carries a plan out. When somebody committed meanwhile, it is made again with what they reach.
    pub fn gc(&self, plan: &GcPlan, progress: &dyn Progress) -> Result<GcReport> {
        let mut report = GcReport::default();
        let mut marks = Marks::default();
        let mut plan = plan.clone();
        let mut moved = self.move_sparse(&mut plan, &mut report, progress)?;
        loop {
            let condemn: Vec<_> = plan.condemned().collect();
            if condemn.is_empty() && moved.is_empty() {
                break;
            }
            if planted(Planted::DeleteBeforeCondemning) {
                condemn.iter().try_for_each(|pack| self.shared.store.delete(&names::pack(pack)))?;
            }
            let mut stale = false;
            let appended = self.shared.append(Powers::COLLECT, &mut |state| {
                stale = state.next_sequence() != plan.head && !planted(Planted::CondemnAtAnyHead);
                if stale {
                    return Err(Error::new(Code::Conflict, "the log went on while garbage was looked for"));
                }
                Ok(Change::Condemn { packs: condemn.clone(), moved: moved.clone() })
            });
            match appended {
                Ok(_) => {
                    report.condemned = condemn.len() as u64;
                    break;
                }
                Err(_) if stale => plan = self.replan(&plan, &mut moved, &mut marks, progress)?,
                Err(error) => return Err(error),
            }
        }
        self.delete(&plan, &mut report, progress)?;
        self.shared.store.restore_reserve()?;
        Ok(report)
    }

    /// Plans again at the new head, but condemns nothing that the first plan did not, and no pack of which
    /// something live was not copied.
    fn replan(
        &self,
        old: &GcPlan,
        moved: &mut Vec<PackEntry>,
        marks: &mut Marks,
        progress: &dyn Progress,
    ) -> Result<GcPlan> {
        let mut plan = self.plan(&old.options, marks, progress)?;
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

    /// Copies what is live in sparse packs. Those that cannot be read whole stay as they are, and on a full medium
    /// all the others: what is dead goes all the same, and makes room.
    fn move_sparse(
        &self,
        plan: &mut GcPlan,
        report: &mut GcReport,
        progress: &dyn Progress,
    ) -> Result<Vec<PackEntry>> {
        let mut moved = Vec::new();
        let mut wanted = Vec::new();
        for (pack, groups) in &plan.sparse {
            for (group, segments) in groups {
                wanted.push(Wanted { group: *group, segments: segments.clone(), from: Some(*pack) });
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
        if !plan.delete.is_empty() {
            self.shared.append(Powers::COLLECT, &mut |state| {
                let packs = plan.delete.iter().copied();
                let condemned = |pack: &PackId| matches!(state.status(pack), Some(PackStatus::Condemned(_)));
                Ok(Change::Delete { packs: packs.filter(condemned).collect() })
            })?;
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
        store.flush()
    }
}

pub(crate) fn reference(page: &crate::format::page::Page, index: usize) -> Result<(GroupId, Ranges)> {
    let mut value = page.value(index);
    let key: [u8; 16] =
        page.key(index).try_into().map_err(|_length| value.malformed("a key is not a group's id"))?;
    let segments = Ranges::decode(&mut value)?;
    value.end()?;
    Ok((mainstay_core::Id16(key), segments))
}

/// Whether `moved` holds all of these segments.
fn is_copied(live: &[(GroupId, Ranges)], moved: &[PackEntry]) -> bool {
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

/// Sorts live packs into dead, sparse and worth keeping.
fn sort_packs(state: &State, marks: &Marks, now: Time, plan: &mut GcPlan) {
    let mut packs: Vec<_> = state.packs().filter(|pack| pack.status == PackStatus::Live).collect();
    // Packs of the groups' own writers first, so that nobody else's claim makes them superfluous. The same order in
    // every run, so that of two copies of a segment always the same one counts.
    packs.sort_by_key(|pack| (!pack.trusted, std::cmp::Reverse(pack.entry.length), pack.entry.id));
    let mut claimed: HashMap<GroupId, Ranges> = HashMap::new();
    let mut sparse = Vec::new();
    for pack in packs {
        let (live, live_count, count) = live_part(pack, marks, &mut claimed);
        if is_young(pack, now, plan.options.grace) {
            continue;
        }
        if live_count == 0 {
            plan.condemns_bytes += pack.entry.length;
            plan.dead.push(pack.entry.id);
        } else if live_count * 100 < count * u64::from(plan.options.repack_below) {
            sparse.push((live_count * 100 / count, pack, live, live_count, count));
        }
    }
    // The emptiest give the most for the least.
    sparse.sort_by_key(|(share, pack, ..)| (*share, pack.entry.id));
    for (_, pack, live, live_count, count) in sparse {
        let copies = pack.entry.length * live_count / count;
        if plan.copies_bytes + copies > plan.options.repack_bytes_max {
            break;
        }
        plan.copies_bytes += copies;
        plan.condemns_bytes += pack.entry.length;
        plan.sparse.push((pack.entry.id, live));
    }
}

/// A claim far in the future is none.
fn is_young(pack: &PackState, now: Time, grace: Duration) -> bool {
    now.since(pack.since) < grace && pack.since.since(now) <= grace
}

type LivePart = (Vec<(GroupId, Ranges)>, u64, u64);

/// The live segments of a pack that no pack before it holds, how many they are, and of how many.
fn live_part(pack: &PackState, marks: &Marks, claimed: &mut HashMap<GroupId, Ranges>) -> LivePart {
    let (mut live, mut live_count, mut count) = (Vec::new(), 0, 0);
    for group in &pack.entry.groups {
        count += group.segments.count();
        let Some(marked) = marks.live.get(&group.id) else { continue };
        let taken = claimed.entry(group.id).or_default();
        let mut own = Ranges::default();
        for segment in group.segments.iter().filter(|segment| marked.contains(*segment)) {
            if !taken.contains(segment) {
                own.insert(segment..segment + 1);
            }
        }
        taken.extend(&own);
        live_count += own.count();
        if !own.is_empty() {
            live.push((group.id, own));
        }
    }
    (live, live_count, count)
}
