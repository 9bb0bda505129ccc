//! Restores from a repository in memory: what happens between the plan and its end.

#![cfg(test)]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use mainstay_core::{Clock, Code, Event, ItemPath, Phase, Progress, Silent, Time};
use mainstay_engine::backup::{BackupRequest, backup};
use mainstay_engine::restore::{Outcome, Placing, RestorePlan, RestoreRequest, plan_restore, restore};
use mainstay_engine::undo::{newest, plan_undo};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::{Options, PointReader, Repository, Tuning};
use mainstay_testkit::{MemoryStore, ScriptedClock};
use mainstay_workloads::files::{FilesRequest, OwnerRule, RestoreMode};

/// A repository and a tree that it holds one point of.
struct Machine {
    repository: Repository,
    clock: Arc<dyn Clock>,
    tree: tempfile::TempDir,
}

impl Machine {
    fn new(files: &[&str]) -> Self {
        let clock = Arc::new(ScriptedClock::at(Time::from_seconds(4_000_000_000)));
        let options = Options { clock: clock.clone(), state: None, tuning: Tuning::default() };
        let ring = KeyRing::create().unwrap();
        let repository = Repository::create(Arc::new(MemoryStore::new()), ring, &[], &options).unwrap();
        let tree = tempfile::tempdir().unwrap();
        let machine = Self { repository, clock, tree };
        files.iter().for_each(|file| machine.write(file, file));
        let files = FilesRequest { roots: vec![machine.root()], ..FilesRequest::default() };
        let request = BackupRequest { files, host: "here".into(), jobs: 1, ..BackupRequest::default() };
        backup(&machine.repository, &request, &machine.clock, &silent()).unwrap();
        machine
    }

    fn root(&self) -> PathBuf {
        self.tree.path().canonicalize().unwrap()
    }

    fn write(&self, file: &str, content: &str) {
        let path = self.tree.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn read(&self, file: &str) -> Option<String> {
        std::fs::read_to_string(self.tree.path().join(file)).ok()
    }

    fn time(&self, directory: &str) -> SystemTime {
        self.tree.path().join(directory).metadata().unwrap().modified().unwrap()
    }

    fn set_time(&self, directory: &str, time: SystemTime) {
        std::fs::File::open(self.tree.path().join(directory)).unwrap().set_modified(time).unwrap();
    }

    fn reader(&self) -> PointReader {
        let points = self.repository.points().unwrap();
        let point = points.iter().rfind(|point| point.workload.kind.0 == "files").unwrap();
        self.repository.read(&point.id).unwrap()
    }

    fn request(&self, selection: &[&str], placing: Placing, mode: RestoreMode) -> RestoreRequest {
        let path = |path: &&str| item_path(&self.root().join(path));
        let (selection, owners) = (selection.iter().map(path).collect(), OwnerRule::Leave);
        RestoreRequest { selection, placing, mode, owners, keep: Vec::new() }
    }

    fn plan(&self, selection: &[&str], mode: RestoreMode) -> RestorePlan {
        plan_restore(&self.reader(), &self.request(selection, Placing::Original, mode), &Silent).unwrap()
    }

    fn restore(&self, plan: &RestorePlan, progress: &Arc<dyn Progress>) -> Outcome {
        restore(&self.repository, &self.reader(), plan, Some("here"), &self.clock, progress).unwrap()
    }

    fn undo(&self) {
        let points = self.repository.points().unwrap();
        let reader = self.repository.read(&newest(&points, "here").unwrap().id).unwrap();
        let plan = plan_undo(&reader, OwnerRule::Leave, &Silent).unwrap();
        let done = restore(&self.repository, &reader, &plan, Some("here"), &self.clock, &silent()).unwrap();
        assert!(done.restored.skips.is_empty(), "{:?}", done.restored.skips);
    }
}

fn silent() -> Arc<dyn Progress> {
    Arc::new(Silent)
}

fn item_path(path: &Path) -> ItemPath {
    ItemPath::new(path.to_str().unwrap().trim_matches('/')).unwrap()
}

/// Acts once when the items begin to be copied: by then the undo point has been taken.
struct Meanwhile<F>(Mutex<Option<F>>);

impl<F: FnOnce() + Send> Progress for Meanwhile<F> {
    fn event(&self, event: &Event<'_>) {
        if matches!(event, Event::Phase(Phase::Copying))
            && let Some(act) = self.0.lock().unwrap().take()
        {
            act();
        }
    }
}

#[test]
fn what_is_edited_after_the_undo_point_was_taken_stays_as_it_is() {
    let machine = Machine::new(&["d/edited", "d/same", "d/other"]);
    for file in ["d/edited", "d/other", "d/extra", "d/more"] {
        machine.write(file, "before the plan");
    }
    let plan = machine.plan(&[], RestoreMode::Mirror);
    let root = machine.root();
    let edit = move || {
        for file in ["d/edited", "d/extra", "d/new"] {
            std::fs::write(root.join(file), "after the undo point").unwrap();
        }
    };
    let meanwhile: Arc<dyn Progress> = Arc::new(Meanwhile(Mutex::new(Some(edit))));
    let restored = machine.restore(&plan, &meanwhile).restored;
    for file in ["d/edited", "d/extra", "d/new"] {
        assert_eq!(machine.read(file).as_deref(), Some("after the undo point"), "{file}");
    }
    assert_eq!((machine.read("d/other").as_deref(), machine.read("d/more")), (Some("d/other"), None));
    assert_eq!((restored.counts.skipped, restored.skips.len()), (1, 3), "{:?}", restored.skips);
    assert!(restored.skips.iter().any(|skip| skip.detail.contains("changed since the plan")));
}

/// The same of what an undo is about to delete.
#[test]
fn what_is_edited_after_the_plan_of_an_undo_is_not_deleted() {
    let machine = Machine::new(&["d/lost"]);
    std::fs::remove_file(machine.tree.path().join("d/lost")).unwrap();
    machine.restore(&machine.plan(&[], RestoreMode::Overwrite), &silent());
    let points = machine.repository.points().unwrap();
    let reader = machine.repository.read(&newest(&points, "here").unwrap().id).unwrap();
    let plan = plan_undo(&reader, OwnerRule::Leave, &Silent).unwrap();
    machine.write("d/lost", "edited since");
    let done = restore(&machine.repository, &reader, &plan, None, &machine.clock, &silent()).unwrap();
    assert_eq!((machine.read("d/lost").as_deref(), done.restored.counts.skipped), (Some("edited since"), 1));
}

#[test]
fn undo_brings_back_the_times_of_the_directories_around_and_touches_nothing_beside() {
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let later = old + Duration::from_secs(1);
    for mode in [RestoreMode::Add, RestoreMode::Overwrite, RestoreMode::Mirror] {
        let machine = Machine::new(&["d/replaced", "d/way/deep/lost", "d/beside/file"]);
        machine.write("d/replaced", "edited");
        std::fs::remove_file(machine.tree.path().join("d/way/deep/lost")).unwrap();
        let directories = ["d", "d/way", "d/way/deep", "d/beside"];
        directories.iter().for_each(|directory| machine.set_time(directory, old));
        let plan = machine.plan(&["d/replaced", "d/way/deep/lost"], mode);
        let outcome = machine.restore(&plan, &silent());
        assert!(outcome.undo_point.is_some() && machine.read("d/way/deep/lost").is_some());
        assert_ne!(machine.time("d/way/deep"), old, "{mode:?}");
        // The restore only went through here.
        machine.set_time("d/way", later);
        machine.set_time("d/beside", later);
        machine.undo();
        assert_eq!(machine.read("d/replaced").as_deref(), Some("edited"));
        assert_eq!(machine.read("d/way/deep/lost"), None);
        let times = directories.map(|directory| machine.time(directory));
        assert_eq!(times, [old, later, old, later], "{mode:?}");
    }
}

/// Says no after it was asked so often.
struct Impatient(Mutex<u32>);

impl Progress for Impatient {
    fn event(&self, _event: &Event<'_>) {}

    fn cancelled(&self) -> bool {
        let mut left = self.0.lock().unwrap();
        *left = left.saturating_sub(1);
        *left == 0
    }
}

#[test]
fn a_plan_can_be_cancelled_at_every_item() {
    let machine = Machine::new(&["a", "b", "c"]);
    for asked in 1..5 {
        let request = machine.request(&[], Placing::Original, RestoreMode::Overwrite);
        let stopped = plan_restore(&machine.reader(), &request, &Impatient(Mutex::new(asked)));
        assert_eq!(stopped.err().unwrap().code(), Code::Cancelled, "asked {asked} times");
    }
}

/// Compares what it is told with what is there.
#[derive(Default)]
struct Honest {
    target: PathBuf,
    expected: Mutex<(u64, u64)>,
    last: Mutex<(u64, u64)>,
}

impl Progress for Honest {
    fn event(&self, event: &Event<'_>) {
        match event {
            Event::Expect { items, bytes, .. } => *self.expected.lock().unwrap() = (*items, *bytes),
            Event::Done(counts) => {
                let whole = |name: std::ffi::OsString| !name.to_str().unwrap().starts_with(".mainstay");
                let names = std::fs::read_dir(&self.target).unwrap();
                let there = names.filter(|name| whole(name.as_ref().unwrap().file_name())).count() as u64;
                // The directory itself is the target.
                assert!(counts.items <= there + 1, "told of {} items, {there} are there", counts.items);
                *self.last.lock().unwrap() = (counts.items, counts.bytes);
            }
            _ => {}
        }
    }
}

#[test]
fn progress_tells_of_what_is_written_and_reaches_what_was_expected() {
    let names: Vec<String> = (0..200).map(|number| format!("file {number}")).collect();
    let machine = Machine::new(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let target = tempfile::tempdir().unwrap();
    let request = machine.request(&[""], Placing::Stripped(target.path().to_owned()), RestoreMode::New);
    let plan = plan_restore(&machine.reader(), &request, &Silent).unwrap();
    let told = Arc::new(Honest { target: target.path().to_owned(), ..Honest::default() });
    let progress: Arc<dyn Progress> = told.clone();
    let restored = machine.restore(&plan, &progress).restored;
    assert_eq!(restored.changes.created, 200);
    let expected = *told.expected.lock().unwrap();
    assert_eq!(expected, (201, names.iter().map(|name| name.len() as u64).sum()));
    assert_eq!(*told.last.lock().unwrap(), expected);
}
