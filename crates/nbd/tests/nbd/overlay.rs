//! The overlay in files, behind a server that is killed.

use std::io::{BufRead as _, BufReader};
use std::ops::Range;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Blocks, ChangeState, Code, ExtentKind};
use mainstay_nbd::{Address, Client, Export, Overlay, Server, ServerOptions, WritableBlocks};
use mainstay_testkit::{Rng, for_each_seed};

use crate::lab::{Disk, LONG, Mortal, command, index, run, serve, some_range, sparse, uri};

pub(crate) const BASE: [u8; 32] = [1; 32];
pub(crate) const SIZE: usize = (3 << 20) + 10_000;
const BLOCK: u64 = 64 << 10;

pub(crate) fn base(seed: u64) -> Vec<u8> {
    sparse(&mut Rng::new(seed), SIZE)
}

/// In the directory of the server that is killed: the seed of its base.
pub(crate) const SEED: &str = "seed";

/// Not a test by itself: the server of the next one, in a process of its own.
#[test]
fn child_that_serves_until_it_is_killed() {
    let Ok(seed) = std::fs::read_to_string(SEED) else { return };
    let base = Disk::new(base(seed.parse().unwrap()));
    let overlay = Overlay::open(Path::new("image"), base as _, &BASE).unwrap();
    let export = Export::writable("disk", Arc::new(overlay) as _);
    let address = Address::Unix("server.sock".into());
    let _server = Server::start(&address, vec![export], ServerOptions::default()).unwrap();
    println!("serving");
    std::thread::sleep(Duration::from_secs(600));
}

pub(crate) fn start_child(directory: &Path) -> Mortal {
    let mut command = command(
        std::env::current_exe().unwrap().to_str().unwrap(),
        ["--exact", "overlay::child_that_serves_until_it_is_killed", "--nocapture"],
    );
    let mut child = command.current_dir(directory).stdout(Stdio::piped()).spawn().unwrap();
    let told = BufReader::new(child.stdout.take().unwrap());
    let child = Mortal(child);
    assert!(told.lines().any(|line| line.unwrap().contains("serving")));
    child
}

/// What one writer saw: its part of the device, and the write that was cut, if any.
struct Seen {
    part: Range<u64>,
    model: Vec<u8>,
    cut: Option<(Range<u64>, Vec<u8>)>,
}

/// Writes and reads in its own part, until the server is gone.
fn write_until_cut(client: &Client, seed: u64, mut seen: Seen) -> Seen {
    let mut rng = Rng::new(seed);
    let Ok(remote) = client.blocks(None) else { return seen };
    loop {
        let range = some_range(&mut rng, seen.part.end - seen.part.start, 3 * BLOCK);
        let there = seen.part.start + range.start;
        let range = index(range.start)..index(range.end);
        let new = if rng.chance(20) { vec![0; range.len()] } else { rng.bytes(range.len()) };
        let done = match new.iter().all(|byte| *byte == 0) {
            true => remote.zero(there..there + new.len() as u64),
            false => remote.write_at(there, &new),
        };
        let done = done.and_then(|()| if rng.chance(10) { remote.flush() } else { Ok(()) });
        if done.is_err() {
            seen.cut = Some((there..there + new.len() as u64, new));
            return seen;
        }
        seen.model[range].copy_from_slice(&new);
    }
}

#[test]
fn a_server_killed_again_and_again_loses_no_write_that_returned() {
    for_each_seed(1, |seed| {
        let mut rng = Rng::new(seed);
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(SEED), seed.to_string()).unwrap();
        let address = Address::Unix(directory.path().join("server.sock"));
        let mut model = base(seed);
        let mut writes = 0;
        for _ in 0..15 {
            let mut child = start_child(directory.path());
            let client = Client::new(address.clone(), "disk").connections(1).limit(LONG);
            check_against(&client, &model);
            // Two writers meet in the middle of a block.
            let middle = SIZE as u64 / 2 / BLOCK * BLOCK + 12_345;
            let parts = [0..middle, middle..SIZE as u64];
            let seen = std::thread::scope(|scope| {
                let writers = parts.map(|part| {
                    let model = model[index(part.start)..index(part.end)].to_vec();
                    let (client, seed) = (&client, rng.next_u64());
                    scope.spawn(move || write_until_cut(client, seed, Seen { part, model, cut: None }))
                });
                std::thread::sleep(Duration::from_millis(rng.range(20..120)));
                child.kill();
                writers.map(|writer| writer.join().unwrap())
            });
            let _child = start_child(directory.path());
            let remote = client.blocks(None).unwrap();
            for Seen { part, model: mut expected, cut } in seen {
                if let Some((range, new)) = cut {
                    writes += 1;
                    let mut found = vec![0; new.len()];
                    remote.read_at(range.start, &mut found).unwrap();
                    let place = index(range.start - part.start)..index(range.end - part.start);
                    let old = expected[place.clone()].to_vec();
                    let fits = |at: usize| found[at] == old[at] || found[at] == new[at];
                    assert!((0..found.len()).all(fits), "bytes of nobody in {range:?}");
                    expected[place].copy_from_slice(&found);
                }
                model[index(part.start)..index(part.end)].copy_from_slice(&expected);
            }
            check_against(&client, &model);
        }
        assert!(writes > 5, "only {writes} writes were cut");
    });
}

fn check_against(client: &Client, model: &[u8]) {
    let remote = client.blocks(None).unwrap();
    let mut device = vec![0; model.len()];
    remote.read_at(0, &mut device).unwrap();
    let differs = device.iter().zip(model).position(|(one, other)| one != other);
    assert_eq!(differs, None);
}

/// An image that is written by QEMU while it becomes local, and then stands alone.
#[test]
fn what_is_pulled_becomes_a_plain_image_that_needs_no_base() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let mut model = base(5);
    let overlay = Arc::new(Overlay::open(&path, Disk::new(model.clone()) as _, &BASE).unwrap());
    assert_eq!(overlay.missing(), (SIZE as u64).next_multiple_of(BLOCK));
    let export = Export::writable("disk", Arc::clone(&overlay) as _);
    let server = serve(directory.path(), vec![export], ServerOptions::default());
    let write = |line: &str| run("qemu-io", ["-f", "raw", "-c", line, &uri(&server, "disk")]);
    for (at, len, line) in [
        (100_000, 300_000, "write -P 9 100000 300000"),
        (1 << 20, 65_536, "write -z 1M 64k"),
        (2 << 20, 100, "write -P 5 2M 100"),
        (2_500_000, 200_000, "write -z -u 2500000 200000"),
    ] {
        write(line);
        let byte = if line.contains("-z") { 0 } else { line.as_bytes()[9] - b'0' };
        model[at..at + len].fill(byte);
    }
    let changed: u64 = overlay
        .extents(0..SIZE as u64)
        .unwrap()
        .iter()
        .filter(|extent| extent.change == ChangeState::Changed)
        .map(|extent| extent.range.end - extent.range.start)
        .sum();
    assert!(changed > 500_000 && changed < 800_000, "{changed}");
    overlay.pull(0..SIZE as u64).unwrap();
    assert_eq!(overlay.missing(), 0);
    server.stop().unwrap();
    let overlay = Arc::into_inner(overlay).unwrap();
    let holes = overlay.extents(0..SIZE as u64).unwrap();
    assert!(holes.iter().any(|extent| extent.kind == ExtentKind::Hole), "{holes:?}");
    overlay.finish().unwrap();
    assert!(std::fs::read(&path).unwrap() == model);
    assert!(!directory.path().join("image.map").exists());
}

#[test]
fn an_overlay_keeps_to_its_base_and_to_one_process() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    let disk = |len: usize| Disk::new(vec![3; len]);
    let overlay = Overlay::open(&path, disk(SIZE) as _, &BASE).unwrap();
    overlay.write_at(70_000, b"kept").unwrap();
    let refused = |base, id| Overlay::open(&path, base, id).err().unwrap().code();
    assert_eq!(refused(disk(SIZE) as _, &BASE), Code::Conflict);
    assert_eq!(overlay.finish().unwrap_err().code(), Code::Refused);
    assert_eq!(refused(disk(SIZE) as _, &[2; 32]), Code::Refused);
    assert_eq!(refused(disk(SIZE + 1) as _, &BASE), Code::Refused);
    assert_eq!(refused(disk(20 * SIZE) as _, &BASE), Code::Refused);
    let overlay = Overlay::open(&path, disk(SIZE) as _, &BASE).unwrap();
    let mut read = [0; 6];
    overlay.read_at(69_999, &mut read).unwrap();
    assert_eq!(&read, b"\x03kept\x03");
    drop(overlay);
    std::fs::remove_file(directory.path().join("image.map")).unwrap();
    assert_eq!(refused(disk(SIZE) as _, &BASE), Code::AlreadyExists);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE as u64);
}
