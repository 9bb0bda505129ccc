//! A throwaway server that shows a cluster as it was at a moment: it stands still there, reads only, is heard by nobody
//! else, and leaves nothing.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Clock, Code, Error, Event, Progress, Result};
use mainstay_repository::Repository;
use mainstay_workloads::files::OwnerRule;
use mainstay_workloads::postgres::{Address, Connection, Lsn, Programs, Server, server_user};
use mainstay_workloads::sandbox::Sandbox;
use mainstay_workloads::vm::GuardProgram;

use super::lazy::Lazy;
use super::plan::{ClusterPlan, Until};
use super::restore::{target, write_files};
use super::segments::write_log;
use super::stops;

const TICK: Duration = Duration::from_millis(50);
/// How long a recovery may stand at one place.
const STILL_LIMIT: Duration = Duration::from_secs(600);
/// How long a server may stand before log that it could read: it looks again a few times within that.
const ENDED_LIMIT: Duration = Duration::from_secs(5);
/// So often a server is started anew because the log asks for higher limits than the point knew of.
const STARTS_MAX: u32 = 4;
/// A server refuses to recover with lower limits than its primary had.
const LIMITS: [&str; 5] = [
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_xacts",
    "max_locks_per_xact",
];
/// What the copy answers differently without. All else that was set is about the machine that the cluster was on.
const KEPT: [&str; 11] = [
    "TimeZone",
    "DateStyle",
    "IntervalStyle",
    "search_path",
    "default_text_search_config",
    "bytea_output",
    "extra_float_digits",
    "lc_monetary",
    "lc_numeric",
    "lc_time",
    "xmlbinary",
];
/// What keeps the copy from acting as the server that it is a copy of, and from caring for files that nobody keeps.
const HARMLESS: [(&str, &str); 24] = [
    ("hot_standby", "on"),
    ("primary_conninfo", ""),
    ("primary_slot_name", ""),
    ("restore_command", ""),
    ("archive_mode", "off"),
    ("synchronous_standby_names", ""),
    ("max_logical_replication_workers", "0"),
    ("ssl", "off"),
    ("logging_collector", "off"),
    ("log_destination", "stderr"),
    ("lc_messages", "C"),
    ("cluster_name", "mainstay"),
    ("autovacuum", "off"),
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("synchronous_commit", "off"),
    ("wal_recycle", "off"),
    ("wal_init_zero", "off"),
    ("checkpoint_timeout", "1d"),
    ("max_wal_size", "1TB"),
    ("jit", "off"),
    ("huge_pages", "off"),
    ("wal_retrieve_retry_interval", "200ms"),
    ("max_standby_archive_delay", "0"),
];

/// Where the files of a throwaway server come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fill {
    /// From the repository, as far as it reads them; as with `Full` where there is no FUSE.
    #[default]
    Lazy,
    /// All are restored first.
    Full,
}

/// How a throwaway server is started.
#[derive(Clone, Debug)]
pub struct InstanceRequest {
    pub fill: Fill,
    /// Where its private directory goes. The files of a full restore take as much room as the cluster.
    pub scratch: PathBuf,
    /// The directory of PostgreSQL's programs; `None` looks for those of the right version.
    pub programs: Option<PathBuf>,
    /// Where else programs are looked for.
    pub path: Vec<PathBuf>,
    /// The user of the system that it runs as, when we are root; `postgres` unless named.
    pub user: Option<String>,
    /// The role that speaks to it: one that is a superuser in the cluster.
    pub role: String,
    /// Libraries that it loads. What the cluster had loaded could act on the world.
    pub preload: Vec<String>,
    /// Clears up should this process be killed.
    pub guard: Option<GuardProgram>,
    /// Where the server's log is kept when it does not come up.
    pub evidence: Option<PathBuf>,
}

/// Where an instance stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reached {
    /// Up to here the log was replayed.
    pub lsn: String,
    /// When the last transaction that it shows was committed, as the server writes it; `None` when none was since the point.
    pub last_commit: Option<String>,
    /// The log ended there, and nothing had told it to stop.
    pub end_of_log: bool,
    /// From the first byte restored until it answered there.
    pub took: Duration,
}

/// What an instance has cost so far, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InstanceCost {
    /// Fetched from the repository, as they are stored.
    pub fetched: u64,
    /// Read of the files and the log.
    pub read: u64,
    /// Written, and not overwritten or deleted since.
    pub written: u64,
    /// Of the whole point.
    pub whole: u64,
}

/// A server that shows a cluster at a moment. Dropped, it ends and nothing of it is left.
pub struct Instance {
    // Before what its files are in.
    server: Server,
    // Before the sandbox, which it is mounted in.
    lazy: Option<Lazy>,
    whole: u64,
    role: String,
    reached: Reached,
    programs: Programs,
    data: PathBuf,
    sandbox: Sandbox,
}

impl Instance {
    /// Restores what the plan says into a private directory, starts a server on it, and waits until it has come to where the
    /// plan says. There it stands still, and answers questions.
    ///
    /// Errors: [`Code::Unsupported`] without the right programs, [`Code::Integrity`] when something stored is damaged,
    /// [`Code::NotFound`] for a transaction that the log does not hold, [`Code::Refused`] when the server gives up.
    pub fn start(
        repository: &Repository,
        plan: &ClusterPlan,
        request: &InstanceRequest,
        clock: &Arc<dyn Clock>,
        progress: &Arc<dyn Progress>,
    ) -> Result<Self> {
        let began = clock.monotonic();
        let user = server_user(request.user.as_deref())?;
        let major = plan.cluster.version_number / 10_000;
        let programs = Programs::find(major, request.programs.as_deref(), &request.path, user)?;
        let sandbox = Sandbox::create(&request.scratch, request.guard.as_ref())?;
        let data = sandbox.cluster().join("data");
        let lazy = fill(repository, plan, request.fill, &sandbox, &data, user, progress)?;
        prepare(&sandbox, &data, user)?;
        // From here on names in it are the server's.
        sandbox.open(user)?;
        let mut starting =
            Starting { plan, request, programs: &programs, sandbox: &sandbox, clock, progress };
        let started = starting.bring_up(&data, lazy.as_ref());
        let (server, mut reached) = started.map_err(|error| match &request.evidence {
            Some(evidence) if error.code() != Code::Cancelled => kept(error, sandbox.path(), evidence),
            _ => error,
        })?;
        reached.took = clock.monotonic().saturating_sub(began);
        let whole = plan.point.counts.bytes;
        Ok(Self { server, lazy, whole, role: request.role.clone(), reached, programs, data, sandbox })
    }

    /// A connection to one of its databases.
    pub fn connect(&self, database: &str) -> Result<Connection> {
        self.server.connect(&self.role, database)
    }

    /// Where one of its databases is found, for other programs of this machine.
    pub fn address(&self, database: &str) -> Address {
        self.server.address(&self.role, database)
    }

    /// Where it stands.
    pub fn reached(&self) -> &Reached {
        &self.reached
    }

    /// Whether its files are read from the repository as it needs them.
    pub fn is_lazy(&self) -> bool {
        self.lazy.is_some()
    }

    pub fn cost(&self) -> InstanceCost {
        let whole = self.whole;
        match &self.lazy {
            Some(lazy) => InstanceCost {
                fetched: lazy.fetched(),
                read: lazy.cost().read(),
                written: lazy.cost().written(),
                whole,
            },
            None => InstanceCost { fetched: 0, read: whole, written: whole, whole },
        }
    }

    /// Errors: [`Code::Integrity`] when something could not be read out of the repository: whatever the server answered since
    /// is not to be trusted.
    pub fn check_content(&self) -> Result<()> {
        sound(self.lazy.as_ref())
    }

    /// The programs of its version.
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// Its files.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// What the server has said.
    pub fn log(&self) -> String {
        self.server.log()
    }

    /// Errors: [`Code::Refused`] once the server has given up.
    pub fn check(&mut self) -> Result<()> {
        self.server.check()
    }

    /// Opens it for writing, on a timeline of its own. What is written is gone with it.
    pub fn promote(&mut self) -> Result<()> {
        let mut connection = self.connect("postgres")?;
        match connection.value("SELECT pg_catalog.pg_promote(true, 600)")?.as_str() {
            "t" => Ok(()),
            _ => Err(Error::new(Code::Io, "the server does not open for writing")),
        }
    }

    /// Ends the server in order and leaves its files, for programs that read these while it does not run.
    pub fn shut_down(&mut self) -> Result<()> {
        self.server.shut_down()
    }

    /// Puts a copy of what the server has said into a directory; where it is.
    pub fn keep_log(&self, directory: &Path) -> Result<PathBuf> {
        keep_log(self.sandbox.path(), directory)
    }

    /// Its private directory.
    pub fn directory(&self) -> &Path {
        self.sandbox.path()
    }
}

fn kept(error: Error, sandbox: &Path, evidence: &Path) -> Error {
    match keep_log(sandbox, evidence) {
        Ok(at) => error.hint(format!("the server's log is {}", at.display())),
        // The first error is the one to tell of.
        Err(_) => error,
    }
}

fn keep_log(sandbox: &Path, directory: &Path) -> Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt as _;
    let fail = |error| Error::io(format!("cannot write in {}", directory.display()), error);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(fail)?;
    let at = directory.join(Server::LOG);
    std::fs::copy(sandbox.join(Server::LOG), &at).map_err(fail)?;
    Ok(at)
}

fn sound(lazy: Option<&Lazy>) -> Result<()> {
    match lazy.map(Lazy::troubles).unwrap_or_default().as_slice() {
        [] => Ok(()),
        [first, ..] => Err(Error::integrity("the copy could not be read out of the repository")
            .because(first.clone())
            .hint("see what is damaged: mainstay verify --read-data")),
    }
}

/// Puts the files there, or has them read as they are needed.
fn fill(
    repository: &Repository,
    plan: &ClusterPlan,
    how: Fill,
    sandbox: &Sandbox,
    data: &Path,
    user: Option<(u32, u32)>,
    progress: &Arc<dyn Progress>,
) -> Result<Option<Lazy>> {
    let cluster = sandbox.cluster();
    std::fs::create_dir(&cluster)
        .map_err(|error| Error::io(format!("cannot make {}", cluster.display()), error))?;
    if how == Fill::Lazy {
        match Lazy::mount(repository, plan, sandbox, data, user) {
            Err(error) if error.code() == Code::Unsupported => {
                let why = format!("all files are restored first, since {}", error.chain().join(": "));
                progress.event(&Event::Note(&why));
            }
            mounted => return mounted.map(Some),
        }
    }
    let restored = write_files(repository, plan, data, OwnerRule::Leave, progress)?;
    if let Some(skip) = restored.skips.first() {
        return Err(Error::integrity(format!("/{} cannot be restored: {}", skip.path, skip.detail)));
    }
    write_log(plan, data, progress.as_ref())?;
    if let Some(user) = user {
        give_all(sandbox, &cluster, user)?;
    }
    Ok(None)
}

fn give_all(sandbox: &Sandbox, directory: &Path, user: (u32, u32)) -> Result<()> {
    let failed = |error| Error::io(format!("cannot list {}", directory.display()), error);
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_type().map_err(failed)?.is_dir() {
            give_all(sandbox, &entry.path(), user)?;
        } else {
            sandbox.give(&entry.path(), Some(user))?;
        }
    }
    sandbox.give(directory, Some(user))
}

/// Takes away what would make it the server that it is a copy of, and has it recover for as long as there is log.
fn prepare(sandbox: &Sandbox, data: &Path, user: Option<(u32, u32)>) -> Result<()> {
    for name in
        ["postgresql.auto.conf", "recovery.signal", "standby.signal", "postmaster.pid", "postmaster.opts"]
    {
        let path = data.join(name);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("cannot remove {}", path.display()), error));
            }
            _ => {}
        }
    }
    // A standby waits at the end of its log. One that only recovers would open there, or give up when its target was not met.
    let signal = data.join("standby.signal");
    std::fs::File::create_new(&signal)
        .map_err(|error| Error::io(format!("cannot write {}", signal.display()), error))?;
    sandbox.give(&signal, user)
}

/// A server that has not come to its place.
struct Starting<'a> {
    plan: &'a ClusterPlan,
    request: &'a InstanceRequest,
    programs: &'a Programs,
    sandbox: &'a Sandbox,
    clock: &'a Arc<dyn Clock>,
    progress: &'a Arc<dyn Progress>,
}

/// What a look at a server says.
enum Look {
    There(Reached),
    /// It looks for more log and finds none.
    Ended(Reached),
    /// Not there yet; where it is, to tell whether it moves.
    Moving(String),
    /// It asks for higher limits, which its control file has by now.
    LimitsTooLow,
}

impl Starting<'_> {
    fn bring_up(&mut self, data: &Path, lazy: Option<&Lazy>) -> Result<(Server, Reached)> {
        for _ in 0..STARTS_MAX {
            let settings = settings(self.plan, self.request, &self.programs.control(data)?)?;
            let mut server = Server::start(self.programs, self.sandbox, data, &settings, self.clock)?;
            let waited = self.wait(&mut server, lazy);
            // The better explanation of what went wrong, and the end of trust in what seems to have gone well.
            sound(lazy)?;
            if let Some(reached) = waited? {
                return Ok((server, reached));
            }
        }
        Err(Error::new(Code::Refused, "the server asks for ever higher limits"))
    }

    /// Waits until the server has come to its place. `None` when it has to be started anew.
    fn wait(&self, server: &mut Server, lazy: Option<&Lazy>) -> Result<Option<Reached>> {
        let (mut at, mut since) = (String::new(), self.clock.monotonic());
        let mut unread = None;
        loop {
            self.progress.check()?;
            sound(lazy)?;
            server.check().map_err(|error| error.during("the copy cannot be brought to that moment"))?;
            match self.look(server)? {
                Look::There(reached) => return Ok(Some(reached)),
                Look::LimitsTooLow => return Ok(None),
                Look::Moving(now) if now != at => (at, since) = (now, self.clock.monotonic()),
                Look::Moving(_) => {}
                Look::Ended(reached) => {
                    if unread.is_none() || reached.lsn != at {
                        (at, since) = (reached.lsn.clone(), self.clock.monotonic());
                        unread = self.unread(&at)?;
                    }
                    let Some(place) = unread else { return Ok(Some(reached)) };
                    if self.clock.monotonic().saturating_sub(since) > ENDED_LIMIT {
                        let what = format!("the copy cannot be brought beyond {at} of the log");
                        let why = format!("the server does not read what the log holds at {place}");
                        return Err(Error::integrity(what).because(why));
                    }
                }
            }
            if self.clock.monotonic().saturating_sub(since) > STILL_LIMIT {
                return Err(Error::new(Code::Io, "the recovery of the copy stands still").because(at));
            }
            self.clock.sleep(TICK);
        }
    }

    /// Where there is log that a server which came to its end at `at` has not read.
    fn unread(&self, at: &str) -> Result<Option<Lsn>> {
        let lsn = at.parse().map_err(|()| Error::bug("the server stands at no place of a log"))?;
        stops::unread(self.plan, lsn)
    }

    fn look(&self, server: &Server) -> Result<Look> {
        let mut connection = match server.connect(&self.request.role, "postgres") {
            Ok(connection) => connection,
            Err(error) if error.chain().iter().any(|line| line.contains("(28000)")) => {
                return Err(error.hint("name a superuser of the cluster with --role"));
            }
            // It is not consistent yet.
            Err(_) => return Ok(Look::Moving(server.doing().unwrap_or_default())),
        };
        let answer = connection.query(
            "SELECT pg_catalog.pg_get_wal_replay_pause_state(), pg_catalog.pg_last_wal_replay_lsn(), \
             pg_catalog.pg_last_xact_replay_timestamp(), (SELECT wait_event FROM pg_catalog.pg_stat_activity WHERE \
             backend_type = 'startup')",
        );
        let row = match answer {
            Ok(rows) => rows.into_iter().next().unwrap_or_default(),
            // A conflict with what is replayed ends queries.
            Err(_) => return Ok(Look::Moving(server.doing().unwrap_or_default())),
        };
        let [paused, Some(lsn), last_commit, event] = row.as_slice() else {
            return Ok(Look::Moving(server.doing().unwrap_or_default()));
        };
        let (lsn, last_commit) = (lsn.clone(), last_commit.clone());
        let ended = matches!(event.as_deref(), Some("RecoveryRetrieveRetryInterval" | "RecoveryWalStream"));
        if paused.as_deref() == Some("paused") {
            if server.own_log().contains("insufficient parameter settings") {
                return Ok(Look::LimitsTooLow);
            }
            return Ok(Look::There(Reached { lsn, last_commit, end_of_log: false, took: Duration::ZERO }));
        }
        if !ended {
            return Ok(Look::Moving(lsn));
        }
        if let Until::Transaction(id) = self.plan.until
            && self.unread(&lsn)?.is_none()
        {
            let what = format!("transaction {id} is not committed in the log up to {lsn}");
            return Err(Error::new(Code::NotFound, what));
        }
        Ok(Look::Ended(Reached { lsn, last_commit, end_of_log: true, took: Duration::ZERO }))
    }
}

fn settings(
    plan: &ClusterPlan,
    request: &InstanceRequest,
    control: &HashMap<String, String>,
) -> Result<Vec<(String, String)>> {
    let pair = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    let kept = |(name, _): &&(String, String)| KEPT.contains(&name.as_str());
    let mut settings: Vec<(String, String)> = plan.cluster.settings.iter().filter(kept).cloned().collect();
    settings.extend(HARMLESS.map(pair));
    settings.push(("shared_preload_libraries".into(), request.preload.join(",")));
    for name in LIMITS {
        let Some(value) = control.get(&format!("{name} setting")) else { continue };
        let setting = match name {
            "max_prepared_xacts" => "max_prepared_transactions",
            "max_locks_per_xact" => "max_locks_per_transaction",
            same => same,
        };
        settings.push((setting.into(), value.clone()));
    }
    settings.extend(target(plan)?);
    settings.push(("recovery_target_action".into(), "pause".into()));
    Ok(settings)
}
