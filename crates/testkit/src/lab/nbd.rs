//! Plays a guest: writes to an NBD export as a guest writes to its disk. Protocol: the NBD project's `doc/proto.md`,
//! fixed newstyle with NBD_OPT_EXPORT_NAME and simple replies. The product has its own; the two check each other.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use mainstay_core::{Code, Error, Result};

use super::{PATIENCE, io};

/// A connection that may write. One request at a time; panics never, waits for each answer.
#[derive(Debug)]
pub struct NbdGuest {
    stream: UnixStream,
    size: u64,
}

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const WRITE_ZEROES: u16 = 6;

impl NbdGuest {
    pub(super) fn connect(socket: &Path, export: &str) -> Result<Self> {
        let stream =
            UnixStream::connect(socket).map_err(io(format!("cannot connect to {}", socket.display())))?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(io("cannot set a time limit"))?;
        let mut guest = Self { stream, size: 0 };
        let greeting: [u8; 18] = guest.receive()?;
        if &greeting[..16] != b"NBDMAGICIHAVEOPT" {
            return Err(Error::new(Code::Io, "this is no NBD server"));
        }
        // Fixed newstyle, and no 124 zeros after the answer.
        let mut hello = 3u32.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT");
        hello.extend(1u32.to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        guest.send(&hello)?;
        let answer: [u8; 10] =
            guest.receive().map_err(|error| error.during(format!("no export {export}")))?;
        let (size, _flags) = answer.split_at(8);
        guest.size = size.iter().fold(0, |size, byte| size << 8 | u64::from(*byte));
        Ok(guest)
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.request(WRITE, offset, bytes.len(), bytes)
    }

    pub fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>> {
        self.request(READ, offset, length, &[])?;
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).map_err(io("cannot receive from the NBD server"))?;
        Ok(bytes)
    }

    pub fn zero(&mut self, offset: u64, length: usize) -> Result<()> {
        self.request(WRITE_ZEROES, offset, length, &[])
    }

    pub fn trim(&mut self, offset: u64, length: usize) -> Result<()> {
        self.request(TRIM, offset, length, &[])
    }

    pub fn flush(&mut self) -> Result<()> {
        self.request(FLUSH, 0, 0, &[])
    }

    fn request(&mut self, kind: u16, offset: u64, length: usize, bytes: &[u8]) -> Result<()> {
        let mut message = 0x2560_9513_u32.to_be_bytes().to_vec();
        message.extend(0u16.to_be_bytes());
        message.extend(kind.to_be_bytes());
        message.extend([0; 8]);
        message.extend(offset.to_be_bytes());
        message.extend((length as u32).to_be_bytes());
        message.extend(bytes);
        self.send(&message)?;
        let answer: [u8; 16] = self.receive()?;
        match answer.get(..8) {
            Some([0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]) => Ok(()),
            head => Err(Error::new(Code::Io, format!("the NBD server refuses {kind} at {offset}: {head:?}"))),
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).map_err(io("cannot send to the NBD server"))
    }

    fn receive<const LENGTH: usize>(&mut self) -> Result<[u8; LENGTH]> {
        let mut bytes = [0; LENGTH];
        self.stream.read_exact(&mut bytes).map_err(io("cannot receive from the NBD server"))?;
        Ok(bytes)
    }
}
