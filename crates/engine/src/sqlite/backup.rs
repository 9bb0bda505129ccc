//! Taking a recovery point of databases that are files.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use mainstay_core::{Clock, Event, Phase, Progress, Result, WorkloadRef};
use mainstay_repository::{Compression, Parent, PointInfo, Repository, WriteRequest};
use mainstay_workloads::sqlite::{KIND, Place, SqliteSource, find};

use super::stream;
use crate::backup::find as find_point;
use crate::copy::copy;
use crate::workload::{Identity, derived_id, identify, root_text};

/// Which databases are backed up, and how.
#[derive(Clone, Debug)]
pub struct DatabasesBackup {
    /// The machine that does the work, for people.
    pub host: String,
    /// The workload's name, when the person gave one.
    pub name: Option<String>,
    /// A database, a directory, or a pattern; absolute.
    pub pattern: PathBuf,
    pub tags: Vec<String>,
    /// Threads that compress and seal.
    pub jobs: usize,
}

impl DatabasesBackup {
    fn root(&self) -> String {
        root_text(&self.pattern)
    }

    /// The directory that names in points are below; `None` for a single database.
    fn top(&self) -> Option<PathBuf> {
        let text = self.pattern.to_str().unwrap_or_default();
        match text.find(['*', '?', '[']) {
            Some(at) => {
                let start = text.get(..at).unwrap_or_default();
                Some(PathBuf::from(
                    start.rsplit_once('/').map_or("/", |(top, _)| if top.is_empty() { "/" } else { top }),
                ))
            }
            None => self.pattern.is_dir().then(|| self.pattern.clone()),
        }
    }
}

/// The workload that these databases are.
pub fn workload(repository: &Repository, request: &DatabasesBackup) -> Result<WorkloadRef> {
    let points = repository.points()?;
    let roots = [request.root()];
    let blind = repository.ring().content_secret().is_err();
    let identity =
        Identity { kind: KIND, host: &request.host, roots: &roots, name: request.name.as_deref(), blind };
    let mut workload = identify(&identity, &points);
    if !points.iter().any(|point| point.workload == workload) {
        // Not that of files of the same name.
        workload.id = derived_id(&format!("{KIND} {}", request.host), &workload.name);
    }
    Ok(workload)
}

/// Takes a recovery point of databases while others write to them.
///
/// `followed`: where this process follows logs, up to where it has read each. Of several databases one that cannot be read
/// is a skip.
pub fn backup_databases(
    repository: &Repository,
    request: &DatabasesBackup,
    followed: &BTreeMap<String, Place>,
    clock: &Arc<dyn Clock>,
    progress: &Arc<dyn Progress>,
) -> Result<PointInfo> {
    repository.refresh()?;
    let found = find(&request.pattern)?;
    let workload = workload(repository, request)?;
    let mut journals = followed.clone();
    for database in &found {
        let name = database.name.to_string();
        if !journals.contains_key(&name) {
            let journal = repository.append_journal(stream(&workload, &name))?;
            journals.extend(journal.end().and_then(Place::from_position).map(|place| (name, place)));
        }
    }
    let writer = repository.write(WriteRequest {
        workload: workload.clone(),
        host: request.host.clone(),
        roots: vec![request.root()],
        tags: request.tags.clone(),
        reread_one_in: 0,
        any_order: true,
        parent: Parent::None,
        progress: Arc::clone(progress),
        compression: Compression::default(),
        jobs: request.jobs,
    })?;
    progress.event(&Event::Phase(Phase::Copying));
    let top = request.top();
    let source = SqliteSource::new(found, top.as_deref(), journals, Arc::clone(clock));
    let point = copy(Box::new(source), Box::new(writer), progress.as_ref())?;
    let mut made = find_point(repository, &point)?;
    if !made.readable {
        // Whoever only writes cannot read back what it has just said.
        (made.workload, made.host, made.roots) = (workload, request.host.clone(), vec![request.root()]);
    }
    Ok(made)
}
