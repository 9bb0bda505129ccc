//! `restore --mode mirror` deletes nothing that was never captured.

use std::os::unix::fs::{PermissionsExt as _, symlink};

use crate::machine::Machine;

fn mirror(machine: &Machine, paths: &[&str]) {
    machine.later(60);
    let paths: Vec<String> = paths.iter().map(|path| machine.arg(path)).collect();
    let mut line = vec!["restore", "latest", "--mode", "mirror", "--yes"];
    line.extend(paths.iter().map(String::as_str));
    machine.run(&line).ok();
}

#[test]
fn a_root_behind_a_link_is_mirrored_where_it_is_and_nothing_beside_it() {
    let machine = Machine::with_repository();
    machine.write("real/d/a", "a");
    symlink(machine.at("real"), machine.at("way")).unwrap();
    symlink("real/d", machine.at("link")).unwrap();
    for root in ["way/d", "link"] {
        machine.run(&["backup", root]).ok();
        machine.write("real/d/a", "edited");
        machine.write("real/d/extra", "x");
        machine.write("real/beside", "b");
        machine.write("beside", "b");
        mirror(&machine, &[]);
        assert_eq!((machine.read("real/d/a"), machine.at("real/d/extra").exists()), ("a".to_owned(), false));
        assert_eq!((machine.read("real/beside"), machine.read("beside")), ("b".to_owned(), "b".to_owned()));
    }
    std::fs::remove_dir_all(machine.at("real/d")).unwrap();
    machine.run(&["restore", "latest", &machine.arg("link"), "--yes"]).ok();
    assert_eq!(machine.read("real/d/a"), "a");
}

#[test]
fn a_mirror_above_the_root_keeps_what_is_beside_it() {
    let machine = Machine::with_repository();
    machine.write("homes/ann/a", "a");
    machine.run(&["backup", "homes/ann"]).ok();
    machine.write("homes/bob/b", "b");
    machine.write("homes/ann/extra", "x");
    mirror(&machine, &["homes"]);
    assert_eq!(
        (machine.read("homes/bob/b"), machine.at("homes/ann/extra").exists()),
        ("b".to_owned(), false)
    );
}

#[test]
fn a_mirror_keeps_the_repository_the_keys_and_what_was_left_out() {
    let machine = Machine::with_repository();
    machine.write("home/a", "a");
    machine.write("home/cache/CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55");
    machine.write("home/cache/big", "big");
    machine.write("home/x/old.log", "log");
    machine.write("skips", "/private/\n");
    machine.write("home/private/p", "p");
    let line = ["backup", "home", "--skip-caches", "--exclude", "*.log", "--exclude-from", "skips"];
    machine.run(&line).ok();
    machine.write("home/x/new.log", "log");
    machine.write("home/x/extra", "x");
    mirror(&machine, &[]);
    for kept in ["home/cache/big", "home/x/old.log", "home/x/new.log", "home/private/p"] {
        assert!(machine.at(kept).exists(), "{kept}");
    }
    assert!(!machine.at("home/x/extra").exists());
    machine.run(&["verify"]).ok();
    machine.run(&["backup", "home", "--name", "again"]).ok();
}

#[test]
fn one_file_with_strip_leaves_the_directory_as_it_was() {
    let machine = Machine::with_repository();
    machine.write("d/sub/b", "b");
    let mode = |path: &str| machine.at(path).metadata().unwrap().permissions().mode() & 0o777;
    std::fs::set_permissions(machine.at("d/sub"), std::fs::Permissions::from_mode(0o711)).unwrap();
    machine.run(&["backup", "d"]).ok();
    std::fs::create_dir(machine.at("one")).unwrap();
    std::fs::set_permissions(machine.at("one"), std::fs::Permissions::from_mode(0o700)).unwrap();
    machine.run(&["restore", "latest", &machine.arg("d/sub/b"), "--to", "one", "--strip"]).ok();
    assert_eq!((machine.read("one/b"), mode("one")), ("b".to_owned(), 0o700));
}
