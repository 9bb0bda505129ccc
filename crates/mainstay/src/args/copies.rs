//! The verbs that bring up private copies of databases.

use std::path::PathBuf;

use clap::Args;

/// Which database, and when.
#[derive(Args, Debug)]
pub(crate) struct Moment {
    /// WORKLOAD, WORKLOAD@TIME, WORKLOAD@LSN or WORKLOAD@POINT; without more the newest moment that can be recovered
    #[arg(value_name = "WORKLOAD[@MOMENT]")]
    pub target: String,
    /// The transaction before whose commit to stop
    #[arg(long, value_name = "XID", group = "until")]
    pub before: Option<u64>,
    /// Stop as soon as the files of the newest point are consistent
    #[arg(long, group = "until")]
    pub consistent: bool,
}

/// How a private copy is brought up.
#[derive(Args, Debug)]
pub(crate) struct Private {
    /// Restore all files first, instead of reading them from the repository as the server needs them
    #[arg(long)]
    pub full: bool,
    /// Where its private directory goes
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    pub scratch: PathBuf,
    /// The directory of PostgreSQL's programs [default: those of the right version, where distributions put them]
    #[arg(long, value_name = "DIR")]
    pub programs: Option<PathBuf>,
    /// The user of the system that it runs as when Mainstay is root
    #[arg(long, value_name = "NAME", default_value = "postgres")]
    pub user: String,
    /// The role that speaks to it: a superuser of the cluster
    #[arg(long, value_name = "ROLE", default_value = "postgres")]
    pub role: String,
    /// A library that it loads at its start, such as timescaledb (can be repeated). None is loaded otherwise: what the
    /// cluster had loaded could act on the world
    #[arg(long, value_name = "LIBRARY")]
    pub preload: Vec<String>,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay open shop@'2026-11-22 10:41:07+01'
  mainstay open shop --command 'psql -c \"SELECT count(*) FROM customers\"'
  mainstay open shop@1A/2B3C4D5E --database shop --full

The server stands still at that moment, reads only, is heard by nobody but on a socket in its
private directory, and leaves nothing. Its files are read from the repository as it needs them.
It takes PostgreSQL's programs of the same major version, and runs until Ctrl-C, or until the
line of --command has ended; that line finds it by PGHOST and the like.")]
pub(crate) struct Open {
    #[command(flatten)]
    pub moment: Moment,
    #[command(flatten)]
    pub private: Private,
    /// The database in the connection string
    #[arg(long, value_name = "NAME", default_value = "postgres")]
    pub database: String,
    /// Run this line in a shell, and close when it has ended
    #[arg(long, value_name = "LINE")]
    pub command: Option<String>,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay drill shop
  mainstay drill shop --check 'SELECT count(*) > 1000 FROM customers' --database shop
  mainstay drill shop@'2026-11-22 10:41:07+01' --checks assertions.sql --full

It is recovered into a private directory, to the newest moment unless one is given. Then
pg_amcheck reads every table and index of every database, pg_checksums every page where the
cluster has checksums, and each query of yours must answer true. What that took is noted in the
point, and `mainstay status` shows when it was last proven. When anything fails the exit status
is 1, and the server's log is kept.")]
pub(crate) struct Drill {
    #[command(flatten)]
    pub moment: Moment,
    #[command(flatten)]
    pub private: Private,
    /// The database that queries are asked of
    #[arg(long, value_name = "NAME", default_value = "postgres")]
    pub database: String,
    /// A query that must answer true (can be repeated)
    #[arg(long, value_name = "SQL")]
    pub check: Vec<String>,
    /// A file of such queries, each ended by a semicolon at the end of a line (can be repeated)
    #[arg(long, value_name = "FILE")]
    pub checks: Vec<PathBuf>,
    /// Leave out pg_amcheck and pg_checksums, which read everything
    #[arg(long)]
    pub quick: bool,
    /// Where the server's log is kept when the drill fails [default: beside the state of Mainstay]
    #[arg(long, value_name = "DIR")]
    pub evidence: Option<PathBuf>,
}
