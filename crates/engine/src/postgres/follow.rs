//! The log of a cluster into its journal, for as long as it is asked for.

use std::sync::Arc;

use mainstay_core::{Change, ChangeStream, Clock, Code, Error, Position, Progress, Result, WorkloadRef};
use mainstay_repository::{JournalWriter, Repository};
use mainstay_workloads::postgres::{Lsn, WalRequest, WalStream};

use super::backup::Dial;
use super::stream;
use crate::follow::{Closing, follow};

/// Whose log is followed, and how.
#[derive(Clone, Debug)]
pub struct FollowCluster {
    pub workload: WorkloadRef,
    /// The slot that keeps the log at the server until it is durable here; one that ends with the connection when `None`.
    pub slot: Option<String>,
    pub closing: Closing,
}

/// A log and the journal it goes to, at the same place.
pub(super) struct Followed {
    pub(super) stream: WalStream,
    pub(super) journal: JournalWriter,
}

/// Follows the log of a cluster until the run is cancelled. At the end of a timeline it goes on with the next.
///
/// Errors: those of the server and of the journal. [`Code::Conflict`] when somebody else follows it already.
pub fn follow_cluster(
    repository: &Repository,
    dial: &Dial<'_>,
    request: &FollowCluster,
    clock: &Arc<dyn Clock>,
    progress: &dyn Progress,
) -> Result<()> {
    loop {
        let mut followed = connect(repository, dial, request, clock)?;
        let mut until = UntilSwitch { stream: &mut followed.stream };
        match follow(&mut until, &mut followed.journal, request.closing, &**clock, progress) {
            Err(error) if followed.stream.switch().is_some() && error.code() == Code::Cancelled => {
                followed.journal.close()?;
            }
            ended => return ended,
        }
    }
}

/// Ends the loop, with everything gathered still to be closed, when a timeline ends.
struct UntilSwitch<'a> {
    stream: &'a mut WalStream,
}

impl ChangeStream for UntilSwitch<'_> {
    fn next(&mut self) -> Result<Option<Change>> {
        let next = self.stream.next()?;
        match self.stream.switch() {
            Some(_) => Err(Error::new(Code::Cancelled, "the timeline has ended")),
            None => Ok(next),
        }
    }

    fn acknowledge(&mut self, durable: &Position) -> Result<()> {
        self.stream.acknowledge(durable)
    }
}

/// Starts where the journal ends; a new journal starts with the segment that is being written.
pub(super) fn connect(
    repository: &Repository,
    dial: &Dial<'_>,
    request: &FollowCluster,
    clock: &Arc<dyn Clock>,
) -> Result<Followed> {
    let mut connection = dial(true)?;
    let slot = match &request.slot {
        Some(name) => {
            WalStream::create_slot(&mut connection, name)?;
            name.clone()
        }
        None => WalStream::temporary_slot(&mut connection)?,
    };
    let identity = WalStream::identify(&mut connection)?;
    let mut journal =
        repository.append_journal(stream(&request.workload, &identity.system, identity.timeline))?;
    let begin = identity.flushed.segment_start(identity.segment_bytes);
    let from = match journal.end() {
        Some(end) => Lsn::from_position(end).ok_or_else(|| Error::integrity("a journal of another kind"))?,
        None => begin,
    };
    let start = |connection, slot: &str, from| {
        let wal = WalRequest { slot: Some(slot.to_owned()), timeline: identity.timeline, from };
        WalStream::start(connection, &wal, Arc::clone(clock))
    };
    let mut stream = start(connection, &slot, from)?;
    if from >= begin || first(&mut stream, &mut journal)? {
        return Ok(Followed { stream, journal });
    }
    // The server did not keep what the journal lacks. That is a hole, and not the end.
    journal.skip("the server had deleted that part of its log before it was read")?;
    drop(stream);
    let mut connection = dial(true)?;
    let slot = match &request.slot {
        Some(name) => name.clone(),
        None => WalStream::temporary_slot(&mut connection)?,
    };
    Ok(Followed { stream: start(connection, &slot, begin)?, journal })
}

/// Takes the first change of a log that goes on behind where it is started. `false` when the server no longer has it, which
/// it says only once it is asked to send.
fn first(stream: &mut WalStream, journal: &mut JournalWriter) -> Result<bool> {
    loop {
        match stream.next() {
            Ok(Some(change)) => return journal.append(&change).map(|()| true),
            Ok(None) if stream.switch().is_some() => return Ok(true),
            Ok(None) => {}
            Err(error) if error.code() == Code::NotFound => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}
