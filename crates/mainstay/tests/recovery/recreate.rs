//! `vm restore --as`, for plain QEMU.

use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;

use mainstay_testkit::Rng;

use crate::user::{User, same};

/// Machines of one disk each, with points. The disk `a` of `web` has much to write.
pub(crate) fn machines(names: &[&str]) -> User {
    let user = User::new();
    for (number, name) in names.iter().enumerate() {
        let folder = user.at(&format!("images/{name}"));
        std::fs::create_dir_all(&folder).unwrap();
        let file = std::fs::File::create(folder.join("a.raw")).unwrap();
        file.set_len(64 << 20).unwrap();
        let length = if *name == "web" { 40 << 20 } else { 1 << 20 };
        file.write_all_at(&Rng::new(number as u64).bytes(length), 3 << 20).unwrap();
        file.sync_all().unwrap();
    }
    user.run(&["vm", "backup", "--host", "dir:images", "--all"]);
    user
}

fn restore<'a>(user: &User, name: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    std::fs::create_dir_all(user.at("new")).unwrap();
    let words = ["vm", "restore", "web@latest", "--host", "dir:new", "--as", name, "--to"];
    [words.as_slice(), more].concat()
}

#[test]
fn a_machine_comes_back_with_a_script_that_starts_it_and_is_left_alone_when_it_is_there() {
    let user = machines(&["web"]);
    let words = restore(&user, "web2", &["new/web2", "--format", "qcow2"]);
    user.run(&[words.as_slice(), &["--dry-run"]].concat());
    assert!(!user.at("new/web2").exists());
    let done = user.only("machine_recovered", &words);
    assert_eq!((done["was_complete"].as_bool(), done["name"].as_str()), (Some(false), Some("web2")));
    same(&user.at("new/web2/a.raw.qcow2"), &user.at("images/web/a.raw"));
    let script = user.at("new/web2/start");
    let text = std::fs::read_to_string(&script).unwrap();
    assert!(text.contains("\"filename\":\"a.raw.qcow2\""), "{text}");
    assert_eq!(script.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    let before = script.metadata().unwrap().modified().unwrap();
    assert_eq!(user.only("machine_recovered", &words)["was_complete"], true);
    assert_eq!(script.metadata().unwrap().modified().unwrap(), before);
    // The same words go on with what was begun, whatever they mean by now; another point does not.
    let taken = user.only("machine_captured", &["vm", "backup", "--host", "dir:images", "web"]);
    assert_eq!(user.only("machine_recovered", &words)["was_complete"], true);
    let newer = format!("web@{}", taken["point"].as_str().unwrap());
    let named: Vec<&str> =
        words.iter().map(|word| if *word == "web@latest" { newer.as_str() } else { *word }).collect();
    user.fails(&named, 1, "another point or shape");
    // Another machine cannot have its place, nor its name.
    user.fails(&restore(&user, "web2", &["new/web2"]), 1, "another point or shape");
    user.fails(&restore(&user, "web2", &["new/other"]), 1, "called web2 already");
}

#[test]
fn what_came_back_without_being_started_is_started_when_that_is_asked_for() {
    let user = machines(&["web"]);
    let words = restore(&user, "web2", &["new/web2"]);
    assert_eq!(user.only("machine_recovered", &words)["started"], false);
    // No guest is needed to see that it is started.
    let script = user.at("new/web2/start");
    let text = std::fs::read_to_string(&script).unwrap();
    let began = format!("\ntouch '{}'; exit 0\n", user.at("began").display());
    std::fs::write(&script, text.replacen('\n', &began, 1)).unwrap();
    let words = [words.as_slice(), &["--start"]].concat();
    for was_complete in [false, true] {
        let done = user.only("machine_recovered", &words);
        assert_eq!((&done["started"], &done["was_complete"]), (&true.into(), &was_complete.into()), "{done}");
        assert_eq!(user.at("began").exists(), !was_complete);
        let _gone = std::fs::remove_file(user.at("began"));
    }
}

#[test]
fn a_run_that_is_killed_is_finished_by_the_next() {
    let user = machines(&["web"]);
    let words = restore(&user, "web2", &["new/web2"]);
    let image = user.at("new/web2/a.raw.raw");
    for _ in 0..3 {
        let mut child = user.start(&words);
        let begun =
            || image.metadata().is_ok_and(|metadata| std::os::unix::fs::MetadataExt::blocks(&metadata) > 0);
        while !begun() && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    user.only("machine_recovered", &words);
    same(&image, &user.at("images/web/a.raw"));
    assert!(Path::new(&user.at("new/web2/start")).exists());
}
