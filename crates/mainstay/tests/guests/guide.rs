//! The guide `docs/guides/virtual-machines.md` is followed to the letter: every line that it tells an administrator to type
//! is typed, on a libvirt host of the test's own. What the test puts in the place of names that are only examples is in
//! [`Stage::as_here`]; nothing else is changed.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use mainstay_testkit::lab::{DomainPlan, Libvirt, patiently};

use crate::home::Home;

const GUIDE: &str = include_str!("../../../../docs/guides/virtual-machines.md");
const LIMIT: Duration = Duration::from_secs(400);

#[test]
fn every_line_of_the_guide_does_what_it_says() {
    let libvirt = Libvirt::start().unwrap();
    let domain =
        libvirt.define(&DomainPlan { name: "web", boots_itself: true, ..DomainPlan::default() }).unwrap();
    let _scratch = libvirt.define(&DomainPlan { name: "scratch", ..DomainPlan::default() }).unwrap();
    domain.start().unwrap();
    domain.inside().wait().unwrap();
    domain
        .inside()
        .run("mkdir -p /etc/nginx /srv && echo web > /etc/hostname && echo 'listen 80' > /etc/nginx/site && sync")
        .unwrap();
    let stage = Stage::new(libvirt.uri());
    let lines: Vec<&str> = lines(GUIDE);
    assert!(lines.len() >= 12, "the guide has become shorter than its test: {lines:?}");
    for line in lines {
        println!("$ {line}");
        if line.starts_with("mainstay vm run ") {
            stage.run_until_home(line);
            continue;
        }
        if line.starts_with("mainstay mount ") {
            stage.mount(line);
            continue;
        }
        if line.contains("--same-identity") {
            // For a host that has lost it.
            domain.forget().unwrap();
        }
        let said = stage.type_in(line);
        println!("{said}");
        stage.look(line, &said);
    }
}

/// What stands in blocks of shell.
fn lines(guide: &str) -> Vec<&str> {
    let mut inside = false;
    let mut lines = Vec::new();
    for line in guide.lines() {
        match line {
            "```sh" => inside = true,
            "```" => inside = false,
            line if inside && !line.is_empty() => lines.push(line),
            _ => {}
        }
    }
    lines
}

struct Stage {
    home: Home,
    uri: String,
    disk: Loop,
}

impl Stage {
    fn new(uri: String) -> Self {
        let home = Home::new();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_mainstay"), home.at("mainstay")).unwrap();
        // What the guest's own root would be, for the lines that are typed in the guest.
        for directory in ["guest/etc/nginx", "guest/srv", "guest/var/lib"] {
            std::fs::create_dir_all(home.at(directory)).unwrap();
        }
        std::fs::write(home.at("guest/etc/nginx/site"), "listen 443\n").unwrap();
        std::fs::write(home.at("guest/etc/hostname"), "web\n").unwrap();
        let disk = Loop::new(&home.at("sdb"));
        Self { home, uri, disk }
    }

    fn as_here(&self, line: &str) -> String {
        let at = |path: &str| self.home.at(path).display().to_string();
        let mut here = line
            .replace("/tmp/", &at("tmp-"))
            .replace("/mnt/", &at("mnt-"))
            .replace("/srv/machines", &at("machines"))
            .replace("/srv/look", &at("look"))
            .replace("qemu:///system", &format!("'{}'", self.uri))
            .replace("/srv/web", &at("run"))
            .replace("/var/lib/libvirt/images/web", &at("images-web"))
            // Somebody who sits there would be asked.
            .replace("vda=/dev/sdb", &format!("vda={} --yes", self.disk.device))
            .replace("--in-place", "--in-place --yes");
        if let Some(start) = here.find("@2026-") {
            let end = here[start..].find(' ').map_or(here.len(), |length| start + length);
            here.replace_range(start..end, "@$(date -u +%Y-%m-%dT%H:%M:%SZ)");
        }
        if here.starts_with("mainstay backup ") {
            let root = at("guest");
            let binds: String = ["etc", "srv", "var/lib"]
                .iter()
                .map(|place| format!("mount --bind {root}/{place} /{place} && "))
                .collect();
            let typed = here.replace("mainstay backup ", "mainstay backup --machine web ");
            here = format!("unshare --mount sh -c '{binds}{typed}'");
        }
        here
    }

    fn shell(&self, line: &str) -> Command {
        let mut command = self.home.plain("sh");
        command.args(["-c", &self.as_here(line)]);
        command
    }

    #[track_caller]
    fn type_in(&self, line: &str) -> String {
        let output = self.shell(line).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        // What is wrong with the host's machines is what such a line is asked for.
        let well = output.status.success() || (line.ends_with("--check") && output.status.code() == Some(21));
        assert!(well, "{line}: {:?}\n{said}", output.status);
        said
    }

    /// That it ended well is not enough where the guide promises more.
    #[track_caller]
    fn look(&self, line: &str, said: &str) {
        let file = |path: &str| std::fs::read_to_string(self.home.at(path)).unwrap_or_default();
        match line {
            "mainstay cat web@latest /etc/hostname" => assert_eq!(said, "web\n"),
            "mainstay restore web@latest /etc/nginx --to /tmp/look" => {
                assert_eq!(file("tmp-look/etc/nginx/site"), "listen 80\n");
            }
            line if line.starts_with("mainstay restore web@2026-") => {
                assert_eq!(file("tmp-friday/etc/nginx/site"), "listen 443\n", "the newer file");
            }
            line if line.contains("--host") && line.contains("list") => {
                assert!(said.contains("web"), "{said}");
            }
            line if line.contains("vm prove") => assert!(said.contains("proven"), "{said}"),
            _ => {}
        }
    }

    /// Stays until it is told to go; meanwhile the files are there.
    fn mount(&self, line: &str) {
        let at = self.home.at("mnt-web");
        std::fs::create_dir_all(&at).unwrap();
        let mut mounted = Running(self.shell(&format!("exec {line}")).spawn().unwrap());
        patiently("files are mounted", LIMIT, || {
            assert!(mounted.0.try_wait().unwrap().is_none(), "{line} ended");
            Ok(std::fs::read_to_string(at.join("etc/hostname")).ok())
        })
        .unwrap();
    }

    fn run_until_home(&self, line: &str) {
        let log = std::fs::File::create(self.home.at("run.log")).unwrap();
        let errors = log.try_clone().unwrap();
        // In the shell's place, so that the signal reaches it as Ctrl-C would.
        let running = self.shell(&format!("exec {line}")).stdout(log).stderr(errors).spawn().unwrap();
        let mut running = Running(running);
        let said = || std::fs::read_to_string(self.home.at("run.log")).unwrap();
        patiently("the machine comes home", LIMIT, || {
            assert!(running.0.try_wait().unwrap().is_none(), "it ended: {}", said());
            Ok(said().contains("the disks are in").then_some(()))
        })
        .unwrap();
        println!("{}", said());
    }
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        let _gone = rustix::process::kill_process(pid, rustix::process::Signal::INT);
        let _gone = self.0.wait();
    }
}

/// A bare disk.
struct Loop {
    device: String,
}

impl Loop {
    #[expect(clippy::disallowed_methods, reason = "the test makes a disk")]
    fn new(image: &Path) -> Self {
        std::fs::File::create(image).unwrap().set_len(3 << 30).unwrap();
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(image)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}; `cargo xtask setup` brings losetup, and root may use it");
        Self { device: String::from_utf8(output.stdout).unwrap().trim().to_owned() }
    }
}

impl Drop for Loop {
    #[expect(clippy::disallowed_methods, reason = "the test takes its disk away")]
    fn drop(&mut self) {
        let _gone = Command::new("losetup").args(["--detach", &self.device]).status();
    }
}
