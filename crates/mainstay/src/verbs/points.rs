//! `mainstay points …`.

use mainstay_core::{Code, Error, ItemPath, Result, Time, WorkloadRef};
use mainstay_engine::address::{of_workload, parse_time};
use mainstay_engine::postgres::KIND;
use mainstay_engine::undo::UNDO;
use mainstay_engine::vm::timeline;
use mainstay_repository::{Change, ChangeKind, Note, PointInfo, Repository, diff};

use super::db::status::spans;
use super::{Done, check_tag, item_path, would};
use crate::args::{Points, PointsAct, PointsList};
use crate::report::lines::{self, Difference, Line};
use crate::session::Session;

pub(super) fn run(arguments: Points, session: &mut Session) -> Done {
    match arguments.act.unwrap_or(PointsAct::List(arguments.list)) {
        PointsAct::List(only) => list(&only, session),
        PointsAct::Show { point } => show(&point, session),
        PointsAct::Diff { old, new, path } => {
            let within = path.as_deref().map_or(Ok(ItemPath::root()), item_path)?;
            differences(&old, &new, &within, session)
        }
        PointsAct::Tag { point, tags, dry_run } => {
            tags.iter().try_for_each(|tag| check_tag(tag))?;
            let what = format!("tag it {}", tags.join(" "));
            note(session, &point, tags.into_iter().map(Note::Tag).collect(), &what, dry_run)
        }
        PointsAct::Untag { point, tags, dry_run } => {
            let what = format!("take the tags {} from it", tags.join(" "));
            note(session, &point, tags.into_iter().map(Note::Untag).collect(), &what, dry_run)
        }
        PointsAct::Hold { point, reason, until, dry_run } => {
            let until = until.map(|text| moment(&text, session)).transpose()?;
            note(session, &point, vec![Note::Hold { reason, until }], "hold it", dry_run)
        }
        PointsAct::Release { point, hold, dry_run } => release(session, &point, hold.as_deref(), dry_run),
    }
}

fn list(only: &PointsList, session: &mut Session) -> Done {
    let repository = session.open()?;
    let points = repository.points()?;
    let chosen: Vec<&PointInfo> = match (&only.of, &only.workload) {
        (Some(name), _) => timeline(&of_workload(name, &points)?, &points),
        (None, Some(name)) => of_workload(name, &points)?,
        (None, None) => points.iter().filter(|point| only.undo || point.workload.kind.0 != UNDO).collect(),
    };
    let tagged =
        |point: &&&PointInfo| only.tag.is_empty() || point.tags.iter().any(|tag| only.tag.contains(tag));
    let rows: Vec<Line> = chosen.iter().filter(tagged).map(|point| line(point)).collect();
    if rows.is_empty() {
        session.report.say("There are no such points. Make one: mainstay backup PATH");
    }
    session.report.table(&rows);
    let shown = |workload: &WorkloadRef| chosen.iter().any(|point| point.workload.id == workload.id);
    if chosen.iter().any(|point| point.workload.kind.0 == KIND && point.readable) {
        spans(session, &repository, &points, &shown)?;
    }
    Ok(None)
}

fn line(point: &PointInfo) -> Line {
    Line::Point(Box::new(lines::Point::from(point)))
}

fn show(point: &str, session: &mut Session) -> Done {
    let repository = session.open()?;
    let point = session.point(point, &repository.points()?)?;
    session.report.line(&line(&point));
    if point.readable {
        for skip in repository.read(&point.id)?.skips()? {
            session.report.line(&Line::Skipped(lines::Skipped::from(&skip)));
        }
    }
    Ok(None)
}

fn differences(old: &str, new: &str, within: &ItemPath, session: &mut Session) -> Done {
    let repository = session.open()?;
    let points = repository.points()?;
    let old = repository.read(&session.point(old, &points)?.id)?;
    let new = repository.read(&session.point(new, &points)?.id)?;
    for change in diff(&old, &new, within)? {
        if let Some(line) = difference(&change?) {
            session.report.line(&line);
        }
        session.check_cancelled()?;
        if session.report.closed() {
            break;
        }
    }
    Ok(None)
}

/// `None` for what no person would call different: a stamp that moved.
fn difference(change: &Change) -> Option<Line> {
    let word = match change.kind {
        ChangeKind::Added => "added",
        ChangeKind::Removed => "removed",
        ChangeKind::Content => "content",
        ChangeKind::Metadata => {
            let (old, new) = (change.old.as_ref()?, change.new.as_ref()?);
            if old.metadata == new.metadata {
                return None;
            }
            "metadata"
        }
    };
    Some(Line::Difference(Difference {
        path: lines::Path::of(&change.path),
        change: word.to_owned(),
        old_size: change.old.as_ref().map(|entry| entry.metadata.size),
        new_size: change.new.as_ref().map(|entry| entry.metadata.size),
    }))
}

fn moment(text: &str, session: &Session) -> Result<Time> {
    parse_time(text, &session.zone).ok_or_else(|| {
        Error::new(Code::Usage, format!("{text:?} is not a time"))
            .hint("write it as in 2027-06-30, 2027-06-30T18:00 or 2027-06-30T16:00:00Z")
    })
}

/// Appends facts to a point and shows it as it is then.
fn note(session: &mut Session, point: &str, notes: Vec<Note>, what: &str, dry_run: bool) -> Done {
    let repository = session.open()?;
    let point = session.point(point, &repository.points()?)?;
    if dry_run {
        return would(session, &format!("point {} of {}: {what}", point.id, point.workload.name));
    }
    notes.iter().try_for_each(|note| repository.note(&point.id, note))?;
    again(session, &repository, &point)
}

fn again(session: &Session, repository: &Repository, point: &PointInfo) -> Done {
    let points = repository.points()?;
    let now: Vec<Line> = points.iter().filter(|other| other.id == point.id).map(line).collect();
    session.report.table(&now);
    Ok(None)
}

fn release(session: &mut Session, point: &str, hold: Option<&str>, dry_run: bool) -> Done {
    let repository = session.open()?;
    let point = session.point(point, &repository.points()?)?;
    let start = hold.unwrap_or_default().to_ascii_lowercase();
    let chosen: Vec<_> = point.holds.iter().filter(|hold| hold.id.to_string().starts_with(&start)).collect();
    match (chosen.as_slice(), hold) {
        ([], _) => Err(Error::new(Code::NotFound, format!("point {} has no such hold", point.id))
            .hint(format!("see which it has: mainstay points show {}", point.id))),
        ([_, _, ..], Some(start)) => {
            Err(Error::new(Code::Usage, format!("{start} can mean several holds"))
                .hint("write more of the id"))
        }
        (holds, _) if dry_run => {
            would(session, &format!("point {}: end {} of its holds", point.id, holds.len()))
        }
        (holds, _) => {
            holds.iter().try_for_each(|hold| repository.note(&point.id, &Note::Release(hold.id)))?;
            again(session, &repository, &point)
        }
    }
}
