//! The programs that everybody uses.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use mainstay_core::{Blocks, ChangeState, Code, ExtentKind};
use mainstay_nbd::{Address, Client, Export, Server, ServerOptions, WritableBlocks};
use mainstay_testkit::Rng;

use crate::lab::{Daemon, Disk, PAGE, index, run, serve, some_range, sparse, uri};

const SIZE: usize = 24 << 20;
const CONTEXT: &str = "qemu:dirty-bitmap:b";

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Writes `bytes` with their holes.
fn write_sparse(path: &Path, bytes: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (number, page) in bytes.chunks(PAGE).enumerate() {
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(page, (number * PAGE) as u64).unwrap();
        }
    }
}

#[test]
fn qemu_nbd_is_read_and_written() {
    let mut rng = Rng::new(7);
    let mut model = sparse(&mut rng, SIZE);
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    write_sparse(&image, &model);
    let arguments = ["-f", "raw", "-x", "disk", "-D", "words", "--shared=4", "--discard=unmap"];
    let daemon = Daemon::qemu_nbd(directory.path(), &[&arguments[..], &[text(&image)]].concat());
    let listed = daemon.client("").list().unwrap();
    assert_eq!((listed[0].name.as_str(), listed[0].text.as_str()), ("disk", "words"));
    let info = daemon.client("disk").info().unwrap();
    assert_eq!((info.size, info.read_only, info.text.as_str()), (SIZE as u64, false, "words"));
    assert!(info.contexts.iter().any(|context| context == "base:allocation"), "{info:?}");
    assert_eq!(daemon.client("desk").info().unwrap_err().code(), Code::NotFound);

    let remote = daemon.client("disk").connections(4).blocks(None).unwrap();
    for _ in 0..40 {
        let range = some_range(&mut rng, SIZE as u64, 8 << 20);
        let part = &mut model[index(range.start)..index(range.end)];
        match rng.below(4) {
            0 => {
                rng.fill(part);
                remote.write_at(range.start, part).unwrap();
            }
            1 => {
                part.fill(0);
                remote.zero(range).unwrap();
            }
            _ => {
                let mut bytes = vec![0xaa; part.len()];
                remote.read_at(range.start, &mut bytes).unwrap();
                assert!(bytes == part, "{range:?} differs");
            }
        }
    }
    remote.flush().unwrap();
    assert!(std::fs::read(&image).unwrap() == model);
    let extents = remote.extents(0..SIZE as u64).unwrap();
    assert_eq!((extents[0].range.start, extents.last().unwrap().range.end), (0, SIZE as u64));
    for pair in extents.windows(2) {
        assert_eq!(pair[0].range.end, pair[1].range.start);
    }
    let holes = extents.iter().filter(|extent| extent.kind != ExtentKind::Data);
    let mut empty = 0;
    for hole in holes {
        assert!(model[index(hole.range.start)..index(hole.range.end)].iter().all(|byte| *byte == 0));
        empty += hole.range.end - hole.range.start;
    }
    assert!(empty > 1 << 20, "{extents:?}");
}

/// Devices with large sectors take whole ones only.
#[test]
fn a_server_with_blocks_of_4096_bytes_gets_whole_ones() {
    let model = sparse(&mut Rng::new(8), SIZE);
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    write_sparse(&image, &model);
    let layers = "driver=blkdebug,align=4096,image.driver=file,image.filename=";
    let options = format!("{layers}{}", text(&image));
    let daemon = Daemon::qemu_nbd(directory.path(), &["--image-opts", &options]);
    let remote = daemon.client("").blocks(None).unwrap();
    assert_eq!(remote.info().block_size, 4096);
    for range in [0..1, 4095..4097, 1000..3_000_000, 8192..12288, SIZE as u64 - 1..SIZE as u64] {
        let mut bytes = vec![0; index(range.end - range.start)];
        remote.read_at(range.start, &mut bytes).unwrap();
        assert!(bytes == model[index(range.start)..index(range.end)], "{range:?} differs");
        let extents = remote.extents(range.clone()).unwrap();
        assert_eq!((extents[0].range.start, extents.last().unwrap().range.end), (range.start, range.end));
    }
    assert_eq!(remote.write_at(1, &[0; 4096]).unwrap_err().code(), Code::Unsupported);
    remote.write_at(4096, &[7; 8192]).unwrap();
}

/// `qemu-nbd` lets one client in at a time when it is not told otherwise.
#[test]
fn a_bitmap_of_qemu_nbd_tells_what_has_changed() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image.qcow2");
    run("qemu-img", ["create", "-q", "-f", "qcow2", text(&image), "24M"]);
    let write = |line: &str| run("qemu-io", ["-f", "qcow2", "-c", line, text(&image)]);
    write("write -P 1 0 4M");
    run("qemu-img", ["bitmap", "--add", text(&image), "b"]);
    for line in ["write -P 2 1M 64k", "write -z 2M 128k", "write -P 3 10M 1M"] {
        write(line);
    }
    let daemon = Daemon::qemu_nbd(directory.path(), &["-r", "-B", "b", "-f", "qcow2", text(&image)]);
    let remote = daemon.client("").blocks(Some(CONTEXT)).unwrap();
    let changed: Vec<_> = remote
        .extents(0..remote.size())
        .unwrap()
        .into_iter()
        .filter(|extent| extent.change == ChangeState::Changed)
        .map(|extent| (extent.range.start >> 10, extent.range.end >> 10, extent.kind))
        .collect();
    let zero = changed[1].2;
    assert!(zero != ExtentKind::Data);
    let expected = [(1024, 1088, ExtentKind::Data), (2048, 2176, zero), (10240, 11264, ExtentKind::Data)];
    assert_eq!(changed, expected);
    let unknown = remote.extents(0..remote.size()).unwrap();
    assert!(unknown.iter().all(|extent| extent.change != ChangeState::Unknown));
    let mut bytes = vec![0; 1 << 20];
    remote.read_at(10 << 20, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 3));
    drop(remote);
    let other = daemon.client("").blocks(Some("qemu:dirty-bitmap:c"));
    assert_eq!(other.err().unwrap().code(), Code::NotFound);
}

#[test]
fn qemu_img_reads_and_writes_what_is_served() {
    let model = sparse(&mut Rng::new(3), SIZE);
    let directory = tempfile::tempdir().unwrap();
    let [there, back] = ["there", "back"].map(|name| directory.path().join(name));
    let copy = Disk::new(vec![0xff; SIZE]);
    let exports = vec![
        Export::read_only("disk", Disk::new(model.clone()) as _),
        Export::writable("copy", Arc::clone(&copy) as _),
    ];
    let server = serve(directory.path(), exports, ServerOptions::default());
    let (disk, target) = (uri(&server, "disk"), uri(&server, "copy"));
    run("qemu-img", ["convert", "-f", "raw", "-O", "raw", &disk, text(&there)]);
    assert!(std::fs::read(&there).unwrap() == model);
    let map = run("qemu-img", ["map", "--output=json", "-f", "raw", &disk]);
    assert!(map.contains("\"zero\": true") && map.contains("\"data\": true"), "{map}");
    run("qemu-img", ["convert", "-n", "-f", "raw", "-O", "raw", text(&there), &target]);
    assert!(copy.bytes() == model);
    run("qemu-img", ["compare", "-f", "raw", "-F", "raw", &disk, &target]);
    run("qemu-img", ["convert", "-f", "raw", "-O", "qcow2", &target, text(&back)]);
    run("qemu-img", ["compare", "-f", "qcow2", "-F", "raw", text(&back), &disk]);
    let counters = server.counters("copy").unwrap();
    assert!(counters.writes > 0 && counters.flushes > 0 && counters.errors == 0, "{counters:?}");
    server.stop().unwrap();
}

#[test]
fn libnbd_reads_and_writes_what_is_served() {
    let model = sparse(&mut Rng::new(4), SIZE);
    let directory = tempfile::tempdir().unwrap();
    let there = directory.path().join("there");
    let copy = Disk::new(vec![0xff; SIZE]);
    let exports = vec![
        Export::read_only("disk", Disk::new(model.clone()) as _).text("words"),
        Export::writable("copy", Arc::clone(&copy) as _),
    ];
    let server = Server::start(&Address::tcp("127.0.0.1", 0), exports, ServerOptions::default()).unwrap();
    let (disk, target) = (uri(&server, "disk"), uri(&server, "copy"));
    let told = run("nbdinfo", ["--list", &uri(&server, "")]);
    for line in ["export=\"disk\":", "export=\"copy\":", "description: words", "can_multi_conn: true"] {
        assert!(told.contains(line), "{told}");
    }
    let map = run("nbdinfo", ["--map", &disk]);
    assert!(map.contains("hole,zero") && map.contains("data"), "{map}");
    run("nbdcopy", [&disk, text(&there)]);
    assert!(std::fs::read(&there).unwrap() == model);
    run("nbdcopy", [text(&there), &target]);
    assert!(copy.bytes() == model);
    let again = Client::new(server.address().clone(), "copy").blocks(None).unwrap();
    assert_eq!(again.size(), SIZE as u64);
}
