//! Histories of timelines, kept beside the log: a stream of their own for each, with the file in one change.

use mainstay_core::{Change, Code, Error, Result, StreamRef, WorkloadId, WorkloadRef};
use mainstay_repository::{Journal, Repository};
use mainstay_workloads::postgres::{Connection, History, Identity, Lsn};

const PREFIX: &str = "history ";

fn stream(workload: &WorkloadRef, system: &str, timeline: u32) -> StreamRef {
    StreamRef {
        workload: workload.clone(),
        name: format!("{PREFIX}{system} timeline {timeline}"),
        parent: None,
    }
}

/// Asks a server for the history of its timeline, and stores it.
///
/// Errors: [`Code::AlreadyExists`] when another history of this timeline is stored.
pub(super) fn keep(
    repository: &Repository,
    connection: &mut Connection,
    workload: &WorkloadRef,
    identity: &Identity,
) -> Result<History> {
    let history = History::ask(connection, identity.timeline)?;
    store(repository, workload, &identity.system, &history)?;
    Ok(history)
}

/// Stores a history, unless it is there.
///
/// Errors: [`Code::AlreadyExists`] when another history of this timeline is stored.
pub(super) fn store(
    repository: &Repository,
    workload: &WorkloadRef,
    system: &str,
    history: &History,
) -> Result<()> {
    if history.text.is_empty() {
        return Ok(());
    }
    let reference = stream(workload, system, history.timeline);
    let mut journal = repository.append_journal(reference.clone())?;
    let end = Lsn(history.text.len() as u64).position();
    let Some(stored) = journal.end() else {
        let change = Change { start: Lsn(0).position(), end, time: None, bytes: history.text.clone() };
        journal.append(&change)?;
        return journal.close().map(drop);
    };
    let same = *stored == end
        && match repository.journal(&reference)?.map(|journal| read(&journal)) {
            Some(Ok(text)) => text == history.text,
            // Whoever may not read believes the length.
            Some(Err(error)) if error.code() != Code::NoPower => return Err(error),
            _ => true,
        };
    if same { Ok(()) } else { Err(other(history.timeline)) }
}

fn other(timeline: u32) -> Error {
    let what = format!("the repository knows another timeline {timeline} of this cluster");
    Error::new(Code::AlreadyExists, what).hint(
        "two servers were promoted, each for itself; protect this one under another name: --name, or promote it again",
    )
}

fn read(journal: &Journal) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    for change in journal.read(&Lsn(0).position())? {
        text.extend_from_slice(&change?.bytes);
    }
    Ok(text)
}

/// All that are stored of a workload.
pub(super) fn all(journals: &[Journal], workload: &WorkloadId) -> Result<Vec<History>> {
    let mut histories = Vec::new();
    for journal in journals.iter().filter(|journal| journal.stream().workload.id == *workload) {
        let name = journal.stream().name.strip_prefix(PREFIX);
        let Some((_, Ok(timeline))) = name
            .and_then(|name| name.rsplit_once(" timeline "))
            .map(|(system, number)| (system, number.parse()))
        else {
            continue;
        };
        histories.push(History::parse(timeline, read(journal)?)?);
    }
    Ok(histories)
}
