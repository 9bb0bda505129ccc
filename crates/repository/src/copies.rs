//! Checks what is stored more than once: one damaged copy loses nothing, and must be known before the other goes.

use std::collections::BTreeSet;

use mainstay_core::{Code, Error, Id16, Result};

use crate::config::Config;
use crate::index::RUN_BYTES_MAX;
use crate::keys::slot;
use crate::log::record::RECORD_BYTES_MAX;
use crate::names;
use crate::repository::{Repository, SLOT_BYTES_MAX};
use crate::verify::VerifyReport;

impl Repository {
    /// Configuration, key slots, log, points and index runs.
    pub(crate) fn verify_copies(&self, report: &mut VerifyReport) -> Result<()> {
        let store = self.shared.store.as_ref();
        report.degraded.extend(Config::damaged_copies(store, &self.family()));
        self.verify_slots(report)?;
        self.verify_records(report);
        let state = self.shared.state().clone();
        let mut points: Vec<_> = state.all_points().collect();
        points.sort_unstable_by_key(|point| point.sequence);
        for point in points {
            let (entry, name) = (&point.entry, names::point(&point.entry.id));
            // The collector frees what expired.
            let is_gone = |name: &str| store.size(name).is_err_and(|error| error.code() == Code::NotFound);
            if point.expired && (is_gone(&name) || is_gone(&names::copy_of(&name))) {
                continue;
            }
            both(report, &name, |name| self.points.read_copy(name, &entry.id, &entry.hash).map(drop));
        }
        for run in state.runs() {
            let name = names::index_run(&run.id);
            let whole = store.get_whole(&name, RUN_BYTES_MAX).and_then(|bytes| match blake3::hash(&bytes) {
                hash if *hash.as_bytes() == run.hash => Ok(()),
                _ => Err(Error::integrity("it is not the one that was committed")),
            });
            if let Err(error) = whole {
                // Its chunks are stored once more when they are met again.
                report.degraded.push(line(&name, &error));
            }
        }
        Ok(())
    }

    fn verify_slots(&self, report: &mut VerifyReport) -> Result<()> {
        let store = self.shared.store.as_ref();
        let mut slots = BTreeSet::new();
        for prefix in [names::KEYS.to_owned(), names::copy_of(names::KEYS)] {
            store.list(&prefix, &mut |listed| {
                slots.extend(listed.name.rsplit('/').next().and_then(|id| id.parse::<Id16>().ok()));
                Ok(())
            })?;
        }
        for id in slots {
            both(report, &names::key_slot(&id), |name| {
                let header = slot::read_header(&store.get_whole(name, SLOT_BYTES_MAX)?)?;
                if (header.slot, header.family) == (id, self.family().prefix()) {
                    Ok(())
                } else {
                    Err(Error::integrity("it is another key slot"))
                }
            });
        }
        Ok(())
    }

    /// A number that holds nothing valid was found when the log was read.
    fn verify_records(&self, report: &mut VerifyReport) {
        let state = self.shared.state().clone();
        for sequence in (0..state.next_sequence()).filter(|sequence| !state.voids().contains(sequence)) {
            let Some(hash) = state.head_hash_at(sequence + 1) else { continue };
            both(report, &names::log_record(sequence), |name| {
                let bytes = self.shared.store.get_whole(name, RECORD_BYTES_MAX)?;
                if *blake3::hash(&bytes).as_bytes() == hash {
                    Ok(())
                } else {
                    Err(Error::integrity("it is not what it was"))
                }
            });
        }
    }
}

fn line(name: &str, error: &Error) -> String {
    format!("{name}: {}", error.chain().join(": "))
}

/// Checks both copies of an object.
fn both(report: &mut VerifyReport, name: &str, check: impl Fn(&str) -> Result<()>) {
    let copy = names::copy_of(name);
    match (check(name), check(&copy)) {
        (Ok(()), Ok(())) => {}
        (Err(error), Ok(())) => report.degraded.push(line(name, &error)),
        (Ok(()), Err(error)) => report.degraded.push(line(&copy, &error)),
        (Err(error), Err(_)) => report.problems.push(format!("both copies of {}", line(name, &error))),
    }
}
