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
    /// Bytes of the files that the act was about; 0 when it was about none.
    data: u64,
    /// Bytes of the repository afterwards.
    stored: u64,
}

/// Done, and done with skipped items.
const FINE: [i32; 2] = [0, 3];

impl Stage {
    /// Makes the directory; it is removed again when this is dropped, unless it is to be kept.
    pub(super) fn new(program: PathBuf, keep: bool) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("mainstay-demo-").tempdir()?.keep();
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
        let typed: Vec<String> = paths.iter().map(|path| quoted(&path.to_string_lossy())).collect();
        say::command(&[shown, typed].concat().join(" "));
        let start = shell::moment();
        let status = command.status().context("cannot start mainstay")?;
        let wall = start.elapsed();
        let Some(exit) = status.code().filter(|code| FINE.contains(code)) else {
            bail!("mainstay failed ({status})");
        };
        if exit == 3 {
            say::line("(Exit status 3: done, but items were skipped, as listed. Root could read them.)");
        }
        let data = paths.iter().map(|path| size_of(path)).sum();
        self.acts.push(Act { what, wall, exit, data, stored: size_of(&self.repository()) });
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
        say::line(&format!(
            "{:24} {:>9} {:>6} {:>10} {:>16}",
            "act", "seconds", "exit", "data MiB", "repository MiB"
        ));
        for Act { what, wall, exit, data, stored } in &self.acts {
            let data = if *data == 0 { "–".to_owned() } else { in_mib(*data) };
            let (seconds, stored) = (wall.as_secs_f64(), in_mib(*stored));
            say::line(&format!("{what:24} {seconds:>9.2} {exit:>6} {data:>10} {stored:>16}"));
        }
        say::line(
            "A new repository sets some space aside, so that a full disk can still list, restore and collect.",
        );
    }
}

fn in_mib(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
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

/// Bytes of a file, or of all files below a directory; 0 for anything else.
fn size_of(path: &Path) -> u64 {
    let Ok(metadata) = fs::symlink_metadata(path) else { return 0 };
    if metadata.is_file() {
        return metadata.len();
    }
    let entries = if metadata.is_dir() { fs::read_dir(path).ok() } else { None };
    entries.into_iter().flatten().flatten().map(|entry| size_of(&entry.path())).sum()
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
