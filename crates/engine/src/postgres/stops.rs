//! Whether the log says where a recovery is to stop: a server that comes to the end of its log before that refuses to start.

use mainstay_core::{Code, Position, Result};
use mainstay_repository::Journal;
use mainstay_workloads::postgres::Lsn;
use mainstay_workloads::postgres::walread::{Record, WalReader};

use super::lines::Leg;
use super::plan::{ClusterPlan, Until};

/// Records end so near to the end of a log that was read whole.
const PAGE_BYTES: u64 = 8192;

/// Whether something in the log lies behind `until`. Without, what is wanted is all of the log. What cannot be read, the
/// server decides.
pub(super) fn comes(journals: &[Journal], legs: &[Leg], segment: u64, until: &Until) -> Result<bool> {
    let is_behind: Box<dyn Fn(&Record<'_>) -> bool> = match until {
        Until::Time(time) => {
            let time = *time;
            Box::new(move |record| record.ending().is_some_and(|ending| ending.time > time))
        }
        Until::Lsn(lsn) => {
            let lsn = *lsn;
            Box::new(move |record| record.start >= lsn)
        }
        _ => return Ok(true),
    };
    let mut behind = false;
    for leg in legs {
        let Some(journal) = journals.get(leg.journal) else { continue };
        let Some(from) = begin(journal, leg, segment, until) else { continue };
        match look(journal, leg, &from, segment, &*is_behind) {
            Err(error) if matches!(error.code(), Code::Unsupported | Code::Integrity) => return Ok(true),
            found => behind |= found?,
        }
        if behind {
            break;
        }
    }
    Ok(behind)
}

/// From where a leg has to be looked at; `None` when all of it lies before.
fn begin(journal: &Journal, leg: &Leg, segment: u64, until: &Until) -> Option<Position> {
    let at = match until {
        Until::Time(time) => journal.since(*time)?,
        Until::Lsn(lsn) => lsn.position(),
        _ => return None,
    };
    // A record may begin before.
    let at = Lsn::from_position(&at)?.segment_start(segment).position().max(leg.stretch.start.clone());
    (at < leg.stretch.end).then_some(at)
}

fn look(
    journal: &Journal,
    leg: &Leg,
    from: &Position,
    segment: u64,
    is_behind: &dyn Fn(&Record<'_>) -> bool,
) -> Result<bool> {
    let (mut reader, mut found, mut read) = (WalReader::new(segment), false, 0);
    let mut each = |record: &Record<'_>| {
        found |= is_behind(record);
        read = record.start.0 + record.length as u64;
        if record.is_switch() && segment > 0 {
            read = read.next_multiple_of(segment);
        }
        Ok(())
    };
    for change in journal.read(from)? {
        let change = change?;
        let Some(at) = Lsn::from_position(&change.start) else { break };
        reader.push(at, &change.bytes, &mut each)?;
        if change.end >= leg.stretch.end {
            break;
        }
    }
    reader.finish(&mut each)?;
    // Only what was read to its end says that nothing comes.
    let end = Lsn::from_position(&leg.stretch.end).unwrap_or_default();
    Ok(found || end.0.saturating_sub(read) > PAGE_BYTES)
}

/// Where a record begins, at `lsn` or behind, that is whole in the log, or where it is damaged: a server that came to its end
/// at `lsn` did not read all of it. `None` for a log of a version that only its server reads.
pub(super) fn unread(plan: &ClusterPlan, lsn: Lsn) -> Result<Option<Lsn>> {
    let (mut reader, mut found, mut leg_now) = (None::<WalReader>, None, None);
    let segment = plan.cluster.segment_bytes;
    let from = Lsn(lsn.0 - lsn.0 % PAGE_BYTES);
    let mut told = |record: &Record<'_>| {
        found = found.or((record.start >= lsn).then_some(record.start));
        Ok(())
    };
    let mut read = || -> Result<()> {
        plan.read_log(from, &mut |leg, at, bytes| {
            if leg_now != Some(leg) {
                // Each leg but the last was left where another begins.
                reader = Some(WalReader::new(segment));
                leg_now = Some(leg);
            }
            match &mut reader {
                Some(reader) => reader.push(at, bytes, &mut told),
                None => Ok(()),
            }
        })?;
        reader.take().map_or(Ok(()), |reader| reader.finish(&mut told))
    };
    match read() {
        Err(error) if error.code() == Code::Unsupported => Ok(None),
        Err(error) if error.code() == Code::Integrity => Ok(Some(found.unwrap_or(lsn))),
        read => read.map(|()| found),
    }
}
