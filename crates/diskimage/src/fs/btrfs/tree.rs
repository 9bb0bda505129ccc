//! Trees of items by key.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use fs_btrfs::btree::{Body, TreeBlock};
use fs_btrfs::chunk::DiskKey;
use fs_btrfs::fs::Filesystem;
use mainstay_core::{Error, Result};

use super::{guarded, translate};
use crate::fs::pages::Pages;

/// The deepest tree that the format allows.
const LEVEL_MAX: u8 = 7;

/// Blocks of trees that are kept: 4 MiB of the usual size.
const KEPT: usize = 256;

/// Kinds of items.
pub(super) mod kind_of_item {
    pub(in super::super) const INODE_ITEM: u8 = 1;
    pub(in super::super) const XATTR_ITEM: u8 = 24;
    pub(in super::super) const DIR_ITEM: u8 = 84;
    pub(in super::super) const DIR_INDEX: u8 = 96;
    pub(in super::super) const EXTENT_DATA: u8 = 108;
    pub(in super::super) const ROOT_ITEM: u8 = 132;
    pub(in super::super) const ROOT_REF: u8 = 156;
}

/// The name of an item; items are ordered by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) object: u64,
    pub(super) kind: u8,
    pub(super) offset: u64,
}

impl From<DiskKey> for Key {
    fn from(key: DiskKey) -> Self {
        Self { object: key.objectid, kind: key.key_type, offset: key.offset }
    }
}

/// An item of a tree.
type Item = (Key, Vec<u8>);

/// The blocks of one file system.
pub(super) struct Blocks {
    pub(super) parsed: Filesystem,
    pub(super) pages: Arc<Pages>,
    kept: Mutex<HashMap<u64, Arc<TreeBlock>>>,
}

/// A leaf, and where the one behind it begins.
struct Leaf {
    block: Arc<TreeBlock>,
    next: Option<Key>,
}

impl Blocks {
    pub(super) fn new(parsed: Filesystem, pages: Arc<Pages>) -> Self {
        Self { parsed, pages, kept: Mutex::default() }
    }

    pub(super) fn root_tree(&self) -> u64 {
        self.parsed.superblock().root
    }

    /// The data of the item with exactly that key.
    pub(super) fn exactly(&self, root: u64, key: Key) -> Result<Option<Vec<u8>>> {
        let mut found = None;
        self.each(root, key, key, &mut |_, data| {
            found = Some(data.to_vec());
            Ok(false)
        })?;
        Ok(found)
    }

    /// The last item up to `key`, and the key of the one behind it.
    pub(super) fn up_to(&self, root: u64, key: Key) -> Result<(Option<Item>, Option<Key>)> {
        let leaf = self.leaf(root, key)?;
        let items = leaf.block.body.items().unwrap_or_default();
        let after = items.partition_point(|item| Key::from(item.key) <= key);
        let next = items.get(after).map(|item| item.key.into()).or(leaf.next);
        let item = after.checked_sub(1).and_then(|index| items.get(index));
        let found = item.and_then(|item| Some((item.key.into(), leaf.block.item_data(item)?.to_vec())));
        Ok((found, next))
    }

    /// Calls `each` for the items from `first` to `last`, ascending, until it says no.
    pub(super) fn each(
        &self,
        root: u64,
        first: Key,
        last: Key,
        each: &mut dyn FnMut(Key, &[u8]) -> Result<bool>,
    ) -> Result<()> {
        let mut from = first;
        loop {
            let leaf = self.leaf(root, from)?;
            for item in leaf.block.body.items().unwrap_or_default() {
                let key = Key::from(item.key);
                if key > last {
                    return Ok(());
                }
                let data = leaf.block.item_data(item).unwrap_or_default();
                if key >= from && !each(key, data)? {
                    return Ok(());
                }
            }
            match leaf.next {
                Some(next) if next <= last => from = next,
                _ => return Ok(()),
            }
        }
    }

    /// The leaf that would hold a key.
    fn leaf(&self, root: u64, key: Key) -> Result<Leaf> {
        let mut block = self.block(root)?;
        let mut next = None;
        if block.header.level > LEVEL_MAX {
            return Err(Error::integrity("a tree of the btrfs file system is too deep"));
        }
        while let Body::Node(pointers) = &block.body {
            let after = pointers.partition_point(|pointer| Key::from(pointer.key) <= key);
            let index = after.saturating_sub(1);
            let beyond = pointers.get(index + 1).map(|pointer| Key::from(pointer.key));
            // Only ever nearer, and always behind the key: so a walk always moves on.
            next = beyond.filter(|beyond| next.is_none_or(|next| *beyond < next)).or(next);
            let chosen = pointers.get(index).ok_or_else(|| damaged(root))?;
            let child = self.block(chosen.blockptr)?;
            let first = match &child.body {
                Body::Node(pointers) => pointers.first().map(|pointer| pointer.key),
                Body::Leaf(items) => items.first().map(|item| item.key),
            };
            // A block is where its parent says it begins, so none stands in two places of a tree.
            if child.header.level + 1 != block.header.level || first != Some(chosen.key) {
                return Err(damaged(root));
            }
            block = child;
        }
        Ok(Leaf { block, next: next.filter(|next| *next > key) })
    }

    fn block(&self, logical: u64) -> Result<Arc<TreeBlock>> {
        if let Some(block) = self.kept.lock().unwrap_or_else(PoisonError::into_inner).get(&logical) {
            return Ok(block.clone());
        }
        let failed = |error| translate("cannot read a block of the btrfs file system", error);
        let block = Arc::new(guarded("btrfs", || self.parsed.read_tree_block(logical), failed)?);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT {
            kept.clear();
        }
        kept.insert(logical, block.clone());
        Ok(block)
    }

    /// Where a stretch of logical addresses lies on the volume, and how far it goes on there.
    pub(super) fn physical(&self, logical: u64) -> Result<(u64, u64)> {
        let failed = |error| translate("an address of the btrfs file system leads nowhere", error);
        let mapping = guarded("btrfs", || self.parsed.chunk_map().map(logical), failed)?;
        if mapping.devid != self.parsed.superblock().dev_item.devid {
            return Err(Error::new(
                mainstay_core::Code::Unsupported,
                "a part of the btrfs file system lies on another device",
            ));
        }
        Ok((mapping.physical, mapping.len))
    }
}

fn damaged(root: u64) -> Error {
    Error::integrity(format!("the btrfs tree at {root} is damaged: a block is not where it belongs"))
}
