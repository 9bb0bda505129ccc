//! A write-only writer's own copy of the last tree it wrote. It cannot read the repository, and yet must know
//! what was there to skip unchanged items. The copy is sealed under a key derived from the writer's own; losing
//! it means reading everything again, never storing anything again.
//!
//! The file is one [`Header`] and then pages, each `reference · length · siv · ciphertext`; a torn file is read as
//! none.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{Error, Id16, PointId, Result, WorkloadId};
use rustix::fs::{FlockOperation, flock};

use crate::codec::{Decoder, Encode as _};
use crate::format::page::{PAGE_BYTES_MAX, PageRef, PageSource};
use crate::keys::KeyRing;
use crate::log::random_id;
use crate::seal::{self, SealKey, Siv};
use crate::sign::SigningKey;

const MAGIC: &[u8; 4] = b"MStc";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 4 + 2 + 16 + PAGE_REF_BYTES;
const PAGE_REF_BYTES: usize = 16 + 4 + 4 + 32;
const RECORD_BYTES: usize = PAGE_REF_BYTES + 4 + 32;

/// Where the copy of a workload's tree lies below the private directory of this repository.
pub(crate) fn path(folder: &Path, workload: &WorkloadId) -> PathBuf {
    folder.join(format!("{workload}.tree"))
}

fn key(ring: &KeyRing, writer: &SigningKey) -> SealKey {
    SealKey::from_secret(writer.seed().clone()).derive("mainstay 2026 tree copy v1", &ring.family().0)
}

/// The pages of the tree of one point, on this machine.
pub(crate) struct TreeCopy {
    file: File,
    key: SealKey,
    pub(crate) point: PointId,
    pub(crate) items: PageRef,
    /// Where the record of a page starts, and the length of its ciphertext.
    pages: HashMap<[u8; 32], (u64, u32)>,
}

impl TreeCopy {
    /// `None` when there is no copy, or none that can be read: then everything is read again.
    pub(crate) fn open(path: &Path, ring: &KeyRing, writer: &SigningKey) -> Option<Self> {
        let file = File::open(path).ok()?;
        let length = file.metadata().ok()?.len();
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0).ok()?;
        let mut input = Decoder::new("tree copy", &header);
        input.expect(MAGIC).ok()?;
        if input.u16().ok()? != VERSION {
            return None;
        }
        let (point, items) = (input.id().ok()?, PageRef::decode(&mut input).ok()?);
        let mut pages = HashMap::new();
        let mut at = HEADER_BYTES as u64;
        while at < length {
            let mut record = [0; RECORD_BYTES];
            file.read_exact_at(&mut record, at).ok()?;
            let mut input = Decoder::new("tree copy", &record);
            let (page, sealed) = (PageRef::decode(&mut input).ok()?, input.u32().ok()?);
            pages.insert(page.id, (at, sealed));
            at += RECORD_BYTES as u64 + u64::from(sealed);
        }
        (at == length).then(|| Self { file, key: key(ring, writer), point, items, pages })
    }
}

impl PageSource for TreeCopy {
    fn load(&self, page: &PageRef) -> Result<Arc<[u8]>> {
        let lost = || Error::integrity("this machine's copy of the last tree is damaged");
        let (at, sealed) = self.pages.get(&page.id).copied().ok_or_else(lost)?;
        if sealed as usize > PAGE_BYTES_MAX * 2 {
            return Err(lost());
        }
        let mut record = vec![0; RECORD_BYTES + sealed as usize];
        self.file.read_exact_at(&mut record, at).map_err(|error| lost().because(error))?;
        let mut input = Decoder::new("tree copy", &record);
        if PageRef::decode(&mut input)? != *page || input.u32()? != sealed {
            return Err(lost());
        }
        let siv = Siv(input.array()?);
        let mut message = input.take(sealed as usize)?.to_vec();
        seal::open(&self.key, &page.id, &siv, &mut message)?;
        let bytes =
            zstd::bulk::decompress(&message, PAGE_BYTES_MAX * 2).map_err(|error| lost().because(error))?;
        Ok(bytes.into())
    }
}

/// Writes the copy of the tree that is being made, beside the old one.
pub(crate) struct TreeCopyWriter {
    path: PathBuf,
    temporary: PathBuf,
    out: BufWriter<File>,
    key: SealKey,
    known: std::collections::HashSet<[u8; 32]>,
    failed: bool,
}

impl TreeCopyWriter {
    pub(crate) fn create(path: &Path, ring: &KeyRing, writer: &SigningKey) -> Result<Self> {
        let failed = |error| Error::io(format!("cannot write {}", path.display()), error);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
            sweep(folder);
        }
        let temporary = path.with_extension(format!("{}.tmp", random_id()?));
        let file =
            File::options().write(true).create_new(true).mode(0o600).open(&temporary).map_err(failed)?;
        // Held as long as this process lives: who can lock it knows that it is left over.
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| failed(error.into()))?;
        let mut out = BufWriter::new(file);
        out.write_all(&[0; HEADER_BYTES]).map_err(failed)?;
        let key = key(ring, writer);
        Ok(Self {
            path: path.to_owned(),
            temporary,
            out,
            key,
            known: std::collections::HashSet::new(),
            failed: false,
        })
    }

    /// Adds a page. A failure is remembered, and then there will be no copy.
    pub(crate) fn add(&mut self, page: &PageRef, bytes: &[u8]) {
        if !self.failed && self.known.insert(page.id) && self.write(page, bytes).is_err() {
            self.failed = true;
        }
    }

    fn write(&mut self, page: &PageRef, bytes: &[u8]) -> Result<()> {
        let failed = |error| Error::io("cannot write the copy of the tree", error);
        let mut message = zstd::bulk::compress(bytes, 1).map_err(failed)?;
        let siv = seal::seal(&self.key, &page.id, &mut message)?;
        let mut record = Vec::with_capacity(RECORD_BYTES + message.len());
        page.encode(&mut record);
        record.u32(message.len() as u32);
        record.fixed(&siv.0);
        record.fixed(&message);
        self.out.write_all(&record).map_err(failed)
    }

    /// Puts the copy in the place of the old one, now that its point exists.
    pub(crate) fn finish(mut self, point: &PointId, items: Option<&PageRef>) {
        let Some(items) = items.filter(|_| !self.failed) else { return };
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.fixed(MAGIC);
        header.u16(VERSION);
        header.fixed(&point.0);
        items.encode(&mut header);
        let written = self.out.flush().and_then(|()| {
            self.out.get_ref().write_all_at(&header, 0)?;
            self.out.get_ref().sync_data()
        });
        if written.is_ok() {
            #[expect(
                clippy::disallowed_methods,
                reason = "a cache of this machine, not a blob: it may be replaced"
            )]
            let _kept_as_it_was = std::fs::rename(&self.temporary, &self.path);
        }
    }
}

/// Removes what processes that died left behind.
fn sweep(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let is_ours = path.file_name().is_some_and(|name| is_temporary(&name.to_string_lossy()));
        let left = |file: File| flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        if is_ours && File::open(&path).is_ok_and(left) {
            let _swept_later = std::fs::remove_file(&path);
        }
    }
}

/// `WORKLOAD.RANDOM.tmp`
fn is_temporary(name: &str) -> bool {
    let parts: Vec<_> = name.split('.').collect();
    let is_id = |part: &str| part.parse::<Id16>().is_ok();
    matches!(parts[..], [workload, random, "tmp"] if is_id(workload) && is_id(random))
}

impl Drop for TreeCopyWriter {
    fn drop(&mut self) {
        let _already_renamed = std::fs::remove_file(&self.temporary);
    }
}
