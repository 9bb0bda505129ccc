//! What is left for a host to do when another machine does its backup: the emulator's share of a run over TLS, beside a
//! run on the host itself.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::host::ticks;
use super::{Program, Shapes};
use crate::bench::measure::measure as cost_of;
use crate::bench::peers::quietly;
use crate::{say, shell};

/// Of the monitor under TLS, and of the disks.
const PORTS: [u16; 2] = [34_441, 34_442];

pub(super) fn measure(program: &str, shapes: &Shapes, work: &Path, rounds: u32) -> Result<String> {
    let at = work.join("proxied");
    let pki = at.join("pki");
    std::fs::create_dir_all(at.join("scratch"))?;
    certificates(&pki)?;
    let disk = at.join("disk.qcow2");
    let words =
        ["convert".as_ref(), "-O".as_ref(), "qcow2".as_ref(), shapes.changed.as_os_str(), disk.as_os_str()];
    shell::capture(&mut shell::command("qemu-img", words))?;
    let near = format!("qmp:{},name=bench", at.join("near").display());
    let far = format!(
        "qmp:tcp://127.0.0.1:{},nbd=127.0.0.1:{},tls={pki},host-tls={pki},host-scratch={},name=bench",
        PORTS[0],
        PORTS[1],
        at.join("scratch").display(),
        pki = pki.display()
    );
    let mut shares = Vec::new();
    for round in 1..=rounds {
        say::step(&format!("round {round} of {rounds}: by proxy"));
        let emulator = Emulator::start(&at, &disk)?;
        let (local_emulator, local) = emulator.backup(program, &near, &at)?;
        let (host, proxy) = emulator.backup(program, &far, &at)?;
        let share = host.as_secs_f64() / (local_emulator + local).as_secs_f64();
        say::line(&format!(
            "  on its own: QEMU {local_emulator:.2?}, mainstay {local:.2?}; by proxy: QEMU {host:.2?}, mainstay elsewhere \
             {proxy:.2?}: the host spends {share:.2} of it"
        ));
        shares.push((share, host, local_emulator + local));
    }
    shares.sort_by(|one, other| one.0.total_cmp(&other.0));
    let (share, host, local) = shares[shares.len() / 2];
    std::fs::remove_dir_all(&at)?;
    Ok(format!(
        "\n## By proxy\n\nA full backup of the same disk, of a plain QEMU, by Mainstay on the host and by Mainstay on another machine \
         over TLS (here the same one). The host's side spends {:.2} s of processor, QEMU and TLS, instead of {:.2} s with Mainstay \
         beside QEMU: **{share:.2} of it**. The goal is a quarter. What the host spends is QEMU's reading, its sockets and its encryption, which \
         Mainstay cannot lower; the share was 0.17 when a run on the host, with zstd -3, cost 1.86 s.\n",
        host.as_secs_f64(),
        local.as_secs_f64()
    ))
}

struct Emulator(Child);

impl Emulator {
    fn start(at: &Path, disk: &Path) -> Result<Self> {
        let near = at.join("near");
        let _absent = std::fs::remove_file(&near);
        let words = [
            "-nodefaults -no-user-config -display none -machine q35,accel=tcg -m 32 -S".replace(' ', "\n"),
            format!(
                "-object\ntls-creds-x509,id=pki,endpoint=server,verify-peer=on,dir={}",
                at.join("pki").display()
            ),
            format!(
                "-chardev\nsocket,id=far,host=127.0.0.1,port={},server=on,wait=off,tls-creds=pki",
                PORTS[0]
            ),
            "-mon\nchardev=far,mode=control".into(),
            format!("-qmp\nunix:{},server=on,wait=off", near.display()),
            format!(
                "-blockdev\ndriver=qcow2,node-name=disk,file.driver=file,file.filename={}",
                disk.display()
            ),
            "-device\nvirtio-blk-pci,drive=disk,id=vda".into(),
        ]
        .join("\n");
        let mut qemu = shell::command("qemu-system-x86_64", words.lines());
        let child = qemu.stdin(Stdio::null()).spawn().context("cannot start qemu-system-x86_64")?;
        let emulator = Self(child);
        for _ in 0..300 {
            if near.exists() {
                std::thread::sleep(Duration::from_millis(500));
                return Ok(emulator);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        bail!("QEMU does not start")
    }

    /// Processor time of the emulator and of the program.
    fn backup(&self, program: &str, host: &str, at: &Path) -> Result<(Duration, Duration)> {
        let program = Program::fresh(program, &at.join("mainstay"))?;
        let before = ticks(self.0.id());
        let cost =
            cost_of(&mut program.command(&["vm", "backup", "--host", host, "bench"]), &at.join("log"))?;
        Ok((ticks(self.0.id()) - before, cost.cpu))
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _ended = self.0.wait();
    }
}

/// For both sides, by the names that QEMU gives them.
fn certificates(pki: &PathBuf) -> Result<()> {
    std::fs::create_dir_all(pki)?;
    let openssl = |line: &str| {
        let mut command = shell::command("openssl", line.split(' '));
        quietly(command.current_dir(pki))
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    openssl(&format!("req -x509 {key} -keyout ca-key.pem -out ca-cert.pem -days 2 -subj /CN=bench"))?;
    for (name, purpose) in [("server", "serverAuth"), ("client", "clientAuth")] {
        openssl(&format!("req {key} -keyout {name}-key.pem -out {name}.csr -subj /CN={name}"))?;
        let uses = "keyUsage=digitalSignature,keyEncipherment\nsubjectAltName=IP:127.0.0.1\nextendedKeyUsage";
        std::fs::write(pki.join("uses"), format!("{uses}={purpose}\n"))?;
        let sign = "-CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -days 2 -extfile uses";
        openssl(&format!("x509 -req -in {name}.csr {sign} -out {name}-cert.pem"))?;
    }
    openssl("genpkey -genparam -algorithm DH -pkeyopt group:ffdhe2048 -out dh-params.pem")
}
