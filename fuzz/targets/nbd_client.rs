//! Our client before a server that says what the fuzzer thinks of: from the first byte on, or after an honest handshake.
#![no_main]

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use mainstay_core::Blocks as _;
use mainstay_fuzz::peer::{LIMIT, Listener, Supply, drain, place};
use mainstay_nbd::{Address, Client, WritableBlocks as _};

fuzz_target!(|input: &[u8]| {
    let supply = Supply::new(input);
    let server = Listener::start(place("n"), move |socket| drop(serve(socket, &supply)));
    let client = || Client::new(Address::Unix(server.path().to_owned()), "disk").limit(LIMIT).connections(1);
    match input.first().map(|byte| byte % 4) {
        Some(0) => drop(client().list()),
        Some(1) => drop(client().info()),
        _ => {
            let Ok(disk) = client().blocks(Some("qemu:dirty-bitmap:since")) else { return };
            let size = disk.size().min(1 << 20);
            let mut buffer = vec![0; size as usize];
            drop(disk.read_at(0, &mut buffer));
            if let Ok(extents) = disk.extents(0..size) {
                let mut at = 0;
                for extent in extents {
                    assert!(extent.range.start == at && extent.range.end > at, "a gap at {at}");
                    at = extent.range.end;
                }
                assert_eq!(at, size, "extents end early");
            }
            drop(disk.write_at(0, &buffer[..buffer.len().min(4096)]));
            drop(disk.flush());
        }
    }
});

/// The second byte says how much is honest; the rest is sent.
fn serve(mut socket: UnixStream, supply: &Supply) -> std::io::Result<()> {
    supply.byte();
    let honest = supply.byte().unwrap_or_default();
    if honest & 1 == 0 {
        return rest(socket, supply);
    }
    socket.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    socket.read_exact(&mut [0; 4])?;
    for option in 0..8 {
        let mut head = [0; 16];
        socket.read_exact(&mut head)?;
        let length = u32::from_be_bytes([head[12], head[13], head[14], head[15]]);
        let mut data = vec![0; length.min(1 << 16) as usize];
        socket.read_exact(&mut data)?;
        if honest & 2 == 0 && option > 0 {
            return rest(socket, supply);
        }
        let kind = &head[8..12];
        let reply = |kind: &[u8], reply: u32, data: &[u8]| {
            let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
            [&magic, kind, &reply.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
        };
        match kind[3] {
            // Contexts: both, under numbers that the replies will have.
            10 => {
                for (number, name) in [(1_u32, "base:allocation"), (2, "qemu:dirty-bitmap:since")] {
                    let context = [number.to_be_bytes().as_slice(), name.as_bytes()].concat();
                    socket.write_all(&reply(kind, 4, &context))?;
                }
            }
            6 | 7 => {
                let size = u64::from(supply.byte().unwrap_or_default()) << 12;
                let export = [[0; 2].as_slice(), &size.to_be_bytes(), &[1, 0xed]].concat();
                socket.write_all(&reply(kind, 3, &export))?;
            }
            _ => {}
        }
        socket.write_all(&reply(kind, 1, &[]))?;
        if kind[3] == 7 {
            break;
        }
    }
    transmit(socket, supply)
}

/// Says all that is left, and nothing more.
fn rest(mut socket: UnixStream, supply: &Supply) -> std::io::Result<()> {
    socket.write_all(&supply.take(usize::MAX))?;
    socket.shutdown(std::net::Shutdown::Write)?;
    drain(&mut socket);
    Ok(())
}

/// Every request gets chunks with its number, of the kinds and with the content of the supply.
fn transmit(mut socket: UnixStream, supply: &Supply) -> std::io::Result<()> {
    loop {
        let mut request = [0; 28];
        socket.read_exact(&mut request)?;
        if request[7] == 1 {
            let length = u32::from_be_bytes([request[24], request[25], request[26], request[27]]);
            socket.read_exact(&mut vec![0; length.min(1 << 20) as usize])?;
        }
        loop {
            let (Some(flags), Some(kind), Some(length)) = (supply.byte(), supply.byte(), supply.byte())
            else {
                return Ok(());
            };
            let data = supply.take(usize::from(length));
            let cookie = &request[8..16];
            let chunk = match flags & 0x40 {
                0 => {
                    let head =
                        [&0x668e_33ef_u32.to_be_bytes()[..], &[0, flags & 1], &[kind & 0x80, kind & 0x7f]];
                    [&head.concat(), cookie, &(data.len() as u32).to_be_bytes(), &data].concat()
                }
                _ => [&0x6744_6698_u32.to_be_bytes()[..], &[0, 0, 0, kind], cookie, &data].concat(),
            };
            socket.write_all(&chunk)?;
            if flags & 1 == 1 {
                break;
            }
        }
    }
}
