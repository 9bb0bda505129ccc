//! What a command costs, its whole process tree counted.
#![expect(unsafe_code, reason = "wait4 is the only call that tells the cost of one finished process tree")]

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::shell;

#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    pub(super) wall: Duration,
    /// User and system time of the command and of every descendant it waited for.
    pub(super) cpu: Duration,
    /// The largest resident set of any one process of the tree, in bytes.
    pub(super) memory: u64,
}

/// Runs the command, its output appended to `log`, and fails when it does.
pub(super) fn measure(command: &mut Command, log: &Path) -> Result<Cost> {
    let text = shell::shown(command);
    let open = || OpenOptions::new().create(true).append(true).open(log);
    command.stdout(open()?).stderr(open()?);
    let start = shell::moment();
    let child = command.spawn().with_context(|| format!("cannot start {text}"))?;
    let (status, usage) = wait(child.id()).with_context(|| format!("cannot wait for {text}"))?;
    let wall = start.elapsed();
    if status != 0 {
        let said = std::fs::read_to_string(log).unwrap_or_default();
        let last: Vec<&str> = said.lines().rev().take(5).collect();
        bail!(
            "{text} failed (wait status {status}):\n{}",
            last.into_iter().rev().collect::<Vec<_>>().join("\n")
        );
    }
    Ok(Cost {
        wall,
        cpu: duration(usage.ru_utime) + duration(usage.ru_stime),
        // Linux counts in KiB.
        memory: u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024,
    })
}

/// Waits for a child of this process; its wait status and what it and its descendants used (wait4(2)).
fn wait(child: u32) -> std::io::Result<(i32, libc::rusage)> {
    let pid = libc::pid_t::try_from(child).map_err(std::io::Error::other)?;
    let mut status = 0;
    // SAFETY: rusage is plain numbers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both pointers are to values that live through the call.
        let waited = unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) };
        if waited == pid {
            return Ok((status, usage));
        }
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn duration(time: libc::timeval) -> Duration {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let micros = u64::try_from(time.tv_usec).unwrap_or(0);
    Duration::from_secs(seconds) + Duration::from_micros(micros)
}

#[cfg(test)]
mod tests {
    use super::measure;
    use crate::shell;

    #[test]
    fn a_grandchild_that_works_is_counted_and_a_failure_is_told() {
        let log = std::env::temp_dir().join(format!("mainstay-measure-{}", std::process::id()));
        let busy = "bash -c 'i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done'; true";
        let cost = measure(&mut shell::command("bash", ["-c", busy]), &log).unwrap();
        let idle = measure(&mut shell::command("true", [""; 0]), &log).unwrap();
        assert!(cost.cpu > idle.cpu + std::time::Duration::from_millis(10), "{cost:?} {idle:?}");
        assert!(idle.memory > 100 << 10, "{idle:?}");
        let error = measure(&mut shell::command("bash", ["-c", "echo because; exit 3"]), &log).unwrap_err();
        assert!(error.to_string().contains("because"), "{error}");
        std::fs::remove_file(log).unwrap();
    }
}
