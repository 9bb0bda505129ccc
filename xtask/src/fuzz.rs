//! `cargo xtask fuzz`: the fuzzers, guided by coverage, with the stable compiler.

use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::arguments::Arguments;
use crate::{Verb, say, shell};

pub(crate) const VERB: Verb = Verb {
    name: "fuzz",
    summary: "has fuzzers try what breaks the readers of hostile bytes",
    details: "Builds the fuzzers in fuzz/ and runs one after the other. What they find interesting is kept in the target
directory, so that the next run goes on; an input that breaks something lies there too, and its path is shown. The
compiler is the stable one: without the sanitizers, which `cargo +nightly fuzz run NAME` adds.

  --only NAME     one of them, such as qcow2 or nbd_client
  --seconds N     for each (default: 60)",
    switches: &[],
    options: &["--only", "--seconds"],
    run,
};

/// What guides the fuzzers, and turns what overflows into a failure.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions=on -Coverflow-checks=on \
                     -Ccodegen-units=1";

/// Named, so that the flags are not given to what runs while it is built.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

fn run(arguments: &Arguments) -> Result<()> {
    let seconds: u32 =
        arguments.value("--seconds").unwrap_or("60").parse().context("--seconds is a number")?;
    let names = names(arguments.value("--only"))?;
    let target = shell::target_directory()?.join("fuzz");
    say::step("building the fuzzers");
    let mut cargo =
        shell::cargo(["build", "--release", "--target", TRIPLE, "--manifest-path", "fuzz/Cargo.toml"]);
    cargo.args(names.iter().flat_map(|name| ["--bin", name]));
    shell::run(cargo.env("CARGO_TARGET_DIR", &target).env("RUSTFLAGS", FLAGS))?;
    let mut broken = Vec::new();
    for name in names {
        say::step(&format!("{name}, for {seconds} s"));
        let (program, corpus) =
            (target.join(TRIPLE).join("release").join(&name), target.join("corpus").join(&name));
        std::fs::create_dir_all(&corpus).with_context(|| format!("cannot create {}", corpus.display()))?;
        if fuzz(&program, &corpus, &target, seconds).is_err() {
            broken.push(name);
        }
    }
    if !broken.is_empty() {
        bail!("{} broke; the inputs lie in {}", broken.join(", "), target.display());
    }
    Ok(())
}

fn fuzz(program: &Path, corpus: &Path, target: &Path, seconds: u32) -> Result<()> {
    let program = program.to_str().context("a path that is no text")?;
    let limits = [
        format!("-max_total_time={seconds}"),
        format!("-artifact_prefix={}/", target.display()),
        "-timeout=20".into(),
        "-rss_limit_mb=2048".into(),
        "-max_len=65536".into(),
        "-print_final_stats=1".into(),
        "-verbosity=0".into(),
    ];
    shell::run(shell::command(program, limits).arg(corpus))
}

/// Those that fuzz/Cargo.toml has.
fn names(only: Option<&str>) -> Result<Vec<String>> {
    let targets = std::fs::read_dir(shell::root().join("fuzz/targets")).context("cannot list the fuzzers")?;
    let mut names = Vec::new();
    for target in targets {
        let path = target.context("cannot list the fuzzers")?.path();
        names.extend(path.file_stem().and_then(|stem| stem.to_str()).map(str::to_owned));
    }
    names.retain(|name| only.is_none_or(|only| only == name));
    names.sort();
    if names.is_empty() {
        bail!("there is no fuzzer of that name in fuzz/targets");
    }
    Ok(names)
}
