//! A new qcow2 image, written front to back or in any other order, by several threads. Source: QEMU's
//! `docs/interop/qcow2.txt`, version 3.
//!
//! Clusters are handed out as they are first written, so the file holds no more than what was. The reference counts
//! (one for each cluster) and the header come with [`Qcow2Writer::flush`]: until then the file is no image to anybody.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use mainstay_core::{Blocks, Code, Error, Extent, ExtentKind, Result};

use crate::compose::{check_range, check_read, extent};

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of 8 bytes in one cluster.
const ENTRIES: u64 = CLUSTER / 8;
/// Counts of 2 bytes in one cluster.
const COUNTS: u64 = CLUSTER / 2;
/// Nobody else refers to the cluster, so it may be written in place.
const COPIED: u64 = 1 << 63;
/// What QEMU takes: a first table of 32 MiB.
const SIZE_MAX: u64 = (32 << 20) / 8 * ENTRIES * CLUSTER;

/// An image that is being written.
pub struct Qcow2Writer {
    file: File,
    path: PathBuf,
    size: u64,
    /// In clusters, each behind the other: the header, the table of reference counts, the first table.
    counts_table: Range<u64>,
    first_table: Range<u64>,
    state: Mutex<State>,
}

struct State {
    /// The first cluster that nothing uses.
    next: u64,
    /// Where the second tables lie, in bytes; 0 for none.
    first: Vec<u64>,
    /// Where the blocks of reference counts lie, in clusters.
    counts: Vec<u64>,
}

impl Qcow2Writer {
    /// Makes a new file for a disk of `size` bytes that only its owner may read.
    ///
    /// Errors: [`Code::AlreadyExists`]; [`Code::Unsupported`] for a disk that no such image can hold.
    pub fn create(path: &Path, size: u64) -> Result<Self> {
        if size > SIZE_MAX {
            let what = format!("a disk of {size} bytes does not fit into a qcow2 image");
            return Err(Error::new(Code::Unsupported, what).hint("write it as a raw image"));
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Error::new(Code::AlreadyExists, format!("{} exists already", path.display()))
                    .hint("choose another place, or move it away")
            }
            _ => Error::io(format!("cannot make {}", path.display()), error),
        })?;
        let tables = size.div_ceil(CLUSTER * ENTRIES);
        // Data, tables, and the counts of all that; a little more costs nothing.
        let clusters = size.div_ceil(CLUSTER) + 2 * tables + 64;
        let blocks = clusters.div_ceil(COUNTS - 1) + 1;
        let counts_table = 1..1 + blocks.div_ceil(ENTRIES);
        let first_table = counts_table.end..counts_table.end + (tables * 8).div_ceil(CLUSTER).max(1);
        let first = vec![0; usize::try_from(tables).unwrap_or(usize::MAX)];
        let state = State { next: first_table.end, first, counts: Vec::new() };
        let path = path.to_owned();
        Ok(Self { file, path, size, counts_table, first_table, state: Mutex::new(state) })
    }

    /// Writes all of `data` or fails.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<()> {
        check_read(self, offset, data.len())?;
        let places = self.places(offset, data.len() as u64, true)?;
        let mut rest = data;
        for (place, length) in places {
            let (now, later) = rest.split_at_checked(length).unwrap_or((rest, &[]));
            // Every place is known: what had none was given one.
            self.put(now, place.unwrap_or_default())?;
            rest = later;
        }
        Ok(())
    }

    /// Makes `range` read as zeros.
    pub fn zero(&self, range: Range<u64>) -> Result<()> {
        check_range(self, &range)?;
        let zeros = [0; 4096];
        let mut at = range.start;
        while at < range.end {
            let cluster_end = (at / CLUSTER + 1) * CLUSTER;
            for (place, length) in self.places(at, cluster_end.min(range.end) - at, false)? {
                let mut left = length;
                while let (Some(place), true) = (place, left > 0) {
                    let now = left.min(zeros.len());
                    self.put(zeros.get(..now).unwrap_or_default(), place + (length - left) as u64)?;
                    left -= now;
                }
            }
            at = cluster_end;
        }
        Ok(())
    }

    /// Completes the image and makes it durable. It may be written to afterwards, and is complete again after the
    /// next call.
    pub fn flush(&self) -> Result<()> {
        let failed = |error| Error::io(format!("cannot write {}", self.path.display()), error);
        let mut state = self.state();
        while (state.counts.len() as u64) * COUNTS < state.next {
            let block = state.next;
            state.counts.push(block);
            state.next += 1;
        }
        let mut table = Vec::new();
        for (number, block) in (0_u64..).zip(&state.counts) {
            let used = state.next.saturating_sub(number * COUNTS).min(COUNTS);
            let mut counts = vec![0; CLUSTER as usize];
            for count in counts.chunks_exact_mut(2).take(used as usize) {
                count.copy_from_slice(&1_u16.to_be_bytes());
            }
            self.put(&counts, block * CLUSTER)?;
            table.extend((block * CLUSTER).to_be_bytes());
        }
        self.put(&table, self.counts_table.start * CLUSTER)?;
        let marked = |place: &u64| if *place == 0 { 0 } else { place | COPIED };
        let first: Vec<u8> = state.first.iter().flat_map(|place| marked(place).to_be_bytes()).collect();
        self.put(&first, self.first_table.start * CLUSTER)?;
        self.file.set_len(state.next * CLUSTER).map_err(failed)?;
        self.file.sync_all().map_err(failed)?;
        self.put(&self.header(), 0)?;
        self.file.sync_all().map_err(failed)
    }

    fn header(&self) -> Vec<u8> {
        let short = |number: u64| u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes();
        let tables = self.size.div_ceil(CLUSTER * ENTRIES);
        let mut header = b"QFI\xfb".to_vec();
        header.extend(3_u32.to_be_bytes());
        header.extend([0; 12]); // no backing file
        header.extend(CLUSTER_BITS.to_be_bytes());
        header.extend(self.size.to_be_bytes());
        header.extend([0; 4]); // not encrypted
        header.extend(short(tables));
        header.extend((self.first_table.start * CLUSTER).to_be_bytes());
        header.extend((self.counts_table.start * CLUSTER).to_be_bytes());
        header.extend(short(self.counts_table.end - self.counts_table.start));
        header.extend([0; 12]); // no snapshots
        header.extend([0; 24]); // no features
        header.extend(4_u32.to_be_bytes()); // counts of 16 bits
        header.extend(104_u32.to_be_bytes());
        header.extend([0; 8]); // no extensions
        header
    }

    /// Where the bytes from `offset` on lie in the file, in stretches: their place, if they have one, and length. With
    /// `make` they are given one.
    fn places(&self, offset: u64, length: u64, make: bool) -> Result<Vec<(Option<u64>, usize)>> {
        let mut state = self.state();
        let (mut places, mut at): (Vec<(Option<u64>, usize)>, u64) = (Vec::new(), offset);
        while at < offset + length {
            let table_end = (at / (CLUSTER * ENTRIES) + 1) * CLUSTER * ENTRIES;
            let end = table_end.min(offset + length);
            for (number, entry) in (at / CLUSTER..).zip(self.entries(&mut state, at..end, make)?) {
                let from = at.max(number * CLUSTER);
                let now = end.min((number + 1) * CLUSTER) - from;
                let place = (entry != 0).then(|| (entry & !COPIED) + from % CLUSTER);
                match places.last_mut() {
                    Some((last, known)) if place == last.map(|last| last + *known as u64) => {
                        *known += now as usize;
                    }
                    _ => places.push((place, now as usize)),
                }
            }
            at = end;
        }
        Ok(places)
    }

    /// The entries of one second table for the clusters that `range` touches; 0 for those without.
    fn entries(&self, state: &mut State, range: Range<u64>, make: bool) -> Result<Vec<u64>> {
        let failed = |error| Error::io(format!("cannot read {}", self.path.display()), error);
        let State { next, first, .. } = state;
        let table = usize::try_from(range.start / (CLUSTER * ENTRIES)).unwrap_or(usize::MAX);
        let table = first.get_mut(table).ok_or_else(|| Error::bug("a cluster beyond the end of the disk"))?;
        let clusters = range.start / CLUSTER..range.end.div_ceil(CLUSTER);
        let count = (clusters.end - clusters.start) as usize;
        if *table == 0 {
            if !make {
                return Ok(vec![0; count]);
            }
            *table = *next * CLUSTER;
            *next += 1;
            // So that there is something to read.
            self.file.set_len(*next * CLUSTER).map_err(failed)?;
        }
        let at = *table + clusters.start % ENTRIES * 8;
        let mut bytes = vec![0; count * 8];
        self.file.read_exact_at(&mut bytes, at).map_err(failed)?;
        let (known, _) = bytes.as_chunks();
        let mut entries: Vec<u64> = known.iter().map(|entry| u64::from_be_bytes(*entry)).collect();
        if make && entries.contains(&0) {
            for entry in entries.iter_mut().filter(|entry| **entry == 0) {
                *entry = (*next * CLUSTER) | COPIED;
                *next += 1;
            }
            let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            self.put(&bytes, at)?;
        }
        Ok(entries)
    }

    fn put(&self, bytes: &[u8], at: u64) -> Result<()> {
        self.file
            .write_all_at(bytes, at)
            .map_err(|error| Error::io(format!("cannot write {}", self.path.display()), error))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was written so far; zeros elsewhere.
impl Blocks for Qcow2Writer {
    fn size(&self) -> u64 {
        self.size
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        check_range(self, &range)?;
        Ok(if range.is_empty() { Vec::new() } else { vec![extent(range, ExtentKind::Data)] })
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        check_read(self, offset, buffer.len())?;
        let failed = |error| Error::io(format!("cannot read {}", self.path.display()), error);
        let mut rest = buffer;
        for (place, length) in self.places(offset, rest.len() as u64, false)? {
            let Some((now, later)) = rest.split_at_mut_checked(length) else { break };
            now.fill(0);
            let mut at = place;
            let mut unread = now;
            while let Some(from) = at.filter(|_| !unread.is_empty()) {
                // The file may end inside its last cluster.
                let read = self.file.read_at(unread, from).map_err(failed)?;
                at = (read > 0).then_some(from + read as u64);
                unread = unread.get_mut(read..).unwrap_or_default();
            }
            rest = later;
        }
        Ok(())
    }
}
