//! What is on hosts, and what is to become of it.

use serde_json::Value;

use crate::machine::{Machine, Ran};

/// Three machines that are shut down, of which `web` has a point, and an image that no machine uses. What the files
/// hold is nobody's business here.
fn hosts() -> Machine {
    let machine = Machine::with_repository();
    for image in ["images/web.raw", "images/db.raw", "images/scratch.raw", "spare/forgotten.raw"] {
        let file = machine.write(image, "");
        std::fs::File::options().write(true).open(file).unwrap().set_len(1 << 20).unwrap();
    }
    machine.run(&["vm", "backup", "--host", "dir:images", "web.raw", "--name", "web"]).ok();
    machine
}

const LIST: [&str; 7] = ["--json", "vm", "list", "--host", "dir:images", "--image-dir", "spare"];

/// What is said of each machine and of each other thing, with what was decided.
fn said(ran: &Ran) -> Vec<(String, String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let line = |line: Value| {
        let name = text(&line["name"]).rsplit('/').next().unwrap().to_owned();
        let word = if line["type"] == "machine" { &line["protection"] } else { &line["finding"] };
        (name, text(word), text(&line["standing"]))
    };
    ran.json().into_iter().map(line).collect()
}

fn expect(ran: &Ran, wanted: &[(&str, &str, &str)]) {
    let wanted: Vec<_> = wanted
        .iter()
        .map(|(name, word, standing)| ((*name).to_owned(), (*word).to_owned(), (*standing).to_owned()))
        .collect();
    assert_eq!(said(ran), wanted, "{ran:?}");
}

#[test]
fn everything_is_protected_ignored_or_undecided() {
    let mut machine = hosts();
    machine.environment.user = Some("bob".into());
    machine.later(20 * 86_400);
    let list = |machine: &Machine, more: &[&str]| machine.run(&[&LIST[..], more].concat());
    let rows = |db, scratch, forgotten| {
        [
            ("db.raw", "unprotected", db),
            ("scratch.raw", "unprotected", scratch),
            ("web.raw", "protected", "protected"),
            ("forgotten.raw", "orphaned-image", forgotten),
        ]
    };
    let nobody = rows("undecided", "undecided", "undecided");
    expect(&list(&machine, &[]).ok(), &nobody);
    assert_eq!(list(&machine, &["--check"]).exit, 21);

    machine.run(&["vm", "ignore", "db.raw", "--host", "dir:images"]).failed(2, "--why");
    machine.run(&["vm", "ignore", "db.raw", "--why", " "]).failed(2, "needs a reason");
    machine.run(&["vm", "ignore", "scratch.raw", "--why", "made anew", "--dry-run"]).ok();
    // Elsewhere there may be another of that name.
    machine.run(&["vm", "ignore", "db.raw", "--host", "dir:spare", "--why", "empty"]).ok();
    expect(&list(&machine, &[]).ok(), &nobody);

    let forgotten = machine.at("spare").canonicalize().unwrap().join("forgotten.raw");
    for (name, more) in [
        ("scratch.*", &["--until", "2096-11-01", "--by", "ann"][..]),
        ("db.raw", &["--host", "dir:images"]),
        (forgotten.to_str().unwrap(), &[]),
    ] {
        machine.run(&[&["vm", "ignore", name, "--why", "made anew"], more].concat()).ok();
    }
    let decided = list(&machine, &["--check"]).ok();
    expect(&decided, &rows("ignored", "ignored", "ignored"));
    let lines = decided.json();
    assert_eq!((&lines[0]["who"], &lines[0]["until"]), (&"bob".into(), &Value::Null));
    assert_eq!((&lines[1]["who"], &lines[1]["why"]), (&"ann".into(), &"made anew".into()));
    let text = machine.run(&LIST[1..]).ok().out;
    assert!(text.contains("ignored by ann: made anew, until 2096-11-01"), "{text}");

    machine.run(&["vm", "ignore", "db.raw", "--host", "dir:images", "--again"]).ok();
    let hint = machine.run(&["vm", "ignore", "db.raw", "--again"]).failed(1, "nobody decided").err;
    assert!(hint.contains("scratch.*"), "{hint}");
    machine.later(30 * 86_400);
    expect(&list(&machine, &[]).ok(), &rows("undecided", "undecided", "ignored"));
}

#[test]
fn what_is_overdue_gone_or_twice_is_told() {
    let machine = hosts();
    machine.write("copies/db.raw", "");
    std::fs::remove_file(machine.at("images/web.raw")).unwrap();
    std::fs::copy(machine.at("images/scratch.raw"), machine.at("copies/scratch.raw")).unwrap();
    std::fs::remove_file(machine.at("images/scratch.raw")).unwrap();
    machine.run(&["vm", "backup", "--host", "dir:copies", "scratch.raw"]).ok();
    machine.later(2 * 86_400);
    let list = machine.run(&[
        "--json",
        "vm",
        "list",
        "--host",
        "dir:images",
        "--host",
        "dir:copies",
        "--max-age",
        "1d",
    ]);
    expect(
        &list.ok(),
        &[
            ("db.raw", "unprotected", "undecided"),
            ("db.raw", "unprotected", "undecided"),
            ("scratch.raw", "overdue", "undecided"),
            ("db.raw", "clone", "undecided"),
            ("db.raw", "clone", "undecided"),
            ("web", "gone", "undecided"),
        ],
    );
    let text = machine.run(&["vm", "list", "--host", "dir:copies", "--max-age", "1d"]).ok().out;
    assert!(text.contains("OVERDUE") && text.contains("FINDING") && text.contains("gone"), "{text}");
}
