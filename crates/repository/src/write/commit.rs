//! How a point comes to exist: packs, index run and point object first, the log record last.

use std::sync::Arc;

use mainstay_core::{Captured, Code, Counts, Error, PointId, Result, Time, WriterId};

use super::ingest::{Ingest, References, StructureSink};
use super::point::{Parent, WriteRequest};
use super::rely::{self, Lacks};
use crate::fetch::StructurePages;
use crate::format::page::{MapBuilder, PageKind, PageRef, for_each_page};
use crate::format::point::{Body, Header, seal_point};
use crate::format::segment::GroupId;
use crate::index::{self, GroupTags};
use crate::keys::Powers;
use crate::log::random_id;
use crate::log::record::{Change, PackEntry, PointEntry, RunEntry};
use crate::log::state::Owners;
use crate::names;
use crate::planted::{Planted, planted};
use crate::points::{Loaded, Points, put_twice};
use crate::shared::Shared;

/// A collector that condemns what a writer relies on this often in a row is not one.
const RESCUES_MAX: u32 = 20;
/// Nor are so many processes meant to share a key.
const FORKS_MAX: u32 = 100;

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
            newest(points, live, &|loaded| loaded.header.workload == request.workload.id, &is_about_more)
        }
    }
}

/// The last point that the present key made of this workload; an expired one too, since the chain goes on behind it.
/// A point that cannot be read is passed over, unless `gives_up` says otherwise.
pub(crate) fn find_last_own(
    shared: &Shared,
    points: &Points,
    request: &WriteRequest,
    gives_up: &dyn Fn(&Error) -> bool,
) -> Result<Option<(PointId, Arc<Loaded>)>> {
    let writer = shared.ring.writer(Powers::WRITE)?.verifying_key().writer_id();
    let state = shared.state();
    let own = state.all_points().filter(|point| point.by == writer);
    let mut own: Vec<_> = own.map(|point| (point.sequence, point.entry.id)).collect();
    drop(state);
    own.sort_unstable();
    let is_wanted =
        |loaded: &Loaded| loaded.header.writer == writer && loaded.header.workload == request.workload.id;
    newest(points, own.into_iter().map(|(_, id)| id).collect(), &is_wanted, gives_up)
}

/// Whether an error is about more than the one point that was to be loaded.
pub(crate) fn is_about_more(error: &Error) -> bool {
    !matches!(error.code(), Code::Integrity | Code::TooNew)
}

/// The last of `ids`, which stand in the order of the log, that `wanted` accepts. A damaged point is passed over:
/// its items are read again.
fn newest(
    points: &Points,
    mut ids: Vec<PointId>,
    wanted: &dyn Fn(&Loaded) -> bool,
    gives_up: &dyn Fn(&Error) -> bool,
) -> Result<Option<(PointId, Arc<Loaded>)>> {
    while let Some(id) = ids.pop() {
        match points.load(&id) {
            Ok(loaded) if wanted(&loaded) => return Ok(Some((id, loaded))),
            Err(error) if gives_up(&error) => return Err(error),
            Ok(_) | Err(_) => {}
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
    pub(crate) points: &'a Points,
    pub(crate) parent: Option<PointId>,
    pub(crate) items: Option<PageRef>,
    pub(crate) skips: Option<PageRef>,
    pub(crate) started: Time,
    pub(crate) captured: &'a Captured,
}

/// A point that is stored and that no record names yet.
struct NewPoint {
    entry: PointEntry,
    writer: WriterId,
    /// The number of the next record when the point before it in its chain was looked up.
    follows: u64,
}

enum Appended {
    Yes,
    /// Another process with the same key made a point since: two would follow the same one.
    Forked,
}

/// Registers packs that are stored, once it is time; and rescues what this run relies on while it is still there.
pub(crate) fn register(ingest: &mut Ingest) -> Result<()> {
    if !ingest.groups.should_register()? {
        return Ok(());
    }
    let shared = Arc::clone(ingest.fetch.shared());
    let (packs, tags) = ingest.groups.take_unregistered();
    packs.iter().for_each(|pack| ingest.fetch.stage(pack));
    let runs = store_run(&shared, ingest, &tags)?;
    shared.store.flush()?;
    // What still is on its way to a pack stands in nobody's log, and needs nothing.
    let is_ours = |group: &GroupId| ingest.groups.directory(group).is_some();
    let older = ingest.references.iter().filter(|(group, _)| !is_ours(group));
    let mut needed: References = older.map(|(group, segments)| (*group, segments.clone())).collect();
    rely::need(&mut needed, &packs);
    if packs.is_empty() {
        shared.refresh()?;
        if rely::holds(&ingest.fetch, &needed, &ingest.rescued)? {
            ingest.forget_usable();
            return Ok(());
        }
    }
    append(ingest, &needed, &packs, &runs, None)?;
    ingest.groups.forget(&packs);
    ingest.forget_usable();
    Ok(())
}

/// Appends the record that registers `packs` and makes the point. Whatever of `needed` was condemned meanwhile is
/// copied into a pack of this record first.
fn append(
    ingest: &mut Ingest,
    needed: &References,
    packs: &[PackEntry],
    runs: &[RunEntry],
    point: Option<&NewPoint>,
) -> Result<Appended> {
    let fetch = Arc::clone(&ingest.fetch);
    let mut owners = Owners::new();
    let mut own: Vec<_> = ingest.rescued.iter().chain(packs.iter()).cloned().collect();
    for _attempt in 0..RESCUES_MAX {
        let (mut lacks, mut is_forked) = (Lacks::default(), false);
        let outcome = fetch.shared().append(Powers::WRITE, &mut |state| {
            is_forked = point.is_some_and(|point| state.has_point_since(point.follows, &point.writer));
            if is_forked {
                return Err(Error::new(Code::Conflict, "the same key made another point meanwhile"));
            }
            if point.is_some_and(|point| state.point(&point.entry.id).is_some()) {
                return Err(Error::new(Code::Conflict, "somebody took the name of this point")
                    .hint("run the backup again; if that happens twice, somebody writes who should not"));
            }
            lacks = Lacks::of(state, needed, &own, &owners);
            if lacks.is_empty() || planted(Planted::CommitUnchecked) {
                let fresh = own.iter().filter(|pack| state.status(&pack.id).is_none());
                let packs = fresh.cloned().collect();
                return Ok(Change::Commit {
                    packs,
                    runs: runs.to_vec(),
                    point: point.map(|point| point.entry.clone()),
                });
            }
            Err(lacks.refusal())
        });
        match outcome {
            Ok(_) => return Ok(Appended::Yes),
            Err(_) if is_forked => return Ok(Appended::Forked),
            Err(_) if planted(Planted::AcknowledgeUnwritten) && lacks.is_empty() => return Ok(Appended::Yes),
            Err(_) if lacks.can_be_mended() => {
                rely::ask_owners(&fetch, &lacks, &mut owners)?;
                let rescued = rely::rescue(&fetch, &lacks, &own, &owners)?;
                ingest.rescued.extend(rescued.iter().cloned());
                own.extend(rescued);
            }
            Err(error) => return Err(error),
        }
    }
    Err(Error::new(Code::Conflict, "the collector condemned packs faster than they could be copied")
        .hint("run the backup again when garbage collection is done"))
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
    let (packs, tags) = ingest.groups.take_unregistered();
    packs.iter().for_each(|pack| ingest.fetch.stage(pack));
    let runs = store_run(&shared, ingest, &tags)?;
    counts.new_bytes = ingest.new_bytes;
    counts.written_bytes = ingest.groups.written_bytes() + runs.iter().map(|run| run.length).sum::<u64>();
    let mut needed = ingest.references.clone();
    if let Some(root) = references {
        reach_structure(ingest, &packs, root, &mut needed)?;
    }
    for _attempt in 0..FORKS_MAX {
        let point = store_point(&shared, ingest, &draft, references, counts)?;
        if !planted(Planted::CommitBeforeFlush) {
            shared.store.flush()?;
        }
        let id = point.entry.id;
        match append(ingest, &needed, &packs, &runs, Some(&point))? {
            Appended::Yes => return Ok((id, counts)),
            // Nobody else ever heard of it.
            Appended::Forked => {
                for name in [names::copy_of(&names::point(&id)), names::point(&id)] {
                    let _it_stays_and_is_small = shared.store.delete(&name);
                }
            }
        }
    }
    Err(Error::new(Code::Conflict, "others that use the same key were always faster")
        .hint("give every machine a key of its own with `mainstay key`"))
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
) -> Result<NewPoint> {
    let request = draft.request;
    let signer = shared.ring.writer(Powers::WRITE)?;
    let writer = signer.verifying_key().writer_id();
    shared.refresh()?;
    let follows = shared.state().next_sequence();
    // All but what was made since is known already, and nothing of that is worth the work of the whole run.
    let before = find_last_own(shared, draft.points, request, &|_| false)?;
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
    let entry = PointEntry { id: header.id, hash, retain_until: Time(0) };
    Ok(NewPoint { entry, writer, follows })
}
