//! `cargo xtask dist`: the release, built so that anybody can build the same bytes again.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::arguments::Arguments;
use crate::{Verb, say, shell};

pub(crate) const VERB: Verb = Verb {
    name: "dist",
    summary: "builds the release reproducibly, with completions, man pages and checksums",
    details: "Builds `mainstay` with the locked dependencies and with every path of this machine mapped away, so
that the same commit and toolchain give the same bytes anywhere. The binary then writes its own completions and man
pages. SHA256SUMS covers all of it.

  --to DIR   where it goes (default: dist)",
    switches: &[],
    options: &["--to"],
    run: |arguments: &Arguments| run(Path::new(arguments.value("--to").unwrap_or("dist"))),
};

const SHELLS: &[&str] = &["bash", "zsh", "fish"];

fn run(to: &Path) -> Result<()> {
    let to = shell::root().join(to);
    let made = to.join("mainstay");
    if to.exists() && !made.is_file() {
        bail!("{} is there and holds no earlier release; name another place with --to", to.display());
    }
    say::step("building the release");
    let built = build()?;
    if to.exists() {
        std::fs::remove_dir_all(&to).with_context(|| format!("cannot remove the old {}", to.display()))?;
    }
    let man = to.join("man");
    let completions = to.join("completions");
    for directory in [&man, &completions] {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("cannot create {}", directory.display()))?;
    }
    std::fs::copy(&built, &made).with_context(|| format!("cannot copy {}", built.display()))?;
    say::step("completions and man pages, by the binary itself");
    let program = path_text(&made)?;
    for shell in SHELLS {
        let text = shell::capture(&mut shell::command(program, ["completions", shell]))?;
        std::fs::write(completions.join(format!("mainstay.{shell}")), text)?;
    }
    shell::run(&mut shell::command(program, ["man", path_text(&man)?]))?;
    say::step("checksums");
    let script = "find . -type f ! -name SHA256SUMS | LC_ALL=C sort | xargs sha256sum > SHA256SUMS";
    shell::run(shell::command("sh", ["-c", script]).current_dir(&to))?;
    say::line(&format!("\nThe release is in {}.", to.display()));
    Ok(())
}

/// Builds with the `dist` profile into a directory of its own, so that the flags do not throw away other builds.
fn build() -> Result<PathBuf> {
    let target = shell::target_directory()?.join("dist");
    let mut cargo = shell::cargo(["build", "--locked", "--package", "mainstay", "--profile", "dist"]);
    let away = paths_to_map_away()?;
    let rust: Vec<String> =
        away.iter().map(|(from, to)| format!("--remap-path-prefix={from}={to}")).collect();
    let c: Vec<String> = away.iter().map(|(from, to)| format!("-ffile-prefix-map={from}={to}")).collect();
    cargo.env("CARGO_TARGET_DIR", &target).env("CARGO_ENCODED_RUSTFLAGS", rust.join("\u{1f}"));
    cargo.env("CFLAGS", c.join(" ")).env("SOURCE_DATE_EPOCH", "0").env("CARGO_INCREMENTAL", "0");
    say::command("cargo build --locked --package mainstay --profile dist");
    let status = cargo.status().context("cannot start cargo")?;
    if !status.success() {
        bail!("the release does not build ({status})");
    }
    Ok(target.join("dist").join("mainstay"))
}

/// Paths of this machine that compilers write into what they make, and what stands for them instead.
fn paths_to_map_away() -> Result<Vec<(String, &'static str)>> {
    let sysroot = shell::capture(&mut shell::command("rustc", ["--print", "sysroot"]))?;
    let home = shell::variable("HOME").map(PathBuf::from).unwrap_or_default();
    let cargo = shell::variable("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from);
    Ok(vec![
        (path_text(&shell::target_directory()?)?.to_owned(), "target"),
        (path_text(shell::root())?.to_owned(), "mainstay"),
        (path_text(&cargo)?.to_owned(), "cargo"),
        (sysroot.trim().to_owned(), "rust"),
    ])
}

fn path_text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}
