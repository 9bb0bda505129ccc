//! Images and files of one machine as one timeline: which points of files belong to which machine, and which of them are
//! shown with an image.
//!
//! A point of files names its machine by a tag, `machine:` and the identity or the name of the machine. Tags can be given
//! later, so that points from before belong to their machine too.

use std::collections::BTreeMap;
use std::sync::Arc;

use mainstay_core::{Code, Error, PointId, Result, Time, WorkloadId};
use mainstay_repository::{PointInfo, Repository};
use mainstay_workloads::{files, vm};

use super::mixed::MixedView;
use super::view::MachineView;
use crate::view::PointView;

/// How the tag that names a machine begins, and so does the root of an image.
const MACHINE: &str = "machine:";

/// The tag of points that hold files of this machine.
pub fn machine_tag(machine: &str) -> String {
    format!("{MACHINE}{machine}")
}

/// A tag of the point that takes a restore back, for each point of newer files that was put on the disks then.
pub fn put_tag(files: &PointId) -> String {
    format!("put:{files}")
}

/// The machine that a point is of, or whose files it holds: an identity, or what a person called it.
pub fn machine_of(point: &PointInfo) -> Option<&str> {
    let texts = match point.workload.kind.0.as_str() {
        vm::KIND => &point.roots,
        files::KIND => &point.tags,
        _ => return None,
    };
    texts.iter().find_map(|text| text.strip_prefix(MACHINE))
}

/// Whether a point holds files of the machine that `image` is of.
fn is_of(files: &PointInfo, image: &PointInfo) -> bool {
    let is_image = image.workload.kind.0 == vm::KIND;
    let named = machine_of(files).filter(|_| is_image && files.workload.kind.0 == files::KIND);
    let identity = machine_of(image);
    named.is_some_and(|named| {
        named == image.workload.name || identity.is_some_and(|known| known.eq_ignore_ascii_case(named))
    })
}

/// The points of a workload and, if it is a machine, those of its files, by the moments that they stand for.
pub fn timeline<'a>(workload: &[&'a PointInfo], points: &'a [PointInfo]) -> Vec<&'a PointInfo> {
    let mut line = workload.to_vec();
    if let Some(image) = workload.last() {
        line.extend(points.iter().filter(|point| is_of(point, image)));
    }
    line.sort_by_key(|point| (point.moment, point.log_sequence));
    line
}

/// What is newer than an image, up to and at `until`: the newest point of each workload of its machine's files, oldest
/// first, so that each lies over those before it. Once the machine was put back, which leaves a point that takes it back, files
/// from before are of a past that was given up, but for those that were put on its disks then.
pub fn newer_files<'a>(image: &PointInfo, points: &'a [PointInfo], until: Time) -> Vec<&'a PointInfo> {
    let mut newest: BTreeMap<WorkloadId, &PointInfo> = BTreeMap::new();
    let own = points.iter().filter(|point| point.workload.id == image.workload.id && point.moment <= until);
    let last = own.max_by_key(|point| point.moment).unwrap_or(image);
    let counts = |point: &&PointInfo| {
        let stands = point.moment > last.moment || last.tags.contains(&put_tag(&point.id));
        point.readable
            && stands
            && (image.moment < point.moment && point.moment <= until)
            && is_of(point, image)
    };
    for point in points.iter().filter(counts) {
        let best = newest.entry(point.workload.id).or_insert(point);
        if point.moment >= best.moment {
            *best = point;
        }
    }
    let mut newest: Vec<&PointInfo> = newest.into_values().collect();
    newest.sort_by_key(|point| (point.moment, point.log_sequence));
    newest
}

/// A share of new points in percent, rounded up: those of the machines that were proven longest ago.
pub fn longest_unproven(mut made: Vec<PointInfo>, points: &[PointInfo], percent: u8) -> Vec<PointInfo> {
    let last_proven = |point: &PointInfo| {
        let same = points.iter().filter(|other| other.workload.id == point.workload.id);
        same.filter_map(|other| other.proven).max()
    };
    made.sort_by_cached_key(last_proven);
    made.truncate((made.len() * usize::from(percent)).div_ceil(100));
    made
}

/// A machine as it is shown: its image, and the newer files over it.
pub struct Composed {
    pub view: Arc<dyn PointView>,
    /// The points whose files lie over the image, lowest first.
    pub files: Vec<PointInfo>,
    /// What is newer and still cannot be shown, each a sentence.
    pub notes: Vec<String>,
}

/// Puts points of files over an image, in this order.
///
/// Errors: those of the repository.
pub fn compose(repository: &Repository, image: MachineView, newer: &[&PointInfo]) -> Result<Composed> {
    let mut view: Arc<dyn PointView> = Arc::new(image);
    let (mut files, mut notes) = (Vec::new(), Vec::new());
    for point in newer {
        match MixedView::new(Arc::clone(&view), repository.read(&point.id)?)? {
            Some(mixed) => {
                view = Arc::new(mixed);
                files.push((*point).clone());
            }
            None => notes.push(untold(point)),
        }
    }
    Ok(Composed { view, files, notes })
}

/// What to say of a point that does not tell which files are gone.
pub(super) fn untold(point: &PointInfo) -> String {
    format!(
        "point {} of {} is newer than the image, but does not tell what it left out: its files are not shown",
        point.id, point.workload.name
    )
}

/// Refuses what nobody could write in an address or read in a list.
///
/// Errors: [`Code::Usage`].
pub fn check_machine(name: &str) -> Result<()> {
    let plain = !name.is_empty() && !name.contains(char::is_control) && name.trim() == name;
    if plain {
        return Ok(());
    }
    Err(Error::new(Code::Usage, format!("a machine cannot be called {name:?}"))
        .hint("give its name as mainstay vm list shows it, or its UUID"))
}

#[cfg(test)]
mod tests {
    use mainstay_repository::PointInfo;

    use super::{longest_unproven, machine_of, machine_tag, newer_files, put_tag, timeline};
    use crate::testing::{id, point, time};

    const UUID: &str = "4fd5eb22-0f12-4f2d-9c9a-1d5d2f0e8a11";

    fn image(number: u32, moment: &str) -> PointInfo {
        let mut image = point(number, "web", moment);
        image.workload.kind.0 = "vm".into();
        image.roots = vec![format!("machine:{UUID}")];
        image
    }

    fn files(number: u32, name: &str, machine: &str, moment: &str) -> PointInfo {
        PointInfo { tags: vec!["nightly".into(), machine_tag(machine)], ..point(number, name, moment) }
    }

    fn points() -> Vec<PointInfo> {
        vec![
            files(1, "web:etc", UUID, "2026-10-31"),
            image(2, "2026-11-01"),
            files(3, "web:etc", &UUID.to_uppercase(), "2026-11-02"),
            files(4, "web:srv", "web", "2026-11-03"),
            files(5, "web:etc", UUID, "2026-11-04"),
            files(6, "db:etc", "db", "2026-11-04"),
            point(7, "other:etc", "2026-11-05"),
            PointInfo { readable: false, ..files(8, "web:home", UUID, "2026-11-05") },
        ]
    }

    #[test]
    fn newer_files_are_the_newest_of_each_workload_that_names_the_machine() {
        let points = points();
        let found = |until: &str| -> Vec<_> {
            newer_files(&points[1], &points, time(until)).iter().map(|point| point.id).collect()
        };
        assert_eq!(found("2026-11-01"), []);
        assert_eq!(found("2026-11-02"), [id(3)]);
        assert_eq!(found("2026-11-03"), [id(3), id(4)]);
        assert_eq!(found("2026-12-01"), [id(4), id(5)]);
        // The machine was put back on the third.
        let put_back = PointInfo { tags: vec!["undo".into()], ..image(9, "2026-11-03T12:00:00Z") };
        let with: Vec<PointInfo> = points.iter().cloned().chain([put_back.clone()]).collect();
        let found = newer_files(&points[1], &with, time("2026-12-01"));
        assert_eq!(found.iter().map(|point| point.id).collect::<Vec<_>>(), [id(4), id(5)]);
        assert_eq!(newer_files(&points[1], &with, time("2026-11-03T13:00:00Z")), Vec::<&PointInfo>::new());
        // … with some of the files.
        let put_back = PointInfo { tags: vec!["undo".into(), put_tag(&id(3))], ..put_back };
        let with: Vec<PointInfo> = points.iter().cloned().chain([put_back]).collect();
        let found = newer_files(&points[1], &with, time("2026-11-03T13:00:00Z"));
        assert_eq!(found.iter().map(|point| point.id).collect::<Vec<_>>(), [id(3)]);
        // A point of files has nothing over it.
        assert_eq!(newer_files(&points[0], &points, time("2026-12-01")), Vec::<&PointInfo>::new());
    }

    #[test]
    fn a_share_of_the_machines_is_proven_and_the_one_that_waited_longest_first() {
        let machine = |number: u32, name: &str, proven: Option<&str>| PointInfo {
            proven: proven.map(time),
            ..point(number, name, "2026-11-01")
        };
        let points = [
            machine(1, "db", Some("2026-11-02")),
            machine(2, "web", Some("2026-11-09")),
            machine(3, "web", Some("2026-11-03")),
            machine(4, "mail", None),
            machine(5, "db", None),
        ];
        let made = vec![machine(11, "db", None), machine(12, "web", None), machine(13, "mail", None)];
        let chosen = |percent| {
            let chosen = longest_unproven(made.clone(), &points, percent);
            chosen.iter().map(|point| point.id).collect::<Vec<_>>()
        };
        // Never proven, then the longest ago; the last proof of a machine counts.
        assert_eq!((chosen(100), chosen(67)), ([13, 11, 12].map(id).to_vec(), [13, 11, 12].map(id).to_vec()));
        assert_eq!((chosen(66), chosen(1)), ([13, 11].map(id).to_vec(), [13].map(id).to_vec()));
        assert_eq!(longest_unproven(Vec::new(), &points, 100), []);
    }

    #[test]
    fn the_timeline_has_images_and_files_between_each_other() {
        let mut points = points();
        points.push(image(9, "2026-11-04T12:00:00Z"));
        let web: Vec<&PointInfo> = points.iter().filter(|point| point.workload.name == "web").collect();
        let line: Vec<_> = timeline(&web, &points).iter().map(|point| point.id).collect();
        assert_eq!(line, [1, 2, 3, 4, 9, 5, 8].map(id));
        let etc: Vec<&PointInfo> = points.iter().filter(|point| point.workload.name == "web:etc").collect();
        assert_eq!(timeline(&etc, &points), etc);
        assert_eq!((machine_of(&points[0]), machine_of(&points[6])), (Some(UUID), None));
    }
}
