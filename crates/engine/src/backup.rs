//! Taking a recovery point of file trees.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mainstay_core::{
    Body, Clock, Code, Error, Event, ItemPath, Next, Phase, PointId, Progress, Result, Source, Stamp,
    WorkloadRef,
};
use mainstay_repository::{Compression, Entry, Parent, PointInfo, Repository, Walk, WriteRequest};
use mainstay_workloads::files::{self, FilesRequest, FilesSource, Hooks, SnapshotRule};

use crate::copy::copy;
use crate::workload::{Identity, identify, root_text};

/// What to protect, and how.
#[derive(Clone, Debug, Default)]
pub struct BackupRequest {
    pub files: FilesRequest,
    pub host: String,
    /// The workload's name, when the person gave one.
    pub name: Option<String>,
    pub tags: Vec<String>,
    /// Of so many unchanged items one is read all the same. 0: none.
    pub reread_one_in: u32,
    /// Reads everything, as if there were no earlier point.
    pub full: bool,
    /// Shell commands that bring to rest what is read, and let it go again once all is stored.
    pub quiesce: Option<String>,
    pub thaw: Option<String>,
    /// How long each of the two may take.
    pub hook_limit: Duration,
    /// Capture all the same when the first one fails; the point then says so.
    pub quiesce_may_fail: bool,
    /// Counts what is there while it is copied, so that the rest can be told.
    pub count_ahead: bool,
    pub compression: Compression,
    /// Threads that compress and seal.
    pub jobs: usize,
}

/// What [`preview`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preview {
    pub workload: WorkloadRef,
    pub roots: Vec<String>,
    pub items: u64,
    /// Content bytes of all items.
    pub bytes: u64,
    /// Items whose content would be read, and their bytes.
    pub read_items: u64,
    pub read_bytes: u64,
    /// Items with something missing.
    pub skipped: u64,
}

/// Takes a recovery point.
///
/// Errors: those of the source, the repository and the commands; [`mainstay_core::Code::Cancelled`]. In all of them
/// no point was made, unless the error says that everything is stored.
pub fn backup(
    repository: &Repository,
    request: &BackupRequest,
    clock: &Arc<dyn Clock>,
    progress: &Arc<dyn Progress>,
) -> Result<PointInfo> {
    repository.refresh()?;
    let points = repository.points()?;
    let workload = workload(request, &points, repository.ring().content_secret().is_err());
    let parent = parent(request, &workload, &points);
    let mut files = request.files.clone();
    let (quiesce, thaw) = (request.quiesce.clone(), request.thaw.clone());
    if quiesce.is_some() || thaw.is_some() {
        let workload = workload.name.clone();
        let run = Some(Arc::clone(progress));
        let (limit, go_on) = (request.hook_limit, request.quiesce_may_fail);
        files.hooks = Some(Hooks { workload, quiesce, thaw, limit, go_on, run });
    }
    let source = FilesSource::new(files, Arc::clone(clock))?;
    let writer = repository.write(WriteRequest {
        workload: workload.clone(),
        host: request.host.clone(),
        roots: roots(&request.files),
        tags: request.tags.clone(),
        reread_one_in: request.reread_one_in,
        any_order: false,
        parent: if request.full { Parent::None } else { Parent::Latest },
        progress: Arc::clone(progress),
        compression: request.compression,
        jobs: request.jobs,
    })?;
    progress.event(&Event::Phase(Phase::Copying));
    let counting = expect(request, parent.as_ref(), clock, progress);
    let point = copy(Box::new(source), Box::new(writer), progress.as_ref())?;
    drop(counting);
    let mut made = find(repository, &point)?;
    if !made.readable {
        // Whoever only writes cannot read back what it has just said.
        (made.workload, made.host, made.roots) = (workload, request.host.clone(), roots(&request.files));
    }
    Ok(made)
}

/// Says what [`backup`] would read. Changes nothing and runs no command.
pub fn preview(
    repository: &Repository,
    request: &BackupRequest,
    clock: &Arc<dyn Clock>,
    progress: &dyn Progress,
) -> Result<Preview> {
    let points = repository.points()?;
    let workload = workload(request, &points, repository.ring().content_secret().is_err());
    let mut known = Known::default();
    if let Some(parent) = parent(request, &workload, &points).filter(|parent| parent.readable) {
        known.walk = Some(repository.read(&parent.id)?.walk(&ItemPath::root()));
    }
    let mut source = FilesSource::new(live(&request.files), Arc::clone(clock))?;
    let roots = roots(&request.files);
    let (items, bytes, read_items, read_bytes, skipped) = (0, 0, 0, 0, 0);
    let mut found = Preview { workload, roots, items, bytes, read_items, read_bytes, skipped };
    loop {
        progress.check()?;
        match source.next()? {
            Next::Item(item) => {
                progress.event(&Event::Item(&item.path));
                found.items += 1;
                found.bytes += item.metadata.size;
                let has_content = !matches!(item.body, Body::None);
                if has_content && !known.is_unchanged(&item.path, &item.stamp)? {
                    found.read_items += 1;
                    found.read_bytes += item.metadata.size;
                }
            }
            Next::Skipped(skip) => {
                progress.event(&Event::Skipped(&skip));
                found.skipped += u64::from(skip.reason.is_loss());
            }
            Next::End => return Ok(found),
        }
    }
}

/// The items of the earlier point, walked beside the source: both come in the same order.
#[derive(Default)]
struct Known {
    walk: Option<Walk>,
    next: Option<Entry>,
}

impl Known {
    fn is_unchanged(&mut self, path: &ItemPath, stamp: &Stamp) -> Result<bool> {
        let Some(walk) = &mut self.walk else { return Ok(false) };
        while self.next.as_ref().is_none_or(|entry| entry.path < *path) {
            match walk.next() {
                Some(Ok(entry)) => self.next = Some(entry),
                // What is damaged there is read again.
                Some(Err(error)) if error.code() == Code::Integrity => {}
                Some(Err(error)) => return Err(error),
                None => return Ok(false),
            }
        }
        let same = self.next.as_ref().is_some_and(|entry| entry.path == *path && entry.stamp == *stamp);
        Ok(same && !stamp.0.is_empty())
    }
}

fn workload(request: &BackupRequest, points: &[PointInfo], blind: bool) -> WorkloadRef {
    let roots = roots(&request.files);
    let name = request.name.as_deref();
    identify(&Identity { kind: files::KIND, host: &request.host, roots: &roots, name, blind }, points)
}

/// The point that tells what is unchanged.
fn parent(request: &BackupRequest, workload: &WorkloadRef, points: &[PointInfo]) -> Option<PointInfo> {
    let newest = points.iter().rfind(|point| point.workload.id == workload.id);
    newest.filter(|_| !request.full).cloned()
}

/// The same files as they stand, for a look that must leave no trace: no snapshot is taken.
fn live(request: &FilesRequest) -> FilesRequest {
    FilesRequest { snapshots: SnapshotRule::Never, hooks: None, ..request.clone() }
}

/// The roots as people read them.
fn roots(request: &FilesRequest) -> Vec<String> {
    request.roots.iter().map(|root| root_text(root)).collect()
}

pub(crate) fn find(repository: &Repository, id: &PointId) -> Result<PointInfo> {
    let points = repository.points()?;
    let found = points.into_iter().rfind(|point| point.id == *id);
    found.ok_or_else(|| Error::bug(format!("the point {id} that was just made is not there")))
}

/// Tells how much there is to do: about as much as last time, until a count that runs ahead knows better. The count
/// ends when the value is dropped.
fn expect(
    request: &BackupRequest,
    parent: Option<&PointInfo>,
    clock: &Arc<dyn Clock>,
    progress: &Arc<dyn Progress>,
) -> Option<Counting> {
    if let Some(parent) = parent {
        let (items, bytes) = (parent.counts.items, parent.counts.bytes);
        // A guess: the tree may have grown since.
        progress.event(&Event::Expect { items, bytes, complete: false });
    }
    if !request.count_ahead {
        return None;
    }
    let source = FilesSource::new(live(&request.files), Arc::clone(clock)).ok()?;
    let stop = Arc::new(AtomicBool::new(false));
    let (progress, stopped) = (Arc::clone(progress), Arc::clone(&stop));
    let thread = std::thread::Builder::new().name("count".into());
    let thread = thread.spawn(move || count(source, progress.as_ref(), &stopped)).ok()?;
    Some(Counting { stop, thread: Some(thread) })
}

fn count(mut source: FilesSource, progress: &dyn Progress, stop: &AtomicBool) {
    let (mut items, mut bytes) = (0, 0);
    while !stop.load(Ordering::Relaxed) && !progress.cancelled() {
        match source.next() {
            Ok(Next::Item(item)) => {
                items += 1;
                bytes += item.metadata.size;
            }
            Ok(Next::Skipped(_)) => {}
            Ok(Next::End) => return progress.event(&Event::Expect { items, bytes, complete: true }),
            // Whatever is wrong, the copy meets it too and reports it.
            Err(_) => return,
        }
    }
}

struct Counting {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Counting {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // It only counted; a panic of it has been reported and hurts nothing.
        let _counted = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use mainstay_core::{Clock, Event, Progress, Silent, Time};
    use mainstay_repository::keys::KeyRing;
    use mainstay_repository::{Options, Repository, Tuning};
    use mainstay_testkit::{MemoryStore, ScriptedClock};
    use mainstay_workloads::files::{FilesRequest, SnapshotRule};

    use super::{BackupRequest, backup, preview};

    fn repository() -> (Repository, Arc<dyn Clock>) {
        let clock = Arc::new(ScriptedClock::at(Time::from_seconds(4_000_000_000)));
        let options = Options { clock: clock.clone(), state: None, tuning: Tuning::default() };
        let ring = KeyRing::create().unwrap();
        let store = Arc::new(MemoryStore::new());
        (Repository::create(store, ring, &[], &options).unwrap(), clock)
    }

    fn request(root: &std::path::Path) -> BackupRequest {
        let files = FilesRequest { roots: vec![root.to_owned()], ..FilesRequest::default() };
        BackupRequest { files, host: "here".into(), jobs: 1, count_ahead: true, ..BackupRequest::default() }
    }

    /// The rule that insists on a snapshot fails in a directory of this kind, unless none is asked for.
    #[test]
    fn a_preview_takes_no_snapshot() {
        let (repository, clock) = repository();
        let mut request = request(std::path::Path::new("/proc/self/fdinfo"));
        request.files.snapshots = SnapshotRule::Always;
        let progress: Arc<dyn Progress> = Arc::new(Silent);
        backup(&repository, &request, &clock, &progress).unwrap_err();
        assert!(preview(&repository, &request, &clock, &Silent).unwrap().items > 0);
    }

    /// Keeps the items of every figure that was called complete.
    #[derive(Default)]
    struct Complete(Mutex<Vec<u64>>);

    impl Progress for Complete {
        fn event(&self, event: &Event<'_>) {
            if let Event::Expect { items, complete: true, .. } = event {
                self.0.lock().unwrap().push(*items);
            }
        }
    }

    #[test]
    fn what_there_was_last_time_is_not_called_complete() {
        let (repository, clock) = repository();
        let directory = tempfile::tempdir().unwrap();
        let told = Arc::new(Complete::default());
        let progress: Arc<dyn Progress> = told.clone();
        for name in ["first", "second"] {
            std::fs::write(directory.path().join(name), name).unwrap();
            told.0.lock().unwrap().clear();
            let point = backup(&repository, &request(directory.path()), &clock, &progress).unwrap();
            let told = told.0.lock().unwrap();
            assert!(told.iter().all(|items| *items == point.counts.items), "{told:?} {:?}", point.counts);
        }
    }
}
