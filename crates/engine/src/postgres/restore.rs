//! Recovery of a cluster: the files of a point, the log behind it, and what tells the server where to stop.

use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{
    Code, Error, Event, ItemPath, Next, Phase, Piece, Position, Progress, Receipt, Result, Source, Time,
    WorkloadId,
};
use mainstay_repository::{Journal, PointInfo, PointReader, Repository, Stretch};
use mainstay_workloads::files::{FilesPlan, FilesTarget, OwnerRule, RestoreMode, RestoreRules, Restored};
use mainstay_workloads::postgres::{CLUSTER, Cluster, DATA, KIND, Lsn, TABLESPACES};

use super::stream;
use crate::copy::copy;

/// No description of a cluster is longer.
const CLUSTER_BYTES_MAX: usize = 16 << 20;

/// Where recovery stops.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Until {
    /// At the end of what the journal holds.
    End,
    /// As soon as the files are consistent.
    Consistent,
    /// Before the first commit after this moment.
    Time(Time),
    /// Before what is written here.
    Lsn(Lsn),
    /// Before the commit of this transaction.
    Transaction(u64),
}

/// What a recovery will do.
pub struct ClusterPlan {
    pub point: PointInfo,
    pub cluster: Cluster,
    pub until: Until,
    /// The stretch of the journal that is recovered from.
    pub stretch: Stretch,
    pub(super) journal: Arc<Journal>,
}

/// The spans within which any moment can be recovered: from the end of each point to the end of the log behind it. Points
/// whose log is one stretch make one span, which comes with the name of its log.
pub fn intervals(
    points: &[PointInfo],
    journals: &[Journal],
    workload: &WorkloadId,
) -> Vec<(String, Stretch)> {
    let of = |journal: &&Journal| journal.stream().workload.id == *workload;
    let mut spans = Vec::new();
    for journal in journals.iter().filter(of) {
        for stretch in journal.stretches() {
            let within = |point: &&PointInfo| {
                point.workload.id == *workload && (&stretch.start..=&stretch.end).contains(&&point.position)
            };
            if let Some(first) = points.iter().filter(within).min_by_key(|point| point.position.clone()) {
                let first = (first.position.clone(), first.moment);
                let span = Stretch { start: first.0, first: Some(first.1), ..stretch };
                spans.push((journal.stream().name.clone(), span));
            }
        }
    }
    spans
}

/// Finds the point and the log that lead to `until`.
///
/// Errors: [`Code::NotFound`] when nothing leads there, with what does; [`Code::Integrity`] for a point whose description
/// is malformed.
pub fn plan_cluster(repository: &Repository, workload: &WorkloadId, until: Until) -> Result<ClusterPlan> {
    repository.refresh()?;
    let mut points = repository.points()?;
    points.retain(|point| point.workload.id == *workload && point.workload.kind.0 == KIND && point.readable);
    let journals = repository.journals()?;
    let spans = intervals(&points, &journals, workload);
    let mut found: Option<(&PointInfo, Cluster, usize, Stretch)> = None;
    for point in points.iter().rev() {
        let cluster = cluster(&repository.read(&point.id)?)?;
        let name = stream(&point.workload, &cluster.system, cluster.start_timeline).name;
        let of =
            |journal: &Journal| journal.stream().workload.id == *workload && journal.stream().name == name;
        let Some(number) = journals.iter().position(of) else { continue };
        let Some(start) = cluster.start.parse::<Lsn>().ok() else { continue };
        let stretches = journals.get(number).map(Journal::stretches).unwrap_or_default();
        let holds = |stretch: &&Stretch| stretch.start <= start.position() && stretch.end >= point.position;
        let Some(stretch) = stretches.into_iter().find(|stretch| holds(&stretch)) else { continue };
        if found.as_ref().is_some_and(|(_, _, known, same)| (*known, same) != (number, &stretch)) {
            break;
        }
        if leads_to(point, &stretch, &until) {
            found = Some((point, cluster, number, stretch));
            // Whether a transaction was committed after a point is not known: the oldest is before it, if any is.
            if !matches!(until, Until::Transaction(_)) {
                break;
            }
        }
    }
    if let Some((point, cluster, number, stretch)) = found {
        let point = point.clone();
        let journal = journals.into_iter().nth(number).ok_or_else(|| Error::bug("a journal has gone"))?;
        return Ok(ClusterPlan { point, cluster, until, stretch, journal: Arc::new(journal) });
    }
    Err(nothing_leads_there(&spans))
}

fn leads_to(point: &PointInfo, stretch: &Stretch, until: &Until) -> bool {
    match until {
        Until::End | Until::Consistent => true,
        Until::Time(time) => point.moment <= *time && stretch.last >= Some(*time),
        Until::Lsn(lsn) => point.position <= lsn.position() && lsn.position() <= stretch.end,
        // Which one that is the server knows when it comes to it.
        Until::Transaction(_) => true,
    }
}

fn nothing_leads_there(spans: &[(String, Stretch)]) -> Error {
    let error = Error::new(Code::NotFound, "that moment cannot be recovered");
    let span = |(_, span): &(String, Stretch)| {
        let place = |position: &Position| Lsn::from_position(position).unwrap_or_default();
        let time = |time: Option<Time>| time.map_or_else(|| "?".into(), |time| time.seconds().to_string());
        format!(
            "{} to {} (seconds since 1970: {} to {})",
            place(&span.start),
            place(&span.end),
            time(span.first),
            time(span.last)
        )
    };
    match spans {
        [] => error.hint("there is no point with an unbroken log behind it: mainstay db backup"),
        spans => error
            .hint(format!("these spans can be: {}", spans.iter().map(span).collect::<Vec<_>>().join(", "))),
    }
}

/// What a point says of its cluster.
pub(super) fn cluster(reader: &PointReader) -> Result<Cluster> {
    let path = ItemPath::new(CLUSTER).unwrap_or_default();
    let entry = reader.lookup(&path)?;
    let entry = entry.ok_or_else(|| Error::integrity(format!("the point has no {CLUSTER}")))?;
    let (mut content, mut text, mut buffer) = (reader.stream(&entry)?, Vec::new(), vec![0; 64 << 10]);
    while let Piece::Data(length) = content.read(&mut buffer)? {
        text.extend_from_slice(buffer.get(..length).unwrap_or_default());
        if text.len() > CLUSTER_BYTES_MAX {
            return Err(Error::integrity(format!("{CLUSTER} is too long")));
        }
    }
    Cluster::from_json(&text)
}

/// Writes the files and the log into a new directory, ready for the server to be started on it: it recovers to where the
/// plan says and then opens for writing. Tablespaces come to lie beside the data directory.
///
/// Errors: [`Code::AlreadyExists`] when there is something in the directory already.
pub fn restore_cluster(
    repository: &Repository,
    plan: &ClusterPlan,
    to: &Path,
    progress: &Arc<dyn Progress>,
) -> Result<Restored> {
    let restored = write_files(repository, plan, to, OwnerRule::default(), progress)?;
    write_log(plan, to, progress.as_ref())?;
    settle(plan, to)?;
    Ok(restored)
}

/// Writes the files of a point: the data directory, and the tablespaces beside it.
pub(super) fn write_files(
    repository: &Repository,
    plan: &ClusterPlan,
    to: &Path,
    owners: OwnerRule,
    progress: &Arc<dyn Progress>,
) -> Result<Restored> {
    progress.event(&Event::Phase(Phase::Copying));
    let reader = repository.read(&plan.point.id)?;
    let mut restored = part(&reader, DATA, to, owners, progress)?;
    for space in &plan.cluster.tablespaces {
        let at = tablespace(to, space.oid);
        let more = part(&reader, &format!("{TABLESPACES}/{}", space.oid), &at, owners, progress)?;
        restored.counts.items += more.counts.items;
        restored.counts.bytes += more.counts.bytes;
        restored.counts.skipped += more.counts.skipped;
        restored.skips.extend(more.skips);
        relink(to, space.oid, &at)?;
    }
    Ok(restored)
}

pub(super) fn tablespace(to: &Path, oid: u32) -> PathBuf {
    let mut name = to.as_os_str().to_owned();
    name.push(format!("-tablespace-{oid}"));
    name.into()
}

fn part(
    reader: &PointReader,
    top: &str,
    to: &Path,
    owners: OwnerRule,
    progress: &Arc<dyn Progress>,
) -> Result<Restored> {
    let top = ItemPath::new(top).map_err(|error| Error::bug("a name of ours is no path").because(error))?;
    let source = Beneath { source: Box::new(reader.source(vec![top.clone()])?), top };
    let target = FilesTarget::new(FilesPlan {
        root: to.to_owned(),
        rules: RestoreRules { mode: RestoreMode::New, ..RestoreRules::default() },
        owners,
        writers: None,
        progress: Some(Arc::clone(progress)),
    })?;
    copy(Box::new(source), Box::new(target), progress.as_ref())
}

/// What lies below one directory, as if that were the root.
struct Beneath {
    source: Box<dyn Source>,
    top: ItemPath,
}

impl Source for Beneath {
    fn next(&mut self) -> Result<Next> {
        loop {
            let Next::Item(mut item) = self.source.next()? else { return Ok(Next::End) };
            if !item.path.is_within(&self.top) {
                continue;
            }
            let depth = self.top.components().count();
            let rest: Vec<&[u8]> = item.path.components().skip(depth).collect();
            item.path = ItemPath::new(rest.join(&b'/'))
                .map_err(|error| Error::bug("a part of a path is no path").because(error))?;
            return Ok(Next::Item(item));
        }
    }

    fn seal(&mut self) -> Result<mainstay_core::Captured> {
        self.source.seal()
    }

    fn commit(self: Box<Self>, receipt: &Receipt) -> Result<()> {
        self.source.commit(receipt)
    }
}

/// Points the link of a tablespace to where it lies now.
fn relink(to: &Path, oid: u32, at: &Path) -> Result<()> {
    let link = to.join("pg_tblspc").join(oid.to_string());
    let failed = |error| Error::io(format!("cannot make the link {}", link.display()), error);
    match std::fs::remove_file(&link) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let at = std::path::absolute(at).map_err(failed)?;
    std::os::unix::fs::symlink(at, &link).map_err(failed)
}

/// Gives what is made here to whom the data directory belongs: the server runs as that user.
fn hand_over(file: &File, to: &Path) -> std::io::Result<()> {
    let owner = std::fs::metadata(to)?;
    if file.metadata()?.uid() != owner.uid() {
        std::os::unix::fs::fchown(file, Some(owner.uid()), Some(owner.gid()))?;
    }
    Ok(())
}

/// Writes the segments of the log that recovery reads, whole: what a segment lacks at its end is zeros, as in one that the
/// server had only begun.
pub(super) fn write_log(plan: &ClusterPlan, to: &Path, progress: &dyn Progress) -> Result<()> {
    let (timeline, size) = (plan.cluster.start_timeline, plan.cluster.segment_bytes);
    let start: Lsn = plan
        .cluster
        .start
        .parse()
        .map_err(|()| Error::integrity("the point does not say where it starts"))?;
    let start = start.segment_start(size);
    let directory = to.join("pg_wal");
    let mut open: Option<(Lsn, File)> = None;
    for change in plan.journal.read(&start.position())? {
        progress.check()?;
        let change = change?;
        let at =
            Lsn::from_position(&change.start).ok_or_else(|| Error::integrity("a journal of another kind"))?;
        let (mut at, mut bytes) = (at, change.bytes.as_slice());
        while !bytes.is_empty() {
            let segment = at.segment_start(size);
            if open.as_ref().is_none_or(|(known, _)| *known != segment) {
                close(open.take())?;
                open = Some((segment, create(&directory.join(segment.file_name(timeline, size)), size, to)?));
            }
            let Some((_, file)) = &mut open else { break };
            let room = usize::try_from(segment.0 + size - at.0).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            let written = file.seek(SeekFrom::Start(at.0 - segment.0)).and_then(|_| file.write_all(now));
            written.map_err(|error| Error::io("cannot write the log", error))?;
            (at, bytes) = (Lsn(at.0 + now.len() as u64), later);
        }
        if Some(&change.end) >= Some(&plan.stretch.end) {
            break;
        }
    }
    close(open)
}

fn create(path: &Path, size: u64, to: &Path) -> Result<File> {
    let file = File::options().write(true).create_new(true).mode(0o600).open(path);
    let file = file.and_then(|file| {
        file.set_len(size)?;
        hand_over(&file, to)?;
        Ok(file)
    });
    file.map_err(|error| Error::io(format!("cannot write {}", path.display()), error))
}

fn close(open: Option<(Lsn, File)>) -> Result<()> {
    let Some((_, file)) = open else { return Ok(()) };
    file.sync_all().map_err(|error| Error::io("cannot write the log", error))
}

/// Tells the server to recover, where to stop, and not to act as the server that it is a copy of.
fn settle(plan: &ClusterPlan, to: &Path) -> Result<()> {
    let target: String =
        target(&plan.until)?.iter().map(|(name, value)| format!("{name} = '{value}'\n")).collect();
    let text = format!(
        "# Written by Mainstay for the recovery of point {}. To be removed once it has ended.\n\
         restore_command = '/bin/false'\n\
         recovery_target_timeline = 'current'\n\
         recovery_target_action = 'promote'\n\
         {target}\
         primary_conninfo = ''\nprimary_slot_name = ''\nsynchronous_standby_names = ''\n\
         archive_mode = 'off'\n",
        plan.point.id
    );
    let auto = to.join("postgresql.auto.conf");
    let failed = |error| Error::io(format!("cannot write {}", auto.display()), error);
    let mut file = File::options().append(true).create(true).mode(0o600).open(&auto).map_err(failed)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
    written.and_then(|()| hand_over(&file, to)).map_err(failed)?;
    for name in ["standby.signal", "recovery.signal"] {
        let path = to.join(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
    }
    let signal = File::options().write(true).create_new(true).mode(0o600).open(to.join("recovery.signal"));
    signal.and_then(|signal| hand_over(&signal, to)).map_err(failed)
}

/// The settings that say where recovery stops.
pub(super) fn target(until: &Until) -> Result<Vec<(String, String)>> {
    let (name, value, exclusive) = match until {
        Until::End => return Ok(Vec::new()),
        Until::Consistent => ("recovery_target", "immediate".to_owned(), false),
        Until::Time(time) => ("recovery_target_time", utc(*time)?, false),
        Until::Lsn(lsn) => ("recovery_target_lsn", lsn.to_string(), true),
        Until::Transaction(id) => ("recovery_target_xid", id.to_string(), true),
    };
    let exclusive = exclusive.then(|| ("recovery_target_inclusive".to_owned(), "off".to_owned()));
    Ok(std::iter::once((name.to_owned(), value)).chain(exclusive).collect())
}

/// As the server reads it.
fn utc(time: Time) -> Result<String> {
    let moment = jiff::Timestamp::from_nanosecond(i128::from(time.0))
        .map_err(|error| Error::new(Code::Usage, "that moment is out of range").because(error.to_string()))?;
    Ok(moment.strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string())
}
