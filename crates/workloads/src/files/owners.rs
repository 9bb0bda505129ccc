//! Owners by name and by number, from `/etc/passwd` and `/etc/group`, each read once.

use std::collections::HashMap;
use std::path::Path;

/// One of the two tables.
#[derive(Default)]
struct Table {
    names: HashMap<u32, Vec<u8>>,
    numbers: HashMap<Vec<u8>, u32>,
}

/// The users and groups this machine knows by itself.
#[derive(Default)]
pub(super) struct Owners {
    users: Table,
    groups: Table,
}

impl Owners {
    /// A table that cannot be read is an empty one: owners then go by number.
    pub(super) fn of_this_machine() -> Self {
        let table = |path: &str| Table::parse(&std::fs::read(Path::new(path)).unwrap_or_default());
        Self { users: table("/etc/passwd"), groups: table("/etc/group") }
    }

    pub(super) fn user(&self, uid: u32) -> Option<Vec<u8>> {
        self.users.names.get(&uid).cloned()
    }

    pub(super) fn group(&self, gid: u32) -> Option<Vec<u8>> {
        self.groups.names.get(&gid).cloned()
    }

    pub(super) fn uid(&self, user: &[u8]) -> Option<u32> {
        self.users.numbers.get(user).copied()
    }

    pub(super) fn gid(&self, group: &[u8]) -> Option<u32> {
        self.groups.numbers.get(group).copied()
    }
}

impl Table {
    /// Lines of `name:password:number:…`; the first of several with one name or number counts.
    fn parse(text: &[u8]) -> Self {
        let mut table = Self::default();
        for line in text.split(|&byte| byte == b'\n') {
            let mut fields = line.split(|&byte| byte == b':');
            let (name, number) = (fields.next().unwrap_or_default(), fields.nth(1).unwrap_or_default());
            let number = std::str::from_utf8(number).ok().and_then(|number| number.parse().ok());
            if let Some(number) = number
                && !name.is_empty()
            {
                table.names.entry(number).or_insert_with(|| name.to_vec());
                table.numbers.entry(name.to_vec()).or_insert(number);
            }
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn the_first_of_two_names_counts_and_broken_lines_do_not() {
        let table = Table::parse(b"root:x:0:0::/:/bin/sh\ntoor:x:0:0\n:x:7\nbad:x:-1:\nhalf\n\na:x:10:");
        assert_eq!(table.names.get(&0).map(Vec::as_slice), Some(b"root".as_slice()));
        assert_eq!(table.numbers.get(b"toor".as_slice()), Some(&0));
        assert_eq!((table.names.len(), table.numbers.len()), (2, 3));
    }
}
