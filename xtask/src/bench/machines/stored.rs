//! What is stored of three similar machines, of one that changed, and of the files of one: by Mainstay, and by chunks of
//! a fixed size under zstd, as other tools for images store them.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::{Program, Shapes, mib, share};
use crate::bench::compare::files_below;
use crate::shell;

/// What is added, one after the other.
const STEPS: [&str; 5] =
    ["machine 1", "machine 2", "machine 3", "machine 1, changed", "the files of machine 1"];

/// Of the chunks, in KiB.
const FIXED: [usize; 2] = [64, 4096];

pub(super) fn measure(program: &str, shapes: &Shapes, work: &Path) -> Result<String> {
    let [small, large] = FIXED.map(|kib| fixed(kib << 10, shapes, &work.join("chunks")));
    let (small, large) = (small?, large?);
    // Last, since it exchanges the first image for the changed one.
    let ours = ours(program, shapes, &work.join("stored"))?;
    let mut page = String::from(
        "## Three similar machines\n\nDisks of 512, 640 and 576 MiB with ext4, each with 320 MiB of one system, 3 % of its files \
         missing and 3 % edited, and a log of its own. Then 40 new files on the first, and a backup of its files as files. MiB \
         stored by each step; the chunks of a fixed size are compressed with zstd -3 all in one stream, which is kinder to them \
         than chunk by chunk, and need no index.\n\n| step | mainstay | 64 KiB | 4 MiB | less than 64 KiB | less than 4 MiB |\n|---|---|---|---|---|---|\n",
    );
    let mut row = |name: &str, ours: u64, small: u64, large: u64| -> Result<()> {
        let less = |other: u64| (1.0 - share(ours, other)) * 100.0;
        writeln!(
            page,
            "| {name} | {} | {} | {} | {:.0} % | {:.0} % |",
            mib(ours),
            mib(small),
            mib(large),
            less(small),
            less(large)
        )?;
        Ok(())
    };
    for (index, name) in STEPS.iter().enumerate() {
        row(name, ours[index], small[index], large[index])?;
    }
    row("all", ours.iter().sum(), small.iter().sum(), large.iter().sum())?;
    writeln!(
        page,
        "\nThe files of a machine that is imaged already add {:.1} % of what its image took.\n",
        share(ours[4], ours[0]) * 100.0
    )?;
    Ok(page)
}

/// Bytes that each step adds to a repository.
fn ours(program: &str, shapes: &Shapes, work: &Path) -> Result<[u64; 5]> {
    let program = Program::fresh(program, work)?;
    let host = format!("dir:{}", shapes.images.display());
    let mut before = program.stored()?;
    let mut added = [0; 5];
    for (step, added) in added.iter_mut().enumerate() {
        let machine = ["vm1.raw", "vm2.raw", "vm3.raw", "vm1.raw"].get(step);
        let mut command = match machine {
            Some(machine) => program.command(&["vm", "backup", "--host", &host, machine]),
            None => program.command(&["backup", super::text(&shapes.tree)?]),
        };
        if step == 3 {
            std::fs::copy(&shapes.changed, shapes.image(1)).context("cannot exchange an image")?;
        }
        shell::capture(&mut command)?;
        let after = program.stored()?;
        (*added, before) = (after.saturating_sub(before), after);
    }
    Ok(added)
}

/// Bytes that each step adds to a store of unique chunks. Zeros are free.
fn fixed(size: usize, shapes: &Shapes, work: &Path) -> Result<[u64; 5]> {
    std::fs::create_dir_all(work)?;
    let mut known = HashSet::new();
    let mut added = [0; 5];
    let image = |number| vec![shapes.image(number)];
    let files = files_below(&shapes.tree)?.into_keys().map(|path| shapes.tree.join(path)).collect();
    let steps: [Vec<PathBuf>; 5] = [image(1), image(2), image(3), vec![shapes.changed.clone()], files];
    for (sources, added) in steps.iter().zip(&mut added) {
        let new = work.join("new");
        let mut out = std::io::BufWriter::new(File::create(&new)?);
        let mut chunk = vec![0; size];
        for source in sources {
            let mut file = File::open(source).with_context(|| format!("cannot read {}", source.display()))?;
            loop {
                let length = fill(&mut file, &mut chunk)?;
                let part = &chunk[..length];
                if length == 0 {
                    break;
                }
                if part.iter().any(|byte| *byte != 0) && known.insert(digest(part)) {
                    out.write_all(part)?;
                }
            }
        }
        out.flush()?;
        shell::capture(shell::command("zstd", ["-3", "-q", "-f"]).arg(&new))?;
        *added = std::fs::metadata(work.join("new.zst"))?.len();
    }
    std::fs::remove_dir_all(work)?;
    Ok(added)
}

fn fill(file: &mut File, chunk: &mut [u8]) -> Result<usize> {
    let mut length = 0;
    while length < chunk.len() {
        match file.read(&mut chunk[length..])? {
            0 => break,
            read => length += read,
        }
    }
    Ok(length)
}

/// Of so few chunks no two will have the same.
fn digest(bytes: &[u8]) -> (u64, usize) {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    (hasher.finish(), bytes.len())
}
