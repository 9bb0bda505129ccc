//! POSIX access control lists, from the forms that file systems store to the one that system calls exchange.

use mainstay_core::{Error, Result};

/// Tags of entries (`ACL_*` of acl(5)).
const USER: u16 = 0x02;
const GROUP: u16 = 0x08;
const NO_ID: u32 = u32::MAX;

/// One entry: who, what they may do, and the user or group meant.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) tag: u16,
    pub(crate) permissions: u16,
    pub(crate) id: u32,
}

/// The value of `system.posix_acl_access` and `system.posix_acl_default` as xattr(7) has it.
pub(crate) fn to_xattr(entries: impl IntoIterator<Item = Entry>) -> Vec<u8> {
    let mut value = 2u32.to_le_bytes().to_vec();
    for entry in entries {
        let id = if named(entry.tag) { entry.id } else { NO_ID };
        value.extend_from_slice(&entry.tag.to_le_bytes());
        value.extend_from_slice(&entry.permissions.to_le_bytes());
        value.extend_from_slice(&id.to_le_bytes());
    }
    value
}

/// Whether an entry of this tag carries a user or group number.
fn named(tag: u16) -> bool {
    matches!(tag, USER | GROUP)
}

/// From the form of ext2 to ext4 (fs/ext4/acl.h): version 1, and a number only where there is one.
pub(crate) fn from_ext(value: &[u8]) -> Result<Vec<u8>> {
    let malformed = || Error::integrity("a stored access control list does not parse");
    let mut rest = value.strip_prefix(&1u32.to_le_bytes()).ok_or_else(malformed)?;
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (head, tail) = rest.split_first_chunk::<4>().ok_or_else(malformed)?;
        let tag = u16::from_le_bytes([head[0], head[1]]);
        let permissions = u16::from_le_bytes([head[2], head[3]]);
        rest = tail;
        let mut id = NO_ID;
        if named(tag) {
            let (number, tail) = rest.split_first_chunk::<4>().ok_or_else(malformed)?;
            id = u32::from_le_bytes(*number);
            rest = tail;
        }
        entries.push(Entry { tag, permissions, id });
    }
    Ok(to_xattr(entries))
}
