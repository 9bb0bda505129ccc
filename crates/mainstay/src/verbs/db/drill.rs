//! `mainstay drill`.

use std::sync::Arc;

use mainstay_core::{Error, Progress, Result};
use mainstay_engine::mount::Lease;
use mainstay_engine::postgres::{DrillRequest, drill};

use super::super::{Done, mount};
use super::{moment, others};
use crate::args::Drill;
use crate::report::databases::Drilled;
use crate::report::lines::Line;
use crate::session::Session;

pub(in super::super) fn run(arguments: &Drill, session: &mut Session) -> Done {
    let assertions = assertions(arguments, session)?;
    let repository = Arc::new(session.open()?);
    if let Some(known) = others::of(&arguments.moment.target, &repository)? {
        return others::drill(arguments, assertions, &known, &repository, session);
    }
    let plan = moment::plan(&arguments.moment, &repository, session)?;
    let id = plan.point.id.to_string();
    let state = session.places()?.state.unwrap_or_else(std::env::temp_dir);
    let named = arguments.evidence.as_ref().map(|path| session.doors.directory.join(path));
    let request = DrillRequest {
        instance: moment::private(&arguments.private, session)?,
        database: arguments.database.clone(),
        assertions,
        thorough: !arguments.quick,
        evidence: named.unwrap_or_else(|| state.join("unproven").join(&id)),
    };
    let lease = mount::lease(session, &repository, &plan.point, "drilled");
    let progress: Arc<dyn Progress> = session.progress();
    let done = drill(&repository, &plan, &request, &session.doors.clock, &progress);
    drop(progress);
    // A key without the power to release leaves the hold to its own end.
    let _released = lease.map(Lease::release);
    let done = done?;
    session.report.line(&Line::Drilled(Drilled {
        point: id,
        workload: plan.point.workload.name.clone(),
        version: plan.cluster.version.clone(),
        lsn: done.reached.lsn,
        last_commit: done.reached.last_commit,
        end_of_log: done.reached.end_of_log,
        lazy: done.lazy,
        recovery_seconds: done.reached.took.as_secs_f64(),
        seconds: done.took.as_secs_f64(),
        checked: done.levels,
        left_out: done.left_out,
        bytes_fetched: done.cost.fetched,
        bytes_read: done.cost.read,
        bytes_whole: done.cost.whole,
    }));
    Ok(None)
}

/// Those of the command line, and those in files.
fn assertions(arguments: &Drill, session: &Session) -> Result<Vec<String>> {
    let mut assertions = arguments.check.clone();
    for path in &arguments.checks {
        let path = session.doors.directory.join(path);
        let text = std::fs::read_to_string(&path)
            .map_err(|error| Error::io(format!("cannot read {}", path.display()), error))?;
        assertions.extend(statements(&text));
    }
    Ok(assertions)
}

/// Split at semicolons at the ends of lines; lines that are comments are left out.
fn statements(text: &str) -> Vec<String> {
    let (mut statements, mut now) = (Vec::new(), String::new());
    for line in text.lines().filter(|line| !line.trim_start().starts_with("--")) {
        now.push_str(line);
        now.push('\n');
        if line.trim_end().ends_with(';') {
            statements.push(std::mem::take(&mut now));
        }
    }
    statements.push(now);
    statements
        .iter()
        .map(|one| one.trim().trim_end_matches(';').to_owned())
        .filter(|one| !one.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::statements;

    #[test]
    fn a_file_of_assertions_is_split_at_the_ends_of_statements() {
        let text = "-- all there; really\nSELECT count(*) = 3\nFROM item;\n\nSELECT ';' = ';'; \nSELECT true";
        assert_eq!(statements(text), ["SELECT count(*) = 3\nFROM item", "SELECT ';' = ';'", "SELECT true"]);
    }
}
