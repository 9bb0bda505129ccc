//! Goal: a damaged page of a point's tree costs what it holds and nothing else, and a mirror deletes nothing for it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{BlobStore, Clock, ItemPath, Progress, Silent, Time};
use mainstay_engine::backup::{BackupRequest, backup};
use mainstay_engine::restore::{Placing, RestoreRequest, plan_restore, restore};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::{Options, Repository, Tuning, Unlock};
use mainstay_testkit::{MemoryStore, Rng, ScriptedClock};
use mainstay_workloads::files::{Action, FilesRequest, OwnerRule, RestoreMode};

const DIRECTORIES: usize = 2;
const FILES: usize = 2500;

/// Files with names that do not compress, so that the tree has many pages.
fn make(root: &Path) {
    let mut rng = Rng::new(1);
    for directory in 0..DIRECTORIES {
        let directory = root.join(format!("{directory:02}"));
        std::fs::create_dir(&directory).unwrap();
        for _ in 0..FILES {
            let name: String = rng.bytes(100).iter().map(|byte| format!("{byte:02x}")).collect();
            std::fs::write(directory.join(name), "").unwrap();
        }
    }
}

fn files(root: &Path) -> BTreeSet<PathBuf> {
    let names = |directory: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let directories = names(root);
    let files = directories.iter().flat_map(|directory| names(directory));
    files.map(|path| path.strip_prefix(root).unwrap().to_owned()).collect()
}

#[test]
fn a_damaged_page_costs_what_it_holds_and_a_mirror_deletes_nothing_for_it() {
    let clock = ScriptedClock::at(Time::from_seconds(4_000_000_000));
    // Parity would make the damage good.
    let tuning = Tuning { parity: false, ..Tuning::default() };
    let options = Options { clock: Arc::new(clock.clone()), state: None, tuning };
    let clock: Arc<dyn Clock> = Arc::new(clock);
    let (ring, store) = (KeyRing::create().unwrap(), MemoryStore::new());
    let repository = Repository::create(Arc::new(store.clone()), ring.clone(), &[], &options).unwrap();
    let home = tempfile::tempdir().unwrap();
    let (tree, back) = (home.path().join("tree"), home.path().join("back"));
    std::fs::create_dir(&tree).unwrap();
    make(&tree);
    let progress: Arc<dyn Progress> = Arc::new(Silent);
    let request = FilesRequest { roots: vec![tree.clone()], ..FilesRequest::default() };
    let request = BackupRequest { files: request, host: "here".into(), jobs: 1, ..BackupRequest::default() };
    let point = backup(&repository, &request, &clock, &progress).unwrap().id;

    let blobs = store.snapshot();
    let packs = blobs.iter().filter(|(name, _)| name.starts_with("pack/"));
    let (pack, bytes) = packs.max_by_key(|(_, bytes)| bytes.len()).unwrap();
    let mut changed = bytes.to_vec();
    // All of it in the first directory, and not its beginning.
    changed[bytes.len() * 3 / 10] ^= 1;
    store.delete(pack).unwrap();
    store.put_new(pack, &[&changed]).unwrap();
    let repository = Repository::open(Arc::new(store), &Unlock::Ring(Box::new(ring)), &options).unwrap();
    let reader = repository.read(&point).unwrap();
    let selected = ItemPath::new(tree.to_str().unwrap().trim_start_matches('/')).unwrap();
    let request = |placing, mode| RestoreRequest {
        selection: vec![selected.clone()],
        placing,
        mode,
        owners: OwnerRule::Leave,
        keep: Vec::new(),
    };

    let wanted = files(&tree);
    let new = request(Placing::Stripped(back.clone()), RestoreMode::New);
    let plan = plan_restore(&reader, &new, &Silent).unwrap();
    assert!(!plan.lost.is_empty());
    let restored = restore(&repository, &reader, &plan, None, &clock, &progress).unwrap().restored;
    assert_eq!((restored.damaged, restored.skips.len()), (plan.lost.len() as u64, plan.lost.len()));
    let there = files(&back);
    assert!(there.is_subset(&wanted) && there.len() * 2 > wanted.len() && there != wanted);
    let lost_paths: Vec<PathBuf> = plan.lost.iter().map(|lost| lost.path.to_string().into()).collect();
    let (lost, paths) = (lost_paths.clone(), lost_paths);
    let lost = |path: &Path| lost.iter().any(|lost| lost == Path::new("/") || path.starts_with(lost));
    assert!(wanted.difference(&there).all(|path| lost(path)));

    // What was made after the point goes where the point is whole, and stays where it is not.
    // Where pages end depends on the key, so the damage may reach into both directories.
    let mut whole = 0;
    for directory in files(&tree).iter().map(|path| path.parent().unwrap()).collect::<BTreeSet<_>>() {
        std::fs::write(tree.join(directory).join("new"), "").unwrap();
        whole += u64::from(!lost(directory) && !paths.iter().any(|path| path.starts_with(directory)));
    }
    let mirror = request(Placing::Original, RestoreMode::Mirror);
    let plan = plan_restore(&reader, &mirror, &Silent).unwrap();
    let planned = plan.changes.iter().filter(|change| change.action == Action::Delete).count() as u64;
    let restored = restore(&repository, &reader, &plan, Some("here"), &clock, &progress).unwrap().restored;
    let after = files(&tree);
    assert!(after.is_superset(&wanted), "{} files were deleted", wanted.difference(&after).count());
    assert_eq!((restored.changes.deleted, restored.damaged), (planned, plan.lost.len() as u64));
    assert_eq!(planned, whole);

    // A selection of what is lost and what is not.
    let (gone, whole) = (wanted.difference(&there).next().unwrap(), there.first().unwrap());
    let mut request = request(Placing::Below(home.path().join("some")), RestoreMode::New);
    request.selection =
        [gone, whole].map(|path| ItemPath::new(format!("{selected}/{}", path.display())).unwrap()).to_vec();
    let plan = plan_restore(&reader, &request, &Silent).unwrap();
    let restored = restore(&repository, &reader, &plan, None, &clock, &progress).unwrap().restored;
    assert!(
        restored.damaged > 0
            && home.path().join("some").join(tree.strip_prefix("/").unwrap()).join(whole).exists()
    );
}
