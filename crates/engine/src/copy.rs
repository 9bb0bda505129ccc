//! The one loop.

use mainstay_core::{Event, Next, Phase, Progress, Result, Source, Target};

/// Copies everything that `source` yields into `target`. Backup, restore, replication and verification are calls
/// of this function; nothing else moves recovery data.
///
/// When it returns an error, dropping the two ends has undone what they staged: the source keeps its position,
/// the target its former state. Only an error of releasing the source, which says so, leaves the target as it is then.
pub fn copy<S: Source + ?Sized, T: Target + ?Sized>(
    mut source: Box<S>,
    mut target: Box<T>,
    progress: &dyn Progress,
) -> Result<T::Done> {
    loop {
        progress.check()?;
        match source.next()? {
            Next::Item(item) => {
                progress.event(&Event::Item(&item.path));
                target.put(*item)?;
            }
            Next::Skipped(skip) => {
                progress.event(&Event::Skipped(&skip));
                target.skip(skip)?;
            }
            Next::End => break,
        }
    }
    progress.event(&Event::Phase(Phase::Finishing));
    let captured = source.seal()?;
    progress.check()?;
    let (receipt, done) = target.finish(&captured)?;
    source
        .commit(&receipt)
        .map_err(|error| error.during("everything is stored, but the source could not be released"))?;
    Ok(done)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex};

    use mainstay_core::{
        Body, Captured, Code, Consistency, Counts, Error, Event, Item, ItemPath, Kind, Metadata, Next,
        Position, Progress, Receipt, Result, Silent, Skip, SkipReason, Source, Stamp, Target, Time,
    };

    use super::copy;

    type Trace = Arc<Mutex<Vec<String>>>;

    fn say(trace: &Trace, word: impl Into<String>) {
        trace.lock().unwrap().push(word.into());
    }

    struct Three(u8, Trace);

    impl Source for Three {
        fn next(&mut self) -> Result<Next> {
            self.0 += 1;
            let path = ItemPath::new(format!("item{}", self.0)).unwrap();
            Ok(match self.0 {
                2 => Next::Skipped(Skip { path, reason: SkipReason::Unreadable, detail: "denied".into() }),
                1 | 3 => Next::Item(Box::new(Item {
                    path,
                    metadata: Metadata::new(Kind::Directory),
                    stamp: Stamp::default(),
                    body: Body::None,
                })),
                _ => Next::End,
            })
        }

        fn seal(&mut self) -> Result<Captured> {
            say(&self.1, "seal");
            Ok(Captured {
                position: Position::default(),
                consistency: Consistency::Fuzzy,
                moment: Time::default(),
            })
        }

        fn commit(self: Box<Self>, _receipt: &Receipt) -> Result<()> {
            say(&self.1, "commit");
            Ok(())
        }
    }

    struct Log(Trace, bool);

    impl Target for Log {
        type Done = u8;

        fn put(&mut self, item: Item) -> Result<()> {
            say(&self.0, format!("put {}", item.path));
            Ok(())
        }

        fn skip(&mut self, skip: Skip) -> Result<()> {
            say(&self.0, format!("skip {}", skip.path));
            Ok(())
        }

        fn finish(self: Box<Self>, _captured: &Captured) -> Result<(Receipt, u8)> {
            say(&self.0, "finish");
            if self.1 {
                return Err(Error::new(Code::Full, "the medium is full"));
            }
            Ok((Receipt { point: None, counts: Counts::default() }, 7))
        }
    }

    #[test]
    fn the_source_is_committed_only_after_the_target_finished() {
        let trace = Trace::default();
        let (source, target) = (Box::new(Three(0, trace.clone())), Box::new(Log(trace.clone(), false)));
        assert_eq!(copy(source, target, &Silent).unwrap(), 7);
        assert_eq!(
            *trace.lock().unwrap(),
            ["put item1", "skip item2", "put item3", "seal", "finish", "commit"]
        );
    }

    #[test]
    fn a_failed_finish_is_never_committed() {
        let trace = Trace::default();
        let (source, target) = (Box::new(Three(0, trace.clone())), Box::new(Log(trace.clone(), true)));
        assert_eq!(copy(source, target, &Silent).unwrap_err().code(), Code::Full);
        assert!(!trace.lock().unwrap().contains(&"commit".to_owned()));
    }

    /// Cancels after it was asked a number of times.
    struct Impatient(AtomicUsize);

    impl Progress for Impatient {
        fn event(&self, _event: &Event<'_>) {}

        fn cancelled(&self) -> bool {
            self.0.fetch_sub(1, Ordering::Relaxed) == 0
        }
    }

    #[test]
    fn cancelling_at_any_poll_finishes_nothing() {
        for polls in 0..5 {
            let trace = Trace::default();
            let (source, target) = (Box::new(Three(0, trace.clone())), Box::new(Log(trace.clone(), false)));
            let error = copy(source, target, &Impatient(AtomicUsize::new(polls))).unwrap_err();
            assert_eq!(error.code(), Code::Cancelled, "after {polls} polls");
            assert!(!trace.lock().unwrap().contains(&"finish".to_owned()), "after {polls} polls");
        }
    }
}
