//! The journal (JBD2), replayed in memory: which blocks of the file system are newer in the journal. Big-endian.
//!
//! Only whole transactions count: those whose commit block was written. Content is not copied; a replayed block is
//! read from where it lies in the journal.

use std::collections::BTreeMap;
use std::ops::Range;

use mainstay_core::{Code, Error, Result};

use super::Volume;
use super::inode::Inode;
use super::map::Mapper;
use crate::fs::bytes::{Bytes as _, crc32c};

const MAGIC: [u8; 4] = 0xc03b_3998u32.to_be_bytes();

/// Blocks of the file system that may be newer in the journal: as many as 4 GiB of journal in blocks of 4 KiB hold.
const REPLAYED_MAX: usize = 1 << 20;

/// Blocks that one transaction may revoke.
const REVOKED_MAX: usize = 1 << 22;

/// The longest journal that mke2fs makes, in blocks.
const LENGTH_MAX: u64 = 10_240_000;

/// Kinds of blocks in the log.
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const REVOKE: u32 = 5;

mod feature {
    pub(super) const REVOKE: u32 = 0x1;
    pub(super) const BITS_64: u32 = 0x2;
    pub(super) const ASYNC_COMMIT: u32 = 0x4;
    pub(super) const CHECKSUM_2: u32 = 0x8;
    pub(super) const CHECKSUM_3: u32 = 0x10;
    pub(super) const FAST_COMMIT: u32 = 0x20;
    pub(super) const KNOWN: u32 = REVOKE | BITS_64 | ASYNC_COMMIT | CHECKSUM_2 | CHECKSUM_3 | FAST_COMMIT;
}

mod tag {
    pub(super) const ESCAPED: u32 = 0x1;
    pub(super) const SAME_UUID: u32 = 0x2;
    pub(super) const LAST: u32 = 0x8;
}

/// Where the newest copy of a block is.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) block: u64,
    /// The journal put zeros over bytes that look like the start of one of its own blocks.
    escaped: bool,
}

impl Place {
    /// Puts back what the journal took away, for `part`, which begins `within` bytes after the start of the block.
    pub(super) fn restore_magic(self, within: usize, part: &mut [u8]) {
        if self.escaped && within < MAGIC.len() {
            let missing = &MAGIC[within..];
            let length = missing.len().min(part.len());
            part[..length].copy_from_slice(&missing[..length]);
        }
    }
}

/// Blocks of the file system whose newest copy is in the journal.
#[derive(Default)]
pub(super) struct Overlay(BTreeMap<u64, Place>);

impl Overlay {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn touches(&self, blocks: Range<u64>) -> bool {
        !self.0.is_empty() && blocks.start < blocks.end && self.0.range(blocks).next().is_some()
    }

    pub(super) fn place(&self, block: u64) -> Option<Place> {
        self.0.get(&block).copied()
    }
}

/// Reads the journal of a file system that was not left in order.
///
/// Errors: [`Code::Unsupported`] for a journal on another device or with fast commits, [`Code::Integrity`] for one
/// whose committed transactions are damaged.
pub(super) fn replay(volume: &Volume) -> Result<Overlay> {
    if volume.superblock.journal_inode == 0 {
        let what = "the file system was not unmounted, and its journal lies on another device";
        return Err(
            Error::new(Code::Unsupported, what).hint("run fsck on the machine itself, or shut it down")
        );
    }
    let inode = volume.inode(volume.superblock.journal_inode)?;
    let mut journal = Journal::open(volume, &inode)?;
    if journal.start == 0 {
        return Ok(Overlay::default());
    }
    journal.run()?;
    journal.refuse_fast_commits()?;
    Ok(journal.overlay)
}

fn damaged(why: &str) -> Error {
    Error::integrity(format!("the journal is damaged: {why}"))
}

fn too_many() -> Error {
    Error::new(Code::Unsupported, "the journal holds too many blocks to replay in memory")
}

struct Journal<'a> {
    volume: &'a Volume,
    inode: &'a Inode,
    mapper: Mapper,
    /// First block of the log proper, and the one after its last.
    log: Range<u64>,
    /// Where the log begins and the number of the transaction there; 0 when there is nothing to replay.
    start: u64,
    sequence: u32,
    fast_blocks: Range<u64>,
    features: u32,
    seed: u32,
    /// When the last transaction that counts was committed: seconds since 1970, high and low half.
    last_commit: (u32, u32),
    overlay: Overlay,
}

/// What one transaction changes, until its commit block says that it happened.
#[derive(Default)]
struct Transaction {
    blocks: Vec<Tagged>,
    revoked: Vec<u64>,
    /// A block of the transaction itself did not have its checksum.
    torn: bool,
}

/// A block of the file system as one transaction wrote it.
struct Tagged {
    number: u64,
    place: Place,
    checksum: u32,
}

impl<'a> Journal<'a> {
    fn open(volume: &'a Volume, inode: &'a Inode) -> Result<Self> {
        let mut journal = Self {
            volume,
            inode,
            mapper: Mapper::new(),
            log: 0..1,
            start: 0,
            sequence: 0,
            fast_blocks: 0..0,
            features: 0,
            seed: 0,
            last_commit: (0, 0),
            overlay: Overlay::default(),
        };
        let raw = journal.read(0)?;
        let kind = raw.be32(4)?;
        if raw.part(0, 4)? != MAGIC || !matches!(kind, 3 | 4) {
            return Err(damaged("its superblock is missing"));
        }
        if kind == 4 {
            journal.features = raw.be32(0x28)?;
        }
        let unknown = journal.features & !feature::KNOWN;
        if unknown != 0 {
            let what = format!("the journal uses features that are not known here ({unknown:#x})");
            return Err(Error::new(Code::Unsupported, what));
        }
        journal.seed = crc32c(!0, raw.part(0x30, 16)?);
        if journal.has_checksums() {
            let mut checked = raw.part(0, 1024)?.to_vec();
            checked[0xfc..0x100].fill(0);
            if crc32c(!0, &checked) != raw.be32(0xfc)? {
                return Err(damaged("the checksum of its superblock is wrong"));
            }
        }
        let (size, length) = (raw.be32(0xc)?, u64::from(raw.be32(0x10)?));
        let first = u64::from(raw.be32(0x14)?);
        let fast = match journal.features & feature::FAST_COMMIT {
            0 => 0,
            // The number that stands for the default.
            _ if raw.be32(0x54)? == 0 => 256,
            _ => u64::from(raw.be32(0x54)?),
        };
        let end = length.saturating_sub(fast);
        let room = inode.size / volume.block_size();
        if u64::from(size) != volume.block_size()
            || first == 0
            || first >= end
            || length > room.min(LENGTH_MAX)
        {
            return Err(damaged("its size is impossible"));
        }
        journal.log = first..end;
        journal.fast_blocks = end..length;
        (journal.sequence, journal.start) = (raw.be32(0x18)?, u64::from(raw.be32(0x1c)?));
        if journal.start != 0 && !journal.log.contains(&journal.start) {
            return Err(damaged("it begins outside itself"));
        }
        Ok(journal)
    }

    /// Where a block of the journal is on the volume.
    fn place(&mut self, logical: u64) -> Result<u64> {
        let stretch = self.mapper.at(self.volume, self.inode, logical)?;
        stretch.start.ok_or_else(|| damaged("it has a hole"))
    }

    /// A block of the journal, read without the overlay.
    fn read(&mut self, logical: u64) -> Result<Vec<u8>> {
        let place = self.place(logical)?;
        self.read_place(place)
    }

    fn read_place(&self, place: u64) -> Result<Vec<u8>> {
        let size = self.volume.block_size();
        self.volume.pages.take(place * size, size as usize)
    }

    fn after(&self, logical: u64) -> u64 {
        if logical + 1 < self.log.end { logical + 1 } else { self.log.start }
    }

    /// Applies one whole transaction after the other until the log ends.
    fn run(&mut self) -> Result<()> {
        let mut at = self.start;
        let mut transaction = Transaction::default();
        // The log is a ring: no more blocks than it has can belong to it.
        let mut left = self.log.end - self.log.start;
        while left > 0 {
            left -= 1;
            let block = self.read(at)?;
            at = self.after(at);
            if !self.continues(&block)? {
                break;
            }
            match block.be32(4)? {
                DESCRIPTOR => {
                    transaction.torn |= !self.tail_is_right(&block)?;
                    let Some(used) = self.descriptor(&block, &mut at, left, &mut transaction)? else { break };
                    left -= used;
                }
                REVOKE => {
                    transaction.torn |= !self.tail_is_right(&block)?;
                    self.revoke(&block, &mut transaction)?;
                }
                COMMIT => {
                    if !self.commit(&block, at, std::mem::take(&mut transaction))? {
                        break;
                    }
                }
                _ => break,
            }
        }
        Ok(())
    }

    /// Whether a block belongs to the transaction at hand.
    fn continues(&self, block: &[u8]) -> Result<bool> {
        Ok(block.part(0, 4)? == MAGIC && block.be32(8)? == self.sequence)
    }

    /// The blocks that a descriptor announces: they follow it, and `at` moves past them. Returns how many they are;
    /// `None` when they cannot all be there, so that the transaction cannot be whole.
    fn descriptor(
        &mut self,
        block: &[u8],
        at: &mut u64,
        left: u64,
        transaction: &mut Transaction,
    ) -> Result<Option<u64>> {
        let wide = self.has(feature::BITS_64);
        let third = self.has(feature::CHECKSUM_3);
        let plain = if wide { 12 } else { 8 };
        let size = match (third, self.has(feature::CHECKSUM_2)) {
            (true, _) => 16,
            (false, true) => plain + 2,
            (false, false) => plain,
        };
        let end = block.len() - if self.has_checksums() { 4 } else { 0 };
        let (mut offset, mut used) = (12, 0);
        while offset + size <= end {
            let flags = if third { block.be32(offset + 4)? } else { u32::from(block.be16(offset + 6)?) };
            let high = if wide { u64::from(block.be32(offset + 8)?) } else { 0 };
            let number = high << 32 | u64::from(block.be32(offset)?);
            let checksum = if third { block.be32(offset + 12)? } else { u32::from(block.be16(offset + 4)?) };
            if used == left {
                return Ok(None);
            }
            if transaction.blocks.len() == REPLAYED_MAX {
                return Err(too_many());
            }
            used += 1;
            let place = Place { block: self.place(*at)?, escaped: flags & tag::ESCAPED != 0 };
            *at = self.after(*at);
            transaction.blocks.push(Tagged { number, place, checksum });
            offset += size + if flags & tag::SAME_UUID == 0 { 16 } else { 0 };
            if flags & tag::LAST != 0 {
                break;
            }
        }
        Ok(Some(used))
    }

    /// The blocks whose older copies in the journal must not be written back: they were given out anew.
    fn revoke(&self, block: &[u8], transaction: &mut Transaction) -> Result<()> {
        let wide = self.has(feature::BITS_64);
        let size = if wide { 8 } else { 4 };
        let end = (block.be32(12)? as usize).min(block.len());
        for offset in (16..(end + 1).saturating_sub(size)).step_by(size) {
            let high = if wide { u64::from(block.be32(offset)?) << 32 } else { 0 };
            if transaction.revoked.len() == REVOKED_MAX {
                return Err(too_many());
            }
            transaction.revoked.push(high | u64::from(block.be32(offset + size - 4)?));
        }
        Ok(())
    }

    /// Makes a transaction count, `next` being the block after its commit block. False at the end of the log: the
    /// last transaction was not written to its end, which is what a crash leaves and no damage.
    fn commit(&mut self, block: &[u8], next: u64, transaction: Transaction) -> Result<bool> {
        let time = (block.be32(0x30)?, block.be32(0x34)?);
        let is_left_over = time < self.last_commit;
        let mut cleared = block.to_vec();
        cleared.part_mut(16, 4)?.fill(0);
        let is_whole = !self.has_checksums() || crc32c(self.seed, &cleared) == block.be32(16)?;
        if !is_whole || transaction.torn {
            self.sequence = self.sequence.wrapping_add(1);
            let goes_on = {
                let block = self.read(next)?;
                self.continues(&block)?
            };
            self.sequence = self.sequence.wrapping_sub(1);
            return match (is_whole || goes_on) && !is_left_over {
                true => Err(damaged("a committed transaction does not have its checksum")),
                false => Ok(false),
            };
        }
        self.last_commit = time;
        self.apply(transaction)?;
        self.sequence = self.sequence.wrapping_add(1);
        Ok(true)
    }

    fn apply(&mut self, transaction: Transaction) -> Result<()> {
        for tagged in transaction.blocks {
            if tagged.number >= self.volume.superblock.blocks {
                return Err(damaged("it holds a block from beyond the end of the file system"));
            }
            if self.has_checksums() {
                let block = self.read_place(tagged.place.block)?;
                let crc = crc32c(crc32c(self.seed, &self.sequence.to_be_bytes()), &block);
                let crc = if self.has(feature::CHECKSUM_3) { crc } else { crc & 0xffff };
                if crc != tagged.checksum {
                    return Err(damaged("a committed block does not have its checksum"));
                }
            }
            self.overlay.0.insert(tagged.number, tagged.place);
        }
        for number in transaction.revoked {
            self.overlay.0.remove(&number);
        }
        if self.overlay.len() > REPLAYED_MAX {
            return Err(Error::new(
                Code::Unsupported,
                "the journal holds too many blocks to replay in memory",
            ));
        }
        Ok(())
    }

    /// Whether a descriptor or a list of revoked blocks has its checksum.
    fn tail_is_right(&self, block: &[u8]) -> Result<bool> {
        if !self.has_checksums() {
            return Ok(true);
        }
        let tail = block.len() - 4;
        let crc = crc32c(crc32c(self.seed, block.part(0, tail)?), &[0; 4]);
        Ok(crc == block.be32(tail)?)
    }

    /// Fast commits describe changes after the last transaction in a language of their own.
    fn refuse_fast_commits(&mut self) -> Result<()> {
        const HEAD: u16 = 9;
        if self.fast_blocks.is_empty() {
            return Ok(());
        }
        let block = self.read(self.fast_blocks.start)?;
        if block.le16(0)? != HEAD || block.le32(8)? != self.sequence {
            return Ok(());
        }
        let what =
            "the file system was not unmounted, and its journal holds fast commits, which cannot be replayed";
        Err(Error::new(Code::Unsupported, what).hint("shut the machine down, or freeze its file systems"))
    }

    fn has(&self, feature: u32) -> bool {
        self.features & feature != 0
    }

    fn has_checksums(&self) -> bool {
        self.has(feature::CHECKSUM_2 | feature::CHECKSUM_3)
    }
}
