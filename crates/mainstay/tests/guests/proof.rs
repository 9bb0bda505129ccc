//! A point is proven by starting it, or not.

use std::process::{Output, Stdio};

use mainstay_testkit::lab::{PATIENCE, blank, patiently};
use serde_json::Value;

use crate::home::Home;

fn prove(home: &Home, more: &[&str]) -> Output {
    let words = ["vm", "prove", "web@latest", "--accel", "tcg", "--memory", "384", "--cpus", "1"];
    let output = home.command(&[&words, more].concat()).output().unwrap();
    println!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    output
}

/// A proof that dies leaves its machine and its directory, which the next one clears away.
fn kill_a_proof(home: &Home) {
    let words = ["vm", "prove", "web@latest", "--accel", "tcg", "--memory", "64"];
    let mut program = home.command(&words).stdout(Stdio::null()).spawn().unwrap();
    let monitors =
        || std::fs::read_dir(home.at("tmp")).unwrap().map(|entry| entry.unwrap().path().join("qmp"));
    patiently("a machine", PATIENCE, || Ok(monitors().any(|path| path.exists()).then_some(()))).unwrap();
    program.kill().unwrap();
    program.wait().unwrap();
}

/// When the point was proven.
fn proven(home: &Home) -> Value {
    let lines = home.run(&["points"]);
    lines.into_iter().find(|line| line["type"] == "point").unwrap()["proven"].take()
}

/// No process, and nothing in the place for what is temporary.
fn nothing_is_left(home: &Home) {
    assert_eq!(std::fs::read_dir(home.at("tmp")).unwrap().count(), 0);
    let tmp = home.at("tmp").to_str().unwrap().to_owned();
    for process in std::fs::read_dir("/proc").unwrap().flatten() {
        let words = std::fs::read(process.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).into_owned();
        assert!(!words.contains(&tmp), "{words}");
    }
}

/// What a failed proof has kept.
fn evidence(home: &Home) -> String {
    let kept = std::fs::read_dir(home.at("state/mainstay/state/unproven")).unwrap();
    let mut kept = kept.map(|entry| entry.unwrap().path());
    let directory = kept.next().unwrap();
    assert_eq!(std::fs::read(directory.join("screen.png")).unwrap().get(1..4), Some(b"PNG".as_slice()));
    std::fs::read_to_string(directory.join("console")).unwrap()
}

#[test]
fn a_point_that_comes_up_is_proven_and_one_that_fails_a_check_is_not() {
    let home = Home::new();
    home.back_up_image();
    let failed = prove(&home, &["--check", "true", "--check", "test -e /etc/nothing"]);
    assert_eq!(failed.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&failed.stderr);
    assert!(errors.contains("\"test -e /etc/nothing\" ended with status 1"), "{errors}");
    assert!(evidence(&home).contains("GUEST READY"));
    assert_eq!(proven(&home), Value::Null);
    nothing_is_left(&home);

    let passed =
        prove(&home, &["--check", "test $(cat /etc/hostname) = guest", "--screenshot", "screen.png"]);
    assert!(passed.status.success());
    let line: Value = serde_json::from_slice(&passed.stdout).unwrap();
    assert_eq!((line["type"].as_str(), line["checks"].as_u64()), (Some("proven"), Some(1)));
    assert_eq!(std::fs::read(home.at("screen.png")).unwrap().get(1..4), Some(b"PNG".as_slice()));
    assert_ne!(proven(&home), Value::Null);
    nothing_is_left(&home);
}

#[test]
fn a_machine_that_never_answers_is_not_proven() {
    let home = Home::new();
    let images = home.at("images");
    std::fs::create_dir_all(images.join("web")).unwrap();
    blank(&images.join("web/vda.qcow2"), 16).unwrap();
    let host = format!("dir:{}", images.display());
    let words = ["vm", "backup", "--host", &host, "web", "--prove", "--prove-wait", "1s"];
    let output = home.command(&words).output().unwrap();
    let lines = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{lines}");
    assert!(lines.contains("\"type\":\"backed_up\"") && lines.contains("\"type\":\"unproven\""), "{lines}");
    kill_a_proof(&home);
    let failed = prove(&home, &["--wait", "2s"]);
    assert_eq!(failed.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&failed.stderr).contains("did not answer within 2s"));
    evidence(&home);
    assert_eq!(proven(&home), Value::Null);
    nothing_is_left(&home);
}
