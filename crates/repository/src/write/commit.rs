//! How a point comes to exist: packs, index run and point object first, the log record last.

use std::sync::Arc;

use mainstay_core::{Captured, Code, Counts, Error, PointId, Result, Time};

use super::ingest::{Ingest, References, StructureSink};
use super::point::{Parent, WriteRequest};
use crate::fetch::StructurePages;
use crate::format::pack::BuiltPack;
use crate::format::page::{MapBuilder, PageKind, PageRef, for_each_page};
use crate::format::point::{Body, Header, seal_point};
use crate::format::segment::GroupId;
use crate::index::{self, GroupTags};
use crate::keys::Powers;
use crate::log::random_id;
use crate::log::record::{Change, PackEntry, PointEntry, RunEntry};
use crate::log::state::{PackStatus, State};
use crate::names;
use crate::planted::{Planted, planted};
use crate::points::{Loaded, Points, put_twice};
use crate::ranges::Ranges;
use crate::repack::{self, Wanted};
use crate::shared::Shared;

/// A collector that condemns what a writer relies on this often in a row is not one.
const RESCUES_MAX: u32 = 20;

/// The newest point of the same workload, or the one that was asked for.
pub(crate) fn find_parent(
    shared: &Shared,
    points: &Points,
    request: &WriteRequest,
) -> Result<Option<(PointId, Arc<Loaded>)>> {
    match request.parent {
        Parent::None => Ok(None),
        Parent::Point(id) => Ok(Some((id, points.load(&id)?))),
        Parent::Latest => {
            let live = shared.state().live_points().iter().map(|point| point.entry.id).collect();
            newest(points, live, |loaded| loaded.header.workload == request.workload.id)
        }
    }
}

/// The last of `ids`, which stand in the order of the log, that `wanted` accepts. A damaged point is passed over:
/// its items are read again.
fn newest(
    points: &Points,
    mut ids: Vec<PointId>,
    wanted: impl Fn(&Loaded) -> bool,
) -> Result<Option<(PointId, Arc<Loaded>)>> {
    while let Some(id) = ids.pop() {
        match points.load(&id) {
            Ok(loaded) if wanted(&loaded) => return Ok(Some((id, loaded))),
            Ok(_) => {}
            Err(error) if error.code() == Code::Integrity => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Lets the new point share reference pages with its parent, where this holder can read them.
pub(crate) fn learn_structure(ingest: &mut Ingest, parent: &Loaded) -> Result<()> {
    let Some(root) = parent.header.references else { return Ok(()) };
    if ingest.fetch.shared().ring.structure_secret().is_err() {
        return Ok(());
    }
    let pages = StructurePages(Arc::clone(&ingest.fetch));
    let mut known = Vec::new();
    let walked = for_each_page(&pages, PageKind::References, &root, &mut |page_ref, _| {
        known.push(*page_ref);
        Ok(true)
    });
    // Damaged reference pages are simply written again.
    if walked.is_ok() {
        known.into_iter().for_each(|page| ingest.know_structure(page));
    }
    Ok(())
}

/// What a point needs beside what the ingest knows.
pub(crate) struct Draft<'a> {
    pub(crate) request: &'a WriteRequest,
    pub(crate) parent: Option<PointId>,
    pub(crate) items: Option<PageRef>,
    pub(crate) skips: Option<PageRef>,
    pub(crate) started: Time,
    pub(crate) captured: &'a Captured,
}

/// Registers packs that are stored, once there are many.
pub(crate) fn register(ingest: &mut Ingest) -> Result<()> {
    let shared = Arc::clone(ingest.fetch.shared());
    if ingest.groups.unregistered().len() < shared.tuning.register_packs {
        return Ok(());
    }
    let (packs, tags) = ingest.groups.take_unregistered();
    let runs = store_run(&shared, ingest, &tags)?;
    shared.store.flush()?;
    let mut refused = Vec::new();
    shared.append(Powers::WRITE, &mut |state| {
        // What was condemned meanwhile stays condemned; the point's own commit rescues it.
        refused = packs.iter().filter(|pack| state.status(&pack.id).is_some()).cloned().collect();
        Ok(Change::Commit { packs: uncondemned(state, &packs), runs: runs.clone(), point: None })
    })?;
    packs.iter().for_each(|pack| ingest.fetch.stage(pack));
    let registered: Vec<_> = packs.into_iter().filter(|pack| !refused.contains(pack)).collect();
    ingest.groups.forget(&registered);
    ingest.groups.refused.append(&mut refused);
    ingest.forget_usable();
    Ok(())
}

fn uncondemned(state: &State, packs: &[PackEntry]) -> Vec<PackEntry> {
    packs.iter().filter(|pack| state.status(&pack.id).is_none()).cloned().collect()
}

fn store_run(shared: &Shared, ingest: &Ingest, tags: &[GroupTags]) -> Result<Vec<RunEntry>> {
    if tags.is_empty() {
        return Ok(Vec::new());
    }
    let (id, domain) = (random_id()?, ingest.domain.domain);
    let bytes = index::seal_run(&ingest.domain.index_key, shared.family(), &domain, &id, tags)?;
    shared.store.put_new(&names::index_run(&id), &[&bytes])?;
    Ok(vec![RunEntry { id, domain, length: bytes.len() as u64, hash: *blake3::hash(&bytes).as_bytes() }])
}

/// Stores the list of everything the point reaches.
fn store_references(ingest: &mut Ingest) -> Result<Option<PageRef>> {
    let mut map = MapBuilder::new(PageKind::References, &ingest.domain.page_key);
    let references = std::mem::take(&mut ingest.references);
    for (group, segments) in &references {
        map.push(&group.0, &|out, _| segments.encode(out), &mut StructureSink(ingest))?;
    }
    let root = map.finish(&mut StructureSink(ingest))?;
    ingest.references = references;
    Ok(root)
}

/// Makes everything durable, then the point visible. Returns its id and the final counts.
pub(crate) fn commit(ingest: &mut Ingest, draft: Draft<'_>, mut counts: Counts) -> Result<(PointId, Counts)> {
    let shared = Arc::clone(ingest.fetch.shared());
    let references = store_references(ingest)?;
    ingest.groups.finish()?;
    let (mut packs, tags) = ingest.groups.take_unregistered();
    packs.append(&mut ingest.groups.refused);
    packs.iter().for_each(|pack| ingest.fetch.stage(pack));
    let runs = store_run(&shared, ingest, &tags)?;
    counts.new_bytes = ingest.new_bytes;
    counts.written_bytes = ingest.groups.written_bytes() + runs.iter().map(|run| run.length).sum::<u64>();
    let mut needed = ingest.references.clone();
    if let Some(root) = references {
        reach_structure(ingest, &packs, root, &mut needed)?;
    }
    let entry = store_point(&shared, ingest, &draft, references, counts)?;
    if !planted(Planted::CommitBeforeFlush) {
        shared.store.flush()?;
    }
    for _attempt in 0..RESCUES_MAX {
        let mut missing = References::new();
        let outcome = shared.append(Powers::WRITE, &mut |state| {
            if state.point(&entry.id).is_some() {
                return Err(Error::new(Code::Conflict, "somebody took the name of this point")
                    .hint("run the backup again; if that happens twice, somebody writes who should not"));
            }
            missing = unreliable(state, &needed, &packs);
            if missing.is_empty() || planted(Planted::CommitUnchecked) {
                let packs = uncondemned(state, &packs);
                return Ok(Change::Commit { packs, runs: runs.clone(), point: Some(entry.clone()) });
            }
            Err(Error::new(Code::Conflict, "packs that the point relies on were condemned"))
        });
        match outcome {
            Ok(_) => return Ok((entry.id, counts)),
            Err(_) if !missing.is_empty() => rescue(ingest, &missing, &mut packs)?,
            Err(_) if planted(Planted::AcknowledgeUnwritten) => return Ok((entry.id, counts)),
            Err(error) => return Err(error),
        }
    }
    Err(Error::new(Code::Conflict, "the collector condemned packs faster than they could be copied")
        .hint("run the backup again when garbage collection is done"))
}

/// Adds the segments of the reference pages themselves, old ones as well as new ones.
fn reach_structure(
    ingest: &Ingest,
    packs: &[PackEntry],
    root: PageRef,
    needed: &mut References,
) -> Result<()> {
    let mut reach = |group: &GroupId, segment: u32| {
        needed.entry(*group).or_default().insert(segment..segment.saturating_add(1));
    };
    for pack in packs {
        for group in
            pack.groups.iter().filter(|group| group.class == crate::format::segment::Class::Structure)
        {
            group.segments.iter().for_each(|segment| reach(&group.id, segment));
        }
    }
    reach(&root.group, root.segment);
    ingest.reused_structure().for_each(|page| reach(&page.group, page.segment));
    Ok(())
}

fn store_point(
    shared: &Shared,
    ingest: &Ingest,
    draft: &Draft<'_>,
    references: Option<PageRef>,
    counts: Counts,
) -> Result<PointEntry> {
    let request = draft.request;
    let signer = shared.ring.writer(Powers::WRITE)?;
    let writer = signer.verifying_key().writer_id();
    let points = Points::new(Arc::clone(ingest.fetch.shared()));
    // Expired points count: the chain goes on behind them.
    let mut all: Vec<_> = shared.state().all_points().map(|point| (point.sequence, point.entry.id)).collect();
    all.sort_unstable();
    let before = newest(&points, all.into_iter().map(|(_, id)| id).collect(), |loaded| {
        loaded.header.writer == writer && loaded.header.workload == request.workload.id
    })?;
    let (sequence, previous) =
        before.map_or((1, [0; 32]), |(_, loaded)| (loaded.header.sequence + 1, loaded.hash));
    let header = Header {
        id: random_id()?,
        workload: request.workload.id,
        domain: ingest.domain.domain,
        writer,
        sequence,
        previous,
        parent: draft.parent,
        started: draft.started,
        finished: shared.clock.now(),
        moment: draft.captured.moment,
        consistency: draft.captured.consistency,
        counts,
        references,
    };
    let body = Body {
        workload: request.workload.clone(),
        host: request.host.clone(),
        roots: request.roots.clone(),
        tags: request.tags.clone(),
        position: draft.captured.position.clone(),
        items: draft.items,
        skips: draft.skips,
    };
    let content = shared.ring.content_public();
    let (bytes, hash) = seal_point(shared.family(), content, signer, &header, &body)?;
    put_twice(shared.store.as_ref(), &names::point(&header.id), &bytes)?;
    Ok(PointEntry { id: header.id, hash, retain_until: Time(0) })
}

/// What the point needs and `state`, with the packs of this commit, does not promise to keep.
fn unreliable(state: &State, needed: &References, packs: &[PackEntry]) -> References {
    let mut promised = References::new();
    // A pack of ours counts unless it was condemned, or somebody else gave its name to other bytes.
    let ours = |pack: &&PackEntry| {
        state.pack(&pack.id).is_none_or(|known| known.status == PackStatus::Live && known.entry == **pack)
    };
    for pack in packs.iter().filter(ours) {
        for group in &pack.groups {
            promised.entry(group.id).or_default().extend(&group.segments);
        }
    }
    let mut missing = References::new();
    for (group, segments) in needed {
        let mut kept = state.live_segments(group);
        if let Some(own) = promised.get(group) {
            kept.extend(own);
        }
        if !kept.is_superset(segments) {
            let lost = segments.iter().filter(|segment| !kept.contains(*segment));
            let mut ranges = Ranges::default();
            lost.for_each(|segment| ranges.insert(segment..segment + 1));
            missing.insert(*group, ranges);
        }
    }
    missing
}

/// Copies condemned segments into packs of this commit. Fails cleanly when they are already gone.
fn rescue(ingest: &mut Ingest, missing: &References, packs: &mut Vec<PackEntry>) -> Result<()> {
    let own = |group: &GroupId, segment: u32| {
        // The last one: what was rescued before lies in the old pack and in the new one.
        packs.iter().rfind(|pack| {
            pack.groups.iter().any(|entry| entry.id == *group && entry.segments.contains(segment))
        })
    };
    let mut wanted = Vec::new();
    for (group, segments) in missing {
        let first = segments.iter().next().unwrap_or_default();
        let from = own(group, first).map(|pack| pack.id);
        wanted.push(Wanted { group: *group, segments: segments.clone(), from });
    }
    let fetch = Arc::clone(&ingest.fetch);
    let mut rescued = Vec::new();
    let mut store = |pack: BuiltPack| {
        super::pool::store_pack(fetch.shared().store.as_ref(), &pack)?;
        rescued.push(PackEntry::of(&pack));
        Ok(())
    };
    repack::copy(&fetch, &wanted, &mut store, &mut Err).map_err(|error| match error.code() {
        Code::Integrity | Code::NotFound => {
            Error::new(Code::Conflict, "what the point relies on was collected while it was written")
                .hint("run the backup again; it stores what is missing")
                .because(error)
        }
        _ => error,
    })?;
    fetch.shared().store.flush()?;
    rescued.iter().for_each(|pack| fetch.stage(pack));
    packs.extend(rescued);
    Ok(())
}
