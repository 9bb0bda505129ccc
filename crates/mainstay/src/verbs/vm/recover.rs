//! `mainstay vm recover`.

use std::path::Path;
use std::sync::Arc;

use mainstay_core::{Code, Error, Progress, Result};
use mainstay_engine::vm::Newer;
use mainstay_engine::vm::recover::{
    Outcome, PlannedMachine, Recovered, RecoveryPlan, Stage, Step, Wait, example, look, recover,
};
use mainstay_workloads::vm::Hypervisor;

use super::super::{Done, number};
use super::{hosts, newer, recreate, restore};
use crate::args::VmRecover;
use crate::report::lines::{Line, stamp};
use crate::report::recovery::{RecoveryPlanned, RecoveryState};
use crate::session::Session;

pub(super) fn run(arguments: &VmRecover, session: &mut Session) -> Done {
    let Some(path) = &arguments.plan else {
        let text = example(&session.open()?)?;
        session.report.raw(text.as_bytes());
        return Ok(None);
    };
    let plan = read(&session.doors.directory.join(path), &arguments.only)?;
    let host = hosts::open(&plan.host, &std::env::temp_dir(), session)?;
    let repository = session.open()?;
    newer::with(&repository, &[], &arguments.inside, session, |newer, session| {
        carry_out(arguments.dry_run, &plan, host.as_ref(), newer, session)
    })
}

fn carry_out(
    dry_run: bool,
    plan: &RecoveryPlan,
    host: &dyn Hypervisor,
    newer: &Newer<'_>,
    session: &mut Session,
) -> Done {
    let points = newer.repository.points()?;
    let progress: Arc<dyn Progress> = session.progress();
    let find = |text: &str| restore::find(text, false, &points, session);
    let steps = look(plan, host, &find, newer, progress.as_ref())?;
    for ready in steps.iter().filter_map(|step| step.ready.as_ref().ok()) {
        session.say_composed(&ready.point, &ready.files, &[]);
    }
    if dry_run {
        drop(progress);
        let impossible = steps.iter().filter(|step| step.ready.is_err()).count();
        session
            .report
            .table(&steps.iter().map(|step| Line::RecoveryPlanned(planned(step))).collect::<Vec<_>>());
        return outcome(impossible, steps.len(), "cannot be recovered");
    }
    let all = steps.len();
    let (mut rows, mut there) = (Vec::new(), Vec::new());
    let mut told = |machine: &PlannedMachine, outcome: &Outcome| {
        let row = state(machine, outcome, host);
        if let Outcome::Done(done) = outcome {
            there.push(Recovered::clone(done));
        }
        session.report.say(&format!("{}: {}", row.name, row.why.as_deref().unwrap_or(&row.state)));
        rows.push(Line::RecoveryState(row));
    };
    let jobs = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let done = recover(steps, host, newer, jobs, &progress, &mut told);
    drop(progress);
    session.report.table(&rows);
    let applied = there.iter().map(|machine| recreate::tell_files(machine, session));
    let applied: Vec<Done> = applied.collect();
    done?;
    outcome(all - there.len(), all, "were not recovered")?;
    applied.into_iter().try_fold(None, |worst, one| Ok(one?.or(worst)))
}

fn read(path: &Path, only: &[String]) -> Result<RecoveryPlan> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| Error::io(format!("cannot read the plan {}", path.display()), error))?;
    let base = path.parent().unwrap_or(path);
    let mut plan = RecoveryPlan::parse(&text, base)
        .map_err(|error| error.during(format!("cannot use the plan {}", path.display())))?;
    plan.only(only)?;
    Ok(plan)
}

fn outcome(lost: usize, all: usize, what: &str) -> Done {
    if lost == 0 {
        return Ok(None);
    }
    Err(Error::new(Code::Io, format!("{lost} of {all} machines {what}"))
        .hint("the table says why; the same command goes on where it stopped"))
}

fn planned(step: &Step) -> RecoveryPlanned {
    let recovery = &step.planned.recovery;
    let ready = step.ready.as_ref().ok();
    let (state, why) = match &step.ready {
        Ok(ready) => (stage(ready.stage), None),
        Err(error) => ("impossible", Some(error.chain().join(": "))),
    };
    let plugged = |interface: &mainstay_workloads::vm::Interface| interface.network.clone();
    RecoveryPlanned {
        name: step.planned.name.clone(),
        state: state.to_owned(),
        why,
        point: ready.map(|ready| ready.point.id.to_string()),
        moment: ready.map(|ready| stamp(ready.point.moment)),
        after: step.planned.after.clone(),
        directory: recovery.folder.directory.display().to_string(),
        disks: number(ready.map_or(0, |ready| ready.machine.disks.len())),
        bytes: ready.map_or(0, |ready| ready.bytes),
        data_bytes: ready.map_or(0, |ready| ready.data_bytes),
        cpus: ready.and_then(|ready| ready.machine.cpus),
        memory: ready.and_then(|ready| ready.machine.memory),
        networks: ready
            .map_or_else(Vec::new, |ready| ready.machine.interfaces.iter().filter_map(plugged).collect()),
        starts: recovery.start,
        waits_for: match recovery.wait {
            Wait::Nothing => "nothing".to_owned(),
            Wait::Agent => "agent".to_owned(),
            Wait::Time(time) => format!("{} s", time.as_secs()),
        },
        estimated_seconds: ready.map_or(0.0, |ready| ready.seconds),
    }
}

fn stage(stage: Option<Stage>) -> &'static str {
    match stage {
        None => "new",
        Some(Stage::Begun) => "begun",
        Some(Stage::Written) => "written",
        Some(Stage::Defined) => "defined",
        Some(Stage::Started) => "started",
        Some(Stage::Complete) => "complete",
    }
}

fn state(machine: &PlannedMachine, outcome: &Outcome, host: &dyn Hypervisor) -> RecoveryState {
    let (state, why, recovered) = match outcome {
        Outcome::Done(done) if done.was_complete => ("was complete", None, Some(done)),
        Outcome::Done(done) => ("complete", None, Some(done)),
        Outcome::Failed(error) => {
            let next = error.next_step().map(|next| format!(" ({next})")).unwrap_or_default();
            ("failed", Some(error.chain().join(": ") + &next), None)
        }
        Outcome::Waits(failed) => ("not tried", Some(format!("it comes after {failed}, which failed")), None),
    };
    let recovered = recovered.map(|done| recreate::line(done, host));
    RecoveryState { name: machine.name.clone(), state: state.to_owned(), why, recovered }
}
