//! What the planner asks of a database, whichever engine it is.

use mainstay_core::Result;

use super::definition::Link;
use super::model::{Catalog, Row, Table, Unique};

/// A column that is compared with a value.
#[derive(Clone, Debug)]
pub struct Condition {
    pub column: usize,
    /// What compares them: [`super::model::Key::equal`] or [`super::model::Reference::equal`].
    pub equal: String,
    /// What type the value is read as.
    pub value_type: String,
    /// The column stands on the left.
    pub column_first: bool,
}

impl Condition {
    /// Those that find rows by the key of their table; `None` for a table without one.
    pub fn of_key(table: &Table) -> Option<Vec<Self>> {
        let key = table.key.as_ref()?;
        let pairs = key.columns.iter().zip(&key.equal);
        let condition = |(column, equal): (&usize, &String)| {
            let value_type = table.columns.get(*column)?.sql_type.clone();
            Some(Self { column: *column, equal: equal.clone(), value_type, column_first: true })
        };
        pairs.map(condition).collect()
    }
}

/// Rows that go into one table.
pub struct Insert<'a> {
    pub table: &'a Table,
    /// The columns that get values; the others get their defaults.
    pub columns: Vec<usize>,
    /// Values by those columns.
    pub rows: Vec<Vec<Option<&'a str>>>,
}

/// One row that changes.
pub struct Update<'a> {
    pub key: Vec<&'a str>,
    /// Values by the columns that are set.
    pub values: Vec<Option<&'a str>>,
}

/// A key of a row that is to come that a row has which is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clash {
    /// Which of the rows that were asked about.
    pub row: usize,
    /// The key of the row that is there, by the columns of the key of its table.
    pub taken_by: Vec<Option<String>>,
}

/// What became of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advanced {
    /// It was beyond already.
    Beyond,
    Moved,
    /// We may not look at it.
    Unknown,
}

/// One database in one transaction.
pub trait Database {
    fn catalog(&mut self) -> Result<Catalog>;

    /// Rows by the values that `conditions` compare with, each with the index of the values that it was found by. `lock`
    /// keeps their keys as they are until the transaction ends.
    fn rows(
        &mut self,
        table: &Table,
        conditions: &[Condition],
        values: &[Vec<String>],
        lock: bool,
    ) -> Result<Vec<(usize, Row)>>;

    /// Rows in which columns have the values that a person typed; at most `limit`.
    fn matching(&mut self, table: &Table, wanted: &[(usize, &str)], limit: usize) -> Result<Vec<Row>>;

    /// Rows that a link ties to the parents with these keys, each with the index of its parent.
    fn linked(
        &mut self,
        link: &Link,
        parent: &Table,
        child: &Table,
        keys: &[Vec<String>],
    ) -> Result<Vec<(usize, Row)>>;

    /// The values that columns have when none is given.
    fn defaults(&mut self, table: &Table, columns: &[usize]) -> Result<Row>;

    /// Which rows of `rows`, by `columns`, would share a key with one that is there.
    fn clashes(
        &mut self,
        table: &Table,
        unique: &Unique,
        columns: &[usize],
        rows: &[Vec<Option<&str>>],
    ) -> Result<Vec<Clash>>;

    /// Inserts rows of one or several tables as one act: references among them are checked when all are there.
    fn insert(&mut self, together: &[Insert<'_>]) -> Result<()>;

    /// Sets columns of rows; how many rows there were.
    fn update(&mut self, table: &Table, set: &[usize], rows: &[Update<'_>]) -> Result<u64>;

    /// Sees to it that a sequence gives only numbers above `number`.
    fn advance(&mut self, sequence: &str, number: &str) -> Result<Advanced>;

    /// What was put off to the end of the transaction is checked now.
    fn check_deferred(&mut self) -> Result<()>;
}
