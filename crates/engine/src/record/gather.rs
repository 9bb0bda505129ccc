//! What belongs to a record: downward from its root over foreign keys and links, level by level, and what of it is still
//! there.

use std::collections::{BTreeMap, HashMap};

use mainstay_core::{Code, Error, Result};

use super::both::Both;
use super::database::{Condition, Database};
use super::definition::{Rules, Then};
use super::model::{OnDelete, Reference, Row, Table, values};
use super::plan::{Ask, Fate, Member, Origin, Relink};

/// Rows whose reference was emptied when the record went.
struct Candidate {
    /// In the catalog of the point.
    reference: usize,
    row: Row,
    /// The member that it referred to.
    parent: usize,
}

pub(super) struct Gather<'a> {
    pub(super) point: &'a mut dyn Database,
    pub(super) live: &'a mut dyn Database,
    pub(super) both: Both,
    pub(super) members: Vec<Member>,
    pub(super) notes: Vec<String>,
    pub(super) blocked: Vec<String>,
    rules: Rules,
    ask: &'a Ask<'a>,
    index: HashMap<(usize, Vec<String>), usize>,
    candidates: Vec<Candidate>,
}

impl<'a> Gather<'a> {
    pub(super) fn new(
        point: &'a mut dyn Database,
        live: &'a mut dyn Database,
        both: Both,
        rules: Rules,
        ask: &'a Ask<'a>,
    ) -> Self {
        Self {
            point,
            live,
            both,
            members: Vec::new(),
            notes: Vec::new(),
            blocked: Vec::new(),
            rules,
            ask,
            index: HashMap::new(),
            candidates: Vec::new(),
        }
    }

    /// The root and everything below it. Below a row that is still there nothing was taken by its going, so that only the
    /// root is looked under whatever has become of it: but for some of its columns, nothing below it is anybody's wish.
    pub(super) fn down(&mut self, root: usize, row: Row) -> Result<()> {
        let table = self.both.point.table(root)?;
        let key = table.shown_key(&row);
        // Also one that is there: what made it nameless in its place is not to be undone.
        if (self.ask.erased)(&table.name, &key) {
            let what = format!("{} {key} may not come back", table.name);
            return Err(Error::new(Code::Refused, what)
                .because("it is on the list of what was erased by law")
                .hint("mainstay record erased shows the list, and why"));
        }
        let mut frontier = self.add(root, vec![(row, Origin::Root)])?;
        if !self.ask.columns.is_empty() {
            return Ok(());
        }
        if frontier.is_empty() {
            frontier.push(0);
        }
        while !frontier.is_empty() {
            let mut level: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
            for member in frontier.drain(..) {
                level.entry(self.member(member)?.table).or_default().push(member);
            }
            for (table, parents) in level {
                for reference in 0..self.both.point.references.len() {
                    frontier.extend(self.by_reference(table, &parents, reference)?);
                }
                for link in 0..self.rules.links.len() {
                    frontier.extend(self.by_link(table, &parents, link)?);
                }
            }
        }
        Ok(())
    }

    pub(super) fn member(&self, index: usize) -> Result<&Member> {
        self.members.get(index).ok_or_else(|| Error::bug("a row that was not gathered"))
    }

    fn by_reference(&mut self, table: usize, parents: &[usize], number: usize) -> Result<Vec<usize>> {
        let then = self.rules.then.get(number).copied().unwrap_or(Then::Ignore);
        let Some(reference) = self.both.point.references.get(number) else { return Ok(Vec::new()) };
        let child = reference.child;
        if reference.parent != table || then == Then::Ignore || self.rules.excluded.contains(&child) {
            return Ok(Vec::new());
        }
        let known: Vec<(usize, Vec<String>)> = parents
            .iter()
            .filter_map(|parent| {
                Some((*parent, values(&self.members.get(*parent)?.row, &reference.parent_columns)?))
            })
            .collect();
        let keys: Vec<Vec<String>> = known.iter().map(|(_, key)| key.clone()).collect();
        let conditions = downward(reference, self.both.point.table(table)?);
        let by = reference.name.clone();
        let rows = self.point.rows(self.both.point.table(child)?, &conditions, &keys, false)?;
        let parent = |found: usize| known.get(found).map(|(parent, _)| *parent).unwrap_or_default();
        if then == Then::Relink {
            self.candidates.extend(rows.into_iter().map(|(found, row)| Candidate {
                reference: number,
                row,
                parent: parent(found),
            }));
            return Ok(Vec::new());
        }
        let rows =
            rows.into_iter().map(|(found, row)| (row, Origin::Child { of: parent(found), by: by.clone() }));
        self.add(child, rows.collect())
    }

    fn by_link(&mut self, table: usize, parents: &[usize], number: usize) -> Result<Vec<usize>> {
        let Some(link) = self.rules.links.get(number).filter(|link| link.parent == table).cloned() else {
            return Ok(Vec::new());
        };
        let (mother, child) = (self.both.point.table(table)?, self.both.point.table(link.child)?);
        let columns = &mother.key()?.columns;
        let keys: Option<Vec<Vec<String>>> =
            parents.iter().map(|parent| values(&self.members.get(*parent)?.row, columns)).collect();
        let keys = keys.ok_or_else(|| Error::bug("a row without a key was gathered"))?;
        let rows = self.point.linked(&link, mother, child, &keys)?;
        let origin = |found: usize| Origin::Child {
            of: parents.get(found).copied().unwrap_or_default(),
            by: "a link of the definition".into(),
        };
        let rows = rows.into_iter().map(|(found, row)| (row, origin(found)));
        self.add(link.child, rows.collect())
    }

    /// Takes rows in that are not in yet; which of them are missing in the live database.
    fn add(&mut self, table: usize, rows: Vec<(Row, Origin)>) -> Result<Vec<usize>> {
        let known = self.both.point.table(table)?;
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let columns = known.key()?.columns.clone();
        let mut new = Vec::new();
        for (row, origin) in rows {
            let key = values(&row, &columns)
                .ok_or_else(|| Error::new(Code::Refused, format!("a row of {} has no key", known.name)))?;
            if let Some(there) = self.index.get(&(table, key.clone())) {
                if self.members.get(*there).is_some_and(|member| member.row != row) {
                    let what = format!("the key of {} does not tell its rows apart", known.name);
                    return Err(Error::new(Code::Refused, what));
                }
                continue;
            }
            let id = self.members.len();
            if id >= self.ask.rows_max {
                let what = format!("the record has more than {} rows", self.ask.rows_max);
                return Err(Error::new(Code::Refused, what)
                    .hint("narrow it with a record definition, or raise --max-rows"));
            }
            self.index.insert((table, key), id);
            self.members.push(Member { table, row, origin, fate: Fate::Insert, emptied: Vec::new() });
            new.push(id);
        }
        self.compare(table, &new)?;
        let missing = |id: &usize| self.members.get(*id).is_some_and(|member| member.fate == Fate::Insert);
        Ok(new.into_iter().filter(missing).collect())
    }

    /// Sees what has become of rows.
    fn compare(&mut self, table: usize, members: &[usize]) -> Result<()> {
        let known = self.both.point.table(table)?;
        let mut there: HashMap<usize, Row> = HashMap::new();
        let conditions = self.both.live_key(table);
        if let (Some(live), Some(conditions)) = (self.both.live_of(table), &conditions) {
            let columns = &known.key()?.columns;
            let rows = members.iter().filter_map(|id| self.members.get(*id));
            let keys: Vec<Vec<String>> = rows.filter_map(|member| values(&member.row, columns)).collect();
            there.extend(self.live.rows(self.both.live.table(live)?, conditions, &keys, false)?);
        }
        for (position, id) in members.iter().enumerate() {
            let Some(member) = self.members.get_mut(*id) else { continue };
            member.fate = match there.get(&position) {
                _ if conditions.is_none() => Fate::NoTable,
                Some(now) => {
                    let differences = self.both.differences(table, &member.row, now);
                    if differences.is_empty() { Fate::Same } else { Fate::Changed(differences) }
                }
                None if (self.ask.erased)(&known.name, &known.shown_key(&member.row)) => Fate::Erased,
                None => Fate::Insert,
            };
        }
        Ok(())
    }

    /// Takes in rows that others refer to; their members, by the order given.
    pub(super) fn add_parents(&mut self, table: usize, rows: Vec<(Row, Origin)>) -> Result<Vec<usize>> {
        let columns = self.both.point.table(table)?.key()?.columns.clone();
        let keys: Vec<Option<Vec<String>>> = rows.iter().map(|(row, _)| values(row, &columns)).collect();
        let before = self.members.len();
        self.add(table, rows)?;
        for member in self.members.iter_mut().skip(before) {
            // Whether it comes back is to be decided.
            if member.fate == Fate::Insert {
                member.fate = Fate::NotNeeded;
            }
        }
        let find = |key: Option<Vec<String>>| {
            let found = key.and_then(|key| self.index.get(&(table, key)).copied());
            found.ok_or_else(|| Error::bug("a parent was not taken in"))
        };
        keys.into_iter().map(find).collect()
    }

    /// References that were emptied when the record went, and that are set again: of rows that are there, that refer to
    /// nothing now, and whose parent comes back.
    pub(super) fn relinks(&mut self) -> Result<Vec<Relink>> {
        let mut by_reference: BTreeMap<usize, Vec<Candidate>> = BTreeMap::new();
        for candidate in std::mem::take(&mut self.candidates) {
            let comes = |id: usize| self.members.get(id).is_some_and(|member| member.fate == Fate::Insert);
            let table = self.both.point.references.get(candidate.reference).map(|reference| reference.child);
            let key = table
                .and_then(|table| self.both.point.tables.get(table)?.key.as_ref())
                .and_then(|key| values(&candidate.row, &key.columns));
            let own = table.zip(key).and_then(|key| self.index.get(&key)).is_some_and(|id| comes(*id));
            if comes(candidate.parent) && !own {
                by_reference.entry(candidate.reference).or_default().push(candidate);
            }
        }
        let mut relinks = Vec::new();
        for (number, candidates) in by_reference {
            let Some(reference) = self.both.point.references.get(number).cloned() else { continue };
            relinks.extend(self.relinks_of(&reference, &candidates)?);
        }
        Ok(relinks)
    }

    fn relinks_of(&mut self, reference: &Reference, candidates: &[Candidate]) -> Result<Vec<Relink>> {
        let table = reference.child;
        let known = self.both.point.table(table)?;
        let columns = |all: &[usize]| -> Option<Vec<usize>> {
            all.iter().map(|column| self.both.column(table, *column)).collect()
        };
        let named = format!("{} of {}", reference.name, known.name);
        let (Some(live), Some(conditions), Some(set), Some(all)) = (
            self.both.live_of(table),
            self.both.live_key(table),
            columns(&reference.set),
            columns(&reference.child_columns),
        ) else {
            self.notes.push(format!("{named} has gone; what it held is not set again"));
            return Ok(Vec::new());
        };
        let key = &known.key()?.columns;
        let keys: Vec<Vec<String>> =
            candidates.iter().filter_map(|candidate| values(&candidate.row, key)).collect();
        let live_table = self.both.live.table(live)?;
        let there: HashMap<usize, Row> =
            self.live.rows(live_table, &conditions, &keys, false)?.into_iter().collect();
        let emptied: Row = match reference.on_delete {
            OnDelete::SetDefault => self.live.defaults(live_table, &set)?,
            _ => vec![None; set.len()],
        };
        let mut relinks = Vec::new();
        for (position, candidate) in candidates.iter().enumerate() {
            let shown = format!("{} {}", known.name, known.shown_key(&candidate.row));
            let Some(now) = there.get(&position) else {
                self.notes.push(format!("{shown} referred to the record and was deleted by itself: left so"));
                continue;
            };
            if (self.ask.erased)(&known.name, &known.shown_key(&candidate.row)) {
                self.notes.push(format!("{shown} is on the list of what was erased by law: left as it is"));
                continue;
            }
            let was = |column: &usize| candidate.row.get(*column).cloned().flatten();
            let is = |column: &usize| now.get(*column).cloned().flatten();
            let then: Row = reference.child_columns.iter().map(was).collect();
            if all.iter().map(is).collect::<Row>() == then {
                continue;
            }
            let kept = reference.child_columns.iter().zip(&all).filter(|(_, live)| !set.contains(live));
            let mut kept = kept.map(|(old, new)| (was(old), is(new)));
            let rest = kept.all(|(old, new)| old == new);
            if !rest || set.iter().map(is).collect::<Row>() != emptied {
                self.notes.push(format!("{shown} refers elsewhere by {} since: left so", reference.name));
                continue;
            }
            let set_was = reference.set.iter().map(was).collect();
            relinks.push(Relink {
                table: live,
                row: now.clone(),
                by: reference.name.clone(),
                set: set.clone(),
                values: set_was,
            });
        }
        Ok(relinks)
    }

    /// Keys, beside that of the table, that rows of the live database have taken since.
    pub(super) fn clashes(&mut self) -> Result<()> {
        let mut tables: BTreeMap<usize, Vec<&Member>> = BTreeMap::new();
        for member in self.members.iter().filter(|member| member.fate == Fate::Insert) {
            tables.entry(member.table).or_default().push(member);
        }
        for (index, members) in tables {
            let Some(live) = self.both.live_of(index) else { continue };
            let table = self.both.live.table(live)?;
            let given: Vec<usize> =
                (0..table.columns.len()).filter(|column| self.both.back(index, *column).is_some()).collect();
            let source: Vec<usize> =
                given.iter().filter_map(|column| self.both.back(index, *column)).collect();
            let rows: Vec<Vec<Option<&str>>> = members
                .iter()
                .map(|member| {
                    source.iter().map(|column| member.row.get(*column).and_then(Option::as_deref)).collect()
                })
                .collect();
            for unique in &table.uniques {
                for clash in self.live.clashes(table, unique, &given, &rows)? {
                    let Some(member) = members.get(clash.row) else { continue };
                    let mine = self.both.point.table(index)?.shown_key(&member.row);
                    let taken = clash.taken_by.into_iter().map(Option::unwrap_or_default);
                    self.blocked.push(format!(
                        "{} {mine}: its {} is taken since, by the row {}",
                        table.name,
                        unique.name,
                        taken.collect::<Vec<_>>().join(" ")
                    ));
                }
            }
        }
        Ok(())
    }

    /// What stands for a reference of a row whose parent has gone.
    pub(super) fn emptied(&mut self, reference: &Reference) -> Result<Row> {
        let table = self.both.live.table(reference.child)?;
        match reference.on_delete {
            OnDelete::SetDefault => self.live.defaults(table, &reference.set),
            _ => Ok(vec![None; reference.set.len()]),
        }
    }
}

/// How the rows are found that refer to parents by a reference.
fn downward(reference: &Reference, parent: &Table) -> Vec<Condition> {
    let triples = reference.child_columns.iter().zip(&reference.parent_columns).zip(&reference.equal);
    let condition = |((mine, theirs), equal): ((&usize, &usize), &String)| {
        let value_type = parent.columns.get(*theirs)?.sql_type.clone();
        Some(Condition { column: *mine, equal: equal.clone(), value_type, column_first: false })
    };
    triples.filter_map(condition).collect()
}
