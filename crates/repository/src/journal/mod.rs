//! Journals: every change of a workload's log, beside the points. A stream is a row of numbered objects, each created if
//! absent and naming the one before it, so that what is missing is known to be missing.
//!
//! [`JournalWriter`] gathers changes and makes them durable together; [`Journal`] tells which stretches can be recovered
//! from and hands the changes back, bit for bit.

mod object;
mod read;
mod write;

use std::collections::BTreeMap;

use mainstay_core::{BlobStore, Code, Error, Position, Progress, Result, StreamRef};

pub use object::StreamId;
pub use read::{Hole, Journal, Stretch};
pub use write::JournalWriter;

use crate::keys::Powers;
use crate::log::record::Change as Entry;
use crate::names;
use crate::repository::Repository;
use crate::shared::Shared;
use crate::verify::VerifyReport;
use object::{PREFIX_BYTES, Stored};

/// Headers are short; most come with the first read.
const FIRST_READ_BYTES: u64 = 4096;

impl Repository {
    /// Every journal of the repository that this key may know of.
    pub fn journals(&self) -> Result<Vec<Journal>> {
        self.refresh()?;
        let mut streams: BTreeMap<StreamId, Vec<u64>> = BTreeMap::new();
        self.shared.store.list(names::JOURNALS, &mut |listed| {
            if let Some((stream, number)) = names::journal_object(&listed.name) {
                streams.entry(StreamId(stream)).or_default().push(number);
            }
            Ok(())
        })?;
        let mut journals = Vec::new();
        for (id, numbers) in streams {
            journals.extend(Journal::open(&self.shared, id, numbers)?);
        }
        Ok(journals)
    }

    /// One of them; `None` when nothing of it can be read.
    pub fn journal(&self, stream: &StreamRef) -> Result<Option<Journal>> {
        self.refresh()?;
        let id = StreamId::of(self.shared.domain()?, stream);
        let numbers = self.journal_numbers(id)?;
        Journal::open(&self.shared, id, numbers)
    }

    fn journal_numbers(&self, id: StreamId) -> Result<Vec<u64>> {
        let mut numbers = Vec::new();
        self.shared.store.list(&names::journals(&id.0), &mut |listed| {
            numbers.extend(names::journal_object(&listed.name).map(|(_, number)| number));
            Ok(())
        })?;
        numbers.sort_unstable();
        Ok(numbers)
    }

    pub(crate) fn verify_journals(
        &self,
        read_data: bool,
        report: &mut VerifyReport,
        progress: &dyn Progress,
    ) -> Result<()> {
        for journal in self.journals()? {
            let of = format!("journal {} of {}", journal.stream().name, journal.stream().workload.name);
            let damage = if read_data { journal.verify(progress)? } else { journal.damaged() };
            let holes = journal.holes().into_iter().map(|hole| format!("a hole: {}", hole.why));
            report.problems.extend(damage.into_iter().chain(holes).map(|what| format!("{of}: {what}")));
        }
        Ok(())
    }

    /// Gives up what a journal holds before the object `below`: the collector frees it. Needs the power to expire.
    pub fn trim_journal(&self, journal: &Journal, before: &Position) -> Result<()> {
        let below = journal.number_at(before);
        if below <= self.shared.state().trimmed(&journal.id().0) {
            return Ok(());
        }
        self.append(Powers::EXPIRE, &mut |_| Ok(Entry::Trim { stream: journal.id().0, below }))
    }
}

/// Reads and checks the header of an object; `None` when there is nothing under its name.
fn read_header(shared: &Shared, stream: StreamId, number: u64) -> Result<Option<Stored>> {
    let name = names::journal(&stream.0, number);
    let store: &dyn BlobStore = shared.store.as_ref();
    let size = match store.size(&name) {
        Err(error) if error.code() == Code::NotFound => return Ok(None),
        size => size?,
    };
    let mut bytes = store.get(&name, 0..size.min(FIRST_READ_BYTES))?;
    let length = Stored::header_length(bytes.get(..PREFIX_BYTES).unwrap_or_default())? as u64;
    if length > bytes.len() as u64 {
        bytes = store.get(&name, 0..length)?;
    }
    let stored = Stored::decode(shared.family(), &bytes, |writer| {
        shared
            .state()
            .writer(writer)
            .filter(|entry| entry.powers.contains(Powers::WRITE))
            .map(|entry| entry.key)
    })?;
    if (stored.header.stream, stored.header.number) != (stream, number) {
        return Err(Error::integrity(format!("{name} is another journal object")));
    }
    if stored.length() != size {
        return Err(Error::integrity(format!("{name} is cut short")));
    }
    Ok(Some(stored))
}

/// Whether every byte of an object is there.
fn is_whole(shared: &Shared, stored: &Stored) -> Result<bool> {
    match read_body(shared, stored).and_then(|body| stored.check_body(&body)) {
        Err(error) if matches!(error.code(), Code::Integrity | Code::NotFound) => Ok(false),
        checked => checked.map(|()| true),
    }
}

/// The segments of an object, as they are stored.
fn read_body(shared: &Shared, stored: &Stored) -> Result<Vec<u8>> {
    let name = names::journal(&stored.header.stream.0, stored.header.number);
    shared.store.get(&name, stored.body_at..stored.length())
}
