//! Images in a folder.

use std::io::{Seek as _, Write as _};
use std::path::Path;
use std::sync::Arc;

use mainstay_core::{ChangeState, Code, Consistency};
use mainstay_nbd::{Address, Client, WritableBlocks as _};
use mainstay_testkit::{Rng, ScriptedClock};
use mainstay_workloads::vm::sprawl::{Inventory, Rules, sprawl};
use mainstay_workloads::vm::{Folder, Hypervisor as _, MachineId};

use crate::daemon::{Daemon, capture, modes, request, run};

fn folder(path: &Path) -> Folder {
    let clock = ScriptedClock::at(mainstay_core::Time::from_seconds(4_000_000_000));
    Folder::new(path.into(), Arc::new(clock))
}

fn create(arguments: &[&str]) {
    run("qemu-img", &[&["create", "-q"], arguments].concat());
}

#[test]
fn images_in_a_folder_are_machines_and_what_they_are_built_upon_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
    std::fs::create_dir(at("web")).unwrap();
    create(&["-f", "qcow2", &at("base.qcow2"), "1M"]);
    create(&["-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &at("mail.qcow2")]);
    create(&["-f", "raw", &at("web/system.raw"), "1M"]);
    create(&["-f", "qcow2", &at("web/data.qcow2"), "2M"]);
    let xml = "<domain><name>the web</name><vcpu>3</vcpu><memory unit='MiB'>64</memory></domain>";
    std::fs::write(at("web/web.xml"), xml).unwrap();
    std::fs::write(at("notes.txt"), "no image").unwrap();
    std::fs::write(at("broken.qcow2"), b"QFI\xfb and nothing more").unwrap();
    let folder = folder(directory.path());
    let listed = folder.list().unwrap();
    let names: Vec<_> = listed.iter().map(|machine| (machine.name.as_str(), machine.disks.len())).collect();
    assert_eq!(names, [("mail.qcow2", 1), ("web", 2)]);
    assert_eq!(listed[0].disks[0].backing, [directory.path().join("base.qcow2").canonicalize().unwrap()]);
    let web = folder.config(&MachineId("web".into())).unwrap();
    assert_eq!((web.name.as_str(), web.cpus, web.disks.len()), ("the web", Some(3), 2));
    std::fs::remove_file(at("base.qcow2")).unwrap();
    let mut inventory = Inventory::default();
    inventory.add_host(&folder).unwrap();
    inventory.add_folder(directory.path()).unwrap();
    let stale_after = std::time::Duration::ZERO;
    let rules = Rules { protect: vec![], ignore: vec![], stale_after, ours: String::new() };
    let now = mainstay_core::Time::from_seconds(4_000_000_000);
    let told: Vec<String> = sprawl(&inventory, &rules, now).iter().map(|row| format!("{row:?}")).collect();
    let of = |name: &str, finding: &str| told.iter().any(|row| row.contains(name) && row.contains(finding));
    assert!(of("\"web\"", "Unprotected") && of("mail.qcow2", "BrokenChain"), "{told:?}");
    assert!(!of("system.raw", "Orphaned") && of("broken.qcow2", "Orphaned"), "{told:?}");
    assert_eq!(folder.config(&MachineId("base.qcow2".into())).unwrap_err().code(), Code::NotFound);
}

#[test]
fn an_image_is_read_when_nobody_writes_to_it_and_not_again_when_nobody_has() {
    let mut rng = Rng::new(1);
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("a.raw");
    let mut content = rng.bytes(1 << 20);
    std::fs::write(&image, &content).unwrap();
    let (folder, id) = (folder(directory.path()), MachineId("a.raw".into()));
    let mut stored = Vec::new();
    let first = folder.snapshot(&id, &request(&mut rng, None)).unwrap();
    assert_eq!((first.reached(), modes(first.as_ref())), (Consistency::Offline, vec!["full".into()]));
    capture(first.as_ref(), &mut stored).unwrap();
    assert!(stored[0] == content);
    let marks = first.marks().unwrap();
    first.commit().unwrap();

    let second = folder.snapshot(&id, &request(&mut rng, Some(&marks))).unwrap();
    assert_eq!(modes(second.as_ref()), ["incremental"]);
    let extents = second.open(0).unwrap().extents(0..1 << 20).unwrap();
    assert!(extents.iter().all(|extent| extent.change == ChangeState::Unchanged));

    // Whoever knows nothing of locks is noticed at the end.
    let mut file = std::fs::File::options().write(true).open(&image).unwrap();
    file.seek(std::io::SeekFrom::Start(4096)).unwrap();
    file.write_all(b"changed").unwrap();
    drop(file);
    content[4096..4103].copy_from_slice(b"changed");
    assert_eq!(second.marks().unwrap_err().code(), Code::Conflict);
    drop(second);
    let third = folder.snapshot(&id, &request(&mut rng, Some(&marks))).unwrap();
    assert!(modes(third.as_ref())[0].starts_with("scan: nothing recorded"));
    capture(third.as_ref(), &mut stored).unwrap();
    assert!(stored[0] == content);
}

#[test]
fn an_image_that_a_machine_uses_is_left_alone_and_one_that_is_read_is_not_started() {
    let mut rng = Rng::new(2);
    let mut daemon = Daemon::new(&[("a.raw", "raw", 1 << 20)]);
    daemon.write(0, 0, b"guest");
    let (folder, id) = (folder(daemon.directory.path()), MachineId("a.raw".into()));
    let error = folder.snapshot(&id, &request(&mut rng, None)).map(drop).unwrap_err();
    assert_eq!(error.code(), Code::Conflict, "{error:?}");
    daemon.stop();
    let snapshot = folder.snapshot(&id, &request(&mut rng, None)).unwrap();
    let socket = daemon.path("writer");
    let path = daemon.path("a.raw");
    let serve = |flag: &str| {
        let words = ["--fork", flag, "-f", "raw", "-k", socket.to_str().unwrap(), path.to_str().unwrap()];
        let program =
            mainstay_workloads::process::Program::new("qemu-nbd", std::time::Duration::from_secs(60));
        program.arguments(words).run().unwrap().status
    };
    assert_eq!(serve("--shared=1"), Some(1));
    drop(snapshot);
    assert_eq!(serve("--shared=1"), Some(0));
    let writer = Client::new(Address::Unix(socket.clone()), "").connections(1).blocks(None).unwrap();
    writer.write_at(0, b"other").unwrap();
}
