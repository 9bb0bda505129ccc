//! What a record may rely on at its place in the log, and how what it may not is rescued.

use std::collections::BTreeMap;

use mainstay_core::{Code, Error, Result};

use super::ingest::References;
use crate::fetch::Fetch;
use crate::format::pack::{BuiltPack, PackId};
use crate::format::segment::GroupId;
use crate::log::record::PackEntry;
use crate::log::state::{Owner, Owners, PackStatus, State};
use crate::ranges::Ranges;
use crate::repack::{self, Wanted};

/// What keeps a record from its place.
#[derive(Default)]
pub(super) struct Lacks {
    /// Segments that neither the log nor the record promises to keep.
    missing: References,
    /// Contested groups that must be asked whose they are.
    unknown: Vec<GroupId>,
    /// A group of ours whose id somebody gave to another one.
    taken: Option<GroupId>,
}

impl Lacks {
    /// What `needed` lacks in `state` when `own` packs are in the log.
    pub(super) fn of(state: &State, needed: &References, own: &[PackEntry], owners: &Owners) -> Self {
        let mut lacks = Self::default();
        let mut promised = References::new();
        // A pack of ours counts unless it was condemned, or somebody else gave its name to other bytes.
        let counts = |pack: &&PackEntry| {
            let known = state.pack(&pack.id);
            known.is_none_or(|known| known.status == PackStatus::Live && known.entry == **pack)
        };
        for pack in own.iter().filter(counts) {
            for group in &pack.groups {
                if state.group(&group.id).is_some_and(|digest| digest != group.digest) {
                    lacks.taken = Some(group.id);
                }
                promised.entry(group.id).or_default().extend(&group.segments);
            }
        }
        for (group, segments) in needed {
            if promised.get(group).is_some_and(|promised| promised.is_superset(segments)) {
                continue;
            }
            if state.owner(group) == Some(Owner::Contested) && !owners.contains_key(group) {
                lacks.unknown.push(*group);
                continue;
            }
            let owner = state.owner_among(group, owners);
            let mut kept = state.live_segments(group, owner.as_ref());
            if let Some(promised) = promised.get(group) {
                kept.extend(promised);
            }
            let missing = segments.minus(&kept);
            if !missing.is_empty() {
                lacks.missing.insert(*group, missing);
            }
        }
        lacks
    }

    pub(super) fn is_empty(&self) -> bool {
        self.taken.is_none() && self.missing.is_empty() && self.unknown.is_empty()
    }

    pub(super) fn can_be_mended(&self) -> bool {
        self.taken.is_none() && !self.is_empty()
    }

    pub(super) fn refusal(&self) -> Error {
        let Some(group) = self.taken else {
            return Error::new(Code::Conflict, "packs that the point relies on were condemned");
        };
        let what = format!("another writer registered a group under the id {group}, which this backup made");
        Error::new(Code::Conflict, what)
            .hint("run the backup again; if that happens twice, find out which writer does so, and revoke it")
    }
}

/// Whether all that is needed is promised by the log as it was last read.
pub(super) fn holds(fetch: &Fetch, needed: &References, own: &[PackEntry]) -> Result<bool> {
    let mut owners = Owners::new();
    loop {
        let lacks = Lacks::of(&fetch.shared().state(), needed, own, &owners);
        if lacks.unknown.is_empty() {
            return Ok(lacks.is_empty());
        }
        ask_owners(fetch, &lacks, &mut owners)?;
    }
}

/// Adds everything that the packs hold.
pub(super) fn need(needed: &mut References, packs: &[PackEntry]) {
    for group in packs.iter().flat_map(|pack| &pack.groups) {
        needed.entry(group.id).or_default().extend(&group.segments);
    }
}

pub(super) fn ask_owners(fetch: &Fetch, lacks: &Lacks, owners: &mut Owners) -> Result<()> {
    for group in &lacks.unknown {
        owners.insert(*group, fetch.owner(group)?);
    }
    Ok(())
}

/// Copies what is missing into new packs, and stores them. Fails cleanly when it is already gone.
pub(super) fn rescue(
    fetch: &Fetch,
    lacks: &Lacks,
    own: &[PackEntry],
    owners: &Owners,
) -> Result<Vec<PackEntry>> {
    let wanted = sources(fetch, &lacks.missing, own, owners)?;
    let mut rescued = Vec::new();
    let mut store = |pack: BuiltPack| {
        super::pool::store_pack(fetch.shared().store.as_ref(), &pack)?;
        rescued.push(PackEntry::of(&pack));
        Ok(())
    };
    repack::copy(fetch, &wanted, &mut store, &mut Err).map_err(|error| match error.code() {
        Code::Integrity | Code::NotFound => gone().because(error),
        _ => error,
    })?;
    fetch.shared().store.flush()?;
    rescued.iter().for_each(|pack| fetch.stage(pack));
    Ok(rescued)
}

fn gone() -> Error {
    Error::new(Code::Conflict, "what the point relies on was collected while it was written")
        .hint("run the backup again; it stores what is missing")
}

/// From which pack each segment is to be copied: one of ours, or one that the group's owner or a collector named.
fn sources(fetch: &Fetch, missing: &References, own: &[PackEntry], owners: &Owners) -> Result<Vec<Wanted>> {
    let state = fetch.shared().state();
    let holds = |pack: &PackEntry, group: &GroupId, segment: u32| {
        pack.groups.iter().any(|entry| entry.id == *group && entry.segments.contains(segment))
    };
    let mut sources: BTreeMap<(GroupId, PackId), Ranges> = BTreeMap::new();
    for (group, segments) in missing {
        let owner = state.owner_among(group, owners);
        for segment in segments.iter() {
            // The last one: what was rescued before lies in the old pack and in the new one.
            let ours = own.iter().rfind(|pack| holds(pack, group, segment)).map(|pack| pack.id);
            let others = || {
                let mut places = state.trusted_places(group, owner.as_ref());
                places.find(|place| place.segments.contains(segment)).map(|place| place.pack)
            };
            let source = ours.or_else(others).ok_or_else(gone)?;
            sources.entry((*group, source)).or_default().insert(segment..segment + 1);
        }
    }
    let wanted = |((group, pack), segments)| Wanted { group, segments, from: pack };
    Ok(sources.into_iter().map(wanted).collect())
}
