//! Which crate may know which: the direction of the whole design, held by a table.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::shell;

/// Each crate and those of ours it may depend on. What is not listed is not allowed.
const ALLOWED: &[(&str, &[&str])] = &[
    ("mainstay-core", &[]),
    ("mainstay-diskimage", &["mainstay-core"]),
    ("mainstay-nbd", &["mainstay-core"]),
    ("mainstay-repository", &["mainstay-core"]),
    ("mainstay-workloads", &["mainstay-core", "mainstay-nbd", "mainstay-diskimage"]),
    (
        "mainstay-engine",
        &["mainstay-core", "mainstay-repository", "mainstay-workloads", "mainstay-diskimage", "mainstay-nbd"],
    ),
    (
        "mainstay",
        &[
            "mainstay-core",
            "mainstay-repository",
            "mainstay-workloads",
            "mainstay-diskimage",
            "mainstay-nbd",
            "mainstay-engine",
        ],
    ),
    ("mainstay-testkit", &["mainstay-core"]),
    ("xtask", &["mainstay-core"]),
];

/// May be used by tests only, but by the tests of every crate.
const TESTS_ONLY: &str = "mainstay-testkit";

/// The recovery data path is blocking threads; an async runtime belongs to a server crate.
const ASYNC_RUNTIMES: &[&str] = &["tokio", "async-std", "smol", "futures"];

pub(super) struct Package {
    name: String,
    dependencies: Vec<Dependency>,
    /// The files that targets (libraries, binaries, tests, benchmarks) start from, relative to the checkout.
    roots: Vec<String>,
}

struct Dependency {
    name: String,
    tests_only: bool,
}

/// The crates of the workspace, as cargo sees them.
pub(super) fn read_packages() -> Result<Vec<Package>> {
    let metadata = ["metadata", "--format-version=1", "--no-deps", "--offline"];
    let text = shell::capture(&mut shell::cargo(metadata))?;
    packages(&text, shell::root())
}

fn packages(metadata: &str, root: &Path) -> Result<Vec<Package>> {
    let metadata: Value = serde_json::from_str(metadata).context("cargo metadata printed no JSON")?;
    let listed = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    Ok(listed.iter().map(|package| read_package(package, root)).collect())
}

fn read_package(package: &Value, root: &Path) -> Package {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let each = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let dependency = |value: &Value| Dependency {
        name: text(&value["name"]),
        tests_only: value["kind"].as_str() == Some("dev"),
    };
    let start = |target: &Value| {
        let path = text(&target["src_path"]);
        Path::new(&path).strip_prefix(root).ok().and_then(Path::to_str).map(str::to_owned)
    };
    Package {
        name: text(&package["name"]),
        dependencies: each(&package["dependencies"]).iter().map(dependency).collect(),
        roots: each(&package["targets"]).iter().filter_map(start).collect(),
    }
}

pub(super) fn target_roots(packages: &[Package]) -> Vec<String> {
    packages.iter().flat_map(|package| package.roots.iter().cloned()).collect()
}

pub(super) fn forbidden(packages: &[Package]) -> Vec<String> {
    let mut complaints = Vec::new();
    for package in packages {
        let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == package.name) else {
            complaints
                .push(format!("{}: a new crate; say in tidy's ALLOWED what it may depend on", package.name));
            continue;
        };
        for Dependency { name, tests_only } in &package.dependencies {
            let ours = packages.iter().any(|other| other.name == *name);
            // A crate's own tests may ask it for a feature that only they need.
            let for_tests = name == TESTS_ONLY || *name == package.name;
            let fine = allowed.contains(&name.as_str()) || (*tests_only && for_tests);
            if ours && !fine {
                complaints.push(format!("{} must not depend on {name}; see ARCHITECTURE.md", package.name));
            }
            if ASYNC_RUNTIMES.contains(&name.as_str()) {
                complaints.push(format!("{}: {name} is async; recovery data moves on threads", package.name));
            }
        }
    }
    complaints
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{forbidden, packages, target_roots};

    const METADATA: &str = r#"{"packages": [
        {"name": "mainstay-core", "dependencies": [], "targets": []},
        {"name": "mainstay-testkit", "dependencies": [{"name": "mainstay-core", "kind": null}], "targets": []},
        {"name": "mainstay-workloads", "targets": [{"src_path": "/checkout/crates/workloads/src/lib.rs"}],
         "dependencies": [{"name": "mainstay-core", "kind": null}, {"name": "mainstay-testkit", "kind": "dev"}]},
        {"name": "mainstay-repository", "targets": [], "dependencies": [
            {"name": "mainstay-workloads", "kind": "dev"}, {"name": "mainstay-repository", "kind": "dev"}, {"name": "mainstay-testkit", "kind": null},
            {"name": "zstd", "kind": null}, {"name": "tokio", "kind": null}]},
        {"name": "mainstay-new", "dependencies": [], "targets": []}]}"#;

    #[test]
    fn edges_against_the_direction_are_named_and_the_others_are_not() {
        let packages = packages(METADATA, Path::new("/checkout")).unwrap();
        let complaints = forbidden(&packages);
        let expected = [
            "mainstay-repository must not depend on mainstay-workloads",
            "mainstay-repository must not depend on mainstay-testkit",
            "mainstay-repository: tokio is async",
            "mainstay-new: a new crate",
        ];
        assert_eq!(complaints.len(), expected.len(), "{complaints:?}");
        for (complaint, expected) in complaints.iter().zip(expected) {
            assert!(complaint.starts_with(expected), "{complaint}");
        }
        assert_eq!(target_roots(&packages), ["crates/workloads/src/lib.rs"]);
    }
}
