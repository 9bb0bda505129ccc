//! XFS, versions 4 and 5, with its log replayed in memory.

use std::ops::Range;
use std::sync::Arc;

use fs_xfs::extent::Extent;
use fs_xfs::inode::{Format, Inode};
use fs_xfs::inode_btree::{INODES_PER_CHUNK, Which, walk_from_agi};
use mainstay_core::{Code, Error, HardLink, Kind, Metadata, Piece, Result, Time};

use super::bytes::Bytes as _;
use super::foreign::{Device, EXTENTS_MAX, Listings, guarded};
use super::pages::Pages;
use super::{About, Content, DirEntry, FileExtent, FileSystem, FsKind, Node, Page, Visitor};

pub(crate) struct Xfs {
    volume: Arc<Volume>,
    about: About,
    listings: Listings,
}

struct Volume {
    parsed: fs_xfs::Filesystem,
    /// Content is read past the replayed log, which never holds any: a block that was metadata when the log was
    /// written and is content now would come back as the metadata.
    pages: Arc<Pages>,
}

impl Xfs {
    pub(crate) fn open(pages: Pages) -> Result<Self> {
        let pages = Arc::new(pages);
        let device = Arc::new(Device(pages.clone()));
        check_size(&pages)?;
        // Its own cache would only hold again what the pages hold already.
        let mount = || fs_xfs::Filesystem::mount_with_cache(device, 0);
        let parsed = guarded("XFS", mount, |error| translate("cannot open the XFS file system", error))?;
        let superblock = parsed.superblock();
        let block_size = u64::from(superblock.blocksize);
        let replayed = "the log was replayed in memory".to_owned();
        let about = About {
            kind: FsKind::Xfs,
            label: super::bytes::until_nul(superblock.fname.as_bytes()).to_vec(),
            uuid: super::bytes::uuid(superblock.uuid),
            size: superblock.dblocks.saturating_mul(block_size),
            block_size,
            notes: if parsed.was_replayed() { vec![replayed] } else { Vec::new() },
        };
        Ok(Self { volume: Arc::new(Volume { parsed, pages }), about, listings: Listings::default() })
    }

    fn inode(&self, node: Node) -> Result<(Inode, Vec<u8>)> {
        let (inode, raw) = self.volume.inode(node.number)?;
        if inode.nlink == 0 {
            return Err(Error::integrity(format!("inode {} has a name, but is no item", inode.ino)));
        }
        Ok((inode, raw))
    }

    fn directory(&self, node: Node) -> Result<(Inode, Vec<u8>)> {
        let (inode, raw) = self.inode(node)?;
        if !inode.is_dir() {
            return Err(Error::new(Code::NotFound, format!("inode {} is not a directory", inode.ino)));
        }
        Ok((inode, raw))
    }

    fn regular(&self, node: Node) -> Result<(Inode, Vec<u8>)> {
        let (inode, raw) = self.inode(node)?;
        if !inode.is_regular_file() {
            let what = format!("inode {} is not a regular file and has no content", inode.ino);
            return Err(Error::new(Code::Unsupported, what));
        }
        Ok((inode, raw))
    }
}

/// Refuses a file system that is longer than its volume, before anything beyond the end is missed.
fn check_size(pages: &Pages) -> Result<()> {
    let head = pages.take(0, 16)?;
    let (block_size, high, low) = (head.be32(4)?, head.be32(8)?, head.be32(12)?);
    let blocks = u64::from(high) << 32 | u64::from(low);
    if blocks.checked_mul(u64::from(block_size)).is_some_and(|spanned| spanned <= pages.size()) {
        return Ok(());
    }
    let what = format!(
        "the XFS file system has {blocks} blocks of {block_size} bytes, more than its volume of {} bytes",
        pages.size()
    );
    Err(Error::integrity(what).hint("the image may have been cut short"))
}

fn node(number: u64) -> Node {
    Node { space: 0, number }
}

fn translate(what: &str, error: fs_xfs::Error) -> Error {
    use fs_xfs::Error as Theirs;
    let code = match &error {
        Theirs::Io(_) => Code::Io,
        Theirs::UnsupportedFeature(_) | Theirs::RealtimeDeviceAbsent { .. } | Theirs::DirtyLog => {
            Code::Unsupported
        }
        Theirs::NotFound | Theirs::NotADirectory => Code::NotFound,
        _ => Code::Integrity,
    };
    Error::new(code, what).because(error)
}

fn kind(inode: &Inode) -> Result<Kind> {
    use fs_xfs::inode::FileType;
    let kind = inode.file_type().map(|kind| match kind {
        FileType::Regular => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        FileType::CharDevice => Kind::CharDevice,
        FileType::BlockDevice => Kind::BlockDevice,
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
    });
    kind.ok_or_else(|| Error::integrity(format!("inode {} is of no known kind", inode.ino)))
}

impl FileSystem for Xfs {
    fn about(&self) -> &About {
        &self.about
    }

    fn root(&self) -> Node {
        node(self.volume.parsed.superblock().rootino)
    }

    fn child(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
        let (inode, raw) = self.directory(directory)?;
        let find = || match self.volume.parsed.lookup(&inode, &raw, name) {
            Err(fs_xfs::Error::NotFound) => Ok(None),
            found => found.map(|inode| Some(node(inode.ino))),
        };
        guarded("XFS", find, |error| translate("cannot read a directory of the XFS file system", error))
    }

    fn read_dir(&self, directory: Node, from: u64, limit: usize) -> Result<Page> {
        self.listings.page(directory, from, limit, || {
            let (inode, raw) = self.directory(directory)?;
            // A larger one could only hold its blocks twice.
            if inode.size > self.about.size {
                let what = format!("the directory in inode {} is larger than its volume", inode.ino);
                return Err(Error::integrity(what));
            }
            let failed = |error| translate("cannot read a directory of the XFS file system", error);
            let entries = guarded("XFS", || self.volume.parsed.read_dir(&inode, &raw), failed)?;
            let entry = |entry: fs_xfs::dir::DirEntry| DirEntry {
                name: entry.name,
                node: node(entry.ino),
                kind: None,
            };
            Ok(entries.into_iter().map(entry).collect())
        })
    }

    fn metadata(&self, node: Node) -> Result<Metadata> {
        let (inode, raw) = self.inode(node)?;
        let kind = kind(&inode)?;
        let mut metadata = Metadata::new(kind);
        metadata.mode = u32::from(inode.mode) & 0o7777;
        (metadata.uid, metadata.gid) = (inode.uid, inode.gid);
        metadata.modified = Time::from_parts(inode.mtime.sec, i64::from(inode.mtime.nsec));
        if inode.nlink > 1 && kind != Kind::Directory {
            metadata.hard_link = Some(HardLink { device: 0, inode: inode.ino });
        }
        match kind {
            Kind::File => metadata.size = inode.size,
            Kind::Symlink => metadata.link_target = Some(self.volume.link_target(&inode, &raw)?),
            Kind::CharDevice | Kind::BlockDevice => metadata.device = Some(self.volume.device(&inode, &raw)?),
            _ => {}
        }
        metadata.xattrs = self.volume.xattrs(&inode, &raw)?;
        Ok(metadata)
    }

    fn content(&self, file: Node) -> Result<Arc<dyn Content>> {
        let (inode, raw) = self.regular(file)?;
        let extents = self.volume.extents(&inode, &raw)?;
        Ok(Arc::new(Mapped { volume: self.volume.clone(), size: inode.size, extents }))
    }

    fn extents(&self, file: Node) -> Result<Vec<FileExtent>> {
        let (inode, raw) = self.regular(file)?;
        let extents = self.volume.extents(&inode, &raw)?;
        Ok(self.volume.file_extents(&inode, &extents).collect())
    }

    fn free(&self, visit: &mut dyn FnMut(Range<u64>) -> Result<()>) -> Result<()> {
        let superblock = self.volume.parsed.superblock();
        for group in 0..superblock.agcount {
            let failed = |error| translate("cannot read what is free on the XFS file system", error);
            let extents = guarded("XFS", || self.volume.parsed.free_extents(group), failed)?;
            let base = u64::from(group) * u64::from(superblock.agblocks);
            let mut end = base;
            for extent in extents {
                let blocks = base + u64::from(extent.startblock)..base.saturating_add(extent.end());
                if blocks.start < end || blocks.end > superblock.dblocks || blocks.is_empty() {
                    return Err(Error::integrity("the free space of the XFS file system contradicts itself"));
                }
                end = blocks.end;
                visit(blocks.start * self.about.block_size..blocks.end * self.about.block_size)?;
            }
        }
        Ok(())
    }

    fn files(&self, visit: &mut Visitor<'_>) -> Result<()> {
        for group in 0..self.volume.parsed.superblock().agcount {
            // A group that cannot be understood leaves the others alone.
            for number in self.volume.inodes_of_group(group).unwrap_or_default() {
                let Some(extents) = self.volume.file_of(number) else { continue };
                for batch in extents.chunks(1024) {
                    visit(node(number), batch)?;
                }
            }
        }
        Ok(())
    }
}

impl Volume {
    fn inode(&self, number: u64) -> Result<(Inode, Vec<u8>)> {
        let failed = |error| translate(&format!("cannot read inode {number} of the XFS file system"), error);
        guarded("XFS", || self.parsed.read_inode_raw(number), failed)
    }

    /// The bytes of the inode that hold its content or its map.
    fn fork<'a>(&self, inode: &Inode, raw: &'a [u8]) -> Result<&'a [u8]> {
        let (start, end) = inode.data_fork_range(raw.len());
        raw.get(start..end).ok_or_else(|| Error::integrity(format!("inode {} is damaged", inode.ino)))
    }

    /// All extents of a regular file, ascending and apart.
    fn extents(&self, inode: &Inode, raw: &[u8]) -> Result<Vec<Extent>> {
        if inode.nextents > EXTENTS_MAX {
            let what = format!("inode {} lies in too many pieces ({})", inode.ino, inode.nextents);
            return Err(Error::new(Code::Unsupported, what));
        }
        let failed = |error| translate(&format!("cannot find the content of inode {}", inode.ino), error);
        let extents = guarded("XFS", || self.parsed.data_extents(inode, raw), failed)?;
        let apart = |pair: &[Extent]| {
            pair[0].startoff.checked_add(pair[0].blockcount).is_some_and(|end| end <= pair[1].startoff)
        };
        if !extents.windows(2).all(apart) {
            return Err(Error::integrity(format!("the extents of inode {} are not in order", inode.ino)));
        }
        Ok(extents)
    }

    /// Those that hold content, in bytes and clipped to the size.
    fn file_extents(&self, inode: &Inode, extents: &[Extent]) -> impl Iterator<Item = FileExtent> {
        let superblock = self.parsed.superblock();
        let block = u64::from(superblock.blocksize);
        let size = inode.size;
        extents.iter().filter(|extent| !extent.is_unwritten()).filter_map(move |extent| {
            let file_offset = extent.startoff.checked_mul(block).filter(|&offset| offset < size)?;
            let length = extent.blockcount.checked_mul(block)?.min(size - file_offset);
            let volume_offset = superblock.fsblock_offset(extent.startblock);
            Some(FileExtent { file_offset, volume_offset, length })
        })
    }

    fn link_target(&self, inode: &Inode, raw: &[u8]) -> Result<Vec<u8>> {
        let failed = |error| translate(&format!("cannot read the link in inode {}", inode.ino), error);
        let target = guarded("XFS", || self.parsed.read_link(inode, raw), failed)?;
        if target.is_empty() || target.len() as u64 != inode.size || target.contains(&0) {
            return Err(Error::integrity(format!("the link in inode {} is damaged", inode.ino)));
        }
        Ok(target)
    }

    /// Major and minor number, as System V put them together.
    fn device(&self, inode: &Inode, raw: &[u8]) -> Result<(u32, u32)> {
        if inode.format != Format::Dev {
            return Err(Error::integrity(format!("inode {} is a device without a number", inode.ino)));
        }
        let number = self.fork(inode, raw)?.be32(0)?;
        Ok((number >> 18, number & 0x3_ffff))
    }

    /// As system calls name them: access control lists in their portable form, not in the one XFS stores.
    fn xattrs(&self, inode: &Inode, raw: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let failed = |error| translate(&format!("cannot read the attributes of inode {}", inode.ino), error);
        let listed = guarded("XFS", || self.parsed.list_xattrs(inode, raw), failed)?;
        let mut xattrs: Vec<_> = listed
            .into_iter()
            .filter(|xattr| !xattr.name.starts_with(b"trusted.SGI_ACL_"))
            .map(|xattr| (xattr.name, xattr.value))
            .collect();
        xattrs.sort();
        Ok(xattrs)
    }

    /// The inodes in use of an allocation group, ascending.
    fn inodes_of_group(&self, group: u32) -> Result<Vec<u64>> {
        let superblock = self.parsed.superblock();
        let block = superblock.blocksize;
        let start = u64::from(group) * u64::from(superblock.agblocks) * u64::from(block);
        let read = |number: u32| {
            let mut bytes = vec![0; block as usize];
            self.parsed.device().read_at(start + u64::from(number) * u64::from(block), &mut bytes)?;
            Ok(bytes)
        };
        let walk = || {
            let header = self.parsed.read_agi(group)?;
            walk_from_agi(superblock, &header, Which::All, read)
        };
        let failed = |error| translate("cannot read the inodes of the XFS file system", error);
        let chunks = guarded("XFS", walk, failed)?.unwrap_or_default();
        let mut inodes = Vec::new();
        for chunk in chunks {
            let used = (0..INODES_PER_CHUNK).filter(|&index| chunk.exists(index) && !chunk.is_free(index));
            let number = |index| chunk.startino.checked_add(u32::from(index));
            inodes.extend(used.filter_map(number).map(|number| superblock.join_ino(group, number)));
        }
        Ok(inodes)
    }

    /// The extents of a regular file that has a name; `None` for everything else.
    fn file_of(&self, number: u64) -> Option<Vec<FileExtent>> {
        let superblock = self.parsed.superblock();
        let own = [
            superblock.rbmino,
            superblock.rsumino,
            superblock.uquotino,
            superblock.gquotino,
            superblock.pquotino,
        ];
        let (inode, raw) = self.inode(number).ok()?;
        if own.contains(&number) || inode.nlink == 0 || !inode.is_regular_file() {
            return None;
        }
        let extents = self.extents(&inode, &raw).ok()?;
        Some(self.file_extents(&inode, &extents).collect())
    }
}

/// The content of a file.
struct Mapped {
    volume: Arc<Volume>,
    size: u64,
    extents: Vec<Extent>,
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
        let superblock = self.volume.parsed.superblock();
        let size = u64::from(superblock.blocksize);
        let (block, within) = (offset / size, offset % size);
        let next = self.extents.partition_point(|extent| extent.startoff + extent.blockcount <= block);
        let extent = self.extents.get(next);
        let (blocks, start) = match extent {
            Some(extent) if extent.startoff <= block => {
                let start = (!extent.is_unwritten()).then(|| extent.startblock + (block - extent.startoff));
                (extent.startoff + extent.blockcount - block, start)
            }
            Some(extent) => (extent.startoff - block, None),
            None => (u64::MAX, None),
        };
        let available = blocks.saturating_mul(size).saturating_sub(within).min(left);
        let Some(start) = start else { return Ok(Piece::Hole(available)) };
        let length = available.min(buffer.len() as u64) as usize;
        let place = superblock.fsblock_offset(start) + within;
        self.volume.pages.read(place, &mut buffer[..length])?;
        Ok(Piece::Data(length))
    }
}
