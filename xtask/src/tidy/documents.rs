//! Rules about the documents: they lead somewhere, and what is generated is fresh.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use mainstay_core::Code;

use super::File;
use crate::shell;

pub(super) const EXIT_CODES: &str = "docs/exit-codes.md";
const DECISIONS: &str = "docs/decisions/";
const DECISIONS_LIST: &str = "docs/decisions/README.md";

/// The text of docs/exit-codes.md, from the one table in the code.
pub(super) fn exit_codes() -> String {
    let mut text = String::from(
        "# Exit codes\n\n\
         Written by `cargo xtask tidy --fix` from the table in `crates/core/src/error.rs`; edit that one.\n\n\
         The exit status is for scripts, the name is in every `--json` error, and neither ever changes its meaning.\n\
         A status that is not listed here means that the command failed.\n\n\
         | status | name | meaning |\n|---|---|---|\n| 0 | done | everything that was asked for is done |\n",
    );
    let mut codes = Code::ALL.to_vec();
    codes.sort_by_key(|code| code.exit());
    for code in codes {
        // Writing into a string cannot fail.
        let _infallible = writeln!(text, "| {} | {} | {} |", code.exit(), code.name(), code.meaning());
    }
    text
}

pub(super) fn stale_exit_codes(files: &[File]) -> Vec<String> {
    let fresh = files.iter().any(|file| file.path == EXIT_CODES && file.text() == exit_codes());
    if fresh {
        vec![]
    } else {
        vec![format!("{EXIT_CODES}: not as in the code; run `cargo xtask tidy --fix`")]
    }
}

pub(super) fn broken_links(files: &[File]) -> Vec<String> {
    let mut known: BTreeSet<&str> = files.iter().map(|file| file.path.as_str()).collect();
    let directories = files.iter().flat_map(|file| std::path::Path::new(&file.path).ancestors().skip(1));
    known.extend(directories.filter_map(std::path::Path::to_str));
    let mut complaints = Vec::new();
    for file in files.iter().filter(|file| file.is_markdown()) {
        for (number, line) in file.lines() {
            for target in relative_links(line) {
                if !known.contains(resolve(&file.path, target).as_str()) {
                    complaints.push(format!("{}:{number}: the link to {target} leads nowhere", file.path));
                }
            }
        }
    }
    complaints
}

/// The targets of `[text](target)` in a line that point into the checkout, without their fragments.
fn relative_links(line: &str) -> impl Iterator<Item = &str> {
    let targets = line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target);
    let inside = targets.filter(|target| !target.contains("://") && !target.starts_with("mailto:"));
    inside.filter_map(|target| target.split('#').next()).filter(|target| !target.is_empty())
}

/// The path, from the checkout, that a link in the file `from` means.
fn resolve(from: &str, target: &str) -> String {
    let mut parts: Vec<&str> = from.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            name => parts.push(name),
        }
    }
    parts.join("/")
}

/// A document that names a test as the holder of a promise names one that exists.
pub(super) fn missing_tests(files: &[File]) -> Vec<String> {
    let functions: BTreeSet<&str> =
        files.iter().filter(|file| file.is_rust()).flat_map(function_names).collect();
    let mut complaints = Vec::new();
    for file in files.iter().filter(|file| file.is_markdown()) {
        for (number, line) in file.lines() {
            for name in test_names(line).filter(|name| !functions.contains(name)) {
                complaints.push(format!("{}:{number}: there is no test {name}", file.path));
            }
        }
    }
    complaints
}

fn function_names(file: &File) -> impl Iterator<Item = &str> {
    let after = file.text().split("fn ").skip(1);
    after.map(|rest| {
        rest.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_').next().unwrap_or(rest)
    })
}

/// Words in backticks that read like the sentences our tests are named by: four words or more.
fn test_names(line: &str) -> impl Iterator<Item = &str> {
    let quoted = line.split('`').skip(1).step_by(2);
    let plain = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_';
    quoted.filter(move |word| word.chars().all(plain) && word.matches('_').count() >= 3)
}

pub(super) fn unlisted_decisions(files: &[File]) -> Vec<String> {
    let list = files.iter().find(|file| file.path == DECISIONS_LIST).map_or("", File::text);
    let records = files.iter().filter_map(|file| file.path.strip_prefix(DECISIONS));
    records
        .filter(|name| *name != "README.md" && !list.contains(&format!("]({name})")))
        .map(|name| format!("{DECISIONS}{name}: not linked from {DECISIONS_LIST}"))
        .collect()
}

/// Asks the binary for its subcommands, and looks for each in the documents that teach.
pub(super) fn unmentioned_subcommands(files: &[File]) -> Vec<String> {
    let run = ["run", "--quiet", "--locked", "--package", "mainstay", "--", "help"];
    match shell::capture(&mut shell::cargo(run)) {
        Ok(help) => unmentioned(files, &subcommands(&help)),
        Err(error) => vec![format!("the subcommands are not known: {error:#}")],
    }
}

fn unmentioned(files: &[File], names: &[&str]) -> Vec<String> {
    let guides =
        files.iter().filter(|file| file.path == "README.md" || file.path.starts_with("docs/guides/"));
    let text: String = guides.map(File::text).collect();
    let complaint = |name: &&&str| !text.contains(&format!("mainstay {name}"));
    let missing = names.iter().filter(complaint);
    missing.map(|name| format!("`mainstay {name}` is in neither README.md nor docs/guides/")).collect()
}

/// The names under "Commands:" in the help of the binary.
fn subcommands(help: &str) -> Vec<&str> {
    let listed = help.lines().skip_while(|line| !line.starts_with("Commands:")).skip(1);
    let entries = listed.take_while(|line| line.starts_with(' ')).filter(|line| !line.starts_with("   "));
    entries.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").collect()
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::{
        broken_links, exit_codes, missing_tests, stale_exit_codes, subcommands, unlisted_decisions,
        unmentioned,
    };

    #[test]
    fn links_are_followed_from_where_they_stand() {
        let text = "[a](../README.md#top) [b](decisions/) [c](https://example.org/x) [d](gone.md) [e](#here)";
        let files = [file("README.md", ""), file("docs/x.md", text), file("docs/decisions/README.md", "")];
        let complaints = broken_links(&files);
        assert!(matches!(&complaints[..], [only] if only.contains("docs/x.md:1: the link to gone.md")));
    }

    #[test]
    fn a_promise_held_by_a_test_that_is_gone_is_found() {
        let files = [
            file("a.rs", "#[test]\nfn a_test_that_is_there() {}\nfn a_test_that_is_gone_for_good() {}"),
            file("A.md", "| x | `a_test_that_is_there`, `too_short` |\n| y | `a_test_that_is_gone` |"),
        ];
        let complaints = missing_tests(&files);
        assert!(
            matches!(&complaints[..], [only] if only.starts_with("A.md:2: there is no test")),
            "{complaints:?}"
        );
    }

    #[test]
    fn decisions_must_be_listed_and_exit_codes_fresh() {
        let files = [
            file("docs/decisions/README.md", "[one](0001-one.md)"),
            file("docs/decisions/0001-one.md", ""),
            file("docs/decisions/0002-two.md", ""),
            file("docs/exit-codes.md", &exit_codes().replace("| 20 |", "| 21 |")),
        ];
        assert!(matches!(&unlisted_decisions(&files)[..], [only] if only.contains("0002-two.md")));
        assert_eq!(stale_exit_codes(&files).len(), 1);
        assert!(stale_exit_codes(&[file("docs/exit-codes.md", &exit_codes())]).is_empty());
    }

    #[test]
    fn subcommands_are_read_from_the_help_and_looked_for_in_the_guides() {
        let help = "Usage: x\n\nCommands:\n  backup  Takes a point\n          of a path\n  help    Prints help\n\
                    \x20 gc      Frees\n\nOptions:\n  -h\n";
        let names = subcommands(help);
        assert_eq!(names, ["backup", "gc"]);
        let files = [file("README.md", "Run `mainstay backup PATH`.")];
        assert!(matches!(&unmentioned(&files, &names)[..], [only] if only.contains("mainstay gc")));
    }
}
