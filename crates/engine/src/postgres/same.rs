//! Whether a server has the log that is stored: one that was put back to an earlier state writes another in its place.

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{ChangeStream as _, Clock, Code, Error, Result, StreamRef};
use mainstay_repository::Repository;
use mainstay_workloads::postgres::{Lsn, WalRequest, WalStream};

use super::backup::Dial;
use super::push::read;

/// So much of what is stored last is compared.
const TAIL_BYTES: u64 = 64 << 10;
/// A server that sends nothing for so long does not have it.
const LIMIT: Duration = Duration::from_secs(10);

/// Compares the last that is stored before `from`, where the journal ends, with what the server has there. Whoever may not
/// read believes, and so does whoever asks a server that has deleted it.
///
/// Errors: [`Code::AlreadyExists`] when the server has another log.
pub(super) fn check(
    repository: &Repository,
    dial: &Dial<'_>,
    reference: &StreamRef,
    (timeline, from): (u32, Lsn),
    segment_bytes: u64,
    clock: &Arc<dyn Clock>,
) -> Result<()> {
    let Some(journal) = repository.journal(reference)? else { return Ok(()) };
    let last = journal.stretches().into_iter().rfind(|stretch| stretch.start < from.position());
    let Some(first) = last.and_then(|last| Lsn::from_position(&last.start)) else { return Ok(()) };
    // The server has this segment if it has what follows.
    let before = Lsn(from.0.saturating_sub(1)).segment_start(segment_bytes);
    let start = Lsn(from.0.saturating_sub(TAIL_BYTES)).max(before).max(first);
    let mut stored = vec![0; usize::try_from(from.0.saturating_sub(start.0)).unwrap_or_default()];
    match read(&journal, start, &mut stored) {
        Ok(length) if length == stored.len() => {}
        // Damage is told of by those who look for it.
        Ok(_) => return Ok(()),
        Err(error) if matches!(error.code(), Code::NoPower | Code::NotFound | Code::Integrity) => {
            return Ok(());
        }
        Err(error) => return Err(error),
    }
    let request = WalRequest { slot: None, timeline, from: start };
    match ask(dial, &request, stored.len(), clock)? {
        Some(theirs) if theirs != stored => Err(other(from)),
        _ => Ok(()),
    }
}

/// `None` when the server does not have it.
fn ask(
    dial: &Dial<'_>,
    request: &WalRequest,
    length: usize,
    clock: &Arc<dyn Clock>,
) -> Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    let began = clock.monotonic();
    let mut stream = WalStream::start(dial(true)?, request, Arc::clone(clock))?;
    while bytes.len() < length {
        match stream.next() {
            Ok(Some(change)) => bytes.extend_from_slice(&change.bytes),
            Ok(None) => {
                if stream.switch().is_some() || clock.monotonic().saturating_sub(began) > LIMIT {
                    return Ok(None);
                }
            }
            Err(error) if error.code() == Code::NotFound => return Ok(None),
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(length);
    Ok(Some(bytes))
}

/// The error over a server that has another log before `from`.
pub(super) fn other(from: Lsn) -> Error {
    let what = format!("the server has another log before {from} than what is stored");
    Error::new(Code::AlreadyExists, what).hint(
        "it was put back to an earlier state and went its own way; protect it under another name: --name",
    )
}
