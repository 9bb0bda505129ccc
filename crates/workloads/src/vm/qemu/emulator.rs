//! Machines that are started here: for instant recovery, and to prove that a point boots.

use std::fs::File;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin};
use std::time::Duration;

use mainstay_core::{Code, Error, Progress, Result};
use serde_json::{Value, json};

use super::super::agent::Agent;
use super::super::machine::{Firmware, Machine, MachineDisk};
use super::super::qmp::Qmp;
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

/// A machine that runs here. Dropped, it is switched off.
pub struct Emulator {
    child: Child,
    _input: ChildStdin,
    directory: PathBuf,
    disks: Vec<String>,
    /// Nobody ends this process while the machine would be left without it.
    _armed: Armed,
}

impl Emulator {
    /// Starts the machine: what it reads comes from the NBD server at the socket `server`, which offers each disk under
    /// its name; what it writes goes into overlays in the directory.
    ///
    /// Errors: [`Code::Unsupported`] without QEMU, or for firmware that is not here; QEMU's own words when it does not
    /// start.
    pub fn start(machine: &Machine, server: &Path, plan: &EmulatorPlan) -> Result<Self> {
        let failed = |error| Error::io(format!("cannot make {}", plan.directory.display()), error);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&plan.directory).map_err(failed)?;
        for disk in &machine.disks {
            make_overlay(&plan.directory, disk)?;
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
        let disks = machine.disks.iter().map(|disk| disk.name.clone()).collect();
        let armed = Armed::new(format!("the machine {} to be switched off", machine.name));
        let directory = plan.directory.clone();
        let mut emulator = Self { child, _input: input, directory, disks, _armed: armed };
        emulator.wait_for_monitor()?;
        Ok(emulator)
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
        let said = std::fs::read_to_string(self.directory.join("qemu.log")).unwrap_or_default();
        let last = said.lines().last().unwrap_or("it said nothing").escape_debug().to_string();
        let hint = "is QEMU installed? On Debian it is the package qemu-system-x86";
        Err(Error::new(Code::Io, format!("QEMU does not start: {last}")).hint(hint))
    }

    fn monitor(&self) -> Result<Qmp> {
        Qmp::connect(&self.directory.join("qmp").into())
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until the guest's agent answers; whether it did.
    ///
    /// Errors: [`Code::Cancelled`]; [`Code::Io`] when the machine ends instead.
    pub fn wait_for_agent(&mut self, limit: Duration, progress: &dyn Progress) -> Result<bool> {
        let looks = limit.as_millis() / LOOK.as_millis();
        for _ in 0..=looks {
            progress.check()?;
            if !self.is_running() {
                return Err(Error::new(Code::Io, "the machine ended before its agent answered")
                    .hint(format!("its console is in {}", self.directory.join("console").display())));
            }
            // The connection is taken before the agent is there, and then nobody answers for some seconds.
            if Agent::connect(&self.directory.join("agent").into()).is_ok() {
                return Ok(true);
            }
            std::thread::sleep(LOOK);
        }
        Ok(false)
    }

    /// Runs a command line in the guest's shell and returns its exit status.
    pub fn check(&self, line: &str, limit: Duration) -> Result<i64> {
        Agent::connect(&self.directory.join("agent").into())?.shell(line, limit)
    }

    /// Writes what the machine's screen shows into a new PNG file.
    pub fn screenshot(&self, path: &Path) -> Result<()> {
        self.monitor()?
            .run("screendump", json!({ "filename": path.display().to_string(), "format": "png" }))
            .map(drop)
    }

    /// Copies what the disks still lack from the server, while the machine runs. Afterwards the server can go.
    pub fn stream_home(&self, progress: &dyn Progress, moved: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let mut qmp = self.monitor()?;
        for name in &self.disks {
            let job = format!("mainstay-home-{name}");
            qmp.run(
                "block-stream",
                json!({ "job-id": job, "device": format!("over-{name}"), "auto-dismiss": false }),
            )?;
            loop {
                progress.check()?;
                let jobs: Vec<Value> = qmp.ask("query-jobs", json!({}))?;
                let Some(found) = jobs.iter().find(|found| found["id"] == job.as_str()) else { break };
                moved(number(&found["current-progress"]), number(&found["total-progress"]));
                if found["status"] == "concluded" {
                    let failed = found["error"].as_str().map(str::to_owned);
                    qmp.run("job-dismiss", json!({ "id": job }))?;
                    if let Some(failed) = failed {
                        let what = format!("the disk {name} could not be copied: {}", failed.escape_debug());
                        return Err(Error::new(Code::Io, what));
                    }
                    break;
                }
                std::thread::sleep(LOOK);
            }
        }
        Ok(())
    }

    /// Waits until the machine ends by itself.
    pub fn wait(&mut self, progress: &dyn Progress) -> Result<()> {
        while self.is_running() {
            progress.check()?;
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Presses the power button.
    pub fn power_button(&self) -> Result<()> {
        self.monitor()?.run("system_powerdown", json!({})).map(drop)
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        if self.is_running() {
            // In order if it can be, so that what was written is in the overlays.
            let _killed_below = self.monitor().and_then(|mut qmp| qmp.run("quit", json!({})));
            for _ in 0..25 {
                if !self.is_running() {
                    return;
                }
                std::thread::sleep(LOOK);
            }
        }
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// The file that takes what the machine writes. One that is there goes on being used.
fn make_overlay(directory: &Path, disk: &MachineDisk) -> Result<()> {
    let path = overlay(directory, &disk.name);
    if path.exists() {
        return Ok(());
    }
    let size = disk
        .size
        .ok_or_else(|| Error::integrity(format!("the size of the disk {} is not known", disk.name)))?;
    let program = Program::new("qemu-img", TOOL).arguments(["create", "-q", "-f", "qcow2"]);
    program.argument(path).argument(size.to_string()).run_well().map(drop)
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
    add("-name", format!("mainstay-{}", machine.name.replace(',', "_")));
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
        let server = json!({ "type": "unix", "path": server.display().to_string() });
        let base = json!({ "driver": "nbd", "node-name": format!("base-{name}"), "server": server,
            "export": name, "reconnect-delay": RECONNECT, "read-only": true });
        let file =
            json!({ "driver": "file", "filename": overlay(&plan.directory, name).display().to_string() });
        let over = json!({ "driver": "qcow2", "node-name": format!("over-{name}"), "file": file,
            "backing": format!("base-{name}"), "discard": "unmap" });
        add("-blockdev", base.to_string());
        add("-blockdev", over.to_string());
        let kind = device(plan.bus.as_deref().or(disk.bus.as_deref()));
        let serial = disk
            .serial
            .as_deref()
            .filter(|serial| serial.chars().all(|letter| letter.is_ascii_alphanumeric()));
        let serial = serial.map_or_else(|| format!("mainstay{number}"), str::to_owned);
        add("-device", format!("{kind},drive=over-{name},serial={serial},bootindex={}", number + 1));
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
pub(super) fn kvm_works(directory: &Path) -> bool {
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
