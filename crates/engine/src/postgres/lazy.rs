//! The files of a point and its log, mounted as a tree that can be written to: read as far as the server looks, and
//! nothing that it writes is kept.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use mainstay_core::{Blocks, Error, ItemPath, Kind, Result};
use mainstay_repository::{PointReader, Repository};
use mainstay_workloads::postgres::{DATA, History, TABLESPACES};
use mainstay_workloads::sandbox::Sandbox;

use super::log::{Log, Small};
use super::plan::ClusterPlan;
use super::restore::tablespace;
use crate::mount::{Draft, DraftCost, Mounted};

/// So many different troubles are kept.
const TROUBLES_MAX: usize = 100;

/// A mounted point. Dropped, it is unmounted.
pub(super) struct Lazy {
    _mounted: Mounted,
    reader: PointReader,
    fetched_before: u64,
    cost: DraftCost,
    troubles: Arc<Mutex<Vec<String>>>,
}

impl Lazy {
    /// Mounts what the plan says in the sandbox, the data directory at `data`.
    ///
    /// Errors: [`mainstay_core::Code::Unsupported`] where there is no FUSE.
    pub(super) fn mount(
        repository: &Repository,
        plan: &ClusterPlan,
        sandbox: &Sandbox,
        data: &Path,
        user: Option<(u32, u32)>,
    ) -> Result<Self> {
        let ours = || (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let reader = repository.read(&plan.point.id)?;
        let fetched_before = reader.bytes_fetched();
        let mut draft = Draft::new(sandbox.path(), user.unwrap_or_else(ours))?;
        let name = |path: &Path| path.file_name().unwrap_or_default().to_owned();
        let mut parts = vec![(DATA.to_owned(), name(data))];
        let spaces = plan.cluster.tablespaces.iter().map(|space| space.oid);
        parts
            .extend(spaces.clone().map(|oid| (format!("{TABLESPACES}/{oid}"), name(&tablespace(data, oid)))));
        let links = spaces.map(|oid| (oid, tablespace(data, oid))).collect::<Vec<_>>();
        for (from, to) in parts {
            show(&reader, &mut draft, &path(from.as_bytes())?, to.as_encoded_bytes(), &links)?;
        }
        let directory = [name(data).as_encoded_bytes(), b"/pg_wal"].concat();
        draft.directory(&path(&directory)?, 0o700)?;
        let mut files: Vec<(String, Arc<dyn Blocks>)> = Vec::new();
        for log in Log::of(plan)? {
            let segments = log.segments().map(|(name, segment)| (name, Arc::new(segment) as _));
            files.extend(segments);
        }
        for history in plan.histories()? {
            files.push((History::file_name(history.timeline), Arc::new(Small(history.text.clone()))));
        }
        for (name, segment) in files {
            let size = segment.size();
            let below = Box::new(move || Ok(Arc::clone(&segment)));
            draft.file(
                &path(&[directory.as_slice(), b"/", name.as_bytes()].concat())?,
                0o600,
                size,
                below,
            )?;
        }
        let cost = draft.cost();
        let troubles = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&troubles);
        let trouble = Box::new(move |error: &Error| {
            let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
            let what = error.chain().join(": ");
            if heard.len() < TROUBLES_MAX && !heard.contains(&what) {
                heard.push(what);
            }
        });
        let mounted = Mounted::draft(draft, &sandbox.cluster(), trouble)?;
        Ok(Self { _mounted: mounted, reader, fetched_before, cost, troubles })
    }

    /// What could not be read or kept so far.
    pub(super) fn troubles(&self) -> Vec<String> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn fetched(&self) -> u64 {
        self.reader.bytes_fetched().saturating_sub(self.fetched_before)
    }

    pub(super) fn cost(&self) -> &DraftCost {
        &self.cost
    }
}

/// Shows what lies below `from` in the point as what lies below `to` in the draft.
fn show(
    reader: &PointReader,
    draft: &mut Draft,
    from: &ItemPath,
    to: &[u8],
    links: &[(u32, PathBuf)],
) -> Result<()> {
    draft.directory(&path(to)?, 0o700)?;
    for entry in reader.walk(from) {
        let entry = entry?;
        if entry.path == *from {
            continue;
        }
        let rest: Vec<&[u8]> = entry.path.components().skip(from.components().count()).collect();
        let rest = rest.join(&b'/');
        let at = path(&[to, b"/", &rest].concat())?;
        let metadata = &entry.metadata;
        match metadata.kind {
            Kind::Directory => draft.directory(&at, metadata.mode)?,
            Kind::Symlink => {
                let space = links.iter().find(|(oid, _)| rest == format!("pg_tblspc/{oid}").as_bytes());
                let target = space.map(|(_, at)| at.as_os_str().as_encoded_bytes().to_vec());
                draft.symlink(&at, target.or_else(|| metadata.link_target.clone()).unwrap_or_default())?;
            }
            _ => {
                let (reader, mode, size) = (reader.clone(), metadata.mode, entry.content_bytes());
                let below = Box::new(move || {
                    let blocks = reader.stored_blocks(&entry);
                    let named = |error: Error| error.during(format!("cannot read /{}", entry.path));
                    Ok(Arc::new(Named(blocks.map_err(named)?, entry.path.clone())) as Arc<dyn Blocks>)
                });
                draft.file(&at, mode, size, below)?;
            }
        }
    }
    Ok(())
}

fn path(text: &[u8]) -> Result<ItemPath> {
    ItemPath::new(text).map_err(|error| Error::integrity("a file is named impossibly").because(error))
}

/// Content whose errors say what it is of.
struct Named(mainstay_repository::StoredBlocks, ItemPath);

impl Blocks for Named {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn extents(&self, range: std::ops::Range<u64>) -> Result<Vec<mainstay_core::Extent>> {
        self.0.extents(range)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.0.read_at(offset, buffer).map_err(|error| error.during(format!("cannot read /{}", self.1)))
    }
}
