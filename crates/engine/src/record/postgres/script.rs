//! What a restore does, and what takes it back, as SQL that people can read, keep and run. Every literal is quoted by the
//! server.

use mainstay_core::{Error, Result};

use super::super::database::Condition;
use super::super::model::{Table, values};
use super::super::plan::{Member, Plan, Relink};
use super::{Postgres, column, numbered, unnested};
use mainstay_workloads::postgres::text_array;

const HEAD: &str = "BEGIN;
SET LOCAL extra_float_digits = 3; SET LOCAL intervalstyle = 'postgres'; SET LOCAL bytea_output = 'hex';
SET LOCAL xmloption = 'content'; SET LOCAL lc_monetary = 'C'; SET LOCAL standard_conforming_strings = on;
SET LOCAL datestyle = 'ISO, YMD'; SET LOCAL timezone = 'UTC'; SET LOCAL row_security = off;
";

type Literals = Vec<Vec<String>>;

impl Postgres {
    /// The plan as a script for `psql`.
    pub fn script(&mut self, plan: &Plan, title: &str) -> Result<String> {
        let mut text = format!(
            "-- {}\n-- Stop at the first error: psql -v ON_ERROR_STOP=1 -f FILE\n{HEAD}",
            comment(title)
        );
        for step in &plan.steps {
            let mut parts = Vec::new();
            for (table, ids) in step {
                let members: Vec<&Member> = ids.iter().filter_map(|id| plan.members.get(*id)).collect();
                parts.push(self.insert_script(plan, *table, &members)?);
            }
            text.push_str(&together(&parts));
        }
        for relink in plan.relinks.iter().chain(&plan.columns) {
            text.push_str(&self.set_script(plan, relink)?);
        }
        text.push_str("SET CONSTRAINTS ALL IMMEDIATE;\nCOMMIT;\n");
        Ok(text)
    }

    /// What takes an applied plan back, except what has changed since: made in the transaction that applied it.
    pub fn inverse(&mut self, plan: &Plan, title: &str) -> Result<String> {
        let mut text = format!(
            "-- {}\n-- Rows that were changed since, or that others refer to since, stay.\n{HEAD}",
            comment(title)
        );
        for relink in plan.relinks.iter().chain(&plan.columns) {
            text.push_str(&self.emptied_again(plan, relink)?);
        }
        for step in plan.steps.iter().rev() {
            let mut rows = Vec::new();
            for (table, ids) in step {
                let members: Vec<&Member> = ids.iter().filter_map(|id| plan.members.get(*id)).collect();
                rows.push(self.deleted(plan, *table, &members)?);
            }
            text.push_str(&match rows.as_slice() {
                [one] => delete_alone(plan, one)?,
                several => delete_circle(plan, several)?,
            });
        }
        text.push_str("COMMIT;\n");
        Ok(text)
    }

    fn literals(&mut self, rows: &[Vec<Option<&str>>], width: usize) -> Result<Literals> {
        self.ours()?;
        let quoted: String = (0..width).map(|index| format!(", quote_nullable(k.c{index})")).collect();
        let text = format!("SELECT k.n{quoted} FROM {} ORDER BY k.n", unnested("k", 0, width));
        let mut literals = Vec::new();
        for piece in rows.chunks(super::ROWS_AT_ONCE) {
            let arrays: Vec<String> = (0..width)
                .map(|column| text_array(piece.iter().map(|row| row.get(column).copied().flatten())))
                .collect();
            let parameters: Vec<Option<&str>> = arrays.iter().map(|array| Some(array.as_str())).collect();
            for row in self.sql.query(&text, &parameters)? {
                let (_, row) = numbered(row)?;
                literals.push(row.into_iter().map(Option::unwrap_or_default).collect());
            }
        }
        Ok(literals)
    }

    fn insert_script<'a>(&mut self, plan: &'a Plan, table: usize, members: &[&'a Member]) -> Result<String> {
        let gone = || Error::bug("a row of a table that has gone");
        let columns = plan.both.given(table)?;
        let source: Vec<usize> = columns.iter().filter_map(|column| plan.both.back(table, *column)).collect();
        let value = |member: &'a Member, column: &usize| member.row.get(*column).and_then(Option::as_deref);
        let rows: Vec<Vec<Option<&str>>> = members
            .iter()
            .map(|member| source.iter().map(|column| value(member, column)).collect())
            .collect();
        let literals = self.literals(&rows, columns.len())?;
        let into = plan.both.live.table(plan.both.live_of(table).ok_or_else(gone)?)?;
        let known: Vec<_> = columns.iter().map(|index| column(into, *index)).collect::<Result<_>>()?;
        let names: Vec<&str> = known.iter().map(|column| column.sql.as_str()).collect();
        let lines = literals.iter().map(|row| {
            let values =
                row.iter().zip(&known).map(|(value, column)| format!("{value}::{}", column.sql_type));
            format!("  ({})", values.collect::<Vec<_>>().join(", "))
        });
        Ok(format!(
            "INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES\n{}",
            into.sql,
            names.join(", "),
            lines.collect::<Vec<_>>().join(",\n")
        ))
    }

    fn assignments(&mut self, table: &Table, set: &[usize], values: &[Option<String>]) -> Result<String> {
        let row: Vec<Option<&str>> = values.iter().map(Option::as_deref).collect();
        let literals = self.literals(&[row], set.len())?.pop().unwrap_or_default();
        let mut assignments = Vec::new();
        for (index, literal) in set.iter().zip(literals) {
            let column = column(table, *index)?;
            assignments.push(format!("{} = {literal}::{}", column.sql, column.sql_type));
        }
        Ok(assignments.join(", "))
    }

    /// A condition that is true of the row `t` with the key of another.
    fn key_is(&mut self, table: &Table, row: &super::super::model::Row) -> Result<String> {
        let key = table.key()?;
        let row: Vec<Option<&str>> =
            key.columns.iter().map(|column| row.get(*column).and_then(Option::as_deref)).collect();
        let literals = self.literals(&[row], key.columns.len())?.pop().unwrap_or_default();
        key_text(table, "t", &literals)
    }

    /// Sets columns that are as the plan saw them, or stops the script.
    fn set_script(&mut self, plan: &Plan, relink: &Relink) -> Result<String> {
        let update = self.update_script(plan, relink, &before(relink), &relink.values)?;
        let table = plan.both.live.table(relink.table)?;
        let what = format!(
            "{} {} was changed since the plan, or the database keeps the change out; rows: ",
            table.name,
            table.shown_key(&relink.row)
        );
        let what = self.literals(&[vec![Some(&what)]], 1)?.pop().and_then(|mut row| row.pop());
        // What cannot be read as a number is the error that people see.
        Ok(format!(
            "WITH changed AS ({update} RETURNING 1)\nSELECT CASE WHEN pg_catalog.count(*) = 1 THEN 1 \
             ELSE pg_catalog.concat({}, pg_catalog.count(*))::pg_catalog.int4 END FROM changed;\n",
            what.unwrap_or_default()
        ))
    }

    fn emptied_again(&mut self, plan: &Plan, relink: &Relink) -> Result<String> {
        Ok(format!("{};\n", self.update_script(plan, relink, &relink.values, &before(relink))?))
    }

    /// Gives the columns of a row the values of `to`, while they have those of `from`.
    fn update_script(
        &mut self,
        plan: &Plan,
        relink: &Relink,
        from: &[Option<String>],
        to: &[Option<String>],
    ) -> Result<String> {
        let table = plan.both.live.table(relink.table)?;
        let set = self.assignments(table, &relink.set, to)?;
        let key = self.key_is(table, &relink.row)?;
        let from: Vec<Option<&str>> = from.iter().map(Option::as_deref).collect();
        let literals = self.literals(&[from], relink.set.len())?.pop().unwrap_or_default();
        let mut same = Vec::new();
        for (index, literal) in relink.set.iter().zip(literals) {
            let column = column(table, *index)?;
            same.push(format!(
                "t.{}::pg_catalog.text IS NOT DISTINCT FROM ({literal}::{})::pg_catalog.text",
                column.sql, column.sql_type
            ));
        }
        let (only, same) = (&table.only, same.join(" AND "));
        Ok(format!("UPDATE {only}{} AS t SET {set} WHERE {key} AND {same}", table.sql))
    }

    /// Rows that are to be deleted again, as they are now.
    fn deleted(&mut self, plan: &Plan, table: usize, members: &[&Member]) -> Result<Deleted> {
        let gone = || Error::bug("a row of a table that has gone");
        let index = plan.both.live_of(table).ok_or_else(gone)?;
        let from = plan.both.live.table(index)?;
        let key = &plan.both.point.table(table)?.key()?.columns;
        let keys: Vec<Vec<String>> = members.iter().filter_map(|member| values(&member.row, key)).collect();
        let images = self.images(from, &plan.both.live_key(table).ok_or_else(gone)?, &keys)?;
        let rows: Vec<Vec<Option<&str>>> =
            keys.iter().map(|key| key.iter().map(|value| Some(value.as_str())).collect()).collect();
        let literals = self.literals(&rows, key.len())?;
        Ok(Deleted { table: index, keys: literals, images })
    }

    /// Whole rows as literals, by their keys.
    fn images(
        &mut self,
        table: &Table,
        conditions: &[Condition],
        keys: &[Vec<String>],
    ) -> Result<Vec<String>> {
        // With the role's own search path, as whoever runs the script has.
        self.theirs()?;
        self.sql.run("SET LOCAL datestyle = 'ISO, YMD'")?;
        self.sql.run("SET LOCAL timezone = 'UTC'")?;
        let text = format!(
            "SELECT k.n, pg_catalog.quote_literal((t.*)::pg_catalog.text) FROM {} JOIN {}{} AS t ON {}",
            unnested("k", 0, conditions.len()),
            table.only,
            table.sql,
            super::conditions(table, "t", conditions)?
        );
        let mut images = vec![String::new(); keys.len()];
        let mut base = 0;
        for piece in keys.chunks(super::ROWS_AT_ONCE) {
            let arrays: Vec<String> =
                (0..conditions.len()).map(|column| super::array_of(piece, column)).collect();
            let parameters: Vec<Option<&str>> = arrays.iter().map(|array| Some(array.as_str())).collect();
            for row in self.sql.query(&text, &parameters)? {
                let (number, row) = numbered(row)?;
                if let Some(image) = images.get_mut(base + number) {
                    *image = row.into_iter().next().flatten().unwrap_or_default();
                }
            }
            base += piece.len();
        }
        Ok(images)
    }
}

/// What the columns that are set have when the plan is made.
fn before(relink: &Relink) -> Vec<Option<String>> {
    relink.set.iter().map(|column| relink.row.get(*column).cloned().flatten()).collect()
}

/// Rows of one table, as literals: their keys, and all of each.
struct Deleted {
    table: usize,
    keys: Vec<Vec<String>>,
    images: Vec<String>,
}

impl Deleted {
    /// A condition that is true of each of the rows under the name `alias`; `unchanged` only while they are what they were.
    fn is_one(&self, plan: &Plan, alias: &str, unchanged: bool) -> Result<String> {
        let table = plan.both.live.table(self.table)?;
        let mut tests = Vec::new();
        for (key, image) in self.keys.iter().zip(&self.images) {
            let key = key_text(table, alias, key)?;
            let image = format!(" AND ({alias}.*)::pg_catalog.text = {image}");
            tests.push(format!("({key}{})", if unchanged { image.as_str() } else { "" }));
        }
        Ok(format!("({})", tests.join("\n  OR ")))
    }
}

/// For each foreign key to a table, the children that the row `t` has by it: `c`.
fn children(plan: &Plan, parent: usize) -> Result<Vec<(usize, String)>> {
    let from = plan.both.live.table(parent)?;
    let mut children = Vec::new();
    for reference in plan.both.live.references.iter().filter(|known| known.parent == parent) {
        let child = plan.both.live.table(reference.child)?;
        let triples = reference.child_columns.iter().zip(&reference.parent_columns).zip(&reference.equal);
        let mut same = Vec::new();
        for ((mine, theirs), equal) in triples {
            same.push(format!("t.{} {equal} c.{}", column(from, *theirs)?.sql, column(child, *mine)?.sql));
        }
        children.push((
            reference.child,
            format!("{}{} AS c WHERE {}", child.only, child.sql, same.join(" AND ")),
        ));
    }
    Ok(children)
}

fn delete_alone(plan: &Plan, rows: &Deleted) -> Result<String> {
    let table = plan.both.live.table(rows.table)?;
    let children = children(plan, rows.table)?.into_iter();
    let unreferred: String =
        children.map(|(_, child)| format!("\n  AND NOT EXISTS (SELECT 1 FROM {child})")).collect();
    Ok(format!(
        "DELETE FROM {}{} AS t WHERE {}{unreferred};\n",
        table.only,
        table.sql,
        rows.is_one(plan, "t", true)?
    ))
}

/// Rows in a circle go together, or not at all: when one of them has changed, or anything else refers to one.
fn delete_circle(plan: &Plan, circle: &[Deleted]) -> Result<String> {
    let (mut tests, mut deletes) = (Vec::new(), Vec::new());
    for (index, rows) in circle.iter().enumerate() {
        let table = plan.both.live.table(rows.table)?;
        let from = format!("{}{} AS t", table.only, table.sql);
        tests.push(format!(
            "(SELECT pg_catalog.count(*) FROM {from} WHERE {}) = {}",
            rows.is_one(plan, "t", true)?,
            rows.keys.len()
        ));
        for (child, referring) in children(plan, rows.table)? {
            let inside = match circle.iter().find(|rows| rows.table == child) {
                Some(rows) => format!(" AND NOT {}", rows.is_one(plan, "c", false)?),
                None => String::new(),
            };
            tests.push(format!(
                "NOT EXISTS (SELECT 1 FROM {from} WHERE {} AND EXISTS (SELECT 1 FROM {referring}{inside}))",
                rows.is_one(plan, "t", false)?
            ));
        }
        deletes.push(format!(
            "d{index} AS (DELETE FROM {from} WHERE {} AND EXISTS (SELECT 1 FROM whole) RETURNING 1)",
            rows.is_one(plan, "t", false)?
        ));
    }
    Ok(format!(
        "WITH whole AS (SELECT 1 WHERE {}),\n{}\nSELECT 1;\n",
        tests.join("\n  AND "),
        deletes.join(",\n")
    ))
}

fn key_text(table: &Table, alias: &str, literals: &[String]) -> Result<String> {
    let key = table.key()?;
    let mut tests = Vec::new();
    for ((index, equal), literal) in key.columns.iter().zip(&key.equal).zip(literals) {
        let column = column(table, *index)?;
        let value = format!("{literal}::{}", column.sql_type);
        tests.push(if equal.is_empty() {
            format!("({alias}.{})::pg_catalog.text = ({value})::pg_catalog.text", column.sql)
        } else {
            format!("{alias}.{} {equal} {value}", column.sql)
        });
    }
    Ok(tests.join(" AND "))
}

/// Statements that are one act.
fn together(parts: &[String]) -> String {
    match parts {
        [] => String::new(),
        [one] => format!("{one};\n"),
        several => {
            let named = several.iter().enumerate();
            let named = named.map(|(index, part)| format!("i{index} AS ({part} RETURNING 1)"));
            format!("WITH {}\nSELECT 1;\n", named.collect::<Vec<_>>().join(",\n"))
        }
    }
}

/// What cannot end the comment that it is in.
fn comment(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

#[cfg(test)]
mod tests {
    use super::{comment, together};

    #[test]
    fn a_comment_cannot_be_left() {
        assert_eq!(comment("a\nDROP TABLE x;\r--"), "a DROP TABLE x; --");
    }

    #[test]
    fn several_statements_are_one_act() {
        assert_eq!(together(&["A".into()]), "A;\n");
        assert_eq!(
            together(&["A".into(), "B".into()]),
            "WITH i0 AS (A RETURNING 1),\ni1 AS (B RETURNING 1)\nSELECT 1;\n"
        );
    }
}
