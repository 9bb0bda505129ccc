//! The verbs for virtual machines.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use mainstay_engine::vm::ImageFormat;

use super::{Compression, Inside, POINT_HELP};

const HOST_HELP: &str = "A host of machines (can be repeated): a libvirt URI such as qemu:///system, \
                         qmp:MONITOR-SOCKET[,agent=SOCKET][,name=NAME] for one plain QEMU \
                         (NAME counts more than the one QEMU was started with), \
                         qmp:tcp://HOST:PORT[,agent=tcp://HOST:PORT],tls=DIR,host-scratch=DIR for one on another \
                         machine, spoken to by the certificates in DIR; the same tls and host-scratch behind the URI of \
                         a libvirt on another machine, \
                         dir:DIRECTORY for image files of machines that are shut down, \
                         or stage:DIRECTORY for copies made by `mainstay vm receive`";

#[derive(Debug, Subcommand)]
pub(crate) enum Vm {
    /// List machines, and what nobody protects or uses
    List(VmList),
    /// Decide that a machine, or something else that the list finds, is to be left as it is
    Ignore(VmIgnore),
    /// Take recovery points of machines, running or shut down
    Backup(VmBackup),
    /// Have another host copy a machine here, to be backed up later
    Receive(VmReceive),
    /// Put a machine back: in place, as a new machine, as image files, over bare disks
    Restore(VmRestore),
    /// Bring machines back by a plan: in order, in other shapes, on another host
    Recover(VmRecover),
    /// Run a machine straight from its point, and bring it home while it runs
    Run(VmRun),
    /// Start a machine from its point, apart from everything, and record that it came up
    Prove(VmProve),
    /// Stand by a backup and thaw its guest if it dies (started by `vm backup` itself)
    #[command(hide = true)]
    Guard,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay vm list --host qemu:///system
  mainstay vm list --host qemu:///system --image-dir /var/lib/libvirt/images
  mainstay vm list --host qemu:///system --max-age 26h --check || notify

Machines without a point, or only with too old ones; images that no machine uses, and chains of images that are broken;
snapshots and bitmaps that are of no use any more; machines with one identity or one image; points of machines that
are on none of these hosts: each is protected, ignored by somebody's decision (mainstay vm ignore), or undecided. Nothing is ever
deleted.")]
pub(crate) struct VmList {
    #[arg(long, value_name = "HOST", required = true, help = HOST_HELP)]
    pub host: Vec<String>,
    /// Look here too, and in the directories in it, for images that no machine uses (can be repeated)
    #[arg(long, value_name = "DIR")]
    pub image_dir: Vec<PathBuf>,
    /// A machine whose last point is older is overdue, such as 26h or 8d
    #[arg(long, value_name = "TIME")]
    pub max_age: Option<String>,
    /// A snapshot, or an image that no machine uses, counts once it is so old
    #[arg(long, value_name = "TIME", default_value = "14d")]
    pub stale_after: String,
    /// End with status 21 when anything is undecided
    #[arg(long)]
    pub check: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay vm ignore scratch --host qemu:///system --why 'made anew every night'
  mainstay vm ignore 'test-*' --why 'nobody needs them' --until 2027-06-30
  mainstay vm ignore /var/lib/libvirt/images/golden.qcow2 --why 'template'
  mainstay vm ignore scratch --host qemu:///system --again         count it again

The decision is kept in the repository, for everybody who uses it, under the name of who made it.")]
pub(crate) struct VmIgnore {
    /// A machine, image (its path), snapshot or workload as `vm list` shows it, or a pattern with * and ?
    #[arg(value_name = "NAME")]
    pub name: String,
    /// Only a machine of this host, or what is on it
    #[arg(long, value_name = "HOST")]
    pub host: Option<String>,
    /// The reason; shown wherever it counts
    #[arg(long, value_name = "TEXT", required_unless_present = "again")]
    pub why: Option<String>,
    /// When the decision runs out [default: when it is taken back]
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// Who decides [default: the user who runs this]
    #[arg(long, value_name = "WHO")]
    pub by: Option<String>,
    /// Take the decision back
    #[arg(long, conflicts_with_all = ["why", "until", "by"])]
    pub again: bool,
    /// Say what would be decided; change nothing
    #[arg(long, short = 'n')]
    pub dry_run: bool,
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

/// How a machine that runs is captured.
#[derive(Args, Debug)]
pub(crate) struct Capture {
    /// The consistency to try for; what was reached is recorded
    #[arg(long, value_enum, default_value = "file-system")]
    pub consistency: Level,
    /// Where content is kept that guests of this computer overwrite during the run, and the plan of how to clear up after
    /// a crash [default: the system's temporary directory]
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// The longest a guest may be held still
    #[arg(long, value_name = "TIME", default_value = "10s")]
    pub freeze_limit: String,
    /// Have the guest say first which blocks it no longer uses
    #[arg(long)]
    pub trim: bool,
    /// Read a disk whole after so many increments; 0: never
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub scan_every: u32,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay vm backup --host qemu:///system web db
  mainstay vm backup --host qemu:///system --all --tag nightly --prove=10%
  mainstay vm backup --host qmp:/run/web.qmp,agent=/run/web.agent,name=web web
  mainstay vm backup --host dir:/srv/images --all
  mainstay vm backup --host qmp:tcp://10.0.0.5:4444,tls=/etc/mainstay/pki,host-scratch=/var/lib/backup,name=web web
  mainstay vm backup --host qemu+tls://hv1/system,tls=/etc/mainstay/pki,host-scratch=/var/lib/backup --all

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
    /// How hard what is new is compressed; auto: fast, since it is mostly the host of the machines that does it
    #[arg(long, value_enum, default_value_t, value_name = "HOW")]
    pub compression: Compression,
    /// Of so many stretches that are called unchanged compare one all the same; 0: none
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub reread: u32,
    #[command(flatten)]
    pub how: Capture,
    /// Afterwards start the new points one by one, as `vm prove` does; with SHARE, such as 10%, only so many of them,
    /// those first whose machines were proven longest ago
    #[arg(
        long,
        value_name = "SHARE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "100%",
        value_parser = share
    )]
    pub prove: Option<u8>,
    /// With --prove: how long to wait for the agent of each
    #[arg(long, value_name = "TIME", default_value = "10m", requires = "prove")]
    pub prove_wait: String,
    /// The workload's name [default: the machine's]
    #[arg(long, value_name = "WORKLOAD", conflicts_with = "all")]
    pub name: Option<String>,
    /// Mark the points (can be repeated)
    #[arg(long, value_name = "TAG")]
    pub tag: Vec<String>,
    #[command(flatten)]
    pub inside: Inside,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:
  mainstay vm receive web --stage /srv/copies --listen 10.0.0.9:10810 --host \\
    qmp:tcp://10.0.0.5:4444,tls=/etc/mainstay/pki,host-scratch=/var/lib/backup,name=web
  mainstay vm backup --host stage:/srv/copies --all

The first time the host copies everything, afterwards what changed. It is let go as soon as the copy is complete. A copy
that was interrupted is never backed up; the next run completes it.")]
pub(crate) struct VmReceive {
    /// The machine, by name or id
    #[arg(value_name = "MACHINE")]
    pub machine: String,
    /// The plain QEMU on another host, as for `mainstay vm backup`
    #[arg(long, value_name = "HOST")]
    pub host: String,
    /// Where the copies are kept; each machine has a directory in it
    #[arg(long, value_name = "DIR")]
    pub stage: PathBuf,
    /// Where the host finds this machine
    #[arg(long, value_name = "HOST:PORT")]
    pub listen: String,
    #[command(flatten)]
    pub how: Capture,
}

/// A share in percent.
fn share(text: &str) -> Result<u8, String> {
    let percent = text.strip_suffix('%').and_then(|number| number.parse().ok());
    percent.filter(|percent| (1..=100).contains(percent)).ok_or_else(|| "write it from 1% to 100%".to_owned())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Left {
    /// Space that no file uses, as far as the file systems tell
    Free,
    /// Swap space; with it goes the memory of a machine that sleeps on disk
    Swap,
}

/// How image files keep a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Byte for byte, with holes
    Raw,
    /// QEMU's own, which can keep bitmaps and snapshots
    Qcow2,
}

impl From<Format> for ImageFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
        }
    }
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay vm restore web@latest --in-place --host qemu:///system --stop --start
  mainstay vm restore web@latest --as web2 --host qemu:///system --to /var/lib/libvirt/images/web2 --start
  mainstay vm restore web@latest --as web --host dir:/srv/machines --to /srv/machines/web      for plain QEMU
  mainstay vm restore web@latest --to /srv/look --format qcow2   only image files and the machine's description
  mainstay vm restore web@latest --disk vda=/dev/sdb             a bare disk, of the same size or another
  mainstay vm restore web@latest --to /mnt/x --dry-run

Files of the machine that were backed up after its image are put on the disks (see mainstay backup --machine).
In place, only blocks that differ are written, and a point tagged `undo` is taken first: restoring that point in place
takes it back. `latest` never means such a point. A restore that was interrupted is finished by the same command; until
then the disks cannot boot and are not backed up. Many machines at once: `mainstay vm recover`. Single files come back with
`mainstay restore web@latest /etc/nginx --to DIR`.")]
pub(crate) struct VmRestore {
    #[arg(help = POINT_HELP)]
    pub point: String,
    /// Write over the machine's present disks; it must be shut down
    #[arg(long, requires = "host", conflicts_with_all = ["to", "disk"])]
    pub in_place: bool,
    /// Shut the machine down first
    #[arg(long, requires = "in_place")]
    pub stop: bool,
    /// Define it as a new machine of this name, with a new identity
    #[arg(long = "as", value_name = "NAME", requires_all = ["to", "host"], conflicts_with = "in_place")]
    pub new_name: Option<String>,
    /// With its own UUID and MAC addresses, because the first one is gone
    #[arg(long, requires = "new_name")]
    pub same_identity: bool,
    /// Start it when it is there
    #[arg(long, requires = "host")]
    pub start: bool,
    /// Where on this computer the machine is, or is to be: a libvirt URI such as qemu:///system, or dir:DIRECTORY for
    /// plain QEMU
    #[arg(long, value_name = "HOST")]
    pub host: Option<String>,
    /// Make image files in this directory (and the machine's description, without --as)
    #[arg(long, value_name = "DIR", required_unless_present_any = ["disk", "in_place"])]
    pub to: Option<PathBuf>,
    /// What the image files are
    #[arg(long, value_enum, default_value = "raw", requires = "to")]
    pub format: Format,
    /// Write this disk over that device (can be repeated)
    #[arg(long, value_name = "DISK=DEVICE", conflicts_with = "to")]
    pub disk: Vec<String>,
    /// Only the image, without putting newer files of the machine on the disks (which takes root)
    #[arg(long)]
    pub image_only: bool,
    #[command(flatten)]
    pub inside: Inside,
    /// Say what would be written; change nothing
    #[arg(long, short = 'n')]
    pub dry_run: bool,
    /// Do not ask before disks are written over
    #[arg(long, short)]
    pub yes: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay vm recover --example > plan.toml       a plan for the machines of the repository, with comments
  mainstay vm recover plan.toml --dry-run         sizes, order, and about how long it takes
  mainstay vm recover plan.toml                   does it
  mainstay vm recover plan.toml --only db,web

What fails stops the machines that come after it, and no others. The same command again goes on: machines that are there
are left as they are. The plan is explained in docs/guides/recovery-plans.md.")]
pub(crate) struct VmRecover {
    /// The plan, a TOML file
    #[arg(required_unless_present = "example")]
    pub plan: Option<PathBuf>,
    /// Only these machines of the plan
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Show the plan with sizes and times; change nothing
    #[arg(long, short = 'n')]
    pub dry_run: bool,
    /// Print a plan for the machines of the repository, to be edited
    #[arg(long, conflicts_with_all = ["plan", "only", "dry_run"])]
    pub example: bool,
    #[command(flatten)]
    pub inside: Inside,
}

/// What runs the guest's code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Accel {
    /// The processor's own virtualisation if it works, which is tried
    #[default]
    Auto,
    Kvm,
    /// Software
    Tcg,
}

#[derive(Args, Debug, Default)]
pub(crate) struct Shape {
    /// Memory in MiB [default: the machine's own]
    #[arg(long, value_name = "MIB")]
    pub memory: Option<u64>,
    /// Virtual processors [default: the machine's own]
    #[arg(long, value_name = "N")]
    pub cpus: Option<u32>,
    /// What the disks are plugged into: virtio, scsi, sata, nvme [default: the machine's own]
    #[arg(long, value_name = "BUS")]
    pub bus: Option<String>,
    #[arg(long, value_enum, default_value = "auto")]
    pub accel: Accel,
    /// An option for QEMU, as it is (can be repeated)
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    pub qemu: Vec<String>,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay vm run web@latest --dir /srv/web              runs until it is shut down
  mainstay vm run web@latest --dir /srv/web --home       and copy it home while it runs
  mainstay vm run web@latest --dir /srv/web --memory 4096 --cpus 2 --network

Its disks are read from the repository as it needs them; what it writes goes into DIR/DISK.qcow2. Ctrl-C presses its
power button and waits for it to shut down; a second one switches it off. Should Mainstay die, the machine stays and
waits for what it has not read yet: the same command in the same directory goes on with it, and with what an earlier
run wrote there. After --home those files are the whole disks and need nothing else, neither Mainstay nor repository.")]
pub(crate) struct VmRun {
    #[arg(help = POINT_HELP)]
    pub point: String,
    /// For what the machine writes, its console and its sockets
    #[arg(long, value_name = "DIR")]
    pub dir: PathBuf,
    #[command(flatten)]
    pub shape: Shape,
    /// Give it a network that leads out through this machine
    #[arg(long)]
    pub network: bool,
    /// Copy everything home while it runs
    #[arg(long)]
    pub home: bool,
    /// End when everything is home, and leave the machine running
    #[arg(long, requires = "home")]
    pub leave: bool,
    /// How long to wait for the guest's agent
    #[arg(long, value_name = "TIME", default_value = "10m")]
    pub wait: String,
}

#[derive(Args, Debug)]
#[command(after_help = "Examples:
  mainstay vm prove web@latest
  mainstay vm prove web@latest --check 'systemctl is-active nginx' --screenshot web.png

The machine has no network, and nothing of the run is kept but the order in which it reads, so that `vm run` can read
ahead. When it fails, its console and its screen are kept, and the exit status is 1. `mainstay status` shows when a
workload was last proven.")]
pub(crate) struct VmProve {
    #[arg(help = POINT_HELP)]
    pub point: String,
    #[command(flatten)]
    pub shape: Shape,
    /// A line for the guest's shell that must end with status 0 (can be repeated)
    #[arg(long, value_name = "LINE")]
    pub check: Vec<String>,
    /// Keep what the screen shows in this new PNG file
    #[arg(long, value_name = "FILE")]
    pub screenshot: Option<PathBuf>,
    /// How long to wait for the guest's agent, and for each check
    #[arg(long, value_name = "TIME", default_value = "10m")]
    pub wait: String,
}
