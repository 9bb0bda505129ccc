//! The verbs for databases.

use std::path::PathBuf;

use clap::{Args, Subcommand};

const SERVER_HELP: &str = "The server: postgres://USER@HOST:PORT, or postgres:///?host=/var/run/postgresql for a socket \
    (?sslmode=verify-full&sslrootcert=FILE for TLS with whom you know); or sqlite:PATH, a database, a directory of them, \
    or a pattern such as '/srv/*/app.db'";

#[derive(Debug, Subcommand)]
pub(crate) enum Db {
    /// Take a recovery point of a database cluster while it runs
    Backup(DbBackup),
    /// Follow the log of a cluster, so that any moment can be recovered
    Follow(DbFollow),
    /// Show from which spans a cluster can be recovered, and the holes between them
    Status(DbStatus),
    /// Bring a cluster back, as it was at any moment
    Restore(DbRestore),
    /// Make a standby of a cluster out of the repository
    Standby(super::DbStandby),
    /// Store what the dump programs of a database server write, database by database
    Export(super::DbExport),
    /// Prove that a database can be recovered; the same as `mainstay drill`
    Drill(super::Drill),
    /// Stand by a private copy and clear it away if its run dies (started by Mainstay itself)
    #[command(hide = true)]
    Guard,
    /// Store a segment of the log that a server pushes: its archive_command
    PushWal(DbPushWal),
    /// Give back a segment of the log: the restore_command of a server
    FetchWal(DbFetchWal),
    /// Stand by a server that is stopped and start it if its run dies (started by Mainstay itself)
    #[command(hide = true)]
    StartGuard,
}

#[derive(Args, Debug)]
pub(crate) struct Server {
    #[arg(value_name = "SERVER", help = SERVER_HELP)]
    pub server: String,
    /// A file whose first line is the password [default: ~/.pgpass, as for PostgreSQL's own programs]
    #[arg(long, value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    /// What the workload is called [default: the server's host]
    #[arg(long, value_name = "WORKLOAD")]
    pub name: Option<String>,
    /// The replication slot that keeps the log at the server until it is stored here; it is made if it is not there
    #[arg(long, value_name = "SLOT")]
    pub slot: Option<String>,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay db backup 'postgres://backup@db.example' --name shop
  mainstay db backup 'postgres:///?host=/var/run/postgresql&user=postgres' --name shop
  mainstay db backup postgres:// --name shop --offline /var/lib/postgresql/15/main \\
    --stop 'systemctl stop postgresql@15-main' --start 'systemctl start postgresql@15-main'

The role needs: CREATE ROLE backup LOGIN REPLICATION PASSWORD '…'; GRANT pg_monitor TO backup; and a line in
pg_hba.conf: host replication backup ADDRESS scram-sha-256. The server needs wal_level = replica or logical.
Files stream straight into the repository; nothing is staged. The log that makes them consistent goes into the journal.")]
pub(crate) struct DbBackup {
    #[command(flatten)]
    pub server: Server,
    #[command(flatten)]
    pub offline: super::Offline,
    /// Let the server take its time for the checkpoint before the backup, which spares its disks
    #[arg(long)]
    pub spread: bool,
    /// The server is a replica: wait until it has no temporary tables open, and record its place in its master's log (MariaDB)
    #[arg(long)]
    pub replica: bool,
    /// Mark the point (can be repeated)
    #[arg(long, value_name = "TAG")]
    pub tag: Vec<String>,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay db follow 'postgres://backup@db.example' --name shop --slot mainstay

Runs until it is stopped; best as a service. What the server has written is stored within the time of --every, and the
server is told only then. With synchronous_standby_names = 'mainstay' on the server no commit is acknowledged before it
is stored. Mind max_slot_wal_keep_size: the log that waits in a slot must not fill the server's disk.")]
pub(crate) struct DbFollow {
    #[command(flatten)]
    pub server: Server,
    /// Store what was gathered at least so often
    #[arg(long, value_name = "TIME", default_value = "1s")]
    pub every: String,
    /// Give up the slot and what it keeps, when that is more than SIZE (10G, 500M): the journal gets a hole, and the
    /// server's disk does not fill up
    #[arg(long, value_name = "SIZE", requires = "slot")]
    pub max_slot_lag: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct DbStatus {
    /// One workload [default: all clusters]
    #[arg(value_name = "WORKLOAD")]
    pub workload: Option<String>,
    /// Ask a server as well what its slots keep, and how far behind they are
    #[arg(long, value_name = "SERVER")]
    pub server: Option<String>,
    /// A file whose first line is the password [default: ~/.pgpass, as for PostgreSQL's own programs]
    #[arg(long, value_name = "FILE", requires = "server")]
    pub password_file: Option<PathBuf>,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples, in postgresql.conf:
  archive_command = 'mainstay -r /srv/backup db push-wal --name shop %p'

What is stored already is fine; a segment that says otherwise than what is stored is kept beside it and told of, so that
the server does not wait for ever. A follower of the same workload may run beside.")]
pub(crate) struct DbPushWal {
    /// What the workload is called [default: this host]
    #[arg(long, value_name = "WORKLOAD")]
    pub name: Option<String>,
    /// The file, as %p names it
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples, in postgresql.conf:
  restore_command = 'mainstay -r /srv/backup db fetch-wal --name shop %f %p'

A file that is not stored ends with status 1, which a server takes for the end of the log. All other failures end with
130, which it does not.")]
pub(crate) struct DbFetchWal {
    /// What the workload is called [default: this host]
    #[arg(long, value_name = "WORKLOAD")]
    pub name: Option<String>,
    /// The name of the file, as %f is
    #[arg(value_name = "NAME")]
    pub file: String,
    /// Where it goes, as %p says
    #[arg(value_name = "FILE")]
    pub to: PathBuf,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay db restore shop --to /var/lib/postgresql/15/again
  mainstay db restore shop --to /srv/pg --at '2026-11-22 10:41:07+01:00'
  mainstay db restore shop --to /srv/pg --lsn 1A/2B3C4D5E
  mainstay db restore app --to /srv/app --position 3:427
  mainstay db restore shop --to /srv/pg --before 735812
  mainstay db restore shop --in-place /var/lib/postgresql/15/main

Start PostgreSQL of the same major version on the directory: it recovers to the moment chosen and opens for writing.
Tablespaces come to lie beside the directory. The lines that Mainstay adds at the end of postgresql.auto.conf can go
once it has recovered.")]
pub(crate) struct DbRestore {
    #[arg(value_name = "WORKLOAD")]
    pub workload: String,
    /// A directory that is empty or not there
    #[arg(long, value_name = "DIR", required_unless_present = "in_place")]
    pub to: Option<PathBuf>,
    /// The data directory of the same cluster, whose server is stopped: it is moved aside once everything is restored
    /// beside it, which takes room for both
    #[arg(long, value_name = "DIR", conflicts_with = "to")]
    pub in_place: Option<PathBuf>,
    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
    /// The moment, in the local time zone unless it names another
    #[arg(long, value_name = "TIME", group = "until")]
    pub at: Option<String>,
    /// The place in the log before which to stop
    #[arg(long, value_name = "LSN", group = "until")]
    pub lsn: Option<String>,
    /// The transaction before whose commit to stop
    #[arg(long, value_name = "XID", group = "until")]
    pub before: Option<u64>,
    /// Stop as soon as the files are consistent
    #[arg(long, group = "until")]
    pub consistent: bool,
    /// The place before which to stop in a binary log, as in mariadb-bin.000034:1588 (MariaDB); the commit after which to
    /// stop, as `mainstay db status` writes it (SQLite)
    #[arg(long, value_name = "PLACE", group = "until")]
    pub position: Option<String>,
    /// The transaction before which to stop, as in 0-1-4711 (MariaDB)
    #[arg(long, value_name = "GTID", group = "until")]
    pub gtid: Option<String>,
    /// Only this database of several (SQLite)
    #[arg(long, value_name = "NAME")]
    pub database: Option<String>,
    /// The timeline to follow [default: the newest one that leads there]
    #[arg(long, value_name = "NUMBER")]
    pub timeline: Option<u32>,
    /// Say what would be restored; change nothing
    #[arg(long, short = 'n')]
    pub dry_run: bool,
}
