//! Our server before a client that says what the fuzzer thinks of: from the first byte on, or after an honest handshake.
#![no_main]

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use mainstay_fuzz::Disk;
use mainstay_fuzz::peer::{LIMIT, drain, place};
use mainstay_nbd::{Address, Export, Server, ServerOptions};

/// One server for all.
static SERVER: LazyLock<(PathBuf, Server)> = LazyLock::new(|| {
    let path = place("s");
    let disk = Arc::new(Disk::new(vec![7; 64 << 10], 1 << 20));
    let options = ServerOptions { handshake_limit: LIMIT, stall_limit: LIMIT, ..ServerOptions::default() };
    let server = Server::start(&Address::Unix(path.clone()), vec![Export::read_only("disk", disk)], options);
    (path, server.expect("a server"))
});

fuzz_target!(|input: &[u8]| {
    let Some((honest, rest)) = input.split_first() else { return };
    let mut socket = UnixStream::connect(&SERVER.0).expect("the server lives");
    let _set = socket.set_read_timeout(Some(LIMIT));
    let mut said = Vec::new();
    if honest & 1 == 1 {
        said.extend(3_u32.to_be_bytes());
    }
    if honest & 2 == 2 {
        let option = |kind: u32, data: &[u8]| {
            [b"IHAVEOPT".as_slice(), &kind.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
        };
        said.extend(option(8, &[]));
        said.extend(option(10, b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation"));
        said.extend(option(7, b"\0\0\0\x04disk\0\0"));
    }
    if honest & 4 == 4 {
        // Requests with the right mark: flags, kind, a number, and where, of the fuzzer's making.
        for (number, request) in rest.chunks(9).enumerate() {
            let byte = |at: usize| request.get(at).copied().unwrap_or_default();
            said.extend([0x25, 0x60, 0x95, 0x13, 0, byte(0), 0, byte(1)]);
            said.extend((number as u64).to_be_bytes());
            said.extend([byte(2), 0, 0, 0, 0, byte(3), byte(4), byte(5), byte(6) & 1, byte(7), byte(8), 0]);
        }
    } else {
        said.extend(rest);
    }
    if socket.write_all(&said).is_ok() {
        let _half = socket.shutdown(Shutdown::Write);
        drain(&mut socket);
    }
});
