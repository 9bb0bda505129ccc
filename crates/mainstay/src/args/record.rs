//! The verbs for single records.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{Moment, Private};

#[derive(Debug, Subcommand)]
pub(crate) enum Record {
    /// Tell when a row was changed or deleted, and by which transaction
    Find(RecordFind),
    /// Bring a record, with everything that belongs to it, back into the live database
    Restore(Box<RecordRestore>),
    /// Suggest a record definition: what belongs to a record beyond what foreign keys say
    Define(RecordDefine),
    /// The list of rows that may never come back, because a law wants them forgotten
    Erased(RecordErased),
}

#[derive(Args, Debug)]
pub(crate) struct Row {
    /// TABLE or SCHEMA.TABLE; a part in double quotes may hold any letters
    #[arg(value_name = "TABLE")]
    pub table: String,
    /// Which row, best by its primary key
    #[arg(value_name = "COLUMN=VALUE", required = true)]
    pub key: Vec<String>,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay record find shop customers id=42 --database shop
  mainstay record find shop customers id=42 --database shop --all --json

Reads the log that the repository holds, beginning at the newest point that tells of the row: a
private copy of the cluster says where it lay. Works with wal_level replica and logical; with
logical also rows are found that came and went between two points, by keys that are numbers,
texts or UUIDs. Logs of PostgreSQL 15 are read.")]
pub(crate) struct RecordFind {
    #[arg(value_name = "WORKLOAD")]
    pub workload: String,
    #[command(flatten)]
    pub row: Row,
    /// The database that the table is in
    #[arg(long, value_name = "NAME", default_value = "postgres")]
    pub database: String,
    /// Begin at the oldest point
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    pub private: Private,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Fire {
    On,
    Off,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay record restore shop customers id=42 --server postgres://admin@db.example/shop --dry-run
  mainstay record restore shop customers id=42 --server postgres://admin@db.example/shop
  mainstay record restore shop@'2026-11-22 10:41' customers id=42 --server … --definition customer.toml
  mainstay record restore shop@1A/2B3C4D5E customers id=42 --server … --columns email,phone --apply

Without a moment the record is taken as it was just before it was deleted. Afterwards the live
database is what it would have been had the record never been deleted; what was changed later stays
as it is. The plan is shown first, and one transaction does all of it, checks it, and is undone
when anything is not as it should be. A receipt with the script that takes it back is kept as a
point: mainstay cat POINT take-back.sql.")]
pub(crate) struct RecordRestore {
    #[command(flatten)]
    pub moment: Moment,
    #[command(flatten)]
    pub row: Row,
    /// The live database: postgres://USER@HOST:PORT/DATABASE, or postgres:///DATABASE?host=/var/run/postgresql
    #[arg(long, value_name = "ADDRESS")]
    pub server: String,
    /// A file whose first line is the password [default: ~/.pgpass, as for PostgreSQL's own programs]
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    /// What belongs to the record beyond what foreign keys say; see `mainstay record define`
    #[arg(long, value_name = "FILE")]
    pub definition: Option<PathBuf>,
    /// Of a row that is there: give these columns their old values
    #[arg(long, value_name = "COLUMN,…", value_delimiter = ',')]
    pub columns: Vec<String>,
    /// Of a row that is there: bring back all that is missing below it, also what was deleted later by itself
    #[arg(long, conflicts_with = "columns")]
    pub below: bool,
    /// Whether the database's own triggers run [default: on, unless the definition says otherwise]
    #[arg(long, value_enum, value_name = "HOW")]
    pub triggers: Option<Fire>,
    /// Go on although tables of the record have changed since
    #[arg(long)]
    pub schema_changed: bool,
    /// A record of more rows is refused
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    pub max_rows: usize,
    /// Show the plan; change nothing
    #[arg(long, short = 'n', conflicts_with_all = ["sql", "apply"])]
    pub dry_run: bool,
    /// Write the plan as a script to stdout; change nothing
    #[arg(long, conflicts_with = "apply")]
    pub sql: bool,
    /// Do it without asking
    #[arg(long)]
    pub apply: bool,
    #[command(flatten)]
    pub private: Private,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:
  mainstay record define customers --server postgres://admin@db.example/shop > customer.toml

Read it, change it, keep it under version control, and give it to record restore --definition.
What only names suggest is commented out.")]
pub(crate) struct RecordDefine {
    /// The table that records of this kind are in
    #[arg(value_name = "TABLE")]
    pub table: String,
    /// The database: postgres://USER@HOST:PORT/DATABASE
    #[arg(long, value_name = "ADDRESS")]
    pub server: String,
    /// A file whose first line is the password [default: ~/.pgpass, as for PostgreSQL's own programs]
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay record erased
  mainstay record erased --add shop customers id=42 --database shop --why 'request 2026-118'
  mainstay record erased --remove shop customers id=42 --database shop

A restore of a record on the list is refused, and records that hold one come back without it. The
key must be as plans show it. The list is kept, sealed, in the repository's log: name people by
numbers there, not by what tells who they are.")]
pub(crate) struct RecordErased {
    /// Put a row on the list
    #[arg(long, conflicts_with = "remove")]
    pub add: bool,
    /// Take a row off the list
    #[arg(long)]
    pub remove: bool,
    #[arg(value_name = "WORKLOAD", requires = "table")]
    pub workload: Option<String>,
    /// SCHEMA.TABLE; public unless named
    #[arg(value_name = "TABLE", requires = "key")]
    pub table: Option<String>,
    /// Its primary key, in the order of its columns
    #[arg(value_name = "COLUMN=VALUE")]
    pub key: Vec<String>,
    /// The database that the table is in; --add and --remove need it
    #[arg(long, value_name = "NAME")]
    pub database: Option<String>,
    /// Why; shown wherever the list is
    #[arg(long, value_name = "TEXT")]
    pub why: Option<String>,
    /// Who decided it [default: this user]
    #[arg(long, value_name = "NAME")]
    pub by: Option<String>,
    /// Say what would be done; change nothing
    #[arg(long, short = 'n')]
    pub dry_run: bool,
}
