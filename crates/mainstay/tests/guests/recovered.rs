//! Whole machines back, and running: for plain QEMU by a plan, and in a libvirt.

use mainstay_testkit::lab::{DomainPlan, GuestImage, Libvirt, PATIENCE, patiently};

use crate::home::Home;

/// From a folder of images to a machine that plain QEMU runs, started by its script and asked through its agent.
#[test]
fn a_plan_brings_a_machine_up_on_plain_qemu() {
    let home = Home::new();
    std::fs::create_dir_all(home.at("images/web")).unwrap();
    GuestImage::get().unwrap().copy_disk(&home.at("images/web/vda.qcow2")).unwrap();
    home.run(&["vm", "backup", "--host", "dir:images", "web"]);
    std::fs::create_dir(home.at("new")).unwrap();
    let plan = "host = \"dir:new\"\ndirectory = \"new\"\n[[machine]]\npoint = \"web@latest\"\nname = \"again\"\n\
                cpus = 1\nmemory = \"384 MiB\"\nstart = true\nchecks = [\"test -d /etc\"]\n";
    std::fs::write(home.at("plan.toml"), plan).unwrap();
    let lines = home.run(&["vm", "recover", "plan.toml"]);
    let state = lines.iter().find(|line| line["type"] == "recovery_state").unwrap();
    assert_eq!(state["state"], "complete", "{state}");
    assert!(state["recovered"]["start_seconds"].as_f64().unwrap() > 0.0, "{state}");
    let listed = home.run(&["vm", "list", "--host", "dir:new"]);
    assert!(listed.iter().any(|line| line["name"] == "again" && line["state"] == "running"), "{listed:?}");
    // It runs already.
    let words = ["vm", "recover", "plan.toml"];
    let state = home.run(&words).into_iter().find(|line| line["type"] == "recovery_state").unwrap();
    assert_eq!(state["state"], "was complete");
    stop(&home);
}

/// Switches the machine off, by its own monitor.
fn stop(home: &Home) {
    use std::io::{BufRead as _, Write as _};
    let mut socket = std::os::unix::net::UnixStream::connect(home.at("new/again/qmp")).unwrap();
    socket.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n").unwrap();
    let lines = std::io::BufReader::new(socket).lines().map_while(Result::ok);
    assert!(lines.count() >= 2);
}

/// A machine of libvirt back as another one beside it, over itself, and as itself after it is gone.
#[test]
fn a_machine_of_libvirt_comes_back_in_every_way() {
    let libvirt = Libvirt::start().unwrap();
    let domain =
        libvirt.define(&DomainPlan { name: "web", boots_itself: true, ..DomainPlan::default() }).unwrap();
    let (home, host) = (Home::new(), libvirt.uri());
    home.back_up(&host, "web", &[]);
    let to = |name: &str| libvirt.directory().join(name).display().to_string();

    let images = to("web2");
    let words = ["vm", "restore", "web@latest", "--host", &host, "--as", "web2", "--to", &images, "--start"];
    let done = home.run(&words).into_iter().find(|line| line["type"] == "machine_recovered").unwrap();
    assert_eq!(done["was_complete"], false, "{done}");
    let answers = |name: &str| {
        let name = name.to_owned();
        patiently("the agent", PATIENCE, || {
            Ok(libvirt.virsh(&["qemu-agent-command", &name, "{\"execute\":\"guest-ping\"}"]).ok())
        })
        .unwrap();
    };
    // Both at once: they share neither identity nor sockets.
    domain.start().unwrap();
    answers("web2");
    answers("web");
    let uuid = |name: &str| libvirt.virsh(&["domuuid", name]).unwrap().trim().to_owned();
    let old = uuid("web");
    assert_ne!(uuid("web2"), old);
    libvirt.virsh(&["destroy", "web2"]).unwrap();

    // Over itself, from running: what was written since is gone, and comes back with the undo point.
    domain.inside().wait().unwrap();
    domain.inside().run_well("echo late > /etc/late; sync").unwrap();
    let words = ["vm", "restore", "web@latest", "--host", &host, "--in-place", "--stop", "--yes"];
    let put = home.run(&words).into_iter().find(|line| line["type"] == "machine_put_back").unwrap();
    let there = |point: &str| home.command(&["cat", point, "/etc/late"]).output().unwrap().status.success();
    let undo = format!("web@{}", put["undo"].as_str().unwrap());
    assert!(there(&undo) && !there("web@latest~1"), "{put}");
    home.back_up(&host, "web", &[]);
    assert!(!there("web@latest"), "what was written since is still there");
    let words = ["vm", "restore", &undo, "--host", &host, "--in-place", "--yes", "--start"];
    home.run(&words);
    answers("web");

    // With its memory saved it would go on over other disks, and is left alone until that is let go.
    libvirt.virsh(&["managedsave", "web"]).unwrap();
    let listed = home.run(&["vm", "list", "--host", &host]);
    assert!(listed.iter().any(|line| line["name"] == "web" && line["state"] == "saved"), "{listed:?}");
    let words = ["vm", "restore", "web@latest", "--host", &host, "--in-place", "--yes"];
    let refused = home.command(&words).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("virsh managedsave-remove web"), "{refused:?}");
    libvirt.virsh(&["managedsave-remove", "web"]).unwrap();
    home.run(&words);
    assert!(!there("web@latest"));

    // As itself: not while it is there.
    let images = to("back");
    let words =
        ["vm", "restore", "web@latest", "--host", &host, "--as", "back", "--same-identity", "--to", &images];
    let refused = home.command(&words).output().unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("of this identity already"), "{refused:?}");
    libvirt.virsh(&["undefine", "web", "--checkpoints-metadata"]).unwrap();
    home.run(&words);
    assert_eq!(uuid("back"), old);
}
