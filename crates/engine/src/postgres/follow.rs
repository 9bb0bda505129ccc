//! The log of a cluster into its journal, for as long as it is asked for.

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{
    Change, ChangeStream, Clock, Code, Error, Event, Position, Progress, Result, WorkloadRef,
};
use mainstay_repository::{JournalWriter, Repository};
use mainstay_workloads::postgres::{Connection, History, Identity, Lsn, Slot, WalRequest, WalStream};

use super::backup::Dial;
use super::{history, same, stream};
use crate::follow::{Closing, follow};

/// A server that has gone is asked again so often.
const AGAIN: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(100);
const NOTICED_WITHIN: Duration = Duration::from_secs(2);

/// Whose log is followed, and how.
#[derive(Clone, Debug)]
pub struct FollowCluster {
    pub workload: WorkloadRef,
    /// The slot that keeps the log at the server until it is durable here; one that ends with the connection when `None`.
    pub slot: Option<String>,
    /// The slot is given up, and with it what it keeps, when that is more bytes than this.
    pub max_lag: Option<u64>,
    pub closing: Closing,
}

/// A log and the journal it goes to, at the same place.
pub(super) struct Followed {
    pub(super) stream: WalStream,
    pub(super) journal: JournalWriter,
    /// Whether nothing follows on another timeline.
    pub(super) is_newest: bool,
    /// What a person should know.
    pub(super) note: Option<String>,
}

/// Follows the log of a cluster until the run is cancelled: over the ends of timelines, and, once it has been followed at
/// all, over restarts of the server.
///
/// Errors: those of the server and of the journal. [`Code::Conflict`] when somebody else follows it already;
/// [`Code::AlreadyExists`] when the journal has another log of this cluster.
pub fn follow_cluster(
    repository: &Repository,
    dial: &Dial<'_>,
    request: &FollowCluster,
    clock: &Arc<dyn Clock>,
    progress: &dyn Progress,
) -> Result<()> {
    let mut followed_once = false;
    loop {
        let ended = connect(repository, dial, request, clock).and_then(|mut followed| {
            followed_once = true;
            followed.note.iter().for_each(|note| progress.event(&Event::Note(note)));
            run_on(&mut followed, request, clock, progress)
        });
        match ended {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            // Of two that write one journal, as a backup and its follower do, one has to begin anew.
            Err(error)
                if followed_once && matches!(error.code(), Code::Io | Code::NotFound | Code::Conflict) =>
            {
                let why = format!("{}; trying again", error.chain().join(": "));
                progress.event(&Event::Note(&why));
                if !wait(&**clock, progress) {
                    return Ok(());
                }
            }
            Err(error) => return Err(error),
        }
    }
}

fn wait(clock: &dyn Clock, progress: &dyn Progress) -> bool {
    let began = clock.monotonic();
    while clock.monotonic().saturating_sub(began) < AGAIN && !progress.cancelled() {
        clock.sleep(TICK);
    }
    !progress.cancelled()
}

/// Follows until the timeline ends or the slot has to be given up, and says so with `true`; `false` when cancelled.
pub(super) fn run_on(
    followed: &mut Followed,
    request: &FollowCluster,
    clock: &Arc<dyn Clock>,
    progress: &dyn Progress,
) -> Result<bool> {
    let mut until = UntilSwitch { stream: &mut followed.stream, max_lag: request.max_lag, goes_on: false };
    let ended = follow(&mut until, &mut followed.journal, request.closing, &**clock, progress);
    match ended {
        Err(error) if until.goes_on && error.code() == Code::Cancelled => {
            followed.journal.close()?;
            Ok(true)
        }
        ended => ended.map(|()| false),
    }
}

/// Ends the loop, with everything gathered still to be closed, when the log goes on elsewhere.
struct UntilSwitch<'a> {
    stream: &'a mut WalStream,
    max_lag: Option<u64>,
    goes_on: bool,
}

impl ChangeStream for UntilSwitch<'_> {
    fn next(&mut self) -> Result<Option<Change>> {
        let next = self.stream.next()?;
        let is_too_far = self.max_lag.is_some_and(|max| self.stream.behind() > max);
        if self.stream.switch().is_some() || is_too_far {
            self.goes_on = true;
            return Err(Error::new(Code::Cancelled, "the log goes on elsewhere"));
        }
        Ok(next)
    }

    fn acknowledge(&mut self, durable: &Position) -> Result<()> {
        self.stream.acknowledge(durable)
    }
}

/// Where the log is to be read from, and into what.
struct Start {
    /// In the history of the server.
    leg: usize,
    journal: JournalWriter,
    from: Lsn,
}

/// Starts where the journal ends: on the timeline that it is on, when that has not been read to its end. A new journal
/// starts with the segment in which its timeline begins, or, when there is none before, with the one being written.
pub(super) fn connect(
    repository: &Repository,
    dial: &Dial<'_>,
    request: &FollowCluster,
    clock: &Arc<dyn Clock>,
) -> Result<Followed> {
    let mut connection = dial(true)?;
    let identity = WalStream::identify(&mut connection)?;
    let history = history::keep(repository, &mut connection, &request.workload, &identity)?;
    let lost = hold(&mut connection, request, &identity)?;
    drop(connection);
    let legs: Vec<_> = history.legs().collect();
    let journal = |leg: usize| append(repository, request, &identity, &history, leg);
    let mut start = place(&identity, &legs, &journal)?;
    // Everything from here on the server has.
    let begin = identity.flushed.segment_start(identity.segment_bytes);
    let last = legs.len() - 1;
    loop {
        let timeline = legs.get(start.leg).map_or(identity.timeline, |(timeline, _)| *timeline);
        if start.leg == last && start.from > identity.flushed {
            check_reached(dial, start.from)?;
        }
        if start.journal.end() == Some(&start.from.position()) {
            let reference = stream(&request.workload, &identity.system, timeline);
            let at = (timeline, start.from);
            same::check(repository, dial, &reference, at, identity.segment_bytes, clock)?;
        }
        let mut stream = open(dial, request, timeline, start.from, clock)?;
        let is_newest = start.leg == last;
        let gave_up = lost.as_ref().is_some_and(|lost| lost.gave_up);
        if is_newest && start.from >= begin || !gave_up && first(&mut stream, &mut start.journal)? {
            return Ok(Followed { stream, journal: start.journal, is_newest, note: None });
        }
        drop(stream);
        if is_newest {
            // The server did not keep what the journal lacks. That is a hole, and not the end.
            let why = lost.map(|lost| lost.why);
            let gone = "the server had deleted that part of its log before it was read";
            start.journal.skip(why.as_deref().unwrap_or(gone))?;
            let stream = open(dial, request, timeline, begin, clock)?;
            let note = Some("a part of the log is lost; take a new point: mainstay db backup".to_owned());
            return Ok(Followed { stream, journal: start.journal, is_newest, note });
        }
        let (_, left) = legs.get(start.leg).copied().unwrap_or_default();
        let from = left.unwrap_or(begin).segment_start(identity.segment_bytes);
        start = Start { leg: start.leg + 1, journal: journal(start.leg + 1)?, from };
    }
}

fn place(
    identity: &Identity,
    legs: &[(u32, Option<Lsn>)],
    journal: &dyn Fn(usize) -> Result<JournalWriter>,
) -> Result<Start> {
    let mut newer = None;
    for (leg, (_, left)) in legs.iter().enumerate().rev() {
        let journal = journal(leg)?;
        let Some(end) = journal.end() else {
            newer = Some(journal);
            continue;
        };
        let from = Lsn::from_position(end).ok_or_else(|| Error::integrity("a journal of another kind"))?;
        return Ok(match (left, newer) {
            (Some(left), Some(journal)) if from >= *left => {
                let from = left.segment_start(identity.segment_bytes);
                Start { leg: leg + 1, journal, from }
            }
            _ => Start { leg, journal, from },
        });
    }
    let leg = legs.len() - 1;
    let from = identity.flushed.segment_start(identity.segment_bytes);
    Ok(Start { leg, journal: journal(leg)?, from })
}

/// The journal of a timeline, which says where it came from.
fn append(
    repository: &Repository,
    request: &FollowCluster,
    identity: &Identity,
    history: &History,
    leg: usize,
) -> Result<JournalWriter> {
    let legs: Vec<_> = history.legs().collect();
    let (timeline, _) = legs.get(leg).ok_or_else(|| Error::bug("a timeline beyond the last"))?;
    let mut reference = stream(&request.workload, &identity.system, *timeline);
    if let Some((parent, Some(left))) = leg.checked_sub(1).and_then(|leg| legs.get(leg)) {
        let parent = stream(&request.workload, &identity.system, *parent);
        reference.parent = Some((parent.name, left.position()));
    }
    repository.append_journal(reference)
}

/// Why the server may no longer have what the journal lacks.
struct Lost {
    why: String,
    /// It may have it, but is not to be asked for so much.
    gave_up: bool,
}

/// Makes sure of the slot, if there is to be one.
fn hold(connection: &mut Connection, request: &FollowCluster, identity: &Identity) -> Result<Option<Lost>> {
    let Some(name) = &request.slot else { return Ok(None) };
    let lost = match WalStream::slot(connection, name)? {
        Slot::Missing => {
            WalStream::create_slot(connection, name)?;
            let why =
                format!("the slot {name} was not there, and the server had deleted that part of its log");
            return Ok(Some(Lost { why, gave_up: false }));
        }
        Slot::Lost => {
            let why = format!(
                "the slot {name} kept more than the server's max_slot_wal_keep_size, and was given up"
            );
            Lost { why, gave_up: false }
        }
        Slot::Kept(from) => {
            let waits = identity.flushed.0.saturating_sub(from.0);
            if request.max_lag.is_none_or(|max| waits <= max) {
                return Ok(None);
            }
            let why = format!(
                "the slot {name} kept {} MiB, more than --max-slot-lag, and was given up",
                waits >> 20
            );
            Lost { why, gave_up: true }
        }
    };
    WalStream::drop_slot(connection, name)?;
    WalStream::create_slot(connection, name)?;
    Ok(Some(lost))
}

fn open(
    dial: &Dial<'_>,
    request: &FollowCluster,
    timeline: u32,
    from: Lsn,
    clock: &Arc<dyn Clock>,
) -> Result<WalStream> {
    let began = clock.monotonic();
    loop {
        let mut connection = dial(true)?;
        let slot = match &request.slot {
            Some(name) => name.clone(),
            None => WalStream::temporary_slot(&mut connection)?,
        };
        let wal = WalRequest { slot: Some(slot), timeline, from };
        match WalStream::start(connection, &wal, Arc::clone(clock)) {
            // The server may not have noticed yet that whoever followed before has gone.
            Err(error)
                if error.code() == Code::Conflict
                    && clock.monotonic().saturating_sub(began) < NOTICED_WITHIN =>
            {
                clock.sleep(TICK);
            }
            started => return started,
        }
    }
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

/// Errors: [`Code::Conflict`] when a standby has not come so far yet; [`Code::AlreadyExists`] for a primary, which lost what
/// it once had.
fn check_reached(dial: &Dial<'_>, from: Lsn) -> Result<()> {
    // Since it was asked it may have gone on, and somebody else have stored that.
    let mut connection = dial(true)?;
    let flushed = WalStream::identify(&mut connection)?.flushed;
    if from <= flushed {
        return Ok(());
    }
    let what = format!("the journal goes to {from}, and this server only to {flushed}");
    Err(if connection.value("SHOW in_hot_standby")? == "on" {
        Error::new(Code::Conflict, what).hint("a standby that lags will get there")
    } else {
        Error::new(Code::AlreadyExists, what).hint(
            "it was put back to an earlier state, or lost the end of its log; protect it under another name: --name",
        )
    })
}
