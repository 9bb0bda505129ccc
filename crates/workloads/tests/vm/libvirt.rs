//! The libvirt driver against a guest that writes all the time.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{ChangeState, Code, Consistency, Id16};
use mainstay_testkit::lab::{DomainPlan, FileSystem, Fsck, Libvirt, check_rounds};
use mainstay_testkit::{Rng, ScriptedClock};
use mainstay_workloads::vm::{
    DiskPlace, Hypervisor, LibvirtHost, MachineId, MachineState, Marks, SnapshotRequest,
};

use crate::daemon::{capture, modes, request, whole};

/// Bytes that are written at once; parts of zeros are not.
const PART: usize = 64 << 10;

/// Far beyond every time that a file here can have.
fn clock() -> Arc<ScriptedClock> {
    Arc::new(ScriptedClock::at(mainstay_core::Time::from_seconds(4_000_000_000)))
}

/// One point after another of one machine, as a repository would keep them.
struct Story<'a> {
    host: &'a dyn Hypervisor,
    machine: MachineId,
    rng: Rng,
    marks: Option<Marks>,
    stored: Vec<Vec<u8>>,
}

impl Story<'_> {
    fn asked(&mut self) -> SnapshotRequest {
        SnapshotRequest {
            freeze_limit: Duration::from_secs(60),
            ..request(&mut self.rng, self.marks.as_ref())
        }
    }

    /// Takes a point. Each disk must be what a read of everything gives, and what the guest's writer promises.
    fn point(&mut self, wanted: &[&str], reached: Consistency) {
        let asked = self.asked();
        let snapshot = self.host.snapshot(&self.machine, &asked).unwrap();
        let told = modes(snapshot.as_ref());
        assert_eq!(told.len(), wanted.len(), "{told:?}");
        assert!(
            told.iter().zip(wanted).all(|(told, wanted)| told.starts_with(wanted)),
            "{told:?} {wanted:?}"
        );
        assert_eq!(snapshot.reached(), reached, "{:?}", snapshot.notes());
        capture(snapshot.as_ref(), &mut self.stored).unwrap();
        for (disk, stored) in self.stored.iter().enumerate() {
            assert!(
                whole(snapshot.as_ref(), disk) == *stored,
                "disk {disk} is not what a read of everything gives"
            );
        }
        check(&self.stored[0], if reached == Consistency::Crash { Fsck::AfterJournal } else { Fsck::Clean });
        self.marks = Some(snapshot.marks().unwrap());
        snapshot.commit().unwrap();
    }
}

/// What the writer promises of the file system on the system disk; the last round.
fn check(disk: &[u8], state: Fsck) -> u64 {
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("raw");
    let file = std::fs::File::create(&raw).unwrap();
    file.set_len(disk.len() as u64).unwrap();
    for (number, part) in disk.chunks(PART).enumerate().filter(|(_, part)| part.iter().any(|byte| *byte != 0))
    {
        file.write_all_at(part, (number * PART) as u64).unwrap();
    }
    let system = FileSystem::of(&raw).unwrap();
    system.fsck(state).unwrap();
    check_rounds(&system.tree("/data", directory.path()).unwrap()).unwrap()
}

fn scratch(at: &Path) -> std::path::PathBuf {
    let scratch = at.join("scratch");
    std::fs::create_dir(&scratch).unwrap();
    scratch
}

#[test]
fn a_machine_of_libvirt_is_captured_running_and_shut_down_and_comes_back() {
    let libvirt = Libvirt::start().unwrap();
    let domain = libvirt.define(&DomainPlan { name: "web", data: &[16], ..Default::default() }).unwrap();
    let host = LibvirtHost::new(libvirt.uri(), scratch(libvirt.directory()), clock());
    let off = host.list().unwrap().remove(0);
    assert_eq!((off.name.as_str(), off.state), ("web", MachineState::ShutOff));
    let mut story =
        Story { host: &host, machine: off.id.clone(), rng: Rng::new(2), marks: None, stored: vec![] };

    domain.start().unwrap();
    let inside = domain.inside();
    inside.wait().unwrap();
    inside.start_writer("/data").unwrap();
    inside.wait_for_rounds("/data", 5).unwrap();
    let foreign = libvirt.directory().join("foreign.xml");
    std::fs::write(&foreign, "<domaincheckpoint><name>foreign</name></domaincheckpoint>").unwrap();
    libvirt.virsh(&["checkpoint-create", "web", foreign.to_str().unwrap()]).unwrap();
    story.point(&["full", "full"], Consistency::FileSystem);
    for _ in 0..2 {
        inside.wait_for_rounds("/data", 3).unwrap();
        story.point(&["incremental", "incremental"], Consistency::FileSystem);
    }
    // Given up: the next increment begins where this one did.
    let asked = story.asked();
    let given_up = host.snapshot(&story.machine, &asked).unwrap();
    let error = host.snapshot(&story.machine, &asked).map(drop).unwrap_err();
    assert_eq!(error.code(), Code::Conflict);
    drop(given_up);
    inside.wait_for_rounds("/data", 3).unwrap();
    story.point(&["incremental", "incremental"], Consistency::FileSystem);
    let names = libvirt.virsh(&["checkpoint-list", "web", "--name"]).unwrap();
    assert_eq!(names.split_whitespace().count(), 2, "the foreign checkpoint and our last one: {names}");
    assert!(names.contains("foreign"));

    // Shut down: once by the checkpoint's bitmap, then by the files alone.
    domain.shut_down().unwrap();
    story.point(&["incremental", "incremental"], Consistency::Offline);
    let asked = story.asked();
    let again = host.snapshot(&story.machine, &asked).unwrap();
    assert_eq!(modes(again.as_ref()), ["incremental", "incremental"]);
    let extents = again.open(0).unwrap().extents(0..again.disks()[0].size).unwrap();
    assert!(extents.iter().all(|extent| extent.change == ChangeState::Unchanged));
    // Who reads it keeps it from being started.
    let error = domain.start().unwrap_err();
    assert!(format!("{error:?}").contains("lock"), "{error:?}");
    drop(again);

    domain.start().unwrap();
    inside.wait().unwrap();
    inside.start_writer("/data").unwrap();
    inside.wait_for_rounds("/data", 3).unwrap();
    story.point(&["incremental", "incremental"], Consistency::FileSystem);
    domain.kill().unwrap();
    domain.start().unwrap();
    inside.wait().unwrap();
    inside.start_writer("/data").unwrap();
    inside.wait_for_rounds("/data", 3).unwrap();
    story.point(&["scan", "scan"], Consistency::FileSystem);
    inside.wait_for_rounds("/data", 3).unwrap();
    story.point(&["incremental", "incremental"], Consistency::FileSystem);
    define_a_clone(&host, &story, libvirt.directory());
    domain.kill().unwrap();
}

/// Brings the last point up as another machine, and takes that away again.
fn define_a_clone(host: &LibvirtHost, story: &Story<'_>, at: &Path) {
    let mut machine = host.config(&story.machine).unwrap();
    machine.id = MachineId("5f0c2c7e-0000-4000-8000-000000000077".into());
    machine.name = "clone".into();
    machine.disks.truncate(1);
    machine.memory = Some(320 << 20);
    let path = at.join("clone.raw");
    std::fs::write(&path, &story.stored[0]).unwrap();
    let place = DiskPlace { name: "vda".into(), path, format: "raw".into() };
    // The captured document names the test's own channel, which the first machine holds.
    let raw = machine.raw.as_mut().unwrap();
    raw.text = String::from_utf8(raw.text.clone()).unwrap().replace("/web/", "/").into_bytes();
    let clone = host.define(&machine, &[place], true).unwrap();
    let found = host.list().unwrap().into_iter().find(|listed| listed.id == clone).unwrap();
    assert_eq!((found.name.as_str(), found.state), ("clone", MachineState::Running));
    assert_eq!(host.config(&clone).unwrap().memory, Some(320 << 20));
    host.destroy(&clone).unwrap();
    assert!(!host.list().unwrap().iter().any(|listed| listed.id == clone));
    let error = host.destroy(&story.machine).unwrap_err();
    assert_eq!(error.code(), Code::Refused);
}

#[test]
fn an_inventory_of_libvirt_needs_no_emulator() {
    let host = LibvirtHost::new("test:///default", std::env::temp_dir(), clock());
    let listed = host.list().unwrap();
    assert_eq!((listed[0].name.as_str(), listed[0].state), ("test", MachineState::Running));
    let config = host.config(&MachineId("test".into())).unwrap();
    assert_eq!(config.id, listed[0].id);
    let error = host.config(&MachineId("--all".into())).unwrap_err();
    assert_eq!(error.code(), Code::NotFound);
    let owner = crate::daemon::OWNER;
    let asked = SnapshotRequest::new(owner, Id16([3; 16]));
    host.snapshot(&MachineId("nobody".into()), &asked).map(drop).unwrap_err();
}
