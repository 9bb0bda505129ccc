//! What people wrote, in records that the store can read: tags, reasons, names. Only who holds the keys of the domain
//! reads the words.

use mainstay_core::{DomainId, Error, Result};

use crate::codec::{Decoder, Encode as _};
use crate::keys::{DomainKeys, FamilyId, KeyRing};
use crate::seal::{self, Siv, random_bytes};

const KEY_CONTEXT: &str = "mainstay 2026 log text v1";
/// Equal words look different each time.
const NONCE_BYTES: usize = 16;
/// Short words are all of one length.
const PADDED_BYTES_MIN: u64 = 64;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SealedText {
    domain: DomainId,
    siv: Siv,
    sealed: Vec<u8>,
}

impl SealedText {
    pub(crate) fn seal(keys: &DomainKeys, family: &FamilyId, text: &str) -> Result<Self> {
        let mut message = random_bytes::<NONCE_BYTES>()?.to_vec();
        message.bytes(text.as_bytes());
        let padded = seal::padded_len(message.len() as u64).max(PADDED_BYTES_MIN);
        message.resize(padded as usize, 0);
        let key = keys.index_key.derive(KEY_CONTEXT, &[]);
        let siv = seal::seal(&key, &associated_data(family, &keys.domain), &mut message)?;
        Ok(Self { domain: keys.domain, siv, sealed: message })
    }

    /// Errors: [`mainstay_core::Code::NoPower`] outside the domain, [`mainstay_core::Code::Integrity`].
    pub(crate) fn open(&self, ring: &KeyRing) -> Result<String> {
        let key = ring.domain(self.domain)?.index_key.derive(KEY_CONTEXT, &[]);
        let mut message = self.sealed.clone();
        let associated = associated_data(&ring.family(), &self.domain);
        seal::open(&key, &associated, &self.siv, &mut message)
            .map_err(|error: Error| error.during("cannot open a text of the log"))?;
        let mut input = Decoder::new("text of the log", &message);
        input.take(NONCE_BYTES)?;
        input.text()
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        out.fixed(&self.domain.0);
        out.fixed(&self.siv.0);
        out.bytes(&self.sealed);
    }

    pub(crate) fn decode(input: &mut Decoder<'_>) -> Result<Self> {
        Ok(Self { domain: input.id()?, siv: Siv(input.array()?), sealed: input.bytes()?.to_vec() })
    }
}

fn associated_data(family: &FamilyId, domain: &DomainId) -> Vec<u8> {
    let mut data = b"mainstay log text 1".to_vec();
    data.fixed(&family.0);
    data.fixed(&domain.0);
    data
}
