//! Carries a plan out in the transaction that it was made in, and believes nothing of it until it has looked.

use std::collections::BTreeMap;

use mainstay_core::{Code, Error, Result};

use super::database::{Advanced, Database, Insert, Update};
use super::model::{Row, Table, values};
use super::plan::{Fate, Member, Plan, Relink};

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    pub inserted: u64,
    pub relinked: u64,
    /// Columns of the root that have their old values.
    pub columns: u64,
    /// Sequences that had to be moved forward.
    pub sequences: Vec<String>,
    /// Sequences that the role may not look at: whether they give out the same numbers again, nobody has checked.
    pub unseen: Vec<String>,
    /// What programs of the database made different from how it was.
    pub different: Vec<String>,
}

/// Brings the rows of a plan back, and checks in the same transaction that they are there, are what they were, and refer to
/// what is there. The caller commits.
///
/// Errors: in all of them the transaction is to be dropped, and nothing has happened.
pub fn apply(live: &mut dyn Database, plan: &Plan) -> Result<Applied> {
    let mut applied = Applied::default();
    for step in &plan.steps {
        applied.inserted += insert(live, plan, step)?;
    }
    for group in groups(&plan.relinks).into_values() {
        applied.relinked += update(live, plan, &group)?;
    }
    if let Some(columns) = &plan.columns {
        applied.columns += update(live, plan, &[columns])?;
    }
    advance(live, plan, &mut applied)?;
    live.check_deferred()?;
    let mut tables: BTreeMap<usize, Vec<&Member>> = BTreeMap::new();
    for member in plan.members.iter().filter(|member| member.fate == Fate::Insert) {
        tables.entry(member.table).or_default().push(member);
    }
    for (table, members) in &tables {
        present(live, plan, *table, members, &mut applied)?;
        referring(live, plan, *table, members)?;
    }
    for relink in plan.relinks.iter().chain(&plan.columns) {
        set(live, plan, relink, &mut applied)?;
    }
    Ok(applied)
}

/// One act: rows of one table, or rows of several that refer to each other in a circle.
fn insert(live: &mut dyn Database, plan: &Plan, step: &BTreeMap<usize, Vec<usize>>) -> Result<u64> {
    let (mut inserts, mut names, mut count) = (Vec::new(), Vec::new(), 0);
    for (table, ids) in step {
        let into = plan.both.live_of(*table).ok_or_else(|| Error::bug("a row of a table that has gone"))?;
        let into = plan.both.live.table(into)?;
        let columns = plan.both.given(*table)?;
        let source: Vec<usize> =
            columns.iter().filter_map(|column| plan.both.back(*table, *column)).collect();
        let members = ids.iter().filter_map(|id| plan.members.get(*id));
        let rows = members.map(|member| {
            source.iter().map(|column| member.row.get(*column).and_then(Option::as_deref)).collect()
        });
        inserts.push(Insert { table: into, columns, rows: rows.collect() });
        names.push(into.name.to_string());
        count += ids.len() as u64;
    }
    live.insert(&inserts)
        .map_err(|error| error.during(format!("cannot bring back rows of {}", names.join(", "))))?;
    Ok(count)
}

/// Rows of one table in which the same columns are set.
fn groups(relinks: &[Relink]) -> BTreeMap<(usize, &[usize]), Vec<&Relink>> {
    let mut groups: BTreeMap<_, Vec<&Relink>> = BTreeMap::new();
    for relink in relinks {
        groups.entry((relink.table, relink.set.as_slice())).or_default().push(relink);
    }
    groups
}

fn update(live: &mut dyn Database, plan: &Plan, relinks: &[&Relink]) -> Result<u64> {
    let Some(first) = relinks.first() else { return Ok(0) };
    let table = plan.both.live.table(first.table)?;
    let mut updates = Vec::new();
    for relink in relinks {
        let key = table.key()?.columns.iter().map(|column| relink.row.get(*column)?.as_deref());
        let key: Option<Vec<&str>> = key.collect();
        let key = key.ok_or_else(|| Error::bug("a row without a key is to be changed"))?;
        updates.push(Update { key, values: relink.values.iter().map(Option::as_deref).collect() });
    }
    let changed = live
        .update(table, &first.set, &updates)
        .map_err(|error| error.during(format!("cannot set {} in {}", first.by, table.name)))?;
    if changed == updates.len() as u64 {
        return Ok(changed);
    }
    let what = format!("of {} rows of {} the database changed {changed}", updates.len(), table.name);
    Err(Error::new(Code::Refused, what).hint("a trigger or a rule of the database keeps changes out"))
}

/// Numbers that came back are not given out again.
fn advance(live: &mut dyn Database, plan: &Plan, applied: &mut Applied) -> Result<()> {
    let mut highest: BTreeMap<String, i128> = BTreeMap::new();
    for member in plan.members.iter().filter(|member| member.fate == Fate::Insert) {
        let Some(table) = plan.both.live_of(member.table) else { continue };
        for (index, column) in plan.both.live.table(table)?.columns.iter().enumerate() {
            let Some(sequence) = &column.sequence else { continue };
            let value = plan.both.back(member.table, index).and_then(|from| member.row.get(from)?.as_deref());
            if let Some(number) = value.and_then(|value| value.parse::<i128>().ok()) {
                let known = highest.entry(sequence.clone()).or_insert(number);
                *known = number.max(*known);
            }
        }
    }
    for (sequence, number) in highest {
        match live.advance(&sequence, &number.to_string())? {
            Advanced::Moved => applied.sequences.push(sequence),
            Advanced::Unknown => applied.unseen.push(sequence),
            Advanced::Beyond => {}
        }
    }
    Ok(())
}

/// Every row is there, and what it was.
fn present(
    live: &mut dyn Database,
    plan: &Plan,
    table: usize,
    members: &[&Member],
    applied: &mut Applied,
) -> Result<()> {
    let lost = || Error::bug("a row of a table that has gone");
    let conditions = plan.both.live_key(table).ok_or_else(lost)?;
    let into = plan.both.live.table(plan.both.live_of(table).ok_or_else(lost)?)?;
    let was = plan.both.point.table(table)?;
    let keys: Vec<Vec<String>> =
        members.iter().filter_map(|member| values(&member.row, &was.key().ok()?.columns)).collect();
    let mut there: BTreeMap<usize, Row> = live.rows(into, &conditions, &keys, false)?.into_iter().collect();
    for (index, member) in members.iter().enumerate() {
        let shown = format!("{} {}", was.name, was.shown_key(&member.row));
        let Some(row) = there.remove(&index) else {
            return Err(Error::new(Code::Refused, format!("{shown} is not there after it was inserted"))
                .hint("a trigger or a rule of the database keeps rows out; see --triggers off"));
        };
        for (column, then, now) in plan.both.differences(table, &member.row, &row) {
            different(into, plan, &shown, (&column, &then, &now), applied)?;
        }
    }
    Ok(())
}

/// A value is not what it was: the work of a trigger, or a reason to stop.
fn different(
    table: &Table,
    plan: &Plan,
    shown: &str,
    (column, then, now): (&str, &Option<String>, &Option<String>),
    applied: &mut Applied,
) -> Result<()> {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "no value".into());
    let what = format!("{shown}: {column} was {} and came back as {}", text(then), text(now));
    let suffix = format!(" on {}", table.name);
    if plan.triggers.iter().any(|trigger| trigger.ends_with(&suffix)) {
        applied.different.push(what);
        return Ok(());
    }
    Err(Error::new(Code::Refused, what)
        .hint("the type of the column has changed in a way that loses something"))
}

/// What rows refer to is there, and stays until the transaction ends: with triggers silenced nobody else sees to that.
fn referring(live: &mut dyn Database, plan: &Plan, table: usize, members: &[&Member]) -> Result<()> {
    let index = plan.both.live_of(table);
    for reference in plan.both.live.references.iter().filter(|known| Some(known.child) == index) {
        let Some((columns, conditions)) = plan.both.upward(reference) else { continue };
        let parent = plan.both.live.table(reference.parent)?;
        let holders: Vec<(&Member, Vec<String>)> =
            members.iter().filter_map(|member| Some((*member, values(&member.row, &columns)?))).collect();
        let keys: Vec<Vec<String>> = holders.iter().map(|(_, key)| key.clone()).collect();
        let mut found = vec![false; keys.len()];
        for (at, _) in live.rows(parent, &conditions, &keys, true)? {
            if let Some(known) = found.get_mut(at) {
                *known = true;
            }
        }
        if let Some(at) = found.iter().position(|found| !found) {
            let member = holders.get(at).map(|(member, _)| plan.key(member)).unwrap_or_default();
            let what = format!("{member} refers to nothing by {}", reference.name);
            return Err(Error::new(Code::Refused, what).hint("nothing was changed; look at the plan again"));
        }
    }
    Ok(())
}

/// Columns that were set have their values, and what they refer to is there.
fn set(live: &mut dyn Database, plan: &Plan, relink: &Relink, applied: &mut Applied) -> Result<()> {
    let table = plan.both.live.table(relink.table)?;
    let conditions = super::database::Condition::of_key(table)
        .ok_or_else(|| Error::bug("a row without a key was changed"))?;
    let key = values(&relink.row, &table.key()?.columns).unwrap_or_default();
    let row = live.rows(table, &conditions, &[key], false)?.into_iter().next();
    let shown = format!("{} {}", table.name, table.shown_key(&relink.row));
    let row =
        row.ok_or_else(|| Error::new(Code::Refused, format!("{shown} is not there after it was changed")))?.1;
    for (column, value) in relink.set.iter().zip(&relink.values) {
        let now = row.get(*column).cloned().flatten();
        if now != *value {
            let name = table.columns.get(*column).map(|column| column.name.as_str()).unwrap_or_default();
            different(table, plan, &shown, (name, value, &now), applied)?;
        }
    }
    for reference in plan.both.live.references.iter().filter(|known| known.child == relink.table) {
        if !reference.child_columns.iter().any(|column| relink.set.contains(column)) {
            continue;
        }
        let Some(key) = values(&row, &reference.child_columns) else { continue };
        let Some((_, conditions)) = plan.both.upward(reference) else { continue };
        let parent = plan.both.live.table(reference.parent)?;
        if live.rows(parent, &conditions, &[key], true)?.is_empty() {
            let what = format!("{shown} refers to nothing by {}", reference.name);
            return Err(Error::new(Code::Refused, what).hint("nothing was changed; look at the plan again"));
        }
    }
    Ok(())
}
