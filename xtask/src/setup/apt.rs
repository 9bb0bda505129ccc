//! Debian's package manager, run as root.

use std::process::Command;

use anyhow::Result;

use crate::{say, shell};

pub(super) struct Apt {
    /// What a command must start with to act as root.
    prefix: &'static [&'static str],
}

impl Apt {
    /// `None` when there is no way to act as root.
    pub(super) fn new() -> Result<Option<Self>> {
        let user = shell::capture(&mut shell::command("id", ["-u"]))?;
        Ok(match user.trim() {
            "0" => Some(Self { prefix: &[] }),
            _ if shell::has_program("sudo") => Some(Self { prefix: &["sudo"] }),
            _ => None,
        })
    }

    /// A command that acts as root.
    pub(super) fn as_root(&self, words: &[&str]) -> Command {
        let words = [self.prefix, words].concat();
        shell::command(words[0], &words[1..])
    }

    fn get(&self, words: &[&str]) -> Command {
        let quiet = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "--yes"];
        // Another apt may be at work; dpkg takes its lock back when it is done.
        self.as_root(&[quiet.as_slice(), &["-o", "DPkg::Lock::Timeout=300"], words].concat())
    }

    pub(super) fn update(&self, options: &[&str]) -> Result<()> {
        shell::run(&mut self.get(&[&["update"], options].concat()))
    }

    /// Whether apt sees a way to install them that removes nothing, by the package lists that are here.
    pub(super) fn sees_a_way(&self, options: &[&str], names: &[&str]) -> bool {
        let words = [&["install", "--simulate", "--no-remove", "--no-install-recommends"], options, names];
        shell::succeeds(&mut self.get(&words.concat()))
    }

    /// Tries with the package lists as they are, and renews them only when that fails: on a prepared machine
    /// nothing is fetched twice.
    pub(super) fn install(&self, names: &[&str]) -> Result<()> {
        if names.is_empty() {
            return Ok(());
        }
        if self.install_from(&[], names).is_ok() {
            return Ok(());
        }
        say::line("That needs newer package lists.");
        self.update(&[])?;
        self.install_from(&[], names)
    }

    pub(super) fn install_from(&self, options: &[&str], names: &[&str]) -> Result<()> {
        let words = [&["install", "--no-remove", "--no-install-recommends"], options, names];
        shell::run(&mut self.get(&words.concat()))
    }
}
