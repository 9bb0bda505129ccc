//! What the rows of a record refer to, and what has become of that since.
//!
//! A parent that is missing was deleted later than the record. Had the record been there, the delete rule of its foreign key
//! would have decided: rows that go with their parent would have gone; references that are emptied would be empty; and what
//! refuses would have refused, so that the parent would still be there and comes back. As many of the later deletions as
//! possible stand: a parent comes back only if something that stays needs it.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use mainstay_core::Result;

use super::database::Condition;
use super::gather::Gather;
use super::model::{OnDelete, Reference, Row, values};
use super::plan::{Fate, Member, Origin};

/// A reference to something that is not in the live database.
struct Ref {
    name: String,
    /// The member it refers to; `None` when there is none, or when its key is another one now.
    to: Option<usize>,
    /// The row goes with it.
    cascade: bool,
    /// What stands in its place when it has gone: columns of the point, and their values.
    soft: Option<(Vec<usize>, Row)>,
    /// What became of the row that it referred to, for people, when nothing says what the reference would be now.
    moved: Option<String>,
}

type Refs = HashMap<usize, Vec<Ref>>;

/// Decides what of the record comes back, and which parents with it. What refers to what among the rows that do.
pub(super) fn settle(gather: &mut Gather<'_>) -> Result<Vec<(usize, usize)>> {
    let mut refs = Refs::new();
    let mut explored = HashSet::new();
    let mut back = BTreeSet::new();
    let inserted = |member: &Member| member.fate == Fate::Insert;
    let mut new: Vec<usize> =
        (0..gather.members.len()).filter(|id| gather.members.get(*id).is_some_and(inserted)).collect();
    let kept = loop {
        explore(gather, &new, &mut refs)?;
        explored.extend(new);
        let kept = decide(&gather.members, &refs, &mut back);
        new = back.iter().copied().filter(|id| !explored.contains(id)).collect();
        if new.is_empty() {
            break kept;
        }
    };
    block(gather, &refs, &kept);
    finish(gather, &refs, &kept, &back)
}

/// Finds what rows refer to that is not in the live database.
fn explore(gather: &mut Gather<'_>, ids: &[usize], refs: &mut Refs) -> Result<()> {
    let mut tables: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for id in ids {
        tables.entry(gather.member(*id)?.table).or_default().push(*id);
    }
    for (table, ids) in tables {
        let Some(live) = gather.both.live_of(table) else { continue };
        let references: Vec<Reference> =
            gather.both.live.references.iter().filter(|known| known.child == live).cloned().collect();
        for reference in references {
            explore_one(gather, &ids, &reference, refs)?;
        }
    }
    Ok(())
}

fn explore_one(gather: &mut Gather<'_>, ids: &[usize], reference: &Reference, refs: &mut Refs) -> Result<()> {
    let Some((columns, conditions)) = gather.both.upward(reference) else { return Ok(()) };
    let mut holders = Vec::new();
    for id in ids {
        holders.extend(values(&gather.member(*id)?.row, &columns).map(|key| (*id, key)));
    }
    let keys: Vec<Vec<String>> = holders.iter().map(|(_, key)| key.clone()).collect();
    let parent = gather.both.live.table(reference.parent)?;
    let there = gather.live.rows(parent, &conditions, &keys, false)?;
    let mut there: HashMap<usize, Row> = there.into_iter().collect();
    let mut taken = others(gather, reference, &holders, &conditions, &mut there)?;
    let missing: Vec<usize> = (0..holders.len()).filter(|index| !there.contains_key(index)).collect();
    let mut number = 0..;
    holders.retain(|_| number.next().is_some_and(|index: usize| !there.contains_key(&index)));
    if holders.is_empty() {
        return Ok(());
    }
    let found = parents(gather, reference, &holders, &conditions)?;
    for (position, (id, key)) in holders.iter().enumerate() {
        let taken = missing.get(position).and_then(|index| taken.remove(index));
        let to = found.get(&position).copied();
        let moved = to.and_then(|to| moved(gather, gather.members.get(to)?, taken));
        let to = to.filter(|_| moved.is_none());
        let soft = match moved {
            Some(_) => None,
            None => soft(gather, *id, reference, &columns, key, &conditions)?,
        };
        refs.entry(*id).or_default().push(Ref {
            name: reference.name.clone(),
            to,
            cascade: reference.on_delete == OnDelete::Cascade,
            soft,
            moved,
        });
    }
    Ok(())
}

/// What is there under its own key, and not under that by which it was referred to, or not any more the one under that: it
/// was changed, or deleted and another put there, and no rule for deletions decides.
fn moved(gather: &Gather<'_>, member: &Member, taken: Option<String>) -> Option<String> {
    let shown = shown(gather, member);
    match taken {
        Some(other) => Some(format!("{shown}, and what it was referred to by is of {other} since")),
        None if matches!(member.fate, Fate::Same | Fate::Changed(_)) => {
            Some(format!("{shown}, which is there with other values in what it was referred to by"))
        }
        None => None,
    }
}

/// Takes out of `there` what is another row than the one that was referred to, under the values that this one had; those,
/// for people.
fn others(
    gather: &mut Gather<'_>,
    reference: &Reference,
    holders: &[(usize, Vec<String>)],
    conditions: &[Condition],
    there: &mut HashMap<usize, Row>,
) -> Result<HashMap<usize, String>> {
    let mut taken = HashMap::new();
    let Some((table, by)) = of_point(gather, reference, conditions) else { return Ok(taken) };
    let known = gather.both.point.table(table)?;
    let Some(key) = known.key.as_ref().map(|key| key.columns.clone()) else { return Ok(taken) };
    // By its own key a row is always the one that it was.
    if there.is_empty() || key.iter().all(|column| by.iter().any(|condition| condition.column == *column)) {
        return Ok(taken);
    }
    let now: Option<Vec<usize>> = key.iter().map(|column| gather.both.column(table, *column)).collect();
    let Some(now) = now else { return Ok(taken) };
    let live = gather.both.live.table(reference.parent)?;
    let keys: Vec<Vec<String>> = holders.iter().map(|(_, key)| key.clone()).collect();
    for (found, row) in gather.point.rows(known, &by, &keys, false)? {
        if there.get(&found).is_some_and(|there| values(there, &now) != values(&row, &key))
            && let Some(other) = there.remove(&found)
        {
            taken.insert(found, format!("{} {}", known.name, live.shown_key(&other)));
        }
    }
    Ok(taken)
}

/// What a reference of the live catalog refers to, in the point: the table, and how its rows are found.
fn of_point(
    gather: &Gather<'_>,
    reference: &Reference,
    conditions: &[Condition],
) -> Option<(usize, Vec<Condition>)> {
    let table = gather.both.point_of(reference.parent)?;
    let column = |condition: &Condition| {
        Some(Condition { column: gather.both.back(table, condition.column)?, ..condition.clone() })
    };
    Some((table, conditions.iter().map(column).collect::<Option<_>>()?))
}

/// The rows of the point that are referred to, as members, by the position of who refers to them.
fn parents(
    gather: &mut Gather<'_>,
    reference: &Reference,
    holders: &[(usize, Vec<String>)],
    conditions: &[Condition],
) -> Result<HashMap<usize, usize>> {
    let Some((table, there)) = of_point(gather, reference, conditions) else { return Ok(HashMap::new()) };
    let keys: Vec<Vec<String>> = holders.iter().map(|(_, key)| key.clone()).collect();
    let rows = gather.point.rows(gather.both.point.table(table)?, &there, &keys, false)?;
    let positions: Vec<usize> = rows.iter().map(|(found, _)| *found).collect();
    let origin = |found: usize| Origin::Parent {
        of: holders.get(found).map(|(id, _)| *id).unwrap_or_default(),
        by: reference.name.clone(),
    };
    let rows = rows.into_iter().map(|(found, row)| (row, origin(found))).collect();
    let ids = gather.add_parents(table, rows)?;
    Ok(positions.into_iter().zip(ids).collect())
}

/// What stands in place of a reference whose parent was deleted, if its rule and its columns allow that.
fn soft(
    gather: &mut Gather<'_>,
    id: usize,
    reference: &Reference,
    columns: &[usize],
    key: &[String],
    conditions: &[Condition],
) -> Result<Option<(Vec<usize>, Row)>> {
    if !matches!(reference.on_delete, OnDelete::SetNull | OnDelete::SetDefault) {
        return Ok(None);
    }
    let table = gather.member(id)?.table;
    let set: Option<Vec<usize>> =
        reference.set.iter().map(|column| gather.both.back(table, *column)).collect();
    let Some(set) = set else { return Ok(None) };
    let values = gather.emptied(reference)?;
    let live = gather.both.live.table(reference.child)?;
    let needed = |column: &usize| live.columns.get(*column).is_some_and(|column| column.not_null);
    if reference.set.iter().zip(&values).any(|(column, value)| value.is_none() && needed(column)) {
        return Ok(None);
    }
    let value = |(column, old): (&usize, &String)| match set.iter().position(|known| known == column) {
        Some(position) => values.get(position).cloned().flatten(),
        None => Some(old.clone()),
    };
    let then: Option<Vec<String>> = columns.iter().zip(key).map(value).collect();
    if let Some(key) = then {
        // A default that refers to nothing would have been refused.
        let parent = gather.both.live.table(reference.parent)?;
        if gather.live.rows(parent, conditions, &[key], false)?.is_empty() {
            return Ok(None);
        }
    }
    Ok(Some((set, values)))
}

/// Which members stay. `back` grows by the parents that something that stays needs.
fn decide(members: &[Member], refs: &Refs, back: &mut BTreeSet<usize>) -> Vec<bool> {
    loop {
        let doomed = doomed(members, refs, back);
        let mut kept: Vec<bool> = members
            .iter()
            .enumerate()
            .map(|(id, member)| {
                back.contains(&id)
                    || member.fate == Fate::Insert && !doomed.get(id).copied().unwrap_or_default()
            })
            .collect();
        let mut queue: Vec<usize> =
            kept.iter().enumerate().filter(|(_, kept)| **kept).map(|(id, _)| id).collect();
        let mut grew = false;
        while let Some(id) = queue.pop() {
            for to in refs.get(&id).into_iter().flatten().filter(|known| known.soft.is_none()) {
                let Some(to) = to.to else { continue };
                let comes = members.get(to).map(|member| &member.fate);
                if kept.get(to) != Some(&false) || comes == Some(&Fate::Erased) {
                    continue;
                }
                if comes == Some(&Fate::NotNeeded) {
                    grew |= back.insert(to);
                }
                if let Some(known) = kept.get_mut(to) {
                    *known = true;
                    queue.push(to);
                }
            }
        }
        if !grew {
            return kept;
        }
    }
}

/// The rows that would have gone with parents that were deleted later. Never the root: it is what was asked for.
fn doomed(members: &[Member], refs: &Refs, back: &BTreeSet<usize>) -> Vec<bool> {
    let mut doomed = vec![false; members.len()];
    loop {
        let gone = |to: usize| match members.get(to).map(|member| &member.fate) {
            Some(Fate::Insert) => doomed.get(to).copied().unwrap_or_default(),
            Some(Fate::NotNeeded) => !back.contains(&to),
            _ => true,
        };
        let goes = |id: usize| {
            refs.get(&id)
                .is_some_and(|refs| refs.iter().any(|known| known.cascade && known.to.is_some_and(gone)))
        };
        let more: Vec<usize> = members
            .iter()
            .enumerate()
            .skip(1)
            .filter(|(id, member)| {
                member.fate == Fate::Insert && doomed.get(*id) == Some(&false) && goes(*id)
            })
            .map(|(id, _)| id)
            .collect();
        if more.is_empty() {
            return doomed;
        }
        for id in more {
            if let Some(known) = doomed.get_mut(id) {
                *known = true;
            }
        }
    }
}

/// What stays and refers to what cannot come back.
fn block(gather: &mut Gather<'_>, refs: &Refs, kept: &[bool]) {
    let mut reasons = Vec::new();
    for (id, member) in gather.members.iter().enumerate().filter(|(id, _)| kept.get(*id) == Some(&true)) {
        for known in refs.get(&id).into_iter().flatten().filter(|known| known.soft.is_none()) {
            let shown = shown(gather, member);
            if let Some(moved) = &known.moved {
                reasons.push(format!("{shown} refers by {} to {moved}", known.name));
                continue;
            }
            match known.to.and_then(|to| gather.members.get(to)) {
                None => reasons.push(format!(
                    "{shown} refers by {} to a row that is not there, and was not there under that key",
                    known.name
                )),
                Some(to) if to.fate == Fate::Erased => reasons.push(format!(
                    "{shown} needs {}, which was erased by law and may not come back",
                    self::shown(gather, to)
                )),
                Some(_) => {}
            }
        }
    }
    gather.blocked.extend(reasons);
}

fn shown(gather: &Gather<'_>, member: &Member) -> String {
    let table = gather.both.point.tables.get(member.table);
    table.map(|table| format!("{} {}", table.name, table.shown_key(&member.row))).unwrap_or_default()
}

/// Writes the decision into the members: their fates, and the references that are empty.
fn finish(
    gather: &mut Gather<'_>,
    refs: &Refs,
    kept: &[bool],
    back: &BTreeSet<usize>,
) -> Result<Vec<(usize, usize)>> {
    let mut notes = Vec::new();
    for id in 0..gather.members.len() {
        let stays = kept.get(id) == Some(&true);
        let because = refs.get(&id).into_iter().flatten().find(|known| known.cascade);
        let because = because.and_then(|known| known.to).and_then(|to| gather.members.get(to));
        let because = because.map(|member| shown(gather, member)).unwrap_or_default();
        let Some(member) = gather.members.get_mut(id) else { continue };
        if member.fate == Fate::Insert && !stays {
            member.fate = Fate::Gone(because);
        }
        if back.contains(&id) {
            member.fate = Fate::Insert;
            let member = gather.member(id)?;
            let Origin::Parent { of, .. } = &member.origin else { continue };
            notes.push(format!(
                "{} was deleted later and comes back as it was then, because {} needs it; what hung on it beside does not",
                shown(gather, member),
                shown(gather, gather.member(*of)?)
            ));
        }
    }
    gather.notes.extend(notes);
    let mut edges = Vec::new();
    for (id, refs) in refs {
        for known in refs {
            let comes = |to: usize| gather.members.get(to).is_some_and(|member| member.fate == Fate::Insert);
            match (known.to.filter(|to| comes(*to)), &known.soft) {
                (Some(to), _) => edges.push((*id, to)),
                (None, Some((set, values))) => {
                    let Some(member) = gather.members.get_mut(*id) else { continue };
                    for (column, value) in set.iter().zip(values) {
                        if let Some(known) = member.row.get_mut(*column) {
                            known.clone_from(value);
                        }
                    }
                    member.emptied.push(known.name.clone());
                }
                (None, None) => {}
            }
        }
    }
    edges.sort_unstable();
    Ok(edges)
}
