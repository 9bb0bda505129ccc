//! What live points reach, and whose that is.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use mainstay_core::{PointId, Progress, Result, WriterId};

use crate::fetch::StructurePages;
use crate::format::page::{Page, PageKind, for_each_page};
use crate::format::segment::GroupId;
use crate::log::record::GroupEntry;
use crate::log::state::{Owners, PackState, State};
use crate::ranges::Ranges;
use crate::repository::Repository;

/// Segments, by group.
pub(super) type Live = Vec<(GroupId, Ranges)>;

#[derive(Clone, Debug, Default)]
pub(super) struct Marks {
    live: HashMap<GroupId, Ranges>,
    pages: HashSet<[u8; 32]>,
    points: HashSet<PointId>,
}

/// The log at one head, and what its points reach.
pub(super) struct View<'a> {
    pub(super) state: &'a State,
    pub(super) marks: &'a Marks,
    pub(super) owners: Owners,
}

impl View<'_> {
    fn owner(&self, group: &GroupId) -> Option<WriterId> {
        self.state.owner_among(group, &self.owners)
    }

    /// Whether the pack is where its group is, by the word of its owner or of a collector.
    pub(super) fn is_trusted(&self, pack: &PackState, group: &GroupEntry) -> bool {
        pack.by.is_none() || pack.by == self.owner(&group.id)
    }

    /// The segments that live points reach, of those that a pack says to hold of a group.
    pub(super) fn reached(&self, group: &GroupEntry) -> Ranges {
        // Another group under the same id is reached by nobody.
        let known = self.state.group(&group.id) == Some(group.digest);
        let marked = self.marks.live.get(&group.id).filter(|_| known);
        marked.map(|marked| group.segments.and(marked)).unwrap_or_default()
    }

    /// What live points reach in a pack and no live pack holds.
    pub(super) fn only_in(&self, pack: &PackState) -> Live {
        let only = |group: &GroupEntry| {
            let kept = self.state.live_segments(&group.id, self.owner(&group.id).as_ref());
            (group.id, self.reached(group).minus(&kept))
        };
        pack.entry.groups.iter().map(only).filter(|(_, segments)| !segments.is_empty()).collect()
    }
}

impl Repository {
    /// Adds what points reach that were not marked before. A reference page shared by many is read once.
    pub(super) fn mark(&self, state: &State, marks: &mut Arc<Marks>, progress: &dyn Progress) -> Result<()> {
        let pages = StructurePages(Arc::clone(&self.fetch));
        let mut points: Vec<_> = state.live_points().iter().map(|point| point.entry.id).collect();
        points.retain(|id| !marks.points.contains(id));
        if points.is_empty() {
            return Ok(());
        }
        let marks = Arc::make_mut(marks);
        for id in points {
            marks.points.insert(id);
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

    /// Asks the headers of contested groups that somebody reaches whose they are.
    pub(super) fn view<'a>(&self, state: &'a State, marks: &'a Marks) -> Result<View<'a>> {
        let mut owners = Owners::new();
        for group in state.contested().filter(|group| marks.live.contains_key(*group)) {
            owners.insert(*group, self.fetch.owner(group)?);
        }
        Ok(View { state, marks, owners })
    }
}

pub(crate) fn reference(page: &Page, index: usize) -> Result<(GroupId, Ranges)> {
    let mut value = page.value(index);
    let key: [u8; 16] =
        page.key(index).try_into().map_err(|_length| value.malformed("a key is not a group's id"))?;
    let segments = Ranges::decode(&mut value)?;
    value.end()?;
    Ok((mainstay_core::Id16(key), segments))
}
