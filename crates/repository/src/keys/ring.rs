//! What one holder can do, and its bytes.

use mainstay_core::{Code, DomainId, Error, Id16, Result};
use zeroize::Zeroizing;

use super::bytes::Bytes;
use super::{DomainKeys, FamilyId, Powers, RootKey};
use crate::seal::{SealKey, Secret};
use crate::sign::{SigningKey, VerifyingKey};
use crate::wrap::{PUBLIC_LEN, WrapPublic, WrapSecret};

const MAGIC: &[u8; 8] = b"MSTYRING";
const VERSION: u16 = 1;
/// The powers that a writer's signing key can have.
const SIGNING: Powers = Powers::WRITE.with(Powers::EXPIRE).with(Powers::COLLECT);
const LEN_AT: usize = 10;
const HEAD_LEN: usize = 14;
/// Longest encoding that is read, in bytes: thousands of domains.
pub(super) const RING_LEN_MAX: usize = 1 << 20;
/// A tag with this bit may be passed over by who does not know it.
const OPTIONAL: u16 = 1 << 15;

mod tag {
    pub(super) const ROOT_PUBLIC: u16 = 1;
    pub(super) const ROOT_SECRET: u16 = 2;
    pub(super) const CONTENT_PUBLIC: u16 = 3;
    pub(super) const CONTENT_SECRET: u16 = 4;
    pub(super) const STRUCTURE_PUBLIC: u16 = 5;
    pub(super) const STRUCTURE_SECRET: u16 = 6;
    pub(super) const DOMAIN: u16 = 7;
    pub(super) const WRITER: u16 = 8;
}

/// The keys of one holder. Making a lesser ring from a greater one is the only way that powers are handed on.
#[derive(Clone, Debug)]
pub struct KeyRing {
    root_public: VerifyingKey,
    root: Option<RootKey>,
    content: Half,
    structure: Half,
    domains: Vec<DomainKeys>,
    writer: Option<Writer>,
}

/// A key pair of which the secret half may be missing.
#[derive(Clone, Debug)]
struct Half {
    public: WrapPublic,
    secret: Option<WrapSecret>,
}

impl Half {
    fn from_secret(secret: WrapSecret) -> Result<Self> {
        Ok(Self { public: secret.public()?, secret: Some(secret) })
    }

    fn public_only(&self) -> Self {
        Self { public: self.public.clone(), secret: None }
    }
}

#[derive(Clone, Debug)]
struct Writer {
    key: SigningKey,
    powers: Powers,
}

impl KeyRing {
    /// The owner's ring of a new repository: every power, and one domain.
    pub fn create() -> Result<Self> {
        let root = RootKey::generate()?;
        Ok(Self {
            root_public: root.signing_key().verifying_key(),
            root: Some(root),
            content: Half::from_secret(WrapSecret::generate()?)?,
            structure: Half::from_secret(WrapSecret::generate()?)?,
            domains: vec![DomainKeys::generate()?],
            writer: Some(Writer { key: SigningKey::generate()?, powers: SIGNING }),
        })
    }

    /// For an agent: writes to the domains of this ring, reads nothing, deletes nothing.
    #[must_use]
    pub fn write_only(&self, writer: SigningKey) -> Self {
        Self { writer: Some(Writer { key: writer, powers: Powers::WRITE }), ..self.without_powers() }
    }

    /// For whoever frees space: expires and garbage-collects, reads no content. Holding the domains' keys it can tell
    /// whether bytes it guesses are stored.
    ///
    /// Errors: [`Code::NoPower`] when this ring cannot collect itself.
    pub fn collector(&self, writer: SigningKey) -> Result<Self> {
        self.structure_secret()?;
        let powers = Powers::EXPIRE.with(Powers::COLLECT);
        Ok(Self {
            structure: self.structure.clone(),
            writer: Some(Writer { key: writer, powers }),
            ..self.without_powers()
        })
    }

    /// For a restore: reads everything, changes nothing.
    ///
    /// Errors: [`Code::NoPower`] when this ring cannot read itself.
    pub fn reader(&self) -> Result<Self> {
        self.content_secret()?;
        Ok(Self { content: self.content.clone(), ..self.without_powers() })
    }

    /// This ring with the named domains only.
    ///
    /// Errors: [`Code::NoPower`] when it lacks one of them.
    pub fn within(&self, domains: &[DomainId]) -> Result<Self> {
        let kept: Result<_> = domains.iter().map(|domain| self.domain(*domain).cloned()).collect();
        Ok(Self { domains: kept?, ..self.clone() })
    }

    /// Adds a domain, for a workload or agent that shares nothing with others.
    ///
    /// Errors: [`Code::AlreadyExists`].
    pub fn add_domain(&mut self, keys: DomainKeys) -> Result<()> {
        if self.domains.iter().any(|known| known.domain == keys.domain) {
            return Err(Error::new(
                Code::AlreadyExists,
                format!("the key ring holds domain {} already", keys.domain),
            ));
        }
        self.domains.push(keys);
        Ok(())
    }

    /// Everything that is public, and the domains.
    fn without_powers(&self) -> Self {
        Self {
            root: None,
            content: self.content.public_only(),
            structure: self.structure.public_only(),
            writer: None,
            ..self.clone()
        }
    }

    pub fn family(&self) -> FamilyId {
        FamilyId::of(&self.root_public)
    }

    pub fn root_public(&self) -> VerifyingKey {
        self.root_public
    }

    /// What the holder may try, from what the ring holds.
    pub fn powers(&self) -> Powers {
        let held = |held: bool, power| if held { power } else { Powers::default() };
        self.writer
            .as_ref()
            .map_or(Powers::default(), |writer| writer.powers)
            .with(held(self.content.secret.is_some(), Powers::READ))
            .with(held(self.root.is_some(), Powers::OWN))
    }

    pub fn content_public(&self) -> &WrapPublic {
        &self.content.public
    }

    pub fn structure_public(&self) -> &WrapPublic {
        &self.structure.public
    }

    /// Errors: [`Code::NoPower`] when the holder does not read.
    pub fn content_secret(&self) -> Result<&WrapSecret> {
        self.content.secret.as_ref().ok_or_else(|| self.lacks(Powers::READ))
    }

    /// Errors: [`Code::NoPower`] when the holder does not collect.
    pub fn structure_secret(&self) -> Result<&WrapSecret> {
        self.structure.secret.as_ref().ok_or_else(|| self.lacks(Powers::COLLECT))
    }

    /// Errors: [`Code::NoPower`] when the holder signs nothing, or not with this power.
    pub fn writer(&self, power: Powers) -> Result<&SigningKey> {
        let able = self.writer.as_ref().filter(|writer| writer.powers.contains(power));
        able.map(|writer| &writer.key).ok_or_else(|| self.lacks(power))
    }

    /// Errors: [`Code::NoPower`] when the holder is not the owner.
    pub fn root(&self) -> Result<&RootKey> {
        self.root.as_ref().ok_or_else(|| self.lacks(Powers::OWN))
    }

    pub fn domains(&self) -> &[DomainKeys] {
        &self.domains
    }

    /// Errors: [`Code::NoPower`] when the holder is outside that circle of trust.
    pub fn domain(&self, id: DomainId) -> Result<&DomainKeys> {
        let missing = || {
            Error::new(Code::NoPower, format!("this key does not belong to domain {id}"))
                .hint("Use the owner's key, or one that was made for this domain.")
        };
        self.domains.iter().find(|keys| keys.domain == id).ok_or_else(missing)
    }

    fn lacks(&self, power: Powers) -> Error {
        let what = format!("this key has no power to {power} (it has: {})", self.powers());
        Error::new(Code::NoPower, what)
            .hint("Use a key that has it: the owner's passphrase or the recovery kit.")
    }

    /// The bytes of docs/format.md, section "Key ring". As secret as what they hold.
    pub fn encode(&self) -> Zeroizing<Vec<u8>> {
        // Never grown, as growing would leave copies behind.
        let mut out = Zeroizing::new(Vec::with_capacity(4096 + self.domains.len() * 160));
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        put(&mut out, tag::ROOT_PUBLIC, &[&self.root_public.0]);
        if let Some(root) = &self.root {
            put(&mut out, tag::ROOT_SECRET, &[&root.signing_key().seed()[..]]);
        }
        put_half(&mut out, &self.content, tag::CONTENT_PUBLIC, tag::CONTENT_SECRET);
        put_half(&mut out, &self.structure, tag::STRUCTURE_PUBLIC, tag::STRUCTURE_SECRET);
        for keys in &self.domains {
            let DomainKeys { domain, id_key, index_key, cut_key, page_key } = keys;
            put(
                &mut out,
                tag::DOMAIN,
                &[&domain.0, &id_key[..], index_key.as_bytes(), &cut_key[..], &page_key[..]],
            );
        }
        if let Some(writer) = &self.writer {
            put(&mut out, tag::WRITER, &[&writer.key.seed()[..], &writer.powers.0.to_le_bytes()]);
        }
        // How long the parts are, so that a ring cut short between two of them is noticed.
        let len = (out.len() - HEAD_LEN) as u32;
        if let Some(field) = out.get_mut(LEN_AT..HEAD_LEN) {
            field.copy_from_slice(&len.to_le_bytes());
        }
        out
    }

    /// Errors: [`Code::Integrity`] for bytes that are no key ring, [`Code::TooNew`] for one with a version or part that
    /// this release does not know.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let mut parts = Parts::default();
        let mut bytes = Bytes::new(bytes, "key ring");
        if bytes.len() > RING_LEN_MAX || bytes.array()? != *MAGIC {
            return Err(bytes.broken("does not begin as one"));
        }
        let version = bytes.u16()?;
        if version != VERSION {
            return Err(too_new(&format!("version {version}")));
        }
        if bytes.u32()? as usize != bytes.len() {
            return Err(bytes.broken("is not as long as it says"));
        }
        let mut last = 0;
        while !bytes.is_empty() {
            let (tag, len) = (bytes.u16()?, bytes.u32()?);
            if tag < last || (tag == last && tag != tag::DOMAIN) {
                return Err(bytes.broken("has parts out of order"));
            }
            last = tag;
            parts.take(tag, Bytes::new(bytes.take(len as usize)?, "key ring"))?;
        }
        parts.assemble()
    }
}

fn put(out: &mut Vec<u8>, tag: u16, values: &[&[u8]]) {
    let len: usize = values.iter().map(|value| value.len()).sum();
    out.extend_from_slice(&tag.to_le_bytes());
    // Every part is shorter than 2 KiB.
    out.extend_from_slice(&(len as u32).to_le_bytes());
    values.iter().for_each(|value| out.extend_from_slice(value));
}

/// The secret half, from which the public one follows, or the public half.
fn put_half(out: &mut Vec<u8>, half: &Half, public_tag: u16, secret_tag: u16) {
    match &half.secret {
        Some(secret) => put(out, secret_tag, &[&secret.secret()[..]]),
        None => put(out, public_tag, &[&half.public.to_bytes()]),
    }
}

fn too_new(what: &str) -> Error {
    Error::new(Code::TooNew, format!("the key ring has the unknown {what}"))
        .hint("Open it with a newer Mainstay.")
}

/// What was read so far.
#[derive(Default)]
struct Parts {
    root_public: Option<VerifyingKey>,
    root: Option<RootKey>,
    content: Option<Half>,
    structure: Option<Half>,
    domains: Vec<DomainKeys>,
    writer: Option<Writer>,
}

impl Parts {
    fn take(&mut self, tag: u16, mut value: Bytes<'_>) -> Result<()> {
        match tag {
            tag::ROOT_PUBLIC => self.root_public = Some(VerifyingKey(value.last()?)),
            tag::ROOT_SECRET => {
                let key = SigningKey::from_seed(Secret::new(value.last()?))?;
                self.root = Some(RootKey::from_signing_key(key));
            }
            tag::CONTENT_PUBLIC | tag::CONTENT_SECRET => once(&mut self.content, half(value)?)?,
            tag::STRUCTURE_PUBLIC | tag::STRUCTURE_SECRET => once(&mut self.structure, half(value)?)?,
            tag::DOMAIN => self.domains.push(DomainKeys {
                domain: Id16(value.array()?),
                id_key: Secret::new(value.array()?),
                index_key: SealKey::new(value.array()?),
                cut_key: Secret::new(value.array()?),
                page_key: Secret::new(value.last()?),
            }),
            tag::WRITER => {
                let key = SigningKey::from_seed(Secret::new(value.array()?))?;
                // The powers that go with a signing key; the others go with other keys, and are not taken on trust.
                let powers = Powers(u32::from_le_bytes(value.last()?) & SIGNING.0);
                self.writer = Some(Writer { key, powers });
            }
            unknown if unknown & OPTIONAL != 0 => {}
            unknown => return Err(too_new(&format!("part {unknown}"))),
        }
        Ok(())
    }

    fn assemble(self) -> Result<KeyRing> {
        let broken = |how: &str| Error::integrity(format!("the key ring {how}"));
        let missing = || broken("lacks a part");
        let ring = KeyRing {
            root_public: self.root_public.ok_or_else(missing)?,
            root: self.root,
            content: self.content.ok_or_else(missing)?,
            structure: self.structure.ok_or_else(missing)?,
            domains: self.domains,
            writer: self.writer,
        };
        if ring.root.as_ref().is_some_and(|root| root.signing_key().verifying_key() != ring.root_public) {
            return Err(broken("holds the root key of another repository"));
        }
        let mut ids: Vec<_> = ring.domains.iter().map(|keys| keys.domain).collect();
        ids.sort_unstable();
        ids.dedup();
        if ids.len() != ring.domains.len() {
            return Err(broken("holds a domain twice"));
        }
        Ok(ring)
    }
}

/// A public half or a secret one: their lengths differ.
fn half(mut value: Bytes<'_>) -> Result<Half> {
    if value.len() == PUBLIC_LEN {
        return Ok(Half { public: WrapPublic::from_bytes(value.take(PUBLIC_LEN)?)?, secret: None });
    }
    Half::from_secret(WrapSecret::from_secret(Secret::new(value.last()?)))
}

fn once<T>(slot: &mut Option<T>, value: T) -> Result<()> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_earlier) => Err(Error::integrity("the key ring holds a part twice")),
    }
}
