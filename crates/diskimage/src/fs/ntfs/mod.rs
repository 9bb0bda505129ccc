//! NTFS, as Windows documents its attributes ("[MS-FSCC]") and as the Linux-NTFS project described the rest. What is
//! still in its log is replayed in memory; the plan for that, and the decompression of LZNT1, are another crate's.

mod content;
mod index;
mod log;
mod record;

use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{Code, Error, HardLink, Kind, Metadata, Piece, Result, Time};

use super::bytes::{Bytes as _, from_utf16};
use super::foreign::EXTENTS_MAX;
use super::pages::Pages;
use super::{About, Content, FileExtent, FileSystem, FsKind, Node, Page, Visitor};
use content::Stream;
use log::Overlay;
use record::{Body, File, kind_of_attribute};

/// Records of the file system's own files.
mod own {
    pub(super) const MFT: u64 = 0;
    pub(super) const LOG: u64 = 2;
    pub(super) const VOLUME: u64 = 3;
    pub(super) const ROOT: u64 = 5;
    pub(super) const BITMAP: u64 = 6;
    /// The first that belongs to somebody else.
    pub(super) const ORDINARY: u64 = 24;
}

/// Values of streams beside the content that are given as attributes, in bytes.
const STREAM_MAX: u64 = 64 << 10;

pub(crate) struct Ntfs {
    volume: Arc<Volume>,
    about: About,
    root: Node,
}

/// The numbers of the boot sector, and the table of files.
struct Volume {
    pages: Arc<Pages>,
    cluster_size: u64,
    clusters: u64,
    record_size: usize,
    /// The content of the master file table; empty until it is known.
    table: Stream,
    overlay: Overlay,
}

impl Ntfs {
    pub(crate) fn open(pages: Pages) -> Result<Self> {
        let boot = pages.take(0, 512)?;
        let mut volume = Volume::parse(Arc::new(pages), &boot)?;
        let mut notes = Vec::new();
        if let Some(overlay) = log::replay(&volume)? {
            notes.push(format!("the log was replayed in memory: {} places", overlay.len()));
            volume.overlay = overlay;
            volume.table = volume.find_table(boot.le64(0x30)?)?;
        }
        let volume = Arc::new(volume);
        let about_itself = volume.file(own::VOLUME)?;
        let label = about_itself.resident(kind_of_attribute::VOLUME_NAME).unwrap_or_default();
        let information = about_itself.resident(kind_of_attribute::VOLUME_INFORMATION).unwrap_or_default();
        if information.le16(10).is_ok_and(|flags| flags & 1 != 0) {
            notes.push("the file system is marked for a check by its own system".to_owned());
        }
        let about = About {
            kind: FsKind::Ntfs,
            label: utf16(label),
            uuid: format!("{:016X}", boot.le64(0x48)?),
            size: volume.clusters * volume.cluster_size,
            block_size: volume.cluster_size,
            notes,
        };
        let root = volume.file(own::ROOT)?.node();
        Ok(Self { volume, about, root })
    }

    /// A file by its node, which names one use of its record.
    fn file(&self, node: Node) -> Result<File> {
        let file = self.volume.file(node.number)?;
        if u64::from(file.sequence) != node.space || !file.is_in_use() {
            return Err(Error::integrity(format!("file record {} was given to another file", node.number)));
        }
        Ok(file)
    }

    fn regular(&self, node: Node) -> Result<(File, Stream)> {
        let file = self.file(node)?;
        if kind(&file) != Kind::File {
            let what = format!("file record {} is not a regular file and has no content", node.number);
            return Err(Error::new(Code::Unsupported, what));
        }
        file.check_readable()?;
        let stream = Stream::of(&file, kind_of_attribute::DATA, &[])?;
        Ok((file, stream))
    }
}

fn utf16(bytes: &[u8]) -> Vec<u8> {
    let (pairs, _) = bytes.as_chunks::<2>();
    from_utf16(pairs.iter().map(|pair| u16::from_le_bytes(*pair)))
}

fn kind(file: &File) -> Kind {
    if file.link_target().is_some() {
        return Kind::Symlink;
    }
    if file.is_directory() { Kind::Directory } else { Kind::File }
}

impl FileSystem for Ntfs {
    fn about(&self) -> &About {
        &self.about
    }

    fn root(&self) -> Node {
        self.root
    }

    /// As the owner of the file system would look for it: upper and lower case are one, unless there are both.
    fn child(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
        let file = self.file(directory)?;
        let folded = String::from_utf8_lossy(name).to_lowercase();
        let mut found = None;
        let mut alike = None;
        self.volume.scan(&file, 0, &mut |_, entry| {
            if entry.name == name {
                found = Some(entry.node);
            } else if alike.is_none() && String::from_utf8_lossy(&entry.name).to_lowercase() == folded {
                alike = Some(entry.node);
            }
            Ok(found.is_none())
        })?;
        Ok(found.or(alike))
    }

    fn read_dir(&self, directory: Node, from: u64, limit: usize) -> Result<Page> {
        let file = self.file(directory)?;
        let mut page = Page::default();
        page.next = self.volume.scan(&file, from, &mut |_, entry| {
            if page.entries.len() >= limit.max(1) {
                return Ok(false);
            }
            super::check_name(&entry.name)?;
            page.entries.push(entry);
            Ok(true)
        })?;
        Ok(page)
    }

    fn metadata(&self, node: Node) -> Result<Metadata> {
        let file = self.file(node)?;
        let kind = kind(&file);
        let mut metadata = Metadata::new(kind);
        let information = file.resident(kind_of_attribute::STANDARD_INFORMATION).unwrap_or_default();
        metadata.modified = moment(information.le64(8)?);
        let attributes = information.le32(0x20)?;
        let writable = if attributes & 1 != 0 { 0 } else { 0o200 };
        metadata.mode = writable | if kind == Kind::File { 0o444 } else { 0o555 };
        metadata.attributes = vec![("ntfs.attributes".to_owned(), attributes.to_le_bytes().to_vec())];
        if let Some(descriptor) = file.resident(kind_of_attribute::SECURITY_DESCRIPTOR) {
            metadata.attributes.push(("ntfs.security".to_owned(), descriptor.to_vec()));
        }
        if kind != Kind::Directory && file.names() > 1 {
            metadata.hard_link = Some(HardLink { device: 0, inode: node.number });
        }
        match kind {
            Kind::File => metadata.size = Stream::of(&file, kind_of_attribute::DATA, &[])?.size,
            Kind::Symlink => metadata.link_target = file.link_target(),
            _ => {}
        }
        self.volume.streams(&file, &mut metadata)?;
        Ok(metadata)
    }

    fn content(&self, file: Node) -> Result<Arc<dyn Content>> {
        let (_, stream) = self.regular(file)?;
        Ok(Arc::new(content::Opened::new(self.volume.clone(), stream)))
    }

    fn extents(&self, file: Node) -> Result<Vec<FileExtent>> {
        let (_, stream) = self.regular(file)?;
        Ok(self.volume.extents(&stream))
    }

    fn free(&self, visit: &mut dyn FnMut(Range<u64>) -> Result<()>) -> Result<()> {
        let volume = &self.volume;
        let bitmap = Stream::of(&volume.file(own::BITMAP)?, kind_of_attribute::DATA, &[])?;
        let mut start = None;
        let mut part = Vec::new();
        for cluster in 0..volume.clusters {
            let byte = cluster / 8;
            if cluster.is_multiple_of(8) && byte.is_multiple_of(64 << 10) {
                let length = bitmap.size.saturating_sub(byte).min(64 << 10) as usize;
                part = vec![0xff; length];
                volume.read_stream(&bitmap, byte, &mut part)?;
            }
            let bits = part.get((byte % (64 << 10)) as usize).copied().unwrap_or(0xff);
            match (bits >> (cluster % 8) & 1 == 0, start) {
                (true, None) => start = Some(cluster),
                (false, Some(first)) => {
                    visit(first * volume.cluster_size..cluster * volume.cluster_size)?;
                    start = None;
                }
                _ => {}
            }
        }
        match start {
            Some(first) => visit(first * volume.cluster_size..volume.clusters * volume.cluster_size),
            None => Ok(()),
        }
    }

    fn files(&self, visit: &mut Visitor<'_>) -> Result<()> {
        for number in own::ORDINARY..self.volume.table.size / self.volume.record_size as u64 {
            let Ok(file) = self.volume.file(number) else { continue };
            if !file.is_in_use()
                || file.is_part_of_another()
                || file.names() == 0
                || kind(&file) != Kind::File
            {
                continue;
            }
            let Ok(stream) = Stream::of(&file, kind_of_attribute::DATA, &[]) else { continue };
            if file.check_readable().is_ok() {
                for batch in self.volume.extents(&stream).chunks(1024) {
                    visit(file.node(), batch)?;
                }
            }
        }
        Ok(())
    }
}

/// Tenths of microseconds since 1601.
fn moment(ticks: u64) -> Time {
    const SECONDS_TO_1970: i64 = 11_644_473_600;
    let seconds = (ticks / 10_000_000).cast_signed() - SECONDS_TO_1970;
    Time::from_parts(seconds, (ticks % 10_000_000).cast_signed() * 100)
}

impl Volume {
    fn parse(pages: Arc<Pages>, boot: &[u8]) -> Result<Self> {
        let damaged = |why: &str| Error::integrity(format!("the NTFS boot sector is damaged: {why}"));
        let sector = u64::from(boot.le16(0x0b)?);
        // Large numbers stand for powers of two.
        let power = |byte: u8| 1u64.checked_shl(u32::from(byte.wrapping_neg()));
        let per_cluster = match boot.byte(0x0d)? {
            literal @ 1..=0x80 => Some(u64::from(literal)),
            byte => power(byte),
        };
        let cluster_size = per_cluster.and_then(|per_cluster| per_cluster.checked_mul(sector));
        let cluster_size =
            cluster_size.filter(|size| size.is_power_of_two() && (512..=2 << 20).contains(size));
        let cluster_size = cluster_size.ok_or_else(|| damaged("its cluster size is impossible"))?;
        let record_size = match boot.byte(0x40)? {
            literal @ 1..=0x7f => Some(u64::from(literal) * cluster_size),
            byte => power(byte),
        };
        let record_size =
            record_size.filter(|size| size.is_power_of_two() && (512..=64 << 10).contains(size));
        let record_size = record_size.ok_or_else(|| damaged("the size of its file records is impossible"))?;
        let size = boot.le64(0x28)?.checked_mul(sector).filter(|&size| size <= pages.size());
        let Some(size) = size else {
            let what = format!("the NTFS file system is longer than its volume of {} bytes", pages.size());
            return Err(Error::integrity(what).hint("the image may have been cut short"));
        };
        let mut volume = Self {
            pages,
            cluster_size,
            clusters: size / cluster_size,
            record_size: record_size as usize,
            table: Stream::default(),
            overlay: Overlay::default(),
        };
        volume.table = volume.find_table(boot.le64(0x30)?)?;
        Ok(volume)
    }

    /// The content of the master file table, which its own first record tells; parts of a scattered one are told by
    /// records in the parts before.
    fn find_table(&self, cluster: u64) -> Result<Stream> {
        let size = self.record_size as u64;
        let start = cluster.checked_mul(self.cluster_size).filter(|_| cluster < self.clusters);
        let start = start.ok_or_else(|| Error::integrity("the master file table lies beyond its volume"))?;
        let bytes = self.metadata_at(start, self.record_size)?;
        let first = File::parse(self, own::MFT, bytes)?;
        let mut known = Self {
            pages: self.pages.clone(),
            cluster_size: self.cluster_size,
            clusters: self.clusters,
            record_size: self.record_size,
            table: Stream::of(&first, kind_of_attribute::DATA, &[])?,
            overlay: self.overlay.clone(),
        };
        known.table = Stream::of(&known.file(own::MFT)?, kind_of_attribute::DATA, &[])?;
        if known.table.size < own::ORDINARY * size {
            return Err(Error::integrity("the master file table is too short"));
        }
        Ok(known.table)
    }

    /// Bytes of the volume as they are once the log is replayed. Only metadata is ever in the log.
    fn metadata_at(&self, offset: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = self.pages.take(offset, length)?;
        self.overlay.apply(offset, &mut bytes);
        Ok(bytes)
    }

    fn file(&self, number: u64) -> Result<File> {
        let missing = || Error::integrity(format!("there is no file record {number}"));
        let offset = number.checked_mul(self.record_size as u64).ok_or_else(missing)?;
        if offset.checked_add(self.record_size as u64).is_none_or(|end| end > self.table.size) {
            return Err(missing());
        }
        let mut bytes = vec![0; self.record_size];
        self.read_stream(&self.table, offset, &mut bytes)?;
        File::parse(self, number, bytes)
    }

    /// Fills the buffer with metadata from within a stream; zeros where it has holes.
    fn read_stream(&self, stream: &Stream, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let rest = &mut buffer[done..];
            done += match self.read_piece(stream, at, rest, true)? {
                Piece::Data(length) => length,
                Piece::Hole(length) => {
                    let length = usize::try_from(length).unwrap_or(usize::MAX).min(rest.len());
                    rest[..length].fill(0);
                    length
                }
                Piece::End => return Err(Error::integrity("a file of the file system's own is too short")),
            };
        }
        Ok(())
    }

    /// What a file has beside its content, as extended attributes; what is too long for one is named.
    fn streams(&self, file: &File, metadata: &mut Metadata) -> Result<()> {
        let mut left_out = Vec::new();
        for name in file.stream_names() {
            let stream = Stream::of(file, kind_of_attribute::DATA, &name)?;
            let shown = from_utf16(name.iter().copied());
            if stream.size > STREAM_MAX || stream.check_readable().is_err() {
                left_out.extend_from_slice(&shown);
                left_out.push(0);
                continue;
            }
            let mut value = vec![0; stream.size as usize];
            let reader = content::Reader::default();
            reader.read_all(self, &stream, &mut value)?;
            metadata.xattrs.push(([b"user.", shown.as_slice()].concat(), value));
        }
        if !left_out.is_empty() {
            metadata.attributes.push(("ntfs.streams-left-out".to_owned(), left_out));
        }
        metadata.xattrs.sort();
        metadata.attributes.sort();
        Ok(())
    }

    /// Where the content lies as it is. What was never written lies nowhere, whatever the clusters hold.
    fn extents(&self, stream: &Stream) -> Vec<FileExtent> {
        let Body::Clusters(runs) = &stream.body else { return Vec::new() };
        if stream.is_compressed() {
            return Vec::new();
        }
        let end = stream.size.min(stream.written);
        let extent = |run: &record::Run| {
            let file_offset = run.first.checked_mul(self.cluster_size).filter(|&offset| offset < end)?;
            let length = (run.count * self.cluster_size).min(end - file_offset);
            Some(FileExtent { file_offset, volume_offset: run.place? * self.cluster_size, length })
        };
        runs.iter().filter_map(extent).collect()
    }
}
