//! What the planner knows of a database: tables, keys and the rows between them. Nothing here is of one engine; texts named
//! `sql` are fragments in the words of whoever made the catalog, and nobody else reads them.

use std::fmt;

use mainstay_core::{Code, Error, Result};

/// Values by column, as the database writes them; `None` is no value.
pub type Row = Vec<Option<String>>;

/// A table by schema and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TableName {
    pub schema: String,
    pub name: String,
}

impl TableName {
    pub fn new(schema: &str, name: &str) -> Self {
        Self { schema: schema.to_owned(), name: name.to_owned() }
    }

    /// `name` or `schema.name`; a part in double quotes may hold any letters, with `""` for a double quote.
    pub fn parse(text: &str) -> Result<(Option<String>, String)> {
        let wrong = || {
            Error::new(Code::Usage, format!("{text:?} is not the name of a table"))
                .hint(r#"write it as in customers, shop.customers or "My Shop".customers"#)
        };
        let (mut parts, mut rest) = (Vec::new(), text);
        loop {
            let (part, after) = match rest.strip_prefix('"') {
                Some(quoted) => quoted_part(quoted).ok_or_else(wrong)?,
                None => {
                    let end = rest.find(['.', '"']).unwrap_or(rest.len());
                    let (part, after) = rest.split_at(end);
                    (part.to_owned(), after)
                }
            };
            if part.is_empty() {
                return Err(wrong());
            }
            parts.push(part);
            match after.strip_prefix('.') {
                Some(more) => rest = more,
                None if after.is_empty() => break,
                None => return Err(wrong()),
            }
        }
        match <[String; 2]>::try_from(parts) {
            Ok([schema, name]) => Ok((Some(schema), name)),
            Err(parts) => match <[String; 1]>::try_from(parts) {
                Ok([name]) => Ok((None, name)),
                Err(_more) => Err(wrong()),
            },
        }
    }
}

fn quoted_part(text: &str) -> Option<(String, &str)> {
    let (mut part, mut rest) = (String::new(), text);
    loop {
        let (before, after) = rest.split_once('"')?;
        part.push_str(before);
        match after.strip_prefix('"') {
            Some(more) => {
                part.push('"');
                rest = more;
            }
            None => return Some((part, after)),
        }
    }
}

impl fmt::Display for TableName {
    /// As [`TableName::parse`] reads it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |text: &str| {
            let plain = |letter: char| letter != '.' && letter != '"' && !letter.is_whitespace();
            if text.chars().all(plain) {
                text.to_owned()
            } else {
                format!("\"{}\"", text.replace('"', "\"\""))
            }
        };
        write!(f, "{}.{}", part(&self.schema), part(&self.name))
    }
}

/// Everything that the planner asks a database about itself.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    pub tables: Vec<Table>,
    pub references: Vec<Reference>,
    /// What is there and not taken into account, in clauses.
    pub notes: Vec<String>,
}

#[derive(Clone, Debug)]
pub struct Table {
    pub name: TableName,
    pub sql: String,
    /// Such as `ONLY` where a table has heirs.
    pub only: String,
    pub columns: Vec<Column>,
    /// What tells its rows apart.
    pub key: Option<Key>,
    /// Other keys that no two rows may share.
    pub uniques: Vec<Unique>,
    /// Programs of the user that run when rows come or change.
    pub triggers: Vec<Trigger>,
    /// Keys and exclusions that may be checked at the end of a transaction: by triggers of the database's own.
    pub deferrable: Vec<String>,
}

#[derive(Clone, Debug)]
pub struct Column {
    pub name: String,
    pub sql: String,
    /// The type with its length and precision, for comparison and people.
    pub shown_type: String,
    /// The type that a text is read as.
    pub sql_type: String,
    pub not_null: bool,
    /// Its value follows from the others and cannot be set.
    pub generated: bool,
    /// The expression of the value that it has when none is given.
    pub default: Option<String>,
    /// Where its numbers come from.
    pub sequence: Option<String>,
}

#[derive(Clone, Debug)]
pub struct Key {
    pub columns: Vec<usize>,
    /// For each column, what compares two of its values for being the same.
    pub equal: Vec<String>,
}

/// A key that may be partial, and of expressions.
#[derive(Clone, Debug)]
pub struct Unique {
    pub name: String,
    pub expressions: Vec<String>,
    pub equal: Vec<String>,
    pub predicate: Option<String>,
    /// Two rows without a value are the same.
    pub nulls_equal: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trigger {
    pub name: String,
    /// Runs also where others are silenced.
    pub always: bool,
}

/// What happens to a row whose parent goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDelete {
    /// It must have gone before.
    Refuse,
    /// It goes too.
    Cascade,
    SetNull,
    SetDefault,
}

/// A foreign key.
#[derive(Clone, Debug)]
pub struct Reference {
    pub name: String,
    pub child: usize,
    pub parent: usize,
    pub child_columns: Vec<usize>,
    pub parent_columns: Vec<usize>,
    /// For each pair of columns, what compares the parent's (on the left) with the child's.
    pub equal: Vec<String>,
    pub on_delete: OnDelete,
    /// The columns that lose their values when the parent goes, of [`OnDelete::SetNull`] and [`OnDelete::SetDefault`].
    pub set: Vec<usize>,
}

impl Catalog {
    pub fn table(&self, index: usize) -> Result<&Table> {
        self.tables.get(index).ok_or_else(|| Error::bug("a table that is not in the catalog"))
    }

    pub fn position(&self, name: &TableName) -> Option<usize> {
        self.tables.iter().position(|table| table.name == *name)
    }

    /// The table that a person means.
    ///
    /// Errors: [`Code::NotFound`]; [`Code::Usage`] when there are several.
    pub fn find(&self, text: &str) -> Result<usize> {
        let (schema, name) = TableName::parse(text)?;
        let fits = |table: &Table| {
            table.name.name == name && schema.as_ref().is_none_or(|schema| *schema == table.name.schema)
        };
        let found: Vec<usize> =
            self.tables.iter().enumerate().filter(|(_, table)| fits(table)).map(|(index, _)| index).collect();
        match found.as_slice() {
            [index] => Ok(*index),
            [] => Err(Error::new(Code::NotFound, format!("there is no table {text} in the database"))),
            several => {
                let names = several.iter().filter_map(|index| self.tables.get(*index));
                let names: Vec<String> = names.map(|table| table.name.to_string()).collect();
                Err(Error::new(Code::Usage, format!("there is more than one table {text}"))
                    .hint(format!("name its schema: {}", names.join(", "))))
            }
        }
    }
}

impl Table {
    pub fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name == name)
    }

    /// Errors: [`Code::Refused`] for a table without one.
    pub fn key(&self) -> Result<&Key> {
        self.key.as_ref().ok_or_else(|| {
            Error::new(Code::Refused, format!("the table {} has no primary key", self.name))
                .hint("say in the record definition which columns tell its rows apart, under [keys]")
        })
    }

    /// `id=42`, for people.
    pub fn shown_key(&self, row: &Row) -> String {
        let columns = self.key.as_ref().map(|key| key.columns.as_slice()).unwrap_or_default();
        let shown = columns.iter().map(|index| {
            let name = self.columns.get(*index).map(|column| column.name.as_str()).unwrap_or_default();
            let value = row.get(*index).and_then(Option::as_deref).unwrap_or("NULL");
            format!("{name}={value}")
        });
        shown.collect::<Vec<_>>().join(" ")
    }
}

/// The values of some columns; `None` when one of them has none.
pub(super) fn values(row: &Row, columns: &[usize]) -> Option<Vec<String>> {
    columns.iter().map(|index| row.get(*index).cloned().flatten()).collect()
}

#[cfg(test)]
mod tests {
    use super::TableName;

    #[test]
    fn names_of_tables_are_read_with_their_quotes_and_written_so_that_they_are_read_again() {
        let read = |text: &str| TableName::parse(text).ok();
        assert_eq!(read("customers"), Some((None, "customers".into())));
        assert_eq!(read("Shop.Customers"), Some((Some("Shop".into()), "Customers".into())));
        assert_eq!(read(r#""a.b"."c""d""#), Some((Some("a.b".into()), "c\"d".into())));
        for bad in ["", ".", "a.", ".a", "a.b.c", "\"a", "a\"b", "\"\""] {
            assert_eq!(read(bad), None, "{bad}");
        }
        let hostile = TableName::new("My Shop", "x\".y");
        assert_eq!(read(&hostile.to_string()), Some((Some(hostile.schema), hostile.name)));
    }
}
