//! The recovery kit: a key on paper that opens a slot of the repository when everything else is lost.
//!
//! Fifty bytes: version 1, the first 12 bytes of the family id, a random key of 32 bytes, 5 bytes of a BLAKE3 digest of
//! those. Written as five lines of ten bytes, each 16 characters of Crockford's base32 (big-endian, 5 bits each) and
//! two check characters. The checks are a Reed–Solomon code over GF(32) of the line's number and characters, so
//! one or two wrong characters, two swapped ones, or a line in another's place are always noticed, and named.

use mainstay_core::{Code, Error, Result, Time};
use zeroize::Zeroizing;

use super::slot::{self, About};
use super::{FamilyId, KeyRing, short};
use crate::seal::{Secret, derive};

const VERSION: u8 = 1;
const FAMILY_LEN: usize = 12;
const CHECK_LEN: usize = 5;
const BODY_LEN: usize = 1 + FAMILY_LEN + 32;
const LINES: usize = 5;
const LINE_BYTES: usize = 10;
const LINE_SYMBOLS: usize = 16;
const LINE_CHECKS: usize = 2;
const CHECK_CONTEXT: &str = "mainstay 2026 recovery kit check v1";
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// Longest text that is read, in bytes.
const TEXT_LEN_MAX: usize = 64 << 10;

/// The key of a recovery kit, and the repository it belongs to.
#[derive(Clone, Debug)]
pub struct Kit {
    family: [u8; FAMILY_LEN],
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
        let mut prefix = [0; FAMILY_LEN];
        prefix.iter_mut().zip(family.0).for_each(|(to, byte)| *to = byte);
        Self { family: prefix, key }
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
        let mut bytes = Zeroizing::new([0; LINES * LINE_BYTES]);
        let check = self.check();
        let parts = [&[VERSION][..], &self.family, &self.key[..], &check];
        bytes.iter_mut().zip(parts.iter().copied().flatten()).for_each(|(to, byte)| *to = *byte);
        let mut text = Zeroizing::new(String::with_capacity(256));
        for (number, line) in (1..).zip(bytes.as_chunks::<LINE_BYTES>().0) {
            text.push(char::from(b'0' + number));
            text.push(':');
            let symbols = to_symbols(line);
            let checks = line_checks(number, &symbols[..]);
            for (at, symbol) in symbols.iter().chain(&checks).enumerate() {
                if at % 4 == 0 {
                    text.push(if at == 0 { ' ' } else { '-' });
                }
                text.push(ALPHABET.get(usize::from(*symbol)).map_or('?', |symbol| char::from(*symbol)));
            }
            text.push('\n');
        }
        text
    }

    /// Reads the five lines, alone or inside the whole page. Upper or lower case, any spaces and dashes; O is 0, I and
    /// L are 1.
    ///
    /// Errors: [`Code::Usage`] that names the line to look at again; [`Code::TooNew`].
    pub fn parse(text: &str) -> Result<Self> {
        if text.len() > TEXT_LEN_MAX {
            return Err(mistyped("this is too long for a recovery kit".to_owned()));
        }
        let mut bytes = Zeroizing::new([0; LINES * LINE_BYTES]);
        let lines = find_lines(text)?;
        for ((number, line), to) in (1..).zip(&lines).zip(bytes.as_chunks_mut::<LINE_BYTES>().0) {
            *to = read_line(number, line)?;
        }
        let (body, check) =
            bytes.split_first_chunk::<BODY_LEN>().ok_or_else(|| Error::bug("a kit has another length"))?;
        let [version, rest @ ..] = body;
        if *version != VERSION {
            return Err(Error::new(
                Code::TooNew,
                format!("the recovery kit has the unknown version {version}"),
            )
            .hint("Use it with a newer Mainstay."));
        }
        let (family, key) = rest.split_first_chunk().ok_or_else(|| Error::bug("a kit has another length"))?;
        let key = Secret::from_slice(key).ok_or_else(|| Error::bug("a kit has another length"))?;
        let kit = Self { family: *family, key };
        if kit.check() != check {
            return Err(mistyped("the lines are well formed but do not belong together".to_owned()));
        }
        Ok(kit)
    }

    fn check(&self) -> [u8; CHECK_LEN] {
        let [a, b, c, d, e, ..] = derive(CHECK_CONTEXT, &[&[VERSION], &self.family, &self.key[..]]);
        [a, b, c, d, e]
    }

    /// The page to print and to keep where the backups are not.
    pub fn print(&self, page: &Page<'_>) -> Zeroizing<String> {
        let day = jiff::Timestamp::from_second(page.made.seconds())
            .map_or_else(|_range| "unknown".to_owned(), |time| time.strftime("%Y-%m-%d").to_string());
        let (location, label) = (page.location.escape_debug(), page.label.escape_debug());
        let mut text = Zeroizing::new(String::with_capacity(2048));
        text.push_str(&format!(
            "MAINSTAY RECOVERY KIT\n\n\
             Repository    {}\n\
             Location      {location}\n\
             Key           {label}\n\
             Made on       {day}\n\n\
             Whoever holds this page can read everything in the repository.\n\
             Without it, a forgotten passphrase means that the data is lost.\n\
             Print it, keep it where the repository is not, and delete the file.\n\n",
            short(&self.family)
        ));
        for line in self.lines().lines() {
            text.push_str("    ");
            text.push_str(line);
            text.push('\n');
        }
        text.push_str(
            "\n\
             To use it: type the five lines into a file on a machine that has Mainstay and\n\
             reaches the location above, and give that file as the key of the repository.\n\
             Case, spaces and dashes do not matter, O is read as 0, I and L as 1. The last\n\
             two characters of a line check it; a line that was mistyped is named.\n",
        );
        text
    }
}

fn mistyped(what: String) -> Error {
    Error::new(Code::Usage, what).hint("Compare the lines with the printed kit, character by character.")
}

/// The lines that begin with their number and a colon, dot or bracket, or else all that is not blank, without the numbers.
fn find_lines(text: &str) -> Result<Vec<Zeroizing<String>>> {
    let numbered = |number: usize| {
        let mut found = text.lines().filter_map(move |line| {
            let (head, rest) = line.trim().split_once([':', '.', ')'])?;
            (head.trim().parse() == Ok(number)).then_some(rest)
        });
        (found.next(), found.next())
    };
    if (1..=LINES).all(|number| numbered(number).0.is_none()) {
        let all: Zeroizing<String> = Zeroizing::new(text.chars().filter(|c| is_symbol(*c)).collect());
        let symbols = LINE_SYMBOLS + LINE_CHECKS;
        if all.len() != LINES * symbols || !all.is_ascii() {
            let what =
                format!("a recovery kit has {LINES} lines of {symbols} characters; these are {}", all.len());
            return Err(mistyped(what));
        }
        return Ok((0..LINES)
            .map(|at| Zeroizing::new(all.chars().skip(at * symbols).take(symbols).collect()))
            .collect());
    }
    let line = |number| match numbered(number) {
        (Some(line), None) => Ok(Zeroizing::new(line.chars().filter(|c| is_symbol(*c)).collect())),
        (None, _) => Err(mistyped(format!("line {number} of the recovery kit is missing"))),
        (Some(_), Some(_)) => Err(mistyped(format!("line {number} of the recovery kit is there twice"))),
    };
    (1..=LINES).map(line).collect()
}

fn is_symbol(c: char) -> bool {
    !c.is_whitespace() && !matches!(c, '-' | '–' | '—' | '_' | '.')
}

fn read_line(number: u8, line: &str) -> Result<[u8; LINE_BYTES]> {
    let wrong = |how: String| mistyped(format!("line {number} of the recovery kit {how}"));
    let count = line.chars().count();
    if count != LINE_SYMBOLS + LINE_CHECKS {
        return Err(wrong(format!("has {count} characters rather than {}", LINE_SYMBOLS + LINE_CHECKS)));
    }
    let mut symbols = Zeroizing::new([0; LINE_SYMBOLS + LINE_CHECKS]);
    for (to, c) in symbols.iter_mut().zip(line.chars()) {
        *to = symbol(c).ok_or_else(|| wrong(format!("has a “{}”, which no kit has", c.escape_debug())))?;
    }
    let (data, checks) =
        symbols.split_first_chunk::<LINE_SYMBOLS>().ok_or_else(|| wrong("is short".to_owned()))?;
    if line_checks(number, data) != checks {
        return Err(wrong("is mistyped".to_owned()));
    }
    Ok(to_bytes(data))
}

fn symbol(c: char) -> Option<u8> {
    let c = match c.to_ascii_uppercase() {
        'O' => '0',
        'I' | 'L' => '1',
        other => other,
    };
    let at = ALPHABET.iter().position(|known| char::from(*known) == c)?;
    u8::try_from(at).ok()
}

fn to_symbols(line: &[u8; LINE_BYTES]) -> Zeroizing<[u8; LINE_SYMBOLS]> {
    let bits = line.iter().fold(0u128, |bits, byte| bits << 8 | u128::from(*byte));
    Zeroizing::new(std::array::from_fn(|at| (bits >> (5 * (LINE_SYMBOLS - 1 - at))) as u8 & 31))
}

fn to_bytes(symbols: &[u8; LINE_SYMBOLS]) -> [u8; LINE_BYTES] {
    let bits = symbols.iter().fold(0u128, |bits, symbol| bits << 5 | u128::from(*symbol));
    std::array::from_fn(|at| (bits >> (8 * (LINE_BYTES - 1 - at))) as u8)
}

/// The remainder of `number ‖ symbols ‖ 0 0` by (x - 1)(x - 2) = x² + 3x + 2 over GF(32).
fn line_checks(number: u8, symbols: &[u8]) -> [u8; LINE_CHECKS] {
    let (mut high, mut low) = (0, 0);
    for symbol in std::iter::once(&number).chain(symbols) {
        let factor = symbol ^ high;
        (high, low) = (low ^ multiply(factor, 3), multiply(factor, 2));
    }
    [high, low]
}

/// In GF(32) with x⁵ + x² + 1.
fn multiply(a: u8, b: u8) -> u8 {
    let mut product = (0..5).filter(|bit| b >> bit & 1 == 1).fold(0u16, |sum, bit| sum ^ u16::from(a) << bit);
    for bit in (5..10).rev() {
        if product >> bit & 1 == 1 {
            product ^= 0b10_0101 << (bit - 5);
        }
    }
    product as u8
}
