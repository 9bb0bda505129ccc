//! What every part of an open repository needs: the store, the keys, the log and what it says.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use mainstay_core::{BlobStore, Clock, Code, Error, Result};

use crate::config::Features;
use crate::keys::{DomainKeys, FamilyId, KeyRing, Powers};
use crate::log::Log;
use crate::log::record::Change;
use crate::log::state::State;
use crate::log::text::SealedText;
use crate::sign::SigningKey;

/// How the writer groups what it stores. The defaults suit everyone but tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// A data pack is closed near this many bytes, a pack of pages or references near a quarter of it.
    pub pack_bytes: u64,
    /// Packs are registered in the log after so many, so that an interrupted run need not store them again.
    pub register_packs: usize,
    /// Whether the packs of a repository that is made have parity; one that is there says so itself.
    pub parity: bool,
}

impl Default for Tuning {
    fn default() -> Self {
        Self { pack_bytes: 32 << 20, register_packs: 64, parity: true }
    }
}

pub(crate) struct Shared {
    pub(crate) store: Arc<dyn BlobStore>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) ring: KeyRing,
    /// Private to this user and repository: what is remembered between runs.
    pub(crate) folder: Option<PathBuf>,
    pub(crate) tuning: Tuning,
    pub(crate) log: Log,
    state: RwLock<State>,
}

impl Shared {
    pub(crate) fn new(
        ring: KeyRing,
        log: Log,
        features: Features,
        folder: Option<PathBuf>,
        tuning: Tuning,
    ) -> Self {
        let (store, clock) = (Arc::clone(&log.store), Arc::clone(&log.clock));
        Self { store, clock, ring, log, folder, tuning, state: RwLock::new(State::starting_with(features)) }
    }

    pub(crate) fn family(&self) -> &FamilyId {
        &self.log.family
    }

    /// What the log said when it was last read. Not to be held while the log may be read or appended to.
    pub(crate) fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn state_mut(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the tail of the log; whether there was anything new.
    pub(crate) fn refresh(&self) -> Result<bool> {
        Ok(self.log.read(&mut self.state_mut())? > 0)
    }

    /// As [`Shared::refresh`], looking behind records that are lost.
    pub(crate) fn refresh_past_gaps(&self) -> Result<()> {
        self.log.read_past_gaps(&mut self.state_mut()).map(drop)
    }

    /// Appends what `decide` makes of the newest state, signed as a holder of `power`; see [`Log::append`].
    /// `decide` must not ask for [`Shared::state`]: it is given it.
    pub(crate) fn append(
        &self,
        power: Powers,
        decide: &mut dyn FnMut(&State) -> Result<Change>,
    ) -> Result<u64> {
        self.append_signed_by(self.ring.writer(power)?, decide)
    }

    pub(crate) fn append_signed_by(
        &self,
        signer: &SigningKey,
        decide: &mut dyn FnMut(&State) -> Result<Change>,
    ) -> Result<u64> {
        self.log.append(&mut self.state_mut(), signer, decide)
    }

    /// Words for the log.
    pub(crate) fn seal_text(&self, text: &str) -> Result<SealedText> {
        SealedText::seal(self.domain()?, self.family(), text)
    }

    /// The keys of the domain that this holder writes to.
    pub(crate) fn domain(&self) -> Result<&DomainKeys> {
        let none =
            || Error::new(Code::NoPower, "this key has no power to look into the index of this repository");
        self.ring.domains().first().ok_or_else(none)
    }
}
