//! Files inside the disks of a recovery point: found, read and restored without a restore of the disk.

#![cfg(test)]

use std::path::Path;
use std::sync::Arc;

use mainstay_core::{
    Body, Captured, Clock, Consistency, Item, ItemPath, Kind, Metadata, Next, Piece, Position, Progress,
    Receipt, Result, Silent, Source, Stamp, Time,
};
use mainstay_core::{Id16, WorkloadKind, WorkloadRef};
use mainstay_diskimage::FileBlocks;
use mainstay_engine::copy::copy;
use mainstay_engine::restore::{Placing, RestoreRequest, plan_restore, restore};
use mainstay_engine::view::PointView;
use mainstay_engine::vm::{Inside, MachineView, MixedView};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::{Compression, Options, Parent, PointReader, Repository, Tuning, WriteRequest};
use mainstay_testkit::{MemoryStore, Part, ScriptedClock, TestItem, tool};
use mainstay_workloads::files::{OwnerRule, RestoreMode};

const BOOT: u64 = 1 << 20;
const SRV: u64 = 25 << 20;

/// Writes a disk of two partitions: the system, and what it mounts at `/srv`.
fn make_disk(image: &Path, system: &Path, srv: &Path) {
    std::fs::File::create(image).unwrap().set_len(48 << 20).unwrap();
    let image = image.to_str().unwrap();
    tool("sfdisk", &[image], "label: gpt\nstart=1MiB, size=24MiB\nstart=25MiB, size=20MiB\n");
    for (tree, offset, size, uuid) in [
        (system, BOOT, "24m", "aaaaaaaa-1111-4222-8333-444444444444"),
        (srv, SRV, "20m", "bbbbbbbb-1111-4222-8333-444444444444"),
    ] {
        let options = format!("offset={offset}");
        let tree = tree.to_str().unwrap();
        tool("mke2fs", &["-q", "-t", "ext4", "-U", uuid, "-E", &options, "-d", tree, image, size], "");
    }
}

/// Yields the disk `vda`.
struct OneDisk(u8, std::path::PathBuf);

impl Source for OneDisk {
    fn next(&mut self) -> Result<Next> {
        self.0 += 1;
        let item = |path: &str, metadata, body| {
            let path = ItemPath::new(path).unwrap();
            Next::Item(Box::new(Item { path, metadata, stamp: Stamp::default(), body }))
        };
        Ok(match self.0 {
            1 => item("disks", Metadata::new(Kind::Directory), Body::None),
            2 => {
                let blocks = FileBlocks::open(&self.1)?;
                let size = std::fs::metadata(&self.1).unwrap().len();
                let metadata = Metadata { size, ..Metadata::new(Kind::Disk) };
                item("disks/vda", metadata, Body::Blocks(Box::new(blocks)))
            }
            _ => Next::End,
        })
    }

    fn seal(&mut self) -> Result<Captured> {
        let position = Position(Vec::new());
        Ok(Captured { position, consistency: Consistency::Crash, moment: Time::from_seconds(1) })
    }

    fn commit(self: Box<Self>, _receipt: &Receipt) -> Result<()> {
        Ok(())
    }
}

struct Bench {
    directory: tempfile::TempDir,
    repository: Repository,
    clock: Arc<dyn Clock>,
    reader: PointReader,
}

fn bench() -> Bench {
    let directory = tempfile::tempdir().unwrap();
    let (system, srv) = (directory.path().join("system"), directory.path().join("srv"));
    for path in ["etc/nginx", "srv", "usr"] {
        std::fs::create_dir_all(system.join(path)).unwrap();
    }
    let table = "/dev/sda1 / ext4 defaults 0 1\nUUID=BBBBBBBB-1111-4222-8333-444444444444 /srv ext4 rw 0 2\n";
    std::fs::write(system.join("etc/fstab"), table).unwrap();
    std::fs::write(system.join("etc/nginx/nginx.conf"), "worker_processes 4;\n".repeat(9000)).unwrap();
    std::fs::write(system.join("etc/old.bak"), "old").unwrap();
    std::fs::create_dir_all(srv.join("www")).unwrap();
    std::fs::write(srv.join("www/index.html"), "<p>hello").unwrap();
    std::os::unix::fs::symlink("index.html", srv.join("www/home.html")).unwrap();
    let image = directory.path().join("disk.raw");
    make_disk(&image, &system, &srv);

    let clock: Arc<dyn Clock> = Arc::new(ScriptedClock::at(Time::from_seconds(4_000_000_000)));
    let options = Options { clock: Arc::clone(&clock), state: None, tuning: Tuning::default() };
    let store = Arc::new(MemoryStore::new());
    let repository = Repository::create(store, KeyRing::create().unwrap(), &[], &options).unwrap();
    let reader = store_point(&repository, "vm", OneDisk(0, image));
    Bench { directory, repository, clock, reader }
}

fn store_point(repository: &Repository, kind: &str, source: impl Source + 'static) -> PointReader {
    let request = WriteRequest {
        workload: WorkloadRef { id: Id16([1; 16]), kind: WorkloadKind(kind.into()), name: "web".into() },
        host: "here".into(),
        roots: vec![],
        tags: vec![],
        reread_one_in: 0,
        any_order: false,
        parent: Parent::None,
        progress: Arc::new(Silent),
        compression: Compression::default(),
        jobs: 1,
    };
    let writer = repository.write(request).unwrap();
    let point = copy(Box::new(source), Box::new(writer), &Silent).unwrap();
    repository.read(&point).unwrap()
}

/// Files as the machine's agent captured them below one root, leaving some out.
struct Agent(std::vec::IntoIter<TestItem>, &'static [u8]);

impl Source for Agent {
    fn next(&mut self) -> Result<Next> {
        Ok(self.0.next().map_or(Next::End, |item| Next::Item(Box::new(item.to_item()))))
    }

    fn seal(&mut self) -> Result<Captured> {
        let position = Position(self.1.to_vec());
        Ok(Captured { position, consistency: Consistency::Fuzzy, moment: Time::from_seconds(2) })
    }

    fn commit(self: Box<Self>, _receipt: &Receipt) -> Result<()> {
        Ok(())
    }
}

fn path(text: &str) -> ItemPath {
    ItemPath::new(text).unwrap()
}

fn names(view: &MachineView, directory: &str) -> Vec<String> {
    view.list(&path(directory)).unwrap().iter().map(|seen| seen.path.to_string()).collect()
}

fn content(view: &MachineView, file: &str) -> String {
    let mut stream = view.open(&path(file)).unwrap();
    let (mut buffer, mut found) = (vec![0; 1 << 16], Vec::new());
    loop {
        match stream.read(&mut buffer).unwrap() {
            Piece::Data(length) => found.extend_from_slice(&buffer[..length]),
            Piece::Hole(length) => found.resize(found.len() + length as usize, 0),
            Piece::End => return String::from_utf8(found).unwrap(),
        }
    }
}

#[test]
fn the_tree_of_a_machine_is_joined_as_its_own_table_says() {
    let bench = bench();
    let view = MachineView::open(bench.reader, &Inside::TRUSTED).unwrap();
    assert_eq!(view.notes(), &[] as &[String]);
    assert_eq!(names(&view, ""), ["@machine", "@volumes", "etc", "lost+found", "srv", "usr"]);
    assert_eq!(names(&view, "srv/www"), ["srv/www/home.html", "srv/www/index.html"]);
    assert_eq!(names(&view, "@volumes"), ["@volumes/vda1", "@volumes/vda2"]);
    assert_eq!(names(&view, "@volumes/vda1/srv"), [] as [String; 0]);
    assert_eq!(names(&view, "@machine/disks"), ["@machine/disks/vda"]);
    assert_eq!(content(&view, "srv/www/index.html"), "<p>hello");
    assert_eq!(content(&view, "@volumes/vda2/www/index.html"), "<p>hello");
    let link = view.lookup(&path("srv/www/home.html")).unwrap().unwrap();
    assert_eq!(link.metadata.link_target.as_deref(), Some(&b"index.html"[..]));
    assert!(view.lookup(&path("srv/www/none")).unwrap().is_none());
    let walked: Vec<_> = view.walk(&path("")).unwrap().map(|seen| seen.unwrap().path).collect();
    assert!(walked.is_sorted() && walked.len() == 13, "{walked:?}");
}

#[test]
fn files_of_a_machine_are_restored_like_any_others() {
    let bench = bench();
    let view = MachineView::open(bench.reader.clone(), &Inside::TRUSTED).unwrap();
    let target = bench.directory.path().join("out");
    let request = RestoreRequest {
        selection: vec![path("etc/nginx"), path("srv/www")],
        placing: Placing::Below(target.clone()),
        mode: RestoreMode::New,
        owners: OwnerRule::Leave,
        keep: vec![],
    };
    let progress: Arc<dyn Progress> = Arc::new(Silent);
    let plan = plan_restore(&view, &request, &Silent).unwrap();
    let done = restore(&bench.repository, &view, &plan, None, &bench.clock, &progress).unwrap();
    assert_eq!((done.restored.counts.skipped, done.restored.damaged), (0, 0), "{:?}", done.restored.skips);
    for (stored, original) in [("etc/nginx", "system/etc/nginx"), ("srv/www", "srv/www")] {
        let original = bench.directory.path().join(original);
        tool("diff", &["-r", original.to_str().unwrap(), target.join(stored).to_str().unwrap()], "");
    }
    assert!(!target.join("etc/fstab").exists());
}

/// Weekly the image, daily the files: what is newer shows, what was deleted is gone, what was left out is as in the
/// image.
#[test]
fn newer_files_lie_over_the_image_and_what_they_no_longer_have_is_gone() {
    let bench = bench();
    let file = |name: &str, text: &str| TestItem::file(path(name), vec![Part::Bytes(text.into())]);
    let directory = |name: &str| TestItem::directory(path(name));
    let items = vec![
        directory("etc"),
        file("etc/fresh", "new"),
        directory("etc/nginx"),
        file("etc/nginx/nginx.conf", "worker_processes 8;"),
    ];
    // Captured below /etc, without what is called *.bak; version 1 of the record.
    let record = b"\x01netc\0retc\0p*.bak\0";
    let files = store_point(&bench.repository, "files", Agent(items.into_iter(), record));
    let view = MachineView::open(bench.reader.clone(), &Inside::TRUSTED).unwrap();
    let mixed = MixedView::new(Arc::new(view), files).unwrap().unwrap();
    let names = |directory: &str| -> Vec<String> {
        mixed.list(&path(directory)).unwrap().iter().map(|seen| seen.path.to_string()).collect()
    };
    assert_eq!(names(""), ["@machine", "@volumes", "etc", "lost+found", "srv", "usr"]);
    // fstab was deleted since; old.bak was left out by the agent and comes from the image.
    assert_eq!(names("etc"), ["etc/fresh", "etc/nginx", "etc/old.bak"]);
    assert!(mixed.lookup(&path("etc/fstab")).unwrap().is_none());
    assert_eq!(names("srv/www"), ["srv/www/home.html", "srv/www/index.html"]);
    let target = bench.directory.path().join("mixed");
    let request = RestoreRequest {
        selection: vec![ItemPath::root()],
        placing: Placing::Below(target.clone()),
        mode: RestoreMode::New,
        owners: OwnerRule::Leave,
        keep: vec![],
    };
    let progress: Arc<dyn Progress> = Arc::new(Silent);
    let plan = plan_restore(&mixed, &request, &Silent).unwrap();
    let done = restore(&bench.repository, &mixed, &plan, None, &bench.clock, &progress).unwrap();
    assert_eq!((done.restored.counts.skipped, done.restored.damaged), (0, 0), "{:?}", done.restored.skips);
    let read = |name: &str| std::fs::read_to_string(target.join(name)).ok();
    assert_eq!(read("etc/nginx/nginx.conf").as_deref(), Some("worker_processes 8;"));
    assert_eq!((read("etc/fresh").as_deref(), read("etc/old.bak").as_deref()), (Some("new"), Some("old")));
    assert_eq!((read("srv/www/index.html").as_deref(), read("etc/fstab")), (Some("<p>hello"), None));
    assert!(!target.join("@machine").exists());
}

/// Several agents' points lie over each other, and what one left out as a cache shows from below.
#[test]
fn files_lie_over_files_and_caches_show_from_below() {
    let bench = bench();
    let file = |name: &str, text: &str| TestItem::file(path(name), vec![Part::Bytes(text.into())]);
    let directory = |name: &str| TestItem::directory(path(name));
    let tagged = vec![
        directory("etc"),
        directory("etc/nginx"),
        file("etc/nginx/CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55"),
    ];
    let later = vec![directory("srv"), directory("srv/www"), file("srv/www/index.html", "<p>later")];
    let mut view: Arc<dyn PointView> =
        Arc::new(MachineView::open(bench.reader.clone(), &Inside::TRUSTED).unwrap());
    for (items, record) in [(tagged, &b"\x01netc\0retc\0c\0"[..]), (later, &b"\x01nsrv/www\0rsrv/www\0"[..])]
    {
        let files = store_point(&bench.repository, "files", Agent(items.into_iter(), record));
        view = Arc::new(MixedView::new(view, files).unwrap().unwrap());
    }
    let names = |directory: &str| -> Vec<String> {
        view.list(&path(directory)).unwrap().iter().map(|seen| seen.path.to_string()).collect()
    };
    assert_eq!(names("etc"), ["etc/nginx"]);
    assert_eq!(names("etc/nginx"), ["etc/nginx/CACHEDIR.TAG", "etc/nginx/nginx.conf"]);
    assert_eq!(names("srv/www"), ["srv/www/index.html"]);
    let walked: Vec<_> =
        view.walk(&path("srv")).unwrap().map(|seen| seen.unwrap().path.to_string()).collect();
    assert_eq!(walked, ["srv", "srv/lost+found", "srv/www", "srv/www/index.html"]);
}
