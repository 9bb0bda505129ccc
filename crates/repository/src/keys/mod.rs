//! Keys with separate powers, and what they are kept in.
//!
//! | power | is |
//! |---|---|
//! | write | domain keys (names, index, cutting, pages), the public halves of content and structure, a writer's signing key |
//! | read | the secret half of content |
//! | collect, expire | the secret half of structure, and a writer's signing key that the root allowed to |
//! | own | the root signing key: whoever holds it says who writes |
//!
//! A [`KeyRing`] is what one holder has of these. It is kept in a [`slot`] inside the repository, under a passphrase or
//! a random key; that key is printed as the recovery [`kit`], whole or as
//! [`share`]s of which several make it, or a ring that needs no secrecy from its own
//! machine is a [`credential`] file there.
//!
//! The power bits in a ring say what its holder may try. What others accept is decided by the records of writers that
//! the root signed.

mod bytes;
pub mod credential;
pub mod kit;
mod paper;
mod ring;
pub mod share;
pub mod slot;

use std::fmt;

use mainstay_core::{DomainId, Id16, Result};

pub use ring::KeyRing;

use crate::seal::{SealKey, Secret, derive, random_bytes};
use crate::sign::{SigningKey, VerifyingKey};

const FAMILY_CONTEXT: &str = "mainstay 2026 family id v1";

/// Names a repository and its replicas: the BLAKE3 hash of the root public key. Printed in the kit and pinned by
/// every writer, so that whoever holds the store cannot swap keys.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FamilyId(pub [u8; 32]);

impl FamilyId {
    pub fn of(root: &VerifyingKey) -> Self {
        Self(derive(FAMILY_CONTEXT, &[&root.0]))
    }

    /// The first 16 bytes, which slots carry.
    pub fn prefix(&self) -> Id16 {
        let mut prefix = Id16::default();
        prefix.0.iter_mut().zip(self.0).for_each(|(to, byte)| *to = byte);
        prefix
    }

    /// Enough for people to tell repositories apart: 16 hexadecimal digits in groups of four.
    pub fn short(&self) -> String {
        short(&self.0)
    }
}

impl fmt::Display for FamilyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for FamilyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FamilyId({})", self.short())
    }
}

/// The first eight bytes of an id.
fn short(id: &[u8]) -> String {
    let pairs: Vec<String> =
        id.chunks(2).take(4).map(|pair| pair.iter().map(|b| format!("{b:02x}")).collect()).collect();
    pairs.join("-")
}

/// What a holder may do, as bits. The numbers are part of the format.
#[derive(Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Powers(pub u32);

impl Powers {
    /// Write recovery points.
    pub const WRITE: Self = Self(1);
    /// Read content: hold the content secret.
    pub const READ: Self = Self(2);
    /// Expire recovery points.
    pub const EXPIRE: Self = Self(4);
    /// Garbage-collect: condemn and delete packs.
    pub const COLLECT: Self = Self(8);
    /// Admit and revoke writers: hold the root signing key.
    pub const OWN: Self = Self(16);

    const NAMES: [(Self, &'static str); 5] = [
        (Self::WRITE, "write"),
        (Self::READ, "read"),
        (Self::EXPIRE, "expire"),
        (Self::COLLECT, "collect"),
        (Self::OWN, "own"),
    ];

    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Display for Powers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = Self::NAMES
            .iter()
            .filter(|(power, _name)| self.contains(*power))
            .map(|(_power, name)| *name)
            .collect();
        f.write_str(if names.is_empty() { "none".to_owned() } else { names.join(", ") }.as_str())
    }
}

impl fmt::Debug for Powers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Powers({self})")
    }
}

/// The keys that the writers of one deduplication domain share.
#[derive(Clone, Debug)]
pub struct DomainKeys {
    pub domain: DomainId,
    /// Names chunks ([`crate::cut::chunk_id`]).
    pub id_key: Secret,
    /// Seals pack directories and index runs.
    pub index_key: SealKey,
    /// Cuts streams ([`crate::cut::Cutter`]).
    pub cut_key: Secret,
    /// Names and cuts the pages of trees and recipes.
    pub page_key: Secret,
}

impl DomainKeys {
    /// A new domain.
    pub fn generate() -> Result<Self> {
        Ok(Self {
            domain: Id16(random_bytes()?),
            id_key: Secret::random()?,
            index_key: SealKey::random()?,
            cut_key: Secret::random()?,
            page_key: Secret::random()?,
        })
    }
}

/// The key that everything else about a repository hangs on. Whoever has it says who writes.
#[derive(Clone, Debug)]
pub struct RootKey(SigningKey);

impl RootKey {
    pub fn generate() -> Result<Self> {
        SigningKey::generate().map(Self)
    }

    pub const fn from_signing_key(key: SigningKey) -> Self {
        Self(key)
    }

    pub fn family(&self) -> FamilyId {
        FamilyId::of(&self.0.verifying_key())
    }

    pub fn signing_key(&self) -> &SigningKey {
        &self.0
    }
}

#[cfg(test)]
mod tests;
