//! Plain QEMU, which dies. What its points hold is tested with the whole program.

use std::path::PathBuf;
use std::sync::Arc;

use mainstay_testkit::RealClock;
use mainstay_testkit::lab::{Fsck, Guest, GuestPlan, Writers};
use mainstay_workloads::vm::{MachineId, QemuHost, QemuMachine};

use crate::capture::Protected;

fn start() -> Guest {
    GuestPlan::new().unwrap().data(128).unwrap().start().unwrap()
}

fn host(guest: &Guest) -> QemuHost {
    let machine = QemuMachine {
        name: "guest".into(),
        named: true,
        monitor: guest.monitor_socket().into(),
        agent: Some(guest.agent_socket().into()),
        server: None,
        link: None,
    };
    let scratch: PathBuf = guest.directory().join("scratch");
    std::fs::create_dir_all(&scratch).unwrap();
    QemuHost::new(vec![machine], scratch, Arc::new(RealClock))
}

fn id() -> MachineId {
    MachineId("guest".into())
}

#[test]
fn the_emulator_dies_during_a_backup_and_the_next_point_is_whole() {
    let mut guest = start();
    let host = host(&guest);
    let mut protected = Protected::new(&host, id(), guest.inside());
    assert_eq!(protected.back_up(), ["full", "full"]);
    let snapshot = protected.snapshot();
    let blocks = snapshot.open(0).unwrap();
    guest.kill();
    assert!(blocks.read_at(0, &mut [0; 512]).is_err(), "a dead machine was read");
    drop((blocks, snapshot));
    guest.start_again().unwrap();
    Writers::start(guest.inside()).unwrap();
    assert_eq!(protected.back_up(), ["scan", "scan"]);
    assert_eq!(protected.back_up(), ["incremental", "incremental"]);
    // What the power cut left behind is repaired by the journal, as after any power cut.
    guest.kill();
    Writers::check([guest.disk(0), guest.disk(1)], Fsck::AfterJournal, [0; 2], [u64::MAX; 2]).unwrap();
}
