//! `mainstay db` for MariaDB servers.

use std::sync::Arc;

use mainstay_core::{Code, Error, Progress, Result, WorkloadRef};
use mainstay_engine::address::parse_time;
use mainstay_engine::follow::Closing;
use mainstay_engine::mariadb::{
    FollowServer, ServerBackup, Until, backup_server, follow_server, plan_server, restore_server, spans,
    workload,
};
use mainstay_repository::{Journal, Repository};
use mainstay_workloads::mariadb::{Address, LogFile, Login, Place};

use super::super::{Done, backup as files, check_tag, duration};
use crate::args::{DbBackup, DbFollow, DbRestore, Server};
use crate::report::databases::{Following, Hole, Recoverable, ServerCaptured, ServerRestored};
use crate::report::lines::{BackedUp, Line, Roots, Totals, WouldDo, stamp};
use crate::secrets;
use crate::session::Session;

/// The server, as whom to speak to it, and what the workload is called.
fn known(arguments: &Server, session: &Session) -> Result<(Login, String)> {
    if arguments.slot.is_some() {
        return Err(Error::new(Code::Usage, "MariaDB has no replication slots")
            .hint("its logs are kept for as long as binlog_expire_logs_seconds says"));
    }
    let address: Address = arguments.server.parse()?;
    let user = address.user.clone().or_else(|| session.doors.environment.user.clone());
    let password = match &arguments.password_file {
        Some(path) => Some(secrets::first_line_of(&session.doors.directory.join(path))?),
        None => None,
    };
    let host = || address.host.clone().unwrap_or_else(|| session.doors.host.clone());
    let name = arguments.name.clone().unwrap_or_else(host);
    files::check_name(&name)?;
    Ok((Login { user: user.unwrap_or_else(|| "root".into()), address, password }, name))
}

pub(super) fn backup(arguments: &DbBackup, session: &mut Session) -> Done {
    let places = session.places()?;
    arguments.tag.iter().try_for_each(|tag| check_tag(tag))?;
    let (login, name) = known(&arguments.server, session)?;
    let repository = files::open(session, &places, false)?;
    let request = ServerBackup {
        host: session.doors.host.clone(),
        name,
        server: format!("mariadb://{}", login.address.display()),
        tags: arguments.tag.clone(),
        replica: arguments.replica,
        jobs: std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
    };
    let began = session.doors.clock.monotonic();
    let progress: Arc<dyn Progress> = session.progress();
    let done = backup_server(&repository, &login, &request, &session.doors.clock, &progress);
    drop(progress);
    let made = done?;
    let (point, description) = (made.point, made.description);
    let place = description
        .log
        .clone()
        .map(|base| format!("{}:{}", LogFile { base, number: description.file }, description.offset));
    session.report.line(&Line::ServerCaptured(ServerCaptured {
        point: point.id.to_string(),
        workload: point.workload.name.clone(),
        version: description.version,
        place,
        gtid: Some(description.gtid).filter(|gtid| !gtid.is_empty()),
        replica: request.replica,
    }));
    session.report.line(&Line::BackedUp(BackedUp {
        point: point.id.to_string(),
        workload: point.workload.name.clone(),
        host: point.host.clone(),
        roots: Roots::of(&point.roots),
        tags: request.tags,
        counts: Totals::from(&point.counts),
        seconds: session.seconds_since(began),
    }));
    Ok(None)
}

pub(super) fn follow(arguments: &DbFollow, session: &mut Session) -> Done {
    let places = session.places()?;
    let closing = Closing { after: duration(&arguments.every)?, ..Closing::default() };
    let (login, name) = known(&arguments.server, session)?;
    let repository = files::open(session, &places, false)?;
    session
        .report
        .line(&Line::Following(Following { workload: name.clone(), server: login.address.display() }));
    let request = FollowServer { workload: workload(&name), closing };
    let progress: Arc<dyn Progress> = session.progress();
    follow_server(&repository, &login, &request, &session.doors.clock, progress.as_ref())?;
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
        return Err(Error::new(Code::Usage, "MariaDB servers are restored to a new directory")
            .hint("restore with --to, stop the server, and put the directory in the place of the old one"));
    };
    let to = session.doors.directory.join(to);
    let plan = plan_server(repository, &workload.id, until)?;
    plan.note.iter().for_each(|note| session.report.note(note));
    if arguments.dry_run {
        let what = format!(
            "restore point {} of {}, MariaDB {}, to {}, and play back its log",
            plan.point.id,
            workload.name,
            plan.description.version,
            to.display()
        );
        session.report.line(&Line::WouldDo(WouldDo { what }));
        return Ok(None);
    }
    let began = session.doors.clock.monotonic();
    let progress = session.progress();
    let done = restore_server(repository, &plan, &to, &session.doors.clock, progress.as_ref());
    drop(progress);
    let restored = done?;
    session.report.line(&Line::ServerRestored(ServerRestored {
        point: plan.point.id.to_string(),
        workload: workload.name.clone(),
        version: plan.description.version.clone(),
        directory: to.display().to_string(),
        place: restored.place,
        items: restored.counts.items,
        bytes: restored.counts.bytes,
        seconds: session.seconds_since(began),
    }));
    Ok(None)
}

fn until(arguments: &DbRestore, session: &Session) -> Result<Until> {
    if arguments.lsn.is_some() || arguments.before.is_some() || arguments.database.is_some() {
        return Err(Error::new(Code::Usage, "that is not how moments of a MariaDB server are chosen").hint(
            "choose a moment with --at, a transaction with --gtid, or a place in the log with --position",
        ));
    }
    if let Some(text) = &arguments.at {
        let time = parse_time(text, &session.zone);
        let wrong = || {
            Error::new(Code::Usage, format!("{text:?} is not a moment"))
                .hint("write it as in '2026-11-22 10:41:07' or '2026-11-22 10:41:07+01:00'")
        };
        return Ok(Until::Time(time.ok_or_else(wrong)?));
    }
    if let Some(text) = &arguments.gtid {
        let wrong = |()| {
            Error::new(Code::Usage, format!("{text:?} is not the name of a transaction"))
                .hint("write it as in 0-1-4711: domain, server, number")
        };
        return Ok(Until::Gtid(text.parse().map_err(wrong)?));
    }
    let Some(text) = &arguments.position else {
        return Ok(if arguments.consistent { Until::Consistent } else { Until::End });
    };
    let place = text.rsplit_once(':').and_then(|(file, offset)| {
        let number = file.rsplit('.').next().unwrap_or(file);
        Some(Until::Place(number.parse().ok()?, offset.parse().ok()?))
    });
    place.ok_or_else(|| {
        Error::new(Code::Usage, format!("{text:?} is not a place in a log"))
            .hint("write it as in mariadb-bin.000034:1588")
    })
}
