//! `mainstay backup`.

use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{Code, Error, Progress, Result};
use mainstay_engine::backup::{BackupRequest, backup, preview};
use mainstay_engine::vm::{check_machine, machine_tag};
use mainstay_engine::workload::root_text;
use mainstay_repository::{Compression, Repository, store};
use mainstay_workloads::files::{FilesRequest, SnapshotRule};

use super::{Done, check_tag, duration, init};
use crate::args::{self, Backup, Snapshots};
use crate::places::Places;
use crate::report::lines::{self, Line, Totals};
use crate::session::Session;

pub(super) fn run(arguments: Backup, session: &mut Session) -> Done {
    let places = session.places()?;
    let dry_run = arguments.dry_run;
    let request = request(arguments, session, &places)?;
    let repository = open(session, &places, dry_run)?;
    if dry_run {
        return would_back_up(session, &repository, &request);
    }
    let began = session.doors.clock.monotonic();
    let progress: Arc<dyn Progress> = session.progress();
    let done = backup(&repository, &request, &session.doors.clock, &progress);
    drop(progress);
    let point = done?;
    session.report.more_skips(&format!("mainstay points show {} lists all", point.id));
    session.report.line(&Line::BackedUp(lines::BackedUp {
        point: point.id.to_string(),
        workload: point.workload.name.clone(),
        host: point.host.clone(),
        roots: lines::Roots::of(&request.files.roots.iter().map(|root| root_text(root)).collect::<Vec<_>>()),
        tags: request.tags.clone(),
        counts: Totals::from(&point.counts),
        seconds: session.seconds_since(began),
    }));
    Ok((point.counts.skipped > 0).then_some(Code::Partial))
}

/// What the person asked for; `auto` for nothing in particular.
pub(super) fn compression(asked: args::Compression, auto: Compression) -> Compression {
    match asked {
        args::Compression::Auto => auto,
        args::Compression::None => Compression::None,
        args::Compression::Fast => Compression::Fast,
        args::Compression::Balanced => Compression::Balanced,
        args::Compression::Best => Compression::Best,
    }
}

/// Opens the repository; makes the default one when there is none yet.
pub(super) fn open(session: &mut Session, places: &Places, dry_run: bool) -> Result<Repository> {
    let missing = !places.chosen
        && store::open(&places.repository)
            .and_then(|store| Repository::identify(store.as_ref()))
            .is_err_and(|error| error.code() == Code::NoRepository);
    match (missing, dry_run) {
        (true, true) => Err(Error::new(Code::NoRepository, "there is no repository yet to compare with")
            .hint("without --dry-run this command makes one")),
        (true, false) => init::on_first_use(session, places),
        (false, _) => session.open(),
    }
}

fn request(arguments: Backup, session: &Session, places: &Places) -> Result<BackupRequest> {
    if let Some(name) = &arguments.name {
        check_name(name)?;
    }
    arguments.tag.iter().try_for_each(|tag| check_tag(tag))?;
    let tags = tags(&arguments, session)?;
    let directory = &session.doors.directory;
    let files = FilesRequest {
        roots: arguments.paths.iter().map(|path| absolute(directory, path)).collect::<Result<_>>()?,
        exclude: arguments.exclude,
        exclude_files: arguments.exclude_from.iter().map(|path| directory.join(path)).collect(),
        never: places.local_repository().into_iter().collect(),
        skip_caches: arguments.skip_caches,
        one_file_system: arguments.one_file_system,
        snapshots: match arguments.snapshots {
            Snapshots::Never => SnapshotRule::Never,
            Snapshots::Try => SnapshotRule::WherePossible,
            Snapshots::Always => SnapshotRule::Always,
        },
        ..FilesRequest::default()
    };
    Ok(BackupRequest {
        files,
        host: session.doors.host.clone(),
        name: arguments.name,
        tags,
        reread_one_in: arguments.reread,
        full: arguments.full,
        quiesce: arguments.quiesce,
        thaw: arguments.thaw,
        hook_limit: duration(&arguments.hook_limit)?,
        quiesce_may_fail: arguments.quiesce_may_fail,
        count_ahead: session.report.bar,
        compression: compression(arguments.compression, Compression::Balanced),
        jobs: std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
    })
}

/// The tags of the point: those that the person gave, and the one that names the machine whose files these are.
fn tags(arguments: &Backup, session: &Session) -> Result<Vec<String>> {
    let mut tags = arguments.tag.clone();
    let guest = session.doors.guest.as_ref().filter(|_| !arguments.no_machine);
    if let Some(machine) = &arguments.machine {
        check_machine(machine)?;
        tags.push(machine_tag(machine));
    } else if let Some(guest) = guest {
        tags.push(machine_tag(guest));
    }
    Ok(tags)
}

/// Refuses names that could not be written as an address.
pub(super) fn check_name(name: &str) -> Result<()> {
    let plain = !name.is_empty()
        && name != "latest"
        && !name.contains(['@', '~'])
        && !name.contains(char::is_control);
    if plain {
        return Ok(());
    }
    Err(Error::new(Code::Usage, format!("a workload cannot be called {name:?}"))
        .hint("choose a name without `@`, `~` and control characters that is not `latest`"))
}

/// The path from `/`, without `.`; with `..` in it, the real one.
fn absolute(directory: &Path, path: &Path) -> Result<PathBuf> {
    let joined = directory.join(path);
    if joined.components().any(|component| component == Component::ParentDir) {
        return std::fs::canonicalize(&joined)
            .map_err(|error| Error::io(format!("cannot protect {}", path.display()), error));
    }
    Ok(joined.components().collect())
}

fn would_back_up(session: &Session, repository: &Repository, request: &BackupRequest) -> Done {
    let progress = session.progress();
    let found = preview(repository, request, &session.doors.clock, progress.as_ref());
    drop(progress);
    let found = found?;
    session.report.more_skips("--verbose lists all");
    session.report.line(&Line::WouldBackUp(lines::WouldBackUp {
        workload: found.workload.name,
        host: request.host.clone(),
        roots: lines::Roots::of(&found.roots),
        items: found.items,
        bytes: found.bytes,
        read_items: found.read_items,
        read_bytes: found.read_bytes,
        skipped: found.skipped,
    }));
    Ok((found.skipped > 0).then_some(Code::Partial))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{absolute, check_name};

    #[test]
    fn paths_become_absolute_and_plain() {
        let here = Path::new("/home/ann");
        let typed = ["Documents/", "./a/./b", "/etc", "/"];
        let paths = ["/home/ann/Documents", "/home/ann/a/b", "/etc", "/"];
        for (typed, path) in typed.into_iter().zip(paths) {
            assert_eq!(absolute(here, Path::new(typed)).unwrap().to_str(), Some(path));
        }
    }

    #[test]
    fn names_that_are_addresses_are_refused() {
        for bad in ["", "latest", "a@b", "a~1", "a\nb"] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        check_name("web:etc").unwrap();
    }
}
