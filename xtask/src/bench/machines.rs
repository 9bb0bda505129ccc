//! `cargo xtask bench --machines`: images of machines. What three similar ones take in a repository beside chunks of a
//! fixed size, what a running one costs beside virtnbdbackup and qemu-img, how fast one boots from the repository, and how
//! fast files come out of an image.

mod boot;
mod host;
mod inside;
mod live;
mod proxied;
mod shapes;
mod stored;

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use super::{data, peers, text};
use crate::{say, shell};
use host::Host;
use shapes::Shapes;

/// The program that is measured, with a repository of its own.
struct Program {
    name: String,
    work: PathBuf,
}

impl Program {
    /// With an empty repository.
    fn fresh(name: &str, work: &Path) -> Result<Self> {
        let program = Self { name: name.to_owned(), work: work.to_owned() };
        if work.exists() {
            std::fs::remove_dir_all(work).with_context(|| format!("cannot remove {}", work.display()))?;
        }
        std::fs::create_dir_all(work).with_context(|| format!("cannot make {}", work.display()))?;
        // With a key in a file, which is what happens when nobody says otherwise.
        peers::quietly(&mut program.command(&["init", "--generate-key"]))?;
        Ok(program)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = shell::command(&self.name, arguments);
        shell::at_home(&mut command, &self.work.join("home"));
        command.env("MAINSTAY_REPOSITORY", self.work.join("repository"));
        command.env("TMPDIR", &self.work);
        command
    }

    /// Without what is set aside for a full disk.
    fn stored(&self) -> Result<u64> {
        let repository = self.work.join("repository");
        let reserve = repository.join(".reserve");
        let reserved = if reserve.exists() { data::bytes_below(&reserve)? } else { 0 };
        Ok(data::bytes_below(&repository)? - reserved)
    }
}

pub(super) fn run(program: Option<&str>, work: &Path, out: &Path, rounds: u32) -> Result<()> {
    let program = program.map_or_else(peers::release_build, |program| Ok(program.to_owned()))?;
    let work = work.join("machines");
    if work.exists() {
        std::fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))?;
    }
    say::step("three similar machines");
    let shapes = Shapes::make(&work)?;
    let mut page = preamble(rounds)?;
    let stored = stored::measure(&program, &shapes, &work)?;
    say::line(&stored);
    page.push_str(&stored);
    let host = Host::start(&work.join("host"))?;
    let live = live::measure(&program, &shapes, &host, &work, rounds)?;
    say::line(&live);
    page.push_str(&live);
    drop(host);
    let proxied = proxied::measure(&program, &shapes, &work, rounds)?;
    say::line(&proxied);
    page.push_str(&proxied);
    let boot = boot::measure(&program, &work, rounds)?;
    say::line(&boot);
    page.push_str(&boot);
    let inside = inside::measure(&program, &work)?;
    say::line(&inside);
    page.push_str(&inside);
    std::fs::write(out, page).with_context(|| format!("cannot write {}", out.display()))?;
    say::line(&format!("written to {}", out.display()));
    std::fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))
}

fn preamble(rounds: u32) -> Result<String> {
    let today = shell::capture(&mut shell::command("date", ["-u", "+%F"]))?;
    let cpu = shell::capture(&mut shell::command("uname", ["-srm"]))?;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let qemu = shell::capture(&mut shell::command("qemu-img", ["--version"]))?;
    let qemu = qemu.lines().next().unwrap_or_default();
    let peer = shell::capture(&mut shell::command("virtnbdbackup", ["--version"]))?;
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    let mut page = String::from("# Performance: machines\n\n");
    writeln!(
        page,
        "Measured by `cargo xtask bench --machines`, which writes this page anew.\n\n{}, {cores} cores; {}; {qemu}, \
         virtnbdbackup {}; load average {load} before the run, on more than a quiet machine's only processor times say much. \
         Data and repositories in one place, {rounds} rounds, medians.\n",
        today.trim(),
        cpu.trim(),
        peer.trim()
    )?;
    Ok(page)
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

/// `part` of `whole`, as a share of one.
#[expect(clippy::cast_precision_loss, reason = "for people")]
fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}
