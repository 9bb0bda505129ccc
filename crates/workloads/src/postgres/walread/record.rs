//! One record: its header, the blocks that it changes, its own data.

use bytes::Buf as _;
use mainstay_core::{Error, Result};

use super::super::lsn::Lsn;
use super::crc::crc32c;

/// Bytes before the headers of the blocks.
pub(super) const HEADER: usize = 24;
const BLOCK_MAX: u8 = 32;
const SHORT: u8 = 255;
const LONG: u8 = 254;
const ORIGIN: u8 = 253;
const TOP: u8 = 252;
const HAS_IMAGE: u8 = 0x10;
const SAME_RELATION: u8 = 0x80;
const HOLE: u8 = 0x01;
const COMPRESSED: u8 = 0x1c;

/// The files of a relation: tablespace, database, and its number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Relation {
    pub space: u32,
    pub database: u32,
    pub number: u32,
}

impl std::fmt::Display for Relation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}/{}", self.space, self.database, self.number)
    }
}

/// A page that a record changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block<'a> {
    pub id: u8,
    pub relation: Relation,
    /// 0 is what holds the rows.
    pub fork: u8,
    pub number: u32,
    /// The page as a whole goes with the record.
    pub image: bool,
    pub data: &'a [u8],
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    pub start: Lsn,
    pub previous: Lsn,
    /// Bytes, with its header.
    pub length: usize,
    pub transaction: u32,
    /// The transaction that a subtransaction is part of, where the record says so.
    pub top: Option<u32>,
    /// Who reads it, and what it says to them.
    pub manager: u8,
    pub info: u8,
    pub blocks: Vec<Block<'a>>,
    pub data: &'a [u8],
}

/// What the headers say of a block, before its data is reached.
struct Head {
    id: u8,
    relation: Relation,
    fork: u8,
    number: u32,
    image: Option<usize>,
    data: usize,
}

impl<'a> Record<'a> {
    /// Errors: [`mainstay_core::Code::Integrity`] when its checksum or its lengths do not hold.
    pub(super) fn parse(start: Lsn, bytes: &'a [u8]) -> Result<Self> {
        let wrong = |what: &str| Error::integrity(format!("the record at {start} of the log {what}"));
        let (head, body) = bytes.split_at_checked(HEADER).ok_or_else(|| wrong("is cut short"))?;
        let (covered, crc) = head.split_at(HEADER - 4);
        if crc != crc32c([body, covered]).to_le_bytes() {
            return Err(wrong("does not have the checksum that it was written with"));
        }
        Self::parts(start, covered, body).ok_or_else(|| wrong("is malformed"))
    }

    fn parts(start: Lsn, mut head: &[u8], body: &'a [u8]) -> Option<Self> {
        let length = usize::try_from(head.try_get_u32_le().ok()?).ok()?;
        let transaction = head.try_get_u32_le().ok()?;
        let previous = Lsn(head.try_get_u64_le().ok()?);
        let (info, manager) = (head.try_get_u8().ok()?, head.try_get_u8().ok()?);
        let (heads, top, main, mut rest) = heads(body)?;
        let mut blocks = Vec::with_capacity(heads.len());
        for head in heads {
            let (_image, after) = rest.split_at_checked(head.image.unwrap_or(0))?;
            let (data, after) = after.split_at_checked(head.data)?;
            rest = after;
            blocks.push(Block {
                id: head.id,
                relation: head.relation,
                fork: head.fork,
                number: head.number,
                image: head.image.is_some(),
                data,
            });
        }
        let whole = rest.len() == main && length == body.len() + HEADER;
        whole.then_some(Self { start, previous, length, transaction, top, manager, info, blocks, data: rest })
    }
}

type Heads<'a> = (Vec<Head>, Option<u32>, usize, &'a [u8]);

/// The headers in front of the data: of blocks, and of what else comes. They end where what they announce begins.
fn heads(mut bytes: &[u8]) -> Option<Heads<'_>> {
    let (mut heads, mut top, mut main, mut announced) = (Vec::new(), None, 0, 0_usize);
    let mut relation = Relation::default();
    while bytes.len() > announced {
        match bytes.try_get_u8().ok()? {
            SHORT => {
                main = usize::from(bytes.try_get_u8().ok()?);
                break;
            }
            LONG => {
                main = usize::try_from(bytes.try_get_u32_le().ok()?).ok()?;
                break;
            }
            ORIGIN => {
                bytes.try_get_u16_le().ok()?;
            }
            TOP => top = Some(bytes.try_get_u32_le().ok()?),
            id if id <= BLOCK_MAX => {
                let head = block(id, &mut bytes, &mut relation)?;
                announced = announced.checked_add(head.image.unwrap_or(0))?.checked_add(head.data)?;
                heads.push(head);
            }
            _ => return None,
        }
    }
    Some((heads, top, main, bytes))
}

fn block(id: u8, bytes: &mut &[u8], relation: &mut Relation) -> Option<Head> {
    let flags = bytes.try_get_u8().ok()?;
    let data = usize::from(bytes.try_get_u16_le().ok()?);
    let mut image = None;
    if flags & HAS_IMAGE != 0 {
        image = Some(usize::from(bytes.try_get_u16_le().ok()?));
        bytes.try_get_u16_le().ok()?;
        let how = bytes.try_get_u8().ok()?;
        if how & HOLE != 0 && how & COMPRESSED != 0 {
            bytes.try_get_u16_le().ok()?;
        }
    }
    if flags & SAME_RELATION == 0 {
        let mut next = || bytes.try_get_u32_le().ok();
        *relation = Relation { space: next()?, database: next()?, number: next()? };
    }
    let number = bytes.try_get_u32_le().ok()?;
    Some(Head { id, relation: *relation, fork: flags & 0x0f, number, image, data })
}
