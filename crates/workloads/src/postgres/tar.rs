//! Headers of the archives that a base backup comes in: POSIX ustar as PostgreSQL writes it (`tarCreateHeader` in its
//! `src/port/tar.c`), with sizes beyond 8 GiB in base 256.

use mainstay_core::{Error, Result};

pub(super) const BLOCK: usize = 512;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Content {
    File,
    Directory,
    Symlink(Vec<u8>),
}

/// One member of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) path: Vec<u8>,
    pub(super) content: Content,
    pub(super) size: u64,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds since 1970.
    pub(super) modified: i64,
    pub(super) user: Vec<u8>,
    pub(super) group: Vec<u8>,
}

impl Member {
    /// Zero bytes after the content, up to the next block.
    pub(super) fn padding(&self) -> u64 {
        self.size.next_multiple_of(BLOCK as u64) - self.size
    }
}

fn malformed(why: &str) -> Error {
    Error::integrity(format!("the server sent a malformed archive: {why}"))
}

/// `None` for the empty block that ends an archive.
pub(super) fn parse(block: &[u8; BLOCK]) -> Result<Option<Member>> {
    if block.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    let field = |at: usize, length: usize| block.get(at..at + length).unwrap_or_default();
    let text = |at, length| {
        let field: &[u8] = field(at, length);
        field.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
    };
    let sum: u64 = block
        .iter()
        .enumerate()
        .map(|(at, byte)| match at {
            148..156 => u64::from(b' '),
            _ => u64::from(*byte),
        })
        .sum();
    if number(field(148, 8))? != sum {
        return Err(malformed("the checksum of a header is wrong"));
    }
    if field(257, 5) != b"ustar" {
        return Err(malformed("a header is of another kind"));
    }
    let mut path = text(345, 155);
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend(text(0, 100));
    let trimmed = path.strip_suffix(b"/").unwrap_or(&path);
    let path = trimmed.strip_prefix(b"./").unwrap_or(trimmed).to_vec();
    let content = match block.get(156) {
        Some(b'0' | 0) => Content::File,
        Some(b'5') => Content::Directory,
        Some(b'2') => Content::Symlink(text(157, 100)),
        _ => return Err(malformed("a member is of an unknown type")),
    };
    let size = match content {
        Content::File => number(field(124, 12))?,
        _ => 0,
    };
    let small = |at| number(field(at, 8)).map(|value| u32::try_from(value).unwrap_or(u32::MAX));
    Ok(Some(Member {
        path,
        content,
        size: if size <= 1 << 50 { size } else { return Err(malformed("a member is too long")) },
        mode: small(100)? & 0o7777,
        uid: small(108)?,
        gid: small(116)?,
        modified: i64::try_from(number(field(136, 12))?).unwrap_or(i64::MAX),
        user: text(265, 32),
        group: text(297, 32),
    }))
}

/// Octal digits, or with the first bit set a big-endian number.
fn number(field: &[u8]) -> Result<u64> {
    if let Some((first, rest)) = field.split_first()
        && first & 0x80 != 0
    {
        let mut value = u64::from(first & 0x7f);
        for byte in rest {
            value = value
                .checked_mul(256)
                .and_then(|value| value.checked_add(u64::from(*byte)))
                .ok_or_else(|| malformed("a number is too large"))?;
        }
        return Ok(value);
    }
    let mut value = 0_u64;
    for byte in field.iter().filter(|byte| !matches!(byte, 0 | b' ')) {
        if !matches!(byte, b'0'..=b'7') {
            return Err(malformed("a number is not octal"));
        }
        value = value
            .checked_mul(8)
            .map(|value| value + u64::from(byte - b'0'))
            .ok_or_else(|| malformed("a number is too large"))?;
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{BLOCK, Content, parse};

    /// As GNU tar writes it.
    fn header(name: &str, size: &[u8; 12], kind: u8) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[100..107].copy_from_slice(b"0000600");
        block[108..115].copy_from_slice(b"0000152");
        block[116..123].copy_from_slice(b"0000155");
        block[124..136].copy_from_slice(size);
        block[136..148].copy_from_slice(b"14000000000\0");
        block[156] = kind;
        block[157..161].copy_from_slice(b"/srv");
        block[257..265].copy_from_slice(b"ustar\x0000");
        block[265..273].copy_from_slice(b"postgres");
        seal(&mut block);
        block
    }

    fn seal(block: &mut [u8; BLOCK]) {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }

    #[test]
    fn members_are_what_their_headers_say() {
        let file = parse(&header("./base/5/16384", b"00000020000\0", b'0')).unwrap().unwrap();
        assert_eq!((file.path.as_slice(), file.size, file.mode), (&b"base/5/16384"[..], 8192, 0o600));
        assert_eq!((file.uid, file.gid, file.user.as_slice()), (0o152, 0o155, &b"postgres"[..]));
        assert_eq!((file.content.clone(), file.padding()), (Content::File, 0));
        let large = parse(&header("x", b"\x80\0\0\0\0\0\0\x03\0\0\0\x07", b'0')).unwrap().unwrap();
        assert_eq!((large.size, large.padding()), (3 << 32 | 7, 505));
        let link = parse(&header("pg_tblspc/9", b"00000000000\0", b'2')).unwrap().unwrap();
        assert_eq!(link.content, Content::Symlink(b"/srv".to_vec()));
        assert_eq!(parse(&header("d/", b"00000000000\0", b'5')).unwrap().unwrap().path, b"d");
        assert_eq!(parse(&[0; BLOCK]).unwrap(), None);
        let mut wrong = header("x", b"00000000000\0", b'0');
        wrong[3] ^= 1;
        parse(&wrong).unwrap_err();
    }

    proptest! {
        #[test]
        fn hostile_headers_never_panic(bytes in proptest::collection::vec(any::<u8>(), BLOCK), whole: bool) {
            let mut block: [u8; BLOCK] = bytes.try_into().unwrap();
            if whole {
                block[257..262].copy_from_slice(b"ustar");
                seal(&mut block);
            }
            let _either = parse(&block);
        }
    }
}
