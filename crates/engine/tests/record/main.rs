//! Single records of a real server: deleted, and brought back.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on says where")]

mod random;
mod shop;

use mainstay_core::Result;
use mainstay_engine::record::postgres::Postgres as Database;
use mainstay_engine::record::{Applied, Ask, Definition, Plan, Triggers, apply, plan};
use mainstay_testkit::lab::{Postgres, PostgresPlan};
use mainstay_workloads::postgres::{Address, Connection, Sql};

fn server() -> Postgres {
    let settings = [("fsync", "off"), ("max_connections", "30"), ("autovacuum", "off")];
    Postgres::start(&PostgresPlan { settings: &settings, ..PostgresPlan::default() }).unwrap()
}

fn open(server: &Postgres, database: &str) -> Sql {
    open_as(server, database, "postgres")
}

fn open_as(server: &Postgres, database: &str, user: &str) -> Sql {
    let mut address: Address = server.address().parse().unwrap();
    address.database = Some(database.to_owned());
    Sql::new(Connection::open(&address, user, None, false).unwrap())
}

/// Statements, each by itself, divided by lines of `--`.
fn run_all(sql: &mut Sql, script: &str) {
    for statement in script.split("\n--\n").filter(|statement| !statement.trim().is_empty()) {
        if let Err(error) = sql.run(statement) {
            panic!("{statement}\n{error:?}");
        }
    }
}

fn copy_database(server: &Postgres, from: &str, to: &str) {
    let mut sql = open(server, "template1");
    sql.run(&format!("DROP DATABASE IF EXISTS {to} WITH (FORCE)")).unwrap();
    sql.run(&format!("CREATE DATABASE {to} TEMPLATE {from}")).unwrap();
}

/// What a restore of one record is asked with.
struct Request<'a> {
    table: &'a str,
    key: &'a [(&'a str, &'a str)],
    definition: &'a str,
    triggers: Triggers,
    columns: &'a [&'a str],
    below: bool,
    erased: &'a [(&'a str, &'a str)],
}

impl Default for Request<'_> {
    fn default() -> Self {
        Self {
            table: "",
            key: &[],
            definition: "version = 1",
            triggers: Triggers::On,
            columns: &[],
            below: false,
            erased: &[],
        }
    }
}

impl Request<'_> {
    fn plan(&self, point: &mut Database, live: &mut Database) -> Result<Plan> {
        let definition =
            Definition { triggers: self.triggers, ..Definition::parse(self.definition).unwrap() };
        let wanted: Vec<(String, String)> =
            self.key.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let columns: Vec<String> = self.columns.iter().map(|column| (*column).to_owned()).collect();
        let erased = |table: &mainstay_engine::record::TableName, key: &str| {
            self.erased.iter().any(|(name, known)| *name == table.to_string() && *known == key)
        };
        let ask = Ask {
            table: self.table,
            wanted: &wanted,
            definition: &definition,
            columns: &columns,
            below: self.below,
            erased: &erased,
            rows_max: 100_000,
        };
        plan(point, live, &ask)
    }

    fn preview(&self, server: &Postgres, point: &str, live: &str) -> Result<Plan> {
        let mut point = Database::read(open(server, point)).unwrap();
        self.plan(&mut point, &mut Database::read(open(server, live)).unwrap())
    }

    fn restore(&self, server: &Postgres, point: &str, live: &str) -> Result<(Plan, Applied)> {
        self.restore_as(server, point, live, "postgres")
    }

    fn restore_as(&self, server: &Postgres, point: &str, live: &str, user: &str) -> Result<(Plan, Applied)> {
        let mut point = Database::read(open(server, point)).unwrap();
        let mut live = Database::write(open_as(server, live, user), self.triggers)?;
        let plan = self.plan(&mut point, &mut live)?;
        plan.check(false)?;
        let applied = apply(&mut live, &plan)?;
        live.commit()?;
        Ok((plan, applied))
    }
}

/// Every row of every table, as text.
fn image(sql: &mut Sql) -> Vec<String> {
    let tables = sql
        .query(
            "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
             WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname NOT IN ('pg_catalog', 'information_schema')
             AND c.relname <> 'audit_log' ORDER BY 1",
            &[],
        )
        .unwrap();
    let mut rows = Vec::new();
    for table in tables.into_iter().filter_map(|row| row.into_iter().next().flatten()) {
        let text = format!("SELECT '{}: ' || t::text FROM {table} t", table.replace('\'', "''"));
        rows.extend(
            sql.query(&text, &[]).unwrap().into_iter().filter_map(|row| row.into_iter().next().flatten()),
        );
    }
    rows.sort();
    rows
}

fn assert_same(server: &Postgres, one: &str, other: &str, told: impl Fn() -> String) {
    let (one, other) = (image(&mut open(server, one)), image(&mut open(server, other)));
    let only = |these: &[String], those: &[String]| -> Vec<String> {
        these.iter().filter(|row| those.binary_search(row).is_err()).cloned().collect()
    };
    let (left, right) = (only(&one, &other), only(&other, &one));
    assert!(
        left.is_empty() && right.is_empty() && one.len() == other.len(),
        "restored has\n{left:#?}\nnever deleted has\n{right:#?}\n{}",
        told()
    );
}
