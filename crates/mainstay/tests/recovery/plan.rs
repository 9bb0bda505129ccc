//! `vm recover`.

use serde_json::Value;

use crate::recreate::machines;
use crate::user::{User, same};

const HEAD: &str = "host = \"dir:new\"\ndirectory = \"new\"\nformat = \"raw\"\n";

fn machine(name: &str, more: &str) -> String {
    format!("[[machine]]\npoint = \"{name}@latest\"\n{more}\n")
}

/// How each machine ended, in the order of the run.
fn states(user: &User, more: &[&str]) -> Vec<(String, String)> {
    let output = user.try_run(&[&["vm", "recover", "plan.toml", "--json"], more].concat());
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines = out.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let text = |line: &Value, key: &str| line[key].as_str().unwrap().to_owned();
    let wanted = ["recovery_state", "recovery_planned"];
    let lines = lines.filter(|line| wanted.contains(&line["type"].as_str().unwrap()));
    lines.map(|line| (text(&line, "name"), text(&line, "state"))).collect()
}

fn said(states: &[(String, String)]) -> Vec<String> {
    states.iter().map(|(name, state)| format!("{name} {state}")).collect()
}

#[test]
fn what_fails_stops_those_that_come_after_it_and_the_next_run_goes_on() {
    let user = machines(&["app", "db", "web"]);
    std::fs::create_dir(user.at("new")).unwrap();
    let plan = |db: &str| {
        let machines = [machine("web", "after = [\"app\"]"), machine("app", "after = [\"db\"]")];
        std::fs::write(
            user.at("plan.toml"),
            format!("{HEAD}{}{}{}", machines.concat(), machine("db", db), {
                machine("web", "name = \"alone\"")
            }),
        )
        .unwrap();
    };
    // A disk that does not fit.
    plan("sizes = { \"a.raw\" = \"1 MiB\" }");
    assert_eq!(said(&states(&user, &["--dry-run"])), ["db impossible", "app new", "web new", "alone new"]);
    assert_eq!(std::fs::read_dir(user.at("new")).unwrap().count(), 0, "a dry run changed something");
    user.fails(&["vm", "recover", "plan.toml"], 1, "3 of 4 machines were not recovered");
    assert_eq!(
        said(&states(&user, &[])),
        ["db failed", "app not tried", "web not tried", "alone was complete"]
    );
    plan("");
    assert_eq!(said(&states(&user, &["--only", "app"])), ["app complete"]);
    assert_eq!(
        said(&states(&user, &[])),
        ["db complete", "app was complete", "web complete", "alone was complete"]
    );
    for (name, of) in [("db", "db"), ("app", "app"), ("web", "web"), ("alone", "web")] {
        same(&user.at(&format!("new/{name}/a.raw.raw")), &user.at(&format!("images/{of}/a.raw")));
    }
    let receipt = user.run(&["vm", "recover", "plan.toml"]);
    assert!(receipt.contains("IN ALL") && receipt.contains("was complete"), "{receipt}");
}

#[test]
fn disks_become_larger_and_a_part_of_them_comes_back() {
    let user = machines(&["db"]);
    std::fs::create_dir(user.at("new")).unwrap();
    let text = machine(
        "db",
        "disks = [\"a.raw\"]\nsizes = { \"a.raw\" = \"96 MiB\" }\ncpus = 3\nmemory = \"256 MiB\"",
    );
    std::fs::write(user.at("plan.toml"), format!("{HEAD}{text}")).unwrap();
    let shown = user.run(&["vm", "recover", "plan.toml", "--dry-run"]);
    assert!(shown.contains("96 MiB") && shown.contains("256"), "{shown}");
    user.run(&["vm", "recover", "plan.toml"]);
    assert_eq!(user.at("new/db/a.raw.raw").metadata().unwrap().len(), 96 << 20);
    let script = std::fs::read_to_string(user.at("new/db/start")).unwrap();
    assert!(script.contains("-smp '3'") && script.contains("-m '256'"), "{script}");
}

#[test]
fn a_plan_that_makes_no_sense_says_where_and_the_example_makes_sense() {
    let user = machines(&["db", "web"]);
    std::fs::write(user.at("plan.toml"), format!("{HEAD}{}", machine("db", "memry = \"1 GiB\""))).unwrap();
    user.fails(&["vm", "recover", "plan.toml"], 2, "do you mean \"memory\"?");
    user.fails(&["vm", "recover", "none.toml"], 1, "none.toml");
    let example = user.run(&["vm", "recover", "--example"]);
    assert!(example.contains("db@latest") && example.contains("web@latest"), "{example}");
    std::fs::create_dir(user.at("new")).unwrap();
    // With every choice that it has in comments.
    let all: String = example
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(choice)
                if choice.starts_with(|letter: char| letter.is_ascii_lowercase() || letter == '"') =>
            {
                choice
            }
            _ => line,
        })
        .map(|line| format!("{line}\n"))
        .collect();
    for text in [example.clone(), all] {
        let text =
            text.replace("qemu:///system", "dir:new").replace("/var/lib/libvirt/images/recovered", "new");
        std::fs::write(user.at("plan.toml"), &text).unwrap();
        assert_eq!(said(&states(&user, &["--dry-run"])), ["db new", "web new"], "{text}");
    }
}
