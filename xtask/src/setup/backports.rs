//! Packages that must fit what is installed already, from Debian's backports when the release itself has none that do.

use anyhow::{Result, bail};

use super::apt::Apt;
use crate::{say, shell};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Installs them from the release where that breaks nothing, else from its backports.
///
/// qemu-utils of one version refuses an emulator of a much older one, and apt knows; so apt is asked, and no version
/// is compared here.
pub(super) fn install_fitting(apt: &Apt, names: &[&str]) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    if !apt.sees_a_way(&[], names) {
        say::line("By the package lists that are here they do not fit what is installed. Are the lists old?");
        apt.update(&[])?;
    }
    if apt.sees_a_way(&[], names) {
        return apt.install_from(&[], names);
    }
    let Some(release) = Release::of(&index_targets()?) else {
        bail!(
            "apt knows no Debian mirror to take {} from; what does `apt-get indextargets` say?",
            names.join(" ")
        );
    };
    let suite = release.backports();
    let pins = shell::target_directory()?.join("setup-pins");
    std::fs::create_dir_all(pins.parent().unwrap_or(&pins))?;
    std::fs::write(&pins, release.pins())?;
    let pins = format!("Dir::Etc::preferences={}", pins.display());
    let from = ["-o", pins.as_str()];
    if !apt.sees_a_way(&from, names) {
        say::line(&format!(
            "{} has none that fit what is installed (a qemu-utils from {suite}, most likely), so they come from there.",
            release.codename
        ));
        add(apt, &release)?;
    }
    if !apt.sees_a_way(&from, names) {
        bail!(
            "neither {} nor {suite} has {} that fit what is installed.\n\
             `apt-get install --simulate {}` says what is in the way.\n{}",
            release.codename,
            names.join(" "),
            names.join(" "),
            release.way_back()
        );
    }
    apt.install_from(&from, names)
}

/// Adds the suite to apt's sources, and takes it away again when the mirror does not have it.
fn add(apt: &Apt, release: &Release) -> Result<()> {
    let suite = release.backports();
    let entry = format!("/etc/apt/sources.list.d/{suite}.sources");
    say::line(&format!("Adding {suite} from {} as {entry}.", release.mirror));
    let write = r#"umask 022; printf %s "$1" > "$2""#;
    shell::run(&mut apt.as_root(&["sh", "-c", write, "sh", &release.source(), &entry]))?;
    // Only the new list, so that trouble with another source is not blamed on this one.
    let list = format!("Dir::Etc::sourcelist={entry}");
    let only = ["-o", &list, "-o", "Dir::Etc::sourceparts=-", "-o", "APT::Get::List-Cleanup=0"];
    // apt reports a suite that is missing as an error only when told to.
    let strict = ["-o", "APT::Update::Error-Mode=any"];
    if apt.update(&[only.as_slice(), &strict].concat()).is_err() {
        shell::run(&mut apt.as_root(&["rm", &entry]))?;
        bail!(
            "the mirror {} has no suite {suite}, or it cannot be reached; {entry} is gone again.\n{}",
            release.mirror,
            release.way_back()
        );
    }
    Ok(())
}

/// The package lists that apt is set up with, as fields.
fn index_targets() -> Result<String> {
    let format = "$(CODENAME)|$(LABEL)|$(COMPONENT)|$(REPO_URI)";
    shell::capture(&mut shell::command(
        "apt-get",
        ["indextargets", "--format", format, "Created-By: Packages"],
    ))
}

/// The Debian release of this machine, by the source that apt has for it.
#[derive(Debug, PartialEq, Eq)]
struct Release {
    codename: String,
    mirror: String,
}

impl Release {
    /// The first source of Debian itself: its codename has no `-security`, `-updates` or `-backports` after it.
    fn of(targets: &str) -> Option<Self> {
        targets.lines().find_map(|line| {
            let mut fields = line.split('|');
            let (codename, label, component) = (fields.next()?, fields.next()?, fields.next()?);
            let base = label == "Debian" && component == "main" && !codename.contains('-');
            base.then_some(Self { codename: codename.to_owned(), mirror: fields.next()?.to_owned() })
        })
    }

    fn backports(&self) -> String {
        format!("{}-backports", self.codename)
    }

    /// An entry for apt. The suite's own priority is so low that nothing is upgraded by its mere presence.
    fn source(&self) -> String {
        let suite = self.backports();
        format!(
            "Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\nSigned-By: {KEYRING}\n",
            self.mirror
        )
    }

    /// What comes from the suite in this one run; with `--target-release` all that these depend on would come too.
    fn pins(&self) -> String {
        let suite = self.backports();
        format!("Package: src:qemu src:libvirt src:seabios\nPin: release n={suite}\nPin-Priority: 500\n")
    }

    fn way_back(&self) -> String {
        format!(
            "Without backports, go back to the release's own qemu-utils and run this again:\n  \
             apt-get install --allow-downgrades qemu-utils/{}",
            self.codename
        )
    }
}

#[cfg(test)]
mod tests {
    use super::Release;

    #[test]
    fn the_mirror_is_the_one_apt_uses_for_the_release_itself() {
        let targets = "nodistro|. nodistro|main|https://example.org/node/\n\
                       bookworm-security|Debian-Security|main|http://mirror/debian-security/\n\
                       bookworm-updates|Debian|main|http://mirror/debian/\n\
                       bookworm|Debian|contrib|http://other/debian/\n\
                       bookworm|Debian|main|http://mirror/debian/\n";
        let release = Release::of(targets).unwrap();
        assert_eq!(
            (release.codename.as_str(), release.mirror.as_str()),
            ("bookworm", "http://mirror/debian/")
        );
        assert!(release.source().contains("Suites: bookworm-backports\n"), "{}", release.source());
        assert_eq!(Release::of("stable|Other|main|http://mirror/\n"), None);
    }
}
