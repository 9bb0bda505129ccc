//! Files taken out of a large image in the repository, by file system.

use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;

use super::Program;
use crate::bench::measure::{Cost, measure as cost_of};
use crate::bench::peers::quietly;
use crate::bench::random::Random;
use crate::{say, shell};

/// Of the disk, in bytes; most of it is a hole.
const DISK: u64 = 10 << 30;
/// Of each partition, in MiB.
const PARTITION: u64 = 1000;
const KINDS: [&str; 5] = ["ext4", "xfs", "btrfs", "ntfs", "vfat"];
const DIRECTORIES: u64 = 100;
/// In each of them.
const FILES: u64 = 150;
/// So often is each question asked; once more before, so that nothing is read from a disk.
const TIMES: usize = 5;

pub(super) fn measure(program: &str, work: &Path) -> Result<String> {
    let at = work.join("inside");
    let (tree, images) = (at.join("tree"), at.join("images"));
    std::fs::create_dir_all(&images)?;
    say::step("an image of five file systems");
    plant(&tree)?;
    image(&at, &tree, &images.join("many.raw"))?;
    std::fs::remove_dir_all(&tree)?;
    let program = Program::fresh(program, &at.join("mainstay"))?;
    let host = format!("dir:{}", images.display());
    quietly(&mut program.command(&["vm", "backup", "--host", &host, "many.raw"]))?;
    let mut page = format!(
        "\n## Files inside an image\n\nA sparse disk of {} GiB in the repository, with five partitions of {PARTITION} MiB, each with a tree of {} \
         files. One of its directories is listed, one file restored, and everything listed, each by a run of the program that opens the \
         repository and looks at all partitions, each in a confined process of its own. Medians of {TIMES}, warm.\n\n| file system | a \
         directory, s | one file, s | all files, s (CPU s) |\n|---|---|---|---|\n",
        DISK >> 30,
        DIRECTORIES * FILES
    );
    for (number, kind) in (1..).zip(KINDS) {
        say::step(&format!("files inside {kind}"));
        let volume = format!("/@volumes/vda{number}");
        let (directory, file) = (format!("{volume}/directory 42"), format!("{volume}/directory 42/file 77"));
        let target = at.join("restored");
        let restore = ["restore", "many.raw@latest", &file, "--to", super::text(&target)?];
        let listed = median(&program, &at, &["ls", "many.raw@latest", &directory], None)?;
        let restored = median(&program, &at, &restore, Some(&target))?;
        let all = median(&program, &at, &["ls", "many.raw@latest", &volume, "--recursive"], None)?;
        let seconds = |cost: &Cost| cost.wall.as_secs_f64();
        let row = format!(
            "| {kind} | {:.2} | {:.2} | {:.2} ({:.2}) |",
            seconds(&listed),
            seconds(&restored),
            seconds(&all),
            all.cpu.as_secs_f64()
        );
        say::line(&row);
        writeln!(page, "{row}")?;
    }
    std::fs::remove_dir_all(&at)?;
    Ok(page)
}

/// The median of wall and of processor time.
fn median(program: &Program, at: &Path, words: &[&str], made: Option<&PathBuf>) -> Result<Cost> {
    let mut costs = Vec::new();
    for _time in 0..=TIMES {
        if let Some(made) = made.filter(|made| made.exists()) {
            std::fs::remove_dir_all(made)?;
        }
        costs.push(cost_of(&mut program.command(words), &at.join("log"))?);
    }
    let mut walls: Vec<Duration> = costs[1..].iter().map(|cost| cost.wall).collect();
    let mut cpus: Vec<Duration> = costs[1..].iter().map(|cost| cost.cpu).collect();
    walls.sort();
    cpus.sort();
    Ok(Cost { wall: walls[TIMES / 2], cpu: cpus[TIMES / 2], ..costs[0] })
}

fn plant(tree: &Path) -> Result<()> {
    let mut random = Random::from_seed(15);
    for directory in 0..DIRECTORIES {
        let directory = tree.join(format!("directory {directory}"));
        std::fs::create_dir_all(&directory)?;
        for file in 0..FILES {
            let size = [0, 700, 3000, 9000, 20_000][usize::try_from(random.below(5))?];
            std::fs::write(directory.join(format!("file {file}")), random.bytes(size))?;
        }
    }
    Ok(())
}

fn image(at: &Path, tree: &Path, image: &Path) -> Result<()> {
    File::create(image)?.set_len(DISK)?;
    let rows =
        (0..).zip(KINDS).map(|(number, _)| format!("start={}MiB,size={PARTITION}MiB\n", place(number)));
    let table = at.join("table");
    std::fs::write(&table, format!("label: gpt\n{}", rows.collect::<String>()))?;
    tool("sh", &["-c", &format!("sfdisk -q '{}' < '{}'", image.display(), table.display())])?;
    let mounted = at.join("mounted");
    std::fs::create_dir_all(&mounted)?;
    for (number, kind) in (0..).zip(KINDS) {
        let part = at.join("part");
        File::create(&part)?.set_len(PARTITION << 20)?;
        fill(kind, super::text(&part)?, super::text(tree)?, super::text(&mounted)?)?;
        let (from, to) = (format!("if={}", part.display()), format!("of={}", image.display()));
        let seek = format!("seek={}", place(number));
        tool("dd", &[&from, &to, &seek, "bs=1M", "conv=notrunc,sparse", "status=none"])?;
        std::fs::remove_file(part)?;
    }
    Ok(())
}

/// Where a partition starts, in MiB.
fn place(number: u64) -> u64 {
    1 + number * PARTITION
}

/// Makes a file system with the tree in it, by the tool that can for each kind.
fn fill(kind: &str, part: &str, tree: &str, mounted: &str) -> Result<()> {
    let copy = || {
        tool("cp", &["-r", &format!("{tree}/."), mounted])?;
        tool("umount", &[mounted])
    };
    match kind {
        "ext4" => tool("mke2fs", &["-q", "-t", "ext4", "-d", tree, part]),
        "btrfs" => tool("mkfs.btrfs", &["-q", "--rootdir", tree, part]),
        "xfs" => {
            tool("mkfs.xfs", &["-q", part])?;
            tool("mount", &["-o", "loop", part, mounted])?;
            copy()
        }
        "ntfs" => {
            tool("mkfs.ntfs", &["-q", "-F", "-f", part])?;
            tool("ntfs-3g", &[part, mounted])?;
            copy()
        }
        _ => {
            tool("mkfs.vfat", &["-F", "32", part])?;
            tool("sh", &["-c", &format!("mcopy -Q -s -m -i '{part}' '{tree}'/* ::/")])
        }
    }
}

fn tool(program: &str, words: &[&str]) -> Result<()> {
    let mut command = shell::command(program, words);
    let path = shell::variable("PATH").unwrap_or_default();
    command.env("PATH", format!("{}:/usr/sbin:/sbin", path.to_string_lossy()));
    quietly(&mut command)
}
