//! A whole machine restored from its image and its newer files, on real file systems: as root, who may mount them.

#![cfg(test)]

use std::collections::VecDeque;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{
    Body, Captured, Clock, Consistency, Item, ItemPath, Kind, Metadata, Next, Position, Progress, Receipt,
    Result, Silent, Source, Stamp, Time,
};
use mainstay_core::{Id16, WorkloadKind, WorkloadRef};
use mainstay_diskimage::FileBlocks;
use mainstay_engine::address::LATEST;
use mainstay_engine::backup::{BackupRequest, backup};
use mainstay_engine::copy::copy;
use mainstay_engine::vm::{
    Applied, DiskPlaces, ImageFolder, Inside, Newer, machine_tag, newer_files, plan_machine, restore_machine,
};
use mainstay_repository::keys::KeyRing;
use mainstay_repository::{Compression, Options, Parent, PointInfo, Repository, Tuning, WriteRequest};
use mainstay_testkit::tree::{compare, hostile_tree};
use mainstay_testkit::{MemoryStore, ScriptedClock, tool};
use mainstay_workloads::files::FilesRequest;
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::UnshareFlags;

/// Runs `test` on a thread whose mounts and root nobody else sees.
fn apart(test: impl FnOnce() + Send) {
    let parted = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            #[expect(unsafe_code, reason = "a mount that only this thread sees needs this call")]
            // SAFETY: only the mounts, the root and the working directory of this new thread part from the others'.
            unsafe {
                rustix::thread::unshare_unsafe(UnshareFlags::NEWNS).unwrap();
            }
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
            test();
        });
        thread.join()
    });
    parted.unwrap();
}

/// Whether this test can run at all.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("NOT RUN: mounting volumes needs a privilege; run this test as root");
    }
    root
}

const SRV: &str = "bbbbbbbb-1111-4222-8333-444444444444";
const HOME: &str = "cccccccc-1111-4222-8333-444444444444";

/// A volume: its disk, where on it the volume begins and how long it is, in MiB, its file system with options, and where
/// the machine mounts it.
struct Volume(&'static str, u64, u64, &'static str, &'static str, &'static str);

/// A machine of some disks and volumes.
struct Live {
    directory: PathBuf,
    disks: Vec<PathBuf>,
    volumes: Vec<Volume>,
    /// Its table of mounts.
    table: String,
}

impl Live {
    fn of(directory: &Path, disks: &[(&str, u64)], volumes: Vec<Volume>, table: &str) -> Self {
        let made = disks.iter().map(|(name, megabytes)| {
            let disk = directory.join(format!("{name}.raw"));
            std::fs::File::create(&disk).unwrap().set_len(megabytes << 20).unwrap();
            disk
        });
        let (directory, disks, table) = (directory.to_owned(), made.collect(), table.to_owned());
        Self { directory, disks, volumes, table }
    }

    /// Partitions with ext4, and a bare disk with XFS.
    fn make(directory: &Path) -> Self {
        let volumes = vec![
            Volume("vda", 1, 40, "ext4", "", ""),
            Volume("vda", 41, 40, "ext4", "", "srv"),
            Volume("vdb", 0, 320, "xfs", ",nouuid", "home"),
        ];
        let table =
            format!("/dev/sda1 / ext4 defaults 0 1\nUUID={SRV} /srv ext4 rw\nUUID={HOME} /home xfs rw\n");
        let live = Self::of(directory, &[("vda", 82), ("vdb", 320)], volumes, &table);
        let (vda, vdb) = (live.disks[0].to_str().unwrap(), live.disks[1].to_str().unwrap());
        tool("sfdisk", &[vda], "label: gpt\nstart=1MiB, size=40MiB\nstart=41MiB, size=40MiB\n");
        for (offset, uuid) in [("1048576", "aaaaaaaa-1111-4222-8333-444444444444"), ("42991616", SRV)] {
            let options = format!("offset={offset}");
            tool("mke2fs", &["-q", "-b", "4096", "-t", "ext4", "-U", uuid, "-E", &options, vda, "10240"], "");
        }
        tool("mkfs.xfs", &["-q", "-m", &format!("uuid={HOME}"), vdb], "");
        live
    }

    /// Subvolumes of btrfs, a logical volume, and FAT.
    fn make_other(directory: &Path) -> Self {
        let mut volumes = vec![
            Volume("vda", 1, 120, "btrfs", ",subvol=/@", ""),
            Volume("vda", 1, 120, "btrfs", ",subvol=/@home", "home"),
            // The first extents of the physical volume.
            Volume("vdb", 1, 40, "ext4", "", "srv"),
        ];
        if knows_fat() {
            volumes.push(Volume("vda", 121, 40, "vfat", ",umask=0077", "boot/efi"));
        }
        let table = "LABEL=system / btrfs subvol=@ 0 0\nLABEL=system /home btrfs subvol=/@home 0 0\n\
                     /dev/mapper/vg-srv /srv ext4 rw\nLABEL=EFI /boot/efi vfat umask=0077 0 1\n";
        let live = Self::of(directory, &[("vda", 162), ("vdb", 48)], volumes, table);
        let (vda, vdb) = (live.disks[0].to_str().unwrap(), live.disks[1].to_str().unwrap());
        let part = |name: &str, megabytes: u64| {
            let file = directory.join(name);
            std::fs::File::create(&file).unwrap().set_len(megabytes << 20).unwrap();
            file
        };
        let (system, firmware) = (part("system", 120), part("firmware", 40));
        tool("mkfs.btrfs", &["-q", "-L", "system", system.to_str().unwrap()], "");
        let top = directory.join("top");
        std::fs::create_dir(&top).unwrap();
        tool("mount", &["-o", "loop", system.to_str().unwrap(), top.to_str().unwrap()], "");
        for subvolume in ["@", "@home"].map(|name| top.join(name)) {
            tool("btrfs", &["subvolume", "create", subvolume.to_str().unwrap()], "");
        }
        Self::unmount(&top);
        tool("mkfs.vfat", &["-n", "EFI", firmware.to_str().unwrap()], "");
        tool("sfdisk", &[vda], "label: gpt\nstart=1MiB, size=120MiB\nstart=121MiB, size=40MiB\n");
        for (volume, at) in [(&system, "1"), (&firmware, "121")] {
            let (from, to, at) =
                (format!("if={}", volume.display()), format!("of={vda}"), format!("seek={at}"));
            tool("dd", &[&from, &to, &at, "bs=1M", "conv=notrunc,sparse", "status=none"], "");
        }
        tool("losetup", &["--find", vdb], "");
        let device = loops(&live.disks[1]).remove(0).0;
        let quiet = "global/activation=0 backup/backup=0 backup/archive=0";
        let lvm = |program: &str, words: &[&str]| {
            tool(program, &[&["--quiet", "--devices", &device, "--config", quiet], words].concat(), "");
        };
        lvm("pvcreate", &["-ff", "-y", &device]);
        lvm("vgcreate", &["-s", "1M", "vg", &device]);
        lvm("lvcreate", &["-an", "-Zn", "-Wn", "-n", "srv", "-l", "40", "vg"]);
        tool("losetup", &["--detach", &device], "");
        tool("mke2fs", &["-q", "-b", "4096", "-t", "ext4", "-E", "offset=1048576", vdb, "10240"], "");
        live
    }

    /// Mounts disks as the machine does.
    fn mount(&self, disks: &[PathBuf], root: &Path) {
        std::fs::create_dir_all(root).unwrap();
        for Volume(disk, start, size, kind, more, at) in &self.volumes {
            let disk = disks.iter().find(|path| path.file_stem().is_some_and(|stem| stem == *disk)).unwrap();
            let at = root.join(at);
            std::fs::create_dir_all(&at).unwrap();
            let options = format!("loop,offset={},sizelimit={}{more}", start << 20, size << 20);
            tool("mount", &["-t", kind, "-o", &options, disk.to_str().unwrap(), at.to_str().unwrap()], "");
        }
    }

    fn unmount(root: &Path) {
        tool("umount", &["-R", root.to_str().unwrap()], "");
    }

    /// What the machine is when its image is taken.
    fn populate(&self, root: &Path) {
        populate(root);
        std::fs::write(root.join("etc/fstab"), &self.table).unwrap();
    }
}

/// Whether this kernel can mount FAT.
fn knows_fat() -> bool {
    std::fs::read_to_string("/proc/filesystems").unwrap().lines().any(|line| line.trim() == "vfat")
}

/// Yields the disks of a machine.
struct Disks(VecDeque<PathBuf>, bool);

impl Source for Disks {
    fn next(&mut self) -> Result<Next> {
        let item = |path: &str, metadata, body| {
            let path = ItemPath::new(path).unwrap();
            Next::Item(Box::new(Item { path, metadata, stamp: Stamp::default(), body }))
        };
        if std::mem::take(&mut self.1) {
            return Ok(item("disks", Metadata::new(Kind::Directory), Body::None));
        }
        let Some(path) = self.0.pop_front() else { return Ok(Next::End) };
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let size = path.metadata().unwrap().len();
        let metadata = Metadata { size, ..Metadata::new(Kind::Disk) };
        Ok(item(&format!("disks/{name}"), metadata, Body::Blocks(Box::new(FileBlocks::open(&path)?))))
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
    repository: Repository,
    clock: Arc<dyn Clock>,
}

impl Bench {
    fn new() -> Self {
        let clock: Arc<dyn Clock> = Arc::new(ScriptedClock::at(Time::from_seconds(4_000_000_000)));
        let options = Options { clock: Arc::clone(&clock), state: None, tuning: Tuning::default() };
        let ring = KeyRing::create().unwrap();
        let repository = Repository::create(Arc::new(MemoryStore::new()), ring, &[], &options).unwrap();
        Self { repository, clock }
    }

    /// Takes the image of the machine.
    fn image(&self, disks: &[PathBuf]) -> PointInfo {
        let request = WriteRequest {
            workload: WorkloadRef { id: Id16([1; 16]), kind: WorkloadKind("vm".into()), name: "web".into() },
            host: "host".into(),
            roots: vec![machine_tag("web")],
            tags: vec![],
            reread_one_in: 0,
            any_order: false,
            parent: Parent::None,
            progress: Arc::new(Silent),
            compression: Compression::default(),
            jobs: 1,
        };
        let writer = self.repository.write(request).unwrap();
        let source = Disks(disks.iter().cloned().collect(), true);
        let point = copy(Box::new(source), Box::new(writer), &Silent).unwrap();
        self.repository.read(&point).unwrap().info().clone()
    }

    /// Backs files up as the machine's agent does, whose root is `root`.
    fn files(&self, root: &Path, paths: &[&str]) -> PointInfo {
        let mut made = None;
        apart(|| {
            rustix::process::chroot(root).unwrap();
            std::env::set_current_dir("/").unwrap();
            let files =
                FilesRequest { roots: paths.iter().map(PathBuf::from).collect(), ..FilesRequest::default() };
            let tags = vec![machine_tag("web")];
            let request =
                BackupRequest { files, host: "web".into(), tags, jobs: 1, ..BackupRequest::default() };
            let progress: Arc<dyn Progress> = Arc::new(Silent);
            made = Some(backup(&self.repository, &request, &self.clock, &progress).unwrap());
        });
        let point = made.unwrap();
        assert_eq!(point.counts.skipped, 0, "{:?}", self.repository.read(&point.id).unwrap().skips());
        point
    }

    /// Restores the image and what is newer than it.
    fn restore(&self, image: &PointInfo, to: &Path) -> (Vec<PathBuf>, Applied) {
        let progress: Arc<dyn Progress> = Arc::new(Silent);
        let reader = self.repository.read(&image.id).unwrap();
        let plan = plan_machine(&reader, &DiskPlaces::Directory(ImageFolder::new(to.to_owned()))).unwrap();
        restore_machine(&reader, &plan, 2, &progress).unwrap();
        let points = self.repository.points().unwrap();
        let files: Vec<PointInfo> = newer_files(image, &points, LATEST).into_iter().cloned().collect();
        let disks: Vec<PathBuf> = plan.goals.iter().map(|goal| goal.path.clone()).collect();
        let (scratch, clock) = (to.parent().unwrap(), &self.clock);
        let newer =
            Newer { repository: &self.repository, files: &files, inside: Inside::TRUSTED, scratch, clock };
        newer.check(&reader, Some(&plan)).unwrap();
        let applied = newer.apply_to(&plan, &progress).unwrap();
        let left = std::fs::read_dir(scratch).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(left.filter(|name| name.to_str().unwrap().starts_with(".mainstay")).count(), 0);
        (disks, applied)
    }
}

fn populate(root: &Path) {
    for path in ["etc/nginx", "var/log/old", "usr", "home/ann", "srv/www"] {
        std::fs::create_dir_all(root.join(path)).unwrap();
    }
    for (name, text) in
        [("same", "same"), ("edited", "old"), ("behind", "1111"), ("gone", "gone"), ("mode", "m")]
    {
        for directory in ["etc", "srv/www", "home/ann"] {
            std::fs::write(root.join(directory).join(name), text).unwrap();
        }
    }
    std::fs::write(root.join("var/log/old/messages"), "x".repeat(100_000)).unwrap();
    std::fs::hard_link(root.join("home/ann/same"), root.join("home/ann/second")).unwrap();
    symlink("nginx", root.join("etc/link")).unwrap();
    std::fs::write(root.join("etc/becomes-directory"), "file").unwrap();
    std::fs::create_dir(root.join("srv/becomes-link")).unwrap();
    std::fs::write(root.join("srv/becomes-link/inside"), "").unwrap();
}

/// What happens between the image and the files.
fn live_on(root: &Path) {
    for directory in ["etc", "srv/www", "home/ann"].map(|directory| root.join(directory)) {
        std::fs::write(directory.join("edited"), "a longer text").unwrap();
        // Other content behind the same size and the same time.
        let behind = directory.join("behind");
        let time = std::fs::metadata(&behind).unwrap().modified().unwrap();
        std::fs::write(&behind, "2222").unwrap();
        std::fs::File::options().write(true).open(&behind).unwrap().set_modified(time).unwrap();
        std::fs::remove_file(directory.join("gone")).unwrap();
        std::fs::write(directory.join("fresh"), "fresh").unwrap();
        std::fs::set_permissions(directory.join("mode"), PermissionsExt::from_mode(0o4751)).unwrap();
        chown(directory.join("fresh"), Some(1234), Some(4321)).unwrap();
    }
    std::fs::remove_dir_all(root.join("var/log/old")).unwrap();
    std::fs::remove_file(root.join("home/ann/second")).unwrap();
    std::fs::hard_link(root.join("home/ann/edited"), root.join("home/ann/second")).unwrap();
    std::fs::remove_file(root.join("etc/becomes-directory")).unwrap();
    std::fs::create_dir(root.join("etc/becomes-directory")).unwrap();
    std::fs::remove_dir_all(root.join("srv/becomes-link")).unwrap();
    symlink("/etc", root.join("srv/becomes-link")).unwrap();
    std::fs::remove_file(root.join("etc/link")).unwrap();
    symlink("elsewhere", root.join("etc/link")).unwrap();
    for missing in hostile_tree(&root.join("srv/hostile")).unwrap() {
        println!("the hostile tree lacks {missing}");
    }
    std::fs::set_permissions(root, PermissionsExt::from_mode(0o711)).unwrap();
}

/// Loop devices whose file lies below a directory, each with its file.
fn loops(directory: &Path) -> Vec<(String, PathBuf)> {
    let devices = std::fs::read_dir("/sys/block").unwrap().map(|entry| entry.unwrap().path());
    let of = |device: PathBuf| {
        let file = std::fs::read_to_string(device.join("loop/backing_file")).ok()?;
        Some((format!("/dev/{}", device.file_name()?.to_str()?), PathBuf::from(file.trim_end())))
    };
    devices.filter_map(of).filter(|(_, file)| file.starts_with(directory)).collect()
}

#[test]
fn a_machine_from_its_image_and_its_newer_files_is_the_live_machine_in_every_file() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    apart(|| {
        let live = Live::make(directory.path());
        let root = live.directory.join("live");
        live.mount(&live.disks, &root);
        live.populate(&root);
        Live::unmount(&root);
        let bench = Bench::new();
        let image = bench.image(&live.disks);
        live.mount(&live.disks, &root);
        live_on(&root);
        bench.files(&root, &["/"]);

        let out = directory.path().join("out");
        let (disks, applied) = bench.restore(&image, &out);
        assert_eq!((applied.skips.as_slice(), applied.damaged), (&[][..], 0));
        assert!(applied.changes.deleted > 0 && applied.changes.same > 0, "{:?}", applied.changes);
        assert_eq!(loops(&out), []);
        let back = directory.path().join("back");
        live.mount(&disks, &back);
        assert_eq!(compare(&root, &back).unwrap(), [] as [String; 0]);
        // What was not touched since the image is the image's own file still.
        let inode = |root: &Path| std::fs::metadata(root.join("etc/same")).unwrap().ino();
        assert_eq!(inode(&root), inode(&back));
        Live::unmount(&back);
        Live::unmount(&root);
    });
}

#[test]
fn what_is_not_on_the_disks_is_listed_and_only_where_the_agent_looked_anything_changes() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    apart(|| {
        let live = Live::make(directory.path());
        let root = live.directory.join("live");
        live.mount(&live.disks, &root);
        live.populate(&root);
        let table = std::fs::read_to_string(root.join("etc/fstab")).unwrap();
        let table = format!("{table}server:/export /mnt nfs rw\n");
        std::fs::write(root.join("etc/fstab"), table).unwrap();
        std::fs::create_dir(root.join("mnt")).unwrap();
        Live::unmount(&root);
        let bench = Bench::new();
        let image = bench.image(&live.disks);
        live.mount(&live.disks, &root);
        live_on(&root);
        std::fs::write(root.join("mnt/remote"), "on another machine").unwrap();
        bench.files(&root, &["/etc", "/mnt"]);
        bench.files(&root, &["/srv/www", "/home"]);

        let (disks, applied) = bench.restore(&image, &directory.path().join("out"));
        let skipped: Vec<String> = applied.skips.iter().map(|skip| skip.path.to_string()).collect();
        assert_eq!(skipped, ["mnt"], "{:?}", applied.skips);
        let back = directory.path().join("back");
        live.mount(&disks, &back);
        for path in ["etc", "srv/www", "home"] {
            assert_eq!(compare(&root.join(path), &back.join(path)).unwrap(), [] as [String; 0], "{path}");
        }
        let there = |path: &str| back.join(path).symlink_metadata().is_ok();
        assert!(there("var/log/old/messages") && there("srv/becomes-link/inside"), "nobody looked there");
        assert!(there("mnt") && !there("mnt/remote") && !there("srv/hostile"));
        Live::unmount(&back);
        Live::unmount(&root);
    });
}

#[test]
fn subvolumes_logical_volumes_and_fat_get_newer_files_too_or_say_why_not() {
    if !is_root() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    apart(|| {
        let live = Live::make_other(directory.path());
        let root = live.directory.join("live");
        live.mount(&live.disks, &root);
        live.populate(&root);
        std::fs::create_dir_all(root.join("boot/efi")).unwrap();
        std::fs::write(root.join("boot/efi/old"), "old").unwrap();
        Live::unmount(&root);
        let bench = Bench::new();
        let image = bench.image(&live.disks);
        live.mount(&live.disks, &root);
        live_on(&root);
        std::fs::remove_file(root.join("boot/efi/old")).unwrap();
        std::fs::write(root.join("boot/efi/new"), "new").unwrap();
        bench.files(&root, &["/"]);
        let (disks, applied) = bench.restore(&image, &directory.path().join("out"));
        let skipped: Vec<String> = applied.skips.iter().map(|skip| skip.path.to_string()).collect();
        let expected: &[&str] = if knows_fat() { &[] } else { &["boot/efi"] };
        assert_eq!(skipped, expected, "{:?}", applied.skips);
        let back = directory.path().join("back");
        live.mount(&disks, &back);
        for path in ["etc", "srv", "home", "usr", "var"] {
            assert_eq!(compare(&root.join(path), &back.join(path)).unwrap(), [] as [String; 0], "{path}");
        }
        if knows_fat() {
            assert_eq!(compare(&root.join("boot"), &back.join("boot")).unwrap(), [] as [String; 0]);
        }
        Live::unmount(&back);
        Live::unmount(&root);
    });
}
