//! `cargo xtask setup`: the programs that tests, demo and benchmarks call, from Debian's own packages.

mod apt;
mod backports;

use anyhow::{Context as _, Result};

use self::apt::Apt;
use crate::arguments::Arguments;
use crate::{Verb, say, shell};

pub(crate) const VERB: Verb = Verb {
    name: "setup",
    summary: "installs what the tests and the demo need, from Debian's packages",
    details:
        "Says which packages are missing and what for, then installs them with apt-get: directly as root, with
sudo otherwise. When everything is there it says so and does nothing. On another system it prints the list and goes on.

QEMU and libvirt must fit each other and what is installed already: where qemu-utils comes from Debian's backports,
so must the emulator. The backports suite is added only then, from the mirror that apt uses anyway, and at a priority
that upgrades nothing else. The tests start a libvirt of their own and leave that of the machine alone. The packages of
the small guest that they boot go to cargo's target directory and are not installed.

  --bench   also what `cargo xtask bench` needs: the tools Mainstay is compared with",
    switches: &["--bench"],
    options: &[],
    run: |arguments: &Arguments| run(arguments.has("--bench")),
};

/// A Debian package and the reason for it.
type Package = (&'static str, &'static str);

const TESTS: &[Package] = &[
    ("attr", "setfattr, for image files whose attributes are compared"),
    ("btrfs-progs", "mkfs.btrfs and btrfs, to take snapshots of a file system of the tests' own"),
    ("cpio", "packs the first file system of the small guest"),
    ("cryptsetup-bin", "cryptsetup, for encrypted volumes that are read without the kernel"),
    ("diffutils", "diff, the demo's judge of what was restored"),
    ("dosfstools", "mkfs.fat, for images that are read without mounting"),
    ("e2fsprogs", "mkfs.ext4 and e2fsck, for small disks that fill up and lose power, and for guests"),
    ("erofs-utils", "mkfs.erofs, for a volume that only the kernel reads"),
    ("fdisk", "sfdisk, a second opinion on partition tables"),
    ("gdisk", "sgdisk, partitions the disks of guests"),
    ("kmod", "modprobe, finds the drivers that the small guest needs"),
    ("libnbd-bin", "nbdinfo and nbdcopy, a second opinion on what our NBD server says"),
    ("lvm2", "vgcreate and lvcreate, for snapshots of logical volumes where the kernel has them"),
    ("mariadb-backup", "reads the files of MariaDB servers, for Mainstay as well"),
    ("mariadb-client", "plays binary logs back and checks tables"),
    ("mariadb-server", "servers of the tests' own; that of the machine is not needed"),
    ("mount", "mount, for all of these"),
    ("mtools", "mcopy, fills FAT file systems where the kernel knows none, and reads them for comparison"),
    ("ntfs-3g", "mkntfs and ntfs-3g, for images that are read without mounting"),
    ("postgresql", "servers of the tests' own, and PostgreSQL's programs as judges of what was restored"),
    ("sqlite3", "SQLite's shell, the program that databases of the tests belong to"),
    ("squashfs-tools", "mksquashfs, likewise"),
    ("util-linux", "setpriv, because PostgreSQL does not run as root"),
    ("xfsprogs", "mkfs.xfs, for images that are read without mounting"),
];

/// What must fit together, and with whatever of it is installed already. Not libvirt-daemon-system, which would set up
/// networks and a firewall.
const GUESTS: &[Package] = &[
    ("libvirt-clients", "virsh, for the driver of libvirt hosts"),
    ("libvirt-daemon", "libvirtd, which a test starts for itself"),
    ("libvirt-daemon-driver-qemu", "what connects libvirtd and the emulator"),
    ("qemu-system-x86", "the emulator, for guests that are backed up while they run"),
    ("qemu-utils", "qemu-img, qemu-nbd and qemu-storage-daemon, which plays a guest in milliseconds"),
];

const BENCH: &[Package] = &[
    ("openssl", "certificates for a backup by proxy"),
    ("restic", "a peer to be compared with"),
    ("borgbackup", "a peer to be compared with"),
    ("virtnbdbackup", "a peer to be compared with: machines of libvirt"),
    ("zstd", "the limit that compression sets"),
];

/// Makes sure of the packages for the tests, and with `bench` of those for the benchmarks too.
pub(crate) fn run(bench: bool) -> Result<()> {
    let plain: Vec<Package> = TESTS.iter().chain(if bench { BENCH } else { &[] }).copied().collect();
    if !shell::has_program("dpkg-query") {
        say::line("This is not a Debian system, so please see to it that you have what these packages hold:");
        list(&[&plain, GUESTS].concat());
        return Ok(());
    }
    let (plain, guests) = (missing(&plain)?, missing(GUESTS)?);
    let apt = Apt::new()?;
    if plain.is_empty() && guests.is_empty() {
        say::line("setup: every Debian package that is needed is installed.");
    } else {
        say::step("setup: these Debian packages are missing and will be installed");
        let all = [plain.as_slice(), &guests].concat();
        list(&all);
        let Some(apt) = &apt else {
            say::line(&format!(
                "Neither root nor sudo is here to install them. The tests that need one of them will fail and name it.\n\
                 Ask for: apt-get install {}",
                names(&all).join(" ")
            ));
            return Ok(());
        };
        apt.install(&names(&plain)).context("the packages cannot be installed; is the network there?")?;
        backports::install_fitting(apt, &names(&guests))?;
    }
    fetch_guest(apt.as_ref())
}

/// Brings what the tests build their small guest from, without installing it.
fn fetch_guest(apt: Option<&Apt>) -> Result<()> {
    let packages = shell::target_directory()?.join("guest/packages");
    let packages = packages.to_string_lossy();
    let fetch = || shell::command("sh", ["crates/testkit/guest/fetch.sh", &packages]);
    if shell::succeeds(&mut fetch()) {
        return Ok(());
    }
    if let Some(apt) = apt {
        say::line("The small guest's packages cannot be fetched by the package lists that are here.");
        apt.update(&[])?;
    }
    shell::run(&mut fetch()).context("no packages for the tests' guest; is the network there?")
}

fn names(packages: &[Package]) -> Vec<&'static str> {
    packages.iter().map(|(name, _)| *name).collect()
}

fn missing(wanted: &[Package]) -> Result<Vec<Package>> {
    let names = wanted.iter().map(|(name, _)| *name);
    let arguments = ["--show", "--showformat=${Package} ${db:Status-Status}\n"].into_iter().chain(names);
    // dpkg-query fails when it has never heard of one of the names, but still tells about the others.
    let told = shell::output(&mut shell::command("dpkg-query", arguments))?;
    Ok(not_installed(wanted, &String::from_utf8_lossy(&told.stdout)))
}

fn not_installed(wanted: &[Package], told: &str) -> Vec<Package> {
    let installed = |name: &str| told.lines().any(|line| line.split_once(' ') == Some((name, "installed")));
    wanted.iter().filter(|(name, _)| !installed(name)).copied().collect()
}

fn list(packages: &[Package]) {
    let width = packages.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
    for (name, reason) in packages {
        say::line(&format!("  {name:width$}  {reason}"));
    }
}

#[cfg(test)]
mod tests {
    use super::not_installed;

    #[test]
    fn a_removed_package_and_one_never_heard_of_are_both_missing() {
        let wanted = [("acl", "a"), ("attr", "b"), ("restic", "c")];
        let told = "acl not-installed\nattr installed\nattr-extra installed\n";
        assert_eq!(not_installed(&wanted, told), [("acl", "a"), ("restic", "c")]);
    }
}
