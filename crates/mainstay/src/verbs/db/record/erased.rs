//! `mainstay record erased`.

use mainstay_core::{Code, Error, Result, Time};
use mainstay_engine::record::{Erased, TableName};

use super::super::super::{Done, would};
use super::{find, pairs};
use crate::args::RecordErased;
use crate::report::lines::{Line, stamp};
use crate::report::records::ErasedRow;
use crate::session::Session;

pub(super) fn run(arguments: &RecordErased, session: &mut Session) -> Done {
    let repository = session.open()?;
    if !arguments.add && !arguments.remove {
        for (_, decided, erased) in Erased::list(&repository) {
            let named = |name: &Option<String>, known: &str| name.as_ref().is_none_or(|name| name == known);
            if named(&arguments.workload, &erased.workload) {
                session.report.line(&line(&erased, Some(decided), true));
            }
        }
        return Ok(None);
    }
    let mut erased = row(arguments, session)?;
    let listed = Erased::list(&repository).iter().any(|(_, _, known)| known.is(&erased));
    if arguments.add || !listed {
        // Restores compare names in full.
        erased.workload = find::workload(&erased.workload, &repository.points()?)?.workload.name;
    }
    let shown = format!("{} {} of {}/{}", erased.table, erased.key, erased.workload, erased.database);
    let known = Erased::list(&repository).into_iter().find(|(_, _, known)| known.is(&erased));
    if arguments.add {
        session.report.note(&format!(
            "the database was not asked: whether {} has a row {}, and that key, in the database {}, nobody has looked; \
             a plan of record restore shows rows by the names that are compared",
            erased.table, erased.key, erased.database
        ));
        if arguments.dry_run {
            return would(session, &format!("never bring back {shown}: {}", erased.why));
        }
        erased.add(&repository)?;
        session.report.line(&line(&erased, None, true));
        return Ok(None);
    }
    let missing = || {
        Error::new(Code::NotFound, format!("{shown} is not on the list"))
            .hint("mainstay record erased shows it")
    };
    let (id, _, known) = known.ok_or_else(missing)?;
    if arguments.dry_run {
        return would(session, &format!("allow again to bring back {shown}"));
    }
    repository.decide(Some(id), "")?;
    session.report.line(&line(&known, None, false));
    Ok(None)
}

fn row(arguments: &RecordErased, session: &Session) -> Result<Erased> {
    let missing = || Error::new(Code::Usage, "which row is meant").hint("name WORKLOAD TABLE COLUMN=VALUE");
    let table = arguments.table.as_deref().ok_or_else(missing)?;
    let (schema, name) = TableName::parse(table)?;
    let table = TableName { schema: schema.unwrap_or_else(|| "public".into()), name };
    let key: Vec<String> =
        pairs(&arguments.key)?.into_iter().map(|(column, value)| format!("{column}={value}")).collect();
    let why = arguments.why.clone().unwrap_or_default();
    if arguments.add && why.trim().is_empty() {
        return Err(Error::new(Code::Usage, "a decision needs a reason").hint("say it with --why"));
    }
    let who = arguments.by.clone().or_else(|| session.doors.environment.user.clone());
    Ok(Erased {
        workload: arguments.workload.clone().ok_or_else(missing)?,
        database: arguments.database.clone().ok_or_else(|| {
            Error::new(Code::Usage, "which database is meant").hint("name it with --database")
        })?,
        table: table.to_string(),
        key: key.join(" "),
        who: who.unwrap_or_else(|| format!("somebody on {}", session.doors.host)),
        why,
    })
}

fn line(erased: &Erased, decided: Option<Time>, on_the_list: bool) -> Line {
    Line::ErasedRow(ErasedRow {
        workload: erased.workload.clone(),
        database: erased.database.clone(),
        table: erased.table.clone(),
        key: erased.key.clone(),
        who: erased.who.clone(),
        why: erased.why.clone(),
        decided: decided.map(stamp),
        on_the_list,
    })
}
