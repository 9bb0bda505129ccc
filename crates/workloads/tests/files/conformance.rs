//! What every source and every target must do.

use std::path::Path;

use mainstay_core::{Source, Target};
use mainstay_testkit::source_suite;
use mainstay_testkit::suite::target;
use mainstay_workloads::files::{FilesSource, FilesTarget, RestoreMode, Restored};
use mainstay_workloads::process::Program;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::{backup_and_restore, clock, inside, item_path, plan, request, walk};

fn some_tree() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let mut target = FilesTarget::new(plan(directory.path(), RestoreMode::New)).unwrap();
    for item in mainstay_testkit::random_items(5, 60) {
        target.put(item.to_item()).unwrap();
    }
    Box::new(target).finish(&crate::captured()).unwrap();
    directory
}

source_suite!(source, || {
    let directory = some_tree();
    let path = directory.path().to_owned();
    let open = move || Box::new(FilesSource::new(request(&path), clock()).unwrap()) as Box<dyn Source>;
    (directory, open)
});

/// All below a directory, with the content of files.
fn observe(directory: &Path) -> target::Seen {
    let root = item_path(directory);
    let (items, _) = walk(request(directory));
    let below = items.into_iter().filter(|item| item.path.is_within(&root) && item.path != root);
    let relative = |path: &[u8]| path[root.as_bytes().len() + 1..].to_vec();
    below
        .map(|item| {
            let (content, _) = mainstay_testkit::read_body(&item.body).unwrap();
            (mainstay_core::ItemPath::new(relative(item.path.as_bytes())).unwrap(), content)
        })
        .collect()
}

type Check = fn(&mut dyn FnMut() -> Box<dyn Target<Done = Restored>>, &dyn Fn() -> target::Seen);

/// Not the checks that nothing is left of a restore that was broken off: what is restored already stays, so that
/// a second run has less to do.
#[test]
fn target() {
    let checks: [Check; 4] = [
        target::what_was_put_is_there_and_counted,
        target::nothing_put_is_nothing_there,
        target::skips_are_counted_by_their_weight,
        target::a_body_that_fails_is_never_a_success,
    ];
    for check in checks {
        let directory = tempfile::tempdir().unwrap();
        let mut open = || {
            let target = FilesTarget::new(plan(directory.path(), RestoreMode::New)).unwrap();
            Box::new(target) as Box<dyn Target<Done = Restored>>
        };
        check(&mut open, &|| observe(directory.path()));
    }
}

/// Far more levels, and far more directories in use at once, than descriptors.
#[test]
fn a_tree_deeper_than_there_are_descriptors() {
    const LEVELS: usize = 1000;
    const IN_A_PROCESS_OF_ITS_OWN: &str = "MAINSTAY_TEST_FEW_DESCRIPTORS";
    if std::env::var_os(IN_A_PROCESS_OF_ITS_OWN).is_none() {
        // The limit is the process's, and other tests may run beside this one.
        let this = Program::new(std::env::current_exe().unwrap(), std::time::Duration::from_secs(500));
        let this = this.arguments(["--exact", "conformance::a_tree_deeper_than_there_are_descriptors"]);
        this.variable(IN_A_PROCESS_OF_ITS_OWN, "yes").run_well().unwrap();
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let tree = directory.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    let mut dir = rustix::fs::open(&tree, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    for level in 0..LEVELS {
        rustix::fs::mkdirat(&dir, c"d", rustix::fs::Mode::RWXU).unwrap();
        rustix::fs::symlinkat(format!("{level}"), &dir, c"link").unwrap();
        let flags = rustix::fs::OFlags::PATH;
        dir = rustix::fs::openat(&dir, c"d", flags, rustix::fs::Mode::empty()).unwrap();
    }
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(400), ..limit }).unwrap();
    let target = directory.path().join("target");
    let restored = backup_and_restore(&tree, &target, RestoreMode::New);
    assert_eq!(restored.skips, []);
    assert!(restored.counts.items > 2 * LEVELS as u64);
    let again = backup_and_restore(&tree, &target, RestoreMode::Mirror);
    assert_eq!((again.changes.created, again.changes.replaced, again.skips), (0, 0, Vec::new()));
    assert!(inside(&target, &tree).join("d/d/link").is_symlink());
    // Deleting it again takes as few.
    std::fs::remove_dir_all(&target).unwrap_or_default();
}
