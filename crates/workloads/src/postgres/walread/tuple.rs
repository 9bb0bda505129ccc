//! The key of a row out of the row as it lies in the log.

use super::heap::Image;

/// A column as rows have it; those that were dropped count too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attribute {
    /// Bytes; -1 for what says its own length, -2 for what ends with a NUL.
    pub length: i16,
    /// At a multiple of how many bytes it begins.
    pub align: u8,
    /// How it is written as text, if that is known here.
    pub kind: Option<Kind>,
}

/// Types whose values can be told from their bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Number,
    Text,
    Uuid,
}

impl Attribute {
    /// From `pg_attribute` and `pg_type`. The name of the type is that of `pg_catalog`.
    pub fn new(length: i16, align: &str, type_name: &str) -> Option<Self> {
        let align = match align {
            "c" => 1,
            "s" => 2,
            "i" => 4,
            "d" => 8,
            _ => return None,
        };
        let kind = match type_name {
            "int2" | "int4" | "int8" => Some(Kind::Number),
            "text" | "varchar" => Some(Kind::Text),
            "uuid" => Some(Kind::Uuid),
            _ => None,
        };
        Some(Self { length, align, kind })
    }
}

/// How the key of a table is found in its rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyShape {
    attributes: Vec<Attribute>,
    key: Vec<usize>,
}

impl KeyShape {
    /// `key` are positions in `attributes`. `None` when a column of the key is of a type that is not known here.
    pub fn new(attributes: Vec<Attribute>, key: Vec<usize>) -> Option<Self> {
        let known =
            key.iter().all(|index| attributes.get(*index).is_some_and(|column| column.kind.is_some()));
        (known && !key.is_empty()).then_some(Self { attributes, key })
    }

    /// The values of the key as the types of the server write them; `None` when they are not to be had.
    pub fn of(&self, image: &Image<'_>) -> Option<Vec<String>> {
        let (map, values) = image.parts()?;
        let nulls = image.flags & 1 != 0;
        let mut found: Vec<Option<String>> = vec![None; self.key.len()];
        let mut at = 0_usize;
        for (index, attribute) in self.attributes.iter().enumerate().take(usize::from(image.columns)) {
            if nulls && map.get(index / 8)? & (1 << (index % 8)) == 0 {
                continue;
            }
            let (value, after) = value(attribute, values, at)?;
            at = after;
            for (slot, key) in found.iter_mut().zip(&self.key) {
                if *key == index {
                    *slot = text(attribute.kind?, value?);
                }
            }
        }
        found.into_iter().collect()
    }
}

/// The bytes of a column, unless they are compressed or elsewhere, and where the next begins.
fn value<'a>(attribute: &Attribute, values: &'a [u8], at: usize) -> Option<(Option<&'a [u8]>, usize)> {
    let aligned = at.checked_next_multiple_of(usize::from(attribute.align.max(1)))?;
    match attribute.length {
        // A length in one byte needs no alignment; what fills up before one of four bytes is zero.
        -1 => {
            let first = *values.get(at)?;
            if first & 1 == 1 {
                // Length 0: elsewhere, and told by a pointer of 18 bytes.
                if first == 1 {
                    return Some((None, at.checked_add(18)?));
                }
                let end = at.checked_add(usize::from(first >> 1))?;
                return Some((Some(values.get(at + 1..end)?), end));
            }
            let at = if first == 0 { aligned } else { at };
            let head = values.get(at..)?.first_chunk::<4>()?;
            let head = u32::from_le_bytes(*head);
            let length = usize::try_from(head >> 2).ok()?;
            let bytes = values.get(at + 4..at.checked_add(length)?)?;
            Some(((head & 2 == 0).then_some(bytes), at + length))
        }
        -2 => {
            let rest = values.get(at..)?;
            let length = rest.iter().position(|byte| *byte == 0)?;
            Some((Some(rest.get(..length)?), at + length + 1))
        }
        length => {
            let length = usize::try_from(length).ok()?;
            Some((Some(values.get(aligned..aligned.checked_add(length)?)?), aligned + length))
        }
    }
}

fn text(kind: Kind, bytes: &[u8]) -> Option<String> {
    match kind {
        Kind::Number => {
            let number = match *bytes {
                [a, b] => i64::from(i16::from_le_bytes([a, b])),
                [a, b, c, d] => i64::from(i32::from_le_bytes([a, b, c, d])),
                _ => i64::from_le_bytes(bytes.try_into().ok()?),
            };
            Some(number.to_string())
        }
        Kind::Text => String::from_utf8(bytes.to_vec()).ok(),
        Kind::Uuid => {
            let mut text = String::new();
            for (index, byte) in bytes.iter().enumerate() {
                if matches!(index, 4 | 6 | 8 | 10) {
                    text.push('-');
                }
                text.push_str(&format!("{byte:02x}"));
            }
            (bytes.len() == 16).then_some(text)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::heap::Image;
    use super::{Attribute, KeyShape};

    fn shape(columns: &[(i16, &str, &str)], key: &[usize]) -> KeyShape {
        let attributes =
            columns.iter().map(|(length, align, name)| Attribute::new(*length, align, name).unwrap());
        KeyShape::new(attributes.collect(), key.to_vec()).unwrap()
    }

    #[test]
    fn keys_are_found_behind_columns_of_every_length() {
        let shape =
            shape(&[(2, "s", "int2"), (-1, "i", "text"), (8, "d", "int8"), (4, "i", "date")], &[2, 1]);
        // int2 = 7; "ab" with a length of one byte; three bytes up to the alignment; int8 = -5.
        let mut bytes = vec![7, 0, 2 * 3 + 1, b'a', b'b', 0, 0, 0];
        bytes.extend((-5_i64).to_le_bytes());
        bytes.extend([9, 0, 0, 0]);
        let image = Image { flags: 0, columns: 4, values_at: 24, bytes: &[&[0][..], &bytes].concat() };
        assert_eq!(shape.of(&image), Some(vec!["-5".into(), "ab".into()]));
        // Only the key, as the old key of a row is logged: the others have no value.
        let key = [&[0b0110][..], &[7, b'a', b'b', 0, 0, 0, 0, 0], &42_i64.to_le_bytes()].concat();
        let image = Image { flags: 1, columns: 4, values_at: 24, bytes: &key };
        assert_eq!(shape.of(&image), Some(vec!["42".into(), "ab".into()]));
    }

    proptest! {
        #[test]
        fn hostile_rows_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..80), flags in 0_u16..2, columns in 0_u16..9, values_at in 0_u8..60
        ) {
            let shape = shape(&[(-1, "i", "text"), (8, "d", "int8"), (-2, "c", "cstring"), (16, "c", "uuid")], &[0, 3]);
            let _either = shape.of(&Image { flags, columns, values_at, bytes: &bytes });
        }
    }
}
