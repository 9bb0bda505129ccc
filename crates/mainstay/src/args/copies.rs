//! The verbs that bring up private copies of databases, and the other ways to take and use their points.

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

/// How a point is taken while the server does not run.
#[derive(Args, Debug)]
pub(crate) struct Offline {
    /// Stop the server, copy this data directory, which is on this machine, and start it again, whatever happens
    #[arg(long, value_name = "DIR", requires = "stop", requires = "start")]
    pub offline: Option<PathBuf>,
    /// The line for the shell that stops the server in order
    #[arg(long, value_name = "LINE", requires = "offline")]
    pub stop: Option<String>,
    /// The line for the shell that starts it, and returns when it runs
    #[arg(long, value_name = "LINE", requires = "offline")]
    pub start: Option<String>,
    /// Start the server after this long even if the backup is not done; that makes no point then
    #[arg(long, value_name = "TIME", requires = "offline")]
    pub max_downtime: Option<String>,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay db standby shop --to /var/lib/postgresql/15/standby \\
    --primary 'postgres://replicator@db.example'

Start PostgreSQL of the same major version on the directory: it replays what the repository holds
and then follows the primary. The role needs REPLICATION and a line in pg_hba.conf; its password
goes into ~/.pgpass of the server's user. Make a slot at the primary and name it with --slot if
the standby may be away for long, or let it fetch what the primary no longer has, by a key that
the server's user can read:
  --restore-command 'mainstay -r /srv/backup --key-file KEY db fetch-wal --name shop %f %p'")]
pub(crate) struct DbStandby {
    #[arg(value_name = "WORKLOAD")]
    pub workload: String,
    /// A directory that is empty or not there
    #[arg(long, value_name = "DIR")]
    pub to: PathBuf,
    /// How the standby reaches the primary: postgres://USER@HOST:PORT
    #[arg(long, value_name = "SERVER")]
    pub primary: String,
    /// The slot at the primary that keeps the log for it
    #[arg(long, value_name = "SLOT")]
    pub slot: Option<String>,
    /// Its restore_command, which fetches what the primary no longer has
    #[arg(long, value_name = "LINE")]
    pub restore_command: Option<String>,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay db export 'postgres://postgres@db.example' --name shop-export
  mainstay cat shop-export /globals.sql | psql -X -d postgres
  createdb shop && mainstay cat shop-export /databases/shop.sql | psql -X -d shop

pg_dump writes each database as plain SQL, uncompressed, straight into the repository, which cuts
it along its content, so that the next export stores what is new. pg_dumpall adds roles and
tablespaces. Every database is consistent in itself. Unless all programs end well there is no
point.")]
pub(crate) struct DbExport {
    #[command(flatten)]
    pub server: super::Server,
    /// Only this database (can be repeated)
    #[arg(long, value_name = "NAME")]
    pub database: Vec<String>,
    /// Leave out the passwords of roles, which only a superuser may read
    #[arg(long)]
    pub no_role_passwords: bool,
    /// The directory of PostgreSQL's programs [default: those of the right version, where distributions put them]
    #[arg(long, value_name = "DIR")]
    pub programs: Option<PathBuf>,
    /// Mark the point (can be repeated)
    #[arg(long, value_name = "TAG")]
    pub tag: Vec<String>,
}
