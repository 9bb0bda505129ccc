//! Our client and our server.

use std::sync::Arc;

use mainstay_core::{Blocks, Code, ExtentKind};
use mainstay_nbd::{Address, Client, Export, Server, ServerOptions, Trace, WritableBlocks};
use mainstay_testkit::{Rng, for_each_seed};

use crate::lab::{Disk, client, index, serve, some_range, sparse};

const SIZE: usize = 5 << 20;

/// Any order of any requests leaves the bytes that a model says, and extents that fit them.
#[test]
fn random_requests_agree_with_a_model() {
    for_each_seed(8, |seed| {
        let mut rng = Rng::new(seed);
        let odd = rng.below(5000);
        let mut model = sparse(&mut rng, SIZE + odd);
        let disk = Disk::new(model.clone());
        let directory = tempfile::tempdir().unwrap();
        let options = ServerOptions { payload_max: 300_000, ..ServerOptions::default() };
        let server = serve(directory.path(), vec![Export::writable("disk", Arc::clone(&disk) as _)], options);
        let remote = client(&server, "disk").blocks(None).unwrap();
        assert_eq!((remote.size(), remote.info().payload_max), (model.len() as u64, 300_000));
        for _ in 0..60 {
            let range = some_range(&mut rng, model.len() as u64, 3 << 20);
            let part = &mut model[index(range.start)..index(range.end)];
            match rng.below(5) {
                0 => {
                    rng.fill(part);
                    remote.write_at(range.start, part).unwrap();
                }
                1 => {
                    part.fill(0);
                    remote.write_zeroes(range, rng.chance(50)).unwrap();
                }
                2 => {
                    part.fill(0);
                    remote.trim(range).unwrap();
                }
                3 => agree(&remote, &model, range),
                _ => {
                    let mut read = vec![0xaa; part.len()];
                    remote.read_at(range.start, &mut read).unwrap();
                    assert!(read == part, "{range:?} differs");
                }
            }
        }
        remote.flush().unwrap();
        assert!(disk.bytes() == model);
    });
}

/// What is said to be zero is, and what is said covers the range.
fn agree(remote: &impl Blocks, model: &[u8], range: std::ops::Range<u64>) {
    let mut at = range.start;
    for extent in remote.extents(range.clone()).unwrap() {
        assert!(extent.range.start == at && extent.range.end > at, "{extent:?} does not follow {at}");
        let zero = model[index(at)..index(extent.range.end)].iter().all(|byte| *byte == 0);
        assert!(zero || extent.kind == ExtentKind::Data, "{extent:?} is not zero");
        at = extent.range.end;
    }
    assert_eq!(at, range.end);
}

#[test]
fn threads_share_the_connections_and_the_counters_count() {
    let model = sparse(&mut Rng::new(1), SIZE);
    let directory = tempfile::tempdir().unwrap();
    let trace = Arc::new(Trace::new(5));
    let export = Export::read_only("disk", Disk::new(model.clone()) as _)
        .text("a disk")
        .observer(Arc::clone(&trace) as _);
    let other = Export::writable("other", Disk::new(vec![1; 1000]) as _);
    let secret = Export::writable("secret", Disk::new(vec![2; 1000]) as _).hidden();
    let server = serve(directory.path(), vec![secret, export, other], ServerOptions::default());
    assert_eq!(client(&server, "secret").info().unwrap().size, 1000);
    let listed: Vec<_> =
        client(&server, "").list().unwrap().into_iter().map(|export| (export.name, export.text)).collect();
    assert_eq!(listed, [("disk".into(), "a disk".into()), ("other".into(), String::new())]);
    let info = client(&server, "").info().unwrap();
    assert!(info.read_only && info.multi_connection && info.text == "a disk");
    assert_eq!(info.contexts, ["base:allocation"]);

    let remote = client(&server, "disk").connections(3).blocks(None).unwrap();
    assert_eq!(remote.idle_connections(), 3);
    let read = |seed: u64| {
        let mut rng = Rng::new(seed);
        for _ in 0..20 {
            let range = some_range(&mut rng, SIZE as u64, 1 << 19);
            let mut bytes = vec![0; index(range.end - range.start)];
            remote.read_at(range.start, &mut bytes).unwrap();
            assert!(bytes == model[index(range.start)..index(range.end)]);
        }
    };
    std::thread::scope(|scope| {
        for seed in 0..6 {
            scope.spawn(move || read(seed));
        }
    });
    let counters = server.counters("disk").unwrap();
    assert_eq!((counters.connections, counters.reads, counters.errors), (3, 120, 0));
    assert_eq!((trace.reads().len(), server.counters("none")), (5, None));
    assert_eq!(remote.write_at(0, &[1]).unwrap_err().code(), Code::Refused);
    assert_eq!(remote.read_at(SIZE as u64, &mut [0]).unwrap_err().code(), Code::Usage);
    drop(remote);
    server.stop().unwrap();
    assert!(!directory.path().join("ours.sock").exists());
}

#[test]
fn what_is_not_there_is_not_found() {
    let directory = tempfile::tempdir().unwrap();
    let address = Address::Unix(directory.path().join("ours.sock"));
    let nobody = Client::new(address, "disk").blocks(None).err().unwrap();
    assert_eq!(nobody.code(), Code::NotFound, "{nobody:?}");
    let disk = Disk::new(vec![0; 1000]);
    let server =
        serve(directory.path(), vec![Export::read_only("disk", disk as _)], ServerOptions::default());
    assert_eq!(client(&server, "desk").blocks(None).err().unwrap().code(), Code::NotFound);
    assert_eq!(client(&server, "desk").info().unwrap_err().code(), Code::NotFound);
    let no_bitmap = client(&server, "disk").blocks(Some("qemu:dirty-bitmap:b")).err().unwrap();
    assert_eq!(no_bitmap.code(), Code::NotFound);
}

#[test]
fn a_socket_is_replaced_when_its_server_is_dead_and_only_then() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ours.sock");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let export = || vec![Export::read_only("disk", Disk::new(vec![7; 10]) as _)];
    let server = serve(directory.path(), export(), ServerOptions::default());
    let again = Server::start(&Address::Unix(path.clone()), export(), ServerOptions::default());
    assert_eq!(again.err().unwrap().code(), Code::Io);
    assert_eq!(client(&server, "disk").info().unwrap().size, 10);
    server.stop().unwrap();
    std::fs::write(&path, "a file").unwrap();
    assert!(Server::start(&Address::Unix(path.clone()), export(), ServerOptions::default()).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"a file");
}
