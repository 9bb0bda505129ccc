//! Taking a recovery point of a running server.

use std::sync::Arc;

use mainstay_core::{
    Captured, Clock, Code, Event, Next, Phase, Progress, Receipt, Result, Source, WorkloadKind, WorkloadRef,
};
use mainstay_repository::{Compression, Parent, PointInfo, Repository, WriteRequest};
use mainstay_workloads::mariadb::{BackupRequest, Connection, Description, FilesBackup, KIND, Login, Place};

use super::{Files, stream};
use crate::backup::find;
use crate::copy::copy;
use crate::workload::derived_id;

/// How a server is backed up.
#[derive(Clone, Debug)]
pub struct ServerBackup {
    /// The machine that does the work, for people.
    pub host: String,
    /// The workload's name.
    pub name: String,
    /// The server, for people.
    pub server: String,
    pub tags: Vec<String>,
    /// It is a replica: see [`BackupRequest::replica`].
    pub replica: bool,
    /// Threads that compress and seal.
    pub jobs: usize,
}

/// What [`backup_server`] made.
#[derive(Clone, Debug)]
pub struct ServerPoint {
    pub point: PointInfo,
    pub description: Description,
}

/// The workload that a server is.
pub fn workload(name: &str) -> WorkloadRef {
    WorkloadRef { id: derived_id(KIND, name), kind: WorkloadKind(KIND.into()), name: name.to_owned() }
}

pub(super) fn connect(login: &Login) -> Result<Connection> {
    Connection::open(&login.address, &login.user, login.password.as_ref().map(|password| password.as_slice()))
}

/// Takes a recovery point of a running server: what `mariadb-backup` reads streams straight into the repository.
///
/// Errors: those of the server, the program and the repository. In all of them no point was made.
pub fn backup_server(
    repository: &Repository,
    login: &Login,
    request: &ServerBackup,
    clock: &Arc<dyn Clock>,
    progress: &Arc<dyn Progress>,
) -> Result<ServerPoint> {
    repository.refresh()?;
    let mut connection = connect(login)?;
    let workload = workload(&request.name);
    let epoch = match Files::of(&mut connection) {
        Ok(files) => {
            let journal = repository.append_journal(stream(&workload, &files.base))?;
            let end = journal.end().and_then(Place::from_position);
            // Asked again, since somebody who follows it may have come further meanwhile.
            Files::of(&mut connection)?.epoch(end)
        }
        // Its files can be kept without a log.
        Err(error) if error.code() == Code::Unsupported => 0,
        Err(error) => return Err(error),
    };
    let how = BackupRequest { replica: request.replica };
    let mut files = FilesBackup::start(&mut connection, login, how, Arc::clone(clock), Arc::clone(progress))?;
    files.set_epoch(epoch);
    let writer = repository.write(WriteRequest {
        workload,
        host: request.host.clone(),
        roots: vec![request.server.clone()],
        tags: request.tags.clone(),
        reread_one_in: 0,
        any_order: true,
        parent: Parent::None,
        progress: Arc::clone(progress),
        compression: Compression::default(),
        jobs: request.jobs,
    })?;
    progress.event(&Event::Phase(Phase::Copying));
    let description = Arc::new(std::sync::Mutex::new(Description::default()));
    let source = Told { files: Box::new(files), description: Arc::clone(&description) };
    let point = copy(Box::new(source), Box::new(writer), progress.as_ref())?;
    let description = description.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone();
    Ok(ServerPoint { point: find(repository, &point)?, description })
}

/// Says on what the files are of, once that is known.
struct Told {
    files: Box<FilesBackup>,
    description: Arc<std::sync::Mutex<Description>>,
}

impl Source for Told {
    fn next(&mut self) -> Result<Next> {
        self.files.next()
    }

    fn seal(&mut self) -> Result<Captured> {
        *self.description.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
            self.files.description().clone();
        self.files.seal()
    }

    fn commit(self: Box<Self>, receipt: &Receipt) -> Result<()> {
        self.files.commit(receipt)
    }
}
