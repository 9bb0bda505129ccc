//! PostgreSQL as the planner sees it. Values cross as text through the server's own types; names, types and operators come
//! from its catalog, quoted and with their schemas, so that no search path and no hostile name changes what is meant.

mod catalog;
mod script;
mod watch;

use std::fmt::Write as _;

use mainstay_core::{Error, Result};
use mainstay_workloads::postgres::{Sql, SqlRow, text_array};

pub use watch::Watch;

use super::database::{Advanced, Clash, Condition, Database, Insert, Update};
use super::definition::{Link, Triggers};
use super::model::{Catalog, Row, Table, Unique};

/// Rows of one statement.
const ROWS_AT_ONCE: usize = 5000;
/// Bytes of their values, so that a message stays within what a server takes.
const BYTES_AT_ONCE: usize = 32 << 20;

/// How values are written: so that reading them gives the same value, whatever the role's own settings are. Those in the
/// second line are given back to the role while its triggers run.
const AS_TEXT: &str = "SELECT set_config('extra_float_digits', '3', false), set_config('intervalstyle', 'postgres', false),
 set_config('bytea_output', 'hex', false), set_config('xmloption', 'content', false), set_config('array_nulls', 'on', false),
 set_config('standard_conforming_strings', 'on', false), set_config('row_security', 'off', false),
 set_config('lc_monetary', 'C', false)";
const OURS: &str = "SELECT pg_catalog.set_config('search_path', 'pg_catalog', true),
 pg_catalog.set_config('datestyle', 'ISO, YMD', true), pg_catalog.set_config('timezone', 'UTC', true)";
/// What a transaction on the live database may cost others.
const LIMITS: &str = "SELECT set_config('lock_timeout', '5s', true), set_config('idle_in_transaction_session_timeout', '10min', true)";

/// A database in one transaction; dropped without [`Postgres::commit`], nothing has happened.
pub struct Postgres {
    sql: Sql,
    /// The settings are the role's own, as its triggers expect.
    theirs: bool,
    writes: bool,
}

impl Postgres {
    /// Begins a transaction that sees one state and changes nothing.
    pub fn read(sql: Sql) -> Result<Self> {
        Self::begin(sql, false)
    }

    /// Begins a transaction that sees one state and may change it: whoever changed the same rows meanwhile makes it fail.
    pub fn write(sql: Sql, triggers: Triggers) -> Result<Self> {
        let mut this = Self::begin(sql, true)?;
        if triggers == Triggers::Off {
            this.sql.run("SET LOCAL session_replication_role = replica").map_err(|error| {
                error.hint("only a superuser, or a role with GRANT SET ON PARAMETER session_replication_role, silences triggers")
            })?;
        }
        Ok(this)
    }

    fn begin(mut sql: Sql, writes: bool) -> Result<Self> {
        let access = if writes { "WRITE" } else { "ONLY" };
        sql.run(&format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ {access}"))?;
        let mut this = Self { sql, theirs: true, writes };
        this.ours()?;
        this.sql.run(AS_TEXT)?;
        if writes {
            this.sql.run(LIMITS)?;
        }
        Ok(this)
    }

    /// What the transaction did is done, durably.
    pub fn commit(mut self) -> Result<()> {
        self.sql.run("COMMIT")
    }

    /// The transaction is undone; the connection is of use again.
    pub fn roll_back(mut self) -> Result<Sql> {
        self.sql.run("ROLLBACK")?;
        Ok(self.sql)
    }

    /// Of the server's process, for people who look for it.
    pub fn transaction(&mut self) -> Result<String> {
        self.sql.value("SELECT pg_catalog.pg_current_xact_id()::pg_catalog.text", &[])
    }

    pub fn database(&mut self) -> Result<String> {
        self.sql.value("SELECT pg_catalog.current_database()", &[])
    }

    /// Settings under which values are compared and names are whole.
    fn ours(&mut self) -> Result<()> {
        if self.theirs {
            self.sql.run(OURS)?;
            self.theirs = false;
        }
        Ok(())
    }

    /// Settings that the role has by itself: bodies of triggers rely on its search path.
    fn theirs(&mut self) -> Result<()> {
        if !self.theirs {
            for name in ["search_path", "datestyle", "timezone"] {
                self.sql.run(&format!("SET LOCAL {name} TO DEFAULT"))?;
            }
            self.theirs = true;
        }
        Ok(())
    }

    /// Asks in pieces of keys; what comes back carries the index of its key in the first column.
    fn by_keys(&mut self, keys: &[Vec<String>], width: usize, text: &str) -> Result<Vec<(usize, Row)>> {
        self.ours()?;
        let mut found = Vec::new();
        let mut base = 0;
        for piece in keys.chunks(ROWS_AT_ONCE) {
            let arrays: Vec<String> = (0..width).map(|column| array_of(piece, column)).collect();
            let parameters: Vec<Option<&str>> = arrays.iter().map(|array| Some(array.as_str())).collect();
            for row in self.sql.query(text, &parameters)? {
                let (number, row) = numbered(row)?;
                found.push((base + number, row));
            }
            base += piece.len();
        }
        Ok(found)
    }

    fn insert_now(&mut self, together: &[Insert<'_>]) -> Result<()> {
        let (mut arrays, mut parts, mut rows) = (Vec::new(), Vec::new(), 0);
        for insert in together {
            let first = arrays.len();
            arrays.extend(
                (0..insert.columns.len()).map(|column| {
                    text_array(insert.rows.iter().map(|row| row.get(column).copied().flatten()))
                }),
            );
            parts.push(insert_text(insert.table, &insert.columns, first)?);
            rows += insert.rows.len();
        }
        let parameters: Vec<Option<&str>> = arrays.iter().map(|array| Some(array.as_str())).collect();
        self.theirs()?;
        let inserted = match parts.as_slice() {
            [one] => self.sql.execute(one, &parameters)?,
            several => {
                let named = several.iter().enumerate();
                let with = named.map(|(index, part)| format!("i{index} AS ({part} RETURNING 1)"));
                let sum =
                    (0..several.len()).map(|index| format!("(SELECT pg_catalog.count(*) FROM i{index})"));
                let text = format!(
                    "WITH {} SELECT ({})::pg_catalog.text",
                    with.collect::<Vec<_>>().join(", "),
                    sum.collect::<Vec<_>>().join(" OPERATOR(pg_catalog.+) ")
                );
                self.sql.value(&text, &parameters)?.parse().unwrap_or(0)
            }
        };
        if inserted == rows as u64 {
            return Ok(());
        }
        let what = format!("of {rows} rows the database took {inserted}");
        Err(Error::new(mainstay_core::Code::Refused, what)
            .hint("a trigger or a rule of the database keeps rows out; see --triggers off"))
    }
}

fn array_of(rows: &[Vec<String>], column: usize) -> String {
    text_array(rows.iter().map(|row| row.get(column).map(String::as_str)))
}

fn numbered(mut row: SqlRow) -> Result<(usize, Row)> {
    let number = row.first().and_then(Option::as_deref).and_then(|number| number.parse::<usize>().ok());
    let number = number.and_then(|number| number.checked_sub(1));
    let number = number.ok_or_else(|| Error::bug("a row came without its number"))?;
    row.remove(0);
    Ok((number, row))
}

/// `ROWS FROM (pg_catalog.unnest($1::text[]), …) WITH ORDINALITY AS name(c0, …, n)`.
fn unnested(name: &str, first: usize, width: usize) -> String {
    let parameter = |index| format!("pg_catalog.unnest(${}::pg_catalog.text[])", first + index + 1);
    let parameters: Vec<String> = (0..width).map(parameter).collect();
    let columns: String = (0..width).fold(String::new(), |mut text, index| {
        let _written = write!(text, "c{index}, ");
        text
    });
    format!("ROWS FROM ({}) WITH ORDINALITY AS {name}({columns}n)", parameters.join(", "))
}

/// All columns, as the output functions of their types write them.
fn columns(table: &Table, alias: &str) -> String {
    let column = |sql: &String| format!(", {alias}.{sql}");
    table.columns.iter().map(|known| column(&known.sql)).collect()
}

fn condition(table: &Table, alias: &str, number: usize, condition: &Condition) -> Result<String> {
    let column = column(table, condition.column)?;
    let (mine, value) = (format!("{alias}.{}", column.sql), format!("k.c{number}::{}", condition.value_type));
    Ok(match (condition.equal.as_str(), condition.column_first) {
        // What has no operator of its own is the same when it is written the same.
        ("", _) => {
            let text = "::pg_catalog.text";
            format!("({mine}){text} OPERATOR(pg_catalog.=) ({value}){text}")
        }
        (equal, true) => format!("{mine} {equal} {value}"),
        (equal, false) => format!("{value} {equal} {mine}"),
    })
}

fn column(table: &Table, index: usize) -> Result<&super::model::Column> {
    table.columns.get(index).ok_or_else(|| Error::bug("a column that is not in the catalog"))
}

fn conditions(table: &Table, alias: &str, all: &[Condition]) -> Result<String> {
    let texts: Result<Vec<String>> =
        all.iter().enumerate().map(|(number, one)| condition(table, alias, number, one)).collect();
    Ok(texts?.join(" AND "))
}

fn key_conditions(table: &Table) -> Result<Vec<Condition>> {
    table.key()?;
    Condition::of_key(table).ok_or_else(|| Error::bug("a key that names no columns"))
}

/// The values of the parameters from `$first + 1` on into their columns, by the types of these.
fn insert_text(table: &Table, set: &[usize], first: usize) -> Result<String> {
    let set: Vec<_> = set.iter().map(|index| column(table, *index)).collect::<Result<_>>()?;
    let names: Vec<&str> = set.iter().map(|column| column.sql.as_str()).collect();
    let values = set.iter().enumerate().map(|(index, column)| format!("k.c{index}::{}", column.sql_type));
    Ok(format!(
        "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE SELECT {} FROM {}",
        table.sql,
        names.join(", "),
        values.collect::<Vec<_>>().join(", "),
        unnested("k", first, set.len())
    ))
}

impl Database for Postgres {
    fn catalog(&mut self) -> Result<Catalog> {
        self.ours()?;
        catalog::catalog(&mut self.sql)
    }

    fn rows(
        &mut self,
        table: &Table,
        by: &[Condition],
        values: &[Vec<String>],
        lock: bool,
    ) -> Result<Vec<(usize, Row)>> {
        let text = format!(
            "SELECT k.n{} FROM {} JOIN {}{} AS t ON {}{}",
            columns(table, "t"),
            unnested("k", 0, by.len()),
            table.only,
            table.sql,
            conditions(table, "t", by)?,
            if lock { " FOR KEY SHARE OF t" } else { "" }
        );
        self.by_keys(values, by.len(), &text)
    }

    fn matching(&mut self, table: &Table, wanted: &[(usize, &str)], limit: usize) -> Result<Vec<Row>> {
        self.ours()?;
        let is_key = |key: &super::model::Key| {
            key.columns.len() == wanted.len()
                && key.columns.iter().all(|index| wanted.iter().any(|(column, _)| column == index))
        };
        if let Some(key) = table.key.as_ref().filter(|key| is_key(key)) {
            let value = |index: &usize| wanted.iter().find(|(column, _)| column == index);
            let values: Option<Vec<String>> =
                key.columns.iter().map(|index| value(index).map(|(_, value)| (*value).to_owned())).collect();
            let found = self.rows(table, &key_conditions(table)?, &[values.unwrap_or_default()], false)?;
            return Ok(found.into_iter().map(|(_, row)| row).collect());
        }
        let mut tests = Vec::new();
        for (index, (position, _)) in wanted.iter().enumerate() {
            let column = column(table, *position)?;
            tests.push(format!(
                "(t.{})::pg_catalog.text OPERATOR(pg_catalog.=) (${}::pg_catalog.text::{})::pg_catalog.text",
                column.sql,
                index + 1,
                column.sql_type
            ));
        }
        let text = format!(
            "SELECT 1{} FROM {}{} AS t WHERE {} LIMIT {limit}",
            columns(table, "t"),
            table.only,
            table.sql,
            tests.join(" AND ")
        );
        let parameters: Vec<Option<&str>> = wanted.iter().map(|(_, value)| Some(*value)).collect();
        let rows = self.sql.query(&text, &parameters)?;
        rows.into_iter().map(|row| numbered(row).map(|(_, row)| row)).collect()
    }

    fn linked(
        &mut self,
        link: &Link,
        parent: &Table,
        child: &Table,
        keys: &[Vec<String>],
    ) -> Result<Vec<(usize, Row)>> {
        let by = key_conditions(parent)?;
        let text = format!(
            "SELECT k.n{} FROM {} JOIN {}{} AS parent ON {} JOIN {}{} AS child ON ({}\n)",
            columns(child, "child"),
            unnested("k", 0, by.len()),
            parent.only,
            parent.sql,
            conditions(parent, "parent", &by)?,
            child.only,
            child.sql,
            link.on
        );
        self.by_keys(keys, by.len(), &text).map_err(|error| {
            error.during(format!(
                "the link from {} to {} in the record definition fails",
                child.name, parent.name
            ))
        })
    }

    fn defaults(&mut self, table: &Table, wanted: &[usize]) -> Result<Row> {
        self.ours()?;
        let mut values = Vec::new();
        for index in wanted {
            let column = column(table, *index)?;
            let expression = column.default.as_deref().filter(|text| !text.is_empty()).unwrap_or("NULL");
            values.push(format!("({expression})::{}", column.sql_type));
        }
        let rows = self.sql.query(&format!("SELECT {}", values.join(", ")), &[])?;
        rows.into_iter().next().ok_or_else(|| Error::bug("defaults have no values"))
    }

    fn clashes(
        &mut self,
        table: &Table,
        unique: &Unique,
        given: &[usize],
        rows: &[Vec<Option<&str>>],
    ) -> Result<Vec<Clash>> {
        self.ours()?;
        let text = clash_text(table, unique, given)?;
        let mut clashes = Vec::new();
        let mut base = 0;
        for piece in rows.chunks(ROWS_AT_ONCE) {
            let arrays: Vec<String> = (0..given.len())
                .map(|column| text_array(piece.iter().map(|row| row.get(column).copied().flatten())))
                .collect();
            let parameters: Vec<Option<&str>> = arrays.iter().map(|array| Some(array.as_str())).collect();
            for row in self.sql.query(&text, &parameters)? {
                let (number, taken_by) = numbered(row)?;
                clashes.push(Clash { row: base + number, taken_by });
            }
            base += piece.len();
        }
        Ok(clashes)
    }

    fn insert(&mut self, together: &[Insert<'_>]) -> Result<()> {
        let [one] = together else { return self.insert_now(together) };
        let (mut piece, mut bytes) = (Vec::new(), 0);
        for row in &one.rows {
            let length: usize = row.iter().flatten().map(|value| value.len() + 8).sum();
            if !piece.is_empty() && (piece.len() >= ROWS_AT_ONCE || bytes + length > BYTES_AT_ONCE) {
                let rows = std::mem::take(&mut piece);
                self.insert_now(&[Insert { table: one.table, columns: one.columns.clone(), rows }])?;
                bytes = 0;
            }
            bytes += length;
            piece.push(row.clone());
        }
        self.insert_now(&[Insert { table: one.table, columns: one.columns.clone(), rows: piece }])
    }

    fn update(&mut self, table: &Table, set: &[usize], rows: &[Update<'_>]) -> Result<u64> {
        let by = key_conditions(table)?;
        let mut sets = Vec::new();
        for (index, position) in set.iter().enumerate() {
            let column = column(table, *position)?;
            sets.push(format!("{} = k.c{}::{}", column.sql, by.len() + index, column.sql_type));
        }
        let text = format!(
            "UPDATE {}{} AS t SET {} FROM {} WHERE {}",
            table.only,
            table.sql,
            sets.join(", "),
            unnested("k", 0, by.len() + set.len()),
            conditions(table, "t", &by)?
        );
        self.theirs()?;
        let mut changed = 0;
        for piece in rows.chunks(ROWS_AT_ONCE) {
            let keys =
                (0..by.len()).map(|column| text_array(piece.iter().map(|row| row.key.get(column).copied())));
            let values = (0..set.len())
                .map(|column| text_array(piece.iter().map(|row| row.values.get(column).copied().flatten())));
            let arrays: Vec<String> = keys.chain(values).collect();
            let parameters: Vec<Option<&str>> = arrays.iter().map(|array| Some(array.as_str())).collect();
            changed += self.sql.execute(&text, &parameters)?;
        }
        Ok(changed)
    }

    fn advance(&mut self, sequence: &str, number: &str) -> Result<Advanced> {
        self.ours()?;
        let may = "SELECT (has_sequence_privilege($1::text, 'USAGE') OR has_sequence_privilege($1::text, 'SELECT'))::text";
        if self.sql.value(may, &[Some(sequence)])? != "true" {
            return Ok(Advanced::Unknown);
        }
        let text = "SELECT setval(s.seqrelid::regclass, greatest($2::text::int8, pg_sequence_last_value(s.seqrelid)))
            FROM pg_sequence s WHERE s.seqrelid = $1::text::regclass AND s.seqincrement > 0 AND $2::text::int8 <= s.seqmax
            AND coalesce(pg_sequence_last_value(s.seqrelid), s.seqstart - 1) < $2::text::int8";
        let moved = !self.sql.query(text, &[Some(sequence), Some(number)])?.is_empty();
        Ok(if moved { Advanced::Moved } else { Advanced::Beyond })
    }

    fn check_deferred(&mut self) -> Result<()> {
        self.theirs()?;
        if self.writes { self.sql.run("SET CONSTRAINTS ALL IMMEDIATE") } else { Ok(()) }
    }
}

/// Which of the given rows would share a key with a row that is there: partial and of expressions as the index says, which
/// the server works out on rows that are not there yet.
fn clash_text(table: &Table, unique: &Unique, given: &[usize]) -> Result<String> {
    let mut image = Vec::new();
    for (index, known) in table.columns.iter().enumerate() {
        let value = match given.iter().position(|column| *column == index) {
            Some(number) => format!("k.c{number}::{}", known.sql_type),
            None => format!("NULL::{}", known.sql_type),
        };
        image.push(format!("{value} AS {}", known.sql));
    }
    let named = |(index, expression): (usize, &String)| format!(", ({expression}) AS u{index}");
    let expressions: String = unique.expressions.iter().enumerate().map(named).collect();
    let predicate = unique.predicate.as_deref().unwrap_or("true");
    let key: String = match &table.key {
        Some(key) => key
            .columns
            .iter()
            .map(|index| column(table, *index).map(|column| format!(", {} AS k{index}", column.sql)))
            .collect::<Result<_>>()?,
        None => String::new(),
    };
    let out: String = table
        .key
        .iter()
        .flat_map(|key| key.columns.iter())
        .map(|index| format!(", there.k{index}"))
        .collect();
    let same = unique.equal.iter().enumerate().map(|(index, equal)| {
        let both = format!("there.u{index} {equal} mine.u{index}");
        if unique.nulls_equal {
            format!("({both} OR (there.u{index} IS NULL AND mine.u{index} IS NULL))")
        } else {
            both
        }
    });
    Ok(format!(
        "SELECT mine.mainstay_n{out} FROM (SELECT mainstay_n{expressions} FROM (SELECT k.n AS mainstay_n, {} FROM {}) AS \
         mainstay_rows WHERE {predicate}) AS mine JOIN (SELECT 1{key}{expressions} FROM {}{} WHERE {predicate}) AS there ON {}",
        image.join(", "),
        unnested("k", 0, given.len()),
        table.only,
        table.sql,
        same.collect::<Vec<_>>().join(" AND ")
    ))
}
