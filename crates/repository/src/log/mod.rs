//! The commit log: the one order of everything that happens to a repository.
//!
//! Record `n` is the blob `log/<n>`, created only if absent: of two writers that want the same number one wins,
//! and the loser reads what the winner wrote before it decides again. There is no other lock, and no clock is
//! asked. `docs/concurrency.md` says who may run beside whom.

pub(crate) mod record;
pub(crate) mod state;
pub(crate) mod text;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{BlobStore, Clock, Code, Error, Id16, Put, Result};

use crate::config::Duty;
use crate::keys::{FamilyId, Powers};
use crate::names;
use crate::sign::{SigningKey, VerifyingKey};
use record::{Change, Decoded, LogId, Record};
use state::State;

/// Somebody else always being faster this often in a row means that something is wrong.
const ATTEMPTS_MAX: u32 = 1000;
/// So many records in a row may be lost, and the later ones are still found.
const GAP_MAX: u64 = 1 << 12;
/// Stands under a number that was passed over.
const PASSED_OVER: &[u8] = b"this number was passed over";

pub(crate) struct Log {
    pub(crate) store: Arc<dyn BlobStore>,
    pub(crate) id: LogId,
    pub(crate) family: FamilyId,
    pub(crate) root: VerifyingKey,
    pub(crate) clock: Arc<dyn Clock>,
}

enum Found {
    Record(Decoded, [u8; 32]),
    /// The number is taken by bytes that are no record of anybody's.
    Void,
    Absent,
}

impl Log {
    /// Applies every record that `state` has not seen. Returns how many.
    pub(crate) fn read(&self, state: &mut State) -> Result<u64> {
        self.read_to(state, false)
    }

    /// As [`Log::read`], and does not take a lost record for the end of the log: costs a listing.
    pub(crate) fn read_past_gaps(&self, state: &mut State) -> Result<u64> {
        self.read_to(state, true)
    }

    fn read_to(&self, state: &mut State, past_gaps: bool) -> Result<u64> {
        let before = state.next_sequence();
        let mut later = None;
        loop {
            // Known before the next number is looked for: whoever wrote a later record had read that one, so it is not
            // about to come.
            let goes_on = later.is_some_and(|later| later > state.next_sequence());
            match self.find(state.next_sequence(), state)? {
                Found::Absent if goes_on => state.pass_absent(),
                Found::Absent => {
                    later = if past_gaps { self.later_record(state.next_sequence())? } else { None };
                    if later.is_none() {
                        break;
                    }
                }
                Found::Void => state.pass_void(),
                Found::Record(Decoded::Idle { previous }, hash) => state.pass_idle(previous, hash),
                Found::Record(Decoded::Effective(record), hash) => state.apply(*record, hash),
            }
        }
        state.features().require(Duty::Read)?;
        Ok(state.next_sequence() - before)
    }

    /// The number of the first record that is stored after number `next`, whoever signed it: the record that admitted its
    /// writer may be what is lost. Other bytes under later numbers do not show that the log went on.
    fn later_record(&self, next: u64) -> Result<Option<u64>> {
        let near = next.saturating_add(1)..=next.saturating_add(GAP_MAX);
        let mut taken = BTreeMap::new();
        for prefix in [names::LOG.to_owned(), names::copy_of(names::LOG)] {
            self.store.list(&prefix, &mut |listed| {
                if let Some(number) = names::log_sequence(&listed.name).filter(|number| near.contains(number))
                {
                    taken.entry(number).or_insert_with(Vec::new).push(listed.name);
                }
                Ok(())
            })?;
        }
        for (number, names) in taken {
            for name in names {
                match self.store.get_whole(&name, record::RECORD_BYTES_MAX) {
                    Ok(bytes) if Record::is_named(&self.id, number, &bytes) => return Ok(Some(number)),
                    Ok(_) => {}
                    Err(error) if matches!(error.code(), Code::NotFound | Code::Integrity) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(None)
    }

    fn find(&self, sequence: u64, state: &State) -> Result<Found> {
        let name = names::log_record(sequence);
        let mut found = Found::Absent;
        for name in [&name, &names::copy_of(&name)] {
            let bytes = match self.store.get_whole(name, record::RECORD_BYTES_MAX) {
                Ok(bytes) => bytes,
                Err(error) if error.code() == Code::NotFound => continue,
                Err(error) if error.code() == Code::Integrity => {
                    found = Found::Void;
                    continue;
                }
                Err(error) => return Err(error),
            };
            match self.decode(sequence, &bytes, state) {
                Ok(decoded) => return Ok(Found::Record(decoded, *blake3::hash(&bytes).as_bytes())),
                Err(_void) => found = Found::Void,
            }
        }
        Ok(found)
    }

    pub(crate) fn decode(&self, sequence: u64, bytes: &[u8], state: &State) -> Result<Decoded> {
        Record::decode(&self.id, sequence, bytes, |writer| state.signer(&self.root, writer))
    }

    /// Appends the change that `decide` makes of the newest state, and applies it. `decide` is asked again
    /// whenever somebody else got the number, so what it checked always holds at the record's place in the log.
    pub(crate) fn append(
        &self,
        state: &mut State,
        signer: &SigningKey,
        decide: &mut dyn FnMut(&State) -> Result<Change>,
    ) -> Result<u64> {
        if !self.store.capabilities().create_if_absent {
            let what = format!("{} cannot tell who was first to create a file", self.store.location());
            return Err(Error::new(Code::Unsupported, what)
                .hint("keep the repository on a file system with hard links or renaming without replacing"));
        }
        for attempt in 0..ATTEMPTS_MAX {
            self.read(state)?;
            self.close_gaps(state)?;
            let change = decide(state)?;
            state.features().require(change.duty())?;
            let writer = signer.verifying_key().writer_id();
            if !state.signer(&self.root, &writer).is_some_and(|signer| signer.may(&change)) {
                let what = format!("writer {writer} was not admitted to this repository, or was revoked");
                return Err(
                    Error::new(Code::NoPower, what).hint("ask the owner of the repository for a new key")
                );
            }
            let record = Record {
                sequence: state.next_sequence(),
                previous: state.head_hash(),
                commit: random_id()?,
                writer,
                time: self.clock.now(),
                change,
            };
            let bytes = record.encode(&self.id, signer)?;
            // What only adds must leave the reserve to what makes room.
            let frees = record.change.needs() != Some(Powers::WRITE);
            if self.put(record.sequence, &bytes, frees)? {
                let sequence = record.sequence;
                state.apply(record, *blake3::hash(&bytes).as_bytes());
                return Ok(sequence);
            }
            if attempt > 2 {
                self.clock.sleep(jitter(attempt)?);
            }
        }
        Err(Error::new(Code::Conflict, "other writers were always faster").hint("run the command again"))
    }

    /// Takes the numbers that were passed over though nobody had them, so that nobody who has not seen the later records
    /// goes on from there: there would be two logs.
    ///
    /// Errors: [`Code::Conflict`] when somebody was there first. Then `state` begins again.
    fn close_gaps(&self, state: &mut State) -> Result<()> {
        for number in state.open_numbers() {
            let name = names::log_record(*number);
            if self.store.put_new(&name, &[PASSED_OVER])? == Put::Exists && !self.is_ours(&name, PASSED_OVER)
            {
                let what = format!("record {number} of the log was lost and is there again");
                state.restart();
                self.read_past_gaps(state)?;
                return Err(Error::new(Code::Conflict, what).hint("run the command again"));
            }
        }
        state.close_numbers();
        Ok(())
    }

    /// Whether the number was free and is now ours, durably.
    fn put(&self, sequence: u64, bytes: &[u8], frees: bool) -> Result<bool> {
        let name = names::log_record(sequence);
        let copy = names::copy_of(&name);
        // A record whose first copy was lost still holds its number.
        match self.store.size(&copy) {
            Err(error) if error.code() == Code::NotFound => {}
            Ok(_) => return Ok(false),
            Err(error) => return Err(error),
        }
        match self.put_with_reserve(&name, bytes, frees) {
            Ok(Put::Created) => {}
            Ok(Put::Exists) => return Ok(self.is_ours(&name, bytes)),
            // The reply may have been lost, not the record.
            Err(error) => {
                if !self.is_ours(&name, bytes) {
                    return Err(error);
                }
            }
        }
        // The record stands from here on; its copy is insurance, and a full disk or a crash may deny it.
        let _insurance = self.put_with_reserve(&copy, bytes, frees);
        self.store.flush()?;
        Ok(true)
    }

    fn is_ours(&self, name: &str, bytes: &[u8]) -> bool {
        self.store.get_whole(name, record::RECORD_BYTES_MAX).is_ok_and(|stored| stored == bytes)
    }

    /// On a full medium a record that `frees` may use what was set aside.
    fn put_with_reserve(&self, name: &str, bytes: &[u8], frees: bool) -> Result<Put> {
        match self.store.put_new(name, &[bytes]) {
            Err(error) if frees && error.code() == Code::Full && self.store.release_reserve()? => {
                self.store.put_new(name, &[bytes])
            }
            outcome => outcome,
        }
    }
}

pub(crate) fn random_id() -> Result<Id16> {
    let mut id = [0; 16];
    getrandom::fill(&mut id)
        .map_err(|error| Error::new(Code::Io, "cannot get random bytes").because(error))?;
    Ok(Id16(id))
}

fn jitter(attempt: u32) -> Result<Duration> {
    let random = u64::from(random_id()?.0[0]);
    Ok(Duration::from_millis(random * u64::from(attempt.min(20)) / 16))
}

#[cfg(test)]
mod tests;
