//! The rules of the protocol one by one: what each side answers to what it must not get.

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;

use mainstay_core::{Blocks as _, Code, Result};
use mainstay_nbd::{Address, Client, Export, Remote, ServerOptions, WritableBlocks as _};

use crate::lab::{Disk, LONG, serve};
use crate::trouble::enter;

const SIZE: u64 = 1 << 20;

fn chunk(done: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = chunk_head(done, kind, cookie, u32::try_from(payload.len()).unwrap());
    bytes.extend(payload);
    bytes
}

fn chunk_head(done: u16, kind: u16, cookie: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
    bytes.extend(done.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

fn data(done: u16, cookie: u64, offset: u64, len: usize) -> Vec<u8> {
    chunk(done, 1, cookie, &[&offset.to_be_bytes()[..], &vec![1; len]].concat())
}

fn hole(done: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    chunk(done, 2, cookie, &[&offset.to_be_bytes()[..], &len.to_be_bytes()].concat())
}

fn status(done: u16, cookie: u64, context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut payload = context.to_be_bytes().to_vec();
    for (len, flags) in extents {
        payload.extend(len.to_be_bytes());
        payload.extend(flags.to_be_bytes());
    }
    chunk(done, 5, cookie, &payload)
}

fn simple(errno: u32, cookie: u64) -> Vec<u8> {
    let mut bytes = 0x6744_6698_u32.to_be_bytes().to_vec();
    bytes.extend(errno.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes
}

fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Shakes hands as a server with structured replies and one context, and answers the first request with `reply`.
fn answer_once(peer: UnixStream, reply: &[u8]) -> std::io::Result<()> {
    let mut peer = &peer;
    peer.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    peer.read_exact(&mut [0; 4])?;
    loop {
        let mut head = [0; 16];
        peer.read_exact(&mut head)?;
        let [option, len] = [8, 12].map(|at| u32::from_be_bytes(head[at..at + 4].try_into().unwrap()));
        std::io::copy(&mut peer.take(len.into()), &mut std::io::sink())?;
        if option == 10 {
            peer.write_all(&option_reply(option, 4, b"\0\0\0\x05base:allocation"))?;
        }
        if option == 7 {
            let about = [&[0; 2][..], &SIZE.to_be_bytes(), &0x6d_u16.to_be_bytes()].concat();
            peer.write_all(&option_reply(option, 3, &about))?;
        }
        peer.write_all(&option_reply(option, 1, &[]))?;
        if option == 7 {
            break;
        }
    }
    peer.read_exact(&mut [0; 28])?;
    peer.write_all(reply)?;
    // Until the client has gone.
    std::io::copy(&mut peer, &mut std::io::sink()).map(drop)
}

fn read(remote: &Remote) -> Result<()> {
    remote.read_at(4096, &mut [0; 8192])
}

fn extents(remote: &Remote) -> Result<()> {
    remote.extents(0..65536).map(drop)
}

fn write(remote: &Remote) -> Result<()> {
    remote.write_at(0, &[1; 512])
}

type Use = fn(&Remote) -> Result<()>;

/// What a server says to the first request, whose cookie is 1, and what the client makes of it: nothing for success.
fn replies() -> Vec<(Use, Vec<u8>, Option<&'static str>)> {
    let good = status(1, 1, 5, &[(4096, 3), (65536, 0)]);
    let all = data(1, 1, 4096, 8192);
    let parts = [hole(0, 1, 8192, 4096), data(0, 1, 4096, 4096), chunk(1, 0, 1, &[])].concat();
    let failed = chunk(1, 0x8001, 1, b"\0\0\0\x05\0\x03why");
    vec![
        (read, all, None),
        (read, parts, None),
        (read, failed, Some("failed in the server")),
        (read, simple(0, 1), Some("in the old form")),
        (read, data(1, 2, 4096, 8192), Some("belongs to no request")),
        (read, data(1, 1, 4095, 8192), Some("not asked for")),
        (read, data(1, 1, 8192, 8192), Some("not asked for")),
        (read, data(1, 1, u64::MAX - 100, 200), Some("not asked for")),
        (read, [data(0, 1, 4096, 5000), data(1, 1, 9000, 3288)].concat(), Some("bytes twice")),
        (read, data(1, 1, 4096, 8191), Some("in part")),
        (read, chunk(1, 0, 1, &[]), Some("in part")),
        (read, hole(1, 1, 4096, 0), Some("or none")),
        (read, hole(1, 1, 4096, 8193), Some("not asked for")),
        (read, chunk(1, 2, 1, &[0; 13]), Some("impossible length")),
        (read, chunk(1, 1, 1, &[0; 7]), Some("too short")),
        (read, chunk(0, 77, 1, &[]), Some("no kind that fits")),
        (read, chunk(1, 0, 1, &[0]), Some("no kind that fits")),
        (read, chunk(1, 0x8001, 1, b"\0\0\0\x05\0\x04why"), Some("too short")),
        (read, chunk_head(1, 0x8001, 1, u32::MAX), Some("no kind that fits")),
        (read, vec![7; 100], Some("does not begin as one")),
        (read, chunk(0, 0x8001, 1, b"\0\0\0\x05\0\0").repeat(5000), Some("too many parts")),
        (extents, good, None),
        (extents, chunk(1, 0, 1, &[]), Some("every context")),
        (extents, simple(0, 1), Some("without any")),
        (extents, status(1, 1, 6, &[(65536, 0)]), Some("nobody asked for")),
        (extents, status(0, 1, 5, &[(65536, 0)]).repeat(2), Some("a context twice")),
        (extents, status(1, 1, 5, &[(4096, 0), (0, 0)]), Some("empty or not asked for")),
        (extents, status(1, 1, 5, &[(65536, 0), (1, 0)]), Some("empty or not asked for")),
        (extents, status(1, 1, 5, &[]), Some("impossible length")),
        (extents, chunk_head(1, 5, 1, u32::MAX - 3), Some("impossible length")),
        (write, simple(0, 1), None),
        (write, chunk(1, 0, 1, &[]), None),
        (write, simple(28, 1), Some("found no space")),
        (write, simple(0, 3), Some("belongs to no request")),
        (write, data(1, 1, 0, 512), Some("no kind that fits")),
        (write, chunk(0, 0, 1, &[]), Some("not the last")),
    ]
}

#[test]
fn a_client_names_each_reply_that_breaks_a_rule() {
    for (number, (act, reply, expected)) in replies().into_iter().enumerate() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("server.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || answer_once(listener.accept().unwrap().0, &reply));
        let client = Client::new(Address::Unix(path), "").connections(1).limit(LONG);
        let remote = client.blocks(None).unwrap();
        let told = act(&remote).err().map(|error| error.chain().join(": "));
        match (&told, expected) {
            (None, None) => {}
            (Some(told), Some(words)) if told.contains(words) => {}
            _ => panic!("reply {number}: {told:?} where {expected:?} was expected"),
        }
        drop(remote);
        let _gone = server.join().unwrap();
    }
}

fn request(flags: u16, command: u16, offset: u64, length: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(77_u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes.extend(payload);
    bytes
}

#[test]
fn a_server_says_no_to_each_request_that_breaks_a_rule_and_goes_on() {
    const LENGTH_MAX: u32 = 64 << 10;
    let directory = tempfile::tempdir().unwrap();
    let exports = vec![
        Export::read_only("fixed", Disk::new(vec![1; 1 << 20]) as _),
        Export::writable("free", Disk::new(vec![1; 1 << 20]) as _),
    ];
    let options = ServerOptions {
        payload_max: LENGTH_MAX,
        bytes_per_connection: LENGTH_MAX as usize,
        ..ServerOptions::default()
    };
    let server = serve(directory.path(), exports, options);
    let mut streams = [enter(&server, "fixed"), enter(&server, "free")];
    streams.iter().for_each(|stream| stream.set_read_timeout(Some(LONG)).unwrap());
    let (eperm, einval, enospc, eoverflow) = (1, 22, 28, 75);
    let long = vec![2; LENGTH_MAX as usize + 1];
    // What is sent, and the answers of the read-only export and of the writable one.
    let cases = [
        (request(0, 3, 0, 0, &[]), 0, 0),
        (request(0, 1, 0, 512, &[2; 512]), eperm, 0),
        (request(1, 1, 0, 512, &[2; 512]), einval, 0),
        (request(2, 1, 0, 512, &[2; 512]), einval, einval),
        (request(0, 1, 0, LENGTH_MAX + 1, &long), eperm, eoverflow),
        (request(0, 1, SIZE - 511, 512, &[2; 512]), eperm, enospc),
        (request(0, 1, u64::MAX, 512, &[2; 512]), eperm, enospc),
        (request(0, 4, 0, 1 << 20, &[]), eperm, 0),
        (request(0, 6, 0, 1 << 20, &[]), eperm, 0),
        (request(2, 6, 0, LENGTH_MAX, &[]), eperm, 0),
        (request(2, 6, 0, LENGTH_MAX + 1, &[]), eperm, eoverflow),
        (request(16, 6, 0, 512, &[]), einval, einval),
        (request(0, 6, 1, 1 << 20, &[]), eperm, enospc),
        (request(0, 0, SIZE, 1, &[]), einval, einval),
        (request(0, 0, 0, LENGTH_MAX + 1, &[]), eoverflow, eoverflow),
        (request(4, 0, 0, 512, &[]), einval, einval),
        (request(0, 7, 0, 512, &[]), einval, einval),
        (request(0, 5, 0, 512, &[]), einval, einval),
        (request(0, 99, 0, 512, &[]), einval, einval),
    ];
    for (number, (bytes, fixed, free)) in cases.into_iter().enumerate() {
        for (stream, expected) in streams.iter_mut().zip([fixed, free]) {
            stream.write_all(&bytes).unwrap();
            let mut reply = [0; 16];
            stream.read_exact(&mut reply).unwrap();
            assert_eq!(reply, simple(expected, 77)[..], "request {number}");
        }
    }
    for mut stream in streams {
        stream.write_all(&request(0, 0, SIZE - 2, 2, &[])).unwrap();
        let mut reply = [0; 18];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..16], simple(0, 77)[..]);
        // Goodbye, and nothing more comes.
        stream.write_all(&request(0, 2, 0, 0, &[])).unwrap();
        assert_eq!(stream.read(&mut reply).unwrap(), 0);
    }
    let writable = server.counters("free").unwrap();
    assert_eq!((writable.writes, writable.flushes, writable.reads), (5, 1, 1));
    let gone = Client::new(server.address().clone(), "else").blocks(None).err().unwrap();
    assert_eq!(gone.code(), Code::NotFound);
    server.stop().unwrap();
}
