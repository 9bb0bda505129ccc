//! `cargo xtask setup`: the programs that tests, demo and benchmarks call, from Debian's own packages.

use anyhow::{Context as _, Result};

use crate::arguments::Arguments;
use crate::{Verb, say, shell};

pub(crate) const VERB: Verb = Verb {
    name: "setup",
    summary: "installs what the tests and the demo need, from Debian's packages",
    details:
        "Says which packages are missing and what for, then installs them with apt-get: directly as root, with
sudo otherwise. When everything is there it does nothing. On another system it prints the list and goes on.

  --bench   also what `cargo xtask bench` needs: the tools Mainstay is compared with",
    switches: &["--bench"],
    options: &[],
    run: |arguments: &Arguments| run(arguments.has("--bench")),
};

/// A Debian package and the reason for it.
type Package = (&'static str, &'static str);

const TESTS: &[Package] = &[
    ("btrfs-progs", "mkfs.btrfs and btrfs, to take snapshots of a file system of the tests' own"),
    ("diffutils", "diff, the demo's judge of what was restored"),
    ("e2fsprogs", "mkfs.ext4, for small disks that fill up and lose power"),
    ("lvm2", "vgcreate and lvcreate, for snapshots of logical volumes where the kernel has them"),
    ("mount", "mount, for all of these"),
];

const BENCH: &[Package] = &[
    ("restic", "a peer to be compared with"),
    ("borgbackup", "a peer to be compared with"),
    ("zstd", "the limit that compression sets"),
];

/// Makes sure of the packages for the tests, and with `bench` of those for the benchmarks too.
pub(crate) fn run(bench: bool) -> Result<()> {
    let wanted: Vec<Package> = TESTS.iter().chain(if bench { BENCH } else { &[] }).copied().collect();
    if !shell::has_program("dpkg-query") {
        say::line("This is not a Debian system, so please see to it that you have what these packages hold:");
        list(&wanted);
        return Ok(());
    }
    let missing = missing(&wanted)?;
    if missing.is_empty() {
        return Ok(());
    }
    say::step("setup: these Debian packages are missing and will be installed");
    list(&missing);
    let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    let Some(prefix) = privilege()? else {
        say::line(&format!(
            "Neither root nor sudo is here to install them. The tests that need one of them will fail and name it.\n\
             Ask for: apt-get install {}",
            names.join(" ")
        ));
        return Ok(());
    };
    install(&prefix, &names)
}

/// What a command must start with to act as root; `None` when there is no way.
fn privilege() -> Result<Option<Vec<&'static str>>> {
    let user = shell::capture(&mut shell::command("id", ["-u"]))?;
    Ok(match user.trim() {
        "0" => Some(vec![]),
        _ if shell::has_program("sudo") => Some(vec!["sudo"]),
        _ => None,
    })
}

/// Tries with the package lists as they are, and renews them only when that fails: on a prepared machine nothing
/// is fetched twice.
fn install(prefix: &[&str], names: &[&str]) -> Result<()> {
    let quiet = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "--yes"];
    let apt = |arguments: &[&str]| {
        let words = [prefix, &quiet, arguments].concat();
        shell::command(words[0], &words[1..])
    };
    let install = [&["install", "--no-install-recommends"], names].concat();
    let mut first = apt(&install);
    say::command(&shell::shown(&first));
    if shell::succeeds(&mut first) {
        return Ok(());
    }
    say::line("That needs newer package lists.");
    shell::run(&mut apt(&["update"]))?;
    shell::run(&mut apt(&install)).context("the packages cannot be installed; is the network there?")
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
    for (name, reason) in packages {
        say::line(&format!("  {name:12} {reason}"));
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
