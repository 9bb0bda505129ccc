//! What a backup and a restore do to a machine's disks, without a repository in between.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use mainstay_core::{ChangeState, Consistency, ExtentKind, Id16};
use mainstay_testkit::lab::{Fsck, Inside, Writers};
use mainstay_workloads::vm::{
    DiskMode, Hypervisor, MachineId, MachineSnapshot, Marks, Owner, SnapshotRequest,
};

/// Bytes that are copied at once.
const PART: usize = 1 << 20;

/// A machine with two disks whose guest writes to both for ever, and its newest point as raw images.
pub(crate) struct Protected<'a> {
    host: &'a dyn Hypervisor,
    machine: MachineId,
    pub(crate) writers: Writers,
    images: [PathBuf; 2],
    _directory: tempfile::TempDir,
    marks: Option<Marks>,
    runs: u8,
}

impl<'a> Protected<'a> {
    /// Waits for the guest and sets its writers to work.
    pub(crate) fn new(host: &'a dyn Hypervisor, machine: MachineId, inside: &Inside) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let images = [0, 1].map(|disk| directory.path().join(format!("{disk}.raw")));
        let writers = Writers::start(inside).unwrap();
        Self { host, machine, writers, images, _directory: directory, marks: None, runs: 0 }
    }

    pub(crate) fn images(&self) -> [&Path; 2] {
        [&self.images[0], &self.images[1]]
    }

    pub(crate) fn snapshot(&mut self) -> Box<dyn MachineSnapshot> {
        self.runs += 1;
        let owner = Owner { repository: Id16([1; 16]), workload: Id16([2; 16]) };
        let request = SnapshotRequest::new(owner, Id16([self.runs; 16]));
        let request = SnapshotRequest { since: self.marks.clone(), ..request };
        self.host.snapshot(&self.machine, &request).unwrap()
    }

    /// Takes a point under the running writers and brings the images to it; how its disks were read.
    pub(crate) fn back_up(&mut self) -> Vec<&'static str> {
        let before = self.writers.rounds().unwrap();
        let snapshot = self.snapshot();
        let after = self.writers.rounds().unwrap();
        assert_eq!(snapshot.reached(), Consistency::FileSystem, "{:?}", snapshot.notes());
        println!("the guest stood still for {:?}", snapshot.frozen());
        // The guest goes on, and what it writes now belongs to the next point.
        self.writers.write_on().unwrap();
        let modes = snapshot.disks().iter().map(|disk| disk.mode.name()).collect();
        self.capture(snapshot.as_ref());
        self.marks = Some(snapshot.marks().unwrap());
        snapshot.commit().unwrap();
        Writers::check(self.images(), Fsck::Clean, before, after).unwrap();
        modes
    }

    /// Brings the images to what the snapshot holds.
    pub(crate) fn capture(&self, snapshot: &dyn MachineSnapshot) {
        for (disk, image) in self.images().into_iter().enumerate() {
            capture(snapshot, disk, image);
        }
    }
}

/// Brings an image to what the snapshot holds, and reads only what must be read.
fn capture(snapshot: &dyn MachineSnapshot, disk: usize, image: &Path) {
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
