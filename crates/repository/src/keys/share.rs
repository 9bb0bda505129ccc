//! A recovery kit shared out: any so many of its pages make the kit, and fewer tell nothing of it.
//!
//! Shamir's scheme (Communications of the ACM 22, 1979) for each byte of the key over GF(2^8) with x⁸ + x⁴ + x³ + x + 1: a
//! polynomial of degree one less than the shares that are needed has the byte at 0, and share n has its value at n. Written
//! down as [`super::paper`] says: version 2, the share's number, how many are needed, two random bytes that all shares of one
//! kit have in common, the first 8 bytes of the family id, 32 values.
//!
//! Our own, because a page that was printed must be read by every later version, so that the scheme is part of the format; and
//! because it is a few lines.

use std::collections::BTreeMap;

use mainstay_core::{Code, Error, Result};
use zeroize::Zeroizing;

use super::kit::{Kit, Page};
use super::paper::{self, Body, mistyped};
use super::short;
use crate::seal::{Secret, random_bytes};

const VERSION: u8 = 2;
const FAMILY_LEN: usize = 8;
/// More than anybody hands out; a number is one digit or two on the page.
const SHARES_MAX: u8 = 20;

/// One page of a kit that was shared out.
pub struct Share {
    number: u8,
    needed: u8,
    set: [u8; 2],
    family: [u8; FAMILY_LEN],
    value: Secret,
}

impl Share {
    /// Makes `shares` pages of which any `needed` make the kit.
    ///
    /// Errors: [`Code::Usage`] for numbers that make no sense.
    pub fn split(kit: &Kit, shares: u8, needed: u8) -> Result<Vec<Self>> {
        if !(2..=SHARES_MAX).contains(&shares) || !(2..=shares).contains(&needed) {
            let what = format!("{needed} of {shares} pages cannot be made");
            return Err(Error::new(Code::Usage, what).hint(format!(
                "at least 2 are needed, at most as many as there are, and there are at most {SHARES_MAX}"
            )));
        }
        let set = random_bytes()?;
        let mut family = [0; FAMILY_LEN];
        family.iter_mut().zip(kit.family()).for_each(|(to, byte)| *to = *byte);
        // By degree: the key itself, then as many as it takes.
        let mut polynomials = vec![kit.key().clone()];
        for _ in 1..needed {
            polynomials.push(Secret::random()?);
        }
        let share = |number: u8| {
            let mut value = Zeroizing::new([0; 32]);
            for coefficients in polynomials.iter().rev() {
                let coefficients = coefficients.iter();
                value.iter_mut().zip(coefficients).for_each(|(sum, one)| *sum = multiply(*sum, number) ^ one);
            }
            Self { number, needed, set, family, value: Secret::new(*value) }
        };
        Ok((1..=shares).map(share).collect())
    }

    /// The kit that shares make.
    ///
    /// Errors: [`Code::Usage`] when there are too few, or they are of several kits.
    pub fn join(shares: &[Self]) -> Result<Kit> {
        let Some(first) = shares.first() else {
            return Err(mistyped("there is no recovery kit in this".to_owned()));
        };
        let mut known: BTreeMap<u8, &Self> = BTreeMap::new();
        for share in shares {
            if (share.set, share.needed, share.family) != (first.set, first.needed, first.family) {
                let what = format!("page {} belongs to another kit than page {}", share.number, first.number);
                return Err(Error::new(Code::Usage, what)
                    .hint("pages that were made together have the same day and repository"));
            }
            known.insert(share.number, share);
        }
        let (needed, numbers) =
            (usize::from(first.needed), known.keys().map(u8::to_string).collect::<Vec<_>>());
        if known.len() < needed {
            let what = format!("{needed} pages of this kit are needed, and there is {}", numbers.join(", "));
            return Err(Error::new(Code::Usage, what)
                .hint("put the lines of the others into the same file, below each other"));
        }
        let chosen: Vec<&Self> = known.into_values().take(needed).collect();
        let mut key = Zeroizing::new([0; 32]);
        for share in &chosen {
            // Lagrange's polynomial of this share, at 0.
            let others = chosen.iter().filter(|other| other.number != share.number);
            let weight = others.fold(1, |product, other| {
                multiply(product, multiply(other.number, inverse(other.number ^ share.number)))
            });
            key.iter_mut().zip(share.value.iter()).for_each(|(sum, value)| *sum ^= multiply(*value, weight));
        }
        Ok(Kit::of_parts(&first.family, Secret::new(*key)))
    }

    pub fn number(&self) -> u8 {
        self.number
    }

    /// The five lines, numbered.
    pub fn lines(&self) -> Zeroizing<String> {
        let head = [VERSION, self.number, self.needed];
        paper::write(&paper::body(&[&head, &self.set, &self.family, &self.value[..]]))
    }

    pub(super) fn of_body(body: &Body) -> Result<Self> {
        let [version, number, needed, first, second, rest @ ..] = &**body;
        match *version {
            VERSION => {}
            1 => {
                return Err(mistyped(
                    "there is a whole recovery kit beside other pages; use it alone".to_owned(),
                ));
            }
            other => {
                let what = format!("the recovery kit has the unknown version {other}");
                return Err(Error::new(Code::TooNew, what).hint("Use it with a newer Mainstay."));
            }
        }
        let (family, value) =
            rest.split_first_chunk().ok_or_else(|| Error::bug("a share has another length"))?;
        let value = Secret::from_slice(value).ok_or_else(|| Error::bug("a share has another length"))?;
        if !(1..=SHARES_MAX).contains(number) || !(2..=SHARES_MAX).contains(needed) {
            return Err(mistyped("a page says of itself what no page is".to_owned()));
        }
        Ok(Self { number: *number, needed: *needed, set: [*first, *second], family: *family, value })
    }

    /// The page to print, for one of those who keep the kit together.
    pub fn print(&self, page: &Page<'_>) -> Zeroizing<String> {
        let title = format!("RECOVERY KIT, PAGE {}", self.number);
        let about = format!(
            "Any {} pages of this kit together can read everything in the repository;\n\
             fewer tell nothing. Give each to somebody else, and delete the files.\n\
             This kit has the mark {:02x}{:02x}.\n",
            self.needed, self.set[0], self.set[1]
        );
        let usage = format!(
            "To use it: type the five lines of {} pages into one file, below each other, on a\n\
             machine that has Mainstay and reaches the location above:\n\
             mainstay -r LOCATION --with-kit FILE points. ",
            self.needed
        );
        page.print(&title, &self.family, &about, &self.lines(), &usage)
    }
}

impl std::fmt::Debug for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "share {} of {}", self.number, short(&self.family))
    }
}

/// In GF(2^8), without looking anything up and without branches: neither factor shows in the time it takes.
fn multiply(a: u8, b: u8) -> u8 {
    let (mut product, mut a) = (0, a);
    for bit in 0..8 {
        product ^= a & 0u8.wrapping_sub(b >> bit & 1);
        a = a << 1 ^ 0x1b & 0u8.wrapping_sub(a >> 7);
    }
    product
}

/// `a` to the power of 254.
fn inverse(a: u8) -> u8 {
    let square = |a| multiply(a, a);
    (0..6).fold(square(a), |product, _| square(multiply(product, a)))
}

#[cfg(test)]
mod tests {
    use mainstay_core::{Code, Time};

    use super::{Kit, Page, Secret, Share, inverse, multiply};
    use crate::keys::FamilyId;

    fn kit() -> Kit {
        Kit::with_key(&FamilyId([7; 32]), Secret::random().unwrap())
    }

    #[test]
    fn any_so_many_pages_make_the_kit_and_fewer_do_not() {
        let kit = kit();
        for (count, needed) in [(2, 2), (3, 2), (5, 3), (6, 6), (20, 2)] {
            let shares = Share::split(&kit, count, needed).unwrap();
            let pages: Vec<_> = shares.iter().map(|share| share.lines().to_string()).collect();
            for chosen in 0u32..1 << count.min(6) {
                let text: String = (0..6)
                    .filter(|at| chosen >> at & 1 == 1)
                    .filter_map(|at| pages.get(at as usize).cloned())
                    .collect();
                let joined = Kit::parse(&text);
                if chosen.count_ones() >= u32::from(needed) {
                    let joined = joined.unwrap();
                    assert_eq!(joined.key()[..], kit.key()[..], "{chosen:b} of {count}");
                    assert!(joined.belongs_to(&FamilyId([7; 32])) && !joined.belongs_to(&FamilyId([8; 32])));
                } else {
                    assert_eq!(joined.unwrap_err().code(), Code::Usage);
                }
            }
        }
        for (count, needed) in [(1, 1), (3, 1), (3, 4), (21, 2), (0, 0)] {
            assert_eq!(Share::split(&kit, count, needed).unwrap_err().code(), Code::Usage);
        }
    }

    /// Fewer pages than are needed fit every key.
    #[test]
    fn a_page_less_says_nothing_of_the_key() {
        let mut seen = [0u32; 256];
        for _ in 0..2000 {
            let share =
                &Share::split(&Kit::with_key(&FamilyId([7; 32]), Secret::new([42; 32])), 2, 2).unwrap()[0];
            share.value.iter().for_each(|byte| seen[usize::from(*byte)] += 1);
        }
        // 64,000 bytes, 250 of each on average; 15.8 standard deviations are 250.
        assert!(seen.iter().all(|count| (130..=370).contains(count)), "{seen:?}");
    }

    #[test]
    fn whole_pages_are_read_and_pages_of_other_kits_are_told_apart() {
        let kit = kit();
        let page =
            Page { location: "/srv/backup", made: Time::from_seconds(1_800_000_000), label: "recovery kit" };
        let shares = Share::split(&kit, 3, 2).unwrap();
        let printed: Vec<_> = shares.iter().map(|share| share.print(&page).to_string()).collect();
        assert!(printed[1].contains("PAGE 2") && printed[1].contains("Any 2 pages"), "{}", printed[1]);
        let both = [printed[2].as_str(), printed[0].as_str()].join("\n");
        assert_eq!(Kit::parse(&both).unwrap().key()[..], kit.key()[..]);
        let alone = Kit::parse(&printed[0]).unwrap_err();
        assert!(alone.what().contains("2 pages of this kit are needed"), "{alone}");
        let twice = Kit::parse(&[printed[0].as_str(), printed[0].as_str()].concat()).unwrap_err();
        assert!(twice.what().contains("2 pages of this kit are needed"), "{twice}");
        let other = Share::split(&kit, 3, 2).unwrap();
        let mixed =
            Kit::parse(&[shares[0].lines().as_str(), other[1].lines().as_str()].concat()).unwrap_err();
        assert!(mixed.what().contains("another kit"), "{mixed}");
        let whole = Kit::parse(&[shares[0].lines().as_str(), kit.lines().as_str()].concat()).unwrap_err();
        assert!(whole.what().contains("use it alone"), "{whole}");
    }

    #[test]
    fn golden_shares() {
        // Examples of FIPS 197 and of the field's tables.
        assert_eq!((multiply(0x57, 0x83), multiply(0x53, 0xca)), (0xc1, 1));
        assert!((1..=255).all(|a| multiply(a, inverse(a)) == 1));
        // The value of 5 + 3x at 1 and 2, which are on paper somewhere.
        let share = |number, value| Share {
            number,
            needed: 2,
            set: [1, 2],
            family: [9; 8],
            value: Secret::new([value; 32]),
        };
        let joined = Share::join(&[share(1, 5 ^ 3), share(2, 5 ^ 6)]).unwrap();
        assert_eq!(joined.key()[..], [5; 32]);
        assert_eq!(share(1, 6).lines().lines().next(), Some("1: 080G-4082-144G-J289-6H"));
    }
}
