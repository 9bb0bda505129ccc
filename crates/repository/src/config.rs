//! The configuration object: who the repository is. Signed by the root key, stored three times.

use mainstay_core::{BlobStore, Code, Error, Result};

use crate::codec::{Decoder, Encode as _};
use crate::keys::FamilyId;
use crate::names;
use crate::sign::{SigningKey, VerifyingKey};

const MAGIC: &[u8; 4] = b"MScf";
const VERSION: u16 = 1;
const COPIES: usize = 3;
const SIGNATURE_CONTEXT: &str = "mainstay configuration 1";
const BYTES_MAX: u64 = 64 << 10;
/// Features that a reader, a writer or a collector must know, a bit each. None yet.
const FEATURES_KNOWN: [u64; 3] = [0; 3];

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    pub(crate) family: FamilyId,
    pub(crate) root: VerifyingKey,
    /// What a reader, a writer and a collector must understand.
    pub(crate) features: [u64; 3],
}

fn name(copy: usize) -> String {
    format!("{}.{copy}", names::CONFIG)
}

impl Config {
    pub(crate) fn new(family: FamilyId, root: VerifyingKey) -> Self {
        Self { family, root, features: FEATURES_KNOWN }
    }

    fn encode(&self, root: &SigningKey) -> Vec<u8> {
        let mut out = Vec::new();
        out.fixed(MAGIC);
        out.u16(VERSION);
        out.fixed(&self.family.0);
        out.fixed(&self.root.0);
        self.features.iter().for_each(|features| out.u64(*features));
        let signature = root.sign(SIGNATURE_CONTEXT, &out);
        out.fixed(&signature);
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self> {
        let mut input = Decoder::new("configuration", bytes);
        input.expect(MAGIC)?;
        if input.u16()? != VERSION {
            return Err(Error::new(Code::TooNew, "the repository has a newer format")
                .hint("use a newer Mainstay for this repository"));
        }
        let family = FamilyId(input.array()?);
        let root = VerifyingKey(input.array()?);
        let features = [input.u64()?, input.u64()?, input.u64()?];
        let signed = bytes.get(..bytes.len() - input.remaining()).unwrap_or_default();
        let signature = input.array()?;
        input.end()?;
        if FamilyId::of(&root) != family {
            return Err(Error::integrity("the configuration's root key is not the repository's"));
        }
        root.verify(SIGNATURE_CONTEXT, signed, &signature)?;
        if features.iter().zip(FEATURES_KNOWN).any(|(used, known)| used & !known != 0) {
            return Err(Error::new(Code::TooNew, "the repository uses a feature of a newer version")
                .hint("use a newer Mainstay for this repository"));
        }
        Ok(Self { family, root, features })
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

    /// The first copy that is whole.
    ///
    /// Errors: [`Code::NoRepository`] when there is none at all, [`Code::Integrity`] when all are damaged.
    pub(crate) fn load(store: &dyn BlobStore) -> Result<Self> {
        let mut failed = None;
        for copy in 0..COPIES {
            match store.get_whole(&name(copy), BYTES_MAX).and_then(|bytes| Self::decode(&bytes)) {
                Ok(config) => return Ok(config),
                Err(error) if error.code() == Code::NotFound => {}
                Err(error) if error.code() == Code::Integrity => failed = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(match failed {
            Some(error) => Error::integrity("every copy of the configuration is damaged").because(error),
            None => Error::new(Code::NoRepository, format!("there is no repository at {}", store.location()))
                .hint("make one with `mainstay init`, or name another place with --repository"),
        })
    }
}
