//! Extended attributes: inside the inode, in a block of their own, and large values in inodes of their own.

use mainstay_core::{Error, Result};

use super::Volume;
use super::inode::Inode;
use crate::fs::acl;
use crate::fs::bytes::{Bytes as _, crc32c};

const MAGIC: u32 = 0xea02_0000;

/// The longest value that an attribute may have (`XATTR_SIZE_MAX`), in bytes.
const VALUE_MAX: u64 = 64 << 10;

/// What stands before the stored part of a name.
const PREFIXES: &[(u8, &[u8])] = &[
    (0, b""),
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
    (7, b"system."),
    (8, b"system.richacl"),
];

/// Where an attribute lies before its value is fetched.
struct Entry<'a> {
    index: u8,
    name: &'a [u8],
    value_inode: u32,
    value_offset: usize,
    value_size: u32,
}

type Attribute = (Vec<u8>, Vec<u8>);

impl Volume {
    /// All attributes as listxattr(2) names them, sorted.
    pub(super) fn xattrs(&self, inode: &Inode) -> Result<Vec<Attribute>> {
        let mut found = Vec::new();
        self.for_each_xattr(inode, &mut |entry, values| {
            let inline_data = entry.index == 7 && entry.name == b"data";
            // What encryption keeps there is for the kernel only.
            if !inline_data && entry.index != 9 {
                found.push(self.attribute(inode, entry, values)?);
            }
            Ok(())
        })?;
        found.sort();
        Ok(found)
    }

    /// What does not fit into the inode of a file that has no blocks.
    pub(super) fn inline_rest(&self, inode: &Inode) -> Result<Vec<u8>> {
        let mut rest = Vec::new();
        self.for_each_xattr(inode, &mut |entry, values| {
            if entry.index == 7 && entry.name == b"data" {
                rest = self.value(inode, entry, values)?;
            }
            Ok(())
        })?;
        Ok(rest)
    }

    fn attribute(&self, inode: &Inode, entry: &Entry<'_>, values: &[u8]) -> Result<Attribute> {
        let prefix = PREFIXES.iter().find(|(index, _)| *index == entry.index).map(|(_, prefix)| *prefix);
        let prefix = prefix.ok_or_else(|| damaged(inode, "a name is of no known kind"))?;
        let name = [prefix, entry.name].concat();
        let mut value = self.value(inode, entry, values)?;
        if matches!(entry.index, 2 | 3) {
            value = acl::from_ext(&value)?;
        }
        Ok((name, value))
    }

    fn value(&self, inode: &Inode, entry: &Entry<'_>, values: &[u8]) -> Result<Vec<u8>> {
        if u64::from(entry.value_size) > VALUE_MAX {
            return Err(damaged(inode, "a value is too long"));
        }
        if entry.value_inode == 0 {
            return Ok(values.part(entry.value_offset, entry.value_size as usize)?.to_vec());
        }
        let holder = self.inode(entry.value_inode)?;
        if holder.size != u64::from(entry.value_size) {
            return Err(damaged(inode, "a value does not have its length"));
        }
        self.small_content(&holder, VALUE_MAX)
    }

    /// Shows every entry, and the bytes that its value's offset counts in.
    fn for_each_xattr(
        &self,
        inode: &Inode,
        each: &mut dyn FnMut(&Entry<'_>, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let within = inode.after_fields();
        if within.len() >= 4 && within.le32(0)? == MAGIC {
            let values = &within[4..];
            entries(inode, values, 0, &mut |entry| each(entry, values))?;
        }
        if inode.xattr_block != 0 {
            let block = self.block(inode.xattr_block)?;
            self.check_xattr_block(inode, &block)?;
            entries(inode, &block, 32, &mut |entry| each(entry, &block))?;
        }
        Ok(())
    }

    fn check_xattr_block(&self, inode: &Inode, block: &[u8]) -> Result<()> {
        if block.le32(0)? != MAGIC || block.le32(8)? != 1 {
            return Err(damaged(inode, "their block is something else"));
        }
        let Some(seed) = self.superblock.checksum_seed else { return Ok(()) };
        let mut crc = crc32c(seed, &inode.xattr_block.to_le_bytes());
        crc = crc32c(crc, block.part(0, 16)?);
        crc = crc32c(crc, &[0; 4]);
        crc = crc32c(crc, block.part(20, block.len() - 20)?);
        if crc != block.le32(16)? {
            return Err(damaged(inode, "the checksum of their block is wrong"));
        }
        Ok(())
    }
}

/// Goes through the entries from `at` on, until the four zero bytes that end them.
fn entries(
    inode: &Inode,
    bytes: &[u8],
    mut at: usize,
    each: &mut dyn FnMut(&Entry<'_>) -> Result<()>,
) -> Result<()> {
    while bytes.len() >= at + 4 && bytes.le32(at)? != 0 {
        let early = |_error| damaged(inode, "they end too early");
        let name_length = usize::from(bytes.byte(at)?);
        let entry = Entry {
            index: bytes.byte(at + 1)?,
            value_offset: usize::from(bytes.le16(at + 2)?),
            value_inode: bytes.le32(at + 4).map_err(early)?,
            value_size: bytes.le32(at + 8).map_err(early)?,
            name: bytes.part(at + 16, name_length).map_err(early)?,
        };
        each(&entry)?;
        at += 16 + name_length.next_multiple_of(4);
    }
    Ok(())
}

fn damaged(inode: &Inode, why: &str) -> Error {
    Error::integrity(format!("the extended attributes of inode {} are damaged: {why}", inode.number))
}
