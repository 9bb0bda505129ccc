//! The stream that `mariadb-backup --stream=mbstream` writes: chunks of files, one after the other or in turns. Each has a
//! magic word, flags, a kind, the length of a path, and the path; a chunk of content goes on with a length, an offset and a
//! checksum. Numbers are little-endian.

use std::io::Read;

use mainstay_core::{Error, ItemPath, Result};

use super::binlog::crc32_more;

const MAGIC: &[u8; 8] = b"XBSTCK01";
/// A reader that does not know a chunk may leave it out.
const IGNORABLE: u8 = 1;
const PATH_BYTES_MAX: usize = 4096;

/// The head of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) path: ItemPath,
    /// `None` for the end of the file.
    pub(super) content: Option<Content>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub(super) length: u64,
    pub(super) offset: u64,
}

/// Reads chunks; of each its head, and then its content.
pub(super) struct Chunks<R> {
    input: R,
    left: u64,
    sum: u32,
    expected: u32,
}

fn malformed(why: &str) -> Error {
    Error::integrity(format!("mariadb-backup's stream is malformed: {why}"))
}

impl<R: Read> Chunks<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, left: 0, sum: 0, expected: 0 }
    }

    /// The next head; `None` at the end of the stream. The content of the one before it must have been read.
    pub(super) fn head(&mut self) -> Result<Option<Chunk>> {
        if self.left > 0 {
            return Err(Error::bug("a chunk was not read to its end"));
        }
        loop {
            let mut magic = [0; MAGIC.len()];
            if !self.begin(&mut magic)? {
                return Ok(None);
            }
            if magic != *MAGIC {
                return Err(malformed("there is no chunk where one should be"));
            }
            let [flags, kind] = self.array()?;
            let length = u32::from_le_bytes(self.array()?) as usize;
            if length == 0 || length > PATH_BYTES_MAX {
                return Err(malformed("a path is too long"));
            }
            let mut path = vec![0; length];
            self.fill(&mut path)?;
            let path =
                ItemPath::new(path).map_err(|error| malformed("a path leads elsewhere").because(error))?;
            match kind {
                b'E' => return Ok(Some(Chunk { path, content: None })),
                b'P' => {
                    let (length, offset) =
                        (u64::from_le_bytes(self.array()?), u64::from_le_bytes(self.array()?));
                    (self.left, self.sum, self.expected) = (length, 0, u32::from_le_bytes(self.array()?));
                    self.check()?;
                    return Ok(Some(Chunk { path, content: Some(Content { length, offset }) }));
                }
                _ if flags & IGNORABLE != 0 => {}
                _ => return Err(malformed("it has a kind of chunk that is not known")),
            }
        }
    }

    /// Content of the chunk; 0 when all of it was read.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if wanted == 0 {
            return Ok(0);
        }
        let buffer = buffer.get_mut(..wanted).unwrap_or_default();
        let read = self.input.read(buffer).map_err(|error| Error::io("cannot read the stream", error))?;
        if read == 0 {
            return Err(malformed("it ends in the middle of a chunk"));
        }
        self.sum = crc32_more(self.sum, buffer.get(..read).unwrap_or_default());
        self.left -= read as u64;
        self.check()?;
        Ok(read)
    }

    pub(super) fn left(&self) -> u64 {
        self.left
    }

    fn check(&self) -> Result<()> {
        if self.left == 0 && self.sum != self.expected {
            Err(malformed("a chunk is damaged"))
        } else {
            Ok(())
        }
    }

    /// Fills the buffer; `false` when the stream ends before its first byte.
    fn begin(&mut self, buffer: &mut [u8]) -> Result<bool> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.input.read(rest) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(malformed("it ends in the middle of a chunk")),
                Ok(read) => filled += read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("cannot read the stream", error)),
            }
        }
        Ok(true)
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<()> {
        match self.begin(buffer)? {
            true => Ok(()),
            false => Err(malformed("it ends in the middle of a chunk")),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::{Chunks, MAGIC};
    use crate::mariadb::binlog::crc32_more;

    /// A chunk as it is written; without content the end of its file.
    pub(crate) fn chunk(path: &str, offset: u64, content: Option<&[u8]>) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&[0, if content.is_some() { b'P' } else { b'E' }]);
        bytes.extend_from_slice(&(path.len() as u32).to_le_bytes());
        bytes.extend_from_slice(path.as_bytes());
        if let Some(content) = content {
            bytes.extend_from_slice(&(content.len() as u64).to_le_bytes());
            bytes.extend_from_slice(&offset.to_le_bytes());
            bytes.extend_from_slice(&crc32_more(0, content).to_le_bytes());
            bytes.extend_from_slice(content);
        }
        bytes
    }

    fn read(bytes: &[u8]) -> mainstay_core::Result<u64> {
        let (mut chunks, mut buffer, mut total) = (Chunks::new(bytes), [0; 7], 0);
        while let Some(_head) = chunks.head()? {
            loop {
                match chunks.read(&mut buffer)? {
                    0 => break,
                    read => total += read as u64,
                }
            }
        }
        Ok(total)
    }

    #[test]
    fn whole_streams_are_read_and_any_other_is_an_error() {
        let stream = [chunk("a/b", 0, Some(b"0123456789")), chunk("a/b", 0, None)].concat();
        assert_eq!(read(&stream).unwrap(), 10);
        for cut in 1..stream.len() {
            let is_whole = cut == stream.len() - chunk("a/b", 0, None).len();
            assert_eq!(read(&stream[..cut]).is_ok(), is_whole, "{cut}");
        }
        for at in 0..stream.len() {
            let mut other = stream.clone();
            other[at] ^= 0x41;
            // Flags, and the place in the file, are not part of any sum.
            let _read = read(&other);
        }
        for path in ["../x", "/etc/passwd", "a//b", ".."] {
            read(&chunk(path, 0, Some(b"x"))).unwrap_err();
        }
        let mut endless = chunk("a", 0, Some(b"x"));
        endless[10..14].copy_from_slice(&u32::MAX.to_le_bytes());
        read(&endless).unwrap_err();
    }
}
