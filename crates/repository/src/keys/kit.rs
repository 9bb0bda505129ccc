//! The recovery kit: a key on paper that opens a slot of the repository when everything else is lost.
//!
//! Written down as [`super::paper`] says: version 1, the first 12 bytes of the family id, a random key of 32 bytes.

use mainstay_core::{Code, Error, Result, Time};
use zeroize::Zeroizing;

use super::paper::{self, Body};
use super::share::Share;
use super::slot::{self, About};
use super::{FamilyId, KeyRing, short};
use crate::seal::Secret;

const VERSION: u8 = 1;
const FAMILY_LEN: usize = 12;

/// The key of a recovery kit, and the repository it belongs to.
#[derive(Clone, Debug)]
pub struct Kit {
    /// The start of the family id, as much of it as was written down.
    family: Vec<u8>,
    key: Secret,
}

/// What the printed page says beside the key.
#[derive(Clone, Debug)]
pub struct Page<'a> {
    /// Where the repository is, as it is opened.
    pub location: &'a str,
    pub made: Time,
    /// Of the slot that the kit opens.
    pub label: &'a str,
}

impl Kit {
    pub fn generate(family: &FamilyId) -> Result<Self> {
        Ok(Self::with_key(family, Secret::random()?))
    }

    /// A kit that holds a given key.
    pub fn with_key(family: &FamilyId, key: Secret) -> Self {
        Self { family: family.0.iter().copied().take(FAMILY_LEN).collect(), key }
    }

    /// A kit of which only the start of the family id is known.
    pub(super) fn of_parts(family: &[u8], key: Secret) -> Self {
        Self { family: family.to_vec(), key }
    }

    pub(super) fn family(&self) -> &[u8] {
        &self.family
    }

    pub fn key(&self) -> &Secret {
        &self.key
    }

    pub fn belongs_to(&self, family: &FamilyId) -> bool {
        family.0.starts_with(&self.family)
    }

    /// The slot that this kit opens, to be stored in the repository.
    pub fn seal_slot(&self, ring: &KeyRing, about: &About) -> Result<Vec<u8>> {
        slot::seal_with_key(ring, about, &self.key)
    }

    /// Errors: as [`slot::open_with_key`]; [`Code::WrongKey`] says which repositories kit and slot belong to.
    pub fn open_slot(&self, bytes: &[u8]) -> Result<KeyRing> {
        let header = slot::read_header(bytes)?;
        if !header.family.0.starts_with(&self.family) {
            let (own, other) = (short(&self.family), short(&header.family.0));
            let what = format!("this recovery kit belongs to repository {own}, not to {other}");
            return Err(Error::new(Code::WrongKey, what)
                .hint("Look for the kit on which this repository's id is printed."));
        }
        slot::open_with_key(bytes, &self.key)
    }

    /// The five lines, numbered: what a person copies from paper.
    pub fn lines(&self) -> Zeroizing<String> {
        paper::write(&paper::body(&[&[VERSION], &self.family, &self.key[..]]))
    }

    /// Reads the five lines, alone or inside the whole page, or those of as many shares as it takes, one after another. Upper
    /// or lower case, any spaces and dashes; O is 0, I and L are 1.
    ///
    /// Errors: [`Code::Usage`] that names the line to look at again, or says how many shares are missing; [`Code::TooNew`].
    pub fn parse(text: &str) -> Result<Self> {
        let pages = paper::pages(text);
        let bodies: Vec<Body> = pages.iter().map(|page| paper::read(page)).collect::<Result<_>>()?;
        match bodies.as_slice() {
            [one] if one.first() == Some(&VERSION) => Self::of_body(one),
            _ => Share::join(&bodies.iter().map(Share::of_body).collect::<Result<Vec<_>>>()?),
        }
    }

    fn of_body(body: &Body) -> Result<Self> {
        let rest = body.get(1..).unwrap_or_default();
        let (family, key) = rest.split_at_checked(FAMILY_LEN).unwrap_or_default();
        let key = Secret::from_slice(key).ok_or_else(|| Error::bug("a kit has another length"))?;
        Ok(Self::of_parts(family, key))
    }

    /// The page to print and to keep where the backups are not.
    pub fn print(&self, page: &Page<'_>) -> Zeroizing<String> {
        page.print(
            "RECOVERY KIT",
            &self.family,
            "Whoever holds this page can read everything in the repository.\n\
             Without it, a forgotten passphrase means that the data is lost.\n\
             Print it, keep it where the repository is not, and delete the file.\n",
            &self.lines(),
            "To use it: type the five lines into a file on a machine that has Mainstay and\n\
             reaches the location above, and give that file as the key of the repository:\n\
             mainstay -r LOCATION --with-kit FILE points. ",
        )
    }
}

impl Page<'_> {
    /// The whole page: what it is, of which repository, what is to be known of it, the lines, and how they are used.
    pub(super) fn print(
        &self,
        title: &str,
        family: &[u8],
        about: &str,
        lines: &str,
        usage: &str,
    ) -> Zeroizing<String> {
        let day = jiff::Timestamp::from_second(self.made.seconds())
            .map_or_else(|_range| "unknown".to_owned(), |time| time.strftime("%Y-%m-%d").to_string());
        let (location, label) = (self.location.escape_debug(), self.label.escape_debug());
        let mut text = Zeroizing::new(String::with_capacity(2048));
        text.push_str(&format!(
            "MAINSTAY {title}\n\n\
             Repository    {}\n\
             Location      {location}\n\
             Key           {label}\n\
             Made on       {day}\n\n\
             {about}\n",
            short(family)
        ));
        for line in lines.lines() {
            text.push_str("    ");
            text.push_str(line);
            text.push('\n');
        }
        text.push('\n');
        text.push_str(usage);
        text.push_str(
            "\n\
             Case, spaces and dashes do not matter, O is read as 0, I and L as 1. The last\n\
             two characters of a line check it; a line that was mistyped is named.\n",
        );
        text
    }
}
