//! `mainstay mount`.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mainstay_core::{Error, ItemPath, Result};
use mainstay_engine::mount::{All, Lease, Mounted, Point, Tree, Trouble};
use mainstay_engine::view::PointView;
use mainstay_engine::vm::{self, MachineView};
use mainstay_repository::{PointInfo, Repository};

use super::Done;
use crate::args::Mount;
use crate::inside::Looking;
use crate::report::Report;
use crate::report::lines::{self, Line};
use crate::session::Session;

/// How often it is looked whether the mount is to end.
const TICK: Duration = Duration::from_millis(100);
/// So many different troubles are told, each once.
const TROUBLES_MAX: usize = 1000;

pub(super) fn run(arguments: &Mount, session: &mut Session) -> Done {
    let directory = session.doors.directory.join(&arguments.directory);
    let (tree, lease, point) = match &arguments.point {
        Some(text) => {
            let (repository, view) = session.open_view(text, arguments.image_only, &arguments.inside)?;
            let point = view.info().clone();
            let reason = format!("mounted at {}", directory.display());
            let lease = lease(session, &Arc::new(repository), &point, &reason);
            (Arc::new(Point(view)) as Arc<dyn Tree>, lease, Some(point.id.to_string()))
        }
        None => (everything(arguments, session)?, None, None),
    };
    let mounted = Mounted::new(tree, &directory, arguments.everybody, trouble(&session.report))?;
    let shown = directory.display().to_string();
    session.report.line(&Line::Mounted(lines::Mounted { directory: shown.clone(), point }));
    session.report.say(&format!("It ends with Ctrl-C, or umount {shown}."));
    let outcome = stand_by(&mounted, lease, session);
    mounted.join()?;
    outcome.map(|()| None)
}

/// Waits for the end, renewing the lease meanwhile.
fn stand_by(mounted: &Mounted, mut lease: Option<Lease>, session: &Session) -> Result<()> {
    let clock = &session.doors.clock;
    while !mounted.is_over() && !session.doors.cancel.asked() {
        renew(&mut lease, session);
        clock.sleep(TICK);
    }
    if !mounted.is_over() {
        mounted.detach()?;
        let began = clock.monotonic();
        let mut told = false;
        while !mounted.is_over() {
            if !told && session.seconds_since(began) > 1.0 {
                told = true;
                session.report.say("Somebody still reads in it; it ends with them, or with a second Ctrl-C.");
            }
            clock.sleep(TICK);
        }
    }
    // A key without the power to release leaves the hold to its own end.
    let _released = lease.map(Lease::release);
    Ok(())
}

/// Every point of the repository.
fn everything(arguments: &Mount, session: &mut Session) -> Result<Arc<dyn Tree>> {
    let repository = Arc::new(session.open()?);
    let looking = Looking::within(&arguments.inside, &mut session.doors)?;
    let (report, own) = (Arc::clone(&session.report), Arc::clone(&repository));
    let open = move |point: &PointInfo| open(&own, &looking, &report, point);
    let clock = Arc::clone(&session.doors.clock);
    Ok(Arc::new(All::new(repository, clock, session.zone.clone(), Box::new(open))))
}

fn open(
    repository: &Repository,
    looking: &Looking,
    report: &Report,
    point: &PointInfo,
) -> Result<Arc<dyn PointView>> {
    let reader = repository.read(&point.id)?;
    if point.workload.kind.0 != vm::KIND {
        return Ok(Arc::new(reader));
    }
    let view = looking.with(|inside| MachineView::open(reader, inside))?;
    view.notes().iter().for_each(|note| report.say(&format!("{}: {note}", point.workload.name)));
    Ok(Arc::new(view))
}

/// Keeps the point from expiring while it is used, if this key may do so.
pub(super) fn lease(
    session: &Session,
    repository: &Arc<Repository>,
    point: &PointInfo,
    reason: &str,
) -> Option<Lease> {
    let reason = format!("{reason} on {} (process {})", session.doors.host, std::process::id());
    match Lease::take(repository, &session.doors.clock, point.id, reason) {
        Ok(lease) => Some(lease),
        Err(error) => {
            session.report.note(&not_held(&error));
            None
        }
    }
}

/// Holds the point for longer, if there is a need.
pub(super) fn renew(lease: &mut Option<Lease>, session: &Session) {
    if let Some(error) = lease.as_mut().and_then(|lease| lease.renew().err()) {
        session.report.note(&not_held(&error));
        *lease = None;
    }
}

fn not_held(error: &Error) -> String {
    format!("the point may expire while it is in use: {}", error.chain().join(": "))
}

/// Tells of what cannot be read, once each.
fn trouble(report: &Arc<Report>) -> Trouble {
    let (report, told) = (Arc::clone(report), Mutex::new(HashSet::new()));
    Box::new(move |path: &ItemPath, error: &Error| {
        let text = format!("/{path}: {}", error.chain().join(": "));
        let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() < TROUBLES_MAX && told.insert(text.clone()) {
            report.note(&text);
        }
    })
}
