//! `cargo xtask test`: all tests of the workspace, set-up included.

use std::io::IsTerminal as _;
use std::process::Command;

use anyhow::Result;

use crate::arguments::Arguments;
use crate::{Verb, say, setup, shell};

pub(crate) const VERB: Verb = Verb {
    name: "test",
    summary: "sets up, builds, and runs every test of the workspace",
    details: "Installs what the tests need (see `cargo xtask help setup`), builds, and runs unit, integration and
documentation tests: with cargo-nextest where it is installed, with plain `cargo test` otherwise. Works as root and
as an ordinary user; what only root can test is tested only as root. The runner's closing lines come last.

  --long    longer random walks, more seeds, more kills (sets MAINSTAY_LONG=1)",
    switches: &["--long"],
    options: &[],
    run: |arguments: &Arguments| run(arguments.has("--long")),
};

/// What a test prints when this machine lacks what it needs and it does nothing.
const NOT_RUN: &str = "NOT RUN";

pub(crate) fn run(long: bool) -> Result<()> {
    setup::run(false)?;
    let with_length = |mut command: Command| {
        if long {
            command.env("MAINSTAY_LONG", "1");
        }
        command
    };
    if shell::succeeds(&mut shell::cargo(["nextest", "--version"])) {
        say::step("documentation tests");
        shell::run(&mut with_length(shell::cargo(["test", "--quiet", "--workspace", "--doc", "--locked"])))?;
        say::step("tests");
        return nextest(with_length(shell::cargo([
            "nextest",
            "run",
            "--workspace",
            "--locked",
            "--no-fail-fast",
        ])));
    }
    say::step("tests (cargo-nextest is not installed; plain cargo test does as well, only slower)");
    let all = ["test", "--workspace", "--locked", "--no-fail-fast", "--", "--show-output"];
    plain(with_length(shell::cargo(all)))
}

fn nextest(mut command: Command) -> Result<()> {
    if std::io::stdout().is_terminal() {
        command.args(["--color", "always"]);
    }
    let mut closing = Vec::new();
    let result = shell::follow(&mut command, shell::Stream::Errors, &mut |line| {
        if !closing.is_empty() || (line.contains("Summary") && line.contains(" tests run")) {
            closing.push(line.to_owned());
        }
    });
    // Its output of tests that passed is only here (see .config/nextest.toml).
    let report = shell::target_directory()?.join("nextest/default/junit.xml");
    let report = std::fs::read_to_string(report).unwrap_or_default();
    close(&not_run(&report), &closing);
    result
}

/// `cargo test` closes once per test binary; those lines are repeated at the end, with their sum.
fn plain(mut command: Command) -> Result<()> {
    let (mut closing, mut printed) = (Vec::new(), String::new());
    let result = shell::follow(&mut command, shell::Stream::Output, &mut |line| {
        if line.starts_with("test result:") {
            closing.push(line.to_owned());
        }
        printed.push_str(line);
        printed.push('\n');
    });
    let sum = Sum::of(&closing);
    closing.push(format!("{} test binaries: {} passed, {} failed", closing.len(), sum.passed, sum.failed));
    close(&not_run(&printed), &closing);
    result
}

/// Ends with what did not run here, which nobody must overlook, and then the closing lines of the runner.
fn close(not_run: &[String], closing: &[String]) {
    if !not_run.is_empty() {
        say::step("tests, or parts of them, that this machine cannot run");
        not_run.iter().for_each(|line| say::line(line));
    }
    if closing.is_empty() {
        return;
    }
    say::step("closing lines of the test runner");
    closing.iter().for_each(|line| say::line(line));
}

/// The lines by which tests say that they did not run, each once.
fn not_run(printed: &str) -> Vec<String> {
    let plain = |line: &str| {
        line.replace("&lt;", "<")
            .replace("&gt;", ">")
            .replace("&quot;", "\"")
            .replace("&apos;", "'")
            .replace("&amp;", "&")
    };
    let said = printed.lines().filter_map(|line| line.find(NOT_RUN).map(|start| plain(&line[start..])));
    let said: std::collections::BTreeSet<String> =
        said.map(|line| line.trim_end_matches("</system-out>").to_owned()).collect();
    said.into_iter().collect()
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Sum {
    passed: u64,
    failed: u64,
}

impl Sum {
    /// Adds up lines such as `test result: ok. 3 passed; 0 failed; 0 ignored; ...`.
    fn of(closing: &[String]) -> Self {
        let count = |line: &str, what: &str| -> u64 {
            let words: Vec<&str> = line.split([' ', ';']).collect();
            let found = words.windows(2).find(|pair| pair[1] == what);
            found.and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
        };
        closing.iter().fold(Self::default(), |sum, line| Self {
            passed: sum.passed + count(line, "passed"),
            failed: sum.failed + count(line, "failed"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Sum, not_run};

    #[test]
    fn what_did_not_run_is_found_once_in_plain_words() {
        let printed = "<system-out>running 1 test\nNOT RUN: it&apos;s not here\nok</system-out>\nNOT RUN: it's not here\n\
                       <system-out>NOT RUN: no root</system-out>\n";
        assert_eq!(not_run(printed), ["NOT RUN: it's not here", "NOT RUN: no root"]);
    }

    #[test]
    fn closing_lines_add_up() {
        let line = |passed: u64, failed: u64| {
            format!(
                "test result: ok. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out"
            )
        };
        assert_eq!(Sum::of(&[line(3, 0), line(40, 2)]), Sum { passed: 43, failed: 2 });
    }
}
