//! What goes wrong between honest peers: cut, killed, slow, full, crowded.

use std::io::{Read as _, Write as _};
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use mainstay_core::{Blocks, Code, Error, Extent, Result};
use mainstay_nbd::{Address, Client, Export, Server, ServerOptions, WritableBlocks};
use mainstay_testkit::Rng;

use crate::lab::{Daemon, Disk, client, serve, sparse};
use crate::proxy::{Way, proxy, through};

const SIZE: usize = 4 << 20;
const SHORT: Duration = Duration::from_millis(300);

fn export(model: &[u8]) -> Vec<Export> {
    vec![Export::read_only("disk", Disk::new(model.to_vec()) as _)]
}

#[test]
fn a_connection_cut_anywhere_is_an_error_and_stays_one() {
    let model = sparse(&mut Rng::new(1), SIZE);
    for cut in [3, 17, 100, 150, 500_000] {
        let directory = tempfile::tempdir().unwrap();
        let server = serve(directory.path(), export(&model), ServerOptions::default());
        let path = proxy(directory.path(), &server, move || {
            move |way, passed, bytes: &mut Vec<u8>| {
                let left = usize::try_from(cut - passed).unwrap();
                if way == Way::ToServer || bytes.len() < left {
                    return true;
                }
                bytes.truncate(left);
                false
            }
        });
        let Ok(remote) = through(&path, "disk").connections(1).blocks(None) else {
            assert!(cut < 200, "the handshake is longer than {cut}");
            continue;
        };
        let error = remote.read_at(0, &mut vec![0; SIZE]).unwrap_err();
        assert_eq!(error.code(), Code::Io, "{error:?}");
        let later = remote.read_at(0, &mut [0; 512]).unwrap_err();
        assert!(later.chain().iter().any(|clause| clause.contains("lost earlier")), "{later:?}");
        drop(remote);
        server.stop().unwrap();
    }
}

#[test]
fn a_killed_server_fails_every_thread() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    std::fs::write(&image, sparse(&mut Rng::new(2), SIZE)).unwrap();
    let mut daemon = Daemon::qemu_nbd(directory.path(), &["-e", "8", "-f", "raw", image.to_str().unwrap()]);
    let remote = daemon.client("").blocks(None).unwrap();
    let reader = || {
        let mut buffer = vec![0; SIZE];
        loop {
            if let Err(error) = remote.read_at(0, &mut buffer) {
                return error;
            }
        }
    };
    thread::scope(|scope| {
        let readers: Vec<_> = (0..6).map(|_| scope.spawn(reader)).collect();
        thread::sleep(Duration::from_millis(100));
        daemon.process.kill();
        for reader in readers {
            assert_eq!(reader.join().unwrap().code(), Code::Io);
        }
    });
}

/// Reads wait until the gate opens, or panic, or fail.
struct Strange {
    open: Mutex<bool>,
    opened: Condvar,
    entered: AtomicBool,
    code: Option<Code>,
}

impl Strange {
    fn new(code: Option<Code>) -> Arc<Self> {
        let (open, opened) = (Mutex::new(false), Condvar::new());
        Arc::new(Self { open, opened, entered: AtomicBool::new(false), code })
    }

    fn let_through(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn wait_until_entered(&self) {
        while !self.entered.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn act(&self) -> Result<()> {
        match self.code {
            Some(Code::Bug) => panic!("this panic is part of the test"),
            Some(code) => Err(Error::new(code, "the reason")),
            None => Ok(()),
        }
    }
}

impl Blocks for Strange {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn extents(&self, _: Range<u64>) -> Result<Vec<Extent>> {
        self.act()?;
        // Breaks the contract: nothing is covered.
        Ok(Vec::new())
    }

    fn read_at(&self, _: u64, buffer: &mut [u8]) -> Result<()> {
        self.act()?;
        self.entered.store(true, Ordering::SeqCst);
        let open = self.open.lock().unwrap();
        drop(self.opened.wait_while(open, |open| !*open).unwrap());
        buffer.fill(7);
        Ok(())
    }
}

impl WritableBlocks for Strange {
    fn write_at(&self, _: u64, _: &[u8]) -> Result<()> {
        self.act()
    }

    fn zero(&self, _: Range<u64>) -> Result<()> {
        self.act()
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

#[test]
fn a_request_that_takes_too_long_fails_and_the_server_lives() {
    let directory = tempfile::tempdir().unwrap();
    let strange = Strange::new(None);
    let exports = vec![Export::read_only("slow", Arc::clone(&strange) as _)];
    let server = serve(directory.path(), exports, ServerOptions::default());
    let remote = client(&server, "slow").limit(SHORT).blocks(None).unwrap();
    let error = remote.read_at(0, &mut [0; 512]).unwrap_err();
    assert!(error.chain().iter().any(|clause| clause.contains("timed out")), "{error:?}");
    drop(remote);
    strange.let_through();
    client(&server, "slow").blocks(None).unwrap().read_at(0, &mut [0; 512]).unwrap();
    server.stop().unwrap();
}

/// A server that says a byte now and then does not stretch the limit of a whole call.
#[test]
fn a_server_that_trickles_does_not_hold_the_client() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("trickle.sock");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        let (mut peer, _) = listener.accept().unwrap();
        let mut bytes = b"NBDMAGICIHAVEOPT\0\x03".iter().copied().chain(std::iter::repeat(0));
        while peer.write_all(&[bytes.next().unwrap_or_default()]).is_ok() {
            thread::sleep(Duration::from_millis(20));
        }
    });
    let error = Client::new(Address::Unix(path), "").limit(2 * SHORT).info().unwrap_err();
    assert_eq!(error.code(), Code::Io, "{error:?}");
}

#[test]
fn a_stop_waits_for_what_has_been_asked() {
    let directory = tempfile::tempdir().unwrap();
    let strange = Strange::new(None);
    let exports = vec![Export::read_only("slow", Arc::clone(&strange) as _)];
    let server = serve(directory.path(), exports, ServerOptions::default());
    let remote = client(&server, "slow").connections(1).blocks(None).unwrap();
    thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let mut buffer = [0; 4096];
            remote.read_at(0, &mut buffer).map(|()| buffer)
        });
        strange.wait_until_entered();
        let stopping = scope.spawn(|| server.stop());
        thread::sleep(Duration::from_millis(50));
        strange.let_through();
        assert_eq!(reading.join().unwrap().unwrap(), [7; 4096]);
        stopping.join().unwrap().unwrap();
    });
    assert_eq!(remote.read_at(0, &mut [0]).unwrap_err().code(), Code::Io);
}

#[test]
fn what_the_blocks_say_reaches_the_client_even_a_panic() {
    for (code, expected) in [
        (Code::Full, Code::Full),
        (Code::Refused, Code::Refused),
        (Code::Integrity, Code::Io),
        (Code::Bug, Code::Io),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let exports = vec![Export::writable("strange", Strange::new(Some(code)) as _)];
        let server = serve(directory.path(), exports, ServerOptions::default());
        let remote = client(&server, "strange").blocks(None).unwrap();
        for _ in 0..20 {
            for outcome in [
                remote.read_at(0, &mut [0; 4096]),
                remote.read_at(0, &mut vec![0; SIZE]),
                remote.write_at(0, &[1; 4096]),
                remote.zero(0..4096),
                remote.extents(0..4096).map(drop),
            ] {
                let error = outcome.unwrap_err();
                assert_eq!(error.code(), expected, "{error:?}");
                let reason = if code == Code::Bug { "mistake" } else { "the reason" };
                assert!(error.chain().iter().any(|clause| clause.contains(reason)), "{error:?}");
            }
            remote.flush().unwrap();
        }
        assert!(server.counters("strange").unwrap().errors >= 100);
        server.stop().unwrap();
    }
}

/// Says hello as a client and enters the transmission phase without structured replies.
pub(crate) fn enter(server: &Server, export: &str) -> UnixStream {
    let Address::Unix(path) = server.address() else { panic!("no unix socket") };
    let mut stream = UnixStream::connect(path).unwrap();
    let mut bytes = 1_u32.to_be_bytes().to_vec();
    bytes.extend(b"IHAVEOPT");
    bytes.extend(1_u32.to_be_bytes());
    bytes.extend(u32::try_from(export.len()).unwrap().to_be_bytes());
    bytes.extend(export.as_bytes());
    stream.write_all(&bytes).unwrap();
    // Greeting, size and flags, and the zeros that nobody declined.
    stream.read_exact(&mut [0; 18 + 10 + 124]).unwrap();
    stream
}

/// The grace of a stop is for clients that fetch.
#[test]
fn a_stop_does_not_wait_for_a_client_that_fetches_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let exports = vec![Export::read_only("hog", Disk::new(vec![5; SIZE]) as _)];
    let options = ServerOptions { stall_limit: Duration::from_secs(3600), ..ServerOptions::default() };
    let server = serve(directory.path(), exports, options);
    let mut hog = enter(&server, "hog");
    hog.write_all(&read_of(1 << 19).repeat(100)).unwrap();
    while server.counters("hog").unwrap().reads < 5 {
        thread::sleep(Duration::from_millis(5));
    }
    server.stop().unwrap();
}

/// A request for so many bytes from the beginning on.
fn read_of(length: u32) -> Vec<u8> {
    let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
    request.extend([0; 20]);
    request.extend(length.to_be_bytes());
    request
}

/// Tells which thread serves each read. The first MiB is at hand, the second waits until the gate opens, and the third is
/// at hand and broken.
struct Near {
    gate: Arc<Strange>,
    threads: Mutex<Vec<String>>,
}

impl Blocks for Near {
    fn size(&self) -> u64 {
        3 << 20
    }

    fn extents(&self, _: Range<u64>) -> Result<Vec<Extent>> {
        Ok(Vec::new())
    }

    fn is_at_hand(&self, range: Range<u64>) -> bool {
        range.start >> 20 != 1
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.threads.lock().unwrap().push(thread::current().name().unwrap().to_owned());
        match offset >> 20 {
            0 => buffer.fill(3),
            1 => self.gate.read_at(offset, buffer)?,
            _ => panic!("this panic is part of the test"),
        }
        Ok(())
    }
}

#[test]
fn what_is_at_hand_is_answered_by_the_reader_and_waits_for_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let near = Arc::new(Near { gate: Strange::new(None), threads: Mutex::default() });
    let exports = vec![Export::read_only("near", Arc::clone(&near) as _)];
    let server = serve(directory.path(), exports, ServerOptions::default());
    let mut stream = enter(&server, "near");
    // One that has to wait, and behind it one that has not.
    let mut waits = read_of(512);
    waits[8..16].copy_from_slice(&7_u64.to_be_bytes());
    waits[16..24].copy_from_slice(&(1_u64 << 20).to_be_bytes());
    stream.write_all(&[waits, read_of(512)].concat()).unwrap();
    let mut reply = [0; 16 + 512];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!((&reply[8..16], reply[16]), (&[0; 8][..], 3));
    near.gate.let_through();
    stream.read_exact(&mut reply).unwrap();
    assert_eq!((&reply[8..16], reply[16]), (&7_u64.to_be_bytes()[..], 7));

    let remote = client(&server, "near").connections(1).blocks(None).unwrap();
    let error = remote.read_at(2 << 20, &mut [0; 4096]).unwrap_err();
    assert!(error.chain().iter().any(|clause| clause.contains("mistake")), "{error:?}");
    let mut long = vec![0; 1 << 20];
    remote.read_at(0, &mut long).unwrap();
    assert_eq!(long, [3; 1 << 20]);
    let mut threads = near.threads.lock().unwrap().clone();
    threads[..2].sort();
    let served: Vec<_> = threads.iter().map(|name| name.split('-').nth(1).unwrap()).collect();
    assert_eq!(served, ["reader", "worker", "reader", "worker"], "long reads are not the reader's");
    server.stop().unwrap();
}

/// A client that asks and asks and never fetches, beside one that behaves.
#[test]
fn a_client_that_does_not_fetch_its_replies_holds_up_nobody_and_goes() {
    // Short reads of what is at hand are answered by the reader itself.
    [1 << 19, 1 << 18].into_iter().for_each(hogs_that_read);
}

fn hogs_that_read(length: u32) {
    let directory = tempfile::tempdir().unwrap();
    let options = ServerOptions {
        workers: 2,
        requests_per_connection: 8,
        bytes_per_connection: 1 << 20,
        payload_max: 1 << 20,
        stall_limit: SHORT,
        ..ServerOptions::default()
    };
    let model = vec![5; SIZE];
    let exports = vec![
        Export::read_only("disk", Disk::new(model.clone()) as _),
        Export::read_only("hog", Disk::new(model) as _),
    ];
    let server = serve(directory.path(), exports, options);
    let mut hogs = [enter(&server, "hog"), enter(&server, "hog"), enter(&server, "hog")];
    let request = read_of(length);
    for hog in &mut hogs {
        hog.set_write_timeout(Some(SHORT)).unwrap();
        while hog.write_all(&request.repeat(100)).is_ok() {}
    }
    let remote = client(&server, "disk").blocks(None).unwrap();
    remote.read_at(0, &mut vec![0; SIZE]).unwrap();
    // Of each hog's flood only what its budget allowed was ever read: two replies, and what the socket took.
    let reads = server.counters("hog").unwrap().reads;
    let most = 3 * 5 * (1 << 19) / u64::from(length);
    assert!(reads <= most, "{reads} reads for clients that fetch nothing");
    for hog in &mut hogs {
        hog.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut rest = Vec::new();
        let _cut = hog.read_to_end(&mut rest);
        assert!(rest.len() < 4 << 20);
    }
    server.stop().unwrap();
}

#[test]
fn a_full_server_turns_away_and_silent_guests_do_not_stay() {
    let directory = tempfile::tempdir().unwrap();
    let options = ServerOptions {
        connections: 2,
        handshake_limit: SHORT,
        idle_limit: Some(2 * SHORT),
        ..ServerOptions::default()
    };
    let server = serve(directory.path(), export(&[1; 4096]), options);
    let Address::Unix(path) = server.address() else { panic!("no unix socket") };
    let silent = [UnixStream::connect(path).unwrap(), UnixStream::connect(path).unwrap()];
    let attempt = || client(&server, "disk").connections(1).blocks(None);
    let eventually = || {
        for _ in 0..1000 {
            if let Ok(remote) = attempt() {
                return remote;
            }
            thread::sleep(Duration::from_millis(10));
        }
        panic!("the server never lets anybody in");
    };
    assert!(attempt().is_err());
    let (one, two) = (eventually(), eventually());
    assert!(attempt().is_err());
    drop(two);
    let two = eventually();
    drop(silent);
    // Both fall asleep; the server does not keep their places.
    let _three = eventually();
    assert!(one.read_at(0, &mut [0]).is_err() || two.read_at(0, &mut [0]).is_err());
}
