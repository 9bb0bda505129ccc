//! Appends to a journal.

use std::sync::Arc;

use mainstay_core::{Change, Code, Error, Position, Put, Result, StreamRef, Time};

use super::object::{Head, Header, Session, Stored, StreamId, put_change, seal_object};
use super::{is_whole, read_header};
use crate::format::segment::{Compression, SEGMENT_BYTES, Sealer};
use crate::keys::Powers;
use crate::names;
use crate::repository::Repository;
use crate::shared::Shared;

/// An object is closed at the latest when it holds so much.
const CONTENT_BYTES_MAX: u64 = 32 << 20;
/// The longest position or name of a stream, in bytes.
const NAME_BYTES_MAX: usize = 1024;

/// Gathers changes of one stream; [`JournalWriter::close`] makes them durable. What was not closed is gone with the
/// writer: whoever feeds it has not been told that it is safe.
///
/// Of two writers of one stream the slower is refused with [`Code::Conflict`] when it closes: nothing is written twice or
/// out of order.
pub struct JournalWriter {
    shared: Arc<Shared>,
    session: Session,
    sealer: Sealer,
    stream: StreamRef,
    id: StreamId,
    number: u64,
    previous: [u8; 32],
    /// Where the last object ends. What another process stored may not be durable before our next one is.
    stored: Option<Position>,
    open: Gathered,
    gap: Option<String>,
}

#[derive(Default)]
struct Gathered {
    start: Option<Position>,
    end: Position,
    first: Option<Time>,
    last: Option<Time>,
    changes: u64,
    bytes: u64,
    segments: Vec<Vec<u8>>,
}

impl Repository {
    /// Goes on with a stream, or begins it. Needs the power to write.
    pub fn append_journal(&self, stream: StreamRef) -> Result<JournalWriter> {
        self.refresh()?;
        self.shared.ring.writer(Powers::WRITE)?;
        if stream.name.len() > NAME_BYTES_MAX || stream.workload.name.len() > NAME_BYTES_MAX {
            return Err(Error::new(Code::Usage, "the name of a journal is too long"));
        }
        let id = StreamId::of(self.shared.domain()?, &stream);
        let numbers = self.journal_numbers(id)?;
        let mut writer = JournalWriter {
            session: Session::new(self.shared.family(), self.shared.ring.content_public())?,
            sealer: Sealer::new(Compression::Balanced)?,
            shared: Arc::clone(&self.shared),
            stream,
            id,
            number: self.shared.state().trimmed(&id.0),
            previous: [0; 32],
            stored: None,
            open: Gathered::default(),
            gap: None,
        };
        if let Some(last) = numbers.last() {
            let next =
                last.checked_add(1).ok_or_else(|| Error::integrity("a journal has no numbers left"))?;
            writer.number = writer.number.max(next);
        }
        for number in numbers.into_iter().rev() {
            if let Some(stored) = whole(&self.shared, id, number)? {
                let head = stored.head(self.shared.family(), self.shared.domain()?)?;
                (writer.previous, writer.stored) = (stored.hash, Some(head.end));
                break;
            }
        }
        Ok(writer)
    }
}

/// An object of which every byte is there. `None` for one that is damaged: at the end of a stream it was torn when its
/// writer died, and the stream goes on before it.
fn whole(shared: &Shared, id: StreamId, number: u64) -> Result<Option<Stored>> {
    match read_header(shared, id, number) {
        Ok(Some(stored)) => Ok(is_whole(shared, &stored)?.then_some(stored)),
        Err(error) if error.code() != Code::Integrity => Err(error),
        _ => Ok(None),
    }
}

impl JournalWriter {
    /// Where the next change starts; `None` for a stream that begins.
    pub fn end(&self) -> Option<&Position> {
        if self.open.start.is_some() { Some(&self.open.end) } else { self.stored.as_ref() }
    }

    /// Bytes gathered since the last [`JournalWriter::close`].
    pub fn gathered(&self) -> u64 {
        self.open.bytes
    }

    /// Says that changes are lost between what was appended last and what comes next, and why. The journal keeps it.
    ///
    /// Errors: those of [`JournalWriter::close`].
    pub fn skip(&mut self, why: &str) -> Result<()> {
        self.close()?;
        let end = why.floor_char_boundary(NAME_BYTES_MAX);
        self.gap = Some(why.get(..end).unwrap_or_default().to_owned());
        Ok(())
    }

    /// Errors: [`Code::Conflict`] when the change does not start where the last one ended; those of
    /// [`JournalWriter::close`].
    pub fn append(&mut self, change: &Change) -> Result<()> {
        let Change { start, end, time, bytes } = change;
        if self.gap.is_none() && self.end().is_some_and(|at| at != start) {
            let what = format!("a change of {} does not follow the one before it", self.stream.name);
            return Err(Error::new(Code::Conflict, what).hint("start again from where the journal ends"));
        }
        let backwards = self.end().is_some_and(|at| start < at);
        if backwards || end <= start || bytes.len() > Change::BYTES_MAX || end.0.len() > NAME_BYTES_MAX {
            return Err(Error::bug(format!("a change of {} of impossible extent", self.stream.name)));
        }
        if self.open.bytes + bytes.len() as u64 > CONTENT_BYTES_MAX {
            self.close()?;
        }
        let fits = |raw: &Vec<u8>| raw.len() + bytes.len() <= SEGMENT_BYTES;
        if !self.open.segments.last().is_some_and(fits) {
            self.open.segments.push(Vec::new());
        }
        if let Some(raw) = self.open.segments.last_mut() {
            put_change(raw, change);
        }
        let open = &mut self.open;
        open.start.get_or_insert_with(|| start.clone());
        open.end = end.clone();
        open.first = open.first.into_iter().chain(*time).min();
        open.last = open.last.max(*time);
        open.changes += 1;
        open.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Makes everything that was appended durable, and all that lies before it. Up to where, if there was anything.
    ///
    /// Errors: [`Code::Conflict`] when somebody else has gone on with this stream; what was gathered is dropped then, and
    /// after every other error kept, so that it can be tried again.
    pub fn close(&mut self) -> Result<Option<&Position>> {
        let Some(start) = self.open.start.clone() else { return Ok(None) };
        let domain = self.shared.domain()?;
        let signer = self.shared.ring.writer(Powers::WRITE)?;
        let header = Header {
            stream: self.id,
            number: self.number,
            domain: domain.domain,
            writer: signer.verifying_key().writer_id(),
            previous: self.previous,
            written: self.shared.clock.now(),
        };
        let open = &self.open;
        let head = Head {
            stream: self.stream.clone(),
            start,
            end: open.end.clone(),
            first: open.first,
            last: open.last,
            changes: open.changes,
            bytes: open.bytes,
            gap: self.gap.clone(),
        };
        let keys = (domain, signer, &self.session);
        let sealed =
            seal_object(self.shared.family(), keys, &mut self.sealer, &header, &head, &open.segments)?;
        let name = names::journal(&self.id.0, self.number);
        let store = self.shared.store.as_ref();
        if store.put_new(&name, &[&sealed.bytes])? == Put::Exists
            && store.get_whole(&name, sealed.bytes.len() as u64).ok().as_ref() != Some(&sealed.bytes)
        {
            self.open = Gathered::default();
            let what =
                format!("somebody else goes on with {} of {}", self.stream.name, self.stream.workload.name);
            return Err(Error::new(Code::Conflict, what).hint("let one of them follow it, not both"));
        }
        store.flush()?;
        (self.previous, self.stored) = (sealed.hash, Some(head.end));
        self.number += 1;
        (self.open, self.gap) = (Gathered::default(), None);
        Ok(self.stored.as_ref())
    }
}
