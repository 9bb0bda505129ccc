//! Looking into the disks of machines with the real binary: file systems are parsed in a confined process, volumes are
//! unlocked by keys, and what cannot be read costs nothing else.

#![cfg(test)]
#![expect(
    clippy::disallowed_methods,
    reason = "these tests start the program and the tools that make images"
)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use mainstay_testkit::Rng;
use mainstay_testkit::at_home;

/// A place with a folder of images and a person who backs them up.
struct Lab {
    directory: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let lab = Self { directory: tempfile::tempdir().unwrap() };
        for name in ["tree/etc", "images"] {
            std::fs::create_dir_all(lab.at(name)).unwrap();
        }
        lab
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.at(name).to_str().unwrap().to_owned()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = at_home(env!("CARGO_BIN_EXE_mainstay"), self.directory.path());
        command.args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> String {
        let (status, out, err) = told(&self.command(arguments).output().unwrap());
        assert_eq!(status, Some(0), "{arguments:?}: {out}\n{err}");
        out
    }

    /// The exit status and what was said of a run that fails.
    fn fail(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let (status, out, err) = told(&self.command(arguments).output().unwrap());
        assert_ne!(status, Some(0), "{arguments:?}: {out}\n{err}");
        (status, err)
    }

    /// An image with an ext4 file system of `tree`, in the folder of machines.
    fn image(&self, name: &str, mebibytes: u64) -> PathBuf {
        let image = self.at("images").join(name);
        make_ext4(&image, &self.at("tree"), mebibytes);
        image
    }

    fn back_up(&self) -> String {
        let host = format!("dir:{}", self.text("images"));
        self.run(&["vm", "backup", "--host", &host, "--all", "--json"])
    }
}

fn told(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

fn tool(program: &str, arguments: &[&str]) {
    let output = Command::new(program).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}; install it: cargo xtask setup"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

fn make_ext4(image: &Path, tree: &Path, mebibytes: u64) {
    std::fs::File::create(image).unwrap().set_len(mebibytes << 20).unwrap();
    tool("mke2fs", &["-q", "-t", "ext4", "-d", tree.to_str().unwrap(), image.to_str().unwrap()]);
}

/// The processes that parse for `parent`.
fn parsers(parent: u32) -> Vec<u32> {
    let all = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let is_one = |process: &u32| {
        let read = |name: &str| std::fs::read(format!("/proc/{process}/{name}")).unwrap_or_default();
        let status = String::from_utf8_lossy(&read("status")).into_owned();
        let words = read("cmdline");
        status.lines().any(|line| line.split_whitespace().eq(["PPid:", &parent.to_string()]))
            && words.split(|byte| *byte == 0).any(|word| word == b"parse-file-system")
    };
    all.filter(is_one).collect()
}

#[test]
fn file_systems_are_parsed_by_a_process_that_may_do_nothing_else() {
    let lab = Lab::new();
    // More than a pipe holds, so that the program waits for its reader.
    let content = Rng::new(5).bytes(8 << 20);
    std::fs::write(lab.at("tree/big"), &content).unwrap();
    lab.image("web.raw", 32);
    lab.back_up();
    let mut reading = lab.command(&["cat", "web.raw@latest", "/big"]).stdout(Stdio::piped()).spawn().unwrap();
    let mut output = reading.stdout.take().unwrap();
    let mut first = [0; 1000];
    std::io::Read::read_exact(&mut output, &mut first).unwrap();
    let found = parsers(reading.id());
    assert_eq!(found.len(), 1, "one parser for the one file system");
    let status = std::fs::read_to_string(format!("/proc/{}/status", found[0])).unwrap();
    let says = |name: &str, value: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
        assert!(line.split_whitespace().skip(1).all(|word| word == value), "{line}");
    };
    says("Seccomp:", "2");
    says("NoNewPrivs:", "1");
    if rustix::process::geteuid().is_root() {
        says("Uid:", "65534");
        says("CapEff:", "0000000000000000");
    }
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut output, &mut rest).unwrap();
    assert!(reading.wait().unwrap().success());
    assert!([&first[..], &rest].concat() == content);
    assert!(parsers(reading.id()).is_empty());
}

#[test]
fn a_parser_that_dies_costs_its_file_system_and_nothing_else() {
    let lab = Lab::new();
    std::fs::write(lab.at("tree/big"), Rng::new(6).bytes(8 << 20)).unwrap();
    lab.image("web.raw", 32);
    lab.back_up();
    let mut reading = lab.command(&["cat", "web.raw@latest", "/big"]);
    let mut reading = reading.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0; 1000];
    std::io::Read::read_exact(reading.stdout.as_mut().unwrap(), &mut first).unwrap();
    let [parser] = parsers(reading.id())[..] else { panic!("one parser") };
    tool("kill", &["-KILL", &parser.to_string()]);
    let (status, _out, err) = told(&reading.wait_with_output().unwrap());
    assert_eq!(status, Some(20), "{err}");
    assert!(err.contains("the sandboxed parser of a file system ended"), "{err}");
}

/// A program that starts no parser: the one it would start is not there.
fn without_parser(lab: &Lab, arguments: &[&str]) -> Output {
    let mut command = lab.command(&[]);
    let program = command.get_program().to_owned();
    let mut hidden = Command::new("unshare");
    hidden.args(["--map-root-user", "--mount", "--pid", "--fork", "sh", "-c"]);
    // A /proc in which there is no /proc/self/exe.
    hidden.arg("mount -t tmpfs none /proc && exec \"$@\"").arg("sh").arg(program).args(arguments);
    hidden.env_clear().stdin(Stdio::null());
    for (name, value) in command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").get_envs() {
        hidden.env(name, value.unwrap_or_default());
    }
    hidden.output().unwrap()
}

#[test]
fn where_no_parser_can_be_confined_nothing_is_parsed_unless_somebody_says_so() {
    let lab = Lab::new();
    std::fs::write(lab.at("tree/etc/motd"), "welcome\n").unwrap();
    lab.image("web.raw", 16);
    let host = format!("dir:{}", lab.text("images"));
    let backup = ["vm", "backup", "--host", &host, "--all"];
    let (status, out, err) = told(&without_parser(&lab, &backup));
    assert_eq!(status, Some(0), "the image is cut without knowing its files: {out}{err}");
    assert!(err.contains("cannot start the sandboxed parser"), "{err}");
    let cat = ["cat", "web.raw@latest", "/etc/motd"];
    let (status, out, err) = told(&without_parser(&lab, &cat));
    assert_eq!((status, out.as_str()), (Some(1), ""), "{err}");
    assert!(err.contains("cannot find /etc/motd: vda cannot be read: cannot start the sandboxed"), "{err}");
    let (_, out, err) = told(&without_parser(&lab, &["cat", "web.raw@latest", "/etc/motd", "--unconfined"]));
    assert_eq!(out, "welcome\n", "{err}");
    assert_eq!(lab.run(&cat), "welcome\n");
}

#[test]
fn encrypted_volumes_are_read_with_their_key_and_stay_closed_without() {
    let lab = Lab::new();
    std::fs::write(lab.at("tree/etc/motd"), "behind a lock\n").unwrap();
    std::fs::write(lab.at("tree/big"), Rng::new(7).bytes(3 << 20)).unwrap();
    let image = lab.image("safe.raw", 64);
    let key = lab.at("key");
    std::fs::write(&key, "a passphrase").unwrap();
    tool("chmod", &["600", key.to_str().unwrap()]);
    let (image, key) = (image.to_str().unwrap(), key.to_str().unwrap());
    tool("truncate", &["-s", "96M", image]);
    let how =
        ["-q", "reencrypt", "--encrypt", "--type", "luks2", "--reduce-device-size", "32M", "--key-file", key];
    let cheap = ["--force-offline-reencrypt", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", image];
    tool("cryptsetup", &[&how[..], &cheap].concat());
    let uuid = Command::new("cryptsetup").args(["luksUUID", image]).output().unwrap();
    let uuid = String::from_utf8(uuid.stdout).unwrap().trim().to_owned();

    // Free space inside is known with the key only; what is stored is encrypted all the same.
    let host = format!("dir:{}", lab.text("images"));
    let backup = ["vm", "backup", "--host", &host, "--all", "--json", "--leave", "free"];
    let written = |out: &str| {
        let line = out.lines().find(|line| line.contains("\"new_bytes\"")).unwrap().to_owned();
        let digits = line.split("\"new_bytes\":").nth(1).unwrap();
        digits.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse::<u64>().unwrap()
    };
    let lean = written(&lab.run(&[&backup[..], &["--volume-key-file", key]].concat()));
    let rest = written(&lab.run(&[&backup[..6], &["--full"]].concat()));
    assert!(lean > 3 << 20 && rest > 45 << 20, "{lean} {rest}");

    let point = "safe.raw@latest";
    let (status, err) = lab.fail(&["cat", point, "/etc/motd"]);
    assert_eq!(status, Some(1));
    assert!(err.contains("encrypted") && err.contains("--volume-key-file"), "{err}");
    let other = lab.text("other");
    std::fs::write(&other, "another").unwrap();
    tool("chmod", &["600", &other]);
    let (_, err) = lab.fail(&["cat", point, "/etc/motd", "--volume-key-file", &other]);
    assert!(err.contains("the key that was given does not open it"), "{err}");
    for file in [key.to_owned(), format!("vda={key}"), format!("{}={key}", uuid.to_uppercase())] {
        assert_eq!(lab.run(&["cat", point, "/etc/motd", "--volume-key-file", &file]), "behind a lock\n");
    }
    let (_, err) = lab.fail(&["cat", point, "/etc/motd", "--volume-key-file", &format!("vdb={key}")]);
    assert!(err.contains("encrypted"), "{err}");
    let mut by_command = lab.command(&["cat", point, "/etc/motd"]);
    by_command.env("MAINSTAY_VOLUME_PASSPHRASE_COMMAND", "echo 'a passphrase'");
    assert_eq!(told(&by_command.output().unwrap()).1, "behind a lock\n");
    tool("chmod", &["644", key]);
    let (_, err) = lab.fail(&["cat", point, "/etc/motd", "--volume-key-file", key]);
    assert!(err.contains("chmod 600"), "{err}");
}

#[test]
fn find_looks_on_the_disks_of_machines_and_past_what_it_cannot_read() {
    let lab = Lab::new();
    std::fs::write(lab.at("tree/etc/motd"), "welcome\n").unwrap();
    lab.image("web.raw", 16);
    lab.back_up();
    lab.back_up();
    std::fs::write(lab.at("tree/etc/motd"), "changed since\n").unwrap();
    lab.image("web.raw", 16);
    lab.back_up();
    // A machine whose file system nobody understands.
    let broken = lab.image("broken.raw", 16);
    std::os::unix::fs::FileExt::write_all_at(
        &std::fs::OpenOptions::new().write(true).open(broken).unwrap(),
        &[0xff; 512],
        1024 + 0x60,
    )
    .unwrap();
    lab.back_up();
    let output = lab.command(&["find", "motd", "--json"]).output().unwrap();
    let (status, out, err) = told(&output);
    assert_eq!(status, Some(0), "{out}{err}");
    let states: Vec<&str> = out.lines().filter(|line| line.contains("\"type\":\"found\"")).collect();
    assert_eq!(states.len(), 2, "{out}");
    assert!(states.iter().all(|state| state.contains("etc/motd") && state.contains("\"points\":2")), "{out}");
    assert!(err.contains("broken.raw of "), "{err}");
    assert!(lab.run(&["find", "/etc/*", "--json", "-w", "web.raw"]).contains("etc/motd"));
    assert!(lab.run(&["find", "web.raw", "--json"]).contains("@machine/disks/web.raw"));
}

/// Fills a new file system with `tree`, by the tool that can for each kind.
fn make(kind: &str, part: &Path, tree: &Path, mounted: &Path) {
    let (at, from, on) = (part.to_str().unwrap(), tree.to_str().unwrap(), mounted.to_str().unwrap());
    let copy = || {
        tool("cp", &["-r", &format!("{from}/."), on]);
        tool("umount", &[on]);
    };
    match kind {
        "ext4" => tool("mke2fs", &["-q", "-t", "ext4", "-d", from, at]),
        "btrfs" => tool("mkfs.btrfs", &["-q", "--rootdir", from, at]),
        "xfs" => {
            tool("mkfs.xfs", &["-q", at]);
            tool("mount", &["-o", "loop", at, on]);
            copy();
        }
        "ntfs" => {
            tool("mkfs.ntfs", &["-q", "-F", "-f", at]);
            tool("ntfs-3g", &[at, on]);
            copy();
        }
        _ => {
            tool("mkfs.vfat", &["-F", "32", at]);
            let entries = std::fs::read_dir(tree).unwrap().map(|entry| entry.unwrap().path());
            let entries: Vec<String> = entries.map(|path| path.to_str().unwrap().to_owned()).collect();
            let mut words = vec!["-Q", "-s", "-m", "-i", at];
            words.extend(entries.iter().map(String::as_str));
            words.push("::/");
            tool("mcopy", &words);
        }
    }
}

#[test]
fn every_file_of_every_file_system_of_a_large_sparse_disk_comes_back_through_the_repository() {
    const EACH: u64 = 400;
    let lab = Lab::new();
    let mut rng = Rng::new(11);
    std::fs::create_dir(lab.at("tree/deep")).unwrap();
    for number in 0..40 {
        let size = *rng.pick(&[0, 1, 900, 5000, 70_000]);
        std::fs::write(lab.at(&format!("tree/deep/file {number}")), rng.bytes(size)).unwrap();
    }
    std::fs::write(lab.at("tree/large"), rng.bytes(3 << 20)).unwrap();
    std::fs::create_dir(lab.at("mounted")).unwrap();
    let image = lab.at("images/many.raw");
    std::fs::File::create(&image).unwrap().set_len(10 << 30).unwrap();
    let kinds = ["ext4", "xfs", "btrfs", "ntfs", "vfat"];
    let parts = (0..5).map(|number| format!("start={}MiB,size={EACH}MiB\n", 1 + number * EACH));
    let table = format!("label: gpt\n{}", parts.collect::<String>());
    std::fs::write(lab.at("table"), table).unwrap();
    tool("sh", &["-c", &format!("sfdisk -q {} < {}", image.display(), lab.text("table"))]);
    for (number, kind) in (0..).zip(kinds) {
        let part = lab.at("part");
        std::fs::File::create(&part).unwrap().set_len(EACH << 20).unwrap();
        make(kind, &part, &lab.at("tree"), &lab.at("mounted"));
        let (from, to) = (format!("if={}", part.display()), format!("of={}", image.display()));
        let at = format!("seek={}", 1 + number * EACH);
        tool("dd", &[&from, &to, &at, "bs=1M", "conv=notrunc,sparse", "status=none"]);
        std::fs::remove_file(part).unwrap();
    }
    lab.back_up();
    for (number, kind) in (1..).zip(kinds) {
        println!("{kind}");
        let volume = format!("/@volumes/vda{number}");
        let listed = lab.run(&["ls", "many.raw@latest", &format!("{volume}/deep"), "--json"]);
        assert_eq!(listed.lines().count(), 40, "{listed}");
        let target = lab.at(kind);
        let wanted = [format!("{volume}/deep"), format!("{volume}/large")];
        let to = ["--to", target.to_str().unwrap()];
        lab.run(&[&["restore", "many.raw@latest", &wanted[0], &wanted[1]][..], &to].concat());
        let restored = target.join(volume.trim_start_matches('/'));
        tool("diff", &["-r", lab.text("tree/deep").as_str(), restored.join("deep").to_str().unwrap()]);
        tool("cmp", &[lab.text("tree/large").as_str(), restored.join("large").to_str().unwrap()]);
    }
}

/// Whether this kernel knows a file system by this name.
fn kernel_knows(kind: &str) -> bool {
    std::fs::read_to_string("/proc/filesystems").unwrap().lines().any(|line| line.trim() == kind)
}

/// A disk with the machine's root, and a volume that no reader of ours knows.
#[test]
fn what_no_reader_knows_is_read_by_the_kernel_when_that_is_asked_for() {
    if !rustix::process::geteuid().is_root() {
        println!("NOT RUN: mounting volumes needs a privilege; run this test as root");
        return;
    }
    for (kind, program) in [("squashfs", "mksquashfs"), ("erofs", "mkfs.erofs")] {
        if !kernel_knows(kind) {
            println!("NOT RUN: this kernel knows no {kind}");
            continue;
        }
        let lab = Lab::new();
        let tree = lab.at("other");
        std::fs::create_dir_all(tree.join("deep/er")).unwrap();
        let content = Rng::new(9).bytes(3 << 20);
        std::fs::write(tree.join("deep/er/big"), &content).unwrap();
        std::fs::write(tree.join("mode"), "x").unwrap();
        std::fs::set_permissions(tree.join("mode"), std::os::unix::fs::PermissionsExt::from_mode(0o4751))
            .unwrap();
        std::os::unix::fs::symlink("deep", tree.join("link")).unwrap();
        std::os::unix::fs::chown(tree.join("mode"), Some(1234), Some(4321)).unwrap();
        tool("setfattr", &["-n", "user.note", "-v", "kept", tree.join("deep").to_str().unwrap()]);
        // Whole seconds are what all of these keep.
        for path in ["", "deep", "deep/er", "deep/er/big", "mode", "link"] {
            tool("touch", &["-h", "-d", "2026-01-02 03:04:05", tree.join(path).to_str().unwrap()]);
        }
        std::fs::create_dir(lab.at("images/web")).unwrap();
        std::fs::write(lab.at("tree/etc/fstab"), "/dev/vda / ext4 rw\n/dev/vdb /srv auto ro\n").unwrap();
        std::fs::create_dir(lab.at("tree/srv")).unwrap();
        lab.image("web/a.raw", 32);
        let (from, to) = (tree.to_str().unwrap(), lab.text("images/web/b.raw"));
        match program {
            "mksquashfs" => tool(program, &[from, &to, "-quiet", "-no-progress"]),
            _ => tool(program, &["--quiet", &to, from]),
        }
        lab.back_up();
        let (status, said) = lab.fail(&["cat", "web@latest", "/srv/mode"]);
        assert_eq!(status, Some(1), "{said}");
        assert_eq!(lab.run(&["cat", "web@latest", "/srv/mode", "--kernel-mount"]), "x", "{kind}");
        let listed = lab.run(&["ls", "web@latest", "/@volumes/vdb/deep", "--kernel-mount"]);
        assert!(listed.contains("er"), "{listed}");
        let back = lab.at("back");
        lab.run(&["restore", "web@latest", "/srv", "--to", back.to_str().unwrap(), "--kernel-mount"]);
        assert_eq!(mainstay_testkit::tree::compare(&tree, &back.join("srv")).unwrap(), [""; 0], "{kind}");
        let loops = std::fs::read_dir("/sys/block").unwrap().filter(|device| {
            let file = device.as_ref().unwrap().path().join("loop/backing_file");
            std::fs::read_to_string(file).is_ok_and(|file| file.contains(".mainstay-mounted-"))
        });
        assert_eq!(loops.count(), 0, "a loop device stays");
    }
}

#[test]
fn the_kernel_is_not_asked_by_whoever_may_not_and_says_what_it_does_not_know() {
    let lab = Lab::new();
    std::fs::create_dir(lab.at("images/web")).unwrap();
    lab.image("web/a.raw", 32);
    // The mark of F2FS, and nothing else of it.
    let other = std::fs::File::create(lab.at("images/web/b.raw")).unwrap();
    other.set_len(8 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&other, b"\x10\x20\xf5\xf2", 1024).unwrap();
    lab.back_up();
    let (_, said) = lab.fail(&["ls", "web@latest", "/@volumes/vdb", "--kernel-mount"]);
    let why = if rustix::process::geteuid().is_root() { "F2FS" } else { "only root" };
    assert!(said.contains(why), "{said}");
}
