//! `cargo xtask demo`: protect real data of this machine, damage a copy of it, find the damage, and take it back.

mod stage;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::arguments::Arguments;
use crate::demo::stage::Stage;
use crate::{Verb, say, setup, shell};

pub(crate) const VERB: Verb = Verb {
    name: "demo",
    summary: "protects, damages, finds and restores real data of this machine, before your eyes",
    details: "Reads /etc, /usr/share/doc and the sources of this project, and writes only into one temporary
directory that it names first and removes at the end. Every command is shown before it runs, so that you can type
it yourself. Needs no privilege: what you may not read is skipped, and said.

  --release   with the optimised binary: faster, but it takes longer to build
  --keep      leaves the directory there, to look around",
    switches: &["--release", "--keep"],
    options: &[],
    run: |arguments: &Arguments| run(arguments.has("--release"), arguments.has("--keep")),
};

fn run(release: bool, keep: bool) -> Result<()> {
    setup::run(false)?;
    let sources = sources();
    say::step("building mainstay");
    let program = build(release)?;
    let mut stage = Stage::new(program, keep)?;
    announce(&stage, &sources);

    protect(&mut stage, &sources)?;
    let copy = prove(&mut stage, &sources)?;
    let damage = Damage::plan(&copy)?;
    harm(&mut stage, &copy, &damage)?;
    find(&mut stage, &damage)?;
    take_back(&mut stage, &copy, &damage)?;
    look_after(&mut stage)?;
    stage.table();
    Ok(())
}

/// What gets protected: things that every machine has, and this project.
fn sources() -> Vec<PathBuf> {
    let own = ["crates", "docs", "xtask"].map(|name| shell::root().join(name));
    let machine = ["/etc", "/usr/share/doc"].map(PathBuf::from);
    machine.into_iter().chain(own).filter(|path| path.is_dir()).collect()
}

fn build(release: bool) -> Result<PathBuf> {
    let mut build = shell::cargo(["build", "--locked", "--package", "mainstay"]);
    if release {
        build.arg("--release");
    }
    shell::run(&mut build)?;
    let program =
        shell::target_directory()?.join(if release { "release/mainstay" } else { "debug/mainstay" });
    if !program.is_file() {
        bail!("{} was built and is not there", program.display());
    }
    Ok(program)
}

fn announce(stage: &Stage, sources: &[PathBuf]) {
    let list: Vec<String> = sources.iter().map(|path| path.display().to_string()).collect();
    let place = stage.directory().display();
    say::step("what this demo does");
    say::line(&format!("It reads  {}", list.join(", ")));
    say::line(&format!("It writes {place}, and nowhere else: repository, key, and a copy to be damaged."));
    let end = if stage.keeps() { "stays (--keep)" } else { "is removed at the end" };
    say::line(&format!("That directory {end}. If you stop the demo half way, remove it yourself."));
}

/// A repository, a first recovery point, and a second one of the same unchanged data.
fn protect(stage: &mut Stage, sources: &[PathBuf]) -> Result<()> {
    stage.say("A new repository, with a key in a private file, and a recovery kit to be printed");
    let kit = stage.directory().join("recovery-kit.txt");
    stage.mainstay("make a repository", &["init", "--generate-key", "--kit", &kit.to_string_lossy()], &[])?;
    stage.say("A first recovery point: everything is read");
    stage.mainstay("first backup", &["backup", "--name", "machine"], sources)?;
    stage.say("And once more: what did not change is not read again");
    stage.mainstay("backup, unchanged", &["backup", "--name", "machine"], sources)?;
    stage.mainstay("list points", &["points"], &[])
}

/// Restores everything into a new place and lets `diff`, which knows nothing of Mainstay, judge it.
fn prove(stage: &mut Stage, sources: &[PathBuf]) -> Result<PathBuf> {
    let copy = stage.directory().join("copy");
    stage.say("A backup is worth what its restore is worth: everything into a new place");
    stage.mainstay("restore everything", &["restore", "machine", "--to"], std::slice::from_ref(&copy))?;
    stage.say("The judge is diff, which knows nothing of Mainstay");
    for source in sources.iter().filter(|source| !source.starts_with("/etc")) {
        stage.same(source, &inside(&copy, source))?;
    }
    Ok(copy)
}

/// The place of `path` in a restore below `directory`.
fn inside(directory: &Path, path: &Path) -> PathBuf {
    directory.join(path.strip_prefix("/").unwrap_or(path))
}

/// What is going to happen to the copy.
struct Damage {
    /// Gets overwritten.
    file: PathBuf,
    /// Gets removed with all that is in it.
    directory: PathBuf,
}

impl Damage {
    fn plan(copy: &Path) -> Result<Self> {
        let file = ["etc/services", "etc/passwd", "etc/hosts"].iter().map(|name| copy.join(name));
        let file =
            file.into_iter().find(|path| path.is_file()).context("the copy holds nothing to damage")?;
        let below = fs::read_dir(copy.join("usr/share/doc")).context("the copy holds no documents")?;
        let mut directories: Vec<PathBuf> = below
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.is_dir() && !path.is_symlink())
            .collect();
        directories.sort();
        let directory = directories.swap_remove(directories.len() / 2);
        Ok(Self { file, directory })
    }

    fn file_name(&self) -> String {
        self.file.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

/// The copy becomes a workload of its own, is damaged, and the damage gets into a recovery point too: as in life.
fn harm(stage: &mut Stage, copy: &Path, damage: &Damage) -> Result<()> {
    let paths = [copy.to_owned()];
    stage.say(
        "The copy is protected as a workload of its own: hardly anything of it is new to the repository",
    );
    stage.mainstay("backup of the copy", &["backup", "--name", "copy"], &paths)?;
    stage.say("Now the copy is damaged: one file overwritten, one directory removed");
    say::command(&format!("head -c 20000 /dev/urandom > {}", damage.file.display()));
    let noise = shell::output(&mut shell::command("head", ["-c", "20000", "/dev/urandom"]))?.stdout;
    fs::write(&damage.file, noise).context("cannot damage the file")?;
    say::command(&format!("rm -r {}", damage.directory.display()));
    fs::remove_dir_all(&damage.directory).context("cannot damage the directory")?;
    stage.say("Nobody noticed, and the next backup ran on time");
    stage.mainstay("backup of the damage", &["backup", "--name", "copy"], &paths)
}

fn find(stage: &mut Stage, damage: &Damage) -> Result<()> {
    stage.say("What happened? First the difference between the last two points");
    stage.mainstay("compare points", &["points", "diff", "copy~1", "copy"], &[])?;
    stage.say("Then the damaged file in all points: since when is it different?");
    stage.mainstay("find a file", &["find", &damage.file_name(), "--workload", "copy"], &[])
}

fn take_back(stage: &mut Stage, copy: &Path, damage: &Damage) -> Result<()> {
    let lost = [damage.file.clone(), damage.directory.clone()];
    stage.say("The way back, first as a plan");
    stage.mainstay("plan the restore", &["restore", "copy~1", "--dry-run"], &lost)?;
    stage.say("And now really: only what differs is written, and an undo point is taken first");
    stage.mainstay("restore in place", &["restore", "copy~1", "--yes"], &lost)?;
    check_restored(stage, copy, damage)?;
    stage.say("If that was a mistake, it can be taken back too");
    let good = fs::read(&damage.file)?;
    stage.mainstay("undo", &["undo", "--yes"], &[])?;
    if fs::read(&damage.file)? == good || damage.directory.exists() {
        bail!("undo did not bring the damaged state back");
    }
    say::line("The damage is back. Once more, then:");
    stage.mainstay("restore again", &["restore", "copy~1", "--yes"], &lost)?;
    check_restored(stage, copy, damage)
}

/// Compares what was restored with the originals, which nobody touched.
fn check_restored(stage: &mut Stage, copy: &Path, damage: &Damage) -> Result<()> {
    for restored in [&damage.file, &damage.directory] {
        let original = Path::new("/").join(restored.strip_prefix(copy)?);
        stage.same(&original, restored)?;
    }
    Ok(())
}

fn look_after(stage: &mut Stage) -> Result<()> {
    stage.say("Is every stored byte as it was written?");
    stage.mainstay("verify every byte", &["verify", "--read-data"], &[])?;
    stage.say("What would be expired by a rule, and why is the rest kept? A plan; nothing is deleted");
    let rule = ["expire", "--keep-last", "1", "--keep-daily", "7", "--dry-run"];
    stage.mainstay("simulate expiry", &rule, &[])?;
    stage.say("And the summary that one looks at every day");
    stage.mainstay("status", &["status"], &[])
}
