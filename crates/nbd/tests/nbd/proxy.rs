//! A pipe between a client and a server that does to the bytes what a test wants.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;

use mainstay_nbd::{Address, Client, Server};

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    ToServer,
    ToClient,
}

/// What happens to bytes on their way: the bytes, and how many went that way on that connection before. False ends the
/// connection after them.
pub(crate) trait Spoil: FnMut(Way, u64, &mut Vec<u8>) -> bool + Send + 'static {}
impl<T: FnMut(Way, u64, &mut Vec<u8>) -> bool + Send + 'static> Spoil for T {}

/// Listens in `directory` until the process ends. `spoil` makes a new mischief for each direction of each connection.
pub(crate) fn proxy<S: Spoil>(
    directory: &Path,
    server: &Server,
    spoil: impl Fn() -> S + Send + 'static,
) -> PathBuf {
    let Address::Unix(upstream) = server.address().clone() else { panic!("no unix socket") };
    let path = directory.join("proxy.sock");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        for client in listener.incoming() {
            let client = client.unwrap();
            let Ok(server) = UnixStream::connect(&upstream) else { continue };
            let ends = [(&client, &server, Way::ToServer), (&server, &client, Way::ToClient)];
            for (from, to, way) in ends {
                let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                let spoil = spoil();
                thread::spawn(move || pass(from, to, way, spoil));
            }
        }
    });
    path
}

fn pass(mut from: UnixStream, mut to: UnixStream, way: Way, mut spoil: impl Spoil) {
    let mut passed = 0;
    let mut buffer = vec![0; 8192];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        let mut bytes = buffer[..len].to_vec();
        let go_on = spoil(way, passed, &mut bytes);
        passed += len as u64;
        if to.write_all(&bytes).is_err() || !go_on {
            break;
        }
    }
    for end in [from, to] {
        let _gone_already = end.shutdown(Shutdown::Both);
    }
}

pub(crate) fn through(path: &Path, export: &str) -> Client {
    Client::new(Address::Unix(path.to_owned()), export)
}
