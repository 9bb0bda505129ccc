//! What a backup and a restore do to a machine's disks, without a repository in between.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_core::{ChangeState, Consistency, ExtentKind, Id16};
use mainstay_testkit::lab::{FileSystem, Fsck, GuestPlan, Inside, check_rounds, compare};
use mainstay_workloads::vm::{
    DiskMode, Hypervisor, MachineId, MachineSnapshot, Marks, Owner, SnapshotRequest,
};

/// Rounds that the writer has to finish while a snapshot stands.
const ROUNDS: u64 = 5;

/// Bytes that are copied at once.
const PART: usize = 1 << 20;

/// Where the writer writes: the first disk, and the second one.
pub(crate) const PLACES: [&str; 2] = ["/data", "/mnt"];

/// A machine with two disks whose guest writes to both for ever, and its points as raw images.
pub(crate) struct Protected<'a> {
    pub(crate) host: &'a dyn Hypervisor,
    pub(crate) machine: MachineId,
    pub(crate) inside: Inside,
    directory: tempfile::TempDir,
    marks: Option<Marks>,
    runs: u8,
}

impl<'a> Protected<'a> {
    /// Waits for the guest and sets its writers to work.
    pub(crate) fn new(host: &'a dyn Hypervisor, machine: MachineId, inside: &Inside) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let protected = Self { host, machine, inside: inside.clone(), directory, marks: None, runs: 0 };
        protected.work();
        protected
    }

    /// Waits for the guest and sets its writers to work, as after every boot.
    pub(crate) fn work(&self) {
        self.inside.wait().unwrap();
        self.inside.run_well("mount /dev/vdb /mnt").unwrap();
        for place in PLACES {
            self.inside.start_writer(place).unwrap();
        }
        for place in PLACES {
            self.inside.wait_for_rounds(place, ROUNDS).unwrap();
        }
    }

    /// The writers stop, and nothing changes the disks any more.
    pub(crate) fn rest(&self) {
        let line = "killall writer; sync; umount /mnt; mount -o remount,ro / && sync";
        self.inside.run_well(line).unwrap();
    }

    pub(crate) fn rounds(&self) -> [u64; 2] {
        PLACES.map(|place| self.inside.rounds(place).unwrap())
    }

    /// The newest captured state of a disk.
    pub(crate) fn image(&self, disk: usize) -> PathBuf {
        self.directory.path().join(format!("{disk}.raw"))
    }

    pub(crate) fn request(&mut self) -> SnapshotRequest {
        self.runs += 1;
        let owner = Owner { repository: Id16([1; 16]), workload: Id16([2; 16]) };
        SnapshotRequest { since: self.marks.clone(), ..SnapshotRequest::new(owner, Id16([self.runs; 16])) }
    }

    pub(crate) fn snapshot(&mut self) -> Box<dyn MachineSnapshot> {
        let request = self.request();
        self.host.snapshot(&self.machine, &request).unwrap()
    }

    /// Takes a point under the running writers and brings the images to it; how its disks were read.
    pub(crate) fn back_up(&mut self) -> Vec<&'static str> {
        let before = self.rounds();
        let snapshot = self.snapshot();
        let after = self.rounds();
        assert_eq!(snapshot.reached(), Consistency::FileSystem, "{:?}", snapshot.notes());
        println!("the guest stood still for {:?}", snapshot.frozen());
        // The guest goes on, and what it writes now belongs to the next point.
        for place in PLACES {
            self.inside.wait_for_rounds(place, ROUNDS).unwrap();
        }
        let modes = snapshot.disks().iter().map(|disk| disk.mode.name()).collect();
        for disk in 0..PLACES.len() {
            capture(snapshot.as_ref(), disk, &self.image(disk));
        }
        self.marks = Some(snapshot.marks().unwrap());
        snapshot.commit().unwrap();
        self.check(Fsck::Clean, before, after);
        modes
    }

    /// Whether the images are a moment of the guest between two others.
    pub(crate) fn check(&self, expected: Fsck, before: [u64; 2], after: [u64; 2]) {
        for (disk, place) in PLACES.into_iter().enumerate() {
            let system = FileSystem::of(&self.image(disk)).unwrap();
            system.fsck(expected).unwrap();
            let out = tempfile::tempdir().unwrap();
            let at = system.tree(if disk == 0 { place } else { "/" }, out.path()).unwrap();
            let seen = check_rounds(&at).unwrap();
            let between = before[disk]..=after[disk];
            assert!(between.contains(&seen), "disk {disk} is of round {seen}, not of {between:?}");
        }
    }

    /// Whether the images hold what the machine's own do, bit by bit. The guest must rest.
    pub(crate) fn compare(&self, disks: [&Path; 2]) {
        for (disk, own) in disks.into_iter().enumerate() {
            compare(&self.image(disk), own).unwrap();
        }
    }

    /// Boots a machine from the images, whose writers go on where these were.
    pub(crate) fn boot(&self) {
        let plan = GuestPlan::bare().unwrap().disk(&self.image(0)).disk(&self.image(1)).boots_itself();
        let mut restored = plan.start().unwrap();
        restored.inside().wait().unwrap();
        let rounds = restored.inside().rounds(PLACES[0]).unwrap();
        assert!(rounds > 0, "the restored machine has lost everything");
        restored.inside().start_writer(PLACES[0]).unwrap();
        restored.inside().wait_for_rounds(PLACES[0], ROUNDS).unwrap();
        restored.shut_down().unwrap();
        let out = tempfile::tempdir().unwrap();
        let system = FileSystem::of(&self.image(0)).unwrap();
        assert!(check_rounds(&system.tree(PLACES[0], out.path()).unwrap()).unwrap() >= rounds + ROUNDS);
    }
}

/// Brings an image to what the snapshot holds, and reads only what must be read.
pub(crate) fn capture(snapshot: &dyn MachineSnapshot, disk: usize, image: &Path) {
    let shown = &snapshot.disks()[disk];
    let blocks = snapshot.open(disk).unwrap();
    if shown.mode != DiskMode::Incremental {
        let _absent = std::fs::remove_file(image);
    }
    let file = File::options().create(true).truncate(false).write(true).open(image).unwrap();
    file.set_len(shown.size).unwrap();
    let mut buffer = vec![0; PART];
    let mut read = 0;
    for extent in blocks.extents(0..shown.size).unwrap() {
        if extent.change == ChangeState::Unchanged {
            continue;
        }
        let mut at = extent.range.start;
        if extent.kind != ExtentKind::Data && shown.mode != DiskMode::Incremental {
            continue;
        }
        while at < extent.range.end {
            let part = &mut buffer[..PART.min((extent.range.end - at) as usize)];
            blocks.read_at(at, part).unwrap();
            file.write_all_at(part, at).unwrap();
            at += part.len() as u64;
        }
        read += extent.range.end - extent.range.start;
    }
    println!("disk {disk}: {}, {} of {} KiB read", shown.mode.name(), read >> 10, shown.size >> 10);
}

/// For people: how long the guest's own clock says that it stood still.
pub(crate) fn report(standstills: &[Duration]) {
    println!("by the guest's clock it stood still for {standstills:?}");
}
