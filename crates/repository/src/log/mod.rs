//! The commit log: the one order of everything that happens to a repository.
//!
//! Record `n` is the blob `log/<n>`, created only if absent: of two writers that want the same number one wins,
//! and the loser reads what the winner wrote before it decides again. There is no other lock, and no clock is
//! asked. `docs/concurrency.md` says who may run beside whom.

pub(crate) mod record;
pub(crate) mod state;

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{BlobStore, Clock, Code, Error, Id16, Put, Result};

use crate::keys::FamilyId;
use crate::names;
use crate::sign::{SigningKey, VerifyingKey};
use record::{Change, Record};
use state::State;

/// Somebody else always being faster this often in a row means that something is wrong.
const ATTEMPTS_MAX: u32 = 1000;

pub(crate) struct Log {
    pub(crate) store: Arc<dyn BlobStore>,
    pub(crate) family: FamilyId,
    pub(crate) root: VerifyingKey,
    pub(crate) clock: Arc<dyn Clock>,
}

enum Found {
    Record(Box<Record>, [u8; 32]),
    /// The number is taken by bytes that nobody with the power to write them wrote.
    Void,
    Absent,
}

impl Log {
    /// Applies every record that `state` has not seen. Returns how many.
    pub(crate) fn read(&self, state: &mut State) -> Result<u64> {
        let before = state.next_sequence();
        loop {
            let sequence = state.next_sequence();
            match self.find(sequence, state)? {
                Found::Absent => return Ok(sequence - before),
                Found::Void => state.skip_void(),
                Found::Record(record, hash) => state.apply(*record, hash),
            }
        }
    }

    fn find(&self, sequence: u64, state: &State) -> Result<Found> {
        let name = names::log_record(sequence);
        let mut found = Found::Absent;
        let mut too_new = None;
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
            match Record::decode(&self.family, sequence, &bytes, |writer, change| {
                state.signer_of(&self.root, writer, change)
            }) {
                Ok(record) => return Ok(Found::Record(Box::new(record), *blake3::hash(&bytes).as_bytes())),
                // Rot can look like that, so the copy is asked first.
                Err(error) if error.code() == Code::TooNew => too_new = Some(error),
                Err(_void) => found = Found::Void,
            }
        }
        too_new.map_or(Ok(found), Err)
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
            let change = decide(state)?;
            let record = Record {
                sequence: state.next_sequence(),
                previous: state.head_hash(),
                commit: random_id()?,
                writer: signer.verifying_key().writer_id(),
                time: self.clock.now(),
                change,
            };
            let bytes = record.encode(&self.family, signer)?;
            if self.put(record.sequence, &bytes)? {
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

    /// Whether the number was free and is now ours, durably.
    fn put(&self, sequence: u64, bytes: &[u8]) -> Result<bool> {
        let name = names::log_record(sequence);
        let copy = names::copy_of(&name);
        // A record whose first copy was lost still holds its number.
        match self.store.size(&copy) {
            Err(error) if error.code() == Code::NotFound => {}
            Ok(_) => return Ok(false),
            Err(error) => return Err(error),
        }
        match self.put_with_reserve(&name, bytes) {
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
        let _insurance = self.put_with_reserve(&copy, bytes);
        self.store.flush()?;
        Ok(true)
    }

    fn is_ours(&self, name: &str, bytes: &[u8]) -> bool {
        self.store.get_whole(name, record::RECORD_BYTES_MAX).is_ok_and(|stored| stored == bytes)
    }

    /// Records are small and decide everything: on a full medium they may use what was set aside.
    fn put_with_reserve(&self, name: &str, bytes: &[u8]) -> Result<Put> {
        match self.store.put_new(name, &[bytes]) {
            Err(error) if error.code() == Code::Full && self.store.release_reserve()? => {
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
