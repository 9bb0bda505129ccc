//! Secrets on paper: fifty bytes as five lines that people type.
//!
//! Each line is ten bytes: 16 characters of Crockford's base32 (big-endian, 5 bits each) and two check characters. The
//! checks are a Reed–Solomon code over GF(32) of the line's number and characters, so one or two wrong characters, two
//! swapped ones, or a line in another's place are always noticed, and named. The last five of the fifty bytes are a digest
//! of the others: the lines belong together.

use mainstay_core::{Code, Error, Result};
use zeroize::Zeroizing;

use crate::seal::derive;

/// What is written down, without its digest.
pub(super) const BODY_LEN: usize = 45;
const CHECK_LEN: usize = 5;
const LINES: usize = 5;
const LINE_BYTES: usize = 10;
const LINE_SYMBOLS: usize = 16;
const LINE_CHECKS: usize = 2;
const CHECK_CONTEXT: &str = "mainstay 2026 recovery kit check v1";
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// Longest text that is read, in bytes.
const TEXT_LEN_MAX: usize = 64 << 10;

pub(super) type Body = Zeroizing<[u8; BODY_LEN]>;

/// The parts one after another; together they must have [`BODY_LEN`] bytes.
pub(super) fn body(parts: &[&[u8]]) -> Body {
    let mut body = Zeroizing::new([0; BODY_LEN]);
    body.iter_mut().zip(parts.iter().copied().flatten()).for_each(|(to, byte)| *to = *byte);
    body
}

/// The five lines, numbered: what a person copies from paper.
pub(super) fn write(body: &Body) -> Zeroizing<String> {
    let mut bytes = Zeroizing::new([0; LINES * LINE_BYTES]);
    let check = check(body);
    bytes.iter_mut().zip(body.iter().chain(&check)).for_each(|(to, byte)| *to = *byte);
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

/// Reads the five lines, alone or inside a page. Upper or lower case, any spaces and dashes; O is 0, I and L are 1.
///
/// Errors: [`Code::Usage`] that names the line to look at again.
pub(super) fn read(text: &str) -> Result<Body> {
    if text.len() > TEXT_LEN_MAX {
        return Err(mistyped("this is too long for a recovery kit".to_owned()));
    }
    let mut bytes = Zeroizing::new([0; LINES * LINE_BYTES]);
    let lines = find_lines(text)?;
    for ((number, line), to) in (1..).zip(&lines).zip(bytes.as_chunks_mut::<LINE_BYTES>().0) {
        *to = read_line(number, line)?;
    }
    let (body, found) =
        bytes.split_first_chunk::<BODY_LEN>().ok_or_else(|| Error::bug("a kit has another length"))?;
    let body = Zeroizing::new(*body);
    if check(&body) == found {
        Ok(body)
    } else {
        Err(mistyped("the lines are well formed but do not belong together".to_owned()))
    }
}

/// The text cut before every line of number 1, so that each piece holds the lines of one page.
pub(super) fn pages(text: &str) -> Vec<&str> {
    let mut starts = Vec::new();
    let mut at = 0;
    for line in text.split_inclusive('\n') {
        if head(line).is_some_and(|(number, _)| number == 1) {
            starts.push(at);
        }
        at += line.len();
    }
    if let Some(first) = starts.first_mut() {
        *first = 0;
    } else {
        starts.push(0);
    }
    let ends = starts.iter().skip(1).copied().chain([text.len()]);
    let pages: Vec<&str> = starts.iter().zip(ends).filter_map(|(start, end)| text.get(*start..end)).collect();
    // A line that was typed twice makes no page.
    let ends_well =
        |page: &&str| page.lines().any(|line| head(line).is_some_and(|(number, _)| number == LINES));
    if pages.iter().all(ends_well) { pages } else { vec![text] }
}

/// The number that a line begins with, and what follows it.
fn head(line: &str) -> Option<(usize, &str)> {
    let (head, rest) = line.trim().split_once([':', '.', ')'])?;
    Some((head.trim().parse().ok()?, rest))
}

fn check(body: &Body) -> [u8; CHECK_LEN] {
    let [a, b, c, d, e, ..] = derive(CHECK_CONTEXT, &[&body[..]]);
    [a, b, c, d, e]
}

pub(super) fn mistyped(what: String) -> Error {
    Error::new(Code::Usage, what).hint("Compare the lines with the printed kit, character by character.")
}

/// The lines that begin with their number and a colon, dot or bracket, or else all that is not blank, without the numbers.
fn find_lines(text: &str) -> Result<Vec<Zeroizing<String>>> {
    let numbered = |number: usize| {
        let mut found = text.lines().filter_map(move |line| {
            let (found, rest) = head(line)?;
            (found == number).then_some(rest)
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
