//! What becomes of damage that `verify` found: nobody may rely on it any more. Damaged packs are condemned and what is
//! whole in them is copied, so that the next backup stores the rest again. The collector keeps their bytes as long as
//! a point reaches something that lies nowhere else: a later repair may still want them.

use std::collections::BTreeSet;

use mainstay_core::{Code, Error, Progress, Result};

use crate::format::pack::{BuiltPack, PackId};
use crate::format::segment::Class;
use crate::keys::Powers;
use crate::log::record::{Change, PackEntry};
use crate::log::state::{PackState, PackStatus};
use crate::ranges::Ranges;
use crate::repack::{self, Wanted};
use crate::repository::Repository;
use crate::verify::{Reached, VerifyReport};
use crate::write::store_pack;

/// What `verify` found damaged in packs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Damage {
    pub(crate) packs: BTreeSet<PackId>,
    /// Segments that are what their packs say, and yet not what they should be.
    pub(crate) segments: Reached,
}

impl Repository {
    /// Condemns the packs that `report` found damaged and that still are, and keeps what is whole in them. Returns how
    /// many. Needs the collector's power.
    pub fn set_aside(&self, report: &VerifyReport, progress: &dyn Progress) -> Result<u64> {
        let damage = &report.damage;
        self.shared.ring.writer(Powers::COLLECT)?;
        self.refresh()?;
        let state = self.shared.state().clone();
        let mut condemned = Vec::new();
        let mut wanted = Vec::new();
        for pack in state.packs().filter(|pack| pack.status == PackStatus::Live) {
            progress.check()?;
            let names = |id| damage.packs.contains(id);
            let holds_bad = pack.entry.groups.iter().any(|group| {
                damage.segments.get(&group.id).is_some_and(|bad| !group.segments.and(bad).is_empty())
            });
            if !names(&pack.entry.id) && !holds_bad {
                continue;
            }
            let (whole, is_whole) = self.whole_part(pack, &damage.segments)?;
            // A medium that failed for a moment has damaged nothing.
            if !is_whole {
                condemned.push(pack.entry.id);
                wanted.extend(whole);
            }
        }
        if condemned.is_empty() {
            return Ok(0);
        }
        let moved = self.copy_whole(&wanted, progress)?;
        self.shared.append(Powers::COLLECT, &mut |state| {
            // To a collector that waits for nobody the copies are garbage, as long as no record names them.
            if moved.iter().any(|pack| state.status(&pack.id).is_some()) {
                return Err(Error::new(
                    Code::Conflict,
                    "what was whole in damaged packs was collected meanwhile",
                )
                .hint("run `mainstay verify` again"));
            }
            Ok(Change::Condemn { packs: condemned.clone(), moved: moved.clone() })
        })?;
        Ok(condemned.len() as u64)
    }

    /// What can be copied of a pack, and whether that is all that it should hold. What somebody only claims to be there is
    /// not copied: it would then stand there by a collector's word.
    fn whole_part(&self, pack: &PackState, bad: &Reached) -> Result<(Vec<Wanted>, bool)> {
        let from = pack.entry.id;
        // What parity makes good is copied too, and yet the pack must not stay as it is.
        let (mut parts, mut is_whole) = (Vec::new(), self.fetch.is_as_written(&from)?);
        for group in &pack.entry.groups {
            let readable = repack::readable(&self.fetch, &from, &group.id, &group.segments)?;
            let directory = group.class == Class::Structure
                || is_there(self.fetch.sealed_directory_in(&from, &group.id).map(drop))?;
            let known = bad.get(&group.id).cloned().unwrap_or_default();
            let segments: Ranges = readable.minus(&known);
            is_whole &= directory && segments == group.segments;
            let trusted = pack.by.is_none() || pack.by == self.fetch.owner(&group.id)?;
            if trusted && !segments.is_empty() {
                parts.push(Wanted { group: group.id, segments, from });
            }
        }
        Ok((parts, is_whole))
    }

    fn copy_whole(&self, wanted: &[Wanted], progress: &dyn Progress) -> Result<Vec<PackEntry>> {
        let store = self.shared.store.as_ref();
        let mut moved = Vec::new();
        let mut emit = |pack: BuiltPack| {
            progress.check()?;
            store_pack(store, &pack)?;
            moved.push(PackEntry::of(&pack));
            Ok(())
        };
        // Segments whose directory is lost with them are of no use.
        repack::copy(&self.fetch, wanted, &mut emit, &mut |error| is_there(Err(error)).map(drop))?;
        store.flush()?;
        Ok(moved)
    }
}

/// `false` for what is damaged or gone.
fn is_there(outcome: Result<()>) -> Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        Err(error) if repack::is_damage(&error) => Ok(false),
        Err(error) => Err(error),
    }
}
