//! `mainstay open`.

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Code, Error, Progress, Result};
use mainstay_engine::mount::Lease;
use mainstay_engine::postgres::Instance;
use mainstay_workloads::postgres::{Address, Place};
use mainstay_workloads::process::Program;

use super::super::{Done, mount};
use super::moment;
use crate::args::Open;
use crate::report::databases::{ClusterClosed, ClusterOpened};
use crate::report::lines::Line;
use crate::session::Session;

/// How often it is looked whether it is to end.
const TICK: Duration = Duration::from_millis(100);

pub(in super::super) fn run(arguments: &Open, session: &mut Session) -> Done {
    let repository = Arc::new(session.open()?);
    let plan = moment::plan(&arguments.moment, &repository, session)?;
    let request = moment::private(&arguments.private, session)?;
    let lease = mount::lease(session, &repository, &plan.point, "opened");
    let progress: Arc<dyn Progress> = session.progress();
    let started = Instance::start(&repository, &plan, &request, &session.doors.clock, &progress);
    drop(progress);
    let mut instance = started?;
    let (reached, cost) = (instance.reached().clone(), instance.cost());
    let address = instance.address(&arguments.database);
    session.report.line(&Line::ClusterOpened(ClusterOpened {
        point: plan.point.id.to_string(),
        workload: plan.point.workload.name.clone(),
        version: plan.cluster.version.clone(),
        address: shown(&address),
        lsn: reached.lsn,
        last_commit: reached.last_commit,
        end_of_log: reached.end_of_log,
        lazy: instance.is_lazy(),
        seconds: reached.took.as_secs_f64(),
        bytes_fetched: cost.fetched,
        bytes_read: cost.read,
        bytes_whole: cost.whole,
    }));
    let began = session.doors.clock.monotonic();
    let outcome = match &arguments.command {
        Some(line) => command(line, &address, session),
        None => stand_by(&mut instance, lease, session),
    };
    let cost = instance.cost();
    let sound = instance.check_content();
    drop(instance);
    session.report.line(&Line::ClusterClosed(ClusterClosed {
        workload: plan.point.workload.name.clone(),
        seconds: session.seconds_since(began),
        bytes_fetched: cost.fetched,
        bytes_read: cost.read,
        bytes_whole: cost.whole,
    }));
    sound.and(outcome).map(|()| None)
}

/// Waits for the end, renewing the lease meanwhile.
fn stand_by(instance: &mut Instance, mut lease: Option<Lease>, session: &Session) -> Result<()> {
    session.report.say("It ends with Ctrl-C.");
    while !session.doors.cancel.asked() {
        instance.check()?;
        mount::renew(&mut lease, session);
        session.doors.clock.sleep(TICK);
    }
    // A key without the power to release leaves the hold to its own end.
    let _released = lease.map(Lease::release);
    Ok(())
}

/// Runs a line that finds the server by the variables that PostgreSQL's own programs know.
fn command(line: &str, address: &Address, session: &Session) -> Result<()> {
    let Place::Socket(directory) = &address.place else { return Err(Error::bug("a copy has no socket")) };
    let program = Program::shell(line, Duration::MAX)
        .variable("PGHOST", directory)
        .variable("PGPORT", address.port.to_string())
        .variable("PGUSER", address.user.as_deref().unwrap_or_default())
        .variable("PGDATABASE", address.database.as_deref().unwrap_or_default());
    // At a terminal the first Ctrl-C is the program's own business.
    let cancel = &session.doors.cancel;
    let enough = || if session.doors.terminal.input { cancel.insisted() } else { cancel.asked() };
    match program.foreground(&enough)? {
        Some(0) => Ok(()),
        Some(status) => {
            Err(Error::new(Code::Refused, format!("the line {line:?} ended with status {status}")))
        }
        None => Err(Error::new(Code::Cancelled, format!("the line {line:?} was ended by a signal"))),
    }
}

/// As PostgreSQL's own programs take it.
fn shown(address: &Address) -> String {
    let Place::Socket(directory) = &address.place else { return address.display() };
    let encoded = |text: &str| -> String {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte);
        text.bytes()
            .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
            .collect()
    };
    format!(
        "postgres:///{}?host={}&port={}&user={}",
        encoded(address.database.as_deref().unwrap_or_default()),
        encoded(&directory.display().to_string()),
        address.port,
        encoded(address.user.as_deref().unwrap_or_default())
    )
}
