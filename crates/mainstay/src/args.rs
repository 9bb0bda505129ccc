//! The command line, as strings and flags. Parsing touches nothing of the world.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

mod copies;
mod db;
mod inside;
mod record;
mod vm;

pub(crate) use copies::{DbExport, DbStandby, Drill, Moment, Offline, Open, Private};
pub(crate) use db::{Db, DbBackup, DbFetchWal, DbFollow, DbPushWal, DbRestore, DbStatus, Server};
pub(crate) use inside::{Inside, Within};
pub(crate) use record::{Fire, Record, RecordDefine, RecordErased, RecordFind, RecordRestore};
pub(crate) use vm::{
    Accel, Left, Level, Shape, Vm, VmBackup, VmIgnore, VmList, VmProve, VmReceive, VmRecover, VmRestore,
    VmRun,
};

const POINT_HELP: &str = "A recovery point: latest, WORKLOAD, WORKLOAD@latest, WORKLOAD@TIME, WORKLOAD@POINT or \
                          POINT, each with ~2 for the second before it";

/// Keeps recovery points of your files in one sealed, deduplicating repository, and gives them back
#[derive(Debug, Parser)]
#[command(
    name = "mainstay",
    version,
    disable_help_subcommand = false,
    arg_required_else_help = true,
    max_term_width = 100,
    after_help = "Five minutes from nothing:
  mainstay backup ~/Documents               take a recovery point; makes a repository on first use
  mainstay points                           see what there is
  mainstay find '*.odt'                     look for a name in all points
  mainstay restore latest --to /tmp/look    put everything into a new directory
  mainstay verify --read-data               check that every stored byte is as it was written

Environment: MAINSTAY_REPOSITORY, MAINSTAY_KEY_FILE, MAINSTAY_PASSPHRASE_FILE, MAINSTAY_PASSPHRASE_COMMAND,
MAINSTAY_VOLUME_PASSPHRASE_FILE, MAINSTAY_VOLUME_PASSPHRASE_COMMAND.
Exit status: 0 done, 1 failed, 2 usage, 3 done with skipped items, 10 no repository, 12 wrong key,
20 damage, 21 promise overdue, 70 a mistake in Mainstay, 130 cancelled (mainstay exit-codes)."
)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Everywhere")]
pub(crate) struct Global {
    /// Where the repository is: a directory or s3://BUCKET/PREFIX
    #[arg(long, short, global = true, value_name = "DIR|s3://…")]
    pub repository: Option<String>,
    /// Open the repository with this key file or writer credential
    #[arg(long, global = true, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Open the repository with this recovery kit, or with so many pages of one as it takes, one below the other
    #[arg(long, global = true, value_name = "FILE", conflicts_with = "key_file")]
    pub with_kit: Option<PathBuf>,
    /// Write one JSON object a line to stdout (docs/json)
    #[arg(long, global = true)]
    pub json: bool,
    /// Say nothing but results and errors
    #[arg(long, short, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more; list every item that is worth a word
    #[arg(long, short, global = true)]
    pub verbose: bool,
    /// Show no progress even on a terminal
    #[arg(long, global = true)]
    pub no_progress: bool,
    /// The time zone for times that name none, such as Europe/Berlin [default: this machine's]
    #[arg(long, global = true, value_name = "NAME")]
    pub time_zone: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Make a repository and print its recovery kit
    Init(Init),
    /// Take a recovery point of files and directories
    Backup(Backup),
    /// List, show, compare, tag and hold recovery points
    Points(Points),
    /// Look for a name in all recovery points
    Find(Find),
    /// Put files back: to a new place, or where they were
    Restore(Restore),
    /// Take back the last restore that wrote over something
    Undo(Undo),
    /// List a directory of a recovery point
    Ls(Ls),
    /// Write the content of files of a recovery point to stdout
    Cat(Cat),
    /// Show points as directories, read-only, until Ctrl-C or umount
    Mount(Mount),
    /// Check stored bytes
    Verify(Verify),
    /// Stop keeping old recovery points
    Expire(Expire),
    /// Free the bytes that no recovery point needs
    Gc(Gc),
    /// Say what is protected, how well, and what is overdue
    Status(Status),
    /// Protect virtual machines and bring them back
    #[command(subcommand)]
    Vm(Vm),
    /// Database clusters
    #[command(subcommand)]
    Db(Db),
    /// Start a throwaway server that shows a database as it was at a moment
    Open(Open),
    /// Prove by a private copy that a database can be recovered
    Drill(Drill),
    /// One record: when it was deleted, and back into the live database
    #[command(subcommand)]
    Record(Record),
    /// Manage keys, the recovery kit and writers
    #[command(subcommand)]
    Key(Key),
    /// Print a completion script for a shell
    Completions { shell: clap_complete::Shell },
    /// Write the man pages into a directory
    Man { directory: PathBuf },
    /// Print the table of exit codes
    ExitCodes,
    /// Print the JSON schema of the lines that --json writes
    Schema,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay init                                  ask for a passphrase, print the recovery kit
  mainstay -r /mnt/usb/mainstay init --generate-key --kit kit.txt
Print the kit, keep it where a fire in this room does not reach it, and delete the file.")]
pub(crate) struct Init {
    /// Write the recovery kit to this new file instead of stdout
    #[arg(long, value_name = "FILE")]
    pub kit: Option<PathBuf>,
    /// Make a key in a private file instead of asking for a passphrase
    #[arg(long)]
    pub generate_key: bool,
    /// Store no parity: for media that repair themselves (ZFS, object storage). With it, a sixteenth more is stored, and
    /// damaged sectors are made good
    #[arg(long)]
    pub no_parity: bool,
    /// Say what would be done; change nothing
    #[arg(long, short = 'n')]
    pub dry_run: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay backup ~/Documents
  mainstay backup /etc /srv --name config --tag before-upgrade
  mainstay backup / --one-file-system --exclude '*.iso' --skip-caches
  mainstay backup / --machine web                between two images of the virtual machine web
  mainstay backup ~/Documents --dry-run          say what would be read; change nothing

The same paths on the same machine are the same workload; only what changed is read again.
Items that could not be read are listed, counted in the point, and make the exit status 3.")]
pub(crate) struct Backup {
    /// What to protect
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// The workload's name [default: HOST:LAST-PART-OF-PATH]
    #[arg(long, value_name = "WORKLOAD")]
    pub name: Option<String>,
    /// The virtual machine whose files these are, by name or UUID: they are shown over its image
    /// [default: the machine that this runs in, if it is one]
    #[arg(long, value_name = "MACHINE")]
    pub machine: Option<String>,
    /// They are of no virtual machine, whatever this runs in
    #[arg(long, conflicts_with = "machine")]
    pub no_machine: bool,
    /// Mark the point (can be repeated)
    #[arg(long, value_name = "TAG")]
    pub tag: Vec<String>,
    /// Leave out what matches, as in a .gitignore (can be repeated)
    #[arg(long, value_name = "PATTERN")]
    pub exclude: Vec<String>,
    /// Leave out what matches a pattern in this file (can be repeated)
    #[arg(long, value_name = "FILE")]
    pub exclude_from: Vec<PathBuf>,
    /// Leave out directories that CACHEDIR.TAG marks as caches
    #[arg(long)]
    pub skip_caches: bool,
    /// Stay on the file system of each path
    #[arg(long, short = 'x')]
    pub one_file_system: bool,
    /// Read one in N of the unchanged files again, to find content that changed behind its time; 0 for none
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub reread: u32,
    /// Read everything, as if there were no earlier point
    #[arg(long)]
    pub full: bool,
    /// How hard what is new is compressed; auto: balanced
    #[arg(long, value_enum, default_value_t, value_name = "HOW")]
    pub compression: Compression,
    /// Read from a snapshot (btrfs or LVM; as root): never, try where it can be done, or always
    #[arg(long, value_enum, default_value_t, value_name = "WHEN")]
    pub snapshots: Snapshots,
    /// Run this before anything is read, through the shell; its failure ends the run
    #[arg(long, value_name = "COMMAND")]
    pub quiesce: Option<String>,
    /// Go on when it fails; the point says so
    #[arg(long, requires = "quiesce")]
    pub quiesce_may_fail: bool,
    /// Run this when everything is stored, or has failed, through the shell
    #[arg(long, value_name = "COMMAND")]
    pub thaw: Option<String>,
    /// How long each of the two may take before it is killed
    #[arg(long, value_name = "TIME", default_value = "1h")]
    pub hook_limit: String,
    /// Say what would be read; change nothing
    #[arg(long, short = 'n')]
    pub dry_run: bool,
}

/// How hard new content is compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Compression {
    /// What suits the kind of content
    #[default]
    Auto,
    /// Not at all
    None,
    /// About half the processor time of balanced, for some percent more room
    Fast,
    Balanced,
    /// Many times the processor time, for some percent less room
    Best,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Snapshots {
    #[default]
    Never,
    Try,
    Always,
}

#[derive(Args, Debug)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  mainstay points                                everything, oldest first
  mainstay points --workload documents --json
  mainstay points web                            images and files of the machine web as one timeline
  mainstay points diff documents~1 documents     what the last run changed
  mainstay points hold latest --reason 'case 17' --until 2027-06-30"
)]
pub(crate) struct Points {
    #[command(subcommand)]
    pub act: Option<PointsAct>,
    #[command(flatten)]
    pub list: PointsList,
}

#[derive(Args, Clone, Debug, Default)]
pub(crate) struct PointsList {
    /// Only this workload; of a virtual machine also the points of its files
    #[arg(value_name = "WORKLOAD", conflicts_with = "workload")]
    pub of: Option<String>,
    /// Only this workload
    #[arg(long, short)]
    pub workload: Option<String>,
    /// Only points with this tag (can be repeated: any of them)
    #[arg(long, short)]
    pub tag: Vec<String>,
    /// Also the points that `undo` uses
    #[arg(long)]
    pub undo: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PointsAct {
    /// List recovery points, oldest first
    List(PointsList),
    /// Show all that is known of a point
    Show {
        #[arg(help = POINT_HELP)]
        point: String,
    },
    /// List what differs between two points
    Diff {
        #[arg(help = POINT_HELP)]
        old: String,
        #[arg(help = POINT_HELP)]
        new: String,
        /// Only at and below this path
        path: Option<PathBuf>,
    },
    /// Mark a point
    Tag {
        #[arg(help = POINT_HELP)]
        point: String,
        #[arg(required = true)]
        tags: Vec<String>,
        /// Say what would be done; change nothing
        #[arg(long, short = 'n')]
        dry_run: bool,
    },
    /// Remove marks from a point
    Untag {
        #[arg(help = POINT_HELP)]
        point: String,
        #[arg(required = true)]
        tags: Vec<String>,
        /// Say what would be done; change nothing
        #[arg(long, short = 'n')]
        dry_run: bool,
    },
    /// Keep a point from expiring
    Hold {
        #[arg(help = POINT_HELP)]
        point: String,
        /// Why; shown wherever the point is
        #[arg(long)]
        reason: String,
        /// When the hold ends by itself
        #[arg(long, value_name = "TIME")]
        until: Option<String>,
        /// Say what would be done; change nothing
        #[arg(long, short = 'n')]
        dry_run: bool,
    },
    /// End holds of a point
    Release {
        #[arg(help = POINT_HELP)]
        point: String,
        /// Only the hold whose id starts so; all holds of the point when not given
        hold: Option<String>,
        /// Say what would be done; change nothing
        #[arg(long, short = 'n')]
        dry_run: bool,
    },
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay find report.odt
  mainstay find '*.conf' --workload etc
  mainstay find '/home/*/.ssh/*'                 a pattern with / is matched against the whole path

Each line is one state of one item, newest first, with the points between which it stayed the same. Files on the
disks of virtual machines are found too; every point of a machine takes a walk through them.")]
pub(crate) struct Find {
    /// A name, or a pattern with * ? [ ] **
    pub pattern: OsString,
    /// Only in this workload
    #[arg(long, short)]
    pub workload: Option<String>,
    /// Upper and lower case are the same
    #[arg(long, short)]
    pub ignore_case: bool,
    #[command(flatten)]
    pub inside: Within,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// Into a directory that is empty or not there
    New,
    /// Only what is missing
    Add,
    /// What is missing and what differs, by kind, size and time; content is not compared
    Overwrite,
    /// Make the place as it was: also delete what the point does not hold
    Mirror,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Owners {
    /// The user and group of that name on this machine, by number where there is none
    #[default]
    Name,
    /// By number
    Number,
    /// Whoever restores
    Leave,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay restore latest --to /tmp/look                  everything, under its full path
  mainstay restore latest /etc/nginx --to /tmp/look       gives /tmp/look/etc/nginx
  mainstay restore latest /etc/nginx --to /tmp/look --strip    gives /tmp/look/nginx.conf …
  mainstay restore etc@2026-11-20 /etc/nginx --dry-run    what would change where it was
  mainstay restore etc@2026-11-20 /etc/nginx              put it back where it was
  mainstay restore latest ~/site --mode mirror            and delete what was not there then

Before anything existing is touched, an undo point is taken: `mainstay undo` takes the restore back.
Mirror deletes what the point does not hold, but nothing that was left out of it.
A restore that was stopped goes on with the same command and --mode overwrite.")]
pub(crate) struct Restore {
    #[arg(help = POINT_HELP)]
    pub point: String,
    /// What to restore [default: everything]
    #[arg(value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Restore below this directory instead of where it was
    #[arg(long, value_name = "DIR")]
    pub to: Option<PathBuf>,
    /// Place what is in the one PATH directly in DIR, without its own path
    #[arg(long, requires = "to")]
    pub strip: bool,
    /// Of a virtual machine only its image, without newer files over it
    #[arg(long)]
    pub image_only: bool,
    /// What may happen to that which is there [default: new with --to, overwrite without]
    #[arg(long, value_enum)]
    pub mode: Option<Mode>,
    /// Who owns what is restored [default: name for root, leave for others]
    #[arg(long, value_enum)]
    pub owners: Option<Owners>,
    /// Do not take an undo point first
    #[arg(long)]
    pub no_undo: bool,
    /// Show what would change; change nothing
    #[arg(long, short = 'n')]
    pub dry_run: bool,
    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
    #[command(flatten)]
    pub inside: Within,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay undo                    take back the last restore
  mainstay undo --dry-run
  mainstay undo                    again: take back the undo")]
pub(crate) struct Undo {
    /// The undo point [default: the newest of this machine]
    pub point: Option<String>,
    /// Show what would change; change nothing
    #[arg(long, short = 'n')]
    pub dry_run: bool,
    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Ls {
    #[arg(help = POINT_HELP)]
    pub point: String,
    /// A directory or file [default: the top]
    pub path: Option<PathBuf>,
    /// Also what is below
    #[arg(long, short = 'R')]
    pub recursive: bool,
    /// Of a virtual machine only its image, without newer files over it
    #[arg(long)]
    pub image_only: bool,
    #[command(flatten)]
    pub inside: Within,
}

#[derive(Args, Debug)]
pub(crate) struct Cat {
    #[arg(help = POINT_HELP)]
    pub point: String,
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Of a virtual machine only its image, without newer files over it
    #[arg(long)]
    pub image_only: bool,
    #[command(flatten)]
    pub inside: Within,
}

#[derive(Args, Debug)]
#[command(
    allow_missing_positional = true,
    after_help = "Examples:
  mainstay mount /mnt/backup                       everything: WORKLOAD/TIME/..., WORKLOAD/latest
  mainstay mount documents@latest /mnt/backup      one point
  mainstay mount web@latest /mnt/web               a machine: its files, its volumes, its disks as image files

Read-only. Only you can look into it, and into everything; with --everybody others too, as owners and modes allow.
One point is held meanwhile, so that it does not expire; of everything, each file can be read until its bytes are freed.
What is damaged gives an input/output error where it is, and a line here."
)]
pub(crate) struct Mount {
    #[arg(help = POINT_HELP)]
    pub point: Option<String>,
    /// An empty directory
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
    /// Let other users of this machine look into it
    #[arg(long)]
    pub everybody: bool,
    /// Of a virtual machine only its image, without newer files over it
    #[arg(long)]
    pub image_only: bool,
    #[command(flatten)]
    pub inside: Within,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay verify                          structure: everything a point needs is there
  mainstay verify --read-data              and every stored byte is as it was written
  mainstay verify documents --read-data    for one point")]
pub(crate) struct Verify {
    /// Only these points [default: all]
    #[arg(value_name = "POINT")]
    pub points: Vec<String>,
    /// Read, open and compare every byte
    #[arg(long)]
    pub read_data: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay expire --keep-daily 7 --keep-weekly 5 --keep-monthly 12 --dry-run
  mainstay expire --keep-within 30d --workload documents --yes
  mainstay expire 3fa9c1                   one point, by its id

A point is kept if any rule keeps it. Points under hold, the newest and the newest verified point of each
workload are always kept. Bytes are freed by `mainstay gc`.")]
pub(crate) struct Expire {
    /// Expire exactly these points, whatever the rules say
    #[arg(value_name = "POINT", conflicts_with_all = ["keep", "workload"])]
    pub points: Vec<String>,
    #[command(flatten)]
    pub keep: Keep,
    /// Only points of this workload
    #[arg(long, short)]
    pub workload: Option<String>,
    /// Show what would expire and why the rest is kept; change nothing
    #[arg(long, short = 'n')]
    pub dry_run: bool,
    /// Do not ask
    #[arg(long, short)]
    pub yes: bool,
}

#[derive(Args, Debug)]
#[group(id = "keep", multiple = true)]
pub(crate) struct Keep {
    /// Keep the newest N points
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_last: u32,
    /// Keep the newest point of each of the newest N hours that have one
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_hourly: u32,
    /// … of each of the newest N days
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_daily: u32,
    /// … of each of the newest N weeks, which begin on Monday
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_weekly: u32,
    /// … of each of the newest N months
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_monthly: u32,
    /// … of each of the newest N years
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub keep_yearly: u32,
    /// Keep all that is younger than this, such as 36h or 30d, counted back from the newest point
    #[arg(long, value_name = "TIME")]
    pub keep_within: Option<String>,
    /// Keep any moment of this long recoverable, of what has a journal, as databases do: the log, and the point before it
    #[arg(long, value_name = "TIME")]
    pub keep_interval: Option<String>,
    /// Keep undo points this long
    #[arg(long, value_name = "TIME", default_value = "7d")]
    pub keep_undo: String,
}

#[derive(Args, Debug)]
pub(crate) struct Gc {
    /// Say what could be freed; change nothing
    #[arg(long, short = 'n')]
    pub dry_run: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay status
  mainstay status --max-age 26h || notify      exit status 21 when a workload is overdue")]
pub(crate) struct Status {
    /// Only these workloads
    #[arg(value_name = "WORKLOAD")]
    pub workloads: Vec<String>,
    /// A workload whose last point is older is overdue, such as 26h or 2d
    #[arg(long, value_name = "TIME")]
    pub max_age: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Key {
    /// List what opens the repository
    List,
    /// Let one more passphrase or key file open the repository
    Add {
        /// Make a key in this new private file instead of asking for a passphrase
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// What people call it
        #[arg(long)]
        label: Option<String>,
        /// Say what would be done; change nothing
        #[arg(long, short = 'n')]
        dry_run: bool,
    },
    /// Stop a passphrase or key file from opening the repository
    Remove {
        /// The start of its id
        id: String,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        /// Say what would be done; change nothing
        #[arg(long, short = 'n')]
        dry_run: bool,
    },
    /// Print the recovery kit: whoever has it can read everything
    Kit {
        /// Write it to this new file instead of stdout; pages of a shared kit get their numbers before the last dot
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        /// Make so many pages for different people instead of one kit
        #[arg(long, value_name = "COUNT", requires = "needed")]
        pages: Option<u8>,
        /// So many pages together open the repository, and fewer tell nothing
        #[arg(long, value_name = "COUNT", requires = "pages")]
        needed: Option<u8>,
        /// Say what would be done; change nothing
        #[arg(long, short = 'n')]
        dry_run: bool,
    },
    /// Check that a key file, recovery kit or passphrase opens the repository
    Test,
    /// Manage clients that can write but not read
    #[command(subcommand)]
    Writer(Writer),
}

#[derive(Debug, Subcommand)]
pub(crate) enum Writer {
    /// Make a credential that can back up but not read; use it with --key-file
    Add {
        name: String,
        /// The new private file for the credential
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Say what would be done; change nothing
        #[arg(long, short = 'n')]
        dry_run: bool,
    },
    /// Refuse whatever this writer writes from now on
    Revoke {
        /// Its name or the start of its id
        writer: String,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        /// Say what would be done; change nothing
        #[arg(long, short = 'n')]
        dry_run: bool,
    },
    /// List the writers
    List,
}
