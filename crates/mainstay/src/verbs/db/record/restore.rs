//! `mainstay record restore`.

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Code, Error, Progress, Result};
use mainstay_engine::postgres::{ClusterPlan, Instance, Until, plan_cluster};
use mainstay_engine::record::postgres::Postgres;
use mainstay_engine::record::{
    Applied, Ask, Definition, Erased, Fate, HistoryAsk, Plan, Receipt, TableName, Triggers, apply, plan,
    store,
};
use mainstay_repository::Repository;
use mainstay_workloads::postgres::Sql;

use super::super::super::{Done, mount};
use super::super::moment;
use super::super::server::Known;
use super::{find, pairs};
use crate::args::{Fire, RecordRestore, Server};
use crate::report::lines::{Line, stamp};
use crate::report::records::{RecordChange, RecordPlan, RecordRestored, RecordRow, RecordText};
use crate::session::Session;

/// So often a transaction that others got in the way of is tried again.
const ATTEMPTS: u32 = 3;

/// What a restore is asked with, resolved.
struct Wish<'a> {
    arguments: &'a RecordRestore,
    known: Known,
    definition: Definition,
    wanted: Vec<(String, String)>,
    database: String,
    /// The workload, and where in its log the record is taken from.
    workload: String,
    from: String,
    erased: Vec<Erased>,
}

pub(super) fn run(arguments: &RecordRestore, session: &mut Session) -> Done {
    let repository = Arc::new(session.open()?);
    let definition = definition(arguments, session)?;
    let wanted = pairs(&arguments.row.key)?;
    let server = Server {
        server: arguments.server.clone(),
        password_file: arguments.password_file.clone(),
        name: None,
        slot: None,
    };
    let known = Known::of(&server, session)?;
    // A server that does not answer is told before anything is brought up.
    let database = Postgres::read(Sql::new(known.dial(false)?))?.database()?;
    let (cluster, from) = moment(arguments, &wanted, &database, &repository, session)?;
    let wish = Wish {
        arguments,
        known,
        definition,
        wanted,
        workload: cluster.point.workload.name.clone(),
        from,
        erased: Erased::list(&repository).into_iter().map(|(_, _, erased)| erased).collect(),
        database,
    };
    let lease = mount::lease(session, &repository, &cluster.point, "a record is restored");
    let request = moment::private(&arguments.private, session)?;
    let progress: Arc<dyn Progress> = session.progress();
    let started = Instance::start(&repository, &cluster, &request, &session.doors.clock, &progress);
    drop(progress);
    let instance = started?;
    let mut point = Postgres::read(Sql::new(instance.connect(&wish.database)?))?;
    let done = wish.go(&mut point, &instance, &repository, session);
    drop((point, instance));
    // A key without the power to release leaves the hold to its own end.
    let _released = lease.map(mainstay_engine::mount::Lease::release);
    done
}

fn definition(arguments: &RecordRestore, session: &Session) -> Result<Definition> {
    let mut definition = match &arguments.definition {
        None => Definition::plain(),
        Some(path) => {
            let path = session.doors.directory.join(path);
            let text = std::fs::read_to_string(&path)
                .map_err(|error| Error::io(format!("cannot read {}", path.display()), error))?;
            Definition::parse(&text).map_err(|error| error.during(format!("in {}", path.display())))?
        }
    };
    match arguments.triggers {
        Some(Fire::On) => definition.triggers = Triggers::On,
        Some(Fire::Off) => definition.triggers = Triggers::Off,
        None => {}
    }
    Ok(definition)
}

/// Where in the log the record is taken from: the moment that was named, or just before its deletion was committed.
fn moment(
    arguments: &RecordRestore,
    wanted: &[(String, String)],
    database: &str,
    repository: &Repository,
    session: &Session,
) -> Result<(ClusterPlan, String)> {
    let asked = &arguments.moment;
    if asked.target.contains('@') || asked.before.is_some() || asked.consistent {
        return Ok((moment::plan(asked, repository, session)?, asked.target.clone()));
    }
    let workload = find::workload(&asked.target, &repository.points()?)?;
    let ask = HistoryAsk {
        workload: &workload.workload.id,
        database,
        table: &arguments.row.table,
        wanted,
        all: false,
    };
    let history = find::look(repository, &ask, &arguments.private, session)?;
    history.notes.iter().for_each(|note| session.report.note(note));
    let Some(deletion) = history.deletion() else {
        let what = format!("the log does not tell that {} was deleted", history.shown);
        let hint =
            "name the moment: WORKLOAD@'2026-11-22 10:41'; mainstay record find shows what happened to it";
        return Err(Error::new(Code::NotFound, what).hint(hint));
    };
    let from = format!(
        "{}@{}, just before transaction {} deleted it, at {}",
        workload.workload.name,
        deletion.committed,
        deletion.transaction,
        stamp(deletion.time)
    );
    session.report.say(&format!("{}: {from}", history.shown));
    let plan = plan_cluster(repository, &workload.workload.id, Until::Lsn(deletion.committed))?;
    Ok((plan, from))
}

impl Wish<'_> {
    fn plan(&self, point: &mut Postgres, live: &mut Postgres) -> Result<Plan> {
        let erased = |table: &TableName, key: &str| {
            self.erased.iter().any(|known| known.names(&self.workload, &self.database, table, key))
        };
        let ask = Ask {
            table: &self.arguments.row.table,
            wanted: &self.wanted,
            definition: &self.definition,
            columns: &self.arguments.columns,
            below: self.arguments.below,
            erased: &erased,
            rows_max: self.arguments.max_rows,
        };
        plan(point, live, &ask)
    }

    fn live(&self) -> Result<Sql> {
        Ok(Sql::new(self.known.dial(false)?))
    }

    fn go(
        &self,
        point: &mut Postgres,
        instance: &Instance,
        repository: &Repository,
        session: &mut Session,
    ) -> Done {
        let began = session.doors.clock.monotonic();
        let mut live = Postgres::read(self.live()?)?;
        let planned = self.plan(point, &mut live)?;
        instance.check_content()?;
        let line = Line::RecordPlan(Box::new(self.shown(&planned)?));
        if self.arguments.sql {
            session.report.aside(&line);
        } else {
            session.report.line(&line);
        }
        if self.arguments.dry_run {
            return Ok(None);
        }
        planned.check(self.arguments.schema_changed)?;
        if self.arguments.sql {
            if self.definition.triggers == Triggers::Off {
                let what = "a script cannot check references that silenced triggers do not check";
                return Err(Error::new(Code::Usage, what).hint("leave --triggers on, or --apply it"));
            }
            let text = live.script(&planned, &self.title(&planned)?)?;
            session.report.line(&Line::RecordText(RecordText { what: "script".into(), text }));
            return Ok(None);
        }
        if planned.is_empty() {
            session.report.say("There is nothing to do.");
            return Ok(None);
        }
        drop(live);
        let question = format!("Bring back {} rows into {}", planned.inserts(), self.known.address.display());
        session.confirm(self.arguments.apply, &question)?;
        self.carry_out(point, &planned, repository, session, began)
    }

    fn carry_out(
        &self,
        point: &mut Postgres,
        planned: &Plan,
        repository: &Repository,
        session: &mut Session,
        began: Duration,
    ) -> Done {
        let mut attempt = 1;
        let (transaction, applied, receipt) = loop {
            session.check_cancelled()?;
            match self.attempt(point, planned, repository, session) {
                Err(error) if error.code() == Code::Conflict && attempt < ATTEMPTS => attempt += 1,
                done => break done?,
            }
        };
        let root = planned.root()?;
        session.report.line(&Line::RecordRestored(RecordRestored {
            row: format!("{} {}", planned.table(root)?, planned.key(root)),
            inserted: applied.inserted,
            relinked: applied.relinked,
            columns: applied.columns,
            sequences: applied.sequences,
            unseen_sequences: applied.unseen,
            different: applied.different,
            transaction,
            receipt,
            seconds: session.seconds_since(began),
        }));
        Ok(None)
    }

    /// One transaction: planned anew, done, checked, and told in the repository before it is committed.
    fn attempt(
        &self,
        point: &mut Postgres,
        planned: &Plan,
        repository: &Repository,
        session: &Session,
    ) -> Result<(String, Applied, String)> {
        let mut live = Postgres::write(self.live()?, self.definition.triggers)?;
        let again = self.plan(point, &mut live)?;
        if !again.does_as(planned) {
            return Err(Error::new(Code::Conflict, "the live database has changed since the plan was shown")
                .hint("nothing was changed; run it again and look at the plan"));
        }
        let title = self.title(&again)?;
        let script = live.script(&again, &title)?;
        let applied = apply(&mut live, &again)?;
        let inverse = live.inverse(&again, &format!("takes back: {title}"))?;
        let transaction = live.transaction()?;
        let who = session.doors.environment.user.clone().unwrap_or_default();
        let receipt = Receipt {
            workload: &self.workload,
            from: &self.from,
            server: &self.known.address.display(),
            database: &self.database,
            who: &who,
            transaction: &transaction,
            plan: &again,
            applied: &applied,
            script: &script,
            inverse: &inverse,
        };
        let progress: Arc<dyn Progress> = Arc::new(mainstay_core::Silent);
        let kept = store(repository, &receipt, &session.doors.host, &session.doors.clock, &progress)
            .map_err(|error| error.during("no receipt can be kept, and nothing was changed"))?;
        live.commit().map_err(|error| error.during("whether the restore was committed is not known"))?;
        Ok((transaction, applied, kept.to_string()))
    }

    fn title(&self, plan: &Plan) -> Result<String> {
        let root = plan.root()?;
        Ok(format!("{} {}, from {}", plan.table(root)?, plan.key(root), self.from))
    }

    fn shown(&self, plan: &Plan) -> Result<RecordPlan> {
        let root = plan.root()?;
        let mut rows = Vec::new();
        for member in plan.members.iter().filter(|member| member.fate != Fate::NotNeeded) {
            let changes = match &member.fate {
                Fate::Changed(differences) => differences.clone(),
                _ => Vec::new(),
            };
            let changes = changes.into_iter().map(|(column, was, is)| RecordChange { column, was, is });
            rows.push(RecordRow {
                table: plan.table(member)?.to_string(),
                key: plan.key(member),
                fate: member.fate.name().into(),
                changes: changes.collect(),
                emptied: member.emptied.clone(),
            });
        }
        Ok(RecordPlan {
            row: format!("{} {}", plan.table(root)?, plan.key(root)),
            from: self.from.clone(),
            database: self.database.clone(),
            inserts: plan.inserts() as u64,
            relinks: plan.relinks.len() as u64,
            columns: plan.columns.as_ref().map_or(0, |columns| columns.set.len() as u64),
            tree: plan.tree(),
            rows,
            notes: plan.notes.clone(),
            schema: plan.schema.clone(),
            triggers: plan.triggers.clone(),
            blocked: plan.blocked.clone(),
        })
    }
}
