//! The binary log of a server into its journal, for as long as it is asked for.

use std::sync::Arc;

use mainstay_core::{Clock, Code, Error, Progress, Result, WorkloadRef};
use mainstay_repository::{JournalWriter, Repository};
use mainstay_workloads::mariadb::{BinlogStream, FILE_START, Login, Place};

use super::backup::connect;
use super::{Files, stream};
use crate::follow::{Closing, follow};

/// Whose log is followed, and how.
#[derive(Clone, Debug)]
pub struct FollowServer {
    pub workload: WorkloadRef,
    pub closing: Closing,
}

/// Follows the binary log of a server until the run is cancelled.
///
/// Errors: those of the server and of the journal. [`Code::Conflict`] when somebody else follows it already.
pub fn follow_server(
    repository: &Repository,
    login: &Login,
    request: &FollowServer,
    clock: &Arc<dyn Clock>,
    progress: &dyn Progress,
) -> Result<()> {
    let mut anew = false;
    loop {
        let (mut log, mut journal) = start(repository, login, request, clock, anew)?;
        let began = journal.end().cloned();
        match follow(&mut log, &mut journal, request.closing, &**clock, progress) {
            // The server says only now that it does not have what comes next.
            Err(error) if error.code() == Code::NotFound && !anew && journal.end() == began.as_ref() => {
                anew = true;
            }
            ended => return ended,
        }
    }
}

/// Starts where the journal ends, or with the oldest file that the server still has and that somebody may need.
fn start(
    repository: &Repository,
    login: &Login,
    request: &FollowServer,
    clock: &Arc<dyn Clock>,
    anew: bool,
) -> Result<(BinlogStream, JournalWriter)> {
    let mut connection = connect(login)?;
    let files = Files::of(&mut connection)?;
    let mut journal = repository.append_journal(stream(&request.workload, &files.base))?;
    let end = journal
        .end()
        .map(|end| Place::from_position(end).ok_or_else(|| Error::integrity("a journal of another kind")));
    let end = end.transpose()?;
    let whole = |epoch, file| Place { epoch, file, offset: FILE_START.len() as u64 };
    let epoch = files.epoch(end);
    let from = match end {
        None => whole(0, oldest(repository, &request.workload, &files)?),
        Some(end) if anew || epoch > end.epoch => {
            journal.skip("the server was told to forget its logs, or lost the end of them")?;
            whole(end.epoch + 1, files.first)
        }
        Some(end) if files.first > end.file => {
            journal.skip("the server had deleted that part of its log before it was read")?;
            whole(epoch, files.first)
        }
        Some(end) => end,
    };
    // By this number we are known among the server's replicas.
    let [a, b, c, d, ..] = request.workload.id.0;
    let number = u32::from_be_bytes([a | 0x40, b, c, d]);
    let log = BinlogStream::start(connection, &files.base, from, number, Arc::clone(clock))?;
    Ok((log, journal))
}

/// The file in which the newest point was, if the server still has it; else the newest one.
fn oldest(repository: &Repository, workload: &WorkloadRef, files: &Files) -> Result<u32> {
    let points = repository.points()?;
    let mut points = points.iter().rev().filter(|point| point.workload.id == workload.id);
    let file = points.find_map(|point| Place::from_position(&point.position)).map(|place| place.file);
    Ok(file.filter(|file| (files.first..=files.last).contains(file)).unwrap_or(files.last))
}
