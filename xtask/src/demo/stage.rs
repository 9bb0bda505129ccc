//! The temporary directory of the demo, the commands that run there, and what came of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::{say, shell};

pub(super) struct Stage {
    directory: PathBuf,
    program: PathBuf,
    keep: bool,
    acts: Vec<Act>,
}

/// One row of the closing table.
struct Act {
    what: &'static str,
    wall: Duration,
    exit: i32,
    /// Bytes of the repository afterwards.
    stored: u64,
}

/// Done, and done with skipped items.
const FINE: [i32; 2] = [0, 3];

impl Stage {
    /// Makes the directory; it is removed again when this is dropped, unless it is to be kept.
    pub(super) fn new(program: PathBuf, keep: bool) -> Result<Self> {
        let made = shell::capture(&mut shell::command("mktemp", ["-d", "-t", "mainstay-demo-XXXXXX"]))?;
        let directory = PathBuf::from(made.trim_end());
        fs::create_dir(directory.join("home"))?;
        Ok(Self { directory, program, keep, acts: Vec::new() })
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) const fn keeps(&self) -> bool {
        self.keep
    }

    pub(super) fn say(&self, text: &str) {
        say::step(text);
    }

    /// Runs `mainstay` with the words and then the paths; a skipped item is no failure, but anything else is.
    pub(super) fn mainstay(&mut self, what: &'static str, words: &[&str], paths: &[PathBuf]) -> Result<()> {
        let mut command = self.command();
        command.args(words).args(paths);
        let shown: Vec<String> = ["mainstay"].iter().chain(words).map(|word| quoted(word)).collect();
        let paths: Vec<String> = paths.iter().map(|path| quoted(&path.to_string_lossy())).collect();
        say::command(&[shown, paths].concat().join(" "));
        let start = shell::moment();
        let status = command.status().context("cannot start mainstay")?;
        let wall = start.elapsed();
        let Some(exit) = status.code().filter(|code| FINE.contains(code)) else {
            bail!("mainstay failed ({status})");
        };
        if exit == 3 {
            say::line("(Exit status 3: done, but items were skipped, as listed. Root could read them.)");
        }
        self.acts.push(Act { what, wall, exit, stored: size_of(&self.repository()) });
        Ok(())
    }

    /// `mainstay` with its home in the directory.
    fn command(&self) -> Command {
        let program = self.program.to_string_lossy().into_owned();
        let mut command = shell::command(&program, [""; 0]);
        shell::at_home(&mut command, &self.directory.join("home"))
            .env("MAINSTAY_REPOSITORY", self.repository());
        for other in ["KEY_FILE", "PASSPHRASE_FILE", "PASSPHRASE_COMMAND"] {
            command.env_remove(format!("MAINSTAY_{other}"));
        }
        command
    }

    fn repository(&self) -> PathBuf {
        self.directory.join("repository")
    }

    /// Lets `diff` compare two files or trees, links and all.
    pub(super) fn same(&self, one: &Path, other: &Path) -> Result<()> {
        let mut diff = shell::command("diff", ["--recursive", "--brief", "--no-dereference"]);
        diff.arg(one).arg(other);
        shell::run(&mut diff).context("what was restored differs")?;
        say::line("identical");
        Ok(())
    }

    /// What happened, in one table.
    pub(super) fn table(&self) {
        say::step("what happened");
        say::line(&format!("{:24} {:>9} {:>6} {:>16}", "act", "seconds", "exit", "repository MiB"));
        for act in &self.acts {
            let (seconds, mib) = (act.wall.as_secs_f64(), act.stored as f64 / f64::from(1 << 20));
            say::line(&format!("{:24} {seconds:>9.2} {:>6} {mib:>16.1}", act.what, act.exit));
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if self.keep {
            say::line(&format!("\nEverything is in {} and stays there.", self.directory.display()));
            return;
        }
        // Restored directories may be read-only.
        let open =
            ["-R", "u+rwX"].map(Into::into).into_iter().chain([self.directory.clone().into_os_string()]);
        let opened = shell::succeeds(&mut shell::command("chmod", open));
        let directory = self.directory.display();
        let end = match fs::remove_dir_all(&self.directory) {
            Ok(()) => format!("{directory} is removed; nothing is left behind."),
            Err(error) => format!("{directory} could not be removed ({error}; made writable: {opened})."),
        };
        say::line(&format!("\n{end}"));
    }
}

/// As one would type it in a shell.
fn quoted(word: &str) -> String {
    let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./:~@=,+".contains(letter);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

/// Bytes of all files below a directory; 0 when it is not there.
fn size_of(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => size_of(&entry.path()),
        Ok(kind) if kind.is_file() => entry.metadata().map_or(0, |metadata| metadata.len()),
        _ => 0,
    });
    sizes.sum()
}

#[cfg(test)]
mod tests {
    use super::quoted;

    #[test]
    fn shown_commands_can_be_typed() {
        assert_eq!(quoted("/etc/nginx"), "/etc/nginx");
        assert_eq!(quoted("it's here"), r"'it'\''s here'");
    }
}
