//! The lines that tell of single records.

use jiff::tz::TimeZone;
use schemars::JsonSchema;
use serde::Serialize;

use super::lines::Line;
use super::text::{clean, seconds, shown_time};

/// What happened to a row.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct RecordEvent {
    /// Table and key.
    pub row: String,
    /// `inserted`, `changed`, `deleted`, `moved` or `rewritten`.
    pub what: String,
    /// When its transaction was committed.
    pub time: String,
    pub transaction: u32,
    /// The place of the change in the log, and that of the commit.
    pub lsn: String,
    pub committed: String,
}

/// What was looked at to tell what happened to a row.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct RecordHistory {
    pub row: String,
    /// The point that it begins at, and whether the row was there then.
    pub point: String,
    pub was_there: bool,
    pub events: u64,
    /// The log was read between these places.
    pub from: String,
    pub to: String,
}

/// What a restore of a record would do.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct RecordPlan {
    pub row: String,
    /// Where in which log the record is taken from.
    pub from: String,
    pub database: String,
    pub inserts: u64,
    pub relinks: u64,
    /// Columns of the row itself that get their old values.
    pub columns: u64,
    /// For people: the rows below what they belong to.
    pub tree: Vec<String>,
    pub rows: Vec<RecordRow>,
    pub notes: Vec<String>,
    /// How tables of the record have changed since.
    pub schema: Vec<String>,
    /// Triggers that will run.
    pub triggers: Vec<String>,
    /// Why it cannot be done.
    pub blocked: Vec<String>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct RecordRow {
    pub table: String,
    pub key: String,
    /// `insert`, `same`, `changed-later`, `gone-later`, `no-table` or `erased-by-law`.
    pub fate: String,
    pub changes: Vec<RecordChange>,
    /// Foreign keys that come back empty, since what they referred to was deleted later.
    pub emptied: Vec<String>,
}

#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct RecordChange {
    pub column: String,
    pub was: Option<String>,
    pub is: Option<String>,
}

/// A record is back.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct RecordRestored {
    pub row: String,
    pub inserted: u64,
    pub relinked: u64,
    pub columns: u64,
    /// Sequences that were moved forward, and those that the role may not look at.
    pub sequences: Vec<String>,
    pub unseen_sequences: Vec<String>,
    /// What triggers made different from how it was.
    pub different: Vec<String>,
    pub transaction: String,
    /// The point that holds the receipt and the script that takes it back.
    pub receipt: String,
    pub seconds: f64,
}

/// A text to be kept or run: `definition` or `script`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct RecordText {
    pub what: String,
    pub text: String,
}

/// A row that may never come back.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ErasedRow {
    pub workload: String,
    pub database: String,
    pub table: String,
    pub key: String,
    pub who: String,
    pub why: String,
    pub decided: Option<String>,
    /// It is on the list; otherwise it was just taken off.
    pub on_the_list: bool,
}

/// As people read them; `None` for lines of other things.
pub(super) fn line(line: &Line, zone: &TimeZone) -> Option<String> {
    Some(match line {
        Line::RecordEvent(event) => format!(
            "{}  {} by transaction {} at {} · {}\n",
            shown_time(&event.time, zone),
            event.what,
            event.transaction,
            event.committed,
            clean(&event.row)
        ),
        Line::RecordHistory(history) => format!(
            "{}: {} at point {} · log read from {} to {}\n",
            clean(&history.row),
            if history.was_there { "was there" } else { "was not there" },
            history.point,
            history.from,
            history.to
        ),
        Line::RecordPlan(plan) => planned(plan),
        Line::RecordRestored(done) => restored(done),
        Line::RecordText(text) => text.text.clone(),
        Line::ErasedRow(row) => erased(row, zone),
        _ => return None,
    })
}

fn planned(plan: &RecordPlan) -> String {
    let mut text = format!("{} as in {}\n", clean(&plan.row), clean(&plan.from));
    for line in &plan.tree {
        text += &format!("  {}\n", clean(line));
    }
    for row in plan.rows.iter().take(1) {
        for change in &row.changes {
            let value = |value: &Option<String>| value.as_deref().map_or("no value".into(), clean);
            text += &format!(
                "  {}: was {}, is {}\n",
                clean(&change.column),
                value(&change.was),
                value(&change.is)
            );
        }
    }
    let lists = [
        ("note", &plan.notes),
        ("schema", &plan.schema),
        ("trigger", &plan.triggers),
        ("BLOCKED", &plan.blocked),
    ];
    for (name, list) in lists {
        for line in list {
            text += &format!("{name}: {}\n", clean(line));
        }
    }
    let columns = match plan.columns {
        0 => String::new(),
        count => format!(", {count} columns get their old values"),
    };
    text += &format!("{} rows come back, {} refer to it again{columns}\n", plan.inserts, plan.relinks);
    text
}

fn restored(done: &RecordRestored) -> String {
    let mut text = String::new();
    for line in &done.different {
        text += &format!("changed by a trigger: {}\n", clean(line));
    }
    for line in &done.sequences {
        text += &format!("sequence moved forward: {}\n", clean(line));
    }
    for line in &done.unseen_sequences {
        text += &format!(
            "whether this sequence gives out the same numbers again is not known: {}\n",
            clean(line)
        );
    }
    text += &format!(
        "{} is back: {} rows, {} refer to it again, {} columns · transaction {} · {}\nTo take it back: mainstay cat {} take-back.sql\n",
        clean(&done.row),
        done.inserted,
        done.relinked,
        done.columns,
        done.transaction,
        seconds(done.seconds),
        done.receipt
    );
    text
}

fn erased(row: &ErasedRow, zone: &TimeZone) -> String {
    let since =
        row.decided.as_ref().map_or_else(String::new, |time| format!(" · since {}", shown_time(time, zone)));
    let what = if row.on_the_list { "never comes back" } else { "may come back again" };
    format!(
        "{}/{}: {} {} {what} · {}: {}{since}\n",
        clean(&row.workload),
        clean(&row.database),
        clean(&row.table),
        clean(&row.key),
        clean(&row.who),
        clean(&row.why)
    )
}
