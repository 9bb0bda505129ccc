//! A machine whose image is taken seldom and whose files are taken often, as one timeline.
//!
//! File systems are parsed by this process: a test is no program that could be started as a parser.

use std::process::Command;

use crate::machine::{Machine, Ran};

/// Makes the image of a machine that has the live tree of the test at the same paths.
#[expect(clippy::disallowed_methods, reason = "the test's door to the program that makes file systems")]
fn make_image(machine: &Machine, name: &str) {
    let tree = machine.at("tree");
    let inside = machine.at("live");
    let inside = tree.join(inside.strip_prefix("/").unwrap());
    std::fs::create_dir_all(&inside).unwrap();
    for file in std::fs::read_dir(machine.at("live")).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), inside.join(file.file_name())).unwrap();
    }
    std::fs::create_dir_all(tree.join("etc")).unwrap();
    std::fs::write(tree.join("etc/fstab"), "/dev/vda / ext4 defaults 0 1\n").unwrap();
    std::fs::create_dir_all(machine.at("images")).unwrap();
    let image = machine.at("images").join(name);
    std::fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let made = Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(tree).arg(image).output();
    let made = made.unwrap_or_else(|error| panic!("mke2fs: {error}; install it: cargo xtask setup"));
    assert!(made.status.success(), "{made:?}");
}

/// An image, and a day later the files: `edited` differs, `gone` is no more, `fresh` is new.
fn image_and_files() -> Machine {
    let machine = Machine::with_repository();
    machine.write("live/edited", "old");
    machine.write("live/gone", "gone");
    make_image(&machine, "web.raw");
    machine.run(&["vm", "backup", "--host", "dir:images", "web.raw", "--name", "web"]).ok();
    machine.later(86_400);
    machine.write("live/edited", "newer");
    machine.write("live/fresh", "fresh");
    std::fs::remove_file(machine.at("live/gone")).unwrap();
    machine
}

fn names(ran: &Ran) -> Vec<String> {
    let items = ran.json().into_iter().filter(|line| line["type"] == "item");
    items.map(|item| item["path"].as_str().unwrap().rsplit('/').next().unwrap().to_owned()).collect()
}

#[test]
fn newer_files_show_over_the_image_and_both_points_are_named() {
    let machine = image_and_files();
    let live = machine.arg("live");
    let ls = |point: &str, more: &[&str]| {
        machine.run(&[&["--json", "ls", "--unconfined", point, &live], more].concat()).ok()
    };
    assert_eq!(names(&ls("web@latest", &[])), ["edited", "gone"], "there is nothing newer");
    let done = machine.run(&["--json", "backup", "live", "--machine", "web"]).ok().only("backed_up");
    assert_eq!(done["tags"], serde_json::json!(["machine:web"]));

    let shown = ls("web@latest", &[]);
    assert_eq!(names(&shown), ["edited", "fresh"]);
    let composed = shown.only("composed");
    assert_eq!(composed["files"][0]["point"], done["point"]);
    assert_eq!(composed["image"]["workload"], "web");
    let image = composed["image"]["point"].as_str().unwrap().to_owned();

    // Whoever names the image, or a time before the files, means it alone.
    for alone in
        [ls("web", &["--image-only"]), ls(&format!("web@{image}"), &[]), ls("web@2096-10-02T12:00", &[])]
    {
        assert_eq!(names(&alone), ["edited", "gone"]);
        assert!(alone.json().iter().all(|line| line["type"] != "composed"));
    }
    let cat = machine.run(&["cat", "--unconfined", "web", &format!("{live}/edited")]).ok();
    assert_eq!(cat.out, "newer");
    assert!(cat.err.contains("files") && cat.err.contains("databases"), "{}", cat.err);
    assert_eq!(
        machine.run(&["cat", "--unconfined", "web", "--image-only", &format!("{live}/edited")]).ok().out,
        "old"
    );

    machine.run(&["restore", "--unconfined", "web@latest", &live, "--to", "back", "--strip"]).ok();
    assert_eq!((machine.read("back/edited"), machine.read("back/fresh")), ("newer".into(), "fresh".into()));
    assert!(!machine.at("back/gone").exists());
}

#[test]
fn the_timeline_has_images_and_files() {
    let mut machine = image_and_files();
    machine.run(&["backup", "live", "--no-machine"]).ok();
    machine.run(&["vm", "backup", "--host", "dir:images", "web.raw"]).ok();
    // The machine that this runs in, by its own identity.
    machine.guest = Some("WEB.raw".into());
    machine.later(86_400);
    machine.run(&["backup", "live"]).ok();
    machine.later(86_400);
    machine.run(&["vm", "backup", "--host", "dir:images", "web.raw"]).ok();
    let points = machine.run(&["--json", "points", "web"]).ok().json();
    let kinds: Vec<&str> = points.iter().map(|point| point["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["vm", "vm", "files", "vm"]);
    assert_eq!(points[2]["machine"], "WEB.raw");
    let text = machine.run(&["points", "web"]).ok().out;
    assert!(text.contains("image") && text.contains("files") && !text.contains("machine:"), "{text}");
    assert_eq!(machine.run(&["--json", "points", "--workload", "web"]).ok().json().len(), 3);
    // A tag given later does the same as one given at once.
    machine.run(&["points", "tag", "web:live~1", "machine:web"]).ok();
    assert_eq!(machine.run(&["--json", "points", "web"]).ok().json().len(), 5);
    machine.run(&["backup", "live", "--machine", "a\nb"]).failed(2, "cannot be called");
}
