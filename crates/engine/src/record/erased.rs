//! Rows that may not come back, because a law wants what is known of a person forgotten. The list is kept with the other
//! decisions in the log of the repository: sealed, signed, and never without the reason.

use mainstay_core::{Id16, Result, Time};
use mainstay_repository::Repository;
use serde::{Deserialize, Serialize};

use super::model::TableName;

/// As it stands in the log, beside decisions about other things.
#[derive(Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum Decided {
    Erased(Erased),
}

/// One row that may not come back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Erased {
    /// The name of the workload, and of the database in it.
    pub workload: String,
    pub database: String,
    pub table: String,
    /// The key, as `record find` and plans show it: `id=42`.
    pub key: String,
    pub who: String,
    pub why: String,
}

impl Erased {
    /// The list as it stands, each with the decision that it is.
    pub fn list(repository: &Repository) -> Vec<(Id16, Time, Self)> {
        let decisions = repository.decisions().into_iter();
        // What a later version wrote, and decisions about other things, are not ours.
        let read = |text: &str| serde_json::from_str(text).ok().map(|Decided::Erased(erased)| erased);
        let mut list: Vec<_> = decisions
            .filter_map(|decision| Some((decision.id, decision.decided, read(&decision.text)?)))
            .collect();
        list.sort_by_key(|(_, decided, _)| *decided);
        list
    }

    /// Puts the row on the list.
    ///
    /// Errors: [`mainstay_core::Code::NoPower`] for a key that may not expire points.
    pub fn add(&self, repository: &Repository) -> Result<()> {
        let text = serde_json::to_string(&Decided::Erased(self.clone()))
            .map_err(|error| mainstay_core::Error::bug("cannot write a decision down").because(error))?;
        let same = Self::list(repository).into_iter().find(|(_, _, known)| known.is(self));
        repository.decide(same.map(|(id, ..)| id), &text)
    }

    /// Whether it speaks of the same row.
    pub fn is(&self, other: &Self) -> bool {
        (&self.workload, &self.database, &self.table, &self.key)
            == (&other.workload, &other.database, &other.table, &other.key)
    }

    /// Whether a row of a database is meant.
    pub fn names(&self, workload: &str, database: &str, table: &TableName, key: &str) -> bool {
        self.workload == workload
            && self.database == database
            && self.table == table.to_string()
            && self.key == key
    }
}

#[cfg(test)]
mod tests {
    use super::{Decided, Erased};

    #[test]
    fn the_list_is_read_as_it_was_written_and_other_decisions_are_not_of_it() {
        let erased = Erased {
            workload: "shop".into(),
            database: "shop".into(),
            table: "public.customers".into(),
            key: "id=42".into(),
            who: "ann".into(),
            why: "request 7".into(),
        };
        let text = serde_json::to_string(&Decided::Erased(erased.clone())).unwrap();
        let Decided::Erased(read) = serde_json::from_str(&text).unwrap();
        assert_eq!(read, erased);
        let ignore = r#"{"kind":"ignore","which":"web","host":null,"who":"ann","why":"x","until":null}"#;
        assert!(serde_json::from_str::<Decided>(ignore).is_err());
    }
}
