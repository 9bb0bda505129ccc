//! `mainstay verify`.

use mainstay_core::{Error, PointId, Result};
use mainstay_engine::verify::verify;

use super::{Done, number};
use crate::args::Verify;
use crate::report::lines::{self, Damage, Line};
use crate::session::Session;

pub(super) fn run(arguments: &Verify, session: &mut Session) -> Done {
    let repository = session.open()?;
    let all = repository.points()?;
    let find = |text: &String| session.point(text, &all).map(|point| point.id);
    let chosen: Vec<PointId> = arguments.points.iter().map(find).collect::<Result<_>>()?;
    let began = session.doors.clock.monotonic();
    let progress = session.progress();
    let report = verify(&repository, chosen, arguments.read_data, progress.as_ref());
    drop(progress);
    let report = report?;
    for what in &report.problems {
        session.report.line(&Line::Damage(Damage {
            what: what.clone(),
            point: None,
            path: None,
            path_base64: None,
        }));
    }
    for what in &report.degraded {
        session.report.note(&format!("damaged, and nothing is lost: {what}"));
    }
    for (path, points) in &report.lost {
        let lines::Path { path, path_base64 } = lines::Path::of(path);
        for point in points {
            session.report.line(&Line::Damage(Damage {
                what: "cannot be restored whole".to_owned(),
                point: Some(point.to_string()),
                path: Some(path.clone()),
                path_base64: path_base64.clone(),
            }));
        }
    }
    session.report.line(&Line::Verified(lines::Verified {
        points: report.points,
        sound: number(report.sound.len()),
        read_data: arguments.read_data,
        packs: report.packs,
        bytes: report.bytes_read,
        damage: number(report.problems.len()),
        rewritten: report.rewritten,
        seconds: session.seconds_since(began),
    }));
    if report.is_sound() {
        return Ok(None);
    }
    let hint = "points that were not named are sound; back up again to store lost content anew, and look at the \
                medium";
    Err(Error::integrity("stored bytes are damaged").hint(hint))
}
