//! Sprawl: what is on the hosts, against what is protected. A pure function from an inventory and rules to findings,
//! so that whoever shows, schedules or warns says the same.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use globset::{GlobBuilder, GlobMatcher};
use mainstay_core::{Code, Error, Result, Time};
use serde::{Deserialize, Serialize};

use super::folder::images_below;
use super::hypervisor::{Hypervisor, MachineId, MachineSummary};
use super::qemu::PREFIX;

/// What was seen at one time.
#[derive(Clone, Debug, Default)]
pub struct Inventory {
    /// Each machine with the host that it was seen on.
    pub machines: Vec<(String, MachineSummary)>,
    /// Every image file that was found where images lie.
    pub images: Vec<ImageSeen>,
    pub points: Vec<PointsSeen>,
}

/// An image file, whoever uses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageSeen {
    pub path: PathBuf,
    /// Bytes that it occupies.
    pub bytes: u64,
    pub modified: Time,
    /// The images that it is built upon, nearest first.
    pub backing: Vec<PathBuf>,
    /// Whether each of them is there.
    pub whole: bool,
}

/// What a repository holds of one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PointsSeen {
    /// The workload, as people call it.
    pub workload: String,
    pub machine: MachineId,
    /// The moment of the newest point.
    pub newest: Time,
    /// The bitmaps and checkpoints that the newest point's marks name.
    pub marks: Vec<String>,
}

/// What is wanted.
#[derive(Clone, Debug)]
pub struct Rules {
    pub protect: Vec<Protect>,
    pub ignore: Vec<Ignore>,
    /// A snapshot or an image that nobody uses is worth a word once it is so old.
    pub stale_after: Duration,
    /// How the names of bitmaps and checkpoints begin that are this repository's; see [`super::marks_of`].
    pub ours: String,
}

/// Machines that are to have a point, and how young.
#[derive(Clone, Debug)]
pub struct Protect {
    pub which: Pattern,
    pub at_least_every: Duration,
}

/// Somebody's decision that something is to be left as it is.
#[derive(Clone, Debug)]
pub struct Ignore {
    pub which: Pattern,
    /// Counts only for machines of this host, and what is on them; `None`: anywhere, and for images and points too.
    pub host: Option<String>,
    /// Who decided.
    pub who: String,
    pub why: String,
    /// The decision counts no longer than that; `None`: until it is taken back.
    pub until: Option<Time>,
}

/// A shell pattern for names: of machines (`web`, `HOST/web`), of images by their paths.
#[derive(Clone, Debug)]
pub struct Pattern(GlobMatcher);

/// A thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Subject {
    Machine {
        host: String,
        id: MachineId,
        name: String,
    },
    Image {
        path: PathBuf,
    },
    /// A snapshot, checkpoint or bitmap on a machine.
    Snapshot {
        host: String,
        machine: String,
        name: String,
    },
    /// The points of a machine.
    Points {
        workload: String,
        machine: MachineId,
    },
}

/// What there is to say of it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case", tag = "finding")]
pub enum Finding {
    /// It has a point that is young enough.
    Protected { newest: Seconds },
    /// It has none.
    Unprotected,
    /// Its newest point is older than a rule wants.
    Overdue { newest: Seconds },
    /// No machine uses the image, directly or as what another is built upon.
    OrphanedImage { bytes: u64 },
    /// The image is built upon one that is not there.
    BrokenChain,
    /// It has been there for long and costs space.
    StaleSnapshot { taken: Seconds },
    /// A bitmap or checkpoint that records nothing that anybody can use: one of this repository that no point builds
    /// upon, or anybody's that is inconsistent.
    StaleBitmap { ours: bool },
    /// Others have the same identity, or the same image to write to.
    Clone { with: Vec<String> },
    /// The machine is on no host any more.
    Gone { newest: Seconds },
}

/// Seconds since 1970.
pub type Seconds = i64;

/// What has been decided.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case", tag = "standing")]
pub enum Standing {
    Protected,
    Ignored {
        who: String,
        why: String,
        until: Option<Seconds>,
    },
    /// Nobody has said what is to become of it.
    Undecided,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Row {
    #[serde(flatten)]
    pub subject: Subject,
    #[serde(flatten)]
    pub finding: Finding,
    #[serde(flatten)]
    pub standing: Standing,
}

/// A decision as it is kept, between programs and years.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Decided {
    /// Something on the hosts is to be left as it is.
    Ignore {
        /// As [`Pattern::new`] takes it.
        which: String,
        host: Option<String>,
        who: String,
        why: String,
        until: Option<Seconds>,
    },
}

impl Decided {
    /// Errors: only a mistake of ours.
    pub fn to_text(&self) -> Result<String> {
        serde_json::to_string(self).map_err(|error| Error::bug("cannot write a decision down").because(error))
    }

    /// `None` for what a later version decided.
    pub fn from_text(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok()
    }

    /// `None` for a pattern that makes no sense.
    pub fn ignore(&self) -> Option<Ignore> {
        let Self::Ignore { which, host, who, why, until } = self.clone();
        let which = Pattern::new(&which).ok()?;
        Some(Ignore { which, host, who, why, until: until.map(Time::from_seconds) })
    }
}

impl Ignore {
    fn matches(&self, subject: &Subject) -> bool {
        let host = match subject {
            Subject::Machine { host, .. } | Subject::Snapshot { host, .. } => Some(host),
            Subject::Image { .. } | Subject::Points { .. } => None,
        };
        (self.host.is_none() || self.host.as_ref() == host) && self.which.matches(subject)
    }
}

impl Inventory {
    /// Adds what a host has. Paths are followed to the files that they mean, so that one file has one name.
    pub fn add_host(&mut self, host: &dyn Hypervisor) -> Result<()> {
        for mut machine in host.list()? {
            for disk in &mut machine.disks {
                disk.path = real(&disk.path);
                disk.backing.iter_mut().for_each(|path| *path = real(path));
            }
            self.machines.push((host.name(), machine));
        }
        Ok(())
    }

    /// Adds the image files in a folder and in those in it.
    ///
    /// Errors: the folder cannot be listed.
    pub fn add_folder(&mut self, folder: &Path) -> Result<()> {
        self.images.extend(images_below(folder)?);
        Ok(())
    }
}

fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

impl Pattern {
    /// Errors: [`Code::Usage`] for what is no pattern.
    pub fn new(text: &str) -> Result<Self> {
        let glob = GlobBuilder::new(text).literal_separator(true).build();
        let glob =
            glob.map_err(|error| Error::new(Code::Usage, format!("{text:?} is no pattern")).because(error))?;
        Ok(Self(glob.compile_matcher()))
    }

    fn matches(&self, subject: &Subject) -> bool {
        match subject {
            Subject::Machine { host, id, name } => {
                [name.clone(), id.0.clone(), format!("{host}/{name}")].iter().any(|it| self.0.is_match(it))
            }
            Subject::Image { path } => self.0.is_match(path),
            Subject::Snapshot { machine, name, .. } => {
                self.0.is_match(name) || self.0.is_match(format!("{machine}/{name}"))
            }
            Subject::Points { workload, machine } => self.0.is_match(workload) || self.0.is_match(&machine.0),
        }
    }
}

/// Compares what was seen with what is wanted. Rows come in the order of their subjects.
pub fn sprawl(inventory: &Inventory, rules: &Rules, now: Time) -> Vec<Row> {
    let mut found = Vec::new();
    machines(inventory, rules, now, &mut found);
    images(inventory, rules, now, &mut found);
    snapshots(inventory, rules, now, &mut found);
    clones(inventory, &mut found);
    gone(inventory, &mut found);
    let row = |(subject, finding): (Subject, Finding)| {
        let standing = standing(&subject, &finding, rules, now);
        Row { subject, finding, standing }
    };
    let mut rows: Vec<Row> = found.into_iter().map(row).collect();
    rows.sort();
    rows
}

fn standing(subject: &Subject, finding: &Finding, rules: &Rules, now: Time) -> Standing {
    let counts = |ignore: &&Ignore| ignore.until.is_none_or(|until| now < until);
    let ignored = rules.ignore.iter().filter(counts).find(|ignore| ignore.matches(subject));
    match (finding, ignored) {
        (Finding::Protected { .. }, _) => Standing::Protected,
        (_, Some(Ignore { who, why, until, .. })) => {
            Standing::Ignored { who: who.clone(), why: why.clone(), until: until.map(Time::seconds) }
        }
        _ => Standing::Undecided,
    }
}

fn subject(host: &str, machine: &MachineSummary) -> Subject {
    Subject::Machine { host: host.to_owned(), id: machine.id.clone(), name: machine.name.clone() }
}

fn machines(inventory: &Inventory, rules: &Rules, now: Time, found: &mut Vec<(Subject, Finding)>) {
    for (host, machine) in &inventory.machines {
        let subject = subject(host, machine);
        let of_it = inventory.points.iter().filter(|points| points.machine == machine.id);
        let newest = of_it.map(|points| points.newest).max();
        let wanted = rules.protect.iter().filter(|rule| rule.which.matches(&subject));
        let strictest = wanted.map(|rule| rule.at_least_every).min();
        let finding = match (newest, strictest) {
            (None, _) => Finding::Unprotected,
            (Some(newest), Some(every)) if now.since(newest) > every => {
                Finding::Overdue { newest: newest.seconds() }
            }
            (Some(newest), _) => Finding::Protected { newest: newest.seconds() },
        };
        found.push((subject, finding));
    }
}

fn images(inventory: &Inventory, rules: &Rules, now: Time, found: &mut Vec<(Subject, Finding)>) {
    let disks = inventory.machines.iter().flat_map(|(_, machine)| &machine.disks);
    let mut used: BTreeSet<&Path> = BTreeSet::new();
    for disk in disks {
        used.insert(&disk.path);
        used.extend(disk.backing.iter().map(PathBuf::as_path));
    }
    // What a used image is built upon is used, however it came to be known.
    let built: BTreeMap<&Path, &[PathBuf]> =
        inventory.images.iter().map(|image| (image.path.as_path(), image.backing.as_slice())).collect();
    let below: Vec<&Path> = used
        .iter()
        .filter_map(|path| built.get(path))
        .flat_map(|chain| chain.iter().map(PathBuf::as_path))
        .collect();
    used.extend(below);
    for image in &inventory.images {
        let subject = || Subject::Image { path: image.path.clone() };
        if !image.whole {
            found.push((subject(), Finding::BrokenChain));
        }
        // A fresh one may belong to a machine that is just being made.
        if !used.contains(image.path.as_path()) && now.since(image.modified) > rules.stale_after {
            found.push((subject(), Finding::OrphanedImage { bytes: image.bytes }));
        }
    }
}

fn snapshots(inventory: &Inventory, rules: &Rules, now: Time, found: &mut Vec<(Subject, Finding)>) {
    let marks: BTreeSet<&String> = inventory.points.iter().flat_map(|points| &points.marks).collect();
    for (host, machine) in &inventory.machines {
        let subject = |name: &str| Subject::Snapshot {
            host: host.clone(),
            machine: machine.name.clone(),
            name: name.into(),
        };
        let mut names = BTreeSet::new();
        for bitmap in machine.disks.iter().flat_map(|disk| &disk.bitmaps) {
            let ours = bitmap.name.starts_with(&rules.ours);
            let useless = bitmap.inconsistent || ours && !marks.contains(&bitmap.name);
            if useless && names.insert(&bitmap.name) {
                found.push((subject(&bitmap.name), Finding::StaleBitmap { ours }));
            }
        }
        for snapshot in &machine.snapshots {
            // Checkpoints of every Mainstay are among the bitmaps; each repository knows its own.
            let a_mark = snapshot.checkpoint && snapshot.name.starts_with(PREFIX);
            let old = snapshot.taken.map(Time::from_seconds);
            let old = old.filter(|taken| !a_mark && now.since(*taken) > rules.stale_after);
            found.extend(
                old.map(|taken| (subject(&snapshot.name), Finding::StaleSnapshot { taken: taken.seconds() })),
            );
        }
    }
}

/// Machines that are one to whoever knows them by their identity, and machines that write to one image.
fn clones(inventory: &Inventory, found: &mut Vec<(Subject, Finding)>) {
    for (number, (host, machine)) in inventory.machines.iter().enumerate() {
        let paths: BTreeSet<_> = machine.disks.iter().map(|disk| &disk.path).collect();
        let shares = |other: &MachineSummary| {
            let named = |path: &PathBuf| !path.as_os_str().is_empty() && paths.contains(path);
            other.id == machine.id || other.disks.iter().any(|disk| named(&disk.path))
        };
        let others = inventory.machines.iter().enumerate().filter(|(other, _)| *other != number);
        let others = others.filter(|(_, (_, other))| shares(other));
        let with: Vec<String> = others.map(|(_, (host, other))| format!("{host}/{}", other.name)).collect();
        if !with.is_empty() {
            found.push((subject(host, machine), Finding::Clone { with }));
        }
    }
}

fn gone(inventory: &Inventory, found: &mut Vec<(Subject, Finding)>) {
    for points in &inventory.points {
        if !inventory.machines.iter().any(|(_, machine)| machine.id == points.machine) {
            let (workload, machine) = (points.workload.clone(), points.machine.clone());
            let finding = Finding::Gone { newest: points.newest.seconds() };
            found.push((Subject::Points { workload, machine }, finding));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::hypervisor::{BitmapSeen, DiskSummary, MachineState, SnapshotSeen};

    const DAY: u64 = 24 * 3600;

    fn at(day: i64) -> Time {
        Time::from_seconds(day * 24 * 3600)
    }

    fn machine(id: &str, name: &str, path: &str) -> MachineSummary {
        let disk = DiskSummary {
            name: "vda".into(),
            path: path.into(),
            format: "qcow2".into(),
            size: None,
            backing: Vec::new(),
            bitmaps: Vec::new(),
        };
        let (disks, snapshots) = (vec![disk], Vec::new());
        MachineSummary {
            id: MachineId(id.into()),
            name: name.into(),
            state: MachineState::Running,
            disks,
            snapshots,
        }
    }

    fn points(machine: &str, day: i64) -> PointsSeen {
        let (machine, newest) = (MachineId(machine.into()), at(day));
        PointsSeen {
            workload: format!("{}-points", machine.0),
            machine,
            newest,
            marks: vec!["mainstay-a".into()],
        }
    }

    fn rules() -> Rules {
        let protect =
            Protect { which: Pattern::new("web*").unwrap(), at_least_every: Duration::from_secs(DAY) };
        let (ignore, stale_after) = (Vec::new(), Duration::from_secs(7 * DAY));
        Rules { protect: vec![protect], ignore, stale_after, ours: "mainstay-".into() }
    }

    fn of<'a>(rows: &'a [Row], name: &str) -> Vec<(&'a Finding, &'a Standing)> {
        let named = |row: &&Row| match &row.subject {
            Subject::Machine { name: it, .. } | Subject::Snapshot { name: it, .. } => it == name,
            Subject::Image { path } => path == Path::new(name),
            Subject::Points { workload, .. } => workload == name,
        };
        rows.iter().filter(named).map(|row| (&row.finding, &row.standing)).collect()
    }

    #[test]
    fn machines_are_protected_overdue_unprotected_or_deliberately_left() {
        let machines = [("1", "web"), ("2", "web-old"), ("3", "new"), ("4", "scrap"), ("5", "back")];
        let seen = machines.map(|(id, name)| ("host".to_owned(), machine(id, name, &format!("/{name}"))));
        let inventory = Inventory {
            machines: seen.to_vec(),
            points: vec![points("1", 100), points("2", 98), points("9", 50)],
            ..Inventory::default()
        };
        let mut rules = rules();
        for (which, host, until) in [
            ("scrap", Some("host"), Some(101)),
            ("back", None, Some(99)),
            ("new", Some("another host"), None),
        ] {
            let decided = Decided::Ignore {
                which: which.into(),
                host: host.map(str::to_owned),
                who: "ann".into(),
                why: "a test machine".into(),
                until: until.map(|day| at(day).seconds()),
            };
            let kept = Decided::from_text(&decided.to_text().unwrap()).unwrap();
            assert_eq!(kept, decided);
            rules.ignore.push(kept.ignore().unwrap());
        }
        assert_eq!(Decided::from_text(r#"{"kind":"forbid","which":"x"}"#), None);
        let rows = sprawl(&inventory, &rules, at(100));
        let protected = Finding::Protected { newest: at(100).seconds() };
        assert_eq!(of(&rows, "web"), [(&protected, &Standing::Protected)]);
        let overdue = Finding::Overdue { newest: at(98).seconds() };
        assert_eq!(of(&rows, "web-old"), [(&overdue, &Standing::Undecided)]);
        assert_eq!(of(&rows, "new"), [(&Finding::Unprotected, &Standing::Undecided)]);
        assert!(
            matches!(of(&rows, "scrap")[0], (Finding::Unprotected, Standing::Ignored { who, .. }) if who == "ann")
        );
        // The decision has run out.
        assert_eq!(of(&rows, "back"), [(&Finding::Unprotected, &Standing::Undecided)]);
        let gone = Finding::Gone { newest: at(50).seconds() };
        assert_eq!(of(&rows, "9-points"), [(&gone, &Standing::Undecided)]);
        assert!(Pattern::new("[").is_err());
    }

    #[test]
    fn images_that_nobody_uses_and_chains_that_are_broken_are_told() {
        let image = |path: &str, day: i64, backing: &[&str], whole: bool| ImageSeen {
            path: path.into(),
            bytes: 5,
            modified: at(day),
            backing: backing.iter().map(PathBuf::from).collect(),
            whole,
        };
        let inventory = Inventory {
            machines: vec![("host".into(), machine("1", "web", "/top"))],
            images: vec![
                image("/top", 1, &["/middle", "/base"], true),
                image("/middle", 1, &["/base"], true),
                image("/base", 1, &[], true),
                image("/left", 1, &[], true),
                image("/young", 99, &[], true),
                image("/broken", 99, &["/nowhere"], false),
            ],
            ..Inventory::default()
        };
        let rows = sprawl(&inventory, &rules(), at(100));
        for used in ["/top", "/middle", "/base", "/young"] {
            assert_eq!(of(&rows, used), [], "{used}");
        }
        assert_eq!(of(&rows, "/left")[0].0, &Finding::OrphanedImage { bytes: 5 });
        assert_eq!(of(&rows, "/broken")[0].0, &Finding::BrokenChain);
    }

    #[test]
    fn stale_snapshots_lost_bitmaps_and_clones_are_told() {
        let mut web = machine("1", "web", "/a");
        let bitmap = |name: &str, inconsistent: bool| BitmapSeen {
            name: name.into(),
            ours: name.starts_with(PREFIX),
            recording: true,
            inconsistent,
        };
        web.disks[0].bitmaps = vec![
            bitmap("mainstay-a", false),
            bitmap("mainstay-b", false),
            bitmap("other", false),
            bitmap("bad", true),
            bitmap("mainstay-bad", true),
        ];
        let snapshot = |name: &str, day: i64, checkpoint: bool| SnapshotSeen {
            name: name.into(),
            taken: Some(at(day).seconds()),
            checkpoint,
        };
        web.snapshots =
            vec![snapshot("old", 1, false), snapshot("fresh", 99, false), snapshot("mainstay-a", 1, true)];
        let machines =
            [web, machine("1", "copy", "/b"), machine("3", "shares", "/a"), machine("4", "alone", "/d")];
        let inventory = Inventory {
            machines: machines.into_iter().map(|machine| ("host".to_owned(), machine)).collect(),
            points: vec![points("1", 100)],
            ..Inventory::default()
        };
        let rows = sprawl(&inventory, &rules(), at(100));
        assert_eq!(of(&rows, "old")[0].0, &Finding::StaleSnapshot { taken: at(1).seconds() });
        assert_eq!(
            (of(&rows, "fresh"), of(&rows, "mainstay-a"), of(&rows, "other")),
            (vec![], vec![], vec![])
        );
        assert_eq!(
            ["mainstay-b", "bad", "mainstay-bad"].map(|name| of(&rows, name)[0].0.clone()),
            [true, false, true].map(|ours| Finding::StaleBitmap { ours })
        );
        // Another repository's bitmap is its own business.
        let theirs = Rules { ours: "mainstay-another-".into(), ..rules() };
        assert_eq!(of(&sprawl(&inventory, &theirs, at(100)), "mainstay-b"), vec![]);
        let with = vec!["host/copy".to_owned(), "host/shares".to_owned()];
        assert!(
            of(&rows, "web").iter().any(|(finding, _)| **finding == Finding::Clone { with: with.clone() })
        );
        assert_eq!(of(&rows, "alone").len(), 1);
    }
}
