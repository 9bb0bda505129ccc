//! A libvirt of the test's own, without systemd and apart from the machine's: `crates/testkit/guest/libvirt.sh`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_core::{Code, Error, Result};
use tempfile::TempDir;

use super::guest::{standstills, tell};
use super::process::{self, Daemon};
use super::{Cable, GuestImage, Inside, PATIENCE, Side, directory, disk, patiently};

/// A running libvirtd. It and all its domains end when the value goes.
#[derive(Debug)]
pub struct Libvirt {
    directory: TempDir,
    daemon: Daemon,
}

impl Libvirt {
    /// As root it is the system's libvirt in all but its place, otherwise one of the user's own. Asks for root, or for
    /// a kernel that gives ordinary users namespaces.
    pub fn start() -> Result<Self> {
        Self::start_with(None)
    }

    /// At the host's end of a cable, where it listens under TLS, and its machines too, by the certificates in `pki`
    /// ([`super::certificates`]). The test speaks to it on its socket all the same. Asks for root.
    pub fn start_far(cable: &Cable, pki: &Path) -> Result<Self> {
        Self::start_with(Some((cable, pki)))
    }

    fn start_with(far: Option<(&Cable, &Path)>) -> Result<Self> {
        let directory = directory("virt")?;
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/guest/libvirt.sh");
        let mut words = vec!["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];
        if !rustix::process::geteuid().is_root() {
            words.push("--map-current-user");
        }
        words.extend(["sh", script]);
        let mut words: Vec<String> = words.into_iter().map(str::to_owned).collect();
        words.push(directory.path().display().to_string());
        let mut program = "unshare".to_owned();
        if let Some((cable, pki)) = far {
            words.extend([Cable::address(Side::Host).to_owned(), pki.display().to_string()]);
            let there = ["netns".to_owned(), "exec".to_owned(), cable.name(Side::Host), program];
            words.splice(0..0, there);
            program = "ip".to_owned();
        }
        let daemon = Daemon::start(&program, words, &directory.path().join("log"))?;
        let mut libvirt = Self { directory, daemon };
        libvirt.wait()?;
        Ok(libvirt)
    }

    fn wait(&mut self) -> Result<()> {
        // The first answer takes some seconds: it tries the emulator out.
        let connect = self.uri();
        let daemon = &mut self.daemon;
        patiently("libvirtd", PATIENCE, || {
            daemon.check()?;
            let (status, _) = process::run_any("virsh", ["-q", "-c", &connect, "version"])?;
            Ok((status == Some(0)).then_some(()))
        })
    }

    /// For `virsh --connect`, `LIBVIRT_DEFAULT_URI`, and the product.
    pub fn uri(&self) -> String {
        let kind = if rustix::process::geteuid().is_root() { "system" } else { "session" };
        let socket = self.directory.path().join("run/libvirt/libvirt-sock");
        format!("qemu:///{kind}?socket={}", socket.display())
    }

    /// Where files for its domains can lie as long as it lives.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Runs virsh; what it printed.
    pub fn virsh(&self, words: &[&str]) -> Result<String> {
        let connect = self.uri();
        process::run("virsh", [&["-q", "-c", connect.as_str()], words].concat())
    }

    /// What libvirtd has complained of.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("libvirtd.log")).unwrap_or_default()
    }

    /// Defines a machine with disks of its own. It is shut off.
    pub fn define(&self, plan: &DomainPlan<'_>) -> Result<Domain<'_>> {
        let image = GuestImage::get()?;
        let at = self.directory.path().join(plan.name);
        std::fs::create_dir(&at).map_err(super::io("cannot make a directory for the domain"))?;
        let mut disks = vec![at.join("system.qcow2")];
        image.copy_disk(&disks[0])?;
        for (number, mebibytes) in plan.data.iter().enumerate() {
            let data = at.join(format!("data{}.qcow2", number + 1));
            disk::formatted(&data, *mebibytes)?;
            disks.push(data);
        }
        let xml = at.join("domain.xml");
        std::fs::write(&xml, domain_xml(plan, &image, &disks, &at))
            .map_err(super::io("cannot write the domain's description"))?;
        self.virsh(&["define", &xml.to_string_lossy()])?;
        Ok(Domain {
            libvirt: self,
            name: plan.name.to_owned(),
            disks,
            inside: Inside::new(&at.join("test")),
            at,
        })
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tell("libvirtd", &self.log());
            tell("libvirt.sh", &self.daemon.words());
        }
    }
}

/// A machine to define.
#[derive(Clone, Copy, Debug, Default)]
pub struct DomainPlan<'a> {
    pub name: &'a str,
    /// The sizes of more disks, in MiB, with an empty ext4 on the whole of each.
    pub data: &'a [u64],
    /// From the boot loader on its first disk, as machines do; a kernel given to the emulator is there sooner.
    pub boots_itself: bool,
}

/// A domain of the lab's libvirt.
#[derive(Debug)]
pub struct Domain<'a> {
    libvirt: &'a Libvirt,
    name: String,
    disks: Vec<PathBuf>,
    inside: Inside,
    at: PathBuf,
}

impl Domain<'_> {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn disk(&self, place: usize) -> &Path {
        &self.disks[place]
    }

    /// Starts it; see [`Inside::wait`] for the guest.
    pub fn start(&self) -> Result<()> {
        self.libvirt.virsh(&["start", &self.name]).map(drop)
    }

    /// Has libvirt know nothing of it any more, as if the host were lost.
    pub fn forget(&self) -> Result<()> {
        // It may be off already.
        let _either = self.libvirt.virsh(&["destroy", &self.name]);
        self.libvirt.virsh(&["undefine", &self.name, "--checkpoints-metadata"]).map(drop)
    }

    /// Shuts the guest down in order and waits for it.
    pub fn shut_down(&self) -> Result<()> {
        self.libvirt.virsh(&["shutdown", &self.name, "--mode", "acpi"])?;
        self.wait_until("shut off")
    }

    /// Waits until libvirt calls its state so.
    pub fn wait_until(&self, state: &str) -> Result<()> {
        patiently(&format!("{} {state}", self.name), PATIENCE, || {
            Ok((self.libvirt.virsh(&["domstate", &self.name])?.trim() == state).then_some(()))
        })
    }

    pub fn inside(&self) -> &Inside {
        &self.inside
    }

    /// What the guest has printed on its console.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.at.join("console")).unwrap_or_default()).into_owned()
    }

    /// How long the guest's file systems stood still each time, by its own clock.
    pub fn standstills(&self) -> Vec<Duration> {
        standstills(&self.console())
    }

    /// The emulator's process, as the test sees it.
    pub fn pid(&self) -> Result<u32> {
        let mark = format!("guest={},", self.name).into_bytes();
        let mine = self.libvirt.directory.path().as_os_str().as_encoded_bytes();
        let holds = |line: &[u8], part: &[u8]| line.windows(part.len()).any(|window| window == part);
        let processes = std::fs::read_dir("/proc").map_err(super::io("cannot list processes"))?;
        let numbers = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let mut found = numbers.filter(|number| {
            let line = std::fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
            holds(&line, &mark) && holds(&line, mine)
        });
        found.next().ok_or_else(|| Error::new(Code::NotFound, format!("{} does not run", self.name)))
    }

    /// Ends the emulator as a power cut would. Returns when libvirt knows.
    pub fn kill(&self) -> Result<()> {
        let pid = i32::try_from(self.pid()?).ok().and_then(rustix::process::Pid::from_raw);
        let pid = pid.ok_or_else(|| Error::bug("a process has no number"))?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)
            .map_err(|errno| Error::io("cannot kill the emulator", errno.into()))?;
        self.wait_until("shut off")
    }
}

impl Drop for Domain<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tell(&format!("the console of {}", self.name), &self.console());
        }
    }
}

fn domain_xml(plan: &DomainPlan<'_>, image: &GuestImage, disks: &[PathBuf], at: &Path) -> String {
    let disk = |(letter, path): (char, &PathBuf)| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2' discard='unmap'/>\
             <source file='{}'/><target dev='vd{letter}' bus='virtio'/></disk>\n",
            path.display()
        )
    };
    let name = plan.name;
    let kernel = format!(
        "<kernel>{}</kernel><initrd>{}</initrd><cmdline>console=ttyS0 root=auto rw quiet panic=1</cmdline>",
        image.kernel.display(),
        image.initrd.display()
    );
    let boot = if plan.boots_itself { "<boot dev='hd'/>" } else { &kernel };
    let disks: String = ('a'..='z').zip(disks).map(disk).collect();
    format!(
        "<domain type='qemu'>
<name>{name}</name>
<memory unit='MiB'>384</memory>
<vcpu>1</vcpu>
<os>
<type arch='x86_64' machine='q35'>hvm</type>
{boot}
</os>
<features><acpi/></features>
<cpu mode='custom'><model>qemu64</model></cpu>
<on_reboot>destroy</on_reboot>
<devices>
{disks}<serial type='file'><source path='{at}/console'/></serial>
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<channel type='unix'><source mode='bind' path='{at}/test'/><target type='virtio' name='org.mainstay.test.0'/></channel>
<memballoon model='none'/>
</devices>
</domain>
",
        at = at.display(),
    )
}
