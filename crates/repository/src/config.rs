//! The configuration object: who the repository is. Signed by the root key, stored three times.

use mainstay_core::{BlobStore, Code, Error, Id16, Result};

use crate::codec::{Decoder, Encode as _};
use crate::keys::FamilyId;
use crate::log::record::LogId;
use crate::names;
use crate::seal::random_bytes;
use crate::sign::{SIGNATURE_LEN, SigningKey, VerifyingKey};

const MAGIC: &[u8; 4] = b"MScf";
const VERSION: u16 = 1;
const COPIES: usize = 3;
const SIGNATURE_CONTEXT: &str = "mainstay configuration 1";
const BYTES_MAX: u64 = 64 << 10;
/// Later field: whether packs have parity. Who does not know it writes packs without.
const FIELD_PARITY: u8 = 128;

/// What somebody is about to do with a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Duty {
    Read,
    Write,
    Collect,
}

/// What a reader, a writer and a collector must know beyond version 1, a bit each. None is defined yet: a bit set here,
/// or later by a record of the log, stops whoever does not know it from that duty, and from no other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features([u64; 3]);

const KNOWN: Features = Features([0; 3]);

impl Features {
    pub(crate) fn add(&mut self, more: &Self) {
        self.0.iter_mut().zip(more.0).for_each(|(bits, more)| *bits |= more);
    }

    #[cfg(test)]
    pub(crate) fn with_bits(bits: [u64; 3]) -> Self {
        Self(bits)
    }

    /// Errors: [`Code::TooNew`] when `duty` asks for something that this version does not know.
    pub(crate) fn require(&self, duty: Duty) -> Result<()> {
        let mut bits = self.0.iter().zip(KNOWN.0).map(|(used, known)| used & !known);
        let what = match duty {
            _ if bits.next() != Some(0) => "read this repository",
            Duty::Read => return Ok(()),
            Duty::Write if bits.next() != Some(0) => "write to this repository",
            Duty::Collect if bits.nth(1) != Some(0) => "expire or collect in this repository",
            _ => return Ok(()),
        };
        Err(Error::new(Code::TooNew, format!("to {what} one must know a feature of a newer version"))
            .hint("use a newer Mainstay for this repository"))
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        self.0.iter().for_each(|bits| out.u64(*bits));
    }

    pub(crate) fn decode(input: &mut Decoder<'_>) -> Result<Self> {
        Ok(Self([input.u64()?, input.u64()?, input.u64()?]))
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) family: FamilyId,
    /// Random: tells the copies of one family apart, each of which has a log of its own.
    copy: Id16,
    pub(crate) root: VerifyingKey,
    pub(crate) features: Features,
    /// Whether packs are to have parity; a choice of the medium.
    pub(crate) parity: bool,
}

fn name(copy: usize) -> String {
    format!("{}.{copy}", names::CONFIG)
}

impl Config {
    pub(crate) fn new(family: FamilyId, root: VerifyingKey, parity: bool) -> Result<Self> {
        Ok(Self { family, copy: Id16(random_bytes()?), root, features: KNOWN, parity })
    }

    pub(crate) fn log_id(&self) -> LogId {
        LogId::of(&self.family, &self.copy)
    }

    fn encode(&self, root: &SigningKey) -> Vec<u8> {
        let mut out = Vec::new();
        out.fixed(MAGIC);
        out.u16(VERSION);
        out.fixed(&self.family.0);
        out.fixed(&self.copy.0);
        out.fixed(&self.root.0);
        self.features.encode(&mut out);
        if self.parity {
            out.u8(FIELD_PARITY);
            out.bytes(&[1]);
        }
        let signature = root.sign(SIGNATURE_CONTEXT, &out);
        out.fixed(&signature);
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        let (signed, signature) = bytes
            .split_last_chunk::<SIGNATURE_LEN>()
            .ok_or_else(|| Error::integrity("the configuration is too short"))?;
        let mut input = Decoder::new("configuration", signed);
        input.expect(MAGIC)?;
        if input.u16()? != VERSION {
            return Err(Error::new(Code::TooNew, "the repository has a newer format")
                .hint("use a newer Mainstay for this repository"));
        }
        let (family, copy) = (FamilyId(input.array()?), input.id()?);
        let root = VerifyingKey(input.array()?);
        let features = Features::decode(&mut input)?;
        if FamilyId::of(&root) != family {
            return Err(Error::integrity("the configuration's root key is not the repository's"));
        }
        root.verify(SIGNATURE_CONTEXT, signed, signature)?;
        let parity = input.later_field(FIELD_PARITY)?.is_some_and(|value| value == [1]);
        Ok(Self { family, copy, root, features, parity })
    }

    /// Errors: [`Code::AlreadyExists`] when there is a repository already.
    pub(crate) fn store(&self, store: &dyn BlobStore, root: &SigningKey) -> Result<()> {
        let bytes = self.encode(root);
        for copy in 0..COPIES {
            if store.put_new(&name(copy), &[&bytes])? == mainstay_core::Put::Exists && copy == 0 {
                let what = format!("{} holds a repository already", store.location());
                return Err(
                    Error::new(Code::AlreadyExists, what).hint("choose another place, or use the one there")
                );
            }
        }
        store.flush()
    }

    /// The first copy that is whole and, when `family` says so, of that repository.
    ///
    /// Errors: [`Code::NoRepository`] when there is none at all, [`Code::Integrity`] when all are damaged,
    /// [`Code::WrongKey`] when they are of another repository.
    pub(crate) fn load(store: &dyn BlobStore, family: Option<&FamilyId>) -> Result<Self> {
        let mut failed = None;
        for copy in 0..COPIES {
            match Self::load_copy(store, copy) {
                Ok(config) if family.is_none_or(|family| config.family == *family) => return Ok(config),
                Ok(config) => {
                    let what = format!("this key does not belong to repository {}", config.family.short());
                    let hint = "use the key that was made with this repository";
                    failed = Some(Error::new(Code::WrongKey, what).hint(hint));
                }
                Err(error) if error.code() == Code::NotFound => {}
                Err(error) if matches!(error.code(), Code::Integrity | Code::TooNew) => {
                    failed.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(match failed {
            Some(error) if error.code() == Code::Integrity => {
                Error::integrity("every copy of the configuration is damaged").because(error)
            }
            Some(error) => error,
            None => Error::new(Code::NoRepository, format!("there is no repository at {}", store.location()))
                .hint("make one with `mainstay init`, or name another place with --repository"),
        })
    }

    fn load_copy(store: &dyn BlobStore, copy: usize) -> Result<Self> {
        Self::decode(&store.get_whole(&name(copy), BYTES_MAX)?)
    }

    /// What is wrong with the copies of the configuration of `family`, one line each.
    pub(crate) fn damaged_copies(store: &dyn BlobStore, family: &FamilyId) -> Vec<String> {
        let wrong = |copy| match Self::load_copy(store, copy) {
            Ok(config) if config.family == *family => None,
            Ok(_) => Some(format!("{} is of another repository", name(copy))),
            Err(error) => Some(format!("{}: {}", name(copy), error.chain().join(": "))),
        };
        (0..COPIES).filter_map(wrong).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{Config, FamilyId, SIGNATURE_CONTEXT, SigningKey};

    #[test]
    fn hostile_configurations_are_errors_and_later_fields_are_not() {
        let root = SigningKey::generate().unwrap();
        let config = Config::new(FamilyId::of(&root.verifying_key()), root.verifying_key(), true).unwrap();
        let bytes = config.encode(&root);
        crate::hostile::feed(&bytes, 1 << 16, |other| {
            assert!(Config::decode(other).is_err() || other == bytes);
        });
        let mut longer = bytes[..bytes.len() - 64].to_vec();
        longer.extend([129, 2, 7, 7]);
        let signature = root.sign(SIGNATURE_CONTEXT, &longer);
        longer.extend(signature);
        assert_eq!(Config::decode(&longer).unwrap(), config);
    }
}
