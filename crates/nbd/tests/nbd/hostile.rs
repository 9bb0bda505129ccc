//! Peers that send anything. Nobody panics, hangs or takes more memory than its limits allow.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use mainstay_core::Blocks as _;
use mainstay_nbd::{Address, Client, Export, Remote, Server, ServerOptions, ServerTls, WritableBlocks as _};
use mainstay_testkit::{Rng, for_each_seed};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::lab::{Disk, PAGE, client, serve, some_range, sparse};
use crate::proxy::{Way, proxy, through};
use crate::tls::Authority;

const SIZE: usize = 1 << 20;
const SHORT: Duration = Duration::from_millis(200);
/// What this process may take at its peak, in KiB.
const MEMORY_MAX: u64 = 400 << 10;
/// What it may ask for at all, in bytes: an allocation by a length out of 32 bits ends the process.
const ADDRESSES_MAX: u64 = 4 << 30;

fn limit_memory() {
    let limit = Rlimit { current: Some(ADDRESSES_MAX), maximum: Some(ADDRESSES_MAX) };
    setrlimit(Resource::As, limit).unwrap();
}

fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn small_server(directory: &std::path::Path, tls: Option<ServerTls>) -> (Server, Vec<u8>) {
    let model = sparse(&mut Rng::new(9), SIZE);
    let exports = vec![
        Export::read_only("disk", Disk::new(model.clone()) as _),
        Export::writable("prey", Disk::new(vec![0; SIZE]) as _),
    ];
    let options = ServerOptions {
        handshake_limit: 2 * SHORT,
        stall_limit: SHORT,
        idle_limit: Some(SHORT),
        tls,
        ..ServerOptions::default()
    };
    (serve(directory, exports, options), model)
}

/// Something between a request and noise.
fn request(rng: &mut Rng) -> Vec<u8> {
    let mut bytes = if rng.chance(97) { 0x2560_9513_u32 } else { 0x1256_0953 }.to_be_bytes().to_vec();
    bytes.extend(rng.pick(&[0_u16, 0, 0, 1, 2, 4, 8, 255]).to_be_bytes());
    bytes.extend(u16::try_from(rng.below(9)).unwrap().to_be_bytes());
    bytes.extend(rng.next_u64().to_be_bytes());
    let offset = *rng.pick(&[0, 512, PAGE as u64, SIZE as u64 - 1, SIZE as u64, u64::MAX, u64::MAX - 5]);
    bytes.extend(offset.to_be_bytes());
    let length = *rng.pick(&[0_u32, 1, 512, 65536, 1 << 20, 9 << 20, 70 << 20, u32::MAX]);
    bytes.extend(length.to_be_bytes());
    let sent = *rng.pick(&[0, 0, 512, 65536]);
    bytes.extend(rng.bytes(sent));
    bytes
}

/// Something between an option and noise.
fn option(rng: &mut Rng) -> Vec<u8> {
    let mut data = Vec::new();
    for _ in 0..rng.below(4) {
        match rng.below(4) {
            0 => data.extend(4_u32.to_be_bytes()),
            1 => data.extend(b"prey"),
            2 => data.extend(rng.pick(&[0_u32, 1, 64, 65, u32::MAX]).to_be_bytes()),
            _ => data.extend(b"\0\0\0\x0fbase:allocation"),
        }
    }
    let len = if rng.chance(90) { data.len() as u64 } else { rng.next_u64() };
    let mut bytes = if rng.chance(97) { b"IHAVEOPT" } else { b"IHAVENOT" }.to_vec();
    bytes.extend(u32::try_from(rng.below(12)).unwrap().to_be_bytes());
    bytes.extend(u32::try_from(len & 0xffff_ffff).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

fn attack(server: &Server, rng: &mut Rng) {
    let Address::Unix(path) = server.address() else { panic!("no unix socket") };
    let Ok(mut stream) = UnixStream::connect(path) else { return };
    stream.set_write_timeout(Some(SHORT)).unwrap();
    stream.set_read_timeout(Some(SHORT)).unwrap();
    let mut bytes = vec![0, 0, 0, *rng.pick(&[0, 1, 3, 3, 3, 3, 7])];
    if rng.chance(20) {
        // Where there is TLS, this is what its handshake gets.
        bytes.extend(b"IHAVEOPT\0\0\0\x05\0\0\0\0");
        bytes.extend(*rng.pick(&[&b"\x16\x03\x01\x02\x00\x01"[..], b"", b"\x17\x03\x03\xff\xff"]));
    }
    if rng.chance(20) {
        let noise = rng.below(5000);
        bytes.extend(rng.bytes(noise));
    }
    for _ in 0..rng.below(6) {
        bytes.extend(option(rng));
    }
    if rng.chance(80) {
        let structured = b"IHAVEOPT\0\0\0\x08\0\0\0\0";
        bytes.extend(&structured[..if rng.chance(70) { 16 } else { 0 }]);
        bytes.extend(b"IHAVEOPT\0\0\0\x0a\0\0\0\x1f\0\0\0\x04prey\0\0\0\x01\0\0\0\x0fbase:allocation");
        bytes.extend(b"IHAVEOPT\0\0\0\x07\0\0\0\x0a\0\0\0\x04prey\0\0");
        for _ in 0..rng.below(40) {
            bytes.extend(request(rng));
        }
    }
    let _dropped = stream.write_all(&bytes);
    if rng.chance(50) {
        let mut told = vec![0; 4096];
        while let Ok(1..) = stream.read(&mut told) {}
    }
}

#[test]
fn clients_that_send_anything_harm_nobody() {
    limit_memory();
    for_each_seed(4, |seed| {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::new("ours");
        let secure = (seed % 2 == 1).then(|| ServerTls::new(authority.server().identity(), None).unwrap());
        let (server, model) = small_server(directory.path(), secure.clone());
        thread::scope(|scope| {
            for attacker in 0..4 {
                let server = &server;
                let mut rng = Rng::new(seed * 4 + attacker);
                scope.spawn(move || (0..15).for_each(|_| attack(server, &mut rng)));
            }
        });
        // Those who said nothing more are gone by now, or soon.
        let remote = (0..500).find_map(|_| {
            thread::sleep(Duration::from_millis(10));
            let client = client(&server, "disk");
            match &secure {
                None => client.blocks(None).ok(),
                Some(_) => client.tls(authority.client_tls()).blocks(None).ok(),
            }
        });
        let mut read = vec![0; SIZE];
        remote.unwrap().read_at(0, &mut read).unwrap();
        assert!(read == model);
        server.stop().unwrap();
        assert!(peak_kib() < MEMORY_MAX, "{} KiB", peak_kib());
    });
}

/// Uses an export in some ways; whether it succeeds does not matter.
fn use_it(remote: &Remote, rng: &mut Rng) {
    for _ in 0..20 {
        let range = some_range(rng, remote.size().clamp(1, 1 << 30), 300_000);
        let mut buffer = vec![0; usize::try_from(range.end - range.start).unwrap()];
        let _any = match rng.below(6) {
            0 | 1 => remote.read_at(range.start, &mut buffer),
            2 | 3 => remote.extents(0..remote.size()).map(drop),
            4 => remote.write_at(range.start, &buffer),
            _ => remote.zero(range).and_then(|()| remote.flush()),
        };
    }
}

/// Bytes are changed, dropped, doubled and invented on their way, in either direction.
#[test]
fn a_wire_that_spoils_everything_harms_nobody() {
    limit_memory();
    for_each_seed(3, |seed| {
        let directory = tempfile::tempdir().unwrap();
        let (server, _) = small_server(directory.path(), None);
        let number = Arc::new(AtomicU64::new(seed << 32));
        let spoiled = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&spoiled);
        let path = proxy(directory.path(), &server, move || {
            let mut rng = Rng::new(number.fetch_add(1, Ordering::SeqCst));
            let way_to_spoil = if rng.chance(70) { Way::ToClient } else { Way::ToServer };
            let calm = rng.below(25);
            let counter = Arc::clone(&counter);
            let mut messages = 0;
            move |way, _, bytes: &mut Vec<u8>| {
                messages += 1;
                if way != way_to_spoil || messages < calm || rng.chance(70) {
                    return true;
                }
                counter.fetch_add(1, Ordering::SeqCst);
                // Heads are what hurts.
                let at = rng.below(bytes.len().min(60));
                match rng.below(4) {
                    0 => bytes[at] ^= 1 << rng.below(8),
                    1 => bytes[at] = *rng.pick(&[0, 1, 0x7f, 0x80, 0xff]),
                    2 => drop(bytes.remove(at)),
                    _ => {
                        let noise = rng.below(100);
                        let noise = rng.bytes(noise);
                        bytes.splice(at..at, noise);
                    }
                }
                true
            }
        });
        let mut rng = Rng::new(seed);
        for _ in 0..40 {
            let client = through(&path, "prey").limit(SHORT).connections(1 + rng.below(3));
            let _any = client.list();
            let _any = client.info();
            if let Ok(remote) = client.blocks(None) {
                use_it(&remote, &mut rng);
            }
        }
        assert!(spoiled.load(Ordering::SeqCst) > 20);
        server.stop().unwrap();
        assert!(peak_kib() < MEMORY_MAX, "{} KiB", peak_kib());
    });
}

/// Answers the handshake, and then with heads whose lengths and kinds are chosen to hurt.
fn lie(mut peer: UnixStream, rng: &mut Rng) -> std::io::Result<()> {
    let reply = |peer: &mut UnixStream, option: u32, kind: u32, data: &[u8]| {
        let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap_or(0).to_be_bytes());
        bytes.extend(data);
        peer.write_all(&bytes)
    };
    peer.set_read_timeout(Some(SHORT))?;
    peer.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    peer.read_exact(&mut [0; 4])?;
    let size = *rng.pick(&[0, SIZE as u64, 1 << 40, u64::MAX]);
    loop {
        let mut head = [0; 16];
        peer.read_exact(&mut head)?;
        let [option, len] =
            [8, 12].map(|at| u32::from_be_bytes(head[at..at + 4].try_into().unwrap_or_default()));
        std::io::copy(&mut (&peer).take(len.into()), &mut std::io::sink())?;
        match option {
            10 => reply(&mut peer, option, 4, b"\0\0\0\x01base:allocation")?,
            7 => {
                let flags = *rng.pick(&[0x1_u16, 0x1ed, 0xffff, 0x16d]);
                let about = [&[0; 2][..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
                reply(&mut peer, option, 3, &about)?;
            }
            _ => {}
        }
        reply(&mut peer, option, 1, &[])?;
        if option == 7 {
            break;
        }
    }
    loop {
        let mut head = [0; 28];
        peer.read_exact(&mut head)?;
        for _ in 0..rng.below(4) + 1 {
            let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
            bytes.extend(u16::try_from(rng.below(2)).unwrap_or(0).to_be_bytes());
            bytes.extend(rng.pick(&[0_u16, 1, 1, 2, 2, 5, 5, 5, 0x8001, 0x8002, 77]).to_be_bytes());
            bytes.extend(if rng.chance(95) { &head[8..16] } else { &head[..8] });
            let len = *rng.pick(&[0_u32, 6, 12, 12, 20, 4 + 8 * 1000, 1 << 20, u32::MAX - 3, u32::MAX]);
            bytes.extend(len.to_be_bytes());
            let mut payload = match rng.below(3) {
                0 => [&[0, 0, 0, 1][..], &b"\0\0\0\x01\0\0\0\x03\0\0\0\x01\0\0\0\0".repeat(500)].concat(),
                1 => head[16..24].to_vec(),
                _ => Vec::new(),
            };
            payload.resize((len as usize).min(2 << 20), u8::try_from(rng.below(3)).unwrap_or(0));
            bytes.extend(payload);
            peer.write_all(&bytes)?;
        }
    }
}

#[test]
fn servers_that_lie_harm_no_client() {
    limit_memory();
    for_each_seed(4, |seed| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("liar.sock");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            for (number, peer) in listener.incoming().enumerate() {
                let mut rng = Rng::new((seed << 32) + number as u64);
                thread::spawn(move || lie(peer.unwrap(), &mut rng));
            }
        });
        let mut rng = Rng::new(seed);
        let mut opened = 0;
        for _ in 0..40 {
            let client = Client::new(Address::Unix(path.clone()), "prey").limit(SHORT).connections(1);
            if let Ok(remote) = client.blocks(None) {
                opened += 1;
                use_it(&remote, &mut rng);
            }
        }
        assert!(opened > 10, "{opened}");
        assert!(peak_kib() < MEMORY_MAX, "{} KiB", peak_kib());
    });
}
