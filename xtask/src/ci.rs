//! `cargo xtask ci`: everything that must hold before a commit.

use anyhow::Result;

use crate::arguments::Arguments;
use crate::{Verb, say, shell, test, tidy};

pub(crate) const VERB: Verb = Verb {
    name: "ci",
    summary: "formatting, clippy, tidy, all tests, and the dependencies' licences and advisories",
    details:
        "Runs what `.ci/run` runs in this checkout, in the order of what fails fastest: cargo fmt --check,
clippy with warnings as errors, `cargo xtask tidy`, `cargo xtask test`, and cargo deny where it is installed.
`.ci/run` also runs the demo from a fresh clone.",
    switches: &[],
    options: &[],
    run: |_: &Arguments| run(),
};

fn run() -> Result<()> {
    say::step("formatting");
    shell::run(&mut shell::cargo(["fmt", "--all", "--check"]))?;
    say::step("clippy");
    let clippy = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    shell::run(&mut shell::cargo(clippy))?;
    say::step("tidy");
    tidy::run(false)?;
    deny()?;
    test::run(false)
}

fn deny() -> Result<()> {
    if shell::succeeds(&mut shell::cargo(["deny", "--version"])) {
        say::step("licences and advisories of the dependencies");
        return shell::run(&mut shell::cargo(["deny", "check"]));
    }
    say::step(
        "NOT RUN: licences and advisories of the dependencies (`cargo install cargo-deny` brings the tool)",
    );
    Ok(())
}
