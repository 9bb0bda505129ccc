//! `mainstay ls`, `cat` and `find`: looking into points.

use mainstay_core::{Code, Error, ItemPath, Kind, Piece, Result, Skip, SkipReason};
use mainstay_engine::address::of_workload;
use mainstay_engine::find::{self as engine, Pattern};
use mainstay_engine::view::{PointView, Seen, not_found};
use mainstay_engine::vm::timeline;
use mainstay_repository::PointInfo;

use super::{Done, item_path};
use crate::args::{Cat, Find, Ls};
use crate::inside::Looking;
use crate::report::lines::{self, Content, Found, Line, shown, stamp};
use crate::session::Session;

/// Bytes read and written at once.
const PIECE: usize = 256 << 10;

pub(super) fn ls(arguments: &Ls, session: &mut Session) -> Done {
    let path = arguments.path.as_deref().map_or(Ok(ItemPath::root()), item_path)?;
    let (_repository, view) = session.open_view(&arguments.point, arguments.image_only, &arguments.inside)?;
    let view = view.as_ref();
    let is_directory = path.is_root() || entry(view, &path)?.metadata.kind == Kind::Directory;
    if is_directory && !arguments.recursive {
        match view.list(&path) {
            Ok(entries) => {
                let rows: Vec<Line> =
                    entries.iter().map(|entry| Line::Item(lines::Item::from(entry))).collect();
                session.report.table(&rows);
                return Ok(None);
            }
            // Looking at all that is below it goes on behind the damage.
            Err(error) if error.code() == Code::Integrity => {}
            Err(error) => return Err(error),
        }
    }
    let mut damage = Vec::new();
    for entry in view.walk(&path)? {
        match entry {
            Ok(entry) if arguments.recursive || entry.path.parent().as_ref() == Some(&path) => {
                session.report.line(&Line::Item(lines::Item::from(&entry)));
            }
            Ok(entry) if !is_directory => session.report.line(&Line::Item(lines::Item::from(&entry))),
            Ok(_) => {}
            Err(error) if error.code() == Code::Integrity => damage.push(error.chain().join(": ")),
            Err(error) => return Err(error),
        }
        session.check_cancelled()?;
        if session.report.closed() {
            return Ok(None);
        }
    }
    if damage.is_empty() {
        return Ok(None);
    }
    for detail in damage {
        session.report.skipped(&Skip { path: path.clone(), reason: SkipReason::Damaged, detail });
    }
    session.report.more_skips("--verbose lists all");
    Err(Error::integrity("parts of the tree are damaged, and what is in them is not listed")
        .hint("see what else is hurt: mainstay verify --read-data"))
}

fn entry(view: &dyn PointView, path: &ItemPath) -> Result<Seen> {
    view.lookup(path)?.ok_or_else(|| not_found(view, path))
}

pub(super) fn cat(arguments: &Cat, session: &mut Session) -> Done {
    let (_repository, view) = session.open_view(&arguments.point, arguments.image_only, &arguments.inside)?;
    let view = view.as_ref();
    for path in &arguments.paths {
        let path = item_path(path)?;
        let entry = entry(view, &path)?;
        if entry.has_body {
            write(session, view, &path)?;
        } else if entry.metadata.kind != Kind::File {
            return Err(Error::new(Code::Usage, format!("{} has no content", shown(&path))).hint(format!(
                "list it: mainstay ls {} {}",
                arguments.point,
                shown(&path)
            )));
        }
    }
    Ok(None)
}

fn write(session: &Session, view: &dyn PointView, path: &ItemPath) -> Result<()> {
    let mut stream = view.open(path)?;
    let mut buffer = vec![0; PIECE];
    let zeros = vec![0; PIECE];
    let emit = |bytes: &[u8]| {
        if session.report.json() {
            let (path, base64) = (lines::Path::of(path), lines::base64(bytes));
            session.report.line(&Line::Content(Content { path, base64 }));
        } else {
            session.report.raw(bytes);
        }
    };
    loop {
        session.check_cancelled()?;
        if session.report.closed() {
            return Ok(());
        }
        match stream.read(&mut buffer)? {
            Piece::Data(length) => emit(buffer.get(..length).unwrap_or_default()),
            Piece::Hole(mut length) => {
                while length > 0 && !session.report.closed() {
                    session.check_cancelled()?;
                    let part = usize::try_from(length).unwrap_or(PIECE).min(PIECE);
                    emit(zeros.get(..part).unwrap_or_default());
                    length -= super::number(part);
                }
            }
            Piece::End => return Ok(()),
        }
    }
}

pub(super) fn find(arguments: &Find, session: &mut Session) -> Done {
    let pattern = Pattern::new(&arguments.pattern, arguments.ignore_case)?;
    let repository = session.open()?;
    let all = repository.points()?;
    let points: Vec<PointInfo> = match &arguments.workload {
        Some(name) => timeline(&of_workload(name, &all)?, &all).into_iter().cloned().collect(),
        None => all,
    };
    let progress = session.progress();
    let mut states: u64 = 0;
    let looking = Looking::within(&arguments.inside, &mut session.doors)?;
    let report = &session.report;
    let mut lost = |point: &PointInfo, what: &str| {
        report.say(&format!("{} of {}: {what}", point.workload.name, stamp(point.moment)));
    };
    let mut each = |found: engine::Found| {
        states += 1;
        report.line(&Line::Found(Found {
            item: lines::Item::from(&found.item),
            workload: found.newest.workload.name.clone(),
            newest: found.newest.id.to_string(),
            newest_moment: stamp(found.newest.moment),
            oldest: found.oldest.id.to_string(),
            oldest_moment: stamp(found.oldest.moment),
            points: found.points,
        }));
        if report.closed() { Err(Error::new(Code::Cancelled, "nobody reads on")) } else { Ok(()) }
    };
    let searched = looking.with(|inside| {
        let disks = engine::Disks { inside, lost: &mut lost };
        engine::find(&repository, &points, &pattern, disks, progress.as_ref(), &mut each)
    });
    drop(progress);
    if report.closed() {
        return Ok(None);
    }
    searched?;
    if states == 0 {
        let what = format!("no point has an item called {}", arguments.pattern.display());
        return Err(Error::new(Code::NotFound, what).hint(
            "patterns have * ? [ ] and **; one with a / is matched against the path; see --ignore-case",
        ));
    }
    Ok(None)
}
