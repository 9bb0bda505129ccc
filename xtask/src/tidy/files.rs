//! Rules about single files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::File;
use crate::shell;

const LINES_MAX: usize = 800;

/// Files that may be longer, each with the reason.
const LONG_WITH_REASON: &[(&str, &str)] = &[];

/// Source files that may print, each with the reason.
const PRINTERS: &[(&str, &str)] = &[
    ("xtask/src/say.rs", "the voice of xtask"),
    ("crates/testkit/src/rng.rs", "tells the seed of a random test, so that it can be run again"),
];

pub(super) fn too_long(files: &[File]) -> Vec<String> {
    let excused = |path: &str| LONG_WITH_REASON.iter().any(|(known, _reason)| *known == path);
    let lengths =
        files.iter().filter(|file| file.is_rust()).map(|file| (&file.path, file.text().lines().count()));
    lengths
        .filter(|(path, lines)| *lines > LINES_MAX && !excused(path))
        .map(|(path, lines)| {
            format!("{path}: {lines} lines, at most {LINES_MAX}; which two nouns live in it?")
        })
        .collect()
}

/// Places that pretend to be finished. The words are put together here so that this file is not one of them.
pub(super) fn hollow(files: &[File]) -> Vec<String> {
    let words = [
        concat!("to", "do!("),
        concat!("unimpl", "emented!("),
        concat!("#[ign", "ore"),
        concat!("FIX", "ME"),
        concat!("assert!(", "true)"),
    ];
    let mut complaints = Vec::new();
    for file in files.iter().filter(|file| file.is_rust()) {
        for (number, line) in file.lines() {
            if let Some(word) = words.iter().find(|word| line.contains(**word)) {
                complaints.push(format!("{}:{number}: {word} is not finished work", file.path));
            }
        }
    }
    complaints
}

/// Clippy warns about every print; this sees that the permission to print is given in named files only.
pub(super) fn printing(files: &[File]) -> Vec<String> {
    let permissions = [concat!("clippy::print", "_stdout"), concat!("clippy::print", "_stderr")];
    let allowed = |path: &str| PRINTERS.iter().any(|(known, _reason)| *known == path);
    let asks = |file: &File| permissions.iter().any(|permission| file.text().contains(permission));
    files
        .iter()
        .filter(|file| file.is_rust() && asks(file) && !allowed(&file.path))
        .map(|file| {
            format!("{}: may not print; return the text, or name the file in tidy's PRINTERS", file.path)
        })
        .collect()
}

/// Names that only this machine has: the directories above the checkout, and hidden ones in the home directory.
pub(super) fn machine_names() -> Vec<String> {
    let everywhere = [
        "/", "/tmp", "/home", "/root", "/usr", "/usr/src", "/var", "/var/tmp", "/opt", "/srv", "/mnt", "/src",
    ];
    let above = shell::root().ancestors().skip(1).filter_map(Path::to_str);
    let above = above.filter(|path| !everywhere.contains(path)).map(|path| format!("{path}/"));
    let home = shell::variable("HOME").map(PathBuf::from);
    let home = home.and_then(|path| Some(format!("{}/.", path.to_str()?))).filter(|path| path.len() > 2);
    above.chain(home).collect()
}

pub(super) fn naming_a_machine(files: &[File], names: &[String]) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files {
        for (number, line) in file.lines() {
            if let Some(name) = names.iter().find(|name| line.contains(name.as_str())) {
                complaints.push(format!("{}:{number}: {name} is a path of one machine", file.path));
            }
        }
    }
    complaints
}

/// Rust files that no target reaches through `mod`: they are never compiled, so their tests never run.
pub(super) fn forgotten(files: &[File], roots: &[String]) -> Vec<String> {
    let mut reached = BTreeSet::new();
    let mut waiting: Vec<(String, bool)> = roots.iter().map(|root| (root.clone(), true)).collect();
    while let Some((path, is_root)) = waiting.pop() {
        let Some(file) = files.iter().find(|file| file.path == path) else { continue };
        if !reached.insert(path.clone()) {
            continue;
        }
        let directory = modules_directory(&path, is_root);
        for name in file.text().lines().filter_map(module_name) {
            waiting.push((format!("{directory}/{name}.rs"), false));
            waiting.push((format!("{directory}/{name}/mod.rs"), false));
        }
    }
    let ours = |path: &str| path.starts_with("crates/") || path.starts_with("xtask/");
    files
        .iter()
        .filter(|file| file.is_rust() && ours(&file.path) && !reached.contains(&file.path))
        .map(|file| format!("{}: no target reaches it; declare it with `mod` or remove it", file.path))
        .collect()
}

/// Where the modules declared in the file at `path` lie.
fn modules_directory(path: &str, is_root: bool) -> String {
    let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
    if is_root || name == "mod.rs" {
        return directory.to_owned();
    }
    format!("{directory}/{}", name.trim_end_matches(".rs"))
}

/// The name in a line such as `pub(crate) mod name;`.
fn module_name(line: &str) -> Option<&str> {
    let declaration = line.trim().strip_suffix(';')?;
    let (before, name) = declaration.rsplit_once("mod ")?;
    let visibility = before.trim();
    let plain = name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_');
    (plain && (visibility.is_empty() || visibility.starts_with("pub"))).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::{LINES_MAX, forgotten, hollow, naming_a_machine, printing, too_long};

    #[test]
    fn a_file_may_have_the_most_lines_and_not_one_more() {
        let text = |lines: usize| "x\n".repeat(lines);
        let files = [file("a.rs", &text(LINES_MAX)), file("b.rs", &text(LINES_MAX + 1))];
        let complaints = too_long(&files);
        assert!(matches!(&complaints[..], [only] if only.starts_with("b.rs: 801")), "{complaints:?}");
    }

    #[test]
    fn hollow_places_and_prints_are_found() {
        let files = [
            file("a.rs", concat!("fn f() {\n    to", "do!()\n}")),
            file("b.rs", concat!("#![expect(clippy::print", "_stdout)]")),
            file("xtask/src/say.rs", concat!("#![expect(clippy::print", "_stdout)]")),
        ];
        assert!(hollow(&files)[0].starts_with("a.rs:2:"));
        let complaints = printing(&files);
        assert!(matches!(&complaints[..], [only] if only.starts_with("b.rs")), "{complaints:?}");
    }

    #[test]
    fn a_path_of_one_machine_is_found() {
        let files = [file("README.md", "one\ncd /here/checkout/it")];
        assert!(naming_a_machine(&files, &["/here/checkout/".into()])[0].starts_with("README.md:2"));
        assert!(naming_a_machine(&files, &["/there/".into()]).is_empty());
    }

    #[test]
    fn a_test_that_no_root_declares_is_forgotten() {
        let files = [
            file("crates/x/tests/main.rs", "mod one;\n"),
            file("crates/x/tests/one.rs", "mod deep;\n"),
            file("crates/x/tests/one/deep.rs", ""),
            file("crates/x/tests/two.rs", "// mod nobody;\n"),
            file("crates/x/src/lib.rs", "pub(crate) mod part;"),
            file("crates/x/src/part/mod.rs", ""),
        ];
        let roots = ["crates/x/tests/main.rs".to_owned(), "crates/x/src/lib.rs".to_owned()];
        let complaints = forgotten(&files, &roots);
        assert!(
            matches!(&complaints[..], [only] if only.starts_with("crates/x/tests/two.rs")),
            "{complaints:?}"
        );
    }
}
