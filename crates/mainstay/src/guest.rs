//! Which virtual machine this runs in, as its host knows it: so that files backed up in a guest and images backed up
//! from its host are of one machine.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// The first namespace of processes has this number (`PROC_PID_INIT_INO` in Linux's `include/linux/proc_ns.h`).
const FIRST_PROCESSES: &str = "pid:[4026531836]";

/// How the makers of virtual hardware call themselves, for processors that do not tell (systemd-detect-virt(1) asks
/// the same).
const MAKERS: [&str; 4] = ["QEMU", "KVM", "VMware", "Xen"];

/// The UUID that the host gave to the machine whose file system `root` is (SMBIOS 3.7, section 7.2.1, in lower case).
///
/// `None` on real hardware, in a container and below a changed root: there `/etc` is not the machine's `/etc`. `None`
/// too for whoever may not read it, which is everybody but root.
pub(crate) fn identity(root: &Path) -> Option<String> {
    let text = |path: &str| std::fs::read_to_string(root.join(path)).ok();
    let is_machines_own = std::fs::read_link(root.join("proc/self/ns/pid")).ok()?
        == Path::new(FIRST_PROCESSES)
        && place(&root.join("proc/1/root"))? == place(root)?;
    let flags = text("proc/cpuinfo").unwrap_or_default();
    let tells = flags.lines().any(|line| {
        line.starts_with("flags") && line.split_ascii_whitespace().any(|flag| flag == "hypervisor")
    });
    let maker = text("sys/class/dmi/id/sys_vendor").unwrap_or_default();
    if !is_machines_own || !(tells || MAKERS.contains(&maker.trim())) {
        return None;
    }
    let uuid = text("sys/class/dmi/id/product_uuid")?.trim().to_ascii_lowercase();
    let is_uuid = uuid.len() == 36 && uuid.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit());
    // All digits alike is what boards say that have none.
    let says_something = uuid.bytes().any(|byte| !matches!(byte, b'-' | b'0'))
        && uuid.bytes().any(|byte| !matches!(byte, b'-' | b'f'));
    (is_uuid && says_something).then_some(uuid)
}

fn place(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::identity;

    const UUID: &str = "4fd5eb22-0f12-4f2d-9c9a-1d5d2f0e8a11";

    fn machine(root: &Path, flags: &str, processes: &str, uuid: &str) {
        for directory in ["proc/self/ns", "proc/1", "sys/class/dmi/id", "elsewhere"] {
            std::fs::create_dir_all(root.join(directory)).unwrap();
        }
        std::fs::write(root.join("proc/cpuinfo"), format!("model\t: x\nflags\t\t: fpu {flags} sse\n"))
            .unwrap();
        std::fs::write(root.join("sys/class/dmi/id/product_uuid"), format!("{uuid}\n")).unwrap();
        symlink(processes, root.join("proc/self/ns/pid")).unwrap();
        symlink(root, root.join("proc/1/root")).unwrap();
    }

    #[test]
    fn only_a_whole_virtual_machine_has_an_identity() {
        let of = |flags: &str, processes: &str, uuid: &str| {
            let root = tempfile::tempdir().unwrap();
            machine(root.path(), flags, processes, uuid);
            identity(root.path())
        };
        assert_eq!(of("hypervisor", "pid:[4026531836]", &UUID.to_uppercase()).as_deref(), Some(UUID));
        assert_eq!(of("avx", "pid:[4026531836]", UUID), None, "real hardware");
        assert_eq!(of("hypervisor", "pid:[4026532999]", UUID), None, "a container");
        assert_eq!(of("hypervisor", "pid:[4026531836]", "Not Settable"), None);
        assert_eq!(of("hypervisor", "pid:[4026531836]", "00000000-0000-0000-0000-000000000000"), None);
    }

    #[test]
    fn a_changed_root_and_hardware_that_says_so_by_its_maker() {
        let root = tempfile::tempdir().unwrap();
        machine(root.path(), "avx", "pid:[4026531836]", UUID);
        std::fs::write(root.path().join("sys/class/dmi/id/sys_vendor"), "QEMU\n").unwrap();
        assert_eq!(identity(root.path()).as_deref(), Some(UUID));
        std::fs::remove_file(root.path().join("proc/1/root")).unwrap();
        symlink(root.path().join("elsewhere"), root.path().join("proc/1/root")).unwrap();
        assert_eq!(identity(root.path()), None);
    }
}
