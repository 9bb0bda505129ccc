//! A machine runs straight from its point, whatever becomes of the program and of the repository.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, ExitStatus, Stdio};

use mainstay_testkit::lab::{
    FileSystem, Fsck, Inside, PATIENCE, check_rounds, compare, patiently, rebase_unseen,
};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;

use crate::home::Home;

/// `vm run` at work. Whatever it leaves running ends with this value.
struct Run {
    program: Child,
    lines: BufReader<ChildStdout>,
    machine: Option<Pid>,
}

impl Run {
    fn start(home: &Home, more: &[&str]) -> Self {
        let words = ["vm", "run", "web@latest", "--dir", "run", "--accel", "tcg"];
        let port = format!("socket,id=test,path={},server=on,wait=off", home.at("test").display());
        let device = "virtserialport,chardev=test,name=org.mainstay.test.0";
        let small = ["--memory", "384", "--cpus", "1"];
        let test = ["--qemu", "-chardev", "--qemu", &port, "--qemu", "-device", "--qemu", device];
        let mut command = home.command(&[&words, small.as_slice(), &test, more].concat());
        let mut program = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(program.stdout.take().unwrap());
        Self { program, lines, machine: None }
    }

    /// Waits for the machine to run.
    fn running(&mut self) -> Value {
        let line = self.line("machine_running");
        let pid = line["process"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        self.machine = pid.and_then(Pid::from_raw);
        line
    }

    #[track_caller]
    fn line(&mut self, kind: &str) -> Value {
        loop {
            let mut text = String::new();
            assert_ne!(self.lines.read_line(&mut text).unwrap(), 0, "it ended without {kind}");
            println!("{}", text.trim_end());
            let line: Value = serde_json::from_str(&text).unwrap();
            if line["type"] == kind {
                return line;
            }
        }
    }

    /// Ends the program and not the machine: kill -9.
    fn kill(&mut self) {
        self.program.kill().unwrap();
        self.program.wait().unwrap();
    }

    fn signal(&self) {
        kill_process(Pid::from_child(&self.program), Signal::INT).unwrap();
    }

    fn end(&mut self) -> ExitStatus {
        self.program.wait().unwrap()
    }

    fn machine_runs(&self) -> bool {
        self.machine.is_some_and(|pid| test_kill_process(pid).is_ok())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _gone = self.program.kill();
        if let Some(machine) = self.machine {
            let _gone = kill_process(machine, Signal::KILL);
        }
    }
}

fn overlay(home: &Home) -> PathBuf {
    home.at("run/vda.qcow2.qcow2")
}

/// The writer's last round in an image; nothing is wrong with its file system.
fn round_in(image: &Path) -> u64 {
    let system = FileSystem::of(image).unwrap();
    system.fsck(Fsck::Clean).unwrap();
    let out = tempfile::tempdir().unwrap();
    check_rounds(&system.tree("/data", out.path()).unwrap()).unwrap()
}

#[test]
fn a_machine_outlives_the_program_twice_and_in_the_end_the_repository() {
    let home = Home::new();
    home.back_up_image();
    let inside = Inside::new(&home.at("test"));
    let mut first = Run::start(&home, &[]);
    assert_eq!(first.running()["joined"], false);
    inside.start_writer("/data").unwrap();
    inside.wait_for_rounds("/data", 3).unwrap();
    // From now on the same words mean another point.
    home.back_up_image();
    first.kill();
    assert!(first.machine_runs());

    let mut second = Run::start(&home, &[]);
    let line = second.running();
    assert_eq!((line["joined"].as_bool(), second.machine), (Some(true), first.machine));
    // What was not read before is read through the new server.
    inside.run_well("md5sum /boot/* /usr/sbin/*").unwrap();
    inside.wait_for_rounds("/data", 3).unwrap();
    second.kill();

    let mut third = Run::start(&home, &["--home", "--leave"]);
    third.running();
    third.line("machine_home");
    assert!(third.end().success());
    std::fs::remove_dir_all(home.at("data")).unwrap();
    let rounds = inside.wait_for_rounds("/data", 3).unwrap();
    inside.run_well("touch /run/stop").unwrap();
    patiently("the machine's end", PATIENCE, || Ok((!third.machine_runs()).then_some(()))).unwrap();
    assert!(round_in(&overlay(&home)) >= rounds);

    let mut last = Run::start(&home, &[]);
    let line = last.running();
    assert_eq!((line["joined"].as_bool(), line["bytes_read"].as_u64()), (Some(false), Some(0)));
    last.signal();
    assert!(last.end().success() && !last.machine_runs(), "the power button was not pressed");
    assert!(round_in(&overlay(&home)) >= rounds);
}

#[test]
fn what_comes_home_is_the_point_with_what_was_written_over_it() {
    let home = Home::new();
    home.back_up_image();
    let inside = Inside::new(&home.at("test"));
    let mut first = Run::start(&home, &[]);
    first.running();
    inside.start_writer("/data").unwrap();
    let rounds = inside.wait_for_rounds("/data", 5).unwrap();
    first.signal();
    assert!(first.end().success());
    let written = home.at("written.qcow2");
    std::fs::copy(overlay(&home), &written).unwrap();

    // The machine has ended: it starts again from its overlay, and stands still while that comes home.
    let mut second = Run::start(&home, &["--home", "--wait", "1s", "--qemu", "-S"]);
    assert_eq!(second.running()["seconds"], Value::Null);
    second.line("machine_home");
    // Nobody listens to the power button. Signals that come at once are one.
    let ended = patiently("the end", PATIENCE, || {
        second.signal();
        std::thread::sleep(std::time::Duration::from_millis(300));
        Ok(second.program.try_wait().unwrap())
    });
    assert_eq!(ended.unwrap().code(), Some(130));
    assert!(!second.machine_runs());

    home.run(&["vm", "restore", "web@latest", "--to", "base"]);
    rebase_unseen(&written, &home.at("base/vda.qcow2.raw")).unwrap();
    compare(&written, &overlay(&home)).unwrap();
    assert!(round_in(&overlay(&home)) >= rounds);
}
