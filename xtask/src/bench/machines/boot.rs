//! A machine that boots straight from the repository, beside the same machine booting from the file that it was.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::{Program, mib, share};
use crate::bench::peers::quietly;
use crate::{say, shell};

/// What a guest may take to boot by emulation on a busy machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// A boot until the guest's agent answered.
#[derive(Clone, Copy, Debug, Default)]
struct Boot {
    seconds: f64,
    /// By the machine, in bytes.
    read: u64,
    /// From the repository, in bytes.
    fetched: u64,
}

pub(super) fn measure(program: &str, work: &Path, rounds: u32) -> Result<String> {
    let at = work.join("boot");
    let (guest, images) = (at.join("guest"), at.join("images"));
    std::fs::create_dir_all(&guest)?;
    std::fs::create_dir_all(&images)?;
    let build = shell::root().join("crates/testkit/guest/build.sh");
    let packages = shell::target_directory()?.join("guest/packages");
    quietly(&mut shell::command("sh", [&build, &packages, &guest]))?;
    let image = images.join("web.raw");
    let disk = guest.join("disk.qcow2");
    let words = ["convert".as_ref(), "-O".as_ref(), "raw".as_ref(), disk.as_os_str(), image.as_os_str()];
    quietly(&mut shell::command("qemu-img", words))?;
    let host = format!("dir:{}", images.display());
    let mut boots: [Vec<Boot>; 3] = Default::default();
    for round in 1..=rounds {
        say::step(&format!("round {round} of {rounds}: boots"));
        let program = Program::fresh(program, &at.join("mainstay"))?;
        quietly(&mut program.command(&["vm", "backup", "--host", &host, "web.raw"]))?;
        let local = Boot { seconds: local(&image, &at)?.as_secs_f64(), ..Boot::default() };
        // The second time it is known what a boot reads.
        for (boots, boot) in boots.iter_mut().zip([Ok(local), stored(&program), stored(&program)]) {
            let boot = boot?;
            say::line(&format!("  {boot:.1?}"));
            boots.push(boot);
        }
    }
    std::fs::remove_dir_all(&at)?;
    Ok(page(&boots.map(|boots| middle(&boots))))
}

fn page([local, first, known]: &[Boot; 3]) -> String {
    let row = |name: &str, boot: &Boot| {
        format!(
            "| {name} | {:.1} | {:.2} | {} | {} | {:.2} |\n",
            boot.seconds,
            boot.seconds / local.seconds.max(0.01),
            mib(boot.read),
            mib(boot.fetched),
            share(boot.fetched, boot.read)
        )
    };
    format!(
        "\n## Instant recovery\n\nA small guest of 256 MiB, under emulation, from the start of its emulator to the first answer of \
         its agent, medians: from a raw file on this machine, and by `vm prove` straight from the repository, without and with \
         the knowledge of what an earlier boot read. What is fetched is compressed, and comes by the segment of 1 MiB.\n\n| boot from | s | \
         ÷ the local file | MiB read by the guest | MiB fetched | fetched ÷ read |\n|---|---|---|---|---|---|\n| the local file | {:.1} \
         | – | – | – | – |\n{}{}",
        local.seconds,
        row("the repository, for the first time", first),
        row("the repository, again", known)
    )
}

/// Of the times, with what that boot read.
fn middle(boots: &[Boot]) -> Boot {
    let mut sorted = boots.to_vec();
    sorted.sort_by(|one, other| one.seconds.total_cmp(&other.seconds));
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

/// Ends with this value.
struct Emulator(Child);

impl Drop for Emulator {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _ended = self.0.wait();
    }
}

/// Boots a copy of the image by an emulator of the same words.
fn local(image: &Path, at: &Path) -> Result<Duration> {
    let copy = at.join("copy.raw");
    quietly(shell::command("cp", ["--sparse=always"]).arg(image).arg(&copy))?;
    // Here, because the paths of sockets are short.
    let agent = std::env::temp_dir().join(format!("mainstay-bench-agent-{}", std::process::id()));
    let _absent = std::fs::remove_file(&agent);
    let words = [
        "-nodefaults -no-user-config -display none -no-reboot -machine q35,accel=tcg -cpu qemu64 -m 384 -smp 1 \
         -vga std -serial null -device virtio-serial-pci -device virtio-scsi-pci,id=scsi"
            .split_whitespace()
            .collect::<Vec<_>>()
            .join("\n"),
        format!("-chardev\nsocket,id=agent,path={},server=on,wait=off", agent.display()),
        "-device\nvirtserialport,chardev=agent,name=org.qemu.guest_agent.0".into(),
        format!(
            "-blockdev\ndriver=raw,node-name=disk,file.driver=file,file.filename={}",
            copy.display()
        ),
        "-device\nvirtio-blk-pci,drive=disk,bootindex=1".into(),
    ]
    .join("\n");
    let mut qemu = shell::command("qemu-system-x86_64", words.lines());
    qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let began = shell::moment();
    let _emulator = Emulator(qemu.spawn().context("cannot start qemu-system-x86_64")?);
    let socket = loop {
        match UnixStream::connect(&agent) {
            Ok(socket) => break socket,
            Err(error) if began.elapsed() > PATIENCE => return Err(error).context("QEMU does not start"),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    socket.set_read_timeout(Some(PATIENCE))?;
    // It waits in the socket until the agent is there.
    (&socket).write_all(b"{\"execute\":\"guest-ping\"}\n")?;
    let mut answer = String::new();
    BufReader::new(&socket).read_line(&mut answer).context("the guest's agent does not answer")?;
    let took = began.elapsed();
    std::fs::remove_file(&agent)?;
    if !answer.contains("return") {
        bail!("the guest's agent answers {answer:?}");
    }
    Ok(took)
}

/// Boots the newest point.
fn stored(program: &Program) -> Result<Boot> {
    let words =
        ["vm", "prove", "web.raw@latest", "--accel", "tcg", "--memory", "384", "--cpus", "1", "--json"];
    let mut command = program.command(&words);
    command.env("TMPDIR", std::env::temp_dir());
    let text = shell::capture(&mut command)?;
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let line = lines.into_iter().find(|line| line["type"] == "proven").context("nothing was proven")?;
    let number = |name: &str| line[name].as_u64().unwrap_or(0);
    let seconds = line["boot_seconds"].as_f64().context("the boot was not timed")?;
    Ok(Boot { seconds, read: number("bytes_read"), fetched: number("bytes_fetched") })
}
