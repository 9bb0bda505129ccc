//! Record definitions: what belongs to a record beyond what foreign keys say. A file of its own, in TOML, that people keep
//! under version control.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use mainstay_core::{Code, Error, Result};
use serde::Deserialize;

use super::model::{Catalog, Key, OnDelete};

/// The version of the format of definitions.
const VERSION: u32 = 1;

/// What becomes of a row that refers to a row of the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Then {
    /// It belongs to the record.
    Own,
    /// It is its own; its reference was emptied when the record went, and is set again.
    Relink,
    Ignore,
}

/// Whether the database's own programs run when rows come back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Triggers {
    /// They run, as for everybody: what deleting the record did beside it is done back by them.
    #[default]
    On,
    /// They do not. References are checked by us.
    Off,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Definition {
    pub version: u32,
    /// The table that records of this kind are in.
    pub root: Option<String>,
    /// Tables whose rows are never part of a record.
    #[serde(default)]
    pub exclude: Vec<String>,
    #[serde(default)]
    pub triggers: Triggers,
    /// `schema.table.constraint`, and what becomes of the rows that refer by it.
    #[serde(default, rename = "foreign-keys")]
    pub foreign_keys: BTreeMap<String, Then>,
    /// What tells the rows of tables without a primary key apart.
    #[serde(default)]
    pub keys: BTreeMap<String, Vec<String>>,
    #[serde(default, rename = "link")]
    pub links: Vec<LinkText>,
}

/// A reference that the database knows nothing of.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkText {
    pub child: String,
    pub parent: String,
    /// SQL, with the tables called `child` and `parent`.
    pub on: String,
}

/// A [`LinkText`] in a catalog.
#[derive(Clone, Debug)]
pub struct Link {
    pub child: usize,
    pub parent: usize,
    pub on: String,
}

/// A [`Definition`] in a catalog.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    pub excluded: BTreeSet<usize>,
    /// For each reference of the catalog.
    pub then: Vec<Then>,
    pub links: Vec<Link>,
}

impl Definition {
    /// Nothing but what the foreign keys say.
    pub fn plain() -> Self {
        Self { version: VERSION, ..Self::default() }
    }

    /// Errors: [`Code::Usage`]; [`Code::TooNew`] for one of a later version.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |error: toml::de::Error| {
            Error::new(Code::Usage, "the record definition is malformed").because(error.to_string())
        };
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let versioned: Versioned = toml::from_str(text).map_err(wrong)?;
        if versioned.version != VERSION {
            let what = format!("the record definition is of version {}", versioned.version);
            return Err(Error::new(Code::TooNew, what).hint(format!("this Mainstay reads version {VERSION}")));
        }
        toml::from_str(text).map_err(wrong)
    }

    /// Finds what it names, and gives tables the keys that it says they have.
    pub fn resolve(&self, catalog: &mut Catalog) -> Result<Rules> {
        let named = |error: Error| error.during("the record definition names something else");
        for (table, columns) in &self.keys {
            let index = catalog.find(table).map_err(named)?;
            let Some(table) = catalog.tables.get_mut(index) else { continue };
            if table.key.is_some() {
                let what = format!("the record definition gives {} a key, and it has one", table.name);
                return Err(Error::new(Code::Usage, what).hint("leave it out of [keys]"));
            }
            let found: Option<Vec<usize>> = columns.iter().map(|name| table.column(name)).collect();
            let Some(columns) = found.filter(|columns| !columns.is_empty()) else {
                let what = format!("the record definition names a column that {} does not have", table.name);
                return Err(Error::new(Code::NotFound, what));
            };
            let equal = vec![String::new(); columns.len()];
            table.key = Some(Key { columns, equal });
        }
        let mut rules = Rules::default();
        for table in &self.exclude {
            rules.excluded.insert(catalog.find(table).map_err(named)?);
        }
        rules.then = catalog
            .references
            .iter()
            .map(|reference| match reference.on_delete {
                OnDelete::Refuse | OnDelete::Cascade => Then::Own,
                OnDelete::SetNull | OnDelete::SetDefault => Then::Relink,
            })
            .collect();
        for (name, then) in &self.foreign_keys {
            let fits = |index: &usize| constraint(catalog, *index).is_some_and(|known| known == *name);
            let found = (0..catalog.references.len()).find(fits);
            let missing = || {
                Error::new(Code::NotFound, format!("there is no foreign key {name:?}"))
                    .hint("write it as schema.table.constraint")
            };
            if let Some(known) = rules.then.get_mut(found.ok_or_else(missing).map_err(named)?) {
                *known = *then;
            }
        }
        for link in &self.links {
            rules.links.push(Link {
                child: catalog.find(&link.child).map_err(named)?,
                parent: catalog.find(&link.parent).map_err(named)?,
                on: link.on.clone(),
            });
        }
        Ok(rules)
    }
}

/// A foreign key as definitions call it.
fn constraint(catalog: &Catalog, index: usize) -> Option<String> {
    let reference = catalog.references.get(index)?;
    Some(format!("{}.{}", catalog.tables.get(reference.child)?.name, reference.name))
}

/// A definition for records of a table, out of what the catalog says and what names suggest. What is only suggested is
/// commented out: a person decides.
pub fn suggest(catalog: &Catalog, root: usize) -> Result<String> {
    let table = catalog.table(root)?;
    let rules = Definition::plain().resolve(&mut catalog.clone())?;
    let mut text = format!(
        "# What belongs to a record of {}. Suggested from the database; read it, change it, keep it under version control.\n\
         version = {VERSION}\nroot = {}\n\n\
         # Tables that are never part of a record, such as audit logs.\nexclude = []\n\n\
         # \"off\" silences the database's own triggers while rows come back.\ntriggers = \"on\"\n",
        table.name,
        quoted(&table.name.to_string())
    );
    let mut reached = BTreeSet::from([root]);
    let mut frontier = vec![root];
    text.push_str("\n# own: belongs to the record. relink: keeps its row; the reference that was emptied is set again.\n[foreign-keys]\n");
    while let Some(parent) = frontier.pop() {
        for (index, reference) in catalog.references.iter().enumerate() {
            if reference.parent != parent {
                continue;
            }
            let then = match rules.then.get(index) {
                Some(Then::Own) => "own",
                Some(Then::Relink) => "relink",
                _ => "ignore",
            };
            let name = quoted(&constraint(catalog, index).unwrap_or_default());
            let _written = writeln!(text, "{name} = \"{then}\"");
            if then == "own" && reached.insert(reference.child) {
                frontier.push(reference.child);
            }
        }
    }
    suggest_links(catalog, root, &mut text);
    for index in &reached {
        if let Some(table) = catalog.tables.get(*index).filter(|table| table.key.is_none()) {
            let _written = write!(
                text,
                "\n# {} has no primary key. Say what tells its rows apart:\n# [keys]\n# {} = [\"…\"]\n",
                table.name,
                quoted(&table.name.to_string())
            );
        }
    }
    Ok(text)
}

/// Columns that are named after the table, and that no foreign key is on.
fn suggest_links(catalog: &Catalog, root: usize, text: &mut String) {
    let Some(table) = catalog.tables.get(root) else { return };
    let Some([key]) = table.key.as_ref().map(|key| key.columns.as_slice()) else { return };
    let Some(key) = table.columns.get(*key) else { return };
    let lower = table.name.name.to_lowercase();
    let single = lower.strip_suffix('s').unwrap_or(&lower);
    let stems = [lower.as_str(), single].map(|stem| format!("{stem}_"));
    for (index, child) in catalog.tables.iter().enumerate().filter(|(index, _)| *index != root) {
        for (position, column) in child.columns.iter().enumerate() {
            let name = column.name.to_lowercase();
            let named =
                stems.iter().any(|stem| name.starts_with(stem.as_str())) || name == format!("{single}id");
            let tied = catalog
                .references
                .iter()
                .any(|reference| reference.child == index && reference.child_columns.contains(&position));
            if !named || tied {
                continue;
            }
            let on = if column.shown_type == key.shown_type {
                format!("child.{} = parent.{}", column.sql, key.sql)
            } else {
                format!("child.{}::text = parent.{}::text", column.sql, key.sql)
            };
            let _written = write!(
                text,
                "\n# {}.{} is named after it, and no foreign key says so.\n# [[link]]\n# child = {}\n# parent = {}\n# on = {}\n",
                child.name,
                column.name.replace(char::is_control, " "),
                quoted(&child.name.to_string()),
                quoted(&table.name.to_string()),
                quoted(&on)
            );
        }
    }
}

/// A basic string of TOML.
fn quoted(text: &str) -> String {
    let mut quoted = String::from('"');
    for letter in text.chars() {
        match letter {
            '"' | '\\' => quoted.extend(['\\', letter]),
            letter if letter.is_control() => {
                let _written = write!(quoted, "\\u{:04x}", u32::from(letter));
            }
            letter => quoted.push(letter),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use mainstay_core::Code;

    use super::{Definition, Then, Triggers};

    #[test]
    fn definitions_are_read_and_what_is_not_understood_is_refused() {
        let text = "version = 1\nroot = \"customers\"\ntriggers = \"off\"\n\
                    [foreign-keys]\n\"public.review.r_fkey\" = \"ignore\"\n\
                    [[link]]\nchild = \"ticket\"\nparent = \"customers\"\non = \"child.ref = parent.id\"\n";
        let definition = Definition::parse(text).unwrap();
        assert_eq!(definition.triggers, Triggers::Off);
        assert_eq!(definition.foreign_keys["public.review.r_fkey"], Then::Ignore);
        assert_eq!(definition.links.len(), 1);
        let code = |text: &str| Definition::parse(text).unwrap_err().code();
        assert_eq!(code("version = 2\nwhatever = 1\n"), Code::TooNew);
        assert_eq!(code("version = 1\nwhatever = 1\n"), Code::Usage);
        assert_eq!(code("root = \"x\"\n"), Code::Usage);
    }
}
