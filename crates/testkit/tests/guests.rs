//! The laboratory itself: what the tests of the product rely on.

use std::time::Duration;

use mainstay_testkit::lab::{
    Bus, DomainPlan, FileSystem, Fsck, GuestPlan, Libvirt, StorageDaemon, check_rounds, compare,
};
use serde_json::json;

#[test]
fn a_guest_boots_freezes_and_its_writer_is_seen_on_its_disk() {
    let mut guest = GuestPlan::new().unwrap().data(64).unwrap().start().unwrap();
    let inside = guest.inside().clone();
    inside.wait().unwrap();
    assert_eq!(inside.run("echo out; echo err >&2; exit 3").unwrap().output, "out\nerr\n");
    assert_eq!(inside.run_well("blockdev --getsize64 /dev/vdb").unwrap(), (64 << 20).to_string());

    inside.start_writer("/data").unwrap();
    inside.wait_for_rounds("/data", 20).unwrap();
    assert_eq!(guest.ask_agent("guest-fsfreeze-freeze", json!({})).unwrap(), 1);
    let frozen = inside.rounds("/data").unwrap();
    // What the disk holds now is the copy a backup would take.
    let image = guest.directory().join("copy.qcow2");
    std::fs::copy(guest.disk(0), &image).unwrap();
    assert_eq!(inside.rounds("/data").unwrap(), frozen, "the writer went on in a frozen file system");
    assert_eq!(guest.ask_agent("guest-fsfreeze-thaw", json!({})).unwrap(), 1);
    inside.wait_for_rounds("/data", 3).unwrap();
    assert_eq!(guest.standstills().len(), 1);

    let system = FileSystem::of(&image).unwrap();
    system.fsck(Fsck::Clean).unwrap();
    let out = tempfile::tempdir().unwrap();
    let seen = check_rounds(&system.tree("/data", out.path()).unwrap()).unwrap();
    assert!((frozen..=frozen + 1).contains(&seen), "{seen} on the disk, {frozen} in the guest");

    guest.kill();
    FileSystem::of(guest.disk(0)).unwrap().fsck(Fsck::AfterJournal).unwrap();
    assert!(compare(guest.disk(0), &image).is_err(), "the guest has written since");
    guest.start_again().unwrap();
    inside.wait().unwrap();
    assert!(inside.rounds("/data").unwrap() >= seen);
    guest.shut_down().unwrap();
    FileSystem::of(guest.disk(0)).unwrap().fsck(Fsck::Clean).unwrap();
}

/// What qcow2 frees at once, in bytes; also where the test writes.
const CLUSTER: u64 = 65536;

#[test]
fn the_storage_daemon_plays_a_machine_that_is_killed_and_started_again() {
    let mut daemon = StorageDaemon::blank(16).unwrap();
    let mut guest = daemon.guest(0).unwrap();
    assert_eq!(guest.size(), 16 << 20);
    guest.write(CLUSTER, b"written").unwrap();
    guest.flush().unwrap();
    assert_eq!(daemon.guest(0).unwrap().read(CLUSTER, 7).unwrap(), b"written");
    let bitmap = json!({ "node": "disk0", "name": "kept", "persistent": true });
    daemon.monitor().unwrap().run("block-dirty-bitmap-add", bitmap).unwrap();
    guest.trim(CLUSTER, 65536).unwrap();
    drop(guest);
    daemon.quit();
    daemon.start_again().unwrap();
    assert_eq!(daemon.guest(0).unwrap().read(CLUSTER, 7).unwrap(), [0; 7]);
    let nodes = daemon.monitor().unwrap().run("query-named-block-nodes", json!({})).unwrap();
    assert!(nodes.to_string().contains("\"kept\""), "{nodes}");
    daemon.kill();
    assert_eq!(daemon.pid(), 0);
    daemon.start_again().unwrap();
    assert!(daemon.guest(0).is_ok());
}

#[test]
fn libvirt_lists_what_is_defined_and_a_domain_freezes_and_dies() {
    let libvirt = Libvirt::start().unwrap();
    let domain = libvirt.define(&DomainPlan { name: "web", data: &[32], ..Default::default() }).unwrap();
    libvirt.define(&DomainPlan { name: "idle", ..Default::default() }).unwrap();
    let names = libvirt.virsh(&["list", "--all", "--name"]).unwrap();
    assert_eq!(names.split_whitespace().collect::<Vec<_>>(), ["idle", "web"]);
    domain.start().unwrap();
    domain.inside().wait().unwrap();
    libvirt.virsh(&["domfsfreeze", "web"]).unwrap();
    libvirt.virsh(&["domfsthaw", "web"]).unwrap();
    assert!(domain.standstills()[0] < Duration::from_secs(100));
    domain.kill().unwrap();
    domain.start().unwrap();
    domain.inside().wait().unwrap();
    domain.shut_down().unwrap();
}
#[test]
fn a_disk_boots_by_itself_on_another_bus() {
    let guest = GuestPlan::new().unwrap().bus(Bus::Nvme).boots_itself().start().unwrap();
    guest.inside().wait().unwrap();
    assert!(guest.inside().run_well("grep ' / ' /proc/mounts").unwrap().starts_with("/dev/nvme0n1p1"));
}
