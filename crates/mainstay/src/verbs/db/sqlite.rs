//! `mainstay db` for SQLite databases.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use mainstay_core::{Code, Error, Progress, Result, WorkloadRef};
use mainstay_engine::address::parse_time;
use mainstay_engine::follow::Closing;
use mainstay_engine::sqlite::{
    DatabasesBackup, FollowDatabases, Told, Until, backup_databases, follow_databases, plan_databases,
    restore_databases, spans,
};
use mainstay_repository::{Journal, PointInfo, Repository};
use mainstay_workloads::sqlite::{Place, SCHEME};

use super::super::{Done, backup as files, check_tag, duration};
use crate::args::{DbBackup, DbFollow, DbRestore, Server};
use crate::report::databases::{DatabaseRestored, Following, Hole, Recoverable};
use crate::report::lines::{BackedUp, Line, Roots, Totals, WouldDo, stamp};
use crate::session::Session;

fn request(arguments: &Server, tags: &[String], session: &Session) -> Result<DatabasesBackup> {
    if arguments.password_file.is_some() || arguments.slot.is_some() {
        return Err(Error::new(Code::Usage, "SQLite databases have neither passwords nor slots"));
    }
    let path = arguments.server.strip_prefix(SCHEME).unwrap_or_default();
    // As other programs write it, too.
    let path = path.strip_prefix("//").unwrap_or(path);
    if path.is_empty() {
        return Err(Error::new(Code::Usage, "the address names no database").hint(
            "write it as sqlite:/var/lib/app/app.db, or sqlite:/var/lib/app for all below a directory",
        ));
    }
    if let Some(name) = &arguments.name {
        files::check_name(name)?;
    }
    Ok(DatabasesBackup {
        host: session.doors.host.clone(),
        name: arguments.name.clone(),
        pattern: session.doors.directory.join(PathBuf::from(path)),
        tags: tags.to_vec(),
        jobs: std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
    })
}

pub(super) fn backup(arguments: &DbBackup, session: &mut Session) -> Done {
    let places = session.places()?;
    arguments.tag.iter().try_for_each(|tag| check_tag(tag))?;
    let request = request(&arguments.server, &arguments.tag, session)?;
    let repository = files::open(session, &places, false)?;
    let began = session.doors.clock.monotonic();
    let progress: Arc<dyn Progress> = session.progress();
    let followed = BTreeMap::new();
    let done = backup_databases(&repository, &request, &followed, &session.doors.clock, &progress);
    drop(progress);
    let point = done?;
    let seconds = session.seconds_since(began);
    session.report.line(&backed_up(&point, seconds));
    Ok((point.counts.skipped > 0).then_some(Code::Partial))
}

fn backed_up(point: &PointInfo, seconds: f64) -> Line {
    Line::BackedUp(BackedUp {
        point: point.id.to_string(),
        workload: point.workload.name.clone(),
        host: point.host.clone(),
        roots: Roots::of(&point.roots),
        tags: point.tags.clone(),
        counts: Totals::from(&point.counts),
        seconds,
    })
}

pub(super) fn follow(arguments: &DbFollow, session: &mut Session) -> Done {
    let places = session.places()?;
    let closing = Closing { after: duration(&arguments.every)?, ..Closing::default() };
    let databases = request(&arguments.server, &[], session)?;
    let repository = files::open(session, &places, false)?;
    let workload = mainstay_engine::sqlite::workload(&repository, &databases)?.name;
    let request = FollowDatabases { databases, closing };
    let report = Arc::clone(&session.report);
    let told = |told: Told| match told {
        Told::Follows(server) => {
            report.line(&Line::Following(Following { workload: workload.clone(), server }));
        }
        Told::Point(point) => {
            let seconds = point.finished.since(point.started).as_secs_f64();
            report.line(&backed_up(&point, seconds));
        }
        Told::Failed(database, why) => report.note(&format!("{database} is not followed: {why}")),
    };
    let progress: Arc<dyn Progress> = session.progress();
    follow_databases(&repository, &request, &session.doors.clock, &progress, &told)?;
    Ok(None)
}

pub(super) fn status(
    workload: &WorkloadRef,
    journals: &[Journal],
    repository: &Repository,
    session: &Session,
) -> Result<()> {
    for span in spans(repository, &workload.id)? {
        session.report.line(&Line::Recoverable(Recoverable {
            workload: workload.name.clone(),
            log: span.log,
            start: span.start.to_string(),
            end: span.end.to_string(),
            from: Some(stamp(span.from)),
            until: Some(stamp(span.until)),
            log_bytes: span.bytes,
        }));
    }
    for journal in journals.iter().filter(|journal| journal.stream().workload.id == workload.id) {
        for hole in journal.holes() {
            let place = |position| Place::from_position(position).unwrap_or_default().to_string();
            session.report.line(&Line::Hole(Hole {
                workload: workload.name.clone(),
                log: journal.stream().name.clone(),
                start: place(&hole.start),
                end: place(&hole.end),
                after: hole.after.map(stamp),
                before: hole.before.map(stamp),
                why: hole.why,
            }));
        }
    }
    Ok(())
}

pub(super) fn restore(
    arguments: &DbRestore,
    workload: &WorkloadRef,
    repository: &Repository,
    session: &mut Session,
) -> Done {
    let until = until(arguments, session)?;
    let Some(to) = &arguments.to else {
        let what = "a database of SQLite is not restored in the place of another";
        return Err(Error::new(Code::Usage, what).hint("name a directory: --to DIR"));
    };
    let to = session.doors.directory.join(to);
    let plan = plan_databases(repository, &workload.id, until, arguments.database.as_deref())?;
    plan.databases
        .iter()
        .filter_map(|database| database.note.as_ref())
        .for_each(|note| session.report.note(note));
    if arguments.dry_run {
        for database in &plan.databases {
            let what = format!(
                "restore {} from point {} of {} to {}",
                database.base.name,
                database.point.id,
                workload.name,
                to.display()
            );
            session.report.line(&Line::WouldDo(WouldDo { what }));
        }
        return Ok(None);
    }
    let progress = session.progress();
    let done = restore_databases(repository, &plan, &to, progress.as_ref());
    drop(progress);
    let restored = done?;
    for ((database, place), planned) in restored.databases.iter().zip(&plan.databases) {
        let of_it = restored.damage.iter().filter(|(name, _)| name == database);
        session.report.line(&Line::DatabaseRestored(DatabaseRestored {
            point: planned.point.id.to_string(),
            workload: workload.name.clone(),
            database: database.clone(),
            directory: to.display().to_string(),
            place: place.map(|place| place.to_string()),
            damage: of_it.map(|(_, what)| what.clone()).collect(),
        }));
    }
    Ok((!restored.damage.is_empty()).then_some(Code::Integrity))
}

fn until(arguments: &DbRestore, session: &Session) -> Result<Until> {
    if arguments.lsn.is_some() || arguments.before.is_some() || arguments.consistent {
        return Err(Error::new(Code::Usage, "SQLite's logs have neither LSNs nor numbered transactions")
            .hint("choose a moment with --at, or a commit with --position"));
    }
    if let Some(text) = &arguments.at {
        let time = parse_time(text, &session.zone);
        let wrong = || {
            Error::new(Code::Usage, format!("{text:?} is not a moment"))
                .hint("write it as in '2026-11-22 10:41:07' or '2026-11-22 10:41:07+01:00'")
        };
        return Ok(Until::Time(time.ok_or_else(wrong)?));
    }
    let Some(text) = &arguments.position else { return Ok(Until::End) };
    let wrong = |()| {
        Error::new(Code::Usage, format!("{text:?} is not a place in a log"))
            .hint("write it as mainstay db status does: 3:427")
    };
    Ok(Until::Place(text.parse().map_err(wrong)?))
}
