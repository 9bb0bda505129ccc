//! In which order rows come back: parents before children. Rows that refer to each other in a circle go in as one act, after
//! which the database checks them all; that needs no empty references on the way, and no constraint that can be put off.

use std::collections::BTreeMap;

use super::plan::{Fate, Member};

/// Steps of rows by table. `references` are pairs of a row and one that it refers to.
pub(super) fn order(members: &[Member], references: &[(usize, usize)]) -> Vec<BTreeMap<usize, Vec<usize>>> {
    let comes = |id: usize| members.get(id).is_some_and(|member| member.fate == Fate::Insert);
    let mut needs: Vec<Vec<usize>> = vec![Vec::new(); members.len()];
    for (from, to) in references {
        if let (true, Some(needs)) = (comes(*from) && comes(*to) && from != to, needs.get_mut(*from)) {
            needs.push(*to);
        }
    }
    // Alone in their circle: one step for each level and table. In circles: one step for each level.
    let mut alone: BTreeMap<(usize, usize), Vec<usize>> = BTreeMap::new();
    let mut circles: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    let mut level = vec![0_usize; members.len()];
    for component in components(&needs) {
        let mut height = 0;
        for id in &component {
            for need in needs.get(*id).into_iter().flatten().filter(|need| !component.contains(need)) {
                height = height.max(level.get(*need).map_or(0, |level| level + 1));
            }
        }
        for id in &component {
            if let Some(level) = level.get_mut(*id) {
                *level = height;
            }
        }
        match component.as_slice() {
            [id] if comes(*id) => {
                let table = members.get(*id).map_or(0, |member| member.table);
                alone.entry((height, table)).or_default().push(*id);
            }
            [_] => {}
            several => circles.entry(height).or_default().extend(several),
        }
    }
    let mut steps: BTreeMap<(usize, usize), BTreeMap<usize, Vec<usize>>> = BTreeMap::new();
    for ((height, table), mut ids) in alone {
        ids.sort_unstable();
        steps.insert((height, table + 1), BTreeMap::from([(table, ids)]));
    }
    for (height, mut ids) in circles {
        ids.sort_unstable();
        let step = steps.entry((height, 0)).or_default();
        for id in ids {
            step.entry(members.get(id).map_or(0, |member| member.table)).or_default().push(id);
        }
    }
    steps.into_values().collect()
}

/// Sets of nodes that reach each other, what they need before them: Tarjan's algorithm, without recursion.
fn components(needs: &[Vec<usize>]) -> Vec<Vec<usize>> {
    const NEW: usize = usize::MAX;
    let count = needs.len();
    let (mut index, mut low, mut on_stack) = (vec![NEW; count], vec![0; count], vec![false; count]);
    let (mut stack, mut found, mut next) = (Vec::new(), Vec::new(), 0);
    for start in 0..count {
        if index[start] != NEW {
            continue;
        }
        let mut calls = vec![(start, 0)];
        while let Some((node, edge)) = calls.pop() {
            if edge == 0 {
                (index[node], low[node], on_stack[node]) = (next, next, true);
                next += 1;
                stack.push(node);
            }
            if let Some(to) = needs[node].get(edge).copied() {
                calls.push((node, edge + 1));
                if index[to] == NEW {
                    calls.push((to, 0));
                } else if on_stack[to] {
                    low[node] = low[node].min(index[to]);
                }
                continue;
            }
            if let Some((parent, _)) = calls.last() {
                low[*parent] = low[*parent].min(low[node]);
            }
            if low[node] == index[node] {
                let mut component = Vec::new();
                while let Some(member) = stack.pop() {
                    on_stack[member] = false;
                    component.push(member);
                    if member == node {
                        break;
                    }
                }
                found.push(component);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use mainstay_testkit::{Rng, for_each_seed};

    use super::{components, order};
    use crate::record::plan::{Fate, Member, Origin};

    fn member(table: usize) -> Member {
        Member { table, row: Vec::new(), origin: Origin::Root, fate: Fate::Insert, emptied: Vec::new() }
    }

    #[test]
    fn a_circle_is_one_step_and_a_chain_is_one_for_each_link() {
        let members: Vec<Member> = [0, 1, 0, 2].map(member).into();
        // 0 and 1 need each other, 2 needs 1, 3 needs nothing.
        let steps = order(&members, &[(0, 1), (1, 0), (2, 1)]);
        let shown: Vec<Vec<(usize, Vec<usize>)>> =
            steps.into_iter().map(|step| step.into_iter().collect()).collect();
        assert_eq!(shown, [vec![(0, vec![0]), (1, vec![1])], vec![(2, vec![3])], vec![(0, vec![2])]]);
    }

    #[test]
    fn whatever_refers_to_what_nothing_comes_before_what_it_needs() {
        for_each_seed(200, |seed| {
            let mut rng = Rng::new(seed);
            let count = 1 + rng.below(30);
            let members: Vec<Member> = (0..count).map(|_| member(rng.below(4))).collect();
            let edges: Vec<(usize, usize)> =
                (0..rng.below(60)).map(|_| (rng.below(count), rng.below(count))).collect();
            let steps = order(&members, &edges);
            let mut done = BTreeSet::new();
            for step in steps {
                let ids: BTreeSet<usize> = step.into_values().flatten().collect();
                for (from, to) in edges.iter().filter(|(from, _)| ids.contains(from)) {
                    assert!(done.contains(to) || ids.contains(to), "{from} came before {to}");
                }
                assert!(ids.is_disjoint(&done));
                done.extend(ids);
            }
            assert_eq!(done.len(), count);
        });
    }

    #[test]
    fn long_chains_do_not_exhaust_the_stack() {
        let needs: Vec<Vec<usize>> =
            (0..200_000).map(|node: usize| node.checked_sub(1).into_iter().collect()).collect();
        assert_eq!(components(&needs).len(), 200_000);
    }
}
