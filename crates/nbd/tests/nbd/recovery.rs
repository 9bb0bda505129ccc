//! A machine that runs from what we serve: on an overlay of ours across a kill of the server, and on an overlay of
//! QEMU's until everything is at home.

use std::sync::Arc;

use mainstay_core::Blocks as _;
use mainstay_nbd::{Export, ReadObserver, ServerOptions, Trace, WritableBlocks as _};
use mainstay_testkit::Rng;

use crate::lab::{Disk, serve, sparse};
use crate::machine::Machine;
use crate::overlay::{SEED, SIZE, base, start_child};

/// The guest flushes nothing before the server is killed; QEMU connects again and the guest never learns of it.
#[test]
fn a_guest_survives_a_kill_of_the_server_that_holds_its_disk() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join(SEED), "7").unwrap();
    let mut server = start_child(directory.path());
    let machine_directory = tempfile::tempdir().unwrap();
    let mut machine = Machine::start(machine_directory.path());
    let socket = directory.path().join("server.sock");
    machine.ask(
        "blockdev-add",
        &format!(
            "\"driver\": \"nbd\", \"node-name\": \"remote\", \"export\": \"disk\", \"reconnect-delay\": 60, \
             \"server\": {{\"type\": \"unix\", \"path\": \"{}\"}}",
            socket.display()
        ),
    );
    machine.export("remote", "\"writable\": true");
    let guest = machine.daemon.client("remote").connections(1).blocks(None).unwrap();
    let mut model = base(7);
    let mut rng = Rng::new(7);
    for round in 0..4 {
        for _ in 0..20 {
            let at = rng.below(SIZE - 100_000) / 512 * 512;
            let len = 512 * (1 + rng.below(150));
            let data = rng.bytes(len);
            guest.write_at(at as u64, &data).unwrap();
            model[at..at + data.len()].copy_from_slice(&data);
        }
        if round < 3 {
            server.kill();
            server = start_child(directory.path());
        }
        let mut read = vec![0; SIZE];
        guest.read_at(0, &mut read).unwrap();
        let differs = read.iter().zip(&model).position(|(one, other)| one != other);
        assert_eq!(differs, None, "after {round} kills");
    }
    guest.flush().unwrap();
}

#[test]
fn qemu_streams_a_disk_home_and_goes_on_without_us() {
    let directory = tempfile::tempdir().unwrap();
    let model = sparse(&mut Rng::new(5), 64 << 20);
    let trace = Arc::new(Trace::new(10_000));
    let export = Export::read_only("disk", Disk::new(model.clone()) as _)
        .observer(Arc::clone(&trace) as Arc<dyn ReadObserver>);
    let server = serve(directory.path(), vec![export], ServerOptions::default());
    let mut machine = Machine::start(directory.path());
    machine.ask(
        "blockdev-add",
        &format!(
            "\"driver\": \"nbd\", \"node-name\": \"point\", \"export\": \"disk\", \"read-only\": true, \
             \"server\": {{\"type\": \"unix\", \"path\": \"{}\"}}",
            directory.path().join("ours.sock").display()
        ),
    );
    let scratch = directory.path().join("scratch");
    machine.ask(
        "blockdev-add",
        &format!(
            "\"driver\": \"qcow2\", \"node-name\": \"home\", \"backing\": \"point\", \
             \"file\": {{\"driver\": \"file\", \"filename\": \"{}\"}}",
            scratch.display()
        ),
    );
    machine.export("home", "\"writable\": true");
    machine.write("home", 1 << 20, 100_352, 7);
    let mut expected = model;
    expected[1 << 20..][..100_352].fill(7);
    let guest = machine.daemon.client("home").connections(1).blocks(None).unwrap();
    let mut read = vec![0; 4 << 20];
    guest.read_at(0, &mut read).unwrap();
    assert!(read == expected[..4 << 20]);
    let of_the_boot = trace.reads();
    assert!(
        !of_the_boot.is_empty() && of_the_boot.iter().all(|range| range.start < 5 << 20),
        "{of_the_boot:?}"
    );
    machine.ask("block-stream", "\"job-id\": \"s\", \"device\": \"home\"");
    machine.wait_for(&["JOB_STATUS_CHANGE", "\"null\"", "\"s\""]);
    machine.ask("blockdev-del", "\"node-name\": \"point\"");
    server.stop().unwrap();
    let mut read = vec![0; expected.len()];
    guest.read_at(0, &mut read).unwrap();
    assert!(read == expected);
}
