//! What each way of restoring does to that which is there already, and that the preview says the same.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt, symlink};
use std::path::Path;

use mainstay_core::{Code, ItemPath, SkipReason, Target as _};
use mainstay_testkit::tree::{compare, hostile_tree};
use mainstay_testkit::{Part, Rng, TestItem, for_each_seed, random_items};
use mainstay_workloads::files::{
    Action, FilesPlan, FilesTarget, OwnerRule, Place, RestoreMode, RestoreRules, Restored, diff,
};

use mainstay_workloads::process::Program;

use crate::{
    as_ordinary_user_in, backup_and_restore, captured, inside, item_path, owners, plan, request,
    shared_directory, walk,
};

fn tree(root: &Path) {
    fs::create_dir_all(root.join("directory/inner")).unwrap();
    for name in ["same", "edited", "chmodded", "lost", "directory/inner/file", "becomes directory"] {
        fs::write(root.join(name), name).unwrap();
    }
    symlink("same", root.join("link")).unwrap();
    fs::hard_link(root.join("same"), root.join("same too")).unwrap();
}

/// Damages a restored tree in every way there is.
fn damage(root: &Path) {
    fs::write(root.join("edited"), "EDITED").unwrap();
    fs::set_permissions(root.join("chmodded"), PermissionsExt::from_mode(0o600)).unwrap();
    fs::remove_file(root.join("lost")).unwrap();
    fs::remove_file(root.join("link")).unwrap();
    symlink("elsewhere", root.join("link")).unwrap();
    fs::remove_file(root.join("becomes directory")).unwrap();
    fs::create_dir(root.join("becomes directory")).unwrap();
    fs::write(root.join("extra"), "extra").unwrap();
    fs::create_dir_all(root.join("directory/extra/deep")).unwrap();
    fs::write(root.join("directory/extra/deep/file"), "extra").unwrap();
    fs::write(root.join(".mainstay-restore-0123456789abcdef-7"), "left by a killed run").unwrap();
}

#[test]
fn each_mode_does_what_it_says_and_the_preview_agrees() {
    for mode in [RestoreMode::Add, RestoreMode::Overwrite, RestoreMode::Mirror] {
        let directory = tempfile::tempdir().unwrap();
        let (from, target) = (directory.path().join("from"), directory.path().join("target"));
        fs::create_dir(&from).unwrap();
        tree(&from);
        backup_and_restore(&from, &target, RestoreMode::New);
        let to = inside(&target, &from);
        damage(&to);
        fs::write(target.join("beside"), "not of the point").unwrap();

        let rules = RestoreRules { mode, selected: vec![item_path(&from)], ..RestoreRules::default() };
        // One walk for both: the directories above are not the test's own, and move on.
        let items = walk(request(&from)).0;
        let wanted = items.iter().map(|item| Ok((item.path.clone(), item.metadata.clone())));
        let mut existing = Place::open(&target, owners()).unwrap();
        let preview = diff(&mut existing, wanted, &rules).unwrap();
        let mut expected = BTreeMap::new();
        preview.iter().for_each(|change| *expected.entry(format!("{:?}", change.action)).or_insert(0) += 1);

        let plan = FilesPlan { root: target.clone(), rules, owners: owners(), ..FilesPlan::default() };
        let mut into = FilesTarget::new(plan).unwrap();
        items.into_iter().for_each(|item| into.put(item).unwrap());
        let restored = Box::new(into).finish(&captured()).unwrap().1;
        assert!(restored.skips.is_empty(), "{:?}", restored.skips);
        let changes = restored.changes;
        let done = [
            ("Create", changes.created),
            ("Replace", changes.replaced),
            ("Metadata", changes.metadata),
            ("Delete", changes.deleted),
            ("Same", changes.same),
        ];
        let done: BTreeMap<_, _> = done
            .into_iter()
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| (name.to_owned(), count))
            .collect();
        assert_eq!(done, expected, "{mode:?}");

        assert!(!to.join(".mainstay-restore-0123456789abcdef-7").exists(), "{mode:?}");
        assert_eq!(fs::read(target.join("beside")).unwrap(), b"not of the point");
        assert_eq!(fs::read(to.join("lost")).unwrap(), b"lost");
        match mode {
            RestoreMode::Mirror => assert_eq!(compare(&from, &to).unwrap(), Vec::<String>::new()),
            RestoreMode::Overwrite => {
                let rest = compare(&from, &to).unwrap();
                assert!(rest.iter().all(|line| line.contains("was not there")), "{rest:?}");
                assert_eq!(rest.len(), 4, "{rest:?}");
            }
            RestoreMode::Add | RestoreMode::New => {
                assert_eq!(fs::read(to.join("edited")).unwrap(), b"EDITED");
                assert!(to.join("becomes directory").is_dir() && to.join("extra").exists());
            }
        }
    }
}

#[test]
fn a_new_place_must_be_empty_and_two_restores_do_not_meet() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "here").unwrap();
    let open = |mode| FilesTarget::new(plan(directory.path(), mode));
    assert_eq!(open(RestoreMode::New).err().unwrap().code(), Code::AlreadyExists);
    let first = open(RestoreMode::Add).unwrap();
    assert_eq!(open(RestoreMode::Add).err().unwrap().code(), Code::Conflict);
    drop(first);
    open(RestoreMode::Add).unwrap();
}

#[test]
fn a_mirror_deletes_only_inside_the_selection_and_spares_what_the_point_could_not_hold() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    for name in ["chosen/skipped", "chosen/kept/deep", "chosen/gone", "chosen/in", "other/file"] {
        fs::create_dir_all(root.join(name).parent().unwrap()).unwrap();
        fs::write(root.join(name), name).unwrap();
    }
    let path = |path: &str| ItemPath::new(path).unwrap();
    let rules = RestoreRules {
        mode: RestoreMode::Mirror,
        selected: vec![path("chosen")],
        keep: [path("chosen/kept/deep")].into_iter().collect(),
        ..RestoreRules::default()
    };
    let mut target = FilesTarget::new(FilesPlan {
        root: root.to_owned(),
        rules,
        owners: owners(),
        ..FilesPlan::default()
    })
    .unwrap();
    for item in [
        TestItem::directory(path("chosen")),
        TestItem::file(path("chosen/in"), vec![Part::Bytes(b"new".to_vec())]),
        TestItem::directory(path("other")),
    ] {
        target.put(item.to_item()).unwrap();
        if item.path.name() == b"in" {
            let skip = mainstay_core::Skip {
                path: path("chosen/skipped"),
                reason: SkipReason::Unreadable,
                detail: "not captured".into(),
            };
            target.skip(skip).unwrap();
        }
    }
    let (_, restored) = Box::new(target).finish(&captured()).unwrap();
    assert_eq!(restored.changes.deleted, 1);
    let left = |name: &str| root.join(name).exists();
    assert!(left("chosen/skipped") && left("chosen/kept/deep") && left("other/file"));
    assert!(!left("chosen/gone"));
    assert_eq!(fs::read(root.join("chosen/in")).unwrap(), b"new");
}

/// A restore that is broken off anywhere is finished by a second one.
#[test]
fn a_second_run_finishes_the_first() {
    let directory = tempfile::tempdir().unwrap();
    let from = directory.path().join("from");
    fs::create_dir(&from).unwrap();
    tree(&from);
    fs::set_permissions(from.join("directory/inner"), PermissionsExt::from_mode(0o500)).unwrap();
    for stop_after in 0..14 {
        let target = directory.path().join(format!("target {stop_after}"));
        let mut first = FilesTarget::new(plan(&target, RestoreMode::New)).unwrap();
        walk(request(&from)).0.into_iter().take(stop_after).for_each(|item| first.put(item).unwrap());
        drop(first);
        let restored = backup_and_restore(&from, &target, RestoreMode::Overwrite);
        assert!(restored.skips.is_empty(), "{:?}", restored.skips);
        assert_eq!(compare(&from, &inside(&target, &from)).unwrap(), Vec::<String>::new(), "{stop_after}");
    }
}

/// A real process, really killed, wherever it happens to be.
#[test]
fn a_killed_restore_is_finished_by_the_next_one() {
    const FROM: &str = "MAINSTAY_TEST_KILL_FROM";
    const TARGET: &str = "MAINSTAY_TEST_KILL_TARGET";
    if let (Some(from), Some(target)) = (std::env::var_os(FROM), std::env::var_os(TARGET)) {
        backup_and_restore(Path::new(&from), Path::new(&target), RestoreMode::Overwrite);
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("from");
    hostile_tree(&tree).unwrap();
    let target = directory.path().join("target");
    let (mut killed, mut unfinished) = (0, 0);
    // From hardly started to almost done, on a slow machine and on a fast one.
    for limit in [3, 6, 9, 12, 16, 20, 25, 30, 40, 60, 90, 140, 200, 300] {
        // The limit of the process door kills with SIGKILL.
        let limit = std::time::Duration::from_millis(limit);
        let outcome = Program::new(std::env::current_exe().unwrap(), limit)
            .arguments(["--exact", "modes::a_killed_restore_is_finished_by_the_next_one"])
            .variable(FROM, &tree)
            .variable(TARGET, &target)
            .run();
        killed += u32::from(outcome.is_err());
        unfinished += u32::from(!compare(&tree, &inside(&target, &tree)).is_ok_and(|lines| lines.is_empty()));
    }
    println!("{killed} runs were killed, {unfinished} left something to do");
    assert!(killed > 0 && unfinished > 0, "no run was killed in time: {killed} {unfinished}");
    let restored = backup_and_restore(&tree, &target, RestoreMode::Overwrite);
    assert_eq!(restored.skips, []);
    assert_eq!(compare(&tree, &inside(&target, &tree)).unwrap(), Vec::<String>::new());
}

/// A file with another name outside the target is never changed in place.
#[test]
fn a_link_to_something_outside_is_replaced_and_not_mended() {
    let directory = tempfile::tempdir().unwrap();
    let (from, target) = (directory.path().join("from"), directory.path().join("target"));
    fs::create_dir(&from).unwrap();
    fs::write(from.join("file"), "content").unwrap();
    fs::set_permissions(from.join("file"), PermissionsExt::from_mode(0o644)).unwrap();
    backup_and_restore(&from, &target, RestoreMode::New);
    let to = inside(&target, &from).join("file");
    let outside = directory.path().join("outside");
    fs::hard_link(&to, &outside).unwrap();
    fs::set_permissions(&outside, PermissionsExt::from_mode(0o400)).unwrap();
    backup_and_restore(&from, &target, RestoreMode::Overwrite);
    assert_eq!(to.metadata().unwrap().mode() & 0o777, 0o644);
    assert_eq!(outside.metadata().unwrap().mode() & 0o777, 0o400);
}

/// The decision is one function; here it meets places of every kind, in memory.
#[test]
fn previews_of_random_trees_agree_with_what_is_done() {
    for_each_seed(30, |seed| {
        let mut rng = Rng::new(seed);
        let directory = tempfile::tempdir().unwrap();
        let put = |mode, items: &[TestItem]| {
            let rules = RestoreRules { mode, selected: vec![ItemPath::root()], ..RestoreRules::default() };
            let plan = FilesPlan {
                root: directory.path().to_owned(),
                rules,
                owners: owners(),
                ..FilesPlan::default()
            };
            let mut target = FilesTarget::new(plan).unwrap();
            items.iter().for_each(|item| target.put(item.to_item()).unwrap());
            Box::new(target).finish(&captured()).unwrap().1
        };
        let items = random_items(seed, 40);
        put(RestoreMode::New, &items);
        // Another point of the same place: some items gone, some of another kind or size.
        let mut others = items.clone();
        others.retain(|_| rng.chance(80));
        let lost: Vec<_> =
            items.iter().filter(|item| !others.contains(item)).map(|item| item.path.clone()).collect();
        others.retain(|item| !lost.iter().any(|lost| item.path.is_within(lost)));
        let mut existing = Place::open(directory.path(), owners()).unwrap();
        let mode = RestoreMode::Mirror;
        let rules = RestoreRules { mode, selected: vec![ItemPath::root()], ..RestoreRules::default() };
        let wanted = others.iter().map(|item| Ok((item.path.clone(), item.metadata.clone())));
        let preview = diff(&mut existing, wanted, &rules).unwrap();
        let done = put(mode, &others).changes;
        let count = |action| preview.iter().filter(|change| change.action == action).count() as u64;
        assert_eq!(done.deleted, count(Action::Delete));
        assert_eq!((done.created, done.replaced), (count(Action::Create), count(Action::Replace)));
        let mut existing = Place::open(directory.path(), owners()).unwrap();
        let wanted = others.iter().map(|item| Ok((item.path.clone(), item.metadata.clone())));
        let rest = diff(&mut existing, wanted, &rules).unwrap();
        assert!(rest.iter().all(|change| change.action == Action::Same), "{rest:?}");
    });
}

/// Restores `items` into a fresh directory as `owners` says; the directory and the outcome.
fn restored(owners: OwnerRule, items: &[TestItem]) -> (tempfile::TempDir, Restored) {
    let directory = shared_directory();
    let root = directory.path().to_owned();
    let mut target = FilesTarget::new(FilesPlan { root, owners, ..FilesPlan::default() }).unwrap();
    items.iter().for_each(|item| target.put(item.to_item()).unwrap());
    let outcome = Box::new(target).finish(&captured()).unwrap().1;
    (directory, outcome)
}

fn small_file(name: &str, owner: (u32, u32), mode: u32) -> TestItem {
    let mut item = TestItem::file(ItemPath::new(name).unwrap(), vec![Part::Bytes(b"content".to_vec())]);
    (item.metadata.uid, item.metadata.gid) = owner;
    item.metadata.mode = mode;
    item
}

#[test]
fn set_id_bits_stay_with_the_recorded_owner_only() {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let items = [
        small_file("foreign", (54_321, gid), 0o4755),
        small_file("foreign group", (uid, 54_321), 0o6755),
        small_file("own", (uid, gid), 0o6755),
    ];
    let (directory, outcome) = restored(OwnerRule::Leave, &items);
    assert_eq!(outcome.skips, []);
    let mode = |name| directory.path().join(name).metadata().unwrap().mode() & 0o7777;
    assert_eq!([mode("foreign"), mode("foreign group"), mode("own")], [0o755, 0o755, 0o6755]);
}

/// Needs the power to belong to a group, which root has; whoever else runs this needs a second group of their own.
#[test]
fn an_ordinary_user_keeps_the_groups_they_belong_to() {
    use rustix::process::{getegid, geteuid, getgroups};
    const MEMBER: u32 = 54_321;
    let in_group = |act: fn(u32)| {
        if !geteuid().is_root() {
            let other = getgroups().unwrap().into_iter().find(|group| *group != getegid());
            act(other.unwrap_or(getegid()).as_raw());
            return;
        }
        as_ordinary_user_in(&[MEMBER], || act(MEMBER));
    };
    in_group(|group| {
        let own = geteuid().as_raw();
        let items = [small_file("foreign", (own, 54_322), 0o644), small_file("shared", (own, group), 0o2750)];
        let (directory, outcome) = restored(OwnerRule::Leave, &items);
        assert_eq!(outcome.skips, []);
        let found = |name| directory.path().join(name).metadata().unwrap();
        assert_eq!((found("shared").gid(), found("shared").mode() & 0o7777), (group, 0o2750));
        assert_eq!(found("foreign").gid(), getegid().as_raw());
    });
}

/// A file that this file system cannot hold is the end of that file, not of the restore.
#[test]
fn a_file_that_is_too_large_for_the_medium_is_skipped() {
    let path = ItemPath::new("a large one").unwrap();
    let huge = vec![Part::Hole(i64::MAX.unsigned_abs()), Part::Hole(1)];
    let items = [TestItem::file(path.clone(), huge), small_file("next", (0, 0), 0o644)];
    let (directory, outcome) = restored(owners(), &items);
    let skipped: Vec<_> = outcome.skips.iter().map(|skip| &skip.path).collect();
    assert_eq!(skipped, [&path], "{:?}", outcome.skips);
    assert_eq!(fs::read(directory.path().join("next")).unwrap(), b"content");
}
