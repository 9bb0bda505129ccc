//! Which kind of database an address or a workload is of.

use mainstay_core::{Code, Error, Result, WorkloadRef};
use mainstay_engine::{mariadb, postgres, sqlite};
use mainstay_repository::{PointInfo, Repository};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Engine {
    MariaDb,
    Postgres,
    Sqlite,
}

/// Schemes of addresses, and what answers to them.
const SCHEMES: &[(&str, Engine)] = &[
    ("postgres", Engine::Postgres),
    ("postgresql", Engine::Postgres),
    ("mariadb", Engine::MariaDb),
    ("mysql", Engine::MariaDb),
    ("sqlite", Engine::Sqlite),
];

const KINDS: &[(&str, Engine)] =
    &[(postgres::KIND, Engine::Postgres), (mariadb::KIND, Engine::MariaDb), (sqlite::KIND, Engine::Sqlite)];

impl Engine {
    /// By the scheme of an address.
    pub(in super::super) fn of_address(address: &str) -> Result<Self> {
        let scheme = address.split_once(':').map_or("", |(scheme, _)| scheme);
        let known = SCHEMES.iter().find(|(name, _)| *name == scheme);
        known.map(|(_, engine)| *engine).ok_or_else(|| {
            Error::new(Code::Usage, "this is not the address of a database that Mainstay knows").hint(
                "write it as postgres://USER@HOST:PORT/DATABASE, mariadb://USER@HOST:PORT or sqlite:PATH",
            )
        })
    }

    /// Of the newest point or the journal of a workload of that name, which comes with it.
    pub(in super::super) fn of_workload(
        name: &str,
        points: &[PointInfo],
        repository: &Repository,
    ) -> Result<(Self, WorkloadRef)> {
        let journals = repository.journals()?;
        let pointed = points.iter().rev().map(|point| &point.workload);
        let mut all = pointed.chain(journals.iter().map(|journal| &journal.stream().workload));
        let found = all.find_map(|workload| {
            let engine = Self::of_kind(&workload.kind.0).filter(|_| workload.name == name)?;
            Some((engine, workload.clone()))
        });
        found.ok_or_else(|| {
            Error::new(Code::NotFound, format!("there is no point of a database {name:?}"))
                .hint("mainstay points shows what there is")
        })
    }

    pub(in super::super) fn of_kind(kind: &str) -> Option<Self> {
        KINDS.iter().find(|(name, _)| *name == kind).map(|(_, engine)| *engine)
    }
}

#[cfg(test)]
mod tests {
    use super::Engine;

    #[test]
    fn addresses_are_told_by_their_scheme() {
        assert_eq!(Engine::of_address("postgresql://h").unwrap(), Engine::Postgres);
        for bad in ["", "h", "oracle://h", "//h"] {
            assert_eq!(Engine::of_address(bad).unwrap_err().code(), mainstay_core::Code::Usage, "{bad}");
        }
    }
}
