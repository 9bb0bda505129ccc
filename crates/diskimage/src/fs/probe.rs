//! What lies on a volume, by the marks that each kind of content puts at a known place.

use mainstay_core::Result;

use super::Other;
use super::pages::Pages;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Ext,
    Xfs,
    Btrfs,
    Ntfs,
    Fat,
    Other(Other),
}

/// Where a mark lies, what it is, and what it means. The first that fits decides, so containers, whose content may
/// still show the marks of what was there before, come before file systems.
const MARKS: &[(u64, &[u8], Found)] = &[
    (0, b"LUKS\xba\xbe", Found::Other(Other::Luks)),
    (512, b"LABELONE", Found::Other(Other::LvmPhysicalVolume)),
    (3, b"-FVE-FS-", Found::Other(Other::BitLocker)),
    (4096, b"\xfc\x4e\x2b\xa9", Found::Other(Other::RaidMember)),
    (0, b"\xfc\x4e\x2b\xa9", Found::Other(Other::RaidMember)),
    (0, b"XFSB", Found::Xfs),
    (0x10040, b"_BHRfS_M", Found::Btrfs),
    (3, b"NTFS    ", Found::Ntfs),
    (3, b"EXFAT   ", Found::Other(Other::ExFat)),
    (3, b"ReFS\0\0\0\0", Found::Other(Other::ReFs)),
    (0, b"hsqs", Found::Other(Other::Squashfs)),
    (1024, b"\xe2\xe1\xf5\xe0", Found::Other(Other::Erofs)),
    (1024, b"\x10\x20\xf5\xf2", Found::Other(Other::F2fs)),
    (32, b"NXSB", Found::Other(Other::Apfs)),
    (4096 + 24, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9", Found::Other(Other::Bcachefs)),
    (0x10034, b"ReIsEr", Found::Other(Other::Reiserfs)),
    (0x8001, b"CD001", Found::Other(Other::Iso9660)),
    (4086, b"SWAPSPACE2", Found::Other(Other::Swap)),
    (8182, b"SWAPSPACE2", Found::Other(Other::Swap)),
    (16374, b"SWAPSPACE2", Found::Other(Other::Swap)),
    (65526, b"SWAPSPACE2", Found::Other(Other::Swap)),
    (1024 + 56, b"\x53\xef", Found::Ext),
];

pub(crate) fn probe(pages: &Pages) -> Result<Found> {
    for (offset, mark, found) in MARKS {
        if holds(pages, *offset, mark)? {
            return Ok(*found);
        }
    }
    if is_zfs(pages)? {
        return Ok(Found::Other(Other::Zfs));
    }
    if is_fat(pages)? {
        return Ok(Found::Fat);
    }
    let empty = is_zero(pages)?;
    Ok(Found::Other(if empty { Other::Empty } else { Other::Unknown }))
}

fn holds(pages: &Pages, offset: u64, mark: &[u8]) -> Result<bool> {
    if offset + mark.len() as u64 > pages.size() {
        return Ok(false);
    }
    Ok(pages.take(offset, mark.len())? == mark)
}

/// One of the uberblocks of the first label, in either byte order.
fn is_zfs(pages: &Pages) -> Result<bool> {
    const MAGIC: u64 = 0x00ba_b10c;
    for offset in (128 << 10..256 << 10).step_by(1 << 10) {
        if holds(pages, offset, &MAGIC.to_le_bytes())? || holds(pages, offset, &MAGIC.to_be_bytes())? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// FAT has no mark of its own that is always there: the numbers of its boot sector must make sense together.
fn is_fat(pages: &Pages) -> Result<bool> {
    if pages.size() < 512 {
        return Ok(false);
    }
    let boot = pages.take(0, 512)?;
    let sector = u16::from_le_bytes([boot[11], boot[12]]);
    let (cluster, tables, media) = (boot[13], boot[16], boot[21]);
    Ok(boot[510..] == [0x55, 0xaa]
        && matches!(boot[0], 0xeb | 0xe9)
        && matches!(sector, 512 | 1024 | 2048 | 4096)
        && cluster.is_power_of_two()
        && matches!(tables, 1 | 2)
        && (media == 0xf0 || media >= 0xf8))
}

/// Whether there is nothing but zeros where anything known would have its first mark.
fn is_zero(pages: &Pages) -> Result<bool> {
    let length = pages.size().min(256 << 10);
    for offset in (0..length).step_by(16 << 10) {
        let part = pages.take(offset, (length - offset).min(16 << 10) as usize)?;
        if part.iter().any(|&byte| byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}
