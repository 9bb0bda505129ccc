//! The verbs for virtual machines.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::POINT_HELP;

const HOST_HELP: &str = "A host of machines (can be repeated): a libvirt URI such as qemu:///system, \
                         qmp:MONITOR-SOCKET[,agent=SOCKET][,name=NAME] for one plain QEMU, \
                         or dir:DIRECTORY for image files of machines that are shut down";

#[derive(Debug, Subcommand)]
pub(crate) enum Vm {
    /// List machines, and what nobody protects
    List(VmList),
    /// Take recovery points of machines, running or shut down
    Backup(VmBackup),
    /// Write the disks of a machine to image files or a bare disk
    Restore(VmRestore),
    /// Stand by a backup and thaw its guest if it dies (started by `vm backup` itself)
    #[command(hide = true)]
    Guard,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay vm list --host qemu:///system
  mainstay vm list --host dir:/var/lib/libvirt/images --json")]
pub(crate) struct VmList {
    #[arg(long, value_name = "HOST", required = true, help = HOST_HELP)]
    pub host: Vec<String>,
}

/// How consistent a machine is captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Level {
    /// As after a power cut; the guest notices nothing
    Crash,
    /// The guest's file systems are frozen for a moment
    FileSystem,
    /// Its agent's freeze hooks bring applications to rest too
    Application,
    /// Only if it is shut down
    Offline,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay vm backup --host qemu:///system web db
  mainstay vm backup --host qemu:///system --all --tag nightly
  mainstay vm backup --host qmp:/run/web.qmp,agent=/run/web.agent,name=web web
  mainstay vm backup --host dir:/srv/images --all

A running machine is held still for a fraction of a second at most; what it overwrites during the backup is kept
aside in the scratch directory. Only what changed since the last point is read, where the host can tell; where it
cannot, everything is read and only what is new is stored. Machines that are shut down are read as they are.
The files inside come back with `mainstay ls`, `cat` and `restore WORKLOAD@latest /etc --to DIR`.")]
pub(crate) struct VmBackup {
    /// Machines, by name or id
    #[arg(value_name = "MACHINE", required_unless_present = "all")]
    pub machines: Vec<String>,
    /// Every machine of the hosts
    #[arg(long, conflicts_with = "machines")]
    pub all: bool,
    #[arg(long, value_name = "HOST", required = true, help = HOST_HELP)]
    pub host: Vec<String>,
    /// The consistency to try for; the point says what was reached
    #[arg(long, value_enum, default_value = "file-system")]
    pub consistency: Level,
    /// Make no point of a machine that does not reach it
    #[arg(long)]
    pub require: bool,
    /// Read everything, as if there were no earlier point
    #[arg(long)]
    pub full: bool,
    /// Only this disk of the machine, such as vda (can be repeated)
    #[arg(long, value_name = "DISK")]
    pub disk: Vec<String>,
    /// Do not store what no file uses, or swapped memory: it comes back as zeros
    #[arg(long, value_enum, value_delimiter = ',', value_name = "WHAT")]
    pub leave: Vec<Left>,
    /// Where content is kept that guests overwrite during the run [default: the system's temporary directory]
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// The longest a guest may be held still
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub freeze_limit: String,
    /// Have the guest say first which blocks it no longer uses
    #[arg(long)]
    pub trim: bool,
    /// Of so many stretches that are called unchanged compare one all the same; 0: none
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub reread: u32,
    /// Read a disk whole after so many increments; 0: never
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub scan_every: u32,
    /// The workload's name [default: the machine's]
    #[arg(long, value_name = "WORKLOAD", conflicts_with = "all")]
    pub name: Option<String>,
    /// Mark the points (can be repeated)
    #[arg(long, value_name = "TAG")]
    pub tag: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Left {
    /// Space that no file uses, as far as the file systems tell
    Free,
    /// Swap space; with it goes the memory of a machine that sleeps on disk
    Swap,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay vm restore web@latest --to /var/lib/libvirt/images/web
  mainstay vm restore web@latest --disk vda=/dev/sdb       a bare disk, of the same size or another
  mainstay vm restore web@latest --to /mnt/x --dry-run

Single files come back with `mainstay restore web@latest /etc/nginx --to DIR`.")]
pub(crate) struct VmRestore {
    #[arg(help = POINT_HELP)]
    pub point: String,
    /// Make image files and the machine's description in this directory
    #[arg(long, value_name = "DIR", required_unless_present = "disk")]
    pub to: Option<PathBuf>,
    /// Write this disk over that device (can be repeated)
    #[arg(long, value_name = "DISK=DEVICE", conflicts_with = "to")]
    pub disk: Vec<String>,
    /// Say what would be written; change nothing
    #[arg(long, short = 'n')]
    pub dry_run: bool,
    /// Do not ask before a device is written over
    #[arg(long, short)]
    pub yes: bool,
}
