//! The log of changes that were not yet written to where they belong.

use std::collections::BTreeMap;
use std::sync::Arc;

use fs_ntfs::block_io::BlockIo;
use fs_ntfs::error::Error as Theirs;
use fs_ntfs::{logfile, logfile_replay, mft_io};
use mainstay_core::{Code, Error, Result};

use super::content::Stream;
use super::record::kind_of_attribute;
use super::{Volume, own};
use crate::fs::foreign::guarded;
use crate::fs::pages::Pages;

/// The longest log that is read into memory: twice what Windows makes by itself.
const LOG_MAX: u64 = 128 << 20;

/// Bytes at the start of the log by which an empty one is known.
const HEAD: u64 = 64 << 10;

/// What the replay writes, by place on the volume.
#[derive(Clone, Default)]
pub(super) struct Overlay(Arc<BTreeMap<u64, Vec<u8>>>);

impl Overlay {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Lays what was replayed over bytes that were read from `offset` on.
    pub(super) fn apply(&self, offset: u64, bytes: &mut [u8]) {
        let end = offset + bytes.len() as u64;
        // The writes are blocks of one size each, so only one that begins before can reach in.
        let before = self.0.range(..offset).next_back();
        for (&start, written) in before.into_iter().chain(self.0.range(offset..end)) {
            let from = start.max(offset);
            let to = start.saturating_add(written.len() as u64).min(end);
            if from < to {
                let part = &written[(from - start) as usize..(to - start) as usize];
                bytes[(from - offset) as usize..(to - offset) as usize].copy_from_slice(part);
            }
        }
    }
}

/// What has to be laid over the volume; `None` when the log holds nothing to replay.
///
/// Errors: [`Code::Unsupported`] for a log that cannot be replayed completely.
pub(super) fn replay(volume: &Volume) -> Result<Option<Overlay>> {
    let log = Stream::of(&volume.file(own::LOG)?, kind_of_attribute::DATA, &[])?;
    let mut head = vec![0; log.size.min(HEAD) as usize];
    volume.read_stream(&log, 0, &mut head)?;
    if head.iter().all(|&byte| byte == 0xff) {
        return Ok(None);
    }
    let read = &mut |offset: u64, length: usize| {
        let mut bytes = vec![0; length.min(HEAD as usize)];
        volume.read_stream(&log, offset, &mut bytes).ok()?;
        (bytes.len() == length).then_some(bytes)
    };
    let state = guarded("NTFS", || Ok::<_, Theirs>(logfile::state_of_nonempty(read)), refused)?;
    if !state.needs_replay() {
        return Ok(None);
    }
    if log.size > LOG_MAX {
        return Err(Error::new(
            Code::Unsupported,
            "the log of the NTFS file system is too long to be replayed",
        )
        .hint("shut the machine down, or freeze its file systems while its disks are read"));
    }
    let mut bytes = vec![0; log.size as usize];
    volume.read_stream(&log, 0, &mut bytes)?;
    let plan = || {
        let parameters = mft_io::read_boot_params_io(&mut Device(&volume.pages))?;
        let read = &mut |offset, buffer: &mut [u8]| {
            volume.pages.read(offset, buffer).map_err(|error| Theirs::io(format!("{error:?}")))
        };
        logfile_replay::plan(&bytes, &parameters, read)
    };
    let plan = guarded("NTFS", plan, refused)?;
    for (number, place) in plan.mft_records {
        if volume.place_of_record(number) != Some(place) {
            return Err(Error::integrity("the log of the NTFS file system belongs to another one"));
        }
    }
    Ok(Some(Overlay(Arc::new(plan.writes))))
}

fn refused(error: Theirs) -> Error {
    Error::new(Code::Unsupported, "the NTFS file system was in use, and its log cannot be replayed")
        .because(error)
        .hint("shut the machine down, or freeze its file systems while its disks are read")
}

/// The volume as that crate wants it: only ever read.
struct Device<'a>(&'a Pages);

impl BlockIo for Device<'_> {
    fn read_exact_at(&mut self, offset: u64, buffer: &mut [u8]) -> std::result::Result<(), String> {
        self.0.read(offset, buffer).map_err(|error| format!("{error:?}"))
    }

    fn write_all_at(&mut self, _offset: u64, _buffer: &[u8]) -> std::result::Result<(), String> {
        Err("an image is never written".to_owned())
    }

    fn size(&self) -> u64 {
        self.0.size()
    }
}

impl Volume {
    /// Where a record of the master file table lies.
    fn place_of_record(&self, number: u64) -> Option<u64> {
        let offset = number.checked_mul(self.record_size as u64)?;
        self.table.place(offset, self.cluster_size)
    }
}
