//! What parent and parser say to each other: frames of a length, a kind and fields, little-endian.

use std::io::{BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;

use mainstay_core::{Code, Error, HardLink, Kind, Metadata, Result, Time};

use crate::fs::{About, DirEntry, FileExtent, FsKind, Listing, Node, Other, Page};

/// Bytes of a frame. Neither side sends more, and neither takes more.
pub(super) const FRAME_MAX: usize = 4 << 20;

/// Bytes of content in one frame.
pub(super) const PIECE_MAX: usize = 1 << 20;

/// A frame that holds many things is sent when it has so many bytes: each costs both sides a change of processes.
pub(super) const BATCH_BYTES: usize = 64 << 10;

/// Metadata comes along with a directory while the frame is no longer than this, in bytes.
pub(super) const LISTING_BYTES: usize = 1 << 20;

/// What the parent asks for.
pub(super) mod request {
    pub(in super::super) const OPEN: u8 = 1;
    pub(in super::super) const CHILD: u8 = 2;
    pub(in super::super) const READ_DIR: u8 = 3;
    pub(in super::super) const METADATA: u8 = 4;
    pub(in super::super) const CONTENT: u8 = 5;
    pub(in super::super) const READ: u8 = 6;
    pub(in super::super) const CLOSE: u8 = 7;
    pub(in super::super) const EXTENTS: u8 = 8;
    pub(in super::super) const FREE: u8 = 9;
    pub(in super::super) const FILES: u8 = 10;
    pub(in super::super) const LIST: u8 = 11;
}

/// What the parser says: an answer ends a request; before it, it may ask for bytes and show what it found, and waits
/// for a reply to each.
pub(super) mod reply {
    pub(in super::super) const DONE: u8 = 1;
    pub(in super::super) const FAILED: u8 = 2;
    pub(in super::super) const WANTS: u8 = 3;
    pub(in super::super) const FOUND: u8 = 4;
}

/// Sends and receives frames.
pub(super) struct Link(BufReader<UnixStream>);

impl Link {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self(BufReader::new(stream))
    }

    pub(super) fn send(&mut self, kind: u8, body: &[u8]) -> Result<()> {
        let length = body.len() + 1;
        if length > FRAME_MAX {
            return Err(Error::new(Code::Unsupported, "an answer about a file system is too large"));
        }
        let mut frame = (length as u32).to_le_bytes().to_vec();
        frame.push(kind);
        frame.extend_from_slice(body);
        self.0.get_mut().write_all(&frame).map_err(lost)
    }

    pub(super) fn receive(&mut self) -> Result<(u8, Vec<u8>)> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).map_err(lost)?;
        let length = u32::from_le_bytes(length) as usize;
        if length == 0 || length > FRAME_MAX {
            return Err(nonsense());
        }
        let mut kind = [0];
        self.0.read_exact(&mut kind).map_err(lost)?;
        let mut body = vec![0; length - 1];
        self.0.read_exact(&mut body).map_err(lost)?;
        Ok((kind[0], body))
    }
}

fn lost(error: std::io::Error) -> Error {
    let what = match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
            "the sandboxed parser of a file system fell silent"
        }
        _ => "the sandboxed parser of a file system ended",
    };
    Error::integrity(what).because(error).hint("the image may be damaged, or made to break its reader")
}

pub(super) fn nonsense() -> Error {
    Error::integrity("the sandboxed parser of a file system said something that makes no sense")
}

/// Fields on their way into a frame.
#[derive(Default)]
pub(super) struct Fields(pub(super) Vec<u8>);

impl Fields {
    pub(super) fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(super) fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    pub(super) fn bytes(self, bytes: &[u8]) -> Self {
        let mut fields = self.u32(bytes.len() as u32);
        fields.0.extend_from_slice(bytes);
        fields
    }

    fn append(mut self, other: &Self) -> Self {
        self.0.extend_from_slice(&other.0);
        self
    }

    pub(super) fn node(self, node: Node) -> Self {
        self.u64(node.space).u64(node.number)
    }

    pub(super) fn extents(self, extents: &[FileExtent]) -> Self {
        let fields = self.u32(extents.len() as u32);
        extents.iter().fold(fields, |fields, extent| {
            fields.u64(extent.file_offset).u64(extent.volume_offset).u64(extent.length)
        })
    }

    pub(super) fn error(self, error: &Error) -> Self {
        let code = Code::ALL.iter().position(|code| *code == error.code()).unwrap_or_default();
        let clauses = error.chain().join(": ");
        self.u8(code as u8).bytes(clauses.as_bytes()).bytes(error.next_step().unwrap_or_default().as_bytes())
    }

    pub(super) fn about(self, about: &About) -> Self {
        let kind = FsKind::ALL.iter().position(|kind| *kind == about.kind).unwrap_or_default();
        let fields = self.u8(kind as u8).bytes(&about.label).bytes(about.uuid.as_bytes());
        let fields = fields.u64(about.size).u64(about.block_size).u32(about.notes.len() as u32);
        about.notes.iter().fold(fields, |fields, note| fields.bytes(note.as_bytes()))
    }

    pub(super) fn other(self, other: Other) -> Self {
        let number = Other::ALL.iter().position(|known| *known == other).unwrap_or_default();
        self.u8(number as u8)
    }

    pub(super) fn page(self, page: &Page) -> Self {
        let fields = self.u8(u8::from(page.next.is_some())).u64(page.next.unwrap_or_default());
        let fields = fields.u32(page.entries.len() as u32);
        page.entries.iter().fold(fields, |fields, entry| {
            let kind = entry.kind.map_or(0, |kind| kind as u8);
            fields.bytes(&entry.name).node(entry.node).u8(kind)
        })
    }

    /// Metadata of each entry after the page, as long as there is room.
    pub(super) fn listing(self, page: &Page, metadata: &dyn Fn(Node) -> Option<Metadata>) -> Self {
        page.entries.iter().fold(self.page(page), |fields, entry| {
            let room = LISTING_BYTES.saturating_sub(fields.0.len());
            let known = if room > 0 { metadata(entry.node) } else { None };
            match known.map(|known| Self::default().metadata(&known)).filter(|known| known.0.len() <= room) {
                Some(known) => fields.u8(1).append(&known),
                None => fields.u8(0),
            }
        })
    }

    pub(super) fn metadata(self, metadata: &Metadata) -> Self {
        let fields = self.u8(metadata.kind as u8).u64(metadata.size).u32(metadata.mode);
        let fields = fields.u32(metadata.uid).u32(metadata.gid).u64(metadata.modified.0.cast_unsigned());
        let link = metadata.hard_link.unwrap_or(HardLink { device: 0, inode: 0 });
        let fields = fields.u8(u8::from(metadata.hard_link.is_some())).u64(link.device).u64(link.inode);
        let fields = fields.u8(u8::from(metadata.link_target.is_some()));
        let fields = fields.bytes(metadata.link_target.as_deref().unwrap_or_default());
        let (major, minor) = metadata.device.unwrap_or_default();
        let fields = fields.u8(u8::from(metadata.device.is_some())).u32(major).u32(minor);
        let fields = fields.u32(metadata.xattrs.len() as u32);
        let fields =
            metadata.xattrs.iter().fold(fields, |fields, (name, value)| fields.bytes(name).bytes(value));
        let fields = fields.u32(metadata.attributes.len() as u32);
        metadata
            .attributes
            .iter()
            .fold(fields, |fields, (name, value)| fields.bytes(name.as_bytes()).bytes(value))
    }
}

/// Fields of a frame from the other side; what does not fit is an error.
pub(super) struct Parsed<'a>(pub(super) &'a [u8]);

impl Parsed<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk().ok_or_else(nonsense)?;
        self.0 = rest;
        Ok(*head)
    }

    pub(super) fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.take()?))
    }

    pub(super) fn flag(&mut self) -> Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(nonsense()),
        }
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    pub(super) fn bytes(&mut self) -> Result<Vec<u8>> {
        let length = self.u32()? as usize;
        let (head, rest) = self.0.split_at_checked(length).ok_or_else(nonsense)?;
        self.0 = rest;
        Ok(head.to_vec())
    }

    pub(super) fn text(&mut self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.bytes()?).into_owned())
    }

    /// A count of things that have at least one byte each.
    fn count(&mut self) -> Result<usize> {
        let count = self.u32()? as usize;
        if count > self.0.len() { Err(nonsense()) } else { Ok(count) }
    }

    pub(super) fn node(&mut self) -> Result<Node> {
        Ok(Node { space: self.u64()?, number: self.u64()? })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn extents(&mut self) -> Result<Vec<FileExtent>> {
        let count = self.count()?;
        let mut extents = Vec::with_capacity(count.min(self.0.len() / 24));
        for _ in 0..count {
            let (file_offset, volume_offset, length) = (self.u64()?, self.u64()?, self.u64()?);
            extents.push(FileExtent { file_offset, volume_offset, length });
        }
        Ok(extents)
    }

    pub(super) fn error(&mut self) -> Result<Error> {
        let code = *Code::ALL.get(usize::from(self.u8()?)).ok_or_else(nonsense)?;
        let (what, hint) = (self.text()?, self.text()?);
        let error = Error::new(code, what);
        Ok(if hint.is_empty() { error } else { error.hint(hint) })
    }

    pub(super) fn about(&mut self) -> Result<About> {
        let kind = *FsKind::ALL.get(usize::from(self.u8()?)).ok_or_else(nonsense)?;
        let (label, uuid, size, block_size) = (self.bytes()?, self.text()?, self.u64()?, self.u64()?);
        let count = self.count()?;
        let notes = (0..count).map(|_| self.text()).collect::<Result<_>>()?;
        Ok(About { kind, label, uuid, size, block_size, notes })
    }

    pub(super) fn other(&mut self) -> Result<Other> {
        Other::ALL.get(usize::from(self.u8()?)).copied().ok_or_else(nonsense)
    }

    pub(super) fn page(&mut self) -> Result<Page> {
        let next = self.flag()?.then_some(()).is_some();
        let offset = self.u64()?;
        let count = self.count()?;
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            let (name, node, kind) = (self.bytes()?, self.node()?, self.u8()?);
            let kind = if kind == 0 { None } else { Some(Kind::from_number(kind).ok_or_else(nonsense)?) };
            entries.push(DirEntry { name, node, kind });
        }
        Ok(Page { entries, next: next.then_some(offset) })
    }

    pub(super) fn listing(&mut self) -> Result<Listing> {
        let page = self.page()?;
        let metadata = page.entries.iter().map(|_| self.flag()?.then(|| self.metadata()).transpose());
        let metadata = metadata.collect::<Result<_>>()?;
        Ok(Listing { page, metadata })
    }

    pub(super) fn metadata(&mut self) -> Result<Metadata> {
        let mut metadata = Metadata::new(Kind::from_number(self.u8()?).ok_or_else(nonsense)?);
        (metadata.size, metadata.mode) = (self.u64()?, self.u32()?);
        (metadata.uid, metadata.gid) = (self.u32()?, self.u32()?);
        metadata.modified = Time(self.u64()?.cast_signed());
        let is_linked = self.flag()?;
        let link = HardLink { device: self.u64()?, inode: self.u64()? };
        metadata.hard_link = is_linked.then_some(link);
        let is_link = self.flag()?;
        let target = self.bytes()?;
        metadata.link_target = is_link.then_some(target);
        let is_device = self.flag()?;
        let device = (self.u32()?, self.u32()?);
        metadata.device = is_device.then_some(device);
        for _ in 0..self.count()? {
            metadata.xattrs.push((self.bytes()?, self.bytes()?));
        }
        for _ in 0..self.count()? {
            metadata.attributes.push((self.text()?, self.bytes()?));
        }
        if metadata.mode > 0o7777 {
            return Err(nonsense());
        }
        Ok(metadata)
    }
}

#[cfg(test)]
mod tests {
    use mainstay_core::{Kind, Metadata};

    use super::{Fields, LISTING_BYTES, Parsed};
    use crate::fs::{DirEntry, Node, Page};

    #[test]
    fn metadata_that_finds_no_room_in_a_listing_is_left_out_and_what_fits_behind_it_is_not() {
        let node = |number| Node { space: 0, number };
        let entry = |number: u64| DirEntry { name: vec![b'a'], node: node(number), kind: None };
        let page = Page { entries: (0..4).map(entry).collect(), next: None };
        let metadata = |node: Node| {
            let mut metadata = Metadata::new(Kind::File);
            let length = [LISTING_BYTES / 2, LISTING_BYTES / 2, 10, 10][node.number as usize];
            metadata.xattrs = vec![(b"user.x".to_vec(), vec![7; length])];
            (node.number < 3).then_some(metadata)
        };
        let told = Fields::default().listing(&page, &metadata);
        assert!(told.0.len() < LISTING_BYTES + 100);
        let told = Parsed(&told.0).listing().unwrap();
        assert_eq!(told.page, page);
        assert_eq!(told.metadata, [metadata(node(0)), None, metadata(node(2)), None]);
    }
}
