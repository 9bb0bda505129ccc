//! The tools that are measured, each through its public command line.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::{say, shell};

/// Where one tool works in one round.
pub(super) struct Place {
    pub(super) source: PathBuf,
    pub(super) repository: PathBuf,
    pub(super) restored: PathBuf,
    /// Home directory of the tool: caches, keys and settings stay here.
    pub(super) home: PathBuf,
    pub(super) log: PathBuf,
    work: PathBuf,
}

impl Place {
    pub(super) fn fresh(work: &Path, source: &Path) -> Result<Self> {
        let place = Self {
            source: source.to_owned(),
            repository: work.join("repository"),
            restored: work.join("restored"),
            home: work.join("home"),
            log: work.join("log"),
            work: work.to_owned(),
        };
        place.clear()?;
        std::fs::create_dir_all(&place.home)
            .with_context(|| format!("cannot create {}", place.home.display()))?;
        Ok(place)
    }

    /// Removes what was made, after a round.
    pub(super) fn remove(self) -> Result<()> {
        self.clear()
    }

    fn clear(&self) -> Result<()> {
        // Only what this program makes: the directory was named by a person and may hold other things.
        for path in [&self.repository, &self.restored, &self.home] {
            if path.exists() {
                std::fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        for path in [self.log.clone(), self.work.join("restored.zst"), self.work.join("passphrase")] {
            if path.exists() {
                std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
        }
        Ok(())
    }
}

/// A tool that backs up. `name` of a backup is the phase it was made in.
pub(super) trait Peer {
    fn name(&self) -> &'static str;
    fn version(&self) -> Result<String>;
    fn init(&self, place: &Place) -> Result<()>;
    fn backup(&self, place: &Place, name: &str) -> Command;
    /// Restores the backup of this name into `place.restored`.
    fn restore(&self, place: &Place, name: &str) -> Command;
    /// Reads and checks every stored byte.
    fn check(&self, place: &Place) -> Command;
}

pub(super) fn find(name: &str) -> Result<Box<dyn Peer>> {
    Ok(match name {
        "mainstay" => Box::new(Mainstay { program: release_build()? }),
        "restic" => Box::new(Restic),
        "borg" => Box::new(Borg),
        other => bail!("there is no peer {other}; known are mainstay, restic and borg"),
    })
}

/// A command in a home directory of its own.
fn at_home(program: &str, place: &Place, arguments: &[&str]) -> Command {
    let mut command = shell::command(program, arguments);
    shell::at_home(&mut command, &place.home);
    command
}

/// Runs without a word unless it fails.
pub(super) fn quietly(command: &mut Command) -> Result<()> {
    let text = shell::shown(command);
    let done = shell::output(command)?;
    if !done.status.success() {
        bail!("{text} failed ({}): {}", done.status, String::from_utf8_lossy(&done.stderr));
    }
    Ok(())
}

fn version_of(program: &str, argument: &str) -> Result<String> {
    let text = shell::capture(&mut shell::command(program, [argument]))?;
    Ok(text.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
}

struct Mainstay {
    program: String,
}

/// Builds what is measured: the optimised binary.
pub(super) fn release_build() -> Result<String> {
    say::step("building mainstay for release");
    let build = ["build", "--release", "--locked", "--package", "mainstay"];
    shell::run(&mut shell::cargo(build))?;
    let program = shell::target_directory()?.join("release/mainstay");
    Ok(super::text(&program)?.to_owned())
}

impl Mainstay {
    fn command(&self, place: &Place, arguments: &[&str]) -> Command {
        let mut command = at_home(&self.program, place, arguments);
        command.env("MAINSTAY_REPOSITORY", &place.repository);
        command.env("MAINSTAY_PASSPHRASE_FILE", place.work.join("passphrase"));
        command
    }
}

impl Peer for Mainstay {
    fn name(&self) -> &'static str {
        "mainstay"
    }

    fn version(&self) -> Result<String> {
        version_of(&self.program, "--version")
    }

    fn init(&self, place: &Place) -> Result<()> {
        std::fs::write(place.work.join("passphrase"), "only for measuring\n")?;
        quietly(&mut self.command(place, &["init"]))
    }

    fn backup(&self, place: &Place, _name: &str) -> Command {
        let mut command = self.command(place, &["backup"]);
        command.arg(&place.source);
        command
    }

    fn restore(&self, place: &Place, _name: &str) -> Command {
        let mut command = self.command(place, &["restore", "latest", "--to"]);
        command.arg(&place.restored);
        command
    }

    fn check(&self, place: &Place) -> Command {
        self.command(place, &["verify", "--read-data"])
    }
}

struct Restic;

impl Restic {
    fn command(place: &Place, arguments: &[&str]) -> Command {
        let mut command = at_home("restic", place, &[&["-q"], arguments].concat());
        command.env("RESTIC_PASSWORD", "only for measuring").env("RESTIC_REPOSITORY", &place.repository);
        command
    }
}

impl Peer for Restic {
    fn name(&self) -> &'static str {
        "restic"
    }

    fn version(&self) -> Result<String> {
        version_of("restic", "version")
    }

    fn init(&self, place: &Place) -> Result<()> {
        quietly(&mut Self::command(place, &["init", "--repository-version", "2"]))
    }

    fn backup(&self, place: &Place, _name: &str) -> Command {
        let mut command = Self::command(place, &["backup"]);
        command.arg(&place.source);
        command
    }

    fn restore(&self, place: &Place, _name: &str) -> Command {
        let mut command = Self::command(place, &["restore", "latest", "--target"]);
        command.arg(&place.restored);
        command
    }

    fn check(&self, place: &Place) -> Command {
        Self::command(place, &["check", "--read-data"])
    }
}

struct Borg;

impl Borg {
    fn command(place: &Place, arguments: &[&str]) -> Command {
        let mut command = at_home("borg", place, arguments);
        command.env("BORG_PASSPHRASE", "only for measuring").env("BORG_REPO", &place.repository);
        command.env("BORG_BASE_DIR", &place.home);
        command
    }
}

impl Peer for Borg {
    fn name(&self) -> &'static str {
        "borg"
    }

    fn version(&self) -> Result<String> {
        version_of("borg", "--version")
    }

    fn init(&self, place: &Place) -> Result<()> {
        quietly(&mut Self::command(place, &["init", "--encryption", "repokey-blake2"]))
    }

    fn backup(&self, place: &Place, name: &str) -> Command {
        // zstd at level 3, which the other two use by themselves.
        let archive = format!("::{name}");
        let mut command = Self::command(place, &["create", "--compression", "zstd,3", &archive]);
        command.arg(&place.source);
        command
    }

    fn restore(&self, place: &Place, name: &str) -> Command {
        // borg extracts into the current directory, which must exist by the time the command starts.
        let archive = format!("::{name}");
        let mut command = Self::command(place, &["extract", &archive]);
        command.current_dir(&place.restored);
        command
    }

    fn check(&self, place: &Place) -> Command {
        Self::command(place, &["check", "--verify-data"])
    }
}
