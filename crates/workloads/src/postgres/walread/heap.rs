//! What records say of rows and of transactions.

use std::time::Duration;

use bytes::Buf as _;
use mainstay_core::Time;

use super::record::{Record, Relation};

// Resource managers, `access/rmgrlist.h`.
const XLOG: u8 = 0;
const TRANSACTION: u8 = 1;
const HEAP2: u8 = 9;
const HEAP: u8 = 10;

const OPERATION: u8 = 0x70;
const INIT_PAGE: u8 = 0x80;
const MAIN_FORK: u8 = 0;
/// A row as it lies in a page begins with so many bytes that records leave out.
const ROW_HEADER: usize = 23;
/// PostgreSQL counts from 2000-01-01.
const EPOCH_SECONDS: i64 = 946_684_800;

/// Where a row lies: page and line in it.
pub type Spot = (u32, u16);

/// A row as records have it: the second flags of its header, and from its twenty-third byte on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image<'a> {
    /// The flags, of which the lowest says that some columns have no value.
    pub flags: u16,
    /// How many columns it has.
    pub columns: u16,
    /// Where its values begin, counted from the row's first byte.
    pub values_at: u8,
    /// From the row's byte 23 on.
    pub bytes: &'a [u8],
}

impl Image<'_> {
    /// The map of columns that have a value, and the values.
    pub(super) fn parts(&self) -> Option<(&[u8], &[u8])> {
        self.bytes.split_at_checked(usize::from(self.values_at).checked_sub(ROW_HEADER)?)
    }
}

/// What a record does to a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RowChange<'a> {
    /// The image is `None` when only the page as a whole is in the record.
    Insert {
        at: Spot,
        image: Option<Image<'a>>,
    },
    /// The image is that of its old key, where the server logs it. `moved`: to another partition.
    Delete {
        at: Spot,
        key: Option<Image<'a>>,
        moved: bool,
    },
    Update {
        from: Spot,
        to: Spot,
        key: Option<Image<'a>>,
    },
}

/// How a transaction ended, with its subtransactions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    pub committed: bool,
    pub time: Time,
    pub transactions: Vec<u32>,
    /// Relations whose files it deleted.
    pub dropped: Vec<Relation>,
}

impl<'a> Record<'a> {
    /// Nothing comes behind it before the next segment.
    pub fn is_switch(&self) -> bool {
        self.manager == XLOG && self.info & !0x0f == 0x40
    }

    /// The rows that it changes, with the relation they are in. What is malformed says nothing.
    pub fn rows(&self) -> Option<(Relation, Vec<RowChange<'a>>)> {
        let new = self.blocks.first().filter(|block| block.id == 0 && block.fork == MAIN_FORK)?;
        let number = new.number;
        let changes = match (self.manager, self.info & OPERATION) {
            (HEAP, 0x00) => vec![insert(self.data, number, new.data)?],
            (HEAP, 0x10) => vec![delete(self.data, number)?],
            (HEAP, 0x20 | 0x40) => {
                let old = self.blocks.iter().find(|block| block.id == 1).map_or(number, |block| block.number);
                vec![update(self.data, old, number)?]
            }
            (HEAP2, 0x50) => inserts(self.data, self.info & INIT_PAGE != 0, number, new.data)?,
            _ => return None,
        };
        Some((new.relation, changes))
    }

    /// The end of a transaction, if that is what it is.
    pub fn ending(&self) -> Option<Ending> {
        if self.manager != TRANSACTION {
            return None;
        }
        let (committed, prepared) = match self.info & OPERATION {
            0x00 => (true, false),
            0x20 => (false, false),
            0x30 => (true, true),
            0x40 => (false, true),
            _ => return None,
        };
        ending(self.data, self.info & 0x80 != 0, committed, prepared, self.transaction)
    }
}

/// `xl_heap_header` and what follows.
fn image<'a>(bytes: &mut &'a [u8]) -> Option<Image<'a>> {
    let columns = bytes.try_get_u16_le().ok()? & 0x07ff;
    let flags = bytes.try_get_u16_le().ok()?;
    let values_at = bytes.try_get_u8().ok()?;
    Some(Image { flags, columns, values_at, bytes })
}

fn insert<'a>(mut data: &[u8], page: u32, mut row: &'a [u8]) -> Option<RowChange<'a>> {
    let at = (page, data.try_get_u16_le().ok()?);
    Some(RowChange::Insert { at, image: image(&mut row) })
}

fn inserts<'a>(mut data: &[u8], init: bool, page: u32, mut rows: &'a [u8]) -> Option<Vec<RowChange<'a>>> {
    data.try_get_u16_le().ok()?;
    let count = data.try_get_u16_le().ok()?;
    let whole = rows.len();
    let mut changes = Vec::new();
    for number in 1..=count {
        let line = if init { number } else { data.try_get_u16_le().ok()? };
        let mut one = None;
        if whole > 0 {
            // Each begins at an even byte.
            rows.try_get_bytes((whole - rows.len()) % 2)?;
            let length = usize::from(rows.try_get_u16_le().ok()?);
            let columns = rows.try_get_u16_le().ok()? & 0x07ff;
            let flags = rows.try_get_u16_le().ok()?;
            let values_at = rows.try_get_u8().ok()?;
            one = Some(Image { flags, columns, values_at, bytes: rows.try_get_bytes(length)? });
        }
        changes.push(RowChange::Insert { at: (page, line), image: one });
    }
    Some(changes)
}

trait Cut<'a> {
    fn try_get_bytes(&mut self, length: usize) -> Option<&'a [u8]>;
}

impl<'a> Cut<'a> for &'a [u8] {
    fn try_get_bytes(&mut self, length: usize) -> Option<&'a [u8]> {
        let (now, later) = self.split_at_checked(length)?;
        *self = later;
        Some(now)
    }
}

fn delete(mut data: &[u8], page: u32) -> Option<RowChange<'_>> {
    data.try_get_u32_le().ok()?;
    let at = (page, data.try_get_u16_le().ok()?);
    data.try_get_u8().ok()?;
    let flags = data.try_get_u8().ok()?;
    // A speculative insertion that is taken back is no deletion.
    if flags & 0x08 != 0 {
        return None;
    }
    let key = if flags & 0x06 != 0 { image(&mut data) } else { None };
    Some(RowChange::Delete { at, key, moved: flags & 0x10 != 0 })
}

fn update(mut data: &[u8], old: u32, new: u32) -> Option<RowChange<'_>> {
    data.try_get_u32_le().ok()?;
    let from = (old, data.try_get_u16_le().ok()?);
    data.try_get_u8().ok()?;
    let flags = data.try_get_u8().ok()?;
    data.try_get_u32_le().ok()?;
    let to = (new, data.try_get_u16_le().ok()?);
    let key = if flags & 0x0c != 0 { image(&mut data) } else { None };
    Some(RowChange::Update { from, to, key })
}

/// `xl_xact_commit` and `xl_xact_abort`, and the parts that the flags of the second word announce.
fn ending(mut data: &[u8], more: bool, committed: bool, prepared: bool, transaction: u32) -> Option<Ending> {
    let micros = data.try_get_i64_le().ok()?;
    let time =
        Time::from_seconds(EPOCH_SECONDS).plus(Duration::from_micros(u64::try_from(micros).unwrap_or(0)));
    let flags = if more { data.try_get_u32_le().ok()? } else { 0 };
    let mut ended = Ending { committed, time, transactions: Vec::new(), dropped: Vec::new() };
    if flags & 0x01 != 0 {
        data.try_get_bytes(8)?;
    }
    if flags & 0x02 != 0 {
        for _ in 0..count(&mut data, 4)? {
            ended.transactions.push(data.try_get_u32_le().ok()?);
        }
    }
    if flags & 0x04 != 0 {
        for _ in 0..count(&mut data, 12)? {
            let mut next = || data.try_get_u32_le().ok();
            ended.dropped.push(Relation { space: next()?, database: next()?, number: next()? });
        }
    }
    if flags & 0x100 != 0 {
        let length = count(&mut data, 12)? * 12;
        data.try_get_bytes(length)?;
    }
    if flags & 0x08 != 0 {
        let length = count(&mut data, 16)? * 16;
        data.try_get_bytes(length)?;
    }
    let mut own = transaction;
    if prepared && flags & 0x10 != 0 {
        own = data.try_get_u32_le().ok()?;
    }
    ended.transactions.push(own);
    Some(ended)
}

/// A count of things of `size` bytes that are all there.
fn count(data: &mut &[u8], size: usize) -> Option<usize> {
    let count = usize::try_from(data.try_get_i32_le().ok()?).ok()?;
    (count.checked_mul(size)? <= data.len()).then_some(count)
}
