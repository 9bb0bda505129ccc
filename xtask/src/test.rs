//! `cargo xtask test`: all tests of the workspace, set-up included.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

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
        let all = ["nextest", "run", "--workspace", "--locked", "--no-fail-fast", "--no-tests=pass"];
        return shell::run(&mut with_length(shell::cargo(all)));
    }
    say::step("tests (cargo-nextest is not installed; plain cargo test does as well, only slower)");
    let all = ["test", "--workspace", "--locked", "--no-fail-fast"];
    run_and_sum_up(with_length(shell::cargo(all)))
}

/// `cargo test` closes once per test binary; this repeats those lines at the end, with their sum.
fn run_and_sum_up(mut command: Command) -> Result<()> {
    let text = shell::shown(&command);
    say::command(&text);
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {text}"))?;
    let mut closing = Vec::new();
    let printed = child.stdout.take().context("the pipe of cargo test is missing")?;
    for line in BufReader::new(printed).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        if line.starts_with("test result:") {
            closing.push(line.clone());
        }
        say::line(&line);
    }
    let status = child.wait()?;
    let sum = Sum::of(&closing);
    say::step(&format!("{} test binaries: {} passed, {} failed", closing.len(), sum.passed, sum.failed));
    if !status.success() {
        bail!("{text} failed ({status})");
    }
    Ok(())
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
    use super::Sum;

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
