//! Machines that are started here: for instant recovery, and to prove that a point boots.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin};
use std::time::Duration;

use mainstay_core::{Code, Error, Progress, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::time::Timespec;
use serde_json::{Value, json};

use super::super::agent::Agent;
use super::super::channel::Limit;
use super::super::machine::{Firmware, Machine, MachineDisk};
use super::super::qmp::Qmp;
use super::place::Place;
use crate::armed::Armed;
use crate::process::Program;

const QEMU: &str = "qemu-system-x86_64";
/// A processor's own virtualisation runs the probe in milliseconds; where it is a sham, it does not end.
const PROBE: Duration = Duration::from_secs(5);
/// How often somebody looks whether something has happened.
const LOOK: Duration = Duration::from_millis(200);
/// For programs that only make files.
const TOOL: Duration = Duration::from_secs(60);
const MEMORY: u64 = 1 << 30;
/// A request waits so long for its server to come back, in seconds: longer than a person takes to start it again.
const RECONNECT: u64 = 24 * 3600;

/// How a machine is started.
#[derive(Clone, Debug)]
pub struct EmulatorPlan {
    /// For what the machine writes, its console and its sockets; made if it is not there. What an earlier run left there
    /// is gone on with.
    pub directory: PathBuf,
    /// Bytes; the machine's own when `None`.
    pub memory: Option<u64>,
    pub cpus: Option<u32>,
    /// Of all disks; the machine's own when `None`.
    pub bus: Option<String>,
    /// A network of its own behind the host's, instead of none.
    pub network: bool,
    pub accelerator: Accelerator,
    /// Options of QEMU that are added as they are.
    pub options: Vec<String>,
}

/// What runs the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor's own if it works, which is tried; otherwise software.
    Auto,
    Kvm,
    Tcg,
}

/// A machine that runs here. Dropped, it is switched off, unless somebody has [left](Emulator::leave) it to itself.
pub struct Emulator {
    pid: u32,
    process: OwnedFd,
    /// `None` for a machine that an earlier run started.
    child: Option<(Child, ChildStdin)>,
    place: Place,
    disks: Vec<String>,
    /// Nobody ends this process while the machine would be left without it. `None` for a machine that is left.
    armed: Option<Armed>,
}

impl Emulator {
    /// Starts the machine: what it reads comes from the NBD server at the socket `server`, which offers each disk under
    /// its name; what it writes goes into overlays in the place. Disks that are whole there need no server.
    ///
    /// Errors: [`Code::Unsupported`] without QEMU, or for firmware that is not here; QEMU's own words when it does not
    /// start.
    pub fn start(machine: &Machine, server: &Path, plan: &EmulatorPlan, place: Place) -> Result<Self> {
        for disk in &machine.disks {
            make_overlay(&plan.directory, server, disk)?;
        }
        let log = plan.directory.join("qemu.log");
        let output = File::create(&log)
            .map_err(|error| Error::io(format!("cannot write {}", log.display()), error))?;
        for socket in ["qmp", "agent"] {
            // Left behind by an earlier run that was killed.
            let _none = std::fs::remove_file(plan.directory.join(socket));
        }
        // The shell joins QEMU's complaints to its output and is then QEMU itself.
        let program = Program::new("sh", Duration::MAX).arguments(["-c", "exec \"$0\" \"$@\" 2>&1", QEMU]);
        let (child, input) = program.arguments(words(machine, server, plan)?).attend(Some(output.into()))?;
        let pid = child.id();
        let mut emulator = Self::of(machine, place, pid, Some((child, input)))?;
        emulator.wait_for_monitor()?;
        Ok(emulator)
    }

    /// Goes on with a machine that a run which died has left running in the place; otherwise gives the place back.
    ///
    /// Errors: [`Code::Conflict`] when it is another machine, or somebody else speaks to it.
    pub fn join(machine: &Machine, place: Place) -> Result<std::result::Result<Self, Place>> {
        let mut qmp = match Qmp::connect(&place.path().join("qmp").into()) {
            Ok(qmp) => qmp,
            Err(error) if error.code() == Code::NotFound => return Ok(Err(place)),
            Err(error) => return Err(error),
        };
        let name = qmp.run("query-name", json!({}))?;
        let peer = qmp.peer().filter(|_| name["name"] == name_of(machine));
        let peer = peer.ok_or_else(|| {
            let what = format!("another machine runs in {}", place.path().display());
            Error::new(Code::Conflict, what).hint("shut it down, or choose another directory")
        })?;
        let pid = u32::try_from(peer.pid.as_raw_nonzero().get()).unwrap_or(0);
        Self::of(machine, place, pid, None).map(Ok)
    }

    /// Ends what a run that died has left running in a place where nothing is to be kept. It is not asked: it may still
    /// wait for the server that died, and then it answers nobody.
    pub fn kill_left(place: &Place) {
        let Ok(socket) = UnixStream::connect(place.path().join("qmp")) else { return };
        let peer = rustix::net::sockopt::socket_peercred(&socket).ok();
        if let Some(process) = peer.and_then(|peer| pidfd_open(peer.pid, PidfdFlags::empty()).ok()) {
            let _gone = pidfd_send_signal(&process, Signal::KILL);
        }
    }

    fn of(machine: &Machine, place: Place, pid: u32, child: Option<(Child, ChildStdin)>) -> Result<Self> {
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or_else(|| Error::bug("a process has no number"))?;
        let process = pidfd_open(number, PidfdFlags::empty())
            .map_err(|errno| Error::io("cannot watch over QEMU", errno.into()))?;
        let disks = machine.disks.iter().map(|disk| disk.name.clone()).collect();
        let armed = Some(Armed::new(format!("the machine {} to be switched off", machine.name)));
        Ok(Self { pid, process, child, place, disks, armed })
    }

    fn wait_for_monitor(&mut self) -> Result<()> {
        for _ in 0..150 {
            if self.monitor().is_ok() {
                return Ok(());
            }
            if !self.is_running() {
                break;
            }
            std::thread::sleep(LOOK);
        }
        let said = std::fs::read_to_string(self.at("qemu.log")).unwrap_or_default();
        let last = said.lines().last().unwrap_or("it said nothing").escape_debug().to_string();
        let hint = "is QEMU installed? On Debian it is the package qemu-system-x86";
        Err(Error::new(Code::Io, format!("QEMU does not start: {last}")).hint(hint))
    }

    fn monitor(&self) -> Result<Qmp> {
        Qmp::connect(&self.at("qmp").into())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Where its overlays, its console and its sockets are.
    pub fn directory(&self) -> &Path {
        self.place.path()
    }

    /// Whether an earlier run started it.
    pub fn is_joined(&self) -> bool {
        self.child.is_none()
    }

    pub fn is_running(&self) -> bool {
        let mut fds = [PollFd::new(&self.process, PollFlags::IN)];
        // A process descriptor is readable once the process has ended.
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready == 0)
    }

    /// Waits until the guest's agent answers; whether it did.
    ///
    /// Errors: [`Code::Cancelled`]; [`Code::Io`] when the machine ends instead.
    pub fn wait_for_agent(&self, limit: Duration, progress: &dyn Progress) -> Result<bool> {
        let limit = Limit::new(limit)?;
        while !limit.is_up() {
            progress.check()?;
            if !self.is_running() {
                return Err(Error::new(Code::Io, "the machine ended before its agent answered")
                    .hint(format!("its console is in {}", self.at("console").display())));
            }
            // The connection is taken before the agent is there, and then nobody answers for some seconds.
            if Agent::connect(&self.at("agent").into()).is_ok() {
                return Ok(true);
            }
            std::thread::sleep(LOOK);
        }
        Ok(false)
    }

    /// Runs a command line in the guest's shell and returns its exit status.
    pub fn check(&self, line: &str, limit: Duration) -> Result<i64> {
        Agent::connect(&self.at("agent").into())?.shell(line, limit)
    }

    /// Writes what the machine's screen shows into a new PNG file.
    pub fn screenshot(&self, path: &Path) -> Result<()> {
        self.monitor()?
            .run("screendump", json!({ "filename": path.display().to_string(), "format": "png" }))
            .map(drop)
    }

    /// Copies what the disks still lack from the server, while the machine runs, and goes on with what an earlier run has
    /// begun of it. Afterwards the server can go.
    ///
    /// `moved` hears how many bytes of a disk are there, and of how many.
    pub fn stream_home(&self, progress: &dyn Progress, moved: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let mut qmp = self.monitor()?;
        for name in &self.disks {
            let (job, over, base) = (format!("mainstay-home-{name}"), over(name), base(name));
            let jobs: Vec<Value> = qmp.ask("query-jobs", json!({}))?;
            if !jobs.iter().any(|found| found["id"] == job.as_str()) {
                let nodes: Vec<Value> = qmp.ask("query-named-block-nodes", json!({ "flat": true }))?;
                if !nodes.iter().any(|node| node["node-name"] == base.as_str()) {
                    continue;
                }
                let stream = json!({ "job-id": job, "device": over, "auto-dismiss": false });
                qmp.run("block-stream", stream)?;
            }
            follow(&mut qmp, &job, progress, moved)
                .map_err(|error| error.during(format!("cannot copy the disk {name} home")))?;
            // What the image says of itself has to be on the disk before anybody may rely on it.
            let flush = json!({ "command-line": format!("qemu-io {over} flush") });
            qmp.run("human-monitor-command", flush)?;
            qmp.run("blockdev-del", json!({ "node-name": base }))?;
        }
        Ok(())
    }

    /// Presses the power button.
    pub fn power_button(&self) -> Result<()> {
        self.monitor()?.run("system_powerdown", json!({})).map(drop)
    }

    /// Lets the machine run on by itself. Another run in the same place can join it.
    pub fn leave(mut self) {
        self.armed = None;
    }

    /// In order if it can be, so that what was written is in the overlays.
    fn switch_off(&self) {
        let _killed_below = self.monitor().and_then(|mut qmp| qmp.run("quit", json!({})));
        for _ in 0..25 {
            if !self.is_running() {
                return;
            }
            std::thread::sleep(LOOK);
        }
        let _gone = pidfd_send_signal(&self.process, Signal::KILL);
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        if self.armed.is_none() {
            return;
        }
        if self.is_running() {
            self.switch_off();
        }
        if let Some((child, _)) = &mut self.child {
            let _reaped = child.wait();
        }
    }
}

/// Waits for the end of a job.
fn follow(qmp: &mut Qmp, job: &str, progress: &dyn Progress, moved: &mut dyn FnMut(u64, u64)) -> Result<()> {
    loop {
        progress.check()?;
        let jobs: Vec<Value> = qmp.ask("query-jobs", json!({}))?;
        let Some(found) = jobs.iter().find(|found| found["id"] == job) else { return Ok(()) };
        moved(number(&found["current-progress"]), number(&found["total-progress"]));
        if found["status"] == "concluded" {
            let failed = found["error"].as_str().map(|why| why.escape_debug().to_string());
            qmp.run("job-dismiss", json!({ "id": job }))?;
            return failed.map_or(Ok(()), |why| Err(Error::new(Code::Io, why)));
        }
        std::thread::sleep(LOOK);
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// The file that takes what the machine writes. One that is there goes on being used. Its header names the server, so
/// that nobody takes what is not in it for zeros.
fn make_overlay(directory: &Path, server: &Path, disk: &MachineDisk) -> Result<()> {
    let path = overlay(directory, &disk.name);
    if path.exists() {
        return Ok(());
    }
    let size = disk
        .size
        .ok_or_else(|| Error::integrity(format!("the size of the disk {} is not known", disk.name)))?;
    let backing = json!({ "driver": "nbd", "export": disk.name,
        "server": { "type": "unix", "path": server.display().to_string() } });
    let backing = format!("json:{backing}");
    // Under its own name it is there whole or not at all: one without its backing would be taken for a disk at home.
    let unfinished = path.with_extension("qcow2.new");
    let program =
        Program::new("qemu-img", TOOL).arguments(["create", "-q", "-u", "-f", "qcow2", "-F", "raw"]);
    program.argument("-b").argument(backing).argument(&unfinished).argument(size.to_string()).run_well()?;
    let settled = File::open(&unfinished).and_then(|file| file.sync_all());
    let settled = settled.and_then(|()| rustix::fs::rename(&unfinished, &path).map_err(Into::into));
    let settled = settled.and_then(|()| File::open(directory)?.sync_all());
    settled.map_err(|error| Error::io(format!("cannot make {}", path.display()), error))
}

/// Whether the disk is whole where the machine runs, and needs no server.
pub fn is_home(directory: &Path, disk: &str) -> Result<bool> {
    let path = overlay(directory, disk);
    if !path.exists() {
        return Ok(false);
    }
    // It may be in use, by a machine that an earlier run has left.
    let program = Program::new("qemu-img", TOOL).arguments(["info", "-U", "--output=json"]).argument(&path);
    let told: Value = serde_json::from_slice(&program.run_well()?).unwrap_or_default();
    if told["format"] != "qcow2" {
        return Err(Error::integrity(format!("{} is no overlay", path.display())));
    }
    Ok(told.get("backing-filename").is_none())
}

fn base(disk: &str) -> String {
    format!("base-{disk}")
}

fn over(disk: &str) -> String {
    format!("over-{disk}")
}

fn name_of(machine: &Machine) -> String {
    format!("mainstay-{}", machine.name.replace(',', "_"))
}

/// Where the overlay of a disk lies.
pub fn overlay(directory: &Path, disk: &str) -> PathBuf {
    directory.join(format!("{disk}.qcow2"))
}

fn words(machine: &Machine, server: &Path, plan: &EmulatorPlan) -> Result<Vec<String>> {
    let at = |name: &str| plan.directory.join(name).display().to_string();
    let memory = plan.memory.or(machine.memory).unwrap_or(MEMORY) >> 20;
    let cpus = plan.cpus.or(machine.cpus).unwrap_or(1);
    let kvm = match plan.accelerator {
        Accelerator::Auto => kvm_works(&plan.directory),
        Accelerator::Kvm => true,
        Accelerator::Tcg => false,
    };
    let (accelerator, processor) = if kvm { ("kvm", "host") } else { ("tcg", "qemu64") };
    let mut words: Vec<String> =
        ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"].map(str::to_owned).into();
    let mut add = |option: &str, value: String| words.extend([option.to_owned(), value]);
    add("-name", name_of(machine));
    add("-machine", format!("q35,accel={accelerator}"));
    add("-cpu", processor.into());
    add("-m", memory.max(64).to_string());
    add("-smp", cpus.to_string());
    add("-vga", "std".into());
    add("-serial", format!("file:{}", at("console")));
    add("-device", "virtio-serial-pci".into());
    add("-chardev", format!("socket,id=qmp,path={},server=on,wait=off", at("qmp")));
    add("-mon", "chardev=qmp,mode=control".into());
    add("-chardev", format!("socket,id=agent,path={},server=on,wait=off", at("agent")));
    add("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0".into());
    if plan.network {
        add("-nic", "user,model=virtio-net-pci".into());
    }
    firmware(&machine.firmware, &mut add)?;
    add("-device", "virtio-scsi-pci,id=scsi".into());
    for (number, disk) in machine.disks.iter().enumerate() {
        let name = &disk.name;
        let file =
            json!({ "driver": "file", "filename": overlay(&plan.directory, name).display().to_string() });
        let backing = if is_home(&plan.directory, name)? {
            Value::Null
        } else {
            let server = json!({ "type": "unix", "path": server.display().to_string() });
            let node = json!({ "driver": "nbd", "node-name": base(name), "server": server,
                "export": name, "reconnect-delay": RECONNECT, "read-only": true });
            add("-blockdev", node.to_string());
            json!(base(name))
        };
        let node = json!({ "driver": "qcow2", "node-name": over(name), "file": file,
            "backing": backing, "discard": "unmap" });
        add("-blockdev", node.to_string());
        let kind = device(plan.bus.as_deref().or(disk.bus.as_deref()));
        let serial = disk
            .serial
            .as_deref()
            .filter(|serial| serial.chars().all(|letter| letter.is_ascii_alphanumeric()));
        let serial = serial.map_or_else(|| format!("mainstay{number}"), str::to_owned);
        add("-device", format!("{kind},drive={},serial={serial},bootindex={}", over(name), number + 1));
    }
    words.extend(plan.options.iter().cloned());
    Ok(words)
}

/// The device that a disk on this bus is. For `scsi` there has to be a controller of the id `scsi`.
pub(super) fn device(bus: Option<&str>) -> &'static str {
    match bus.unwrap_or("virtio") {
        "scsi" => "scsi-hd,bus=scsi.0",
        "sata" | "ide" | "usb" => "ide-hd",
        "nvme" => "nvme",
        _ => "virtio-blk-pci",
    }
}

pub(super) fn firmware(firmware: &Firmware, add: &mut impl FnMut(&str, String)) -> Result<()> {
    let there = |path: &str| {
        let missing =
            || Error::new(Code::Unsupported, format!("the machine starts from {path}, which is not here"));
        if Path::new(path).exists() { Ok(path.to_owned()) } else { Err(missing()) }
    };
    match firmware {
        Firmware::Bios => {}
        Firmware::Uefi { loader, .. } => {
            let loader = there(loader.as_deref().unwrap_or("/usr/share/OVMF/OVMF_CODE_4M.fd"))
                .map_err(|error| error.hint("install the firmware, on Debian the package ovmf"))?;
            add("-drive", format!("if=pflash,format=raw,readonly=on,file={loader}"));
        }
        Firmware::Kernel { kernel, initrd, arguments } => {
            add("-kernel", there(kernel)?);
            if let Some(initrd) = initrd {
                add("-initrd", there(initrd)?);
            }
            if let Some(arguments) = arguments {
                add("-append", arguments.clone());
            }
        }
    }
    Ok(())
}

/// Boots a sector that counts and then switches the machine off. A device file proves nothing: there are hosts that
/// offer it and take minutes for what should take milliseconds.
pub(in crate::vm) fn kvm_works(directory: &Path) -> bool {
    const COUNT: &[u8] = &[
        0x66, 0xB9, 0x00, 0x00, 0x40, 0x00, // mov ecx, 0x400000
        0x66, 0x49, // dec ecx
        0x75, 0xFC, // jnz to the line before
        0xB0, 0x01, 0xE6, 0xF4, // out 0xf4, 1: QEMU ends with status 3
        0xEB, 0xFE,
    ];
    if !Path::new("/dev/kvm").exists() {
        return false;
    }
    let path = directory.join("probe");
    let mut sector = [0; 512];
    if let Some(start) = sector.get_mut(..COUNT.len()) {
        start.copy_from_slice(COUNT);
    }
    if let Some(end) = sector.get_mut(510..) {
        end.copy_from_slice(&[0x55, 0xAA]);
    }
    if std::fs::write(&path, sector).is_err() {
        return false;
    }
    let drive = format!("if=ide,format=raw,readonly=off,file={}", path.display());
    let words = [
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-machine",
        "pc,accel=kvm",
        "-cpu",
        "host",
        "-m",
        "16",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=1",
        "-drive",
        &drive,
    ];
    let ended = Program::new(QEMU, PROBE).arguments(words).run();
    let _left = std::fs::remove_file(&path);
    ended.is_ok_and(|outcome| outcome.status == Some(3))
}
