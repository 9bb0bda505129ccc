//! `cargo xtask tidy`: the rules of this project that no other tool checks. Each is a small function from the files
//! of the checkout to a list of complaints.

mod documents;
mod edges;
mod files;

use anyhow::{Context as _, Result, bail};

use crate::arguments::Arguments;
use crate::{Verb, say, shell};

pub(crate) const VERB: Verb = Verb {
    name: "tidy",
    summary: "checks the rules of this project that no other tool knows",
    details: "File length, crate edges, forgotten source files, who may print, names of this machine, hollow places,
links in the documents, tests they name, decision records, the table of exit codes, subcommands nobody documented.
Every complaint says what to do. A rule is changed in xtask/src/tidy/, with a reason.

  --fix   writes the generated documents anew (docs/exit-codes.md)",
    switches: &["--fix"],
    options: &[],
    run: |arguments: &Arguments| run(arguments.has("--fix")),
};

/// A file of the checkout that Git tracks or would track.
struct File {
    /// Relative to the checkout.
    path: String,
    /// `None` when it is not text.
    text: Option<String>,
}

impl File {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    fn is_markdown(&self) -> bool {
        self.path.ends_with(".md")
    }

    fn text(&self) -> &str {
        self.text.as_deref().unwrap_or_default()
    }

    /// The lines with their numbers, counted from 1.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text().lines().enumerate().map(|(index, line)| (index + 1, line))
    }
}

pub(crate) fn run(fix: bool) -> Result<()> {
    if fix {
        let path = shell::root().join(documents::EXIT_CODES);
        std::fs::write(&path, documents::exit_codes())
            .with_context(|| format!("cannot write {}", path.display()))?;
        say::line(&format!("wrote {}", documents::EXIT_CODES));
    }
    let files = read_checkout()?;
    let packages = edges::read_packages()?;
    let complaints = [
        files::too_long(&files),
        files::hollow(&files),
        files::printing(&files),
        files::naming_a_machine(&files, &files::machine_names()),
        files::forgotten(&files, &edges::target_roots(&packages)),
        edges::forbidden(&packages),
        documents::broken_links(&files),
        documents::missing_tests(&files),
        documents::unlisted_decisions(&files),
        documents::stale_exit_codes(&files),
        documents::unmentioned_subcommands(&files),
    ]
    .concat();
    for complaint in &complaints {
        say::line(complaint);
    }
    match complaints.len() {
        0 => Ok(()),
        1 => bail!("tidy has one complaint"),
        count => bail!("tidy has {count} complaints"),
    }
}

fn read_checkout() -> Result<Vec<File>> {
    let listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let listed = shell::capture(&mut shell::command("git", listing))?;
    let mut paths: Vec<&str> = listed.split_terminator('\0').collect();
    paths.sort_unstable();
    paths.dedup();
    // A file that is deleted but not yet committed is listed and absent.
    let present = paths.into_iter().filter(|path| shell::root().join(path).is_file());
    let read = |path: &str| {
        let bytes = std::fs::read(shell::root().join(path)).with_context(|| format!("cannot read {path}"))?;
        Ok(File { path: path.to_owned(), text: String::from_utf8(bytes).ok() })
    };
    present.map(read).collect()
}

#[cfg(test)]
fn file(path: &str, text: &str) -> File {
    File { path: path.to_owned(), text: Some(text.to_owned()) }
}
