//! Backup by proxy through the real binary: a real QEMU in one network namespace, the proxy in another, and a cable
//! between them that is cut. The test plays the guest.

#![cfg(test)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use mainstay_core::Clock as _;
use mainstay_testkit::lab::{
    Cable, DomainPlan, FarQemu, FileSystem, Fsck, Libvirt, Side, certificates, check_rounds, compare,
    patiently,
};
use mainstay_testkit::{RealClock, Rng, settle};

const MIB: usize = 1 << 20;
/// Longer than a run takes to see that its link is dead.
const LONG: Duration = Duration::from_secs(180);

/// The program at one end of a cable, with a home of its own below a directory.
struct End<'a> {
    cable: &'a Cable,
    side: Side,
    home: PathBuf,
}

impl End<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        let program = Path::new(env!("CARGO_BIN_EXE_mainstay"));
        let mut command = self.cable.command(self.side, program, arguments);
        std::fs::create_dir_all(&self.home).unwrap();
        settle(&mut command, &self.home);
        // Short, because the paths of sockets are.
        command.env("TMPDIR", &self.home);
        command.current_dir(&self.home);
        command
    }

    fn run(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", told(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn fails(&self, arguments: &[&str]) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(!output.status.success(), "{arguments:?}: {}", told(&output));
        told(&output)
    }

    fn start(&self, arguments: &[&str]) -> Running {
        let mut command = self.command(arguments);
        Running(Some(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()))
    }
}

struct Lab {
    // In this order: the emulator goes before its network.
    qemu: FarQemu,
    cable: Cable,
    images: Vec<PathBuf>,
    directory: tempfile::TempDir,
}

impl Lab {
    /// A machine with disks of so many MiB.
    fn new(disks: &[usize]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut rng = Rng::new(1);
        let mut images = Vec::new();
        let program = std::fs::read(env!("CARGO_BIN_EXE_mainstay")).unwrap();
        let mut program = program.as_slice();
        for (number, mebibytes) in disks.iter().enumerate() {
            let raw = directory.path().join(format!("{number}.raw"));
            let image = directory.path().join(format!("{number}.qcow2"));
            // Every other part is there. Programs, as on real disks, since it takes work to make those smaller; and each
            // only once.
            let mut bytes = vec![0; mebibytes * MIB];
            for part in bytes.chunks_mut(MIB).step_by(2) {
                let taken = program.len().min(MIB);
                part[..taken].copy_from_slice(&program[..taken]);
                program = &program[taken..];
                rng.fill(&mut part[taken..]);
            }
            std::fs::write(&raw, bytes).unwrap();
            tool("qemu-img", &["convert", "-O", "qcow2", text(&raw), text(&image)]);
            images.push(image);
        }
        let cable = Cable::lay().unwrap();
        let paths: Vec<&Path> = images.iter().map(PathBuf::as_path).collect();
        let qemu = FarQemu::start(&cable, &paths).unwrap();
        Self { qemu, cable, images, directory }
    }

    /// How the proxy names the machine.
    fn far(&self) -> String {
        let (address, pki) = (Cable::address(Side::Host), self.qemu.certificates());
        format!(
            "qmp:tcp://{address}:{},tls={pki},host-tls={pki},host-scratch={},name=web",
            FarQemu::PORT,
            self.qemu.scratch().display(),
            pki = pki.display()
        )
    }

    /// How one names it who is on the host.
    fn near(&self) -> String {
        format!("qmp:{},name=web", self.qemu.local_monitor().display())
    }

    fn end(&self, side: Side, home: &str) -> End<'_> {
        End { cable: &self.cable, side, home: self.directory.path().join(home) }
    }

    fn run(&self, side: Side, home: &str, arguments: &[&str]) -> String {
        self.end(side, home).run(arguments)
    }

    fn fails(&self, side: Side, home: &str, arguments: &[&str]) -> String {
        self.end(side, home).fails(arguments)
    }

    fn start(&self, side: Side, home: &str, arguments: &[&str]) -> Running {
        self.end(side, home).start(arguments)
    }

    /// Every disk of the newest point is what the machine's images hold. The machine must not run.
    fn check(&self, side: Side, home: &str) {
        let to = self.directory.path().join(format!("{home}-restored"));
        self.run(side, home, &["vm", "restore", "web@latest", "--to", text(&to)]);
        for (number, image) in self.images.iter().enumerate() {
            let disk = std::fs::read_dir(&to).unwrap().map(|entry| entry.unwrap().path());
            let name = format!("disk{number}.raw");
            let disk =
                disk.into_iter().find(|path| text(path).ends_with(&name)).expect("the disk is restored");
            compare(image, &disk).unwrap();
        }
    }

    /// The emulator and nothing else.
    fn is_clean(&self) {
        assert_eq!(self.qemu.remains().unwrap(), [""; 0]);
        for file in std::fs::read_dir(self.qemu.scratch()).unwrap() {
            assert_eq!(file.unwrap().metadata().unwrap().len(), 0, "a scratch file is still full");
        }
    }

    /// The guest can still write, and soon: nothing of ours holds it up.
    fn guest_lives(&self, byte: u8) {
        for disk in 0..self.images.len() {
            self.qemu.write(disk, 7 * MIB as u64, 4096, byte).unwrap();
        }
    }
}

struct Running(Option<Child>);

impl Running {
    fn end(mut self) -> Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _gone = child.kill();
            let _ended = child.wait();
        }
    }
}

fn told(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[expect(clippy::disallowed_methods, reason = "a tool that prepares what the test needs")]
fn tool(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; install it: cargo xtask setup"));
    assert!(output.status.success(), "{program}: {}", told(&output));
}

/// The processor time of this test's children that have ended, in seconds.
fn children() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = text.rsplit_once(") ").unwrap().1.split(' ').collect();
    let ticks: f64 = fields[13..15].iter().map(|field| field.parse::<f64>().unwrap()).sum();
    ticks / rustix::param::clock_ticks_per_second() as f64
}

#[test]
fn a_point_taken_over_the_network_is_what_the_machine_held_and_costs_the_host_little() {
    let mut lab = Lab::new(&[192, 16]);
    let (far, near) = (lab.far(), lab.near());
    let full = |side, home, host: &str| {
        let (before, others) = (lab.qemu.processor(), children());
        let told = lab.run(side, home, &["vm", "backup", "--host", host, "web", "--json"]);
        assert_eq!(told.matches("\"mode\":\"full\"").count(), 2, "{told}");
        (lab.qemu.processor() - before, children() - others)
    };
    let (qemu, program) = full(Side::Host, "local", &near);
    let (emulator, proxy) = full(Side::Proxy, "proxy", &far);
    let ratio = emulator / (qemu + program);
    println!(
        "on the host: {:.2} s of processor for a local run (QEMU {qemu:.2}, mainstay {program:.2}), {emulator:.2} s by \
         proxy (whose own are {proxy:.2}): {ratio:.2} of it",
        qemu + program
    );
    assert!(ratio < 0.6, "the host does the work of the proxy");
    lab.is_clean();

    for place in 0..20 {
        lab.qemu.write(0, place * 5 * MIB as u64 + 4096, 70_000, 7).unwrap();
    }
    lab.qemu.write(1, 0, 8192, 9).unwrap();
    let told = lab.run(Side::Proxy, "proxy", &["vm", "backup", "--host", &far, "--all", "--json"]);
    assert_eq!(told.matches("\"mode\":\"incremental\"").count(), 2, "{told}");
    lab.is_clean();
    lab.guest_lives(7);
    let told = lab.run(Side::Proxy, "proxy", &["vm", "backup", "--host", &far, "--all", "--json"]);
    assert_eq!(told.matches("\"mode\":\"incremental\"").count(), 2, "{told}");
    lab.qemu.end();
    lab.check(Side::Proxy, "proxy");
}

#[test]
fn strangers_are_not_let_in_and_no_stranger_is_believed() {
    let lab = Lab::new(&[8]);
    let strangers = lab.directory.path().join("strangers");
    certificates(&strangers, &[Cable::address(Side::Host)]).unwrap();
    let ours = lab.qemu.certificates();
    let host =
        lab.far().replace(&format!(",tls={}", ours.display()), &format!(",tls={}", strangers.display()));
    let said = lab.fails(Side::Proxy, "proxy", &["vm", "backup", "--host", &host, "web"]);
    assert!(said.contains("cannot connect to 10.99.0.1:4444"), "{said}");
    let host = lab.far().replace(&format!(",tls={}", ours.display()), "");
    let said = lab.fails(Side::Proxy, "proxy", &["vm", "backup", "--host", &host, "web"]);
    assert!(said.contains("tls=DIR"), "{said}");
    // Those who have part of it only: the disks are offered to holders of a certificate and to nobody else.
    let half = lab
        .far()
        .replace(&format!("host-tls={}", ours.display()), &format!("host-tls={}", strangers.display()));
    let said = lab.fails(Side::Proxy, "proxy", &["vm", "backup", "--host", &half, "web"]);
    assert!(said.contains("10.99.0.1:10809"), "{said}");
    lab.is_clean();
}

#[test]
fn a_link_that_is_cut_leaves_the_guest_alone_and_the_next_run_makes_all_well() {
    let mut lab = Lab::new(&[512, 16]);
    let far = lab.far();
    let backup = ["vm", "backup", "--host", far.as_str(), "web", "--json"];
    let running = lab.start(Side::Proxy, "proxy", &backup);
    patiently("disks that are offered", LONG, || {
        let exports = lab.qemu.monitor()?.run("query-block-exports", serde_json::json!({}))?;
        Ok((exports.as_array().map(Vec::len) == Some(2)).then_some(()))
    })
    .unwrap();
    lab.cable.cut().unwrap();
    lab.guest_lives(1);
    let began = RealClock.monotonic();
    let output = running.end();
    println!("the run ended {:?} after its link was cut", RealClock.monotonic() - began);
    assert!(!output.status.success() && told(&output).contains("error"), "{}", told(&output));
    lab.guest_lives(2);
    assert_eq!(
        lab.run(Side::Proxy, "proxy", &["points", "--json"]).matches("\"workload\":\"web\"").count(),
        0
    );

    lab.cable.mend().unwrap();
    let said = lab.run(Side::Proxy, "proxy", &backup);
    assert_eq!(said.matches("\"mode\":\"full\"").count(), 2, "{said}");
    lab.is_clean();
    lab.guest_lives(3);
    assert_eq!(lab.run(Side::Proxy, "proxy", &backup).matches("\"mode\":\"incremental\"").count(), 2);
    lab.qemu.end();
    lab.check(Side::Proxy, "proxy");
}

#[test]
fn a_machine_that_its_host_copies_here_is_backed_up_later_and_is_what_it_was() {
    let mut lab = Lab::new(&[160, 16]);
    let stage = lab.directory.path().join("stage");
    let far = lab.far();
    let listen = format!("{}:10810", Cable::address(Side::Proxy));
    let receive =
        ["vm", "receive", "web", "--host", &far, "--stage", text(&stage), "--listen", &listen, "--json"];
    let from = format!("stage:{}", stage.display());
    let backup = ["vm", "backup", "--all", "--host", &from, "--json"];
    let mode = |said: &str, mode: &str| said.matches(&format!("\"mode\":\"{mode}\"")).count();
    let compared = |lab: &Lab| {
        let copy = std::fs::read_dir(&stage).unwrap().next().unwrap().unwrap().path();
        for (number, image) in lab.images.iter().enumerate() {
            compare(image, &copy.join(format!("disk{number}.raw"))).unwrap();
        }
    };

    let said = lab.run(Side::Proxy, "proxy", &receive);
    assert_eq!(mode(&said, "full"), 2, "{said}");
    lab.is_clean();
    let said = lab.run(Side::Proxy, "proxy", &backup);
    assert_eq!(mode(&said, "full"), 2, "{said}");

    // Two copies before the next point, which is an increment over both.
    for byte in [3, 4] {
        lab.qemu.write(0, u64::from(byte) * 5 * MIB as u64 + 4096, 70_000, byte).unwrap();
        let said = lab.run(Side::Proxy, "proxy", &receive);
        assert_eq!(mode(&said, "incremental"), 2, "{said}");
        let line: serde_json::Value = serde_json::from_str(said.lines().last().unwrap()).unwrap();
        assert!(line["received_bytes"].as_u64().unwrap() < MIB as u64, "{said}");
    }
    // What is written after the copy is not in it.
    let said = lab.run(Side::Proxy, "proxy", &backup);
    assert_eq!(mode(&said, "incremental"), 2, "{said}");

    // A push that is interrupted: the copy is a mixture then, and no point is made of it.
    for part in 0..40 {
        lab.qemu.write(0, part * 4 * MIB as u64, 4 * MIB, part as u8 + 100).unwrap();
    }
    // One of the disks has to be copied anew, which is what is cut: what there is of it must not be built upon.
    let copy = std::fs::read_dir(&stage).unwrap().next().unwrap().unwrap().path();
    std::fs::remove_file(copy.join("disk0.raw")).unwrap();
    let running = lab.start(Side::Proxy, "proxy", &receive);
    let mut monitor = lab.qemu.monitor().unwrap();
    patiently("the copying", LONG, || {
        let jobs = monitor.run("query-jobs", serde_json::json!({}))?;
        Ok(jobs.as_array().is_some_and(|jobs| jobs.iter().any(|job| job["type"] == "backup")).then_some(()))
    })
    .unwrap();
    drop(monitor);
    lab.cable.cut().unwrap();
    let output = running.end();
    assert!(!output.status.success(), "{}", told(&output));
    lab.guest_lives(5);
    let said = lab.fails(Side::Proxy, "proxy", &backup);
    assert!(said.contains("never finished"), "{said}");
    lab.cable.mend().unwrap();
    let said = lab.run(Side::Proxy, "proxy", &receive);
    assert_eq!((mode(&said, "incremental"), mode(&said, "full")), (1, 1), "{said}");
    lab.is_clean();
    let said = lab.run(Side::Proxy, "proxy", &backup);
    assert_eq!(mode(&said, "incremental"), 2, "{said}");
    lab.qemu.end();
    compared(&lab);
    lab.check(Side::Proxy, "proxy");
}

/// Whether somebody listens at NBD's port where this process is.
fn offers_disks(process: u32) -> bool {
    let sockets = std::fs::read_to_string(format!("/proc/{process}/net/tcp")).unwrap_or_default();
    sockets.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|at| at.ends_with(":2A39")) && fields.nth(1) == Some("0A")
    })
}

/// The test's own libvirt at the host's end, with a guest that writes all the time.
#[test]
fn machines_of_a_libvirt_far_away_come_over_the_network_and_outlive_its_cut() {
    let cable = Cable::lay().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (pki, scratch) = (directory.path().join("pki"), directory.path().join("scratch"));
    std::fs::create_dir(&scratch).unwrap();
    certificates(&pki, &[Cable::address(Side::Host)]).unwrap();
    // As libvirt's own clients name them.
    for (ours, theirs) in [("ca-cert", "cacert"), ("client-cert", "clientcert"), ("client-key", "clientkey")]
    {
        std::fs::copy(pki.join(format!("{ours}.pem")), pki.join(format!("{theirs}.pem"))).unwrap();
    }
    let libvirt = Libvirt::start_far(&cable, &pki).unwrap();
    let domain = libvirt.define(&DomainPlan { name: "web", data: &[16], ..Default::default() }).unwrap();
    domain.start().unwrap();
    let inside = domain.inside();
    inside.wait().unwrap();
    inside.start_writer("/data").unwrap();
    inside.wait_for_rounds("/data", 3).unwrap();
    let proxy = End { cable: &cable, side: Side::Proxy, home: directory.path().join("proxy") };
    let uri = format!("qemu+tls://{}/system?pkipath={}", Cable::address(Side::Host), pki.display());
    let host = format!("{uri},tls={},host-scratch={}", pki.display(), scratch.display());
    let backup = ["vm", "backup", "--host", host.as_str(), "web", "--json"];
    let mode = |said: &str, mode: &str| said.matches(&format!("\"mode\":\"{mode}\"")).count();
    let clean = || {
        assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0);
        libvirt.virsh(&["backup-dumpxml", "web"]).unwrap_err();
    };

    let said = proxy.fails(&["vm", "backup", "--host", &uri, "web"]);
    assert!(said.contains("host-scratch=DIR"), "{said}");
    let said = proxy.run(&backup);
    assert!(mode(&said, "full") == 2 && said.contains("\"consistency\":\"file-system\""), "{said}");
    clean();
    inside.wait_for_rounds("/data", 3).unwrap();
    let said = proxy.run(&backup);
    assert!(mode(&said, "incremental") == 2 && said.contains("\"consistency\":\"file-system\""), "{said}");
    clean();

    // Cut as soon as the disks are offered: the guest may stand still just then.
    let running = proxy.start(&[backup.as_slice(), &["--full"]].concat());
    let emulator = domain.pid().unwrap();
    patiently("disks that are offered", LONG, || Ok(offers_disks(emulator).then_some(()))).unwrap();
    cable.cut().unwrap();
    let began = RealClock.monotonic();
    inside.wait_for_rounds("/data", 3).unwrap();
    println!("the guest writes on {:?} after the link was cut", RealClock.monotonic() - began);
    let output = running.end();
    println!("the run ended {:?} after its link was cut", RealClock.monotonic() - began);
    assert!(!output.status.success() && told(&output).contains("error"), "{}", told(&output));
    inside.wait_for_rounds("/data", 3).unwrap();
    cable.mend().unwrap();
    let said = proxy.run(&backup);
    assert_eq!(mode(&said, "incremental"), 2, "{said}");
    clean();

    let to = directory.path().join("restored");
    proxy.run(&["vm", "restore", "web@latest", "--to", text(&to)]);
    let system = FileSystem::of(&to.join("vda.raw")).unwrap();
    system.fsck(Fsck::Clean).unwrap();
    check_rounds(&system.tree("/data", directory.path()).unwrap()).unwrap();
}
