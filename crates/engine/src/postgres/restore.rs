//! Recovery of a cluster: the files of a point, the log behind it, and what tells the server where to stop.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{Code, Error, Event, ItemPath, Next, Phase, Progress, Receipt, Result, Source, Time};
use mainstay_repository::{PointReader, Repository};
use mainstay_workloads::files::{FilesPlan, FilesTarget, OwnerRule, RestoreMode, RestoreRules, Restored};
use mainstay_workloads::postgres::{CONFIGURATION, DATA, MANIFEST, TABLESPACES};
use rustix::fs::OFlags;

use super::configuration;
use super::plan::{ClusterPlan, Until, document};
use super::segments::write_log;
use crate::copy::copy;

/// No list of files is longer.
const MANIFEST_BYTES_MAX: usize = 1 << 30;
/// Where a server keeps what was set by `ALTER SYSTEM`: it counts more than what its other files say.
const AUTO: &str = "postgresql.auto.conf";
/// It is no longer, in bytes.
const AUTO_BYTES_MAX: u64 = 16 << 20;
const LOOP: i32 = rustix::io::Errno::LOOP.raw_os_error();
/// How the lines begin that a restore adds to the settings.
pub(super) const MARK: &str = "# Written by Mainstay";
/// What is about one recovery or one primary, beside `recovery_target` and what begins so.
const RECOVERY: [&str; 6] = [
    "restore_command",
    "recovery_end_command",
    "archive_cleanup_command",
    "promote_trigger_file",
    "primary_conninfo",
    "primary_slot_name",
];
/// What a restore has set besides.
const ADDED: [&[u8]; 2] = [b"synchronous_standby_names = ''", b"archive_mode = 'off'"];

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
    restore_told(repository, plan, to, &recovery(plan)?, progress)
}

pub(super) fn restore_told(
    repository: &Repository,
    plan: &ClusterPlan,
    to: &Path,
    orders: &Orders,
    progress: &Arc<dyn Progress>,
) -> Result<Restored> {
    write_out(repository, plan, to, orders, progress).map_err(|error| {
        match (error.code(), error.next_step()) {
            (Code::Io | Code::NotFound, None) => error.hint("name a place that can be written to: --to"),
            (Code::Full, None) => error.hint("make room, remove what was written, and restore again"),
            _ => error,
        }
    })
}

fn write_out(
    repository: &Repository,
    plan: &ClusterPlan,
    to: &Path,
    orders: &Orders,
    progress: &Arc<dyn Progress>,
) -> Result<Restored> {
    let mut restored = write_files(repository, plan, to, OwnerRule::default(), progress)?;
    let reader = repository.read(&plan.point.id)?;
    let beside = configuration_of(to);
    if reader.lookup(&configuration::path()?)?.is_some() {
        add(&mut restored, part(&reader, CONFIGURATION, &beside, OwnerRule::default(), progress)?);
    }
    configuration::settle(&plan.cluster, &beside, to)?;
    // PostgreSQL's own check, pg_verifybackup, reads it there. Of a stopped server nobody wrote one.
    if reader.lookup(&path(MANIFEST)?)?.is_some() {
        let manifest = document(&reader, MANIFEST, MANIFEST_BYTES_MAX)?;
        write(&to.join(MANIFEST), &manifest, to)?;
    }
    write_log(plan, to, progress.as_ref())?;
    settle(orders, to)?;
    Ok(restored)
}

/// Makes a file, of whom the data directory is.
pub(super) fn write(path: &Path, text: &[u8], to: &Path) -> Result<()> {
    let file = File::options().write(true).create_new(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| {
        file.write_all(text)?;
        hand_over(&file, to)?;
        file.sync_all()
    });
    written.map_err(|error| Error::io(format!("cannot write {}", path.display()), error))
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
        add(&mut restored, more);
        relink(to, space.oid, &at)?;
    }
    Ok(restored)
}

fn add(restored: &mut Restored, more: Restored) {
    restored.counts.items += more.counts.items;
    restored.counts.bytes += more.counts.bytes;
    restored.counts.skipped += more.counts.skipped;
    restored.skips.extend(more.skips);
}

/// Where configuration that lay outside the data directory comes to lie.
fn configuration_of(to: &Path) -> PathBuf {
    let mut name = to.as_os_str().to_owned();
    name.push("-configuration");
    name.into()
}

pub(super) fn tablespace(to: &Path, oid: u32) -> PathBuf {
    let mut name = to.as_os_str().to_owned();
    name.push(format!("-tablespace-{oid}"));
    name.into()
}

fn path(name: &str) -> Result<ItemPath> {
    ItemPath::new(name).map_err(|error| Error::bug("a name of ours is no path").because(error))
}

fn part(
    reader: &PointReader,
    top: &str,
    to: &Path,
    owners: OwnerRule,
    progress: &Arc<dyn Progress>,
) -> Result<Restored> {
    let top = path(top)?;
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
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let at = std::path::absolute(at).map_err(failed)?;
    std::os::unix::fs::symlink(at, &link).map_err(failed)
}

/// Gives what is made here to whom the data directory belongs: the server runs as that user.
pub(super) fn hand_over(file: &File, to: &Path) -> std::io::Result<()> {
    let owner = std::fs::metadata(to)?;
    if file.metadata()?.uid() != owner.uid() {
        std::os::unix::fs::fchown(file, Some(owner.uid()), Some(owner.gid()))?;
    }
    Ok(())
}

/// What a restored server is told beside its own settings, and the file that tells it how to start.
pub(super) struct Orders {
    pub(super) settings: String,
    pub(super) signal: &'static str,
}

/// To recover, where to stop, and not to act as the server that it is a copy of.
fn recovery(plan: &ClusterPlan) -> Result<Orders> {
    let target: String = target(plan)?.iter().map(|(name, value)| format!("{name} = '{value}'\n")).collect();
    let settings = format!(
        "{MARK} for the recovery of point {}. To be removed once it has ended.\n\
         restore_command = '/bin/false'\n\
         recovery_target_action = 'promote'\n\
         {target}\
         primary_conninfo = ''\nprimary_slot_name = ''\nsynchronous_standby_names = ''\n\
         archive_mode = 'off'\n",
        plan.point.id
    );
    Ok(Orders { settings, signal: "recovery.signal" })
}

/// Adds the orders to the settings that the point has. The directory may belong to a user who puts links there by now: no
/// name in it is followed.
fn settle(orders: &Orders, to: &Path) -> Result<()> {
    let auto = to.join(AUTO);
    let mut text = inherited(&read_auto(&auto)?);
    text.extend_from_slice(orders.settings.as_bytes());
    for name in [AUTO, "standby.signal", "recovery.signal"] {
        let path = to.join(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(Error::io(format!("cannot write {}", path.display()), error));
            }
            _ => {}
        }
    }
    write(&auto, &text, to)?;
    write(&to.join(orders.signal), b"", to)
}

fn read_auto(path: &Path) -> Result<Vec<u8>> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path);
    let mut text = Vec::new();
    match file.and_then(|file| file.take(AUTO_BYTES_MAX).read_to_end(&mut text)) {
        Ok(length) if length as u64 == AUTO_BYTES_MAX => {
            Err(Error::integrity(format!("{} is too long", path.display())))
        }
        Ok(_) => Ok(text),
        // What a link leads to is in no point.
        Err(error) if error.kind() == ErrorKind::NotFound || error.raw_os_error() == Some(LOOP) => Ok(text),
        Err(error) => Err(Error::io(format!("cannot read {}", path.display()), error)),
    }
}

/// What of `postgresql.auto.conf` still counts: nothing that was about an earlier recovery. `ALTER SYSTEM` keeps the lines
/// of one without the comment above them.
fn inherited(text: &[u8]) -> Vec<u8> {
    let mut ours = false;
    let mut kept = Vec::with_capacity(text.len() + 1);
    for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        ours |= line.starts_with(MARK.as_bytes());
        let name = line.trim_ascii_start();
        let name = name.split(|byte| byte.is_ascii_whitespace() || *byte == b'=').next().unwrap_or_default();
        let name = String::from_utf8_lossy(name).to_ascii_lowercase();
        let about_recovery = name.starts_with("recovery_target") || RECOVERY.contains(&name.as_str());
        let added = ours && (ADDED.contains(&line) || line.starts_with(MARK.as_bytes()));
        if !about_recovery && !added {
            kept.extend_from_slice(line);
            kept.push(b'\n');
        }
    }
    kept
}

/// The settings that say where recovery stops.
pub(super) fn target(plan: &ClusterPlan) -> Result<Vec<(String, String)>> {
    let mut settings = vec![("recovery_target_timeline", plan.timeline().to_string())];
    settings.extend(match &plan.until {
        Until::End => None,
        Until::Consistent => Some(("recovery_target", "immediate".to_owned())),
        Until::Time(time) => Some(("recovery_target_time", utc(*time)?)),
        Until::Lsn(lsn) => Some(("recovery_target_lsn", lsn.to_string())),
        Until::Transaction(id) => Some(("recovery_target_xid", id.to_string())),
    });
    if matches!(plan.until, Until::Lsn(_) | Until::Transaction(_)) {
        settings.push(("recovery_target_inclusive", "off".to_owned()));
    }
    Ok(settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}

/// As the server reads it.
fn utc(time: Time) -> Result<String> {
    let moment = jiff::Timestamp::from_nanosecond(i128::from(time.0))
        .map_err(|error| Error::new(Code::Usage, "that moment is out of range").because(error.to_string()))?;
    Ok(moment.strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string())
}

#[cfg(test)]
mod tests {
    use super::{MARK, inherited};

    #[test]
    fn what_an_earlier_recovery_was_told_is_no_setting_of_the_next() {
        let text = format!(
            "# Do not edit\nwork_mem = '7MB'\nRecovery_Target_Time='2026'\n  recovery_target = 'immediate'\n\
             restore_command = 'x'\narchive_mode = 'on'\n{MARK} for the recovery\narchive_mode = 'off'\n\
             primary_slot_name = ''\nnot_primary_slot_name = 'a'"
        );
        let kept = inherited(text.as_bytes());
        let wanted = "# Do not edit\nwork_mem = '7MB'\narchive_mode = 'on'\nnot_primary_slot_name = 'a'\n";
        assert_eq!(String::from_utf8(kept).unwrap(), wanted);
    }
}
