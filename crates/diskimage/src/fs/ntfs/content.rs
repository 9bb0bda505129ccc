//! Values of attributes: in records, in clusters, with holes, compressed.

use std::sync::{Arc, Mutex, PoisonError};

use fs_ntfs::compression::decompress_unit;
use mainstay_core::{Code, Error, Piece, Result};

use super::record::{Body, File, Run};
use super::{Content, Volume};
use crate::fs::foreign::guarded;

const COMPRESSED: u16 = 0x00ff;
const LZNT1: u16 = 0x0001;
const ENCRYPTED: u16 = 0x4000;

/// The largest unit of compression, in bytes: sixteen clusters of four kibibytes.
const UNIT_MAX: u64 = 64 << 10;

/// The value of an attribute, put together from all its parts.
#[derive(Clone)]
pub(super) struct Stream {
    pub(super) size: u64,
    /// Bytes that were ever written; zeros follow.
    pub(super) written: u64,
    flags: u16,
    /// Clusters that are compressed together, as a power of two.
    unit: u16,
    pub(super) body: Body,
}

impl Default for Stream {
    fn default() -> Self {
        Self { size: 0, written: 0, flags: 0, unit: 0, body: Body::Resident(Vec::new()) }
    }
}

impl Stream {
    /// The value of an attribute of that kind and name; an empty one if there is none.
    pub(super) fn of(file: &File, kind: u32, name: &[u16]) -> Result<Self> {
        let damaged =
            |why: &str| Error::integrity(format!("the content of file record {} {why}", file.number));
        let parts = file.attributes.iter().filter(|part| part.kind == kind && part.name == name);
        let mut parts: Vec<_> = parts.collect();
        parts.sort_by_key(|part| part.first);
        let Some(first) = parts.first() else { return Ok(Self::default()) };
        let mut stream = Self {
            size: first.size,
            written: first.written.min(first.size),
            flags: first.flags,
            unit: first.unit,
            body: first.body.clone(),
        };
        for part in &parts[1..] {
            let (Body::Clusters(runs), Body::Clusters(more)) = (&mut stream.body, &part.body) else {
                return Err(damaged("is there twice"));
            };
            if part.first != runs.last().map_or(0, |run| run.first + run.count) {
                return Err(damaged("lacks a part"));
            }
            runs.extend(more);
        }
        if let Body::Clusters(_) = &stream.body
            && first.first != 0
        {
            return Err(damaged("lacks its first part"));
        }
        Ok(stream)
    }

    pub(super) fn is_compressed(&self) -> bool {
        self.flags & COMPRESSED != 0
    }

    pub(super) fn check_readable(&self) -> Result<()> {
        let refuse =
            |how: &str| Err(Error::new(Code::Unsupported, format!("the content of a file is {how}")));
        if self.flags & ENCRYPTED != 0 {
            return refuse("encrypted by Windows");
        }
        match self.flags & COMPRESSED {
            0 => Ok(()),
            LZNT1 => Ok(()),
            _ => refuse("compressed in a way not known here"),
        }
    }

    /// Where a byte of the value lies on the volume.
    pub(super) fn place(&self, offset: u64, cluster_size: u64) -> Option<u64> {
        let Body::Clusters(runs) = &self.body else { return None };
        let cluster = offset / cluster_size;
        let run = run_at(runs, cluster)?;
        Some((run.place? + cluster - run.first) * cluster_size + offset % cluster_size)
    }

    /// Bytes whose places are known, and no more than the size.
    pub(super) fn known(&self, cluster_size: u64) -> u64 {
        match &self.body {
            Body::Resident(value) => value.len() as u64,
            Body::Clusters(runs) => {
                let clusters = runs.last().map_or(0, |run| run.first + run.count);
                clusters.saturating_mul(cluster_size).min(self.size)
            }
        }
    }
}

/// The run that holds a cluster of a file.
fn run_at(runs: &[Run], cluster: u64) -> Option<&Run> {
    let after = runs.partition_point(|run| run.first <= cluster);
    let run = after.checked_sub(1).and_then(|index| runs.get(index))?;
    (cluster < run.first + run.count).then_some(run)
}

impl Volume {
    /// As [`Content::read`], of what is not compressed; metadata as it is once the log is replayed.
    pub(super) fn read_piece(
        &self,
        stream: &Stream,
        offset: u64,
        buffer: &mut [u8],
        is_metadata: bool,
    ) -> Result<Piece> {
        let left = stream.size.saturating_sub(offset);
        if left == 0 || buffer.is_empty() {
            return Ok(Piece::End);
        }
        let runs = match &stream.body {
            Body::Resident(value) => {
                let from =
                    usize::try_from(offset).ok().and_then(|offset| value.get(offset..)).unwrap_or_default();
                let length = from.len().min(buffer.len());
                buffer[..length].copy_from_slice(&from[..length]);
                return Ok(Piece::Data(length));
            }
            Body::Clusters(runs) => runs,
        };
        if offset >= stream.written {
            return Ok(Piece::Hole(left));
        }
        let left = left.min(stream.written - offset);
        let (cluster, within) = (offset / self.cluster_size, offset % self.cluster_size);
        let lacks = || Error::integrity("the places of a file's content end before the content");
        let run = run_at(runs, cluster).ok_or_else(lacks)?;
        let clusters = run.first + run.count - cluster;
        let available = clusters.saturating_mul(self.cluster_size).saturating_sub(within).min(left);
        let Some(place) = run.place else { return Ok(Piece::Hole(available)) };
        let at = (place + cluster - run.first) * self.cluster_size + within;
        let length = available.min(buffer.len() as u64) as usize;
        self.pages.read(at, &mut buffer[..length])?;
        if is_metadata {
            self.overlay.apply(at, &mut buffer[..length]);
        }
        Ok(Piece::Data(length))
    }
}

/// Reads a stream, compressed or not. Remembers the unit that was unpacked last.
#[derive(Default)]
pub(super) struct Reader(Mutex<Option<(u64, Arc<[u8]>)>>);

impl Reader {
    pub(super) fn read(
        &self,
        volume: &Volume,
        stream: &Stream,
        offset: u64,
        buffer: &mut [u8],
    ) -> Result<Piece> {
        let Body::Clusters(runs) = &stream.body else {
            return volume.read_piece(stream, offset, buffer, false);
        };
        if !stream.is_compressed() || offset >= stream.written {
            return volume.read_piece(stream, offset, buffer, false);
        }
        let unit = volume.cluster_size.checked_shl(u32::from(stream.unit)).filter(|&unit| unit <= UNIT_MAX);
        let unit = unit
            .filter(|_| stream.unit > 0)
            .ok_or_else(|| Error::integrity("a unit of compression is impossible"))?;
        let left = stream.written.min(stream.size) - offset;
        let (number, within) = (offset / unit, offset % unit);
        let available = (unit - within).min(left);
        let clusters = number << stream.unit..(number + 1) << stream.unit;
        match packed(runs, clusters.clone())? {
            0 => Ok(Piece::Hole(available)),
            count if count == clusters.end - clusters.start => {
                let length = available.min(buffer.len() as u64) as usize;
                volume.read_piece(stream, offset, &mut buffer[..length], false)
            }
            count => {
                let plain = self.unpack(volume, stream, number, unit, count * volume.cluster_size)?;
                let length = available.min(buffer.len() as u64) as usize;
                buffer[..length].copy_from_slice(&plain[within as usize..within as usize + length]);
                Ok(Piece::Data(length))
            }
        }
    }

    /// One whole unit in plain; zeros follow what was packed.
    fn unpack(
        &self,
        volume: &Volume,
        stream: &Stream,
        number: u64,
        unit: u64,
        packed: u64,
    ) -> Result<Arc<[u8]>> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last, plain)) = &*held
            && *last == number
        {
            return Ok(plain.clone());
        }
        let mut bytes = vec![0; packed as usize];
        let mut done = 0;
        // The packed bytes may go on beyond the size of the file; the clusters are there all the same.
        let whole = Stream { size: u64::MAX, written: u64::MAX, ..stream.clone() };
        while done < bytes.len() {
            match volume.read_piece(&whole, number * unit + done as u64, &mut bytes[done..], false)? {
                Piece::Data(length) => done += length,
                _ => return Err(Error::integrity("a compressed part of a file has a hole")),
            }
        }
        let failed = |error| Error::integrity("a compressed part of a file is damaged").because(error);
        let mut plain = guarded("NTFS", || decompress_unit(&bytes, unit as usize), failed)?;
        plain.resize(unit as usize, 0);
        let plain: Arc<[u8]> = plain.into();
        *held = Some((number, plain.clone()));
        Ok(plain)
    }

    /// Fills the buffer, which is as long as the stream.
    pub(super) fn read_all(&self, volume: &Volume, stream: &Stream, buffer: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            done += match self.read(volume, stream, done as u64, &mut buffer[done..])? {
                Piece::Data(length) => length,
                Piece::Hole(length) => usize::try_from(length).unwrap_or(usize::MAX).min(buffer.len() - done),
                Piece::End => return Err(Error::integrity("a stream of a file ends too early")),
            };
        }
        Ok(())
    }
}

/// How many clusters at the start of a unit lie on the volume; those after them are a hole.
fn packed(runs: &[Run], clusters: std::ops::Range<u64>) -> Result<u64> {
    let mut count = 0;
    let mut ended = false;
    let mut at = clusters.start;
    while at < clusters.end {
        let Some(run) = run_at(runs, at) else { break };
        let end = (run.first + run.count).min(clusters.end);
        match run.place {
            Some(_) if ended => return Err(Error::integrity("a compressed part of a file has a hole")),
            Some(_) => count += end - at,
            None => ended = true,
        }
        at = end;
    }
    Ok(count)
}

/// The content of a file.
pub(super) struct Opened {
    volume: Arc<Volume>,
    stream: Stream,
    reader: Reader,
}

impl Opened {
    pub(super) fn new(volume: Arc<Volume>, stream: Stream) -> Self {
        Self { volume, stream, reader: Reader::default() }
    }
}

impl Content for Opened {
    fn size(&self) -> u64 {
        self.stream.size
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Piece> {
        if offset >= self.stream.size || buffer.is_empty() {
            return Ok(Piece::End);
        }
        self.reader.read(&self.volume, &self.stream, offset, buffer)
    }
}
