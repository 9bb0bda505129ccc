//! A plan as people look at it: rows below what they belong to, those of one kind counted together.

use std::collections::{BTreeMap, HashMap};

use super::plan::{Fate, Member, Origin, Plan};

/// Deeper lines are not set in further.
const DEPTH_MAX: usize = 12;

/// Rows of one table that hang on the same line and have the same fate: their first key stands for one alone.
type Group = ((bool, usize, String, u8), Vec<usize>);

impl Plan {
    /// Lines, set in by two spaces for each level.
    pub fn tree(&self) -> Vec<String> {
        let mut below: HashMap<usize, Vec<usize>> = HashMap::new();
        for (id, member) in self.members.iter().enumerate() {
            if let Origin::Child { of, .. } | Origin::Parent { of, .. } = &member.origin
                && member.fate != Fate::NotNeeded
            {
                below.entry(*of).or_default().push(id);
            }
        }
        let mut lines = Vec::new();
        let mut stack: Vec<(usize, Group)> = vec![(0, ((false, 0, String::new(), 0), vec![0]))];
        while let Some((depth, ((upward, _, by, _), ids))) = stack.pop() {
            let Some(first) = ids.first().and_then(|id| self.members.get(*id)) else { continue };
            lines.push(format!(
                "{}{}",
                "  ".repeat(depth.min(DEPTH_MAX)),
                self.line(first, ids.len(), upward, &by)
            ));
            let mut groups: BTreeMap<(bool, usize, String, u8), Vec<usize>> = BTreeMap::new();
            for id in ids.iter().filter_map(|id| below.get(id)).flatten() {
                let Some(member) = self.members.get(*id) else { continue };
                let (upward, by) = match &member.origin {
                    Origin::Child { by, .. } => (false, by.clone()),
                    Origin::Parent { by, .. } => (true, by.clone()),
                    Origin::Root => continue,
                };
                groups.entry((upward, member.table, by, rank(&member.fate))).or_default().push(*id);
            }
            stack.extend(groups.into_iter().rev().map(|group| (depth + 1, group)));
        }
        let mut relinks: BTreeMap<(usize, &str), usize> = BTreeMap::new();
        for relink in &self.relinks {
            *relinks.entry((relink.table, relink.by.as_str())).or_default() += 1;
        }
        for ((table, by), count) in relinks {
            let name =
                self.both.live.tables.get(table).map(|table| table.name.to_string()).unwrap_or_default();
            lines.push(format!("{name} ×{count}: is there, and refers to it again ({by})"));
        }
        lines
    }

    fn line(&self, first: &Member, count: usize, upward: bool, by: &str) -> String {
        let name = self.table(first).map(ToString::to_string).unwrap_or_default();
        let which =
            if count == 1 { format!("{name} {}", self.key(first)) } else { format!("{name} ×{count}") };
        let why = match (by.is_empty(), upward) {
            (true, _) => String::new(),
            (false, true) => format!(" (needed: {by})"),
            (false, false) => format!(" ({by})"),
        };
        format!("{which}: {}{why}", shown(&first.fate))
    }
}

const fn rank(fate: &Fate) -> u8 {
    match fate {
        Fate::Insert => 0,
        Fate::Same => 1,
        Fate::Changed(_) => 2,
        Fate::Gone(_) => 3,
        Fate::NoTable => 4,
        Fate::Erased => 5,
        Fate::NotNeeded => 6,
    }
}

impl Fate {
    /// For programs.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Insert => "insert",
            Self::Same => "same",
            Self::Changed(_) => "changed-later",
            Self::Gone(_) => "gone-later",
            Self::NoTable => "no-table",
            Self::Erased => "erased-by-law",
            Self::NotNeeded => "not-needed",
        }
    }
}

fn shown(fate: &Fate) -> String {
    match fate {
        Fate::Insert => "comes back".into(),
        Fate::Same => "is there as it was".into(),
        Fate::Changed(differences) => {
            let names: Vec<&str> = differences.iter().map(|(column, ..)| column.as_str()).collect();
            format!("is there, changed later in {}; stays as it is", names.join(", "))
        }
        Fate::Gone(with) => format!("would have gone with {with}; stays gone"),
        Fate::NoTable => "its table has gone".into(),
        Fate::Erased => "was erased by law; stays gone".into(),
        Fate::NotNeeded => "is not needed".into(),
    }
}
