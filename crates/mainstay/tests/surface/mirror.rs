//! `restore --mode mirror` deletes nothing that was never captured.

use std::os::unix::fs::{PermissionsExt as _, symlink};

use mainstay_workloads::process::Program;

use crate::machine::Machine;

const LIMIT: std::time::Duration = std::time::Duration::from_secs(60);

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

#[test]
fn a_mirror_keeps_what_was_excluded_in_every_place() {
    let machine = Machine::with_repository();
    machine.write("d/in/a", "a");
    machine.run(&["backup", "d", "--exclude", "*.log", "--exclude", "/private"]).ok();
    let kept = ["d/x.log", "d/in/y.log", "d/private/deep/p", "d/gone/deep/z.log"];
    kept.iter().for_each(|file| drop(machine.write(file, "left out")));
    let deleted = ["d/extra", "d/in/more/deep", "d/in/private"];
    deleted.iter().for_each(|file| drop(machine.write(file, "not left out")));
    mirror(&machine, &["d"]);
    // A directory that the point does not hold goes as a whole: what is in it was not left out of anything.
    let there = |files: &[&str]| files.iter().map(|file| machine.at(file).exists()).collect::<Vec<_>>();
    assert_eq!(there(&kept[..3]), [true; 3]);
    assert_eq!(there(&deleted), [false; 3]);
}

/// Unmounted when the test is over.
struct Mount(std::path::PathBuf);

impl Mount {
    fn new(at: &std::path::Path) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let mount = Program::new("mount", LIMIT).arguments(["-t", "tmpfs", "none"]).argument(at).run_well();
        mount.map_err(|error| println!("NOT RUN: {error:?}")).ok().map(|_| Self(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        Program::new("umount", LIMIT).argument("-l").argument(&self.0).run_well().unwrap();
    }
}

/// Mounted before the point was taken and not gone into, and mounted since over what the point holds or does not.
#[test]
fn a_mirror_keeps_what_is_on_other_mounts() {
    let machine = Machine::with_repository();
    machine.write("d/a", "a");
    machine.write("d/covered/held", "held");
    let Some(_before) = Mount::new(&machine.at("d/before")) else { return };
    machine.write("d/before/b", "b");
    machine.run(&["backup", "d", "--one-file-system"]).ok();
    let _since = ["d/since", "d/covered"].map(|path| Mount::new(&machine.at(path)).unwrap());
    for file in ["d/since/s", "d/covered/c", "d/extra"] {
        machine.write(file, "mounted since");
    }
    machine.later(60);
    // What the point holds below the mount is put there; what else is there stays.
    machine.run(&["restore", "latest", "--mode", "mirror", "--yes"]).ok();
    for kept in ["d/before/b", "d/since/s", "d/covered/c", "d/covered/held"] {
        assert!(machine.at(kept).exists(), "{kept}");
    }
    assert!(!machine.at("d/extra").exists());
}
