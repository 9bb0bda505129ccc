//! What it costs to back up a machine that runs, the emulator's share and libvirt's counted.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::{Host, Program, Shapes, mib};
use crate::bench::data::bytes_below;
use crate::bench::measure::measure as cost_of;
use crate::bench::random::Random;
use crate::{say, shell};

/// Bytes that the guest writes before the increment, in so many places.
const PLACES: u64 = 48;
const WRITTEN: u64 = 1 << 20;

/// Who makes a full backup, and who an increment.
const TOOLS: [&str; 7] = [
    "mainstay",
    "mainstay --compression none",
    "mainstay --compression balanced",
    "virtnbdbackup",
    "virtnbdbackup -z",
    "qemu-img convert",
    "qemu-img convert -c",
];
const INCREMENTAL: usize = 5;

#[derive(Clone, Copy)]
struct Cost {
    wall: Duration,
    cpu: Duration,
    stored: u64,
}

/// Why the ratios are what they are. The profile was taken with `perf` when this was written.
const WHY: &str = "
The goal is half of each figure. In processor time it is met against qemu-img where that compresses, and nowhere else: qemu-img
without compression only copies, and half of virtnbdbackup's time is less than Mainstay needs for a full backup without compressing at
all. That row is the floor: all that QEMU hands over received, cut, hashed, sealed and written. It costs no less than with zstd -1,
since four times as much is sealed and written then; there is nothing to gain by compressing less.

A profile of a full backup, libvirt's and QEMU's own share (about 0.2 s) apart: zstd 43 %, naming chunks (BLAKE3) 10 %, starting virsh
11 % (in an increment 45 %), writing packs 7 %, receiving over NBD 6 %, cutting 5 %, sealing (AES-256-GCM, and BLAKE3 once more) 3 %, parsing the
file systems 1 %. What was done about it: zstd -1 for images in place of -3 takes two thirds of its time and 4 to 7 % more room; negative levels save
a tenth to a third of that again and take 9 to 44 % more room, so they are not offered; segments that do not shrink in samples are not compressed; seven starts of virsh instead
of twenty; thousands of files of the parser in one message instead of one (11 % of the time before); a segment is compressed and sealed in one
place without three copies. Holes and zeros are never read, and reads are 1 MiB long, eight on their way. What is left of virsh is its loading of
libraries, which only speaking libvirt's own protocol would save.
";

type Costs = BTreeMap<(&'static str, usize), Vec<Cost>>;

pub(super) fn measure(
    program: &str,
    shapes: &Shapes,
    host: &Host,
    work: &Path,
    rounds: u32,
) -> Result<String> {
    let mut costs = Costs::new();
    for round in 0..rounds {
        for turn in 0..TOOLS.len() {
            // Nobody is always first.
            let tool = (turn + round as usize) % TOOLS.len();
            say::step(&format!("round {} of {rounds}: {}", round + 1, TOOLS[tool]));
            let mut one = Live { program, host, tool, at: work.join("live"), costs: &mut costs };
            one.run(shapes)?;
        }
    }
    page(&costs)
}

/// One tool and its machine.
struct Live<'a> {
    program: &'a str,
    host: &'a Host,
    tool: usize,
    at: PathBuf,
    costs: &'a mut Costs,
}

impl Live<'_> {
    fn run(&mut self, shapes: &Shapes) -> Result<()> {
        if self.at.exists() {
            std::fs::remove_dir_all(&self.at)?;
        }
        std::fs::create_dir_all(&self.at)?;
        let disk = self.at.join("disk.qcow2");
        let words = [
            "convert".as_ref(),
            "-O".as_ref(),
            "qcow2".as_ref(),
            shapes.changed.as_os_str(),
            disk.as_os_str(),
        ];
        shell::capture(&mut shell::command("qemu-img", words))?;
        let program = Program::fresh(self.program, &self.at.join("mainstay"))?;
        self.host.machine("bench", &disk)?;
        self.phase("full", &program, &disk)?;
        if self.tool < INCREMENTAL {
            self.write()?;
            self.phase("incremental", &program, &disk)?;
        }
        self.host.forget("bench")?;
        Ok(std::fs::remove_dir_all(&self.at)?)
    }

    /// Data that nobody has seen before.
    fn write(&self) -> Result<()> {
        let mut random = Random::from_seed(77);
        let file = self.at.join("data");
        for place in 0..PLACES {
            random.write(&mut File::create(&file)?, WRITTEN)?;
            self.host.write("bench", place * 10 * WRITTEN + 4096, &file, WRITTEN)?;
        }
        Ok(())
    }

    fn phase(&mut self, phase: &'static str, program: &Program, disk: &Path) -> Result<()> {
        let before = self.host.processor("bench");
        let stored = self.stored(program)?;
        let mut command = self.command(phase, program, disk)?;
        let cost = cost_of(&mut command, &self.at.join("log")).with_context(|| TOOLS[self.tool])?;
        let cpu = cost.cpu + self.host.processor("bench").saturating_sub(before);
        let stored = self.stored(program)?.saturating_sub(stored);
        say::line(&format!(
            "  {phase:12} CPU {:.2} s (the emulator and libvirt {:.2})  wall {:.2} s  stored {} MiB",
            cpu.as_secs_f64(),
            (cpu - cost.cpu).as_secs_f64(),
            cost.wall.as_secs_f64(),
            mib(stored)
        ));
        self.costs.entry((phase, self.tool)).or_default().push(Cost { wall: cost.wall, cpu, stored });
        Ok(())
    }

    fn command(&self, phase: &str, program: &Program, disk: &Path) -> Result<Command> {
        let (uri, copy) = (self.host.uri(), self.at.join("copy"));
        let (disk, copy) = (super::text(disk)?, super::text(&copy)?);
        let level = if phase == "full" { "full" } else { "inc" };
        let peer = ["-U", &uri, "-d", "bench", "-l", level, "-o", copy, "--noprogress"];
        if let Some(more) = TOOLS[self.tool].strip_prefix("mainstay") {
            let words = ["vm", "backup", "--host", &uri, "bench", "--consistency", "crash"];
            return Ok(program.command(&words.into_iter().chain(more.split_whitespace()).collect::<Vec<_>>()));
        }
        Ok(match TOOLS[self.tool] {
            "virtnbdbackup" => shell::command("virtnbdbackup", peer),
            "virtnbdbackup -z" => shell::command("virtnbdbackup", [&peer[..], &["-z"]].concat()),
            "qemu-img convert" => shell::command("qemu-img", ["convert", "-U", "-O", "qcow2", disk, copy]),
            _ => shell::command("qemu-img", ["convert", "-U", "-c", "-O", "qcow2", disk, copy]),
        })
    }

    fn stored(&self, program: &Program) -> Result<u64> {
        let copy = self.at.join("copy");
        match TOOLS[self.tool] {
            tool if tool.starts_with("mainstay") => program.stored(),
            _ if copy.exists() => bytes_below(&copy),
            _ => Ok(0),
        }
    }
}

fn page(costs: &Costs) -> Result<String> {
    let mut page = format!(
        "## A machine that runs\n\nA disk of 512 MiB with 360 MiB on it, under libvirt, its processors at rest; for the increment {} \
         MiB are written in {PLACES} places. CPU is user and system time of the tool's whole process tree, of the emulator and of \
         libvirt. Mainstay compresses images with zstd -1 unless told otherwise; of the others only `-z` (lz4) and `-c` (zlib) compress, and \
         nobody but Mainstay encrypts, names its content and looks for what is stored already. qemu-img reads the image file beside the running machine, which is no backup of a moment. A ratio is \
         Mainstay's figure divided by the other's: below 1 is cheaper.\n\n| phase | tool | CPU s | wall s | MiB stored | Mainstay's \
         CPU ÷ its | wall ÷ its |\n|---|---|---|---|---|---|---|\n",
        mib(PLACES * WRITTEN)
    );
    for phase in ["full", "incremental"] {
        let of = |tool: usize| costs.get(&(phase, tool)).map(|all| middle(all));
        let Some(ours) = of(0) else { continue };
        for (tool, name) in TOOLS.iter().enumerate() {
            let Some(cost) = of(tool) else { continue };
            let (cpu, wall) = (cost.cpu.as_secs_f64(), cost.wall.as_secs_f64());
            let ratio = |mine: Duration, other: f64| match tool {
                0 => "–".to_owned(),
                _ => format!("{:.2}", mine.as_secs_f64() / other.max(0.01)),
            };
            let (processor, time) = (ratio(ours.cpu, cpu), ratio(ours.wall, wall));
            let stored = mib(cost.stored);
            writeln!(page, "| {phase} | {name} | {cpu:.2} | {wall:.2} | {stored} | {processor} | {time} |")?;
        }
    }
    page.push_str(WHY);
    Ok(page)
}

/// The medians.
fn middle(costs: &[Cost]) -> Cost {
    let at = costs.len() / 2;
    let mut sorted = [costs.to_vec(), costs.to_vec(), costs.to_vec()];
    sorted[0].sort_by_key(|cost| cost.wall);
    sorted[1].sort_by_key(|cost| cost.cpu);
    sorted[2].sort_by_key(|cost| cost.stored);
    Cost { wall: sorted[0][at].wall, cpu: sorted[1][at].cpu, stored: sorted[2][at].stored }
}
