//! Which blocks are local.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `MNSTOVL1`, written last when the map is made |
//! | 8 | 8 | size of the device in bytes, big-endian |
//! | 16 | 32 | what the base is, in the words of whoever opened it |
//! | 48 | 36 | the boot during which the second bitmap was written, as the kernel names it |
//! | 4096 | n | the first bitmap: blocks that survive a power cut; n is a multiple of 4096 |
//! | 4096 + n | n | the second bitmap: blocks that survive the end of the process |
//!
//! A bit of the second bitmap is set as soon as its block has been written, and means nothing after another boot: the
//! kernel may have saved the bit and not the block. A bit of the first is set only after its block has been synced.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mainstay_core::{Code, Error, Result};

use super::medium::Medium;

/// One bit of the map, in bytes of the device. It is also what a first write costs at least.
pub(super) const BLOCK: u64 = 64 << 10;
const MAGIC: &[u8; 8] = b"MNSTOVL1";
const PAGE: usize = 4096;
const BOOT_OFFSET: u64 = 48;
const HEADER_LEN: usize = 84;
/// The largest device, in bytes: its bitmap is kept in memory.
const SIZE_MAX: u64 = 1 << 50;

pub(super) type Boot = [u8; 36];

pub(super) struct Map {
    words: Vec<AtomicU64>,
    /// Pages of the bitmap with bits that the first one in the file does not have yet.
    unsaved: Vec<AtomicBool>,
    medium: Box<dyn Medium>,
    size: u64,
}

/// What a flush is going to save: page numbers and their bits.
pub(super) struct Unsaved(Vec<(usize, Vec<u8>)>);

/// Bytes of one bitmap of a device of `size` bytes.
fn bitmap_len(size: u64) -> usize {
    let bits = usize::try_from(size.div_ceil(BLOCK)).unwrap_or(usize::MAX);
    bits.div_ceil(8).next_multiple_of(PAGE)
}

/// Bytes of the whole file. Errors: [`Code::Unsupported`] when the device is too large.
pub(super) fn file_len(size: u64) -> Result<u64> {
    if size > SIZE_MAX {
        return Err(Error::new(Code::Unsupported, format!("{size} bytes are too many for an overlay")));
    }
    Ok((PAGE + 2 * bitmap_len(size)) as u64)
}

impl Map {
    /// Whether a map was ever finished here. What is not, has never held anything.
    pub(super) fn is_made(medium: &dyn Medium) -> Result<bool> {
        let mut magic = [0; 8];
        medium.read(0, &mut magic).map_err(trouble)?;
        match &magic {
            MAGIC => Ok(true),
            [0, 0, 0, 0, 0, 0, 0, 0] => Ok(false),
            _ => Err(Error::integrity("the map of the overlay does not begin as one")),
        }
    }

    /// `medium` is all zeros, [`file_len`] long; the data are there and synced.
    pub(super) fn make(medium: &dyn Medium, size: u64, base: &[u8; 32], boot: &Boot) -> Result<()> {
        let mut header = [0; HEADER_LEN];
        header[..8].copy_from_slice(MAGIC);
        header[8..16].copy_from_slice(&size.to_be_bytes());
        header[16..48].copy_from_slice(base);
        header[48..].copy_from_slice(boot);
        medium.sync().and_then(|()| medium.write(0, &header)).and_then(|()| medium.sync()).map_err(trouble)
    }

    /// Errors: [`Code::Refused`] when it was made for another base.
    pub(super) fn open(medium: Box<dyn Medium>, size: u64, base: &[u8; 32], boot: &Boot) -> Result<Self> {
        let mut header = [0; HEADER_LEN];
        medium.read(0, &mut header).map_err(trouble)?;
        if header[8..16] != size.to_be_bytes() || header[16..48] != *base {
            return Err(other_base());
        }
        let len = bitmap_len(size);
        let (mut first, mut second) = (vec![0; len], vec![0; len]);
        medium.read(PAGE as u64, &mut first).map_err(trouble)?;
        medium.read((PAGE + len) as u64, &mut second).map_err(trouble)?;
        if header[48..] != *boot || *boot == [0; 36] {
            second.copy_from_slice(&first);
            // The boot comes last: until it is there, the second bitmap means nothing.
            let at = (PAGE + len) as u64;
            medium
                .write(at, &second)
                .and_then(|()| medium.sync())
                .and_then(|()| medium.write(BOOT_OFFSET, boot))
                .and_then(|()| medium.sync())
                .map_err(trouble)?;
        }
        let pages = first.chunks(PAGE).zip(second.chunks(PAGE));
        let unsaved = pages.map(|(first, second)| AtomicBool::new(first != second)).collect();
        let both = first.chunks_exact(8).zip(second.chunks_exact(8));
        let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, byte| (word << 8) | u64::from(*byte));
        let words = both.map(|(first, second)| AtomicU64::new(word(first) | word(second))).collect();
        Ok(Self { words, unsaved, medium, size })
    }

    pub(super) fn has(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).ok().and_then(|index| self.words.get(index));
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (block % 64) & 1 == 1)
    }

    /// How many blocks are not local.
    pub(super) fn missing(&self) -> u64 {
        let local: u64 =
            self.words.iter().map(|word| u64::from(word.load(Ordering::Acquire).count_ones())).sum();
        self.size.div_ceil(BLOCK).saturating_sub(local)
    }

    /// The end of the stretch that is local, or that is not, from `at` on; and whether it is.
    pub(super) fn stretch(&self, at: u64, end: u64) -> (u64, bool) {
        let local = self.has(at / BLOCK);
        let mut block = at / BLOCK + 1;
        while block * BLOCK < end && self.has(block) == local {
            block += 1;
        }
        ((block * BLOCK).min(end), local)
    }

    /// The blocks have been written. One caller at a time; when this returns, the end of the process loses nothing.
    pub(super) fn mark(&self, blocks: Range<u64>) -> Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        for block in blocks.clone() {
            self.words[word_of(block)].fetch_or(1 << (block % 64), Ordering::AcqRel);
        }
        let words = word_of(blocks.start)..word_of(blocks.end - 1) + 1;
        let bytes = self.bytes(words.clone());
        let at = PAGE + bitmap_len(self.size) + 8 * words.start;
        let written = self.medium.write(at as u64, &bytes).map_err(trouble);
        // After the bits: whoever sees the page as saved has not seen them.
        for page in 8 * words.start / PAGE..(8 * words.end).div_ceil(PAGE) {
            self.unsaved[page].store(true, Ordering::Release);
        }
        written
    }

    /// Taken before the data are synced, so that it holds no block that is not among them.
    pub(super) fn unsaved(&self) -> Unsaved {
        let pages =
            self.unsaved.iter().enumerate().filter(|(_, unsaved)| unsaved.swap(false, Ordering::AcqRel));
        let per_page = PAGE / 8;
        Unsaved(pages.map(|(page, _)| (page, self.bytes(page * per_page..(page + 1) * per_page))).collect())
    }

    /// The data have been synced.
    pub(super) fn save(&self, unsaved: &Unsaved) -> Result<()> {
        if unsaved.0.is_empty() {
            return Ok(());
        }
        for (page, bytes) in &unsaved.0 {
            self.medium.write((PAGE + page * PAGE) as u64, bytes).map_err(trouble)?;
        }
        self.medium.sync().map_err(trouble)
    }

    fn bytes(&self, words: Range<usize>) -> Vec<u8> {
        self.words[words].iter().flat_map(|word| word.load(Ordering::Acquire).to_le_bytes()).collect()
    }
}

fn word_of(block: u64) -> usize {
    usize::try_from(block / 64).unwrap_or(usize::MAX)
}

pub(super) fn other_base() -> Error {
    Error::new(Code::Refused, "it belongs to another base")
        .hint("open it with what it was made for, or choose another place")
}

fn trouble(error: std::io::Error) -> Error {
    Error::io("the map of the overlay cannot be used", error)
}
