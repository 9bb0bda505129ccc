//! What a restore of one record would do. One rule decides every question: afterwards the live database equals what it
//! would have been had the record never been deleted.

use std::collections::{BTreeMap, BTreeSet};

use mainstay_core::{Code, Error, Result};

use super::both::Both;
use super::database::Database;
use super::definition::{Definition, Triggers};
use super::gather::Gather;
use super::model::{Reference, Row, TableName};
use super::needs::settle;
use super::order::order;

/// Which record, and by which words.
pub struct Ask<'a> {
    /// As a person calls it.
    pub table: &'a str,
    /// Columns and their values.
    pub wanted: &'a [(String, String)],
    pub definition: &'a Definition,
    /// Columns of the root that get their old values back although the row is there.
    pub columns: &'a [String],
    /// What is missing below the root comes back although the root is there.
    pub below: bool,
    /// Whether a row may never come back: its person was erased by law. By the table and the shown key.
    pub erased: &'a dyn Fn(&TableName, &str) -> bool,
    /// A record of more rows is a mistake in its definition.
    pub rows_max: usize,
}

/// Why a row is looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Root,
    /// It refers to another row, by a foreign key or a link.
    Child {
        of: usize,
        by: String,
    },
    /// Another row refers to it.
    Parent {
        of: usize,
        by: String,
    },
}

/// What becomes of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is missing in the live database, and comes back.
    Insert,
    /// It is there as it was.
    Same,
    /// It is there and was changed later: column, what it was, what it is. It stays as it is.
    Changed(Vec<(String, Option<String>, Option<String>)>),
    /// It would have gone with another row that was deleted later, named here.
    Gone(String),
    /// Its table has gone.
    NoTable,
    /// It may not come back, by law.
    Erased,
    /// Nothing that comes back needs it.
    NotNeeded,
}

/// A row of the point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// In the catalog of the point.
    pub table: usize,
    /// By the columns of the point; references to what has gone are emptied already.
    pub row: Row,
    pub origin: Origin,
    pub fate: Fate,
    /// References that were emptied, because what they referred to was deleted later.
    pub emptied: Vec<String>,
}

/// A row that is there, and whose emptied reference is set again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relink {
    /// In the catalog of the live database.
    pub table: usize,
    /// The row as it is there, in its key and the columns that are set at least.
    pub row: Row,
    pub by: String,
    pub set: Vec<usize>,
    pub values: Vec<Option<String>>,
}

/// What applying does, all in one transaction.
#[derive(Debug, Clone)]
pub struct Plan {
    pub both: Both,
    pub members: Vec<Member>,
    /// Members in the order in which they are inserted. Those of one step go in as one act.
    pub steps: Vec<BTreeMap<usize, Vec<usize>>>,
    pub relinks: Vec<Relink>,
    /// What a person should know.
    pub notes: Vec<String>,
    /// How the tables of the record have changed since.
    pub schema: Vec<String>,
    /// Why it cannot be applied.
    pub blocked: Vec<String>,
    /// Live columns that have got other values by the person's wish: those of the root.
    pub columns: Option<Relink>,
    /// Programs of the database that will run.
    pub triggers: Vec<String>,
}

impl Plan {
    /// Rows that come back.
    pub fn inserts(&self) -> usize {
        self.members.iter().filter(|member| member.fate == Fate::Insert).count()
    }

    /// Nothing is to be done.
    pub fn is_empty(&self) -> bool {
        self.inserts() == 0 && self.relinks.is_empty() && self.columns.is_none()
    }

    /// Whether another plan does the same. What stays as it is may have changed between the two.
    pub fn does_as(&self, other: &Self) -> bool {
        let same = |(one, other): (&Member, &Member)| {
            (one.table, &one.row, one.fate.name()) == (other.table, &other.row, other.fate.name())
        };
        let relinks = |plan: &Self| -> Vec<(usize, Vec<usize>, Row)> {
            let all = plan.relinks.iter().chain(&plan.columns);
            all.map(|relink| (relink.table, relink.set.clone(), relink.values.clone())).collect()
        };
        self.members.len() == other.members.len()
            && self.members.iter().zip(&other.members).all(same)
            && relinks(self) == relinks(other)
            && self.blocked == other.blocked
            && self.schema == other.schema
    }

    /// The table of a member, for people.
    pub fn table(&self, member: &Member) -> Result<&TableName> {
        Ok(&self.both.point.table(member.table)?.name)
    }

    /// The key of a member, for people.
    pub fn key(&self, member: &Member) -> String {
        self.both.point.table(member.table).map(|table| table.shown_key(&member.row)).unwrap_or_default()
    }

    pub fn root(&self) -> Result<&Member> {
        self.members.first().ok_or_else(|| Error::bug("a record without a root"))
    }

    /// Errors: [`Code::Refused`] for a plan that cannot be carried out, or that schema changes make doubtful.
    pub fn check(&self, schema_accepted: bool) -> Result<()> {
        if let Some(first) = self.blocked.first() {
            let more = match self.blocked.len() {
                1 => String::new(),
                count => format!(", and {} more reasons", count - 1),
            };
            return Err(Error::new(Code::Refused, "the record cannot come back as things are")
                .because(format!("{first}{more}"))
                .hint("the plan lists them; nothing was changed"));
        }
        if !self.schema.is_empty() && !schema_accepted && !self.is_empty() {
            return Err(Error::new(Code::Refused, "tables of the record have changed since the point")
                .because(self.schema.join("; "))
                .hint("look at the plan; --schema-changed goes on all the same; nothing was changed"));
        }
        Ok(())
    }
}

/// Works out what restoring a record would do: `point` is the database as it was, `live` as it is.
///
/// Errors: [`Code::NotFound`] when there is no such record in the point; [`Code::Usage`] when there are several.
pub fn plan(point: &mut dyn Database, live: &mut dyn Database, ask: &Ask<'_>) -> Result<Plan> {
    let mut both = Both::new(point.catalog()?, live.catalog()?);
    let rules = ask.definition.resolve(&mut both.point)?;
    both.adopt_keys();
    let (root, row) = root(point, &both, ask)?;
    let mut gather = Gather::new(point, live, both, rules, ask);
    gather.down(root, row)?;
    let refs = settle(&mut gather)?;
    let relinks = gather.relinks()?;
    gather.clashes()?;
    let Gather { both, members, mut notes, mut blocked, .. } = gather;
    let steps = order(&members, &refs);
    let columns = columns(&both, &members, ask, &mut blocked)?;
    blocked.extend(below(&both, &members, ask)?);
    if ask.definition.triggers == Triggers::Off {
        let set: Vec<&Relink> = relinks.iter().chain(&columns).collect();
        blocked.extend(unchecked(&both, &members, &set)?);
    }
    let schema = both.changes(&members, &relinks, &mut blocked);
    let triggers = triggers(&both, &members, &relinks, ask.definition.triggers)?;
    notes.extend(both.point.notes.iter().chain(&both.live.notes).cloned());
    notes.sort();
    notes.dedup();
    Ok(Plan { both, members, steps, relinks, notes, schema, blocked, columns, triggers })
}

fn root(point: &mut dyn Database, both: &Both, ask: &Ask<'_>) -> Result<(usize, Row)> {
    let index = both.point.find(ask.table)?;
    let table = both.point.table(index)?;
    let mut wanted = Vec::new();
    for (name, value) in ask.wanted {
        let column = table
            .column(name)
            .ok_or_else(|| Error::new(Code::Usage, format!("{} has no column {name:?}", table.name)))?;
        wanted.push((column, value.as_str()));
    }
    table.key()?;
    let rows = point.matching(table, &wanted, 3)?;
    let shown: Vec<String> = ask.wanted.iter().map(|(name, value)| format!("{name}={value}")).collect();
    match rows.as_slice() {
        [row] => Ok((index, row.clone())),
        [] => {
            let what = format!("there was no {} {} at that moment", table.name, shown.join(" "));
            Err(Error::new(Code::NotFound, what).hint("mainstay record find tells when it was there"))
        }
        several => {
            let keys: Vec<String> = several.iter().map(|row| table.shown_key(row)).collect();
            let what = format!("several rows of {} have {}", table.name, shown.join(" "));
            Err(Error::new(Code::Usage, what)
                .hint(format!("name one by its key, such as {}", keys.join(" or "))))
        }
    }
}

/// Below a root that is there rows are missing: nothing says that they went with it, and rows that were deleted by
/// themselves stay deleted. It may be another record under the same key, too.
fn below(both: &Both, members: &[Member], ask: &Ask<'_>) -> Result<Option<String>> {
    let missing = members.iter().filter(|member| member.fate == Fate::Insert).count();
    let there = |member: &&Member| matches!(member.fate, Fate::Same | Fate::Changed(_));
    let Some(root) = members.first().filter(there).filter(|_| missing > 0 && !ask.below) else {
        return Ok(None);
    };
    let table = both.point.table(root.table)?;
    Ok(Some(format!(
        "{} {} is there, and {missing} rows that belonged to it then are not: they may have been deleted later, by \
         themselves. Restore one of them by its own key, or all with --below",
        table.name,
        table.shown_key(&root.row)
    )))
}

/// Columns of the root that a person wants back.
fn columns(
    both: &Both,
    members: &[Member],
    ask: &Ask<'_>,
    blocked: &mut Vec<String>,
) -> Result<Option<Relink>> {
    let Some(root) = members.first().filter(|_| !ask.columns.is_empty()) else { return Ok(None) };
    let Fate::Changed(differences) = &root.fate else {
        blocked.push("its columns cannot be set: the row is not there, or as it was".into());
        return Ok(None);
    };
    let Some(index) = both.live_of(root.table) else { return Ok(None) };
    let (table, was) = (both.live.table(index)?, both.point.table(root.table)?);
    let mut row = both.as_live(root.table, &root.row)?;
    let (mut set, mut values) = (Vec::new(), Vec::new());
    for name in ask.columns {
        let known = table.column(name).zip(was.column(name));
        let (now, _) =
            known.ok_or_else(|| Error::new(Code::Usage, format!("{} has no column {name:?}", table.name)))?;
        if let Some((_, was, is)) = differences.iter().find(|(column, ..)| column == name) {
            set.push(now);
            values.push(was.clone());
            if let Some(value) = row.get_mut(now) {
                value.clone_from(is);
            }
        }
    }
    let relink = Relink { table: index, row, by: "its columns".into(), set, values };
    Ok(Some(relink).filter(|relink| !relink.set.is_empty()))
}

/// What only triggers of the database's own would see to, and these are silenced with the others.
fn unchecked(both: &Both, members: &[Member], relinks: &[&Relink]) -> Result<Vec<String>> {
    let coming = members.iter().filter(|member| member.fate == Fate::Insert);
    let coming = coming.filter_map(|member| both.live_of(member.table));
    let tables: BTreeSet<usize> = coming.chain(relinks.iter().map(|relink| relink.table)).collect();
    let mut reasons = BTreeSet::new();
    for index in tables {
        let table = both.live.table(index)?;
        reasons.extend(table.deferrable.iter().map(|name| {
            format!("with triggers silenced nobody checks {name} of {}, which is deferrable", table.name)
        }));
    }
    for relink in relinks {
        let meets = |known: &&Reference| {
            known.parent == relink.table
                && known.parent_columns.iter().any(|column| relink.set.contains(column))
        };
        for reference in both.live.references.iter().filter(meets) {
            let (table, child) = (both.live.table(relink.table)?, both.live.table(reference.child)?);
            reasons.insert(format!(
                "with triggers silenced nobody carries what is set in {} {} on to rows of {} that refer to it by {}",
                table.name,
                table.shown_key(&relink.row),
                child.name,
                reference.name
            ));
        }
    }
    Ok(reasons.into_iter().collect())
}

fn triggers(both: &Both, members: &[Member], relinks: &[Relink], mode: Triggers) -> Result<Vec<String>> {
    let mut tables: Vec<usize> = members
        .iter()
        .filter(|member| member.fate == Fate::Insert)
        .filter_map(|member| both.live_of(member.table))
        .chain(relinks.iter().map(|relink| relink.table))
        .collect();
    tables.sort_unstable();
    tables.dedup();
    let mut names = Vec::new();
    for index in tables {
        let table = both.live.table(index)?;
        let runs = table.triggers.iter().filter(|trigger| mode == Triggers::On || trigger.always);
        names.extend(runs.map(|trigger| format!("{} on {}", trigger.name, table.name)));
    }
    Ok(names)
}
