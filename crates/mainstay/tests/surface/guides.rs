//! The commands of the guides do what the guides say.

use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

/// Runs every `sh` block of the page in one shell, in an empty home directory, stopping at the first failure.
#[test]
fn every_command_of_the_five_minutes_works() {
    let home = tempfile::tempdir().unwrap();
    let page = include_str!("../../../../docs/guides/five-minutes.md");
    let blocks: Vec<&str> = page
        .split("```sh\n")
        .skip(1)
        .filter_map(|rest| rest.split_once("```"))
        .map(|(block, _)| block)
        .collect();
    assert!(blocks.len() > 8, "the page lost its commands");
    let bin = home.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_mainstay"), bin.join("mainstay")).unwrap();
    let script = format!("set -eux\n{}", blocks.concat());
    #[expect(clippy::disallowed_methods, reason = "a test of the shell's view")]
    let mut shell = Command::new("/bin/sh");
    let done = shell
        .args(["-c", &script])
        .current_dir(home.path())
        .env_clear()
        .env("PATH", format!("{}:/usr/bin:/bin", bin.display()))
        .env("HOME", home.path())
        // Root's usual places are the machine's own, which a test must not touch.
        .env("XDG_DATA_HOME", home.path().join(".local/share"))
        .env("XDG_CONFIG_HOME", home.path().join(".config"))
        .env("XDG_STATE_HOME", home.path().join(".local/state"))
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    assert!(done.status.success(), "{out}{err}");
    assert_eq!(std::fs::read_to_string(home.path().join("Documents/list.txt")).unwrap(), "milk, bread\n");
    assert!(
        out.contains("chapter one\nchapter two\n") && out.contains("sound (every stored byte read"),
        "{out}{err}"
    );
    assert_eq!(home.path().join("kit.txt").metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert!(home.path().join("look").exists());
}
