//! The sorted names of one directory, in two allocations however many they are.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

use rustix::fs::RawDir;
use rustix::io::Errno;

const LISTING_BUFFER: usize = 64 << 10;

#[derive(Clone, Copy)]
struct Name {
    start: u32,
    /// Bytes without the NUL.
    len: u16,
}

/// Names in byte order, each once. Taken from the front with [`NameList::take`].
#[derive(Default)]
pub(super) struct NameList {
    bytes: Vec<u8>,
    names: Vec<Name>,
    taken: usize,
}

/// Where a listing is read into; kept from one directory to the next.
pub(super) struct ListingBuffer(Box<[MaybeUninit<u8>]>);

impl Default for ListingBuffer {
    fn default() -> Self {
        Self(Box::new_uninit_slice(LISTING_BUFFER))
    }
}

impl NameList {
    /// Reads a directory to its end, or as far as the kernel lets us: the names so far are kept with the error.
    pub(super) fn read(&mut self, fd: impl AsFd, buffer: &mut ListingBuffer) -> Result<(), Errno> {
        let mut entries = RawDir::new(fd, &mut buffer.0);
        while let Some(entry) = entries.next() {
            match entry {
                Ok(entry) => match entry.file_name().to_bytes() {
                    b"." | b".." => {}
                    name => self.push(name)?,
                },
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    pub(super) fn push(&mut self, name: &[u8]) -> Result<(), Errno> {
        let start = u32::try_from(self.bytes.len()).or(Err(Errno::OVERFLOW))?;
        let len = u16::try_from(name.len()).or(Err(Errno::NAMETOOLONG))?;
        self.bytes.extend_from_slice(name);
        self.bytes.push(0);
        self.names.push(Name { start, len });
        Ok(())
    }

    /// To be called once, after the last `push`.
    pub(super) fn sort(&mut self) {
        let Self { bytes, names, .. } = self;
        names.sort_unstable_by(|left, right| text(bytes, *left).cmp(text(bytes, *right)));
        names.dedup_by(|left, right| text(bytes, *left) == text(bytes, *right));
    }

    /// Whether a sorted list holds `name`.
    pub(super) fn contains(&self, name: &[u8]) -> bool {
        self.names.binary_search_by(|probe| text(&self.bytes, *probe).cmp(name)).is_ok()
    }

    pub(super) fn retain(&mut self, keep: impl Fn(&[u8]) -> bool) {
        let Self { bytes, names, .. } = self;
        names.retain(|name| keep(text(bytes, *name)));
    }

    /// The next name.
    pub(super) fn take(&mut self) -> Option<&CStr> {
        let name = *self.names.get(self.taken)?;
        self.taken += 1;
        let start = name.start as usize;
        let bytes = self.bytes.get(start..=start + usize::from(name.len))?;
        CStr::from_bytes_with_nul(bytes).ok()
    }
}

fn text(bytes: &[u8], name: Name) -> &[u8] {
    let start = name.start as usize;
    bytes.get(start..start + usize::from(name.len)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::NameList;

    #[test]
    fn names_come_in_byte_order_and_once() {
        let mut list = NameList::default();
        for name in [b"b".as_slice(), b"a", b"ab", b"\xff", b"a", b"A"] {
            list.push(name).unwrap();
        }
        list.sort();
        assert!(list.contains(b"ab") && !list.contains(b"c"));
        let mut names = Vec::new();
        while let Some(name) = list.take() {
            names.push(name.to_bytes().to_vec());
        }
        assert_eq!(names, [b"A".as_slice(), b"a", b"ab", b"b", b"\xff"]);
    }
}
