//! Names that are no UTF-8: on the command line, in the environment, and in the JSON.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::symlink;

use serde_json::Value;

use crate::machine::Machine;

fn odd(bytes: &[u8]) -> OsString {
    OsString::from_vec(bytes.to_vec())
}

/// What a field of base64 holds, by the program that everybody has.
fn decoded(field: &Value) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = field.as_str().unwrap().trim_end_matches('=').bytes();
    let bits = digits.flat_map(|digit| {
        let value = DIGITS.iter().position(|known| *known == digit).unwrap();
        (0..6).rev().map(move |bit| value >> bit & 1)
    });
    let bits: Vec<usize> = bits.collect();
    bits.chunks_exact(8).map(|byte| byte.iter().fold(0, |all, bit| all << 1 | *bit as u8)).collect()
}

#[test]
fn roots_targets_links_and_files_come_in_bytes_as_well() {
    let machine = Machine::with_repository();
    let run = |arguments: &[&OsStr]| {
        let all = [&[OsStr::new("--json")], arguments].concat();
        machine.run_bytes(usize::MAX, &all).ok()
    };
    let word = |text: &'static str| OsStr::new(text);
    let (one, other) = (machine.place.path().join(odd(b"r\xff")), machine.place.path().join(odd(b"r\xfe")));
    for root in [&one, &other] {
        std::fs::create_dir(root).unwrap();
        symlink(odd(b"to\xff"), root.join("link")).unwrap();
    }
    let made = [&one, &other].map(|root| {
        let done = run(&[word("backup"), root.as_os_str()]).only("backed_up");
        assert_eq!(decoded(&done["roots_base64"][0]), root.as_os_str().as_bytes());
        done
    });
    assert_ne!(made[0]["workload"], made[1]["workload"], "two trees are one workload");
    assert_eq!(run(&[word("backup"), one.as_os_str()]).only("backed_up")["workload"], made[0]["workload"]);
    let points = run(&[word("points")]).json();
    assert_eq!(decoded(&points[1]["roots_base64"][0]), other.as_os_str().as_bytes());
    let items = run(&[word("ls"), word("latest"), word("-R")]).json();
    let link = items.iter().find(|item| item["kind"] == "symlink").unwrap();
    assert_eq!(decoded(&link["link_target_base64"]), b"to\xff");
    let target = machine.place.path().canonicalize().unwrap().join(odd(b"back\xff"));
    let to = [word("restore"), word("latest"), word("--to"), target.as_os_str()];
    let plan = run(&[&to[..], &[word("-n")]].concat()).only("restore_plan");
    assert_eq!(decoded(&plan["target_base64"]), target.as_os_str().as_bytes());
    assert_eq!(decoded(&run(&to).only("restored")["target_base64"]), target.as_os_str().as_bytes());
    let file = machine.place.path().join(odd(b"cred\xff"));
    let writer = ["key", "writer", "add", "phone", "--out"].map(OsStr::new);
    let added = run(&[&writer[..], &[file.as_os_str()]].concat()).only("writer");
    assert_eq!(decoded(&added["file_base64"]), file.as_os_str().as_bytes());
}

#[test]
fn a_repository_in_the_environment_that_is_no_utf_8_is_refused_and_not_passed_over() {
    let mut machine = Machine::with_repository();
    machine.environment.repository = Some(odd(b"/r\xff"));
    machine.run(&["points"]).failed(2, "MAINSTAY_REPOSITORY is not UTF-8");
    machine.environment.repository = None;
    machine.run(&["points"]).ok();
}

#[test]
fn a_home_is_needed_only_for_what_is_kept_there() {
    let mut machine = Machine::new();
    machine.environment.home = None;
    machine.write("d/a", "x");
    let named = ["-r", "repo", "--key-file", "k"];
    let run = |arguments: &[&str]| machine.run(&[&named[..], arguments].concat());
    run(&["init", "--kit", "kit.txt"]).ok();
    run(&["backup", "d"]).ok();
    run(&["restore", "latest", "--to", "back"]).ok();
    assert_eq!(machine.read(&format!("back{}", machine.arg("d/a"))), "x");
    machine.run(&["-r", "repo", "--with-kit", "kit.txt", "points"]).ok();
    machine.run(&["-r", "repo", "points"]).failed(12, "there is no key");
    machine.run(&["points"]).failed(2, "no home directory");
    machine.run(&["-r", "other", "init", "--generate-key"]).failed(2, "no home directory");
}
