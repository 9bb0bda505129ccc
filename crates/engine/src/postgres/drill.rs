//! Proving that a cluster can be recovered: a throwaway copy is brought up, and the server's own checks and the user's
//! assertions are asked of it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Clock, Code, Error, Event, Phase, Progress, Result};
use mainstay_repository::{Note, Repository};

use super::instance::{Instance, InstanceCost, InstanceRequest, Reached};
use super::plan::ClusterPlan;

/// Programs that read everything.
const CHECK_LIMIT: Duration = Duration::from_secs(7 * 24 * 3600);
/// So much of what a check says is kept.
const SAID_BYTES: usize = 1 << 20;

/// What must hold of the copy.
#[derive(Clone, Debug)]
pub struct DrillRequest {
    pub instance: InstanceRequest,
    /// The database that the assertions are asked of.
    pub database: String,
    /// Queries that must answer with one value, true.
    pub assertions: Vec<String>,
    /// Reads every table, index and page.
    pub thorough: bool,
    /// Where the server's log is kept when it fails.
    pub evidence: PathBuf,
}

/// What a drill has shown.
#[derive(Clone, Debug)]
pub struct Drilled {
    pub reached: Reached,
    /// What was checked, in clauses, as it is noted in the point.
    pub levels: Vec<String>,
    /// From the first byte to the end of the last check.
    pub took: Duration,
    pub cost: InstanceCost,
    /// Its files were read as it needed them.
    pub lazy: bool,
    /// What could not be checked, and why.
    pub left_out: Vec<String>,
}

/// Recovers a copy, checks it, and notes in its point that it is proven and how long it took until it answered.
///
/// Errors: [`Code::Refused`] when it does not come up or a check fails, and [`Code::Integrity`] when something stored is
/// damaged: the point is not proven then, and the server's log is kept.
pub fn drill(
    repository: &Repository,
    plan: &ClusterPlan,
    request: &DrillRequest,
    clock: &Arc<dyn Clock>,
    progress: &Arc<dyn Progress>,
) -> Result<Drilled> {
    let began = clock.monotonic();
    let kept = InstanceRequest { evidence: Some(request.evidence.clone()), ..request.instance.clone() };
    let mut instance = Instance::start(repository, plan, &kept, clock, progress)?;
    progress.event(&Event::Phase(Phase::Verifying));
    let mut levels = vec![how(&instance)];
    let mut left_out = Vec::new();
    let passed = pass(&mut instance, plan, request, progress, &mut levels, &mut left_out);
    // What was read wrong explains every failure, and is in the way of every success.
    let passed = instance.check_content().and(passed);
    if let Err(error) = passed {
        if error.code() == Code::Cancelled {
            return Err(error);
        }
        let code = if error.code() == Code::Integrity { Code::Integrity } else { Code::Refused };
        let unproven = Error::new(code, format!("point {} is not proven", plan.point.id)).because(error);
        return Err(match instance.keep_log(&request.evidence) {
            Ok(at) => unproven.hint(format!("the server's log is {}", at.display())),
            Err(error) => unproven.hint(format!("its log could not be kept: {}", error.chain().join(": "))),
        });
    }
    let seconds = instance.reached().took.as_secs_f64().ceil() as u64;
    repository.note(&plan.point.id, &Note::Proven { how: levels.join(", "), seconds })?;
    let took = clock.monotonic().saturating_sub(began);
    let (cost, lazy) = (instance.cost(), instance.is_lazy());
    Ok(Drilled { reached: instance.reached().clone(), levels, took, cost, lazy, left_out })
}

fn how(instance: &Instance) -> String {
    let reached = instance.reached();
    let files = if instance.is_lazy() { "read as needed" } else { "restored in full" };
    let end = if reached.end_of_log { ", the end of the log" } else { "" };
    format!("recovered to {}{end}, files {files}", reached.lsn)
}

fn pass(
    instance: &mut Instance,
    plan: &ClusterPlan,
    request: &DrillRequest,
    progress: &Arc<dyn Progress>,
    levels: &mut Vec<String>,
    left_out: &mut Vec<String>,
) -> Result<()> {
    for sql in &request.assertions {
        progress.check()?;
        assert(instance, &request.database, sql)?;
    }
    if !request.assertions.is_empty() {
        levels.push(format!("{} assertions held", request.assertions.len()));
    }
    if !request.thorough {
        return Ok(());
    }
    if instance.programs().has("pg_amcheck") {
        // It needs functions that are installed first.
        instance.promote()?;
        let place = instance.directory().join("place").display().to_string();
        let words = ["--all", "--install-missing", "--heapallindexed", "--no-password", "-h", &place, "-U"];
        let words = words.into_iter().chain([request.instance.role.as_str()]);
        run(instance, "pg_amcheck", &words.collect::<Vec<_>>(), progress)?;
        levels.push("pg_amcheck found nothing".into());
    } else {
        left_out.push("tables and indexes were not checked: there is no pg_amcheck here".into());
    }
    if plan.cluster.data_checksums {
        instance.shut_down()?;
        let data = instance.data().display().to_string();
        run(instance, "pg_checksums", &["--check", "-D", &data], progress)?;
        levels.push("page checksums right".into());
    } else {
        left_out.push("pages were not checked: the cluster has no checksums".into());
    }
    Ok(())
}

fn assert(instance: &Instance, database: &str, sql: &str) -> Result<()> {
    let failed = |why: String| Error::new(Code::Refused, format!("the assertion {sql:?} {why}"));
    let rows = instance
        .connect(database)?
        .query(sql)
        .map_err(|error| error.during(format!("cannot ask {sql:?}")))?;
    match rows.as_slice() {
        [row] if matches!(row.as_slice(), [Some(value)] if value == "t") => Ok(()),
        [row] if row.len() == 1 => {
            let value = row.first().cloned().flatten().unwrap_or_else(|| "null".into());
            Err(failed(format!("answered {value:?}, not true")))
        }
        rows => Err(failed(format!("answered with {} rows, not with one value", rows.len()))),
    }
}

fn run(instance: &Instance, name: &str, words: &[&str], progress: &Arc<dyn Progress>) -> Result<()> {
    let program = instance.programs().program(name, CHECK_LIMIT).arguments(words.iter().copied());
    let outcome = program.keep_output(SAID_BYTES).part_of(Some(Arc::clone(progress))).run()?;
    if outcome.status == Some(0) {
        return Ok(());
    }
    let said = [outcome.output, outcome.errors].concat();
    let said = String::from_utf8_lossy(&said);
    let first = said.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("it does not say what");
    Err(Error::new(Code::Refused, format!("{name} found something wrong"))
        .because(first.escape_debug().to_string()))
}
