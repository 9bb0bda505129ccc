//! btrfs on one device: all its subvolumes, as a mount of the top level shows them. A log tree that was not folded
//! into the others is refused; what was read without it would be old.
//!
//! Blocks of trees, their checksums, chunks and decompression are another crate's; what the items mean is here. The
//! layout is the one of the kernel's `btrfs_tree.h`.

mod content;
mod tree;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use fs_btrfs::dir::{name_hash, parse_dir_items};
use fs_btrfs::inode::Inode;
use fs_btrfs::xattr::parse_xattr_items;
use mainstay_core::{Code, Error, HardLink, Kind, Metadata, Result, Time};

use super::bytes::Bytes as _;
use super::foreign::{Device, EXTENTS_MAX, guarded};
use super::pages::Pages;
use super::{About, Content, DirEntry, FileExtent, FileSystem, FsKind, Node, Page, Visitor, check_name};
use tree::{Blocks, Key, kind_of_item};

/// The tree of the top level, and the inode that every tree of files begins with.
const TOP_LEVEL: u64 = 5;
const FIRST_INODE: u64 = 256;

/// Trees of files are numbered from here on, up to the small negative numbers.
const LAST_TREE: u64 = 0xffff_ffff_ffff_ff00;

/// An inode that no tree has: the empty directory in place of a subvolume that is not there.
const EMPTY_DIRECTORY: u64 = 2;

/// The longest target that a symbolic link may have (PATH_MAX), in bytes.
const LINK_MAX: u64 = 4096;

pub(crate) struct Btrfs {
    volume: Arc<Volume>,
    about: About,
}

/// The volume and what was learned of it.
struct Volume {
    blocks: Blocks,
    /// Where the trees of subvolumes begin.
    roots: Mutex<HashMap<u64, Root>>,
}

#[derive(Clone, Copy)]
struct Root {
    /// Logical address of the top block.
    block: u64,
    /// The inode of the subvolume's root directory.
    directory: u64,
}

impl Btrfs {
    pub(crate) fn open(pages: Pages) -> Result<Self> {
        let size = pages.size();
        let pages = Arc::new(pages);
        let device = Arc::new(Device(pages.clone()));
        let mount = || fs_btrfs::fs::Filesystem::mount(device);
        let parsed = guarded("btrfs", mount, |error| translate("cannot open the btrfs file system", error))?;
        let superblock = parsed.superblock();
        let spanned = superblock.dev_item.total_bytes;
        if spanned > size {
            let what =
                format!("the btrfs file system has {spanned} bytes, more than its volume of {size} bytes");
            return Err(Error::integrity(what).hint("the image may have been cut short"));
        }
        let about = About {
            kind: FsKind::Btrfs,
            label: super::bytes::until_nul(superblock.label.as_bytes()).to_vec(),
            uuid: super::bytes::uuid(superblock.fsid),
            size: spanned,
            block_size: u64::from(superblock.sectorsize),
            notes: Vec::new(),
        };
        let blocks = Blocks::new(parsed, pages);
        Ok(Self { volume: Arc::new(Volume { blocks, roots: Mutex::default() }), about })
    }

    fn directory(&self, node: Node) -> Result<Inode> {
        let inode = self.volume.inode(node)?;
        if !inode.is_dir() {
            return Err(Error::new(Code::NotFound, format!("inode {} is not a directory", inode.ino)));
        }
        Ok(inode)
    }

    fn regular(&self, node: Node) -> Result<Inode> {
        let inode = self.volume.inode(node)?;
        if !inode.is_regular_file() {
            let what = format!("inode {} is not a regular file and has no content", inode.ino);
            return Err(Error::new(Code::Unsupported, what));
        }
        Ok(inode)
    }
}

fn translate(what: &str, error: fs_btrfs::Error) -> Error {
    use fs_btrfs::Error as Theirs;
    let code = match &error {
        Theirs::Io(_) => Code::Io,
        Theirs::UnsupportedFeature(_) | Theirs::UnsupportedChecksum(_) | Theirs::UnsupportedProfile(_) => {
            Code::Unsupported
        }
        Theirs::DirtyLog => {
            let what = "the btrfs file system was in use, and what was written last is only in its log";
            return Error::new(Code::Unsupported, what)
                .because(error)
                .hint("shut the machine down, or freeze its file systems while its disks are read");
        }
        _ => Code::Integrity,
    };
    Error::new(code, what).because(error)
}

fn kind(inode: &Inode) -> Result<Kind> {
    Ok(match inode.mode >> 12 {
        0o10 => Kind::File,
        0o04 => Kind::Directory,
        0o12 => Kind::Symlink,
        0o01 => Kind::Fifo,
        0o14 => Kind::Socket,
        0o02 => Kind::CharDevice,
        0o06 => Kind::BlockDevice,
        _ => return Err(Error::integrity(format!("inode {} is of no known kind", inode.ino))),
    })
}

fn is_missing_subvolume(node: Node) -> bool {
    node.number == EMPTY_DIRECTORY
}

impl FileSystem for Btrfs {
    fn about(&self) -> &About {
        &self.about
    }

    fn root(&self) -> Node {
        Node { space: TOP_LEVEL, number: FIRST_INODE }
    }

    fn child(&self, directory: Node, name: &[u8]) -> Result<Option<Node>> {
        if is_missing_subvolume(directory) {
            return Ok(None);
        }
        let inode = self.directory(directory)?;
        let root = self.volume.root(directory.space)?;
        let key = Key { object: inode.ino, kind: kind_of_item::DIR_ITEM, offset: name_hash(name) };
        let Some(item) = self.volume.blocks.exactly(root.block, key)? else { return Ok(None) };
        for entry in self.volume.entries(directory, &item)? {
            if entry.name == name {
                return Ok(Some(entry.node));
            }
        }
        Ok(None)
    }

    fn read_dir(&self, directory: Node, from: u64, limit: usize) -> Result<Page> {
        if is_missing_subvolume(directory) {
            return Ok(Page::default());
        }
        let inode = self.directory(directory)?;
        let root = self.volume.root(directory.space)?;
        let first = Key { object: inode.ino, kind: kind_of_item::DIR_INDEX, offset: from };
        let last = Key { offset: u64::MAX, ..first };
        let mut page = Page::default();
        self.volume.blocks.each(root.block, first, last, &mut |key, data| {
            if page.entries.len() >= limit.max(1) {
                page.next = Some(key.offset);
                return Ok(false);
            }
            page.entries.extend(self.volume.entries(directory, data)?);
            Ok(true)
        })?;
        page.entries.iter().try_for_each(|entry| check_name(&entry.name))?;
        Ok(page)
    }

    fn metadata(&self, node: Node) -> Result<Metadata> {
        if is_missing_subvolume(node) {
            let mut metadata = Metadata::new(Kind::Directory);
            metadata.mode = 0o755;
            return Ok(metadata);
        }
        let inode = self.volume.inode(node)?;
        let kind = kind(&inode)?;
        let mut metadata = Metadata::new(kind);
        metadata.mode = inode.mode & 0o7777;
        (metadata.uid, metadata.gid) = (inode.uid, inode.gid);
        metadata.modified = Time::from_parts(inode.mtime.sec, i64::from(inode.mtime.nsec));
        if inode.nlink > 1 && kind != Kind::Directory {
            metadata.hard_link = Some(HardLink { device: node.space, inode: inode.ino });
        }
        match kind {
            Kind::File => metadata.size = inode.size,
            Kind::Symlink => metadata.link_target = Some(self.volume.link_target(node, &inode)?),
            Kind::CharDevice | Kind::BlockDevice => {
                // As the kernel holds it: twenty bits of minor number.
                let major = u32::try_from(inode.rdev >> 20).unwrap_or(u32::MAX);
                metadata.device = Some((major, (inode.rdev & 0xf_ffff) as u32));
            }
            _ => {}
        }
        metadata.xattrs = self.volume.xattrs(node)?;
        Ok(metadata)
    }

    fn content(&self, file: Node) -> Result<Arc<dyn Content>> {
        let inode = self.regular(file)?;
        content::open(self.volume.clone(), file, &inode)
    }

    fn extents(&self, file: Node) -> Result<Vec<FileExtent>> {
        let inode = self.regular(file)?;
        let root = self.volume.root(file.space)?;
        let mut extents = Vec::new();
        let first = Key { object: inode.ino, kind: kind_of_item::EXTENT_DATA, offset: 0 };
        self.volume.blocks.each(root.block, first, Key { offset: u64::MAX, ..first }, &mut |key, data| {
            self.volume.place(key.offset, data, inode.size, &mut extents)?;
            if extents.len() as u64 > EXTENTS_MAX {
                let what = format!("inode {} lies in too many pieces", inode.ino);
                return Err(Error::new(Code::Unsupported, what));
            }
            Ok(true)
        })?;
        Ok(extents)
    }

    fn free(&self, _visit: &mut dyn FnMut(Range<u64>) -> Result<()>) -> Result<()> {
        // Not told: what is free would have to be put together from several trees.
        Ok(())
    }

    fn files(&self, visit: &mut Visitor<'_>) -> Result<()> {
        for tree in self.volume.subvolumes()? {
            // One that is damaged leaves the others alone, but what the visitor says counts.
            let mut stopped = None;
            let walked = self.volume.files_of(tree, &mut |node, extents| {
                visit(node, extents).inspect_err(|error| stopped = Some(error.code()))
            });
            if stopped.is_some() {
                walked?;
            }
        }
        Ok(())
    }
}

impl Volume {
    /// Where the tree of a subvolume begins.
    fn root(&self, tree: u64) -> Result<Root> {
        if let Some(root) = self.roots.lock().unwrap_or_else(PoisonError::into_inner).get(&tree) {
            return Ok(*root);
        }
        let first = Key { object: tree, kind: kind_of_item::ROOT_ITEM, offset: 0 };
        let mut found = None;
        self.blocks.each(
            self.blocks.root_tree(),
            first,
            Key { offset: u64::MAX, ..first },
            &mut |_, data| {
                let data: &[u8] = data;
                found = Some(Root { directory: data.le64(168)?, block: data.le64(176)? });
                Ok(true)
            },
        )?;
        let root = found.ok_or_else(|| Error::integrity(format!("there is no subvolume {tree}")))?;
        let mut roots = self.roots.lock().unwrap_or_else(PoisonError::into_inner);
        if roots.len() < 1 << 16 {
            roots.insert(tree, root);
        }
        Ok(root)
    }

    /// The numbers of all trees of files.
    fn subvolumes(&self) -> Result<Vec<u64>> {
        let mut trees = Vec::new();
        let first = Key { object: TOP_LEVEL, kind: 0, offset: 0 };
        let last = Key { object: LAST_TREE, kind: u8::MAX, offset: u64::MAX };
        self.blocks.each(self.blocks.root_tree(), first, last, &mut |key, _| {
            let of_files = key.object == TOP_LEVEL || key.object >= FIRST_INODE;
            if key.kind == kind_of_item::ROOT_ITEM && of_files && trees.last() != Some(&key.object) {
                trees.push(key.object);
            }
            Ok(trees.len() < 1 << 20)
        })?;
        Ok(trees)
    }

    fn inode(&self, node: Node) -> Result<Inode> {
        let root = self.root(node.space)?;
        let key = Key { object: node.number, kind: kind_of_item::INODE_ITEM, offset: 0 };
        let item = self.blocks.exactly(root.block, key)?;
        let missing = || Error::integrity(format!("inode {} is in use by a name, but missing", node.number));
        let item = item.ok_or_else(missing)?;
        let failed = |error| translate(&format!("cannot read inode {}", node.number), error);
        guarded("btrfs", || Inode::parse(&item, node.number), failed)
    }

    /// The names that one item of a directory holds.
    fn entries(&self, directory: Node, item: &[u8]) -> Result<Vec<DirEntry>> {
        let failed =
            |error| translate(&format!("the directory in inode {} is damaged", directory.number), error);
        let parsed = guarded("btrfs", || parse_dir_items(item), failed)?;
        let mut entries = Vec::with_capacity(parsed.len());
        for entry in parsed {
            let node = if entry.is_inode() {
                Node { space: directory.space, number: entry.ino }
            } else {
                self.subvolume(directory, entry.ino, &entry.name)?
            };
            entries.push(DirEntry { name: entry.name, node, kind: None });
        }
        Ok(entries)
    }

    /// The root of a subvolume under its name. A snapshot of its parent has the name without the subvolume.
    fn subvolume(&self, directory: Node, tree: u64, name: &[u8]) -> Result<Node> {
        let missing = Node { space: directory.space, number: EMPTY_DIRECTORY };
        let key = Key { object: directory.space, kind: kind_of_item::ROOT_REF, offset: tree };
        let Some(reference) = self.blocks.exactly(self.blocks.root_tree(), key)? else { return Ok(missing) };
        let reference = reference.as_slice();
        let length = usize::from(reference.le16(16)?);
        if reference.le64(0)? != directory.number || reference.part(18, length)? != name {
            return Ok(missing);
        }
        Ok(Node { space: tree, number: self.root(tree)?.directory })
    }

    fn xattrs(&self, node: Node) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let root = self.root(node.space)?;
        let first = Key { object: node.number, kind: kind_of_item::XATTR_ITEM, offset: 0 };
        let mut xattrs = Vec::new();
        self.blocks.each(root.block, first, Key { offset: u64::MAX, ..first }, &mut |_, data| {
            let failed =
                |error| translate(&format!("the attributes of inode {} are damaged", node.number), error);
            let parsed = guarded("btrfs", || parse_xattr_items(data), failed)?;
            xattrs.extend(parsed.into_iter().map(|xattr| (xattr.name, xattr.value)));
            Ok(xattrs.len() < 1 << 16)
        })?;
        xattrs.sort();
        Ok(xattrs)
    }

    fn link_target(&self, node: Node, inode: &Inode) -> Result<Vec<u8>> {
        let damaged = || Error::integrity(format!("the link in inode {} is damaged", inode.ino));
        if inode.size == 0 || inode.size > LINK_MAX {
            return Err(damaged());
        }
        let root = self.root(node.space)?;
        let key = Key { object: inode.ino, kind: kind_of_item::EXTENT_DATA, offset: 0 };
        let item = self.blocks.exactly(root.block, key)?.ok_or_else(damaged)?;
        let target = self.inline(&item)?.ok_or_else(damaged)?;
        if target.len() as u64 != inode.size || target.contains(&0) {
            return Err(damaged());
        }
        Ok(target)
    }

    /// Every regular file of one subvolume with its extents, by inode number.
    fn files_of(&self, tree: u64, visit: &mut Visitor<'_>) -> Result<()> {
        let root = self.root(tree)?;
        let first = Key { object: FIRST_INODE, kind: 0, offset: 0 };
        let last = Key { object: LAST_TREE, kind: u8::MAX, offset: u64::MAX };
        let mut file: Option<(u64, u64)> = None;
        let mut batch = Vec::new();
        let mut of = 0;
        self.blocks.each(root.block, first, last, &mut |key, data| {
            if key.object != of || batch.len() >= 1024 {
                if !batch.is_empty() {
                    visit(Node { space: tree, number: of }, &batch)?;
                    batch.clear();
                }
                of = key.object;
            }
            match key.kind {
                kind_of_item::INODE_ITEM => {
                    let inode = guarded(
                        "btrfs",
                        || Inode::parse(data, key.object),
                        |error| translate("an inode is damaged", error),
                    )?;
                    let regular = inode.is_regular_file() && inode.nlink > 0;
                    file = regular.then_some((key.object, inode.size));
                }
                kind_of_item::EXTENT_DATA => {
                    if let Some((_, size)) = file.filter(|(number, _)| *number == key.object) {
                        self.place(key.offset, data, size, &mut batch)?;
                    }
                }
                _ => {}
            }
            Ok(true)
        })?;
        if batch.is_empty() { Ok(()) } else { visit(Node { space: tree, number: of }, &batch) }
    }
}
