//! The two catalogs, side by side: the database as it was, and as it is.

use std::collections::BTreeSet;

use mainstay_core::{Error, Result};

use super::database::Condition;
use super::model::{Catalog, Key, Reference, Row};
use super::plan::{Fate, Member, Relink};

#[derive(Clone, Debug)]
pub struct Both {
    pub point: Catalog,
    pub live: Catalog,
    /// For each table of the point the one of the same name, and for each of its columns the one of the same name.
    pairs: Vec<Option<(usize, Vec<Option<usize>>)>>,
}

impl Both {
    pub(super) fn new(point: Catalog, live: Catalog) -> Self {
        let mut pairs = Vec::new();
        for table in &point.tables {
            let pair = live.position(&table.name).map(|index| {
                let names = live.tables.get(index).map(|known| &known.columns);
                let find =
                    |name: &str| names.and_then(|all| all.iter().position(|column| column.name == name));
                (index, table.columns.iter().map(|column| find(&column.name)).collect())
            });
            pairs.push(pair);
        }
        Self { point, live, pairs }
    }

    /// Tables without a primary key have in the live database the key that was declared for them.
    pub(super) fn adopt_keys(&mut self) {
        for (index, table) in self.point.tables.iter().enumerate() {
            let Some((now, columns)) = self.pairs.get(index).and_then(Option::as_ref) else { continue };
            let declared = table.key.as_ref().filter(|key| key.equal.iter().any(String::is_empty));
            let Some(now) =
                self.live.tables.get_mut(*now).filter(|now| now.key.is_none() || declared.is_some())
            else {
                continue;
            };
            let Some(key) = declared else { continue };
            let found: Option<Vec<usize>> =
                key.columns.iter().map(|column| columns.get(*column).copied().flatten()).collect();
            now.key = found.map(|columns| Key { columns, equal: key.equal.clone() });
        }
    }

    pub fn live_of(&self, table: usize) -> Option<usize> {
        self.pairs.get(table)?.as_ref().map(|(index, _)| *index)
    }

    pub(super) fn point_of(&self, live: usize) -> Option<usize> {
        self.pairs.iter().position(|pair| pair.as_ref().is_some_and(|(index, _)| *index == live))
    }

    /// The column of the live table that has the name of a column of the point.
    pub(super) fn column(&self, table: usize, column: usize) -> Option<usize> {
        self.pairs.get(table)?.as_ref()?.1.get(column).copied().flatten()
    }

    /// The column of the point that has the name of a column of the live table.
    pub(super) fn back(&self, table: usize, live: usize) -> Option<usize> {
        self.pairs.get(table)?.as_ref()?.1.iter().position(|column| *column == Some(live))
    }

    /// A row of the point by the columns of the live table.
    pub(super) fn as_live(&self, table: usize, row: &Row) -> Result<Row> {
        let live = self.live_of(table).ok_or_else(|| Error::bug("a row of a table that has gone"))?;
        let columns = 0..self.live.table(live)?.columns.len();
        let value = |column| self.back(table, column).and_then(|index| row.get(index).cloned().flatten());
        Ok(columns.map(value).collect())
    }

    /// The columns of the live table that a row of the point gives values to.
    pub(super) fn given(&self, table: usize) -> Result<Vec<usize>> {
        let live = self.live_of(table).ok_or_else(|| Error::bug("a row of a table that has gone"))?;
        let columns = &self.live.table(live)?.columns;
        let given = columns
            .iter()
            .enumerate()
            .filter(|(index, column)| !column.generated && self.back(table, *index).is_some());
        Ok(given.map(|(index, _)| index).collect())
    }

    /// The key of the live table, and how rows of it are found by the key that they had.
    pub(super) fn live_key(&self, table: usize) -> Option<Vec<Condition>> {
        let live = self.live.tables.get(self.live_of(table)?)?;
        let known = self.point.tables.get(table)?;
        let key = known.key.as_ref()?;
        let conditions = key.columns.iter().zip(&key.equal).map(|(column, equal)| {
            let column = self.column(table, *column)?;
            let value_type = live.columns.get(column)?.sql_type.clone();
            Some(Condition { column, equal: equal.clone(), value_type, column_first: true })
        });
        conditions.collect()
    }

    /// What differs between a row as it was and as it is, in columns that both have.
    pub(super) fn differences(
        &self,
        table: usize,
        was: &Row,
        now: &Row,
    ) -> Vec<(String, Option<String>, Option<String>)> {
        let Some(known) = self.point.tables.get(table) else { return Vec::new() };
        let mut differences = Vec::new();
        for (index, column) in known.columns.iter().enumerate() {
            let Some(live) = self.column(table, index).filter(|_| !column.generated) else { continue };
            let (old, new) = (row_value(was, index), row_value(now, live));
            if old != new {
                differences.push((column.name.clone(), old, new));
            }
        }
        differences
    }

    /// How the tables that a plan touches have changed since the point. What leaves no way is added to `blocked`.
    pub(super) fn changes(
        &self,
        members: &[Member],
        relinks: &[Relink],
        blocked: &mut Vec<String>,
    ) -> Vec<String> {
        let coming = members.iter().filter(|member| matches!(member.fate, Fate::Insert | Fate::NoTable));
        let mut tables: BTreeSet<usize> = coming.map(|member| member.table).collect();
        tables.extend(relinks.iter().filter_map(|relink| self.point_of(relink.table)));
        let mut changes = Vec::new();
        for index in tables {
            let Some(was) = self.point.tables.get(index) else { continue };
            let Some(now) = self.live_of(index).and_then(|live| self.live.tables.get(live)) else {
                changes.push(format!("the table {} has gone, and its rows stay gone with it", was.name));
                continue;
            };
            for (position, column) in was.columns.iter().enumerate() {
                match self.column(index, position).and_then(|live| now.columns.get(live)) {
                    None => changes.push(format!(
                        "the column {} of {} has gone, and its values with it",
                        column.name, was.name
                    )),
                    Some(live) if live.shown_type != column.shown_type => changes.push(format!(
                        "the column {} of {} was {} and is {}",
                        column.name, was.name, column.shown_type, live.shown_type
                    )),
                    Some(live) if live.generated != column.generated => changes.push(format!(
                        "the column {} of {} is computed in one of the two, and in the other not",
                        column.name, was.name
                    )),
                    Some(_) => {}
                }
            }
            for (position, column) in now.columns.iter().enumerate() {
                if self.back(index, position).is_some() || column.generated {
                    continue;
                }
                changes.push(format!("the column {} of {} is new", column.name, was.name));
                if column.not_null && column.default.is_none() {
                    blocked.push(format!(
                        "the new column {} of {} needs a value, and has no default",
                        column.name, was.name
                    ));
                }
            }
        }
        changes
    }

    /// How the parents are found that rows refer to by a reference of the live catalog; `None` when the point lacks a
    /// column of it. The columns are those of the child in the point.
    pub(super) fn upward(&self, reference: &Reference) -> Option<(Vec<usize>, Vec<Condition>)> {
        let child = self.point_of(reference.child)?;
        let table = self.live.tables.get(reference.child)?;
        let mut columns = Vec::new();
        let mut conditions = Vec::new();
        let triples = reference.child_columns.iter().zip(&reference.parent_columns).zip(&reference.equal);
        for ((mine, theirs), equal) in triples {
            columns.push(self.back(child, *mine)?);
            let value_type = table.columns.get(*mine)?.sql_type.clone();
            conditions.push(Condition {
                column: *theirs,
                equal: equal.clone(),
                value_type,
                column_first: true,
            });
        }
        Some((columns, conditions))
    }
}

fn row_value(row: &Row, index: usize) -> Option<String> {
    row.get(index).cloned().flatten()
}
