//! From the figures of all rounds to a table of ratios.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::data::{Data, Set};
use super::measure::Cost;
use super::peers::Peer;
use crate::{say, shell};

/// One measured command.
pub(super) struct Record {
    pub(super) round: u32,
    pub(super) set: Set,
    /// A peer, or `limit`.
    pub(super) who: String,
    pub(super) phase: String,
    pub(super) cost: Cost,
    /// Size of the repository afterwards, in bytes.
    pub(super) stored: u64,
}

impl Record {
    pub(super) fn shown(&self) -> String {
        let Cost { wall, cpu, memory } = self.cost;
        let (who, phase, wall, cpu) = (&self.who, &self.phase, wall.as_secs_f64(), cpu.as_secs_f64());
        let (memory, stored) = (in_mib(memory), in_mib(self.stored));
        format!(
            "  {who:9} {phase:10} CPU {cpu:7.2} s  wall {wall:7.2} s  memory {memory:6.0} MiB  stored {stored:6.0} MiB"
        )
    }

    fn json(&self) -> String {
        json!({
            "round": self.round, "set": self.set.name(), "who": self.who, "phase": self.phase,
            "wall_seconds": self.cost.wall.as_secs_f64(), "cpu_seconds": self.cost.cpu.as_secs_f64(),
            "memory_bytes": self.cost.memory, "stored_bytes": self.stored,
        })
        .to_string()
    }
}

/// A phase, and the limit it is held against where there is one.
const PHASES: &[(&str, Option<&str>)] = &[
    ("initial", Some("zstd")),
    ("unchanged", Some("walk")),
    ("change", None),
    ("restore", Some("cp")),
    ("check", None),
];

/// Where the part of the page begins that is not written here.
const OTHERS: &str = "\n## Machines";

/// Writes the table to `out` and the raw records beside it as JSON lines.
pub(super) fn write(out: &Path, records: &[Record], data: &Data, peers: &[Box<dyn Peer>]) -> Result<()> {
    let mut text = preamble(records, peers)?;
    let names: Vec<&str> = peers.iter().map(|peer| peer.name()).collect();
    for set in Set::ALL.into_iter().filter(|set| records.iter().any(|record| record.set == *set)) {
        let (size, count) = (in_mib(data.bytes(set)?), data.count(set)?);
        let heading = format!("\n## {}: {} ({size:.0} MiB, {count} files)\n\n", set.name(), set.what());
        text.push_str(&heading);
        let of_set: Vec<&Record> = records.iter().filter(|record| record.set == set).collect();
        text.push_str(&table(&of_set, &names));
    }
    let raw: Vec<String> = records.iter().map(Record::json).collect();
    let lines = out.with_extension("jsonl");
    std::fs::write(&lines, raw.join("\n") + "\n")
        .with_context(|| format!("cannot write {}", lines.display()))?;
    // Figures that other programs measure stand behind ours.
    let old = std::fs::read_to_string(out).unwrap_or_default();
    text.push_str(old.find(OTHERS).and_then(|at| old.get(at..)).unwrap_or_default());
    std::fs::write(out, &text).with_context(|| format!("cannot write {}", out.display()))?;
    say::line(&format!("\n{text}"));
    say::line(&format!("Written to {} and {}.", out.display(), lines.display()));
    Ok(())
}

fn preamble(records: &[Record], peers: &[Box<dyn Peer>]) -> Result<String> {
    let date = shell::capture(&mut shell::command("date", ["-u", "+%Y-%m-%d"]))?;
    let kernel = shell::capture(&mut shell::command("uname", ["-srm"]))?;
    let rounds = records.iter().map(|record| record.round).max().unwrap_or(0);
    let versions = peers.iter().map(|peer| peer.version()).collect::<Result<Vec<_>>>()?.join(", ");
    let mut text = String::from("# Performance\n\n");
    write!(
        text,
        "Written by `cargo xtask bench`; `cargo xtask help bench` tells what the data sets are.\n\n\
         {}, {}; {}. {versions}. {rounds} rounds, medians.\n\n\
         CPU is user and system time of the whole process tree; memory is the largest resident set of any one \
         process. The first two ratios compare Mainstay with the cheapest peer of the same round and with what the \
         machine can do without any backup tool (zstd -3 on one thread for a first backup, a walk over the metadata \
         for an unchanged one, cp for a restore): below 1 is cheaper. All data was in the page cache; every restore \
         was compared byte for byte. A dash means that there is nothing to compare with.\n",
        date.trim(),
        machine()?,
        kernel.trim(),
    )?;
    Ok(text)
}

/// "2 cores of MODEL, 24 GiB".
fn machine() -> Result<String> {
    let processors = std::fs::read_to_string("/proc/cpuinfo").context("cannot read /proc/cpuinfo")?;
    let models: Vec<&str> = processors.lines().filter(|line| line.starts_with("model name")).collect();
    let model =
        models.first().and_then(|line| line.split_once(": ")).map_or("an unnamed model", |(_, name)| name);
    let memory = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let kib: u64 = memory.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or(0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Ok(format!("{cores} cores of {model}, {} GiB", (kib + (1 << 19)) >> 20))
}

fn table(records: &[&Record], names: &[&str]) -> String {
    let mut text = String::from("| phase |");
    for name in names {
        text.push_str(&format!(" {name}: CPU s / wall s / MiB of memory |"));
    }
    text.push_str(" CPU ÷ cheapest peer | CPU ÷ limit | wall ÷ fastest peer |\n|---|");
    text.push_str(&"---|".repeat(names.len() + 3));
    text.push('\n');
    for (phase, limit) in PHASES {
        text.push_str(&format!("| {phase} |"));
        for name in names {
            let cpu = median(records, name, phase, cpu);
            let wall = median(records, name, phase, wall);
            let memory = median(records, name, phase, memory);
            text.push_str(&format!(" {} / {} / {} |", show(cpu, 2), show(wall, 2), show(memory, 0)));
        }
        let against_peers = |figure| {
            ratio(records, phase, figure, |other| {
                other.who != "mainstay" && other.who != "limit" && other.phase == *phase
            })
        };
        let against_limit =
            ratio(records, phase, cpu, |other| other.who == "limit" && Some(other.phase.as_str()) == *limit);
        let ratios = [against_peers(cpu), against_limit, against_peers(wall)].map(|ratio| show(ratio, 2));
        text.push_str(&format!(" {} |\n", ratios.join(" | ")));
    }
    text.push_str("\nStored MiB (without the 16 MiB that Mainstay sets aside for a full disk), after the first backup → after the change:");
    for name in names {
        let stored = |phase| show(median(records, name, phase, stored), 0);
        text.push_str(&format!(" {name} {} → {};", stored("initial"), stored("change")));
    }
    text.push_str(&format!(" zstd -3 {}.\n", show(median(records, "limit", "zstd", stored), 0)));
    text.push_str("Limits, CPU s / wall s:");
    for limit in ["walk", "cat", "zstd", "cp"] {
        let figures = [cpu, wall].map(|figure| show(median(records, "limit", limit, figure), 2));
        text.push_str(&format!(" {limit} {};", figures.join(" / ")));
    }
    text.push('\n');
    text
}

fn cpu(record: &Record) -> f64 {
    seconds(record.cost.cpu)
}

fn wall(record: &Record) -> f64 {
    seconds(record.cost.wall)
}

fn memory(record: &Record) -> f64 {
    in_mib(record.cost.memory)
}

fn stored(record: &Record) -> f64 {
    in_mib(record.stored)
}

fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

fn in_mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn median(records: &[&Record], who: &str, phase: &str, figure: fn(&Record) -> f64) -> Option<f64> {
    let chosen = records.iter().filter(|record| record.who == who && record.phase == phase);
    middle(chosen.map(|record| figure(record)).collect())
}

/// The median over the rounds of Mainstay's figure divided by the least of the others' in the same round.
fn ratio(
    records: &[&Record],
    phase: &str,
    figure: fn(&Record) -> f64,
    other: impl Fn(&Record) -> bool,
) -> Option<f64> {
    let ours = records.iter().filter(|record| record.who == "mainstay" && record.phase == phase);
    let against = ours.filter_map(|ours| {
        let others = records.iter().filter(|record| record.round == ours.round && other(record));
        let least = others.map(|record| figure(record)).reduce(f64::min)?;
        // Costs below the resolution of the clock would make a ratio of noise.
        Some(figure(ours) / least.max(0.001))
    });
    middle(against.collect())
}

fn middle(mut figures: Vec<f64>) -> Option<f64> {
    figures.sort_by(f64::total_cmp);
    let half = figures.len() / 2;
    match figures.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(figures[half]),
        _ => Some(f64::midpoint(figures[half - 1], figures[half])),
    }
}

fn show(figure: Option<f64>, digits: usize) -> String {
    figure.map_or_else(|| "–".to_owned(), |figure| format!("{figure:.digits$}"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Cost, Record, Set, middle, table};

    fn record(round: u32, who: &str, phase: &str, cpu_ms: u64) -> Record {
        let cpu = Duration::from_millis(cpu_ms);
        let cost = Cost { wall: cpu * 2, cpu, memory: 64 << 20 };
        Record { round, set: Set::Tree, who: who.into(), phase: phase.into(), cost, stored: 5 << 20 }
    }

    #[test]
    fn ratios_are_paired_by_round_and_taken_against_the_cheapest() {
        // By round: 1000/2000, 3000/4000, 1000/1000; medians alone would give 1000/2000.
        let mut records = vec![];
        for (round, ours, restic, borg) in
            [(1, 1000, 2000, 9000), (2, 3000, 9000, 4000), (3, 1000, 1000, 9000)]
        {
            records.push(record(round, "mainstay", "initial", ours));
            records.push(record(round, "restic", "initial", restic));
            records.push(record(round, "borg", "initial", borg));
            records.push(record(round, "limit", "zstd", 500));
        }
        let text = table(&records.iter().collect::<Vec<_>>(), &["mainstay", "restic"]);
        let row = "| initial | 1.00 / 2.00 / 64 | 2.00 / 4.00 / 64 | 0.75 | 2.00 | 0.75 |";
        assert!(text.contains(row), "{text}");
        assert!(text.contains("| check | – / – / – | – / – / – | – | – | – |"), "{text}");
        assert!(text.contains("mainstay 5 → –"), "{text}");
    }

    #[test]
    fn the_median_of_an_even_count_is_between() {
        assert_eq!(middle(vec![4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(middle(vec![]), None);
    }
}
