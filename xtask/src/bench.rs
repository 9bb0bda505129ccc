//! `cargo xtask bench`: Mainstay beside its peers and beside what the machine can do at all, in one run.

mod compare;
mod data;
mod machines;
mod measure;
mod peers;
mod pick;
mod random;
mod report;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::arguments::Arguments;
use crate::bench::data::{Data, Set};
use crate::bench::measure::{Cost, measure};
use crate::bench::peers::{Peer, Place};
use crate::bench::report::Record;
use crate::{Verb, say, setup, shell};

pub(crate) const VERB: Verb = Verb {
    name: "bench",
    summary: "measures Mainstay beside restic, borg and the limits of the machine",
    details: "Makes four data sets that are the same every time (a: many small files, b: a large random file, c: three
similar disk images, d: a database-like file), then backs each up, backs it up unchanged, changes a little and backs
that up, restores and compares every byte, and checks, with each tool in turn. All in one run, several rounds, so
that the figures can be read as ratios. Beside them: walk, cat, zstd -3 and cp on the same data.
Writes a Markdown table and the raw figures as JSON lines. Takes some minutes and a few GiB of disk.

  --machines          images of machines instead: what three similar ones take, what a running one costs beside
                      virtnbdbackup and qemu-img, boots from the repository, files out of an image; needs root and
                      about 5 GiB, in a tmpfs if --work is one
  --program FILE      with --machines: the mainstay to measure (default: a release build of this checkout)
  --size small|full   256/512/3x512/256 MiB, or the published 700/1024/3x1024/512 (default: small)
  --sets abcd         which data sets (default: all)
  --peers LIST        which tools, by comma: mainstay,restic,borg (default: all)
  --rounds N          how often; medians are reported (default: 3)
  --data DIR          where the data sets are kept between runs (default: bench/ in cargo's target directory)
  --work DIR          where repositories and restores go (default: beside the data; a tmpfs makes fsync free)
  --out FILE.md       where the table goes; the JSON lines go beside it (default: docs/performance.md)",
    switches: &["--machines"],
    options: &["--program", "--size", "--sets", "--peers", "--rounds", "--data", "--work", "--out"],
    run,
};

fn run(arguments: &Arguments) -> Result<()> {
    setup::run(true)?;
    let full = match arguments.value("--size") {
        None | Some("small") => false,
        Some("full") => true,
        Some(other) => bail!("--size is small or full, not {other}"),
    };
    let rounds: u32 =
        arguments.value("--rounds").unwrap_or("3").parse().context("--rounds is not a number")?;
    if arguments.has("--machines") {
        let work = arguments
            .value("--work")
            .map_or_else(|| shell::target_directory().map(|t| t.join("bench")), |w| Ok(w.into()))?;
        let out = shell::root().join(arguments.value("--out").unwrap_or("docs/performance-machines.md"));
        return machines::run(arguments.value("--program"), &work, &out, rounds);
    }
    let chosen = arguments.value("--sets").unwrap_or("abcd");
    let sets: Vec<Set> = Set::ALL.into_iter().filter(|set| chosen.contains(set.name())).collect();
    let directory = match arguments.value("--data") {
        Some(path) => PathBuf::from(path),
        None => shell::target_directory()?.join("bench"),
    };
    let work = arguments.value("--work").map_or_else(|| directory.join("work"), PathBuf::from);
    let out = shell::root().join(arguments.value("--out").unwrap_or("docs/performance.md"));
    if let Some(folder) = out.parent() {
        // Before minutes of measuring, not after.
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let names = arguments.value("--peers").unwrap_or("mainstay,restic,borg");
    let peers = names.split(',').map(peers::find).collect::<Result<Vec<_>>>()?;

    let data = Data::prepare(&directory.join(if full { "full" } else { "small" }), full)?;
    let mut records = Vec::new();
    for round in 1..=rounds {
        for &set in &sets {
            say::step(&format!("round {round} of {rounds}, set {}: {}", set.name(), set.what()));
            let mut bench = Bench { round, set, data: &data, work: &work, records: &mut records };
            bench.limits()?;
            // Nobody is always first after the limits have warmed the caches.
            let first = (round as usize - 1) % peers.len().max(1);
            for peer in peers[first..].iter().chain(&peers[..first]) {
                bench.peer(peer.as_ref())?;
            }
        }
    }
    report::write(&out, &records, &data, &peers)
}

/// One round over one data set.
struct Bench<'a> {
    round: u32,
    set: Set,
    data: &'a Data,
    work: &'a Path,
    records: &'a mut Vec<Record>,
}

impl Bench<'_> {
    /// What the machine can do with the same bytes and no tool: the ground under the other figures.
    fn limits(&mut self) -> Result<()> {
        let place = self.fresh_place()?;
        let source = text(&place.source)?;
        let restored = text(&place.restored)?;
        let cat = format!("find '{source}' -type f -print0 | LC_ALL=C sort -z | xargs -0 cat");
        let limits = [
            ("walk", format!("find '{source}' -printf '%s %T@ %C@ %i\\n' > /dev/null")),
            ("cat", format!("{cat} > /dev/null")),
            ("zstd", format!("{cat} | zstd -3 --single-thread -q -c > '{restored}.zst'")),
            ("cp", format!("cp -r --sparse=auto '{source}' '{restored}'")),
        ];
        for (name, script) in limits {
            self.data.warm(self.set)?;
            let cost = measure(&mut shell::command("bash", ["-o", "pipefail", "-c", &script]), &place.log)?;
            let stored =
                if name == "zstd" { data::bytes_below(&restored_name(&place.restored, "zst"))? } else { 0 };
            self.record("limit", name, cost, stored);
        }
        place.remove()
    }

    fn peer(&mut self, peer: &dyn Peer) -> Result<()> {
        let place = self.fresh_place()?;
        let name = peer.name();
        peer.init(&place).with_context(|| format!("{name} cannot make a repository"))?;
        for phase in ["initial", "unchanged"] {
            self.phase(peer, phase, &place, peer.backup(&place, phase))?;
        }
        self.data.change(self.set)?;
        self.phase(peer, "change", &place, peer.backup(&place, "change"))?;
        std::fs::create_dir(&place.restored)?;
        self.phase(peer, "restore", &place, peer.restore(&place, "change"))?;
        compare::same_files(&place.source, &place.restored)
            .with_context(|| format!("{name} restored wrongly"))?;
        std::fs::remove_dir_all(&place.restored)?;
        self.phase(peer, "check", &place, peer.check(&place))?;
        self.data.reset(self.set)?;
        place.remove()
    }

    fn phase(
        &mut self,
        peer: &dyn Peer,
        phase: &str,
        place: &Place,
        mut run: std::process::Command,
    ) -> Result<()> {
        self.data.warm(self.set)?;
        let cost = measure(&mut run, &place.log).with_context(|| format!("{}: {phase}", peer.name()))?;
        // Mainstay sets a fixed 16 MiB aside for the day the disk is full. It is not the data's, and is said apart.
        let reserve = place.repository.join(".reserve");
        let reserved = if reserve.exists() { data::bytes_below(&reserve)? } else { 0 };
        let stored = data::bytes_below(&place.repository)? - reserved;
        self.record(peer.name(), phase, cost, stored);
        Ok(())
    }

    fn fresh_place(&self) -> Result<Place> {
        Place::fresh(self.work, &self.data.path(self.set))
    }

    fn record(&mut self, who: &str, phase: &str, cost: Cost, stored: u64) {
        let record = Record {
            round: self.round,
            set: self.set,
            who: who.to_owned(),
            phase: phase.to_owned(),
            cost,
            stored,
        };
        say::line(&record.shown());
        self.records.push(record);
    }
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

fn restored_name(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    PathBuf::from(name)
}
