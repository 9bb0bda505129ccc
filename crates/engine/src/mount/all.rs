//! A whole repository as a tree: `WORKLOAD/TIME/…`, and `WORKLOAD/latest`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use mainstay_core::{Blocks, Clock, Code, Error, ItemPath, Kind, Metadata, PathError, PointId, Result, Time};
use mainstay_repository::{PointInfo, Repository};

use super::{Shown, Tree};
use crate::undo::is_undo;
use crate::view::PointView;

/// The link to the newest point of a workload.
const LATEST: &[u8] = b"latest";
/// How long a list of points is good for.
const FRESH: Duration = Duration::from_secs(2);
/// Points that stay open although nobody looks into them right now.
const OPEN_MAX: usize = 16;

/// Opens what lies in a point.
pub type OpenPoint = Box<dyn Fn(&PointInfo) -> Result<Arc<dyn PointView>> + Send + Sync>;

/// Every readable point of every workload. Points are opened when somebody looks into them; those that are made
/// meanwhile appear.
pub struct All {
    repository: Arc<Repository>,
    clock: Arc<dyn Clock>,
    zone: TimeZone,
    open: OpenPoint,
    listing: Mutex<Option<(Duration, Arc<Listing>)>>,
    /// The one that was used last is the last one.
    views: Mutex<Vec<(PointId, Arc<dyn PointView>)>>,
}

/// Workloads by the names of their directories, each with its points, oldest first.
type Listing = BTreeMap<Vec<u8>, Vec<(Vec<u8>, PointInfo)>>;

/// What a path means.
enum Place<'a> {
    Top,
    Workload(&'a [(Vec<u8>, PointInfo)]),
    /// The name of the newest point's directory.
    Latest(&'a [u8], &'a PointInfo),
    Point(&'a PointInfo, ItemPath),
}

fn lock<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}

impl All {
    pub fn new(repository: Arc<Repository>, clock: Arc<dyn Clock>, zone: TimeZone, open: OpenPoint) -> Self {
        Self { repository, clock, zone, open, listing: Mutex::default(), views: Mutex::default() }
    }

    fn listing(&self) -> Result<Arc<Listing>> {
        let now = self.clock.monotonic();
        let mut kept = lock(&self.listing);
        if let Some((at, listing)) = kept.as_ref()
            && now.saturating_sub(*at) < FRESH
        {
            return Ok(Arc::clone(listing));
        }
        self.repository.refresh()?;
        let listing = Arc::new(list(&self.repository.points()?, &self.zone));
        *kept = Some((now, Arc::clone(&listing)));
        Ok(listing)
    }

    fn view(&self, point: &PointInfo) -> Result<Arc<dyn PointView>> {
        let mut views = lock(&self.views);
        if let Some(at) = views.iter().position(|(id, _)| *id == point.id) {
            let used = views.remove(at);
            let view = Arc::clone(&used.1);
            views.push(used);
            return Ok(view);
        }
        drop(views);
        let view = (self.open)(point)?;
        let mut views = lock(&self.views);
        views.push((point.id, Arc::clone(&view)));
        let oldest = (views.len() > OPEN_MAX).then(|| views.remove(0));
        drop(views);
        // Closing may take a moment; others need not wait for it.
        drop(oldest);
        Ok(view)
    }
}

/// Every workload's points by the local times that they stand for.
fn list(points: &[PointInfo], zone: &TimeZone) -> Listing {
    let mut names: BTreeMap<_, Vec<u8>> = BTreeMap::new();
    let mut listing = Listing::new();
    for point in points.iter().filter(|point| point.readable && !is_undo(point)) {
        let workload = &point.workload;
        let name = names.entry(workload.id).or_insert_with(|| {
            let plain = file_name(&workload.name);
            if listing.contains_key(&plain) { numbered(&plain, &workload.id.to_string()) } else { plain }
        });
        let own = listing.entry(name.clone()).or_default();
        let plain = time_name(point.moment, zone);
        let taken: BTreeSet<&[u8]> = own.iter().map(|(name, _)| name.as_slice()).collect();
        let name =
            if taken.contains(plain.as_slice()) { numbered(&plain, &point.id.to_string()) } else { plain };
        own.push((name, point.clone()));
    }
    listing
}

fn time_name(moment: Time, zone: &TimeZone) -> Vec<u8> {
    let time = Timestamp::from_nanosecond(moment.0.into()).unwrap_or_default().to_zoned(zone.clone());
    time.strftime("%Y-%m-%dT%H:%M:%S").to_string().into_bytes()
}

/// A name that a directory can have.
fn file_name(name: &str) -> Vec<u8> {
    match name {
        "" | "." | ".." => b"_".to_vec(),
        _ => name.replace(['/', '\0'], "_").into_bytes(),
    }
}

/// A name told from an equal one by the first digits of an id.
fn numbered(name: &[u8], id: &str) -> Vec<u8> {
    [name, b"~", id.get(..8).unwrap_or(id).as_bytes()].concat()
}

/// What a path means in a listing.
fn place<'a>(listing: &'a Listing, path: &ItemPath) -> Option<Place<'a>> {
    let mut names = path.components();
    let Some(workload) = names.next() else { return Some(Place::Top) };
    let points = listing.get(workload)?;
    let Some(point) = names.next() else { return Some(Place::Workload(points)) };
    if point == LATEST {
        let (name, info) = points.iter().max_by_key(|(_, point)| (point.moment, point.log_sequence))?;
        return names.next().is_none().then_some(Place::Latest(name, info));
    }
    let (_, info) = points.iter().find(|(name, _)| name == point)?;
    let rest: Vec<&[u8]> = names.collect();
    Some(Place::Point(info, ItemPath::new(rest.join(&b'/')).ok()?))
}

/// A directory of ours, or with a target the link.
fn ours(path: ItemPath, modified: Time, target: Option<&[u8]>) -> Shown {
    let kind = if target.is_some() { Kind::Symlink } else { Kind::Directory };
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let link_target = target.map(<[u8]>::to_vec);
    let metadata = Metadata { mode: 0o555, uid, gid, modified, link_target, ..Metadata::new(kind) };
    Shown { path, metadata, world: 0, lasting: false }
}

/// What a point has at a path, at its place in the whole.
fn inside(point: &PointInfo, found: Shown, path: ItemPath) -> Shown {
    let world = point.id.0.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    Shown { path, world, ..found }
}

fn newest(points: &[(Vec<u8>, PointInfo)]) -> Time {
    points.iter().map(|(_, point)| point.moment).max().unwrap_or_default()
}

fn impossible(error: PathError) -> Error {
    Error::integrity("a name in a point is impossible").because(error)
}

impl Tree for All {
    fn look(&self, path: &ItemPath) -> Result<Option<Shown>> {
        let listing = self.listing()?;
        let path = path.clone();
        Ok(match place(&listing, &path) {
            None => None,
            Some(Place::Top) => Some(ours(path, Time::default(), None)),
            Some(Place::Workload(points)) => Some(ours(path, newest(points), None)),
            Some(Place::Latest(name, point)) => Some(ours(path, point.moment, Some(name))),
            Some(Place::Point(point, within)) if within.is_root() => Some(ours(path, point.moment, None)),
            Some(Place::Point(point, within)) => {
                let seen = self.view(point)?.lookup(&within)?;
                seen.map(|seen| inside(point, Shown::from(seen), path))
            }
        })
    }

    fn list(&self, directory: &ItemPath) -> Result<Vec<Shown>> {
        let listing = self.listing()?;
        let below = |name: &[u8]| directory.join(name).map_err(impossible);
        match place(&listing, directory) {
            Some(Place::Top) => {
                let each = listing.iter();
                each.map(|(name, points)| Ok(ours(below(name)?, newest(points), None))).collect()
            }
            Some(Place::Workload(points)) => {
                let mut shown = Vec::with_capacity(points.len() + 1);
                for (name, point) in points {
                    shown.push(ours(below(name)?, point.moment, None));
                }
                shown.extend(self.look(&below(LATEST)?)?);
                Ok(shown)
            }
            Some(Place::Point(point, within)) => {
                let seen = self.view(point)?.list(&within)?.into_iter().map(Shown::from);
                seen.map(|seen| {
                    let path = below(seen.path.name())?;
                    Ok(inside(point, seen, path))
                })
                .collect()
            }
            Some(Place::Latest(..)) | None => Err(missing(directory)),
        }
    }

    fn content(&self, path: &ItemPath) -> Result<Arc<dyn Blocks>> {
        match place(self.listing()?.as_ref(), path) {
            Some(Place::Point(point, within)) => self.view(point)?.content(&within),
            _ => Err(missing(path)),
        }
    }
}

fn missing(path: &ItemPath) -> Error {
    Error::new(Code::NotFound, format!("there is no /{path} in the repository"))
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;
    use mainstay_core::ItemPath;

    use super::{Place, list, place};
    use crate::testing::point;

    #[test]
    fn points_are_named_by_their_times_and_equal_names_are_told_apart() {
        let mut points = vec![
            point(1, "web", "2026-11-01T10:00:00Z"),
            point(2, "web", "2026-11-02T10:00:00Z"),
            point(3, "web", "2026-11-02T10:00:00Z"),
            point(4, "a/b", "2026-11-02T10:00:00Z"),
            point(5, "undo", "2026-11-02T10:00:00Z"),
        ];
        points[4].workload.kind.0 = crate::undo::UNDO.into();
        let zone = TimeZone::get("Europe/Berlin").unwrap();
        let listing = list(&points, &zone);
        let names = |workload: &str| -> Vec<String> {
            let points = listing[workload.as_bytes()].iter();
            points.map(|(name, _)| String::from_utf8(name.clone()).unwrap()).collect()
        };
        let twin = format!("2026-11-02T11:00:00~{}", &points[2].id.to_string()[..8]);
        assert_eq!(names("web"), ["2026-11-01T11:00:00", "2026-11-02T11:00:00", &twin]);
        assert_eq!(listing.keys().collect::<Vec<_>>(), [b"a_b", &b"web"[..]]);
        let at = |path: &str| place(&listing, &ItemPath::new(path).unwrap());
        assert!(matches!(at("web/latest"), Some(Place::Latest(name, _)) if name == twin.as_bytes()));
        assert!(at("web/latest/etc").is_none() && at("db").is_none() && at("web/2026-11-03").is_none());
        let Some(Place::Point(found, within)) = at("web/2026-11-02T11:00:00/etc/motd") else {
            panic!("none")
        };
        assert_eq!((found.id, within.to_string()), (points[1].id, "etc/motd".to_owned()));
    }
}
