//! The log out of the journal, as the files that recovery reads.

use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use mainstay_core::{Error, Position, Progress, Result};
use mainstay_repository::Journal;
use mainstay_workloads::postgres::{History, Lsn};

use super::lines::Leg;
use super::plan::ClusterPlan;
use super::restore::{hand_over, write};

const DIRECTORY: &str = "pg_wal";

/// Writes the histories of all timelines, and the segments that recovery reads, whole: what a segment lacks at its end is
/// zeros, as in one that the server had only begun.
pub(super) fn write_log(plan: &ClusterPlan, to: &Path, progress: &dyn Progress) -> Result<()> {
    let directory = to.join(DIRECTORY);
    for history in plan.histories()? {
        write(&directory.join(History::file_name(history.timeline)), &history.text, to)?;
    }
    let start = plan.start()?.position();
    let size = plan.cluster.segment_bytes;
    for leg in &plan.legs {
        let journal = plan.journals.get(leg.journal).ok_or_else(|| Error::bug("a journal has gone"))?;
        // The other legs begin where a segment does.
        let from = start.clone().max(leg.stretch.start.clone());
        let mut files =
            Segments { directory: directory.clone(), timeline: leg.timeline, size, to, open: None };
        leg_log(journal, leg, &from, progress, &mut files)?;
    }
    Ok(())
}

fn leg_log(
    journal: &Journal,
    leg: &Leg,
    from: &Position,
    progress: &dyn Progress,
    files: &mut Segments<'_>,
) -> Result<()> {
    let place = |position: &Position| {
        Lsn::from_position(position).ok_or_else(|| Error::integrity("a journal of another kind"))
    };
    let end = place(&leg.stretch.end)?;
    if *from < leg.stretch.end {
        for change in journal.read(from)? {
            progress.check()?;
            let change = change?;
            let at = place(&change.start)?;
            let wanted = usize::try_from(end.0.saturating_sub(at.0)).unwrap_or(usize::MAX);
            files.put(at, change.bytes.get(..wanted).unwrap_or(&change.bytes))?;
            if change.end >= leg.stretch.end {
                break;
            }
        }
    }
    files.close()
}

/// The files that the log of one timeline is cut into.
struct Segments<'a> {
    directory: PathBuf,
    timeline: u32,
    size: u64,
    /// The data directory.
    to: &'a Path,
    open: Option<(Lsn, File)>,
}

impl Segments<'_> {
    fn put(&mut self, mut at: Lsn, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let segment = at.segment_start(self.size);
            let room = usize::try_from(segment.0 + self.size - at.0).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            let file = self.file(segment)?;
            let written = file.seek(SeekFrom::Start(at.0 - segment.0)).and_then(|_| file.write_all(now));
            written.map_err(|error| Error::io("cannot write the log", error))?;
            (at, bytes) = (Lsn(at.0 + now.len() as u64), later);
        }
        Ok(())
    }

    fn file(&mut self, segment: Lsn) -> Result<&mut File> {
        if self.open.as_ref().is_some_and(|(known, _)| *known != segment) {
            self.close()?;
        }
        let opened = match self.open.take() {
            Some(open) => open,
            None => {
                (segment, self.create(&self.directory.join(segment.file_name(self.timeline, self.size)))?)
            }
        };
        Ok(&mut self.open.insert(opened).1)
    }

    fn create(&self, path: &Path) -> Result<File> {
        let file = File::options().write(true).create_new(true).mode(0o600).open(path);
        let file = file.and_then(|file| {
            file.set_len(self.size)?;
            hand_over(&file, self.to)?;
            Ok(file)
        });
        file.map_err(|error| Error::io(format!("cannot write {}", path.display()), error))
    }

    fn close(&mut self) -> Result<()> {
        let Some((_, file)) = self.open.take() else { return Ok(()) };
        file.sync_all().map_err(|error| Error::io("cannot write the log", error))
    }
}
