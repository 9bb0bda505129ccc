//! Machines that libvirt manages, by the program `virsh`. QEMU's monitor belongs to libvirt here and is not spoken to.
//!
//! A machine that runs is captured by libvirt's own backup job and checkpoints ([`snapshot`]); one that is shut down is
//! read in place, since libvirt refuses both for it ([`super::offline`]).

mod snapshot;
mod virsh;

use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Clock, Code, Consistency, Error, Result};
use serde_json::{Value, json};

use super::channel::part;
use super::domain_xml::{made_here, mark_as_made, parse, parse_live, write};
use super::guard::GuardProgram;
use super::hypervisor::{
    BitmapSeen, Caps, DiskPlace, DiskSummary, Hypervisor, MachineId, MachineSnapshot, MachineState,
    MachineSummary, SnapshotRequest, SnapshotSeen, Swept,
};
use super::machine::{Machine, RawKind};
use super::offline::{self, Offline};
use super::qemu::{Link, PREFIX, kvm_works};
use super::run_dir::{self, tag};
use super::watch::RESERVE;
use virsh::{ANSWER, Virsh};

pub(super) use snapshot::Remains;

/// The name of this driver in marks.
pub(super) const DRIVER: &str = "libvirt";

/// One libvirt.
pub struct LibvirtHost {
    virsh: Virsh,
    /// On fast local storage, where the emulator's user may go: what guests overwrite during a run is kept here.
    scratch: PathBuf,
    /// What must stay free there, in bytes.
    reserve: u64,
    /// To the disks of its machines, if it is on another computer.
    link: Option<Link>,
    guard: Option<GuardProgram>,
    clock: Arc<dyn Clock>,
}

impl LibvirtHost {
    /// `uri` is libvirt's: `qemu:///system`.
    pub fn new(uri: impl Into<String>, scratch: PathBuf, clock: Arc<dyn Clock>) -> Self {
        let virsh = Virsh { uri: uri.into() };
        Self { virsh, scratch, reserve: RESERVE, link: None, guard: None, clock }
    }

    /// It is on another computer, and its machines offer their disks over the network. What is in `scratch` here then is
    /// the plan of how to clear up.
    #[must_use]
    pub fn far(mut self, link: Link) -> Self {
        self.link = Some(link);
        self
    }

    /// Has runs watched over by a process of its own.
    #[must_use]
    pub fn guarded_by(mut self, guard: GuardProgram) -> Self {
        self.guard = Some(guard);
        self
    }

    /// A run is given up before less than so many bytes are free for scratch files.
    #[must_use]
    pub fn scratch_reserve(mut self, bytes: u64) -> Self {
        self.reserve = bytes;
        self
    }

    /// Tries KVM out, in a directory that nobody else gets at.
    fn kvm_works(&self) -> Result<bool> {
        let directory = self.scratch.join(format!("mainstay-probe-{:016x}", tag()));
        let made = std::fs::DirBuilder::new().mode(0o700).create(&directory);
        made.map_err(|error| Error::io(format!("cannot make {}", directory.display()), error))?;
        let works = kvm_works(&directory);
        let _left = std::fs::remove_dir_all(&directory);
        Ok(works)
    }

    /// Whether the paths of its machines name files of this computer.
    fn is_here(&self) -> bool {
        self.link.is_none() && self.virsh.is_here()
    }

    fn summary(&self, uuid: &str) -> Result<MachineSummary> {
        let ([state, xml, info, snapshots, checkpoints], outcome) = self.virsh.ask([
            format!("domstate {uuid}"),
            format!("dumpxml {uuid}"),
            format!("dominfo {uuid}"),
            format!("snapshot-list {uuid} --name"),
            format!("checkpoint-list {uuid} --name"),
        ])?;
        if xml.is_empty() {
            return Err(virsh::refused("dumpxml", &outcome));
        }
        let (machine, live) = (parse(&xml)?, parse_live(&xml)?);
        let (snapshots, checkpoints) = (names(&snapshots), names(&checkpoints));
        let bitmaps = || checkpoints.iter().map(|name| checkpoint(name)).collect();
        let disks = machine.disks.iter().filter(|disk| !disk.read_only).map(|disk| DiskSummary {
            name: disk.name.clone(),
            path: disk.source.clone().into(),
            format: disk.format.clone(),
            size: None,
            backing: live.backing_of(&disk.name),
            bitmaps: if disk.format == "qcow2" { bitmaps() } else { Vec::new() },
        });
        let snapshots = snapshots.iter().map(|name| self.seen(uuid, name, false));
        let checkpoints = checkpoints.iter().map(|name| self.seen(uuid, name, true));
        Ok(MachineSummary {
            id: MachineId(uuid.to_owned()),
            name: machine.name.clone(),
            state: state_of(&state, &info),
            disks: disks.collect(),
            snapshots: snapshots.chain(checkpoints).collect(),
        })
    }

    fn seen(&self, uuid: &str, name: &str, checkpoint: bool) -> SnapshotSeen {
        let command = if checkpoint { "checkpoint-dumpxml" } else { "snapshot-dumpxml" };
        let text = self.virsh.run(&[command, uuid, name]).unwrap_or_default();
        let taken = text.split_once("<creationTime>").and_then(|(_, rest)| rest.split('<').next());
        SnapshotSeen { name: name.to_owned(), taken: taken.and_then(|time| time.parse().ok()), checkpoint }
    }

    /// The UUID of a machine that is named by its UUID or its name.
    fn find(&self, machine: &MachineId) -> Result<String> {
        if is_uuid(&machine.0) {
            return Ok(machine.0.clone());
        }
        let info = self.virsh.run(&["dominfo", "--", &machine.0])?;
        let uuid = info.lines().find_map(|line| line.strip_prefix("UUID:"));
        let uuid = uuid.ok_or_else(|| Error::new(Code::Unsupported, "libvirt's machines have no UUID"))?;
        Ok(uuid.trim().to_owned())
    }

    fn look(&self, machine: &MachineId) -> Result<Look> {
        let uuid = self.find(machine)?;
        let (answers, outcome) = self.virsh.ask([
            format!("dumpxml {uuid} --inactive --security-info"),
            format!("dumpxml {uuid}"),
            format!("domblkinfo {uuid} --all"),
            format!("domstate {uuid}"),
            format!("dominfo {uuid}"),
            format!("backup-dumpxml {uuid}"),
            format!("checkpoint-list {uuid} --name"),
        ])?;
        let [defined, now, sizes, word, info, job, checkpoints] = answers;
        if now.is_empty() {
            return Err(virsh::refused("dumpxml", &outcome));
        }
        // A transient machine has no other document; whoever only reads gets no secrets.
        let mut machine = parse(if defined.is_empty() { &now } else { &defined })?;
        if self.is_here() {
            machine.read_nvram();
        }
        for disk in &mut machine.disks {
            disk.size = self.size(&uuid, &disk.name, &sizes);
        }
        let (state, checkpoints) = (state_of(&word, &info), names(&checkpoints));
        Ok(Look { uuid, machine, now, state, has_job: !job.is_empty(), checkpoints })
    }

    /// The size of a disk by a list of all, which libvirt does not give when it cannot tell one of them.
    fn size(&self, uuid: &str, disk: &str, all: &str) -> Option<u64> {
        let mut rows = all.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        if let Some(row) = rows.find(|row| row.first() == Some(&disk)) {
            return row.get(1)?.parse().ok();
        }
        let info = self.virsh.run(&["domblkinfo", uuid, disk]).unwrap_or_default();
        info.lines().find_map(|line| line.strip_prefix("Capacity:"))?.trim().parse().ok()
    }
}

/// What libvirt says of a machine.
struct Look {
    uuid: String,
    machine: Machine,
    /// The document of the machine as it runs.
    now: String,
    state: MachineState,
    /// A backup job runs.
    has_job: bool,
    checkpoints: Vec<String>,
}

impl Hypervisor for LibvirtHost {
    fn name(&self) -> String {
        format!("libvirt {}", self.virsh.uri)
    }

    fn caps(&self) -> Caps {
        // Images are opened and written by their paths here, which name other files elsewhere.
        let here = self.is_here();
        Caps { incremental: true, freeze: true, offline: here, define: here }
    }

    fn list(&self) -> Result<Vec<MachineSummary>> {
        let all = self.virsh.run(&["list", "--all", "--uuid"])?;
        all.split_whitespace().map(|uuid| self.summary(uuid)).collect()
    }

    fn names(&self) -> Result<Vec<(MachineId, String)>> {
        let all = self.virsh.run(&["list", "--all", "--uuid", "--name"])?;
        let named = all.lines().filter_map(|line| line.trim().split_once(' '));
        Ok(named.map(|(uuid, name)| (MachineId(uuid.to_owned()), name.trim().to_owned())).collect())
    }

    fn config(&self, machine: &MachineId) -> Result<Machine> {
        self.look(machine).map(|look| look.machine)
    }

    fn snapshot(&self, machine: &MachineId, request: &SnapshotRequest) -> Result<Box<dyn MachineSnapshot>> {
        let swept = self.sweep()?;
        let look = self.look(machine)?;
        let machine = &look.machine;
        match look.state {
            MachineState::Running | MachineState::Paused => {
                let taken = snapshot::take(self, look, request)?;
                Ok(Box::new(taken.with_notes(swept.left)))
            }
            _ if !self.is_here() => {
                let what = format!("{} is off, and its images are on another computer", machine.name);
                Err(Error::new(Code::Unsupported, what)
                    .hint("back it up on the computer that has them, or start it"))
            }
            state => {
                let (scratch, mut notes) = (Some(self.scratch.as_path()), swept.left);
                let mut reached = Consistency::Offline;
                if state == MachineState::Saved {
                    reached = Consistency::Crash;
                    notes.push("its memory is saved, so that the guest did not shut down".into());
                }
                let offline = Offline { driver: DRIVER, machine: look.machine, scratch, reached, notes };
                offline::take(offline, request, self.clock.as_ref())
            }
        }
    }

    fn define(&self, machine: &Machine, disks: &[DiskPlace], start: bool) -> Result<MachineId> {
        let own = machine.raw.as_ref().is_some_and(|raw| raw.kind == RawKind::LibvirtXml);
        let text = mark_as_made(&write(machine, disks, own || self.kvm_works()?)?)?;
        let path = self.scratch.join(format!("mainstay-define-{:016x}.xml", tag()));
        let written = write_secretly(&path, &text);
        let defined = written.and_then(|()| self.virsh.run(&["define", "--", &path.to_string_lossy()]));
        let _left = std::fs::remove_file(&path);
        defined?;
        if start {
            self.start(&machine.id)?;
        }
        Ok(machine.id.clone())
    }

    fn start(&self, machine: &MachineId) -> Result<()> {
        self.virsh.run(&["start", "--", &machine.0]).map(drop)
    }

    fn stop(&self, machine: &MachineId) -> Result<()> {
        self.virsh.run(&["shutdown", "--", &machine.0]).map(drop)
    }

    fn destroy(&self, machine: &MachineId) -> Result<()> {
        let uuid = self.find(machine)?;
        if !made_here(&self.virsh.run(&["dumpxml", &uuid, "--inactive"])?) {
            let what = format!("the machine {} was not made by Mainstay", machine.0);
            return Err(Error::new(Code::Refused, what).hint("take it away with virsh if it is to go"));
        }
        let word = self.virsh.run(&["domstate", &uuid])?;
        if state_of(word.trim(), "") != MachineState::ShutOff {
            self.virsh.run(&["destroy", &uuid])?;
        }
        let with_nvram = ["undefine", &uuid, "--nvram", "--checkpoints-metadata", "--managed-save"];
        self.virsh.run(&with_nvram).map(drop)
    }

    fn ask_guest(
        &self,
        machine: &MachineId,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<Value> {
        let message = json!({ "execute": command, "arguments": arguments }).to_string();
        let seconds = limit.as_secs().max(1).to_string();
        let words = ["qemu-agent-command", "--domain", &machine.0, "--timeout", &seconds, "--cmd", &message];
        let text = self.virsh.run_within(limit + ANSWER, &words)?;
        let answer: Value = serde_json::from_str(&text)
            .map_err(|error| Error::new(Code::Io, "the guest agent speaks no JSON").because(error))?;
        Ok(part(answer, "return"))
    }

    fn sweep(&self) -> Result<Swept> {
        Ok(run_dir::sweep(&self.scratch))
    }
}

fn names(text: &str) -> Vec<String> {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

fn checkpoint(name: &str) -> BitmapSeen {
    BitmapSeen { name: name.to_owned(), ours: name.starts_with(PREFIX), recording: true, inconsistent: false }
}

/// Five groups of hexadecimal digits, as libvirt writes them.
fn is_uuid(text: &str) -> bool {
    let lengths = text.split('-').map(str::len);
    lengths.eq([8, 4, 4, 4, 12]) && text.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit())
}

/// `info` is what `dominfo` says.
fn state_of(word: &str, info: &str) -> MachineState {
    let saved = |line: &str| line.strip_prefix("Managed save:").is_some_and(|word| word.trim() == "yes");
    match word {
        "running" | "idle" | "no state" | "in shutdown" => MachineState::Running,
        "paused" | "pmsuspended" => MachineState::Paused,
        "shut off" if info.lines().any(saved) => MachineState::Saved,
        "shut off" => MachineState::ShutOff,
        "crashed" => MachineState::Crashed,
        _ => MachineState::Unknown,
    }
}

/// The document may hold passwords.
fn write_secretly(path: &std::path::Path, text: &str) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let fail = |error| Error::io(format!("cannot write {}", path.display()), error);
    let options = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    options.and_then(|mut file| file.write_all(text.as_bytes())).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::{MachineState, is_uuid, state_of};

    #[test]
    fn a_machine_whose_memory_is_saved_is_not_shut_off() {
        let info =
            |saved: &str| format!("Persistent:     yes\nManaged save:   {saved}\nSecurity model: none\n");
        assert_eq!(state_of("shut off", &info("yes")), MachineState::Saved);
        assert_eq!(state_of("shut off", &info("no")), MachineState::ShutOff);
        assert_eq!(state_of("running", &info("yes")), MachineState::Running);
    }

    #[test]
    fn only_a_uuid_is_taken_for_one() {
        assert!(is_uuid("5f0c2c7e-0000-4000-8000-000000000077"));
        for name in [
            "web",
            "",
            "5f0c2c7e-0000-4000-8000-00000000007",
            "5f0c2c7e-0000-4000-8000-0000000000; x",
            "----",
        ] {
            assert!(!is_uuid(name), "{name}");
        }
    }
}
