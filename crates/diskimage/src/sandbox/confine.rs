//! What the parser gives up before it sees the first byte of an image.

use std::collections::BTreeMap;

use mainstay_core::{Code, Error, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Seconds of processor time: weeks of browsing. It is what ends a parser that loops when its parent was killed.
const TIME: u64 = 3600;

/// Bytes of memory: the caches and tables of a parser many times over.
const MEMORY: u64 = 2 << 30;

/// Whom the process becomes when it was root: nobody.
const NOBODY: u32 = 65_534;

/// System calls that a parser needs: memory, its socket, its end.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_close,
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_getrandom,
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Gives up privileges and all system calls but a few, among them those that know names of files and addresses of the
/// network. Fails closed: without that filter nothing is parsed.
pub(super) fn confine() -> Result<()> {
    let failed =
        |error: rustix::io::Errno| Error::io("cannot confine the parser of file systems", error.into());
    for (resource, most) in [
        (Resource::As, MEMORY),
        (Resource::Cpu, TIME),
        (Resource::Core, 0),
        (Resource::Fsize, 0),
        (Resource::Nofile, 16),
        (Resource::Nproc, 0),
    ] {
        let most = getrlimit(resource).maximum.map_or(most, |maximum| maximum.min(most));
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) }).map_err(failed)?;
    }
    rustix::thread::set_no_new_privs(true).map_err(failed)?;
    if rustix::process::geteuid().is_root() {
        // In a user namespace there may be no nobody to become. The filter is the wall, this only a second one.
        let _root_of_what = become_nobody();
    }
    let filters = filters().map_err(|error| unsupported("make").because(error))?;
    let apply = |filter: &BpfProgram| seccompiler::apply_filter_all_threads(filter);
    filters.iter().try_for_each(apply).map_err(|error| unsupported("apply").because(error))
}

fn unsupported(what: &str) -> Error {
    Error::new(
        Code::Unsupported,
        format!("cannot {what} the filter that confines the parser of file systems"),
    )
    .hint("this kernel or container allows no seccomp filters; --unconfined reads images that you trust without")
}

fn become_nobody() -> rustix::io::Result<()> {
    use rustix::process::{Gid, Uid};
    rustix::thread::set_thread_groups(&[])?;
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
}

/// Two filters, of which the stricter counts for each call: the first ends the process for what no parser does, the
/// second only says no to opening files, which the allocator of memory tries and can do without.
fn filters() -> std::result::Result<[BpfProgram; 2], seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    let only = |call: libc::c_long, argument: u8, is: SeccompCmpOp, value: u64| {
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, is, value)?;
        Ok::<_, seccompiler::BackendError>((call, vec![SeccompRule::new(vec![condition])?]))
    };
    // Memory, but none that can be run.
    let runnable = || SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    rules.extend([only(libc::SYS_mmap, 2, runnable(), 0)?, only(libc::SYS_mprotect, 2, runnable(), 0)?]);
    // The standard library asks whether a descriptor is open before it closes it.
    rules.extend([only(libc::SYS_fcntl, 1, SeccompCmpOp::Eq, libc::F_GETFD as u64)?]);
    rules.insert(libc::SYS_openat, Vec::new());
    let architecture = std::env::consts::ARCH.try_into()?;
    let strict = SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, architecture)?;

    let files = BTreeMap::from([(libc::SYS_openat, Vec::new())]);
    let denied = SeccompAction::Errno(libc::EPERM as u32);
    let closed = SeccompFilter::new(files, SeccompAction::Allow, denied, architecture)?;
    // The stricter last: it would not let the other be applied.
    Ok([closed.try_into()?, strict.try_into()?])
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::UdpSocket;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Command, ExitStatus, Stdio};

    use super::confine;

    const ACT: &str = "MAINSTAY_TEST_CONFINED";

    /// Not a test by itself: what the test below starts, confines itself and tries what the variable says.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "the test starts itself again, to be confined")]
    fn confined() {
        let Ok(act) = std::env::var(ACT) else { return };
        let open = File::open("/proc/self/status").unwrap();
        confine().unwrap();
        match act.as_str() {
            "nothing" => {}
            "file" => assert!(File::open("/proc/self/status").is_err()),
            "write" => assert!(File::create("/tmp/never").is_err()),
            "name" => drop(std::fs::remove_file("/tmp/never")),
            "network" => drop(UdpSocket::bind("127.0.0.1:0")),
            "process" => drop(Command::new("/bin/true").status()),
            "kill" => drop(rustix::process::test_kill_process(rustix::process::getpid())),
            "descriptor" => drop(rustix::fs::fstat(&open)),
            "memory" => println!("{}", vec![1u8; 4 << 30].len()),
            other => panic!("{other}?"),
        }
    }

    #[expect(clippy::disallowed_methods, reason = "the test starts itself again, to be confined")]
    fn run(act: &str) -> ExitStatus {
        Command::new("/proc/self/exe")
            .args(["--exact", "sandbox::confine::tests::confined", "--nocapture"])
            .env_clear()
            .env(ACT, act)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap()
    }

    #[test]
    fn a_confined_process_reaches_neither_files_nor_network_nor_memory() {
        const SIGSYS: i32 = 31;
        const SIGABRT: i32 = 6;
        for act in ["nothing", "file", "write"] {
            assert_eq!(run(act).code(), Some(0), "{act}");
        }
        for act in ["name", "network", "process", "kill", "descriptor"] {
            assert_eq!(run(act).signal(), Some(SIGSYS), "{act}");
        }
        assert_eq!(run("memory").signal(), Some(SIGABRT));
    }
}
