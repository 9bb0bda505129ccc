//! The two ways in which QEMU shows one moment of a disk that goes on changing.

use mainstay_core::{Blocks, ChangeState, ExtentKind};

use crate::machine::Machine;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

/// The disk as it is when the bitmap `inc` begins, and what the guest writes until the snapshot.
fn prepare(machine: &mut Machine) {
    machine.export("disk", "\"writable\": true");
    machine.write("disk", 0, 4 * MIB, 1);
    machine.ask("block-dirty-bitmap-add", "\"node\": \"disk\", \"name\": \"inc\"");
    machine.write("disk", MIB, 65536, 2);
    machine.write("disk", 10 * MIB, MIB, 3);
}

/// Changes as (first KiB, last KiB, kind).
fn changes(blocks: &impl Blocks) -> Vec<(u64, u64, ExtentKind)> {
    let extents = blocks.extents(0..SIZE).unwrap();
    assert_eq!((extents[0].range.start, extents.last().unwrap().range.end), (0, SIZE));
    assert!(extents.windows(2).all(|pair| pair[0].range.end == pair[1].range.start));
    assert!(extents.iter().all(|extent| extent.change != ChangeState::Unknown));
    let changed = extents.into_iter().filter(|extent| extent.change == ChangeState::Changed);
    changed.map(|extent| (extent.range.start >> 10, extent.range.end >> 10, extent.kind)).collect()
}

fn holds(blocks: &impl Blocks, at: u64, len: u64, byte: u8) {
    let mut read = vec![byte ^ 0xff; usize::try_from(len).unwrap()];
    blocks.read_at(at, &mut read).unwrap();
    assert!(read.iter().all(|found| *found == byte), "not all of {at}..+{len} is {byte}");
}

#[test]
fn a_backup_job_shows_one_moment_and_its_changes() {
    let directory = tempfile::tempdir().unwrap();
    let mut machine = Machine::start(directory.path());
    prepare(&mut machine);
    let scratch = directory.path().join("scratch");
    machine.ask(
        "blockdev-add",
        &format!(
            "\"driver\": \"qcow2\", \"node-name\": \"snap\", \"backing\": \"disk\", \
             \"file\": {{\"driver\": \"file\", \"filename\": \"{}\"}}",
            scratch.display()
        ),
    );
    machine.ask(
        "transaction",
        "\"actions\": [\
         {\"type\": \"block-dirty-bitmap-disable\", \"data\": {\"node\": \"disk\", \"name\": \"inc\"}}, \
         {\"type\": \"blockdev-backup\", \"data\": \
          {\"job-id\": \"j\", \"device\": \"disk\", \"target\": \"snap\", \"sync\": \"none\"}}]",
    );
    machine.export("snap", "\"bitmaps\": [\"inc\"]");
    machine.write("disk", 0, 12 * MIB, 9);
    let snap = machine.daemon.client("snap").blocks(Some("qemu:dirty-bitmap:inc")).unwrap();
    let expected = [(1024, 1088, ExtentKind::Data), (10240, 11264, ExtentKind::Data)];
    assert_eq!(changes(&snap), expected);
    for (at, len, byte) in [(0, MIB, 1), (MIB, 65536, 2), (10 * MIB, MIB, 3), (11 * MIB, MIB, 0)] {
        holds(&snap, at, len, byte);
    }
}

/// Here QEMU answers EINVAL to whatever touches a byte that is not in the bitmap.
#[test]
fn snapshot_access_that_knows_only_changes_is_asked_for_them_alone() {
    let directory = tempfile::tempdir().unwrap();
    let mut machine = Machine::start(directory.path());
    prepare(&mut machine);
    let scratch = directory.path().join("scratch");
    machine.ask("block-export-del", "\"id\": \"disk\", \"mode\": \"hard\"");
    machine.ask(
        "blockdev-add",
        &format!(
            "\"driver\": \"qcow2\", \"node-name\": \"scratch\", \
             \"file\": {{\"driver\": \"file\", \"filename\": \"{}\"}}",
            scratch.display()
        ),
    );
    machine.ask("block-dirty-bitmap-disable", "\"node\": \"disk\", \"name\": \"inc\"");
    machine.ask(
        "blockdev-add",
        "\"driver\": \"copy-before-write\", \"node-name\": \"guest\", \"file\": \"disk\", \
         \"target\": \"scratch\", \"on-cbw-error\": \"break-snapshot\", \
         \"bitmap\": {\"node\": \"disk\", \"name\": \"inc\"}",
    );
    machine
        .ask("blockdev-add", "\"driver\": \"snapshot-access\", \"node-name\": \"snap\", \"file\": \"guest\"");
    machine.export("guest", "\"writable\": true");
    machine.export("snap", "\"bitmaps\": [{\"node\": \"disk\", \"name\": \"inc\"}]");
    machine.write("guest", 0, 12 * MIB, 9);
    let snap = machine.daemon.client("snap").blocks(Some("qemu:dirty-bitmap:inc")).unwrap();
    let expected = [(1024, 1088, ExtentKind::Data), (10240, 11264, ExtentKind::Data)];
    assert_eq!(changes(&snap), expected);
    assert_eq!(changes(&snap), expected, "asked a second time");
    assert!(snap.read_at(0, &mut [0; 512]).is_err(), "QEMU tells of what has not changed");
    for (at, len, byte) in [(MIB, 65536, 2), (10 * MIB, MIB, 3)] {
        holds(&snap, at, len, byte);
    }
}
