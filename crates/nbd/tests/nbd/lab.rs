//! A disk in memory, and the programs of others.

use std::ffi::OsStr;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use mainstay_core::{Blocks, ChangeState, Extent, ExtentKind, Result};
use mainstay_nbd::{Address, Client, Export, Server, ServerOptions, WritableBlocks};
use mainstay_testkit::Rng;

pub(crate) const PAGE: usize = 4096;
/// Long enough for a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(60);

/// Pages of zeros are holes.
pub(crate) struct Disk(RwLock<Vec<u8>>);

impl Disk {
    pub(crate) fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self(RwLock::new(bytes)))
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.read().unwrap().clone()
    }
}

impl Blocks for Disk {
    fn size(&self) -> u64 {
        self.0.read().unwrap().len() as u64
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        let bytes = self.0.read().unwrap();
        let mut extents: Vec<Extent> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let end = (at + 1).next_multiple_of(PAGE as u64).min(range.end);
            let zero = bytes[index(at)..index(end)].iter().all(|byte| *byte == 0);
            let kind = if zero { ExtentKind::Hole } else { ExtentKind::Data };
            match extents.last_mut() {
                Some(last) if last.kind == kind => last.range.end = end,
                _ => extents.push(Extent { range: at..end, kind, change: ChangeState::Unknown }),
            }
            at = end;
        }
        Ok(extents)
    }

    /// Every other page, so that all that is done to a server is done to both ways through it.
    fn is_at_hand(&self, range: Range<u64>) -> bool {
        (range.start / PAGE as u64).is_multiple_of(2)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let start = index(offset);
        buffer.copy_from_slice(&self.0.read().unwrap()[start..start + buffer.len()]);
        Ok(())
    }
}

impl WritableBlocks for Disk {
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        let start = index(offset);
        self.0.write().unwrap()[start..start + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zero(&self, range: Range<u64>) -> Result<()> {
        self.0.write().unwrap()[index(range.start)..index(range.end)].fill(0);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

pub(crate) fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

/// Stretches of random bytes and of zeros.
pub(crate) fn sparse(rng: &mut Rng, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let stretch = (rng.below(100) + 1) * PAGE / if rng.chance(20) { 3 } else { 1 };
        let stretch = stretch.min(len - bytes.len());
        if rng.chance(50) {
            bytes.extend(rng.bytes(stretch));
        } else {
            bytes.resize(bytes.len() + stretch, 0);
        }
    }
    bytes
}

/// A random range of a device, sometimes empty.
pub(crate) fn some_range(rng: &mut Rng, size: u64, len_max: u64) -> Range<u64> {
    let start = rng.range(0..size);
    start..start + rng.range(0..len_max.min(size - start) + 1)
}

/// Our server on a socket in `directory`.
pub(crate) fn serve(directory: &Path, exports: Vec<Export>, options: ServerOptions) -> Server {
    Server::start(&Address::Unix(directory.join("ours.sock")), exports, options).unwrap()
}

pub(crate) fn client(server: &Server, export: &str) -> Client {
    Client::new(server.address().clone(), export).limit(LONG)
}

/// As QEMU and libnbd write the address of an export on a socket.
pub(crate) fn uri(server: &Server, export: &str) -> String {
    match server.address() {
        Address::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
        Address::Tcp { host, port } => format!("nbd://{host}:{port}/{export}"),
    }
}

/// Runs a program of others to its end and returns what it printed.
pub(crate) fn run<T: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = T>) -> String {
    let output = command(name, arguments).output().unwrap_or_else(|error| missing(name, &error));
    let (told, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{name}: {told}{errors}");
    told.into_owned()
}

pub(crate) fn command<T: AsRef<OsStr>>(name: &str, arguments: impl IntoIterator<Item = T>) -> Command {
    #[expect(clippy::disallowed_methods, reason = "the peers of the tests are programs")]
    let mut command = Command::new(name);
    command.args(arguments).stdin(Stdio::null());
    command
}

pub(crate) fn missing(name: &str, error: &std::io::Error) -> ! {
    panic!("{name} cannot be started ({error}); `cargo xtask setup` installs it")
}

/// A process that is killed in the end, whatever happens.
pub(crate) struct Mortal(pub(crate) Child);

impl Mortal {
    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        let _ended_already = self.0.kill();
        let _ended_already = self.0.wait();
    }
}

impl Drop for Mortal {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A program that listens on a socket.
pub(crate) struct Daemon {
    pub(crate) process: Mortal,
    pub(crate) socket: PathBuf,
}

impl Daemon {
    /// Starts `name` and waits until it listens on `socket`.
    pub(crate) fn start<T: AsRef<OsStr>>(
        name: &str,
        arguments: impl IntoIterator<Item = T>,
        socket: PathBuf,
    ) -> Self {
        let child = command(name, arguments).spawn().unwrap_or_else(|error| missing(name, &error));
        let mut daemon = Self { process: Mortal(child), socket };
        for _ in 0..6000 {
            if is_listened_on(&daemon.socket) {
                return daemon;
            }
            assert!(daemon.process.0.try_wait().unwrap().is_none(), "{name} ended at once");
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{name} does not listen");
    }

    /// `qemu-nbd` with these arguments, which end with the name of the image.
    pub(crate) fn qemu_nbd(directory: &Path, arguments: &[&str]) -> Self {
        let socket = directory.join("qemu.sock");
        let name = socket.to_str().unwrap().to_owned();
        let fixed = ["--persistent", "--socket", name.as_str()];
        Self::start("qemu-nbd", fixed.iter().chain(arguments), socket)
    }

    pub(crate) fn client(&self, export: &str) -> Client {
        Client::new(Address::Unix(self.socket.clone()), export).limit(LONG)
    }
}

/// As the kernel tells it. Trying would use up the only connection that some servers allow.
fn is_listened_on(socket: &Path) -> bool {
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    let path = socket.to_str().unwrap();
    sockets.lines().any(|line| line.ends_with(path) && line.contains(" 00010000 "))
}
