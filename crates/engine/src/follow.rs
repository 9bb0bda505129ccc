//! Continuous protection: a workload's log goes into the journal as it grows, and the workload is told what is safe.

use std::time::Duration;

use mainstay_core::{ChangeStream, Clock, Progress, Result};
use mainstay_repository::JournalWriter;

/// When what was gathered is made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Closing {
    /// After so many bytes.
    pub bytes: u64,
    /// And so long after the first of them at the latest: what can be lost with this machine.
    pub after: Duration,
}

impl Default for Closing {
    fn default() -> Self {
        Self { bytes: 4 << 20, after: Duration::from_secs(1) }
    }
}

/// Follows a stream until the run is cancelled, which is how it ends well: what was gathered is durable then.
///
/// Errors: those of the stream and of the journal; what was not acknowledged by then the workload sends again.
pub fn follow(
    stream: &mut dyn ChangeStream,
    journal: &mut JournalWriter,
    closing: Closing,
    clock: &dyn Clock,
    progress: &dyn Progress,
) -> Result<()> {
    // Something may have been gathered before.
    let mut since = (journal.gathered() > 0).then(|| clock.monotonic());
    loop {
        let change = if progress.cancelled() { None } else { stream.next()? };
        if let Some(change) = &change {
            journal.append(change)?;
            since.get_or_insert_with(|| clock.monotonic());
        }
        let is_due = since.is_some_and(|since| clock.monotonic().saturating_sub(since) >= closing.after);
        if is_due || journal.gathered() >= closing.bytes || progress.cancelled() {
            if let Some(durable) = journal.close()? {
                stream.acknowledge(durable)?;
            }
            since = None;
        }
        if progress.cancelled() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use mainstay_core::{
        Change, ChangeStream, Code, Error, Event, Id16, Position, Progress, Result, StreamRef, Time,
        WorkloadKind, WorkloadRef,
    };
    use mainstay_repository::keys::KeyRing;
    use mainstay_repository::{Options, Repository, Tuning};
    use mainstay_testkit::{MemoryStore, ScriptedClock};

    use super::{Closing, follow};

    /// Yields changes of ten bytes and an empty turn after every third; counts what it is told.
    struct Numbers {
        next: u64,
        turns: Arc<AtomicUsize>,
        acknowledged: Vec<Position>,
        fails_at: u64,
    }

    fn at(number: u64) -> Position {
        Position(number.to_be_bytes().to_vec())
    }

    impl ChangeStream for Numbers {
        fn next(&mut self) -> Result<Option<Change>> {
            let turn = self.turns.fetch_add(1, Ordering::Relaxed);
            if self.next == self.fails_at {
                return Err(Error::new(Code::Io, "the connection is gone"));
            }
            if turn % 4 == 3 {
                return Ok(None);
            }
            let start = self.next;
            self.next += 1;
            Ok(Some(Change { start: at(start), end: at(start + 1), time: None, bytes: vec![7; 10] }))
        }

        fn acknowledge(&mut self, durable: &Position) -> Result<()> {
            self.acknowledged.push(durable.clone());
            Ok(())
        }
    }

    /// Asks to stop after so many turns.
    struct Until(Arc<AtomicUsize>, usize);

    impl Progress for Until {
        fn event(&self, _: &Event<'_>) {}

        fn cancelled(&self) -> bool {
            self.0.load(Ordering::Relaxed) >= self.1
        }
    }

    fn run(fails_at: u64) -> (Result<()>, Vec<Position>, Position) {
        let clock = ScriptedClock::at(Time::from_seconds(1_800_000_000));
        let options = Options { clock: Arc::new(clock.clone()), state: None, tuning: Tuning::default() };
        let store = Arc::new(MemoryStore::new());
        let repository = Repository::create(store, KeyRing::create().unwrap(), &[], &options).unwrap();
        let workload =
            WorkloadRef { id: Id16([1; 16]), kind: WorkloadKind("test".into()), name: "numbers".into() };
        let mut journal =
            repository.append_journal(StreamRef { workload, name: "log".into(), parent: None }).unwrap();
        let turns = Arc::new(AtomicUsize::new(0));
        let mut stream = Numbers { next: 0, turns: Arc::clone(&turns), acknowledged: Vec::new(), fails_at };
        let closing = Closing { bytes: 50, ..Closing::default() };
        let result = follow(&mut stream, &mut journal, closing, &clock, &Until(turns, 16));
        let stored = repository.journals().unwrap()[0].stretches()[0].end.clone();
        (result, stream.acknowledged, stored)
    }

    #[test]
    fn what_is_acknowledged_is_stored_and_a_stop_stores_the_rest() {
        let (result, acknowledged, stored) = run(u64::MAX);
        result.unwrap();
        assert_eq!(acknowledged, [at(5), at(10), at(12)], "sixteen turns, four of them empty");
        assert_eq!(stored, at(12));
    }

    #[test]
    fn what_was_only_gathered_is_not_acknowledged() {
        let (result, acknowledged, stored) = run(8);
        assert_eq!(result.unwrap_err().code(), Code::Io);
        assert_eq!((acknowledged, stored), (vec![at(5)], at(5)));
    }
}
