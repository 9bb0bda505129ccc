//! Which packs are dead, and which are worth copying.

use std::collections::HashMap;
use std::time::Duration;

use mainstay_core::Time;

use super::GcPlan;
use super::marks::{Live, View};
use crate::format::segment::GroupId;
use crate::log::state::{PackState, PackStatus};
use crate::ranges::Ranges;

/// Sorts live packs into dead, sparse and worth keeping.
pub(super) fn sort_packs(view: &View<'_>, now: Time, plan: &mut GcPlan) {
    let mut packs: Vec<_> = view.state.packs().filter(|pack| pack.status == PackStatus::Live).collect();
    // Packs of the groups' own writers first, so that nobody else's claim makes them superfluous. The same order in
    // every run, so that of two copies of a segment always the same one counts. What is only claimed is kept beside
    // every other claim, and not copied: a copy would stand there by a collector's word.
    let claims = |pack: &PackState| pack.entry.groups.iter().any(|group| !view.is_trusted(pack, group));
    packs.sort_by_cached_key(|pack| (claims(pack), std::cmp::Reverse(pack.entry.length), pack.entry.id));
    let mut taken: HashMap<GroupId, Ranges> = HashMap::new();
    let mut sparse = Vec::new();
    for pack in packs {
        let LivePart { live, live_count, count, trusted } = LivePart::of(pack, view, &mut taken);
        if is_young(pack, now, plan.options.grace) {
            continue;
        }
        if live_count == 0 {
            plan.condemns_bytes += pack.entry.length;
            plan.dead.push(pack.entry.id);
        } else if trusted && live_count * 100 < count * u64::from(plan.options.repack_below) {
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

/// The live segments of a pack that no trusted pack before it holds, how many they are, and of how many; and whether all
/// of them are where it says by a trusted word.
struct LivePart {
    live: Live,
    live_count: u64,
    count: u64,
    trusted: bool,
}

impl LivePart {
    fn of(pack: &PackState, view: &View<'_>, taken: &mut HashMap<GroupId, Ranges>) -> Self {
        let mut part = Self { live: Vec::new(), live_count: 0, count: 0, trusted: true };
        for group in &pack.entry.groups {
            part.count += group.segments.count();
            let taken = taken.entry(group.id).or_default();
            let own = view.reached(group).minus(taken);
            if own.is_empty() {
                continue;
            }
            part.live_count += own.count();
            // A mere claim makes nobody else's pack superfluous.
            if view.is_trusted(pack, group) {
                taken.extend(&own);
            } else {
                part.trusted = false;
            }
            part.live.push((group.id, own));
        }
        part
    }
}
