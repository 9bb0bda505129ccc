//! Makes the data sets and their second states. Every random choice comes from a fixed seed.

use std::fs::{self, File};
use std::io::{BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};

use super::{Set, Sizes, files_below, rename};
use crate::bench::pick::pick;
use crate::bench::random::{Random, hash};
use crate::shell;

const PAGE_BYTES: usize = 8192;
/// A fixed moment for the file systems in the images, 2023-11-14.
const IMAGE_TIME: &str = "1700000000";

pub(super) fn all(directory: &Path, sizes: &Sizes) -> Result<()> {
    for set in Set::ALL {
        for state in ["now", "other"] {
            fs::create_dir_all(directory.join(state).join(set.name()))?;
        }
    }
    fs::create_dir_all(directory.join("kept"))?;
    let of = |state: &str, set: Set| directory.join(state).join(set.name());
    pick(&of("now", Set::Tree).join("tree"), sizes.tree, "tree", 100)?;
    random(&of("now", Set::Random), &of("other", Set::Random), sizes.random).context("cannot make set b")?;
    let stage = directory.join("stage");
    images(&stage, &of("now", Set::Images), &of("other", Set::Images), sizes).context("cannot make set c")?;
    database(&of("now", Set::Database), &of("other", Set::Database), sizes.database)
        .context("cannot make set d")
}

fn random(now: &Path, other: &Path, size: u64) -> Result<()> {
    let (now, other) = (now.join("random.bin"), other.join("random.bin"));
    Random::from_seed(7).write(&mut File::create(&now)?, size)?;
    let mut random = Random::from_seed(8);
    let (mut first, mut second) = (File::open(now)?, File::create(other)?);
    std::io::copy(&mut (&mut first).take(size / 3), &mut second)?;
    second.write_all(&random.bytes(1000))?;
    std::io::copy(&mut first, &mut second)?;
    for _ in 0..16 {
        let offset = random.below(size - (1 << 20));
        second.write_all_at(&random.bytes(1 << 20), offset)?;
    }
    Ok(())
}

fn database(now: &Path, other: &Path, size: u64) -> Result<()> {
    let (now, other) = (now.join("data.db"), other.join("data.db"));
    let mut random = Random::from_seed(42);
    let words: Vec<String> = (0..4096).map(|_| format!("{:x}", random.next() >> 24)).collect();
    let pages = size / PAGE_BYTES as u64;
    let mut file = BufWriter::new(File::create(&now)?);
    for number in 0..pages {
        file.write_all(&page(number, &words, &mut random))?;
    }
    file.flush()?;
    fs::copy(&now, &other)?;
    let mut file = File::options().write(true).open(&other)?;
    for number in random.sample(pages / 50, pages) {
        let start = number * PAGE_BYTES as u64;
        file.write_all_at(&random.bytes(8), start + 8)?;
        let inside = 100 + random.below(5900);
        file.write_all_at(&random.bytes(200), start + inside)?;
    }
    file.seek(SeekFrom::End(0))?;
    for _ in 0..pages / 100 {
        let mut appended = random.bytes(5000);
        appended.resize(PAGE_BYTES, 0);
        file.write_all(&appended)?;
    }
    Ok(())
}

/// A page as a database writes it: a header with a number that always differs, rows of words and keys, free space.
fn page(number: u64, words: &[String], random: &mut Random) -> Vec<u8> {
    let mut page = number.to_le_bytes().to_vec();
    page.extend(random.bytes(8));
    while page.len() < PAGE_BYTES - 1200 {
        let word = usize::try_from(random.below(words.len() as u64)).unwrap_or(0);
        page.extend(words[word].as_bytes());
        page.push(b'|');
        page.extend(random.bytes(14));
        page.extend([0; 4]);
    }
    page.resize(PAGE_BYTES, 0);
    page
}

fn images(stage: &Path, now: &Path, other: &Path, sizes: &Sizes) -> Result<()> {
    let base = stage.join("base");
    pick(&base, sizes.image_content, "image", 94)?;
    for number in 1..=3_u64 {
        let root = stage.join("root");
        individual(&base, &root, number)?;
        let name = format!("vm{number}.raw");
        let image = now.join(&name);
        File::create(&image)?.set_len(sizes.image)?;
        let uuid = format!("0000000{number}-0000-4000-8000-000000000000");
        let seed = "hash_seed=00000000-0000-4000-8000-000000000001";
        let mut mke2fs =
            shell::command("mke2fs", ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0"]);
        mke2fs
            .args(["-U", &uuid, "-E", seed, "-d"])
            .arg(&root)
            .arg(&image)
            .env("SOURCE_DATE_EPOCH", IMAGE_TIME);
        shell::capture(&mut mke2fs)?;
        fs::remove_dir_all(&root)?;
        let changed = other.join(name);
        shell::capture(shell::command("cp", ["--sparse=always"]).arg(&image).arg(&changed))?;
        add_files(&changed, &stage.join("new"), number)?;
    }
    fs::remove_dir_all(stage).context("cannot remove the staging directory")
}

/// Copies the common tree for one machine: 3 % of the files missing, 3 % edited, its own name and log.
pub(in crate::bench) fn individual(base: &Path, root: &Path, number: u64) -> Result<()> {
    for (path, _) in files_below(base)? {
        let (from, to) = (base.join(&path), root.join(&path));
        fs::create_dir_all(to.parent().unwrap_or(root))?;
        match hash(&number.to_string(), path.as_os_str().as_bytes()) % 100 {
            0..3 => {}
            3..6 => {
                let mut text = fs::read(&from)?;
                let middle = text.len() / 2;
                text.splice(middle..middle, format!("# vm{number}\n").into_bytes());
                fs::write(&to, text)?;
            }
            _ => fs::hard_link(&from, &to)?,
        }
    }
    fs::create_dir_all(root.join("etc"))?;
    fs::create_dir_all(root.join("var/log"))?;
    fs::write(root.join("etc/hostname"), format!("vm{number}\n"))?;
    let mut random = Random::from_seed(number);
    let mut log = BufWriter::new(File::create(root.join("var/log/syslog"))?);
    for line in 0..120_000_u64 {
        let (day, second, took) = (1 + line % 28, line % 60, random.below(1000));
        let request = random.next();
        writeln!(log, "2026-01-{day:02}T00:00:{second:02} vm{number} service: {request:x} took {took} ms")?;
    }
    Ok(log.flush()?)
}

/// The second state of an image: 40 new files of up to 1.5 MB in its file system, and the log removed.
pub(in crate::bench) fn add_files(image: &Path, scratch: &Path, number: u64) -> Result<()> {
    fs::create_dir_all(scratch)?;
    let mut random = Random::from_seed(100 + number);
    let mut commands = String::new();
    for index in 0..40 {
        let file = scratch.join(index.to_string());
        let size = random.below(1_500_000);
        random.write(&mut File::create(&file)?, size)?;
        commands.push_str(&format!("write {} /new{index}\n", file.display()));
    }
    commands.push_str("rm /var/log/syslog\n");
    let script = scratch.join("commands");
    fs::write(&script, commands)?;
    let mut debugfs = shell::command("debugfs", ["-w", "-f"]);
    let done = shell::output(debugfs.arg(&script).arg(image))?;
    anyhow::ensure!(done.status.success(), "debugfs failed: {}", String::from_utf8_lossy(&done.stderr));
    Ok(fs::remove_dir_all(scratch)?)
}

/// Edits 1 % of the files in place of their old selves, removes 0.5 % and adds 0.5 %. The old files go to `kept`
/// by rename, so that [`reset_tree`] can put them back.
pub(super) fn change_tree(tree: &Path, kept: &Path) -> Result<()> {
    let files: Vec<_> = files_below(tree)?.into_keys().collect();
    let mut random = Random::from_seed(1234);
    for (turn, index) in random.sample(files.len() as u64 / 50, files.len() as u64).into_iter().enumerate() {
        let path = &files[usize::try_from(index)?];
        let old = tree.join(path);
        if turn % 4 == 3 {
            let size = usize::try_from(1 + random.below(30_000))?;
            fs::write(new_name(&old), random.bytes(size))?;
            continue;
        }
        let mut text = fs::read(&old)?;
        let aside = kept.join(path);
        fs::create_dir_all(aside.parent().unwrap_or(kept))?;
        rename(&old, &aside)?;
        if turn % 4 < 2 {
            let middle = usize::try_from(random.below(text.len() as u64 + 1))?;
            text.splice(middle..middle, random.bytes(40));
            fs::write(&old, text)?;
        }
    }
    Ok(())
}

pub(super) fn reset_tree(tree: &Path, kept: &Path) -> Result<()> {
    for path in files_below(tree)?.into_keys().filter(|path| path.to_string_lossy().ends_with(NEW)) {
        fs::remove_file(tree.join(path))?;
    }
    for path in files_below(kept)?.into_keys() {
        rename(&kept.join(&path), &tree.join(&path))?;
    }
    fs::remove_dir_all(kept)?;
    Ok(fs::create_dir_all(kept)?)
}

/// No picked file ends like this.
const NEW: &str = ".new-in-the-second-state";

fn new_name(path: &Path) -> std::path::PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(NEW);
    name.into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::{change_tree, files_below, reset_tree};

    fn content(tree: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
        let read = |path: PathBuf| (path.clone(), fs::read(tree.join(path)).unwrap());
        files_below(tree).unwrap().into_keys().map(read).collect()
    }

    #[test]
    fn a_changed_tree_comes_back_as_it_was_and_changes_the_same_way_again() {
        let place = std::env::temp_dir().join(format!("mainstay-change-{}", std::process::id()));
        let (tree, kept) = (place.join("tree"), place.join("kept"));
        fs::create_dir_all(tree.join("deep")).unwrap();
        fs::create_dir_all(&kept).unwrap();
        for number in 0..400 {
            fs::write(tree.join(format!("deep/{number}")), format!("file {number}")).unwrap();
        }
        let first = content(&tree);
        change_tree(&tree, &kept).unwrap();
        let changed = content(&tree);
        let count = |keep: &dyn Fn(&PathBuf) -> bool| changed.keys().filter(|path| keep(path)).count();
        assert_eq!(count(&|path| !first.contains_key(path)), 2, "new");
        assert_eq!(first.keys().filter(|path| !changed.contains_key(*path)).count(), 2, "removed");
        assert_eq!(count(&|path| first.get(path).is_some_and(|old| *old != changed[path])), 4, "edited");
        reset_tree(&tree, &kept).unwrap();
        assert_eq!(content(&tree), first);
        change_tree(&tree, &kept).unwrap();
        assert_eq!(content(&tree), changed);
        fs::remove_dir_all(place).unwrap();
    }
}
