//! ext2, ext3 and ext4. The layout is the one of the kernel's documentation (Documentation/filesystems/ext4) and of
//! its headers; everything is little-endian but the journal.

mod content;
mod directory;
mod free;
mod inode;
mod journal;
mod map;
mod superblock;
mod xattr;

use std::ops::Range;
use std::sync::Arc;

use mainstay_core::{Code, Error, HardLink, Kind, Metadata, Result};

use super::bytes::{Bytes as _, crc32c};
use super::pages::Pages;
use super::{About, Content, FileExtent, FileSystem, FsKind, Node, Page, Visitor};
use inode::Inode;
use journal::Overlay;
use superblock::{Superblock, incompat};

const ROOT_INODE: u32 = 2;

pub(crate) struct Ext4 {
    volume: Arc<Volume>,
    about: About,
}

impl Ext4 {
    pub(crate) fn open(pages: Pages) -> Result<Self> {
        let read = |pages: &Pages| Superblock::parse(&pages.take(1024, 1024)?, pages.size());
        let superblock = read(&pages)?;
        let mut notes = Vec::new();
        let mut volume = Volume { pages, superblock, overlay: Overlay::default() };
        if volume.superblock.incompat & incompat::RECOVER != 0 {
            volume.overlay = journal::replay(&volume)?;
            let mut block = vec![0; 1024];
            volume.read(1024, &mut block)?;
            volume.superblock = Superblock::parse(&block, volume.pages.size())?;
            notes.push(format!("the journal was replayed in memory: {} blocks", volume.overlay.len()));
        }
        let superblock = &volume.superblock;
        let about = About {
            kind: superblock.kind(),
            label: superblock.label.clone(),
            uuid: super::bytes::uuid(superblock.uuid),
            size: superblock.blocks * superblock.block_size(),
            block_size: superblock.block_size(),
            notes,
        };
        Ok(Self { volume: Arc::new(volume), about })
    }

    fn inode(&self, node: Node) -> Result<Inode> {
        let number = u32::try_from(node.number).map_err(|error| {
            Error::new(Code::NotFound, format!("there is no inode {}", node.number)).because(error)
        })?;
        let inode = self.volume.inode(number)?;
        if inode.links == 0 || inode.is_xattr_value() {
            return Err(Error::integrity(format!("inode {number} has a name, but is no item")));
        }
        Ok(inode)
    }

    fn directory(&self, node: Node) -> Result<Inode> {
        let inode = self.inode(node)?;
        if inode.kind()? != Kind::Directory {
            let what = format!("inode {} is not a directory", inode.number);
            return Err(Error::new(Code::NotFound, what));
        }
        inode.check_readable()?;
        Ok(inode)
    }

    fn regular(&self, node: Node) -> Result<Inode> {
        let inode = self.inode(node)?;
        if inode.kind()? != Kind::File {
            let what = format!("inode {} is not a regular file and has no content", inode.number);
            return Err(Error::new(Code::Unsupported, what));
        }
        inode.check_readable()?;
        Ok(inode)
    }
}

fn node(number: u32) -> Node {
    Node { space: 0, number: u64::from(number) }
}

impl FileSystem for Ext4 {
    fn about(&self) -> &About {
        &self.about
    }

    fn root(&self) -> Node {
        node(ROOT_INODE)
    }

    fn child(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
        let directory = self.directory(directory)?;
        self.volume.find(&directory, name)
    }

    fn read_dir(&self, directory: Node, from: u64, limit: usize) -> Result<Page> {
        let directory = self.directory(directory)?;
        self.volume.list(&directory, from, limit.max(1))
    }

    fn metadata(&self, node: Node) -> Result<Metadata> {
        let inode = self.inode(node)?;
        let kind = inode.kind()?;
        let mut metadata = Metadata::new(kind);
        metadata.mode = u32::from(inode.mode) & 0o7777;
        (metadata.uid, metadata.gid) = (inode.uid, inode.gid);
        metadata.modified = inode.modified;
        if inode.links > 1 && kind != Kind::Directory {
            metadata.hard_link = Some(HardLink { device: 0, inode: u64::from(inode.number) });
        }
        match kind {
            Kind::File => metadata.size = inode.size,
            Kind::Symlink => metadata.link_target = Some(self.volume.link_target(&inode)?),
            Kind::CharDevice | Kind::BlockDevice => metadata.device = Some(inode.device()?),
            _ => {}
        }
        metadata.xattrs = self.volume.xattrs(&inode)?;
        Ok(metadata)
    }

    fn content(&self, file: Node) -> Result<Arc<dyn Content>> {
        let inode = self.regular(file)?;
        content::open(self.volume.clone(), inode)
    }

    fn extents(&self, file: Node) -> Result<Vec<FileExtent>> {
        let inode = self.regular(file)?;
        let mut extents = Vec::new();
        self.volume.for_each_extent(&inode, &mut |extent| {
            extents.push(extent);
            Ok(())
        })?;
        Ok(extents)
    }

    fn free(&self, visit: &mut dyn FnMut(Range<u64>) -> Result<()>) -> Result<()> {
        self.volume.free(visit)
    }

    fn files(&self, visit: &mut Visitor<'_>) -> Result<()> {
        self.volume.files(visit)
    }
}

/// The blocks of the file system as they would be once the journal was written back.
struct Volume {
    pages: Pages,
    superblock: Superblock,
    overlay: Overlay,
}

impl Volume {
    fn block_size(&self) -> u64 {
        self.superblock.block_size()
    }

    /// Fills the buffer from a byte offset within the file system.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let size = self.block_size();
        let blocks = offset / size..(offset + buffer.len() as u64).div_ceil(size);
        if !self.overlay.touches(blocks) {
            return self.pages.read(offset, buffer);
        }
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let within = (at % size) as usize;
            let length = (size as usize - within).min(buffer.len() - done);
            let part = &mut buffer[done..done + length];
            match self.overlay.place(at / size) {
                Some(place) => {
                    self.pages.read(place.block * size + within as u64, part)?;
                    place.restore_magic(within, part);
                }
                None => self.pages.read(at, part)?,
            }
            done += length;
        }
        Ok(())
    }

    /// A block of metadata.
    fn block(&self, number: u64) -> Result<Vec<u8>> {
        if number >= self.superblock.blocks {
            return Err(Error::integrity(format!("block {number} lies beyond the end of the file system")));
        }
        let mut block = vec![0; self.block_size() as usize];
        self.read(number * self.block_size(), &mut block)?;
        Ok(block)
    }

    /// The part of a group descriptor that is needed here.
    fn group(&self, group: u32) -> Result<Group> {
        let superblock = &self.superblock;
        let size = superblock.descriptor_size;
        let (block, offset) = superblock.descriptor_place(group)?;
        let mut raw = vec![0; size];
        self.read(block * self.block_size() + offset, &mut raw)?;
        if let Some(seed) = superblock.checksum_seed {
            let stored = raw.le16(0x1e)?;
            raw[0x1e..0x20].fill(0);
            if crc32c(crc32c(seed, &group.to_le_bytes()), &raw) as u16 != stored {
                return Err(Error::integrity(format!("the descriptor of block group {group} is damaged")));
            }
        }
        let wide = superblock.incompat & incompat::BITS_64 != 0 && size >= 64;
        let high = |at: usize| if wide { raw.le32(at) } else { Ok(0) };
        let high16 = |at: usize| if wide { raw.le16(at) } else { Ok(0) };
        let join = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let join16 = |low: u16, high: u16| u32::from(high) << 16 | u32::from(low);
        Ok(Group {
            block_bitmap: join(raw.le32(0)?, high(0x20)?),
            inode_bitmap: join(raw.le32(4)?, high(0x24)?),
            inode_table: join(raw.le32(8)?, high(0x28)?),
            free_clusters: join16(raw.le16(0xc)?, high16(0x2c)?),
            flags: raw.le16(0x12)?,
            unused_inodes: join16(raw.le16(0x1c)?, high16(0x32)?),
        })
    }

    /// An inode that may be free.
    fn inode(&self, number: u32) -> Result<Inode> {
        let superblock = &self.superblock;
        if number == 0 || number > superblock.inodes {
            return Err(Error::integrity(format!("there is no inode {number}")));
        }
        let index = number - 1;
        let group = self.group(index / superblock.inodes_per_group)?;
        let within = u64::from(index % superblock.inodes_per_group) * u64::from(superblock.inode_size);
        let mut raw = vec![0; usize::from(superblock.inode_size)];
        self.read(group.table_offset(superblock)? + within, &mut raw)?;
        Inode::parse(superblock, number, raw)
    }
}

/// What a group descriptor says.
struct Group {
    block_bitmap: u64,
    inode_bitmap: u64,
    inode_table: u64,
    free_clusters: u32,
    flags: u16,
    /// Inodes at the end of the table that were never used.
    unused_inodes: u32,
}

impl Group {
    /// Where the inode table begins, in bytes; the whole table lies within the file system.
    fn table_offset(&self, superblock: &Superblock) -> Result<u64> {
        let length = u64::from(superblock.inodes_per_group) * u64::from(superblock.inode_size);
        let start = self.inode_table.checked_mul(superblock.block_size());
        let end = start.and_then(|start| start.checked_add(length));
        match (start, end) {
            (Some(start), Some(end)) if end <= superblock.blocks * superblock.block_size() => Ok(start),
            _ => Err(Error::integrity("an inode table lies beyond the end of the file system")),
        }
    }
}

impl Superblock {
    fn kind(&self) -> FsKind {
        const EXT3_ONLY: u32 = incompat::FILETYPE | incompat::RECOVER | incompat::META_BG;
        // SPARSE_SUPER, LARGE_FILE, BTREE_DIR.
        const OLD_RO_COMPAT: u32 = 0x7;
        if self.incompat & !EXT3_ONLY != 0 || self.ro_compat & !OLD_RO_COMPAT != 0 {
            return FsKind::Ext4;
        }
        if self.has_journal() { FsKind::Ext3 } else { FsKind::Ext2 }
    }
}
