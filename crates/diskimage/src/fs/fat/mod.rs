//! FAT12, FAT16 and FAT32 with long names, after Microsoft's "FAT: General Overview of On-Disk Format", version 1.03.
//! It has no journal; one that was not unmounted is read as it lies, and that is noted.

mod directory;

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{Code, Error, Kind, Metadata, Piece, Result};

use super::bytes::Bytes as _;
use super::pages::Pages;
use super::{About, Content, FileExtent, FileSystem, FsKind, Node, Page, Visitor, check_name};
use directory::Entry;

/// A directory holds at most 65,536 entries.
const DIRECTORY_MAX: u64 = 65_536 * 32;

pub(crate) struct Fat {
    volume: Arc<Volume>,
    about: About,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Width {
    Twelve,
    Sixteen,
    ThirtyTwo,
}

/// The numbers of the boot sector, checked against each other and the volume. All in bytes.
struct Volume {
    pages: Pages,
    width: Width,
    /// Where the table that counts begins.
    table: u64,
    cluster_size: u64,
    /// Where cluster 2 begins.
    data: u64,
    /// One more than the highest cluster.
    clusters: u32,
    /// The root directory's place where it has a fixed one.
    root: Range<u64>,
    root_cluster: u32,
}

/// Clusters that follow each other on the volume.
#[derive(Clone, Copy)]
struct Stretch {
    /// Clusters of the file before these.
    before: u32,
    first: u32,
    count: u32,
}

impl Fat {
    pub(crate) fn open(pages: Pages) -> Result<Self> {
        let boot = pages.take(0, 512)?;
        let volume = Volume::parse(pages, &boot)?;
        let (label, serial) = if volume.width == Width::ThirtyTwo { (71, 67) } else { (43, 39) };
        let label = boot.part(label, 11)?.trim_ascii_end();
        let serial = boot.le32(serial)?;
        let mut notes = Vec::new();
        if !volume.was_unmounted()? {
            notes.push(
                "the file system was in use, and FAT keeps no journal: files may be incomplete".to_owned(),
            );
        }
        let about = About {
            kind: FsKind::Fat,
            label: if label == b"NO NAME" { Vec::new() } else { label.to_vec() },
            uuid: format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff),
            size: volume.data + u64::from(volume.clusters - 2) * volume.cluster_size,
            block_size: volume.cluster_size,
            notes,
        };
        Ok(Self { volume: Arc::new(volume), about })
    }

    fn entry(&self, node: Node) -> Result<Option<Entry>> {
        if node == self.root() {
            return Ok(None);
        }
        let entry = Entry::parse(&self.volume.pages.take(node.space, 32)?)?;
        if u64::from(entry.cluster) != node.number {
            return Err(Error::new(Code::NotFound, "there is no such file on this FAT file system"));
        }
        Ok(Some(entry))
    }

    fn directory(&self, node: Node) -> Result<u32> {
        match self.entry(node)? {
            None => Ok(self.volume.root_cluster),
            Some(entry) if entry.is_directory() => Ok(entry.cluster),
            Some(_) => Err(Error::new(Code::NotFound, "this is not a directory")),
        }
    }

    fn file(&self, node: Node) -> Result<Entry> {
        let entry = self.entry(node)?.filter(|entry| !entry.is_directory());
        entry.ok_or_else(|| Error::new(Code::Unsupported, "this is a directory and has no content"))
    }
}

impl FileSystem for Fat {
    fn about(&self) -> &About {
        &self.about
    }

    fn root(&self) -> Node {
        Node { space: 0, number: u64::from(self.volume.root_cluster) }
    }

    /// As the owner of the file system would look for it: upper and lower case are one.
    fn child(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
        let cluster = self.directory(directory)?;
        let wanted = String::from_utf8_lossy(name).to_lowercase();
        let mut found = None;
        self.volume.scan(cluster, 0, &mut |_, entry, place| {
            if entry.name == name || String::from_utf8_lossy(&entry.name).to_lowercase() == wanted {
                found = Some(Node { space: place, number: u64::from(entry.cluster) });
            }
            Ok(found.is_none())
        })?;
        Ok(found)
    }

    fn read_dir(&self, directory: Node, from: u64, limit: usize) -> Result<Page> {
        let cluster = self.directory(directory)?;
        let mut page = Page::default();
        page.next = self.volume.scan(cluster, from, &mut |_, entry, place| {
            if page.entries.len() >= limit.max(1) {
                return Ok(false);
            }
            check_name(&entry.name)?;
            page.entries.push(super::DirEntry {
                name: entry.name.clone(),
                node: Node { space: place, number: u64::from(entry.cluster) },
                kind: Some(entry.kind()),
            });
            Ok(true)
        })?;
        Ok(page)
    }

    fn metadata(&self, node: Node) -> Result<Metadata> {
        let Some(entry) = self.entry(node)? else {
            let mut metadata = Metadata::new(Kind::Directory);
            metadata.mode = 0o755;
            return Ok(metadata);
        };
        let mut metadata = Metadata::new(entry.kind());
        let writable = if entry.is_read_only() { 0 } else { 0o200 };
        metadata.mode = writable | if entry.is_directory() { 0o555 } else { 0o444 };
        metadata.size = if entry.is_directory() { 0 } else { u64::from(entry.size) };
        metadata.modified = entry.modified;
        metadata.attributes = vec![("dos.attributes".to_owned(), vec![entry.attributes])];
        Ok(metadata)
    }

    fn content(&self, file: Node) -> Result<Arc<dyn Content>> {
        let entry = self.file(file)?;
        let stretches = self.volume.stretches(&entry)?;
        Ok(Arc::new(Mapped { volume: self.volume.clone(), size: u64::from(entry.size), stretches }))
    }

    fn extents(&self, file: Node) -> Result<Vec<FileExtent>> {
        self.volume.extents(&self.file(file)?)
    }

    fn free(&self, visit: &mut dyn FnMut(Range<u64>) -> Result<()>) -> Result<()> {
        let volume = &self.volume;
        let mut start = None;
        for cluster in 2..volume.clusters {
            match (volume.next(cluster)? == 0, start) {
                (true, None) => start = Some(cluster),
                (false, Some(first)) => {
                    visit(volume.place(first)..volume.place(cluster))?;
                    start = None;
                }
                _ => {}
            }
        }
        match start {
            Some(first) => visit(volume.place(first)..volume.place(volume.clusters)),
            None => Ok(()),
        }
    }

    fn files(&self, visit: &mut Visitor<'_>) -> Result<()> {
        let mut seen = HashSet::from([self.volume.root_cluster]);
        let mut directories = vec![self.volume.root_cluster];
        while let Some(directory) = directories.pop() {
            let mut stopped = None;
            let scanned = self.volume.scan(directory, 0, &mut |_, entry, place| {
                if entry.is_directory() {
                    // A directory that holds itself is seen once.
                    if seen.insert(entry.cluster) {
                        directories.push(entry.cluster);
                    }
                } else if let Ok(extents) = self.volume.extents(entry)
                    && !extents.is_empty()
                {
                    let node = Node { space: place, number: u64::from(entry.cluster) };
                    visit(node, &extents).inspect_err(|error| stopped = Some(error.code()))?;
                }
                Ok(true)
            });
            if stopped.is_some() {
                scanned?;
            }
        }
        Ok(())
    }
}

impl Volume {
    fn parse(pages: Pages, boot: &[u8]) -> Result<Self> {
        let damaged = |why: &str| Error::integrity(format!("the FAT boot sector is damaged: {why}"));
        let sector = u64::from(boot.le16(11)?);
        let per_cluster = u64::from(boot.byte(13)?);
        if !sector.is_power_of_two() || !(512..=4096).contains(&sector) || !per_cluster.is_power_of_two() {
            return Err(damaged("its sizes are impossible"));
        }
        let either = |short: u16, long: u32| if short == 0 { u64::from(long) } else { u64::from(short) };
        let table_sectors = either(boot.le16(22)?, boot.le32(36)?);
        let total = either(boot.le16(19)?, boot.le32(32)?);
        let (reserved, copies) = (u64::from(boot.le16(14)?), u64::from(boot.byte(16)?));
        let root_bytes = u64::from(boot.le16(17)?) * 32;
        let root_start = (reserved + copies * table_sectors) * sector;
        let data = root_start + root_bytes.next_multiple_of(sector);
        let size = total * sector;
        if size > pages.size() {
            let what =
                format!("the FAT file system has {size} bytes, more than its volume of {}", pages.size());
            return Err(Error::integrity(what).hint("the image may have been cut short"));
        }
        let cluster_size = sector * per_cluster;
        let count = size.checked_sub(data).map(|bytes| bytes / cluster_size).filter(|&count| count > 0);
        let count = count.ok_or_else(|| damaged("it has no room for files"))?;
        let width = match count {
            ..4085 => Width::Twelve,
            4085..65_525 => Width::Sixteen,
            _ => Width::ThirtyTwo,
        };
        let clusters = u32::try_from(count + 2).ok().filter(|&clusters| clusters <= 0x0fff_fff7);
        let clusters = clusters.ok_or_else(|| damaged("it has too many clusters"))?;
        let mut table = reserved * sector;
        let mut root_cluster = 0;
        if width == Width::ThirtyTwo {
            root_cluster = boot.le32(44)?;
            let flags = boot.le16(40)?;
            // The tables may differ; then the flags say which one counts.
            if flags & 0x80 != 0 && u64::from(flags & 0xf) < copies {
                table += u64::from(flags & 0xf) * table_sectors * sector;
            }
        }
        let volume = Self {
            pages,
            width,
            table,
            cluster_size,
            data,
            clusters,
            root: root_start..root_start + root_bytes,
            root_cluster,
        };
        if volume.entry_place(clusters) > table + table_sectors * sector || copies == 0 || reserved == 0 {
            return Err(damaged("its table is too short for its clusters"));
        }
        Ok(volume)
    }

    /// Where the table says what follows a cluster; of two, where its first byte is.
    fn entry_place(&self, cluster: u32) -> u64 {
        let cluster = u64::from(cluster);
        self.table
            + match self.width {
                Width::Twelve => cluster + cluster / 2,
                Width::Sixteen => cluster * 2,
                Width::ThirtyTwo => cluster * 4,
            }
    }

    fn raw_entry(&self, cluster: u32) -> Result<u32> {
        let mut bytes = [0; 4];
        let length = if self.width == Width::ThirtyTwo { 4 } else { 2 };
        self.pages.read(self.entry_place(cluster), &mut bytes[..length])?;
        let value = u32::from_le_bytes(bytes);
        Ok(match self.width {
            Width::Twelve if cluster % 2 == 1 => value >> 4,
            Width::Twelve => value & 0xfff,
            Width::Sixteen => value,
            Width::ThirtyTwo => value,
        })
    }

    /// What follows a cluster: 0 if it is free, at least [`Volume::clusters`] at the end of a file.
    fn next(&self, cluster: u32) -> Result<u32> {
        let value = self.raw_entry(cluster)?;
        Ok(if self.width == Width::ThirtyTwo { value & 0x0fff_ffff } else { value })
    }

    /// What the table's second entry says; small ones do not say.
    fn was_unmounted(&self) -> Result<bool> {
        Ok(match self.width {
            Width::Twelve => true,
            Width::Sixteen => self.raw_entry(1)? & 0x8000 != 0,
            Width::ThirtyTwo => self.raw_entry(1)? & 0x0800_0000 != 0,
        })
    }

    fn place(&self, cluster: u32) -> u64 {
        self.data + u64::from(cluster.saturating_sub(2)) * self.cluster_size
    }

    fn is_cluster(&self, cluster: u32) -> bool {
        (2..self.clusters).contains(&cluster)
    }

    /// The clusters of a file, as many as its size needs.
    fn stretches(&self, entry: &Entry) -> Result<Vec<Stretch>> {
        let needed = u64::from(entry.size).div_ceil(self.cluster_size) as u32;
        let mut stretches: Vec<Stretch> = Vec::new();
        let mut cluster = entry.cluster;
        for before in 0..needed {
            if !self.is_cluster(cluster) {
                let what = format!("a file on the FAT file system ends after {before} of {needed} clusters");
                return Err(Error::integrity(what));
            }
            match stretches.last_mut() {
                Some(last) if last.first + last.count == cluster => last.count += 1,
                _ => stretches.push(Stretch { before, first: cluster, count: 1 }),
            }
            cluster = self.next(cluster)?;
        }
        Ok(stretches)
    }

    fn extents(&self, entry: &Entry) -> Result<Vec<FileExtent>> {
        let extent = |stretch: Stretch| {
            let file_offset = u64::from(stretch.before) * self.cluster_size;
            let length = u64::from(stretch.count) * self.cluster_size;
            FileExtent {
                file_offset,
                volume_offset: self.place(stretch.first),
                length: length.min(u64::from(entry.size) - file_offset),
            }
        };
        Ok(self.stretches(entry)?.into_iter().map(extent).collect())
    }
}

/// The content of a file.
struct Mapped {
    volume: Arc<Volume>,
    size: u64,
    stretches: Vec<Stretch>,
}

impl Content for Mapped {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Piece> {
        let left = self.size.saturating_sub(offset);
        if left == 0 || buffer.is_empty() {
            return Ok(Piece::End);
        }
        let size = self.volume.cluster_size;
        let cluster = (offset / size) as u32;
        let next = self.stretches.partition_point(|stretch| stretch.before <= cluster);
        let stretch = next.checked_sub(1).and_then(|index| self.stretches.get(index));
        let Some(stretch) = stretch else { return Err(Error::bug("a file has no cluster for its content")) };
        let within = offset - u64::from(stretch.before) * size;
        let available = (u64::from(stretch.count) * size).saturating_sub(within).min(left);
        let length = available.min(buffer.len() as u64) as usize;
        self.volume.pages.read(self.volume.place(stretch.first) + within, &mut buffer[..length])?;
        Ok(Piece::Data(length))
    }
}
