//! What is promised about output as such: streams, schema, help, pipes that close.

use std::path::Path;

use crate::machine::{Machine, PASSPHRASE};

#[test]
fn the_committed_schema_is_what_the_program_prints() {
    let printed = Machine::new().run(&["schema"]).ok().out;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/json/mainstay.schema.json");
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        printed == committed,
        "the schema changed: cargo run -p mainstay -- schema > docs/json/mainstay.schema.json"
    );
}

#[test]
fn the_exit_codes_are_those_of_the_documentation() {
    let documented = include_str!("../../../../docs/exit-codes.md");
    let codes = Machine::new().run(&["--json", "exit-codes"]).ok().json();
    assert!(codes.len() > 15);
    for code in codes {
        let row = format!("| {} | {} |", code["exit"], code["name"].as_str().unwrap());
        assert!(documented.contains(&row), "{row}");
    }
}

#[test]
fn every_verb_teaches_and_help_is_data() {
    let machine = Machine::new();
    let help = machine.run(&["--help"]).ok();
    assert!(help.err.is_empty() && help.out.contains("Five minutes"), "{help:?}");
    let verbs: Vec<&str> = help
        .out
        .lines()
        .skip_while(|line| !line.starts_with("Commands:"))
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(verbs.len() >= 17, "{verbs:?}");
    for verb in verbs.into_iter().filter(|verb| *verb != "help") {
        assert!(machine.run(&[verb, "--help"]).ok().out.contains("Usage: mainstay"), "{verb}");
    }
    assert!(machine.run(&["--version"]).ok().out.starts_with("mainstay "));
}

#[test]
fn command_lines_that_make_no_sense_are_exit_2_in_text_and_json() {
    let machine = Machine::new();
    assert_eq!(machine.run(&[]).exit, 2);
    let ran = machine.run(&["restroe"]);
    assert_eq!((ran.exit, ran.out.as_str()), (2, ""));
    assert!(ran.err.contains("restore"), "{}", ran.err);
    let failed = machine.run(&["--json", "points", "--nonsense"]);
    assert_eq!((failed.exit, failed.only("failed")["code"].as_str()), (2, Some("usage")));
}

#[test]
fn errors_are_a_line_of_json_as_well_and_secrets_given_as_arguments_are_not_taken() {
    let machine = Machine::new();
    let failed = machine.run(&["--json", "points"]);
    assert_eq!((failed.exit, failed.only("failed")["exit"].as_u64()), (10, Some(10)));
    assert_eq!(machine.run(&["points", "--passphrase", "x"]).exit, 2);
}

#[test]
fn talk_is_on_stderr_and_quiet_silences_it() {
    let machine = Machine::with_repository();
    machine.write("home/d/a", "x");
    let ran = machine.run(&["--quiet", "backup", "home/d"]).ok();
    assert_eq!(ran.err, "");
    assert!(machine.run(&["--quiet", "status"]).ok().err.is_empty());
    assert!(machine.run(&["status"]).ok().err.contains("verify"));
    let ran = machine.run(&["--json", "backup", "home/d"]).ok();
    assert_eq!(ran.json().len(), 1);
}

#[test]
fn colour_is_for_terminals_and_no_color_wins() {
    let mut machine = Machine::new();
    machine.terminal.errors = true;
    assert!(machine.run(&["points"]).err.starts_with("\u{1b}[1;31merror:"));
    machine.environment.no_color = true;
    assert!(machine.run(&["points"]).err.starts_with("error:"));
}

#[test]
fn a_reader_that_goes_away_is_no_error_and_stops_no_backup() {
    let machine = Machine::with_repository();
    for number in 0..200 {
        machine.write(&format!("home/d/file-{number}"), &"x".repeat(5000));
    }
    assert_eq!(machine.run_until(0, &["backup", "home/d"]).exit, 0);
    assert_eq!(machine.run(&["--json", "points"]).ok().json().len(), 1);
    let ran = machine.run_until(100, &["ls", "latest", "-R"]);
    assert!(ran.exit == 0 && ran.bytes.len() < 1000, "{}", ran.bytes.len());
    assert_eq!(machine.run_until(1, &["find", "*"]).exit, 0);
    assert_eq!(machine.run_until(1, &["cat", "latest", &machine.arg("home/d/file-7")]).exit, 0);
}

#[test]
fn a_mistake_of_ours_is_exit_70_and_says_so() {
    let mut machine = Machine::new();
    machine.terminal.input = true;
    machine.answers.panic();
    let ran = machine.run(&["init"]).failed(70, "a mistake in Mainstay");
    assert!(ran.err.contains("please report"), "{}", ran.err);
}

#[test]
fn completions_and_man_pages_know_every_verb() {
    let machine = Machine::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(machine.run(&["completions", shell]).ok().out.contains("restore"), "{shell}");
    }
    machine.run(&["man", "pages"]).ok();
    for page in ["mainstay.1", "mainstay-backup.1", "mainstay-key-writer-add.1"] {
        assert!(machine.read(&format!("pages/{page}")).contains(".TH"), "{page}");
    }
}

#[test]
fn secrets_that_arrive_by_mistake_are_not_repeated() {
    let mut machine = Machine::new();
    // A passphrase where a key file's name belongs would be shown as a name; one inside a file must not be.
    machine.write("not-a-key", PASSPHRASE);
    std::fs::set_permissions(machine.at("not-a-key"), std::os::unix::fs::PermissionsExt::from_mode(0o600))
        .unwrap();
    machine.environment.passphrase.command = Some(format!("false {PASSPHRASE}").into());
    machine.run(&["init"]).failed(1, "MAINSTAY_PASSPHRASE_COMMAND");
    machine.environment.passphrase.command = None;
    machine.run(&["init", "--generate-key", "--kit", "kit.txt"]).ok();
    machine.run(&["--key-file", "not-a-key", "points"]).failed(2, "neither a key file");
    machine.run(&["--with-kit", "not-a-key", "points"]).failed(2, "recovery kit");
}
