//! What this machine remembers of a repository between runs: the head of the log it last saw, so that a store
//! that is rolled back is noticed. Losing it loses nothing but that.

use std::path::{Path, PathBuf};

use mainstay_core::{Error, Result};

use crate::codec::{Decoder, Encode as _};
use crate::keys::FamilyId;
use crate::log::state::State;

const MAGIC: &[u8; 4] = b"MShd";

/// The folder of a repository in a directory that is private to the user.
pub(crate) fn folder(directory: &Path, family: &FamilyId) -> PathBuf {
    let name: String = family.0.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    directory.join(name)
}

/// Number of the next record, and the hash of the last one.
pub(crate) type Head = (u64, [u8; 32]);

pub(crate) struct Memory {
    head: PathBuf,
}

impl Memory {
    pub(crate) fn new(folder: &Path) -> Self {
        Self { head: folder.join("head") }
    }

    /// What was remembered last.
    pub(crate) fn remembered(&self) -> Option<Head> {
        let bytes = std::fs::read(&self.head).ok()?;
        let mut input = Decoder::new("remembered head", &bytes);
        input.expect(MAGIC).ok()?;
        let head = (input.u64().ok()?, input.array().ok()?);
        input.end().ok()?;
        Some(head)
    }

    /// Errors: [`mainstay_core::Code::Integrity`] when the log is shorter than it was, or another one.
    pub(crate) fn check(&self, (next, hash): Head, state: &State) -> Result<()> {
        if state.head_hash_at(next) != Some(hash) {
            let how = if state.next_sequence() < next {
                format!("its log ends at {}, and was at {next}", state.next_sequence())
            } else {
                format!("its log went another way before number {next}")
            };
            let what = format!("the repository was rolled back: {how}");
            return Err(Error::integrity(what).hint(format!(
                "find out who put an older copy there; if you did so yourself, remove {}",
                self.head.display()
            )));
        }
        Ok(())
    }

    /// Remembers the head at which `next` was the number of the next record. Best effort: not being able to remember
    /// must not stop a backup.
    pub(crate) fn remember(&self, next: u64, state: &State) {
        let Some(hash) = state.head_hash_at(next) else { return };
        if self.remembered().is_some_and(|(known, _)| known >= next) {
            return;
        }
        let mut bytes = Vec::new();
        bytes.fixed(MAGIC);
        bytes.u64(next);
        bytes.fixed(&hash);
        if let Some(folder) = self.head.parent() {
            let _unremembered = std::fs::create_dir_all(folder);
        }
        // A torn write is read as nothing remembered.
        let _unremembered = std::fs::write(&self.head, bytes);
    }
}
