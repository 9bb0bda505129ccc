//! Taking a point of what dump programs write.

use std::sync::Arc;

use mainstay_core::{Clock, Event, Phase, Progress, Result, WorkloadKind, WorkloadRef};
use mainstay_repository::{Compression, Parent, PointInfo, Repository, WriteRequest};
use mainstay_workloads::export::{Dump, Export, KIND};

use crate::backup::find;
use crate::copy::copy;
use crate::workload::derived_id;

/// What is exported.
#[derive(Clone, Debug)]
pub struct ExportRequest {
    /// The machine that does the work, for people.
    pub host: String,
    /// The workload's name.
    pub name: String,
    /// The server, for people; exports of one server are one workload.
    pub server: String,
    pub tags: Vec<String>,
    /// Made before what is in them.
    pub directories: Vec<String>,
    pub dumps: Vec<Dump>,
    /// Threads that compress and seal.
    pub jobs: usize,
}

/// Runs the programs and stores what they write, with nothing staged.
///
/// Errors: those of the programs, of which every one has to end well, and of the repository. In all of them no point was
/// made.
pub fn backup_export(
    repository: &Repository,
    request: ExportRequest,
    clock: &Arc<dyn Clock>,
    progress: &Arc<dyn Progress>,
) -> Result<PointInfo> {
    repository.refresh()?;
    let workload = WorkloadRef {
        id: derived_id(&format!("{KIND} {}", request.server), &request.name),
        kind: WorkloadKind(KIND.into()),
        name: request.name,
    };
    let directories: Vec<&str> = request.directories.iter().map(String::as_str).collect();
    let source = Export::new(&directories, request.dumps, &**clock)?;
    let writer = repository.write(WriteRequest {
        workload,
        host: request.host,
        roots: vec![request.server],
        tags: request.tags,
        reread_one_in: 0,
        any_order: true,
        compression: Compression::default(),
        parent: Parent::None,
        progress: Arc::clone(progress),
        jobs: request.jobs,
    })?;
    progress.event(&Event::Phase(Phase::Copying));
    let point = copy(Box::new(source), Box::new(writer), progress.as_ref())?;
    find(repository, &point)
}
