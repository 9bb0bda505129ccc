//! `mainstay db export`.

use std::sync::Arc;
use std::time::Duration;

use mainstay_core::{Code, Error, Progress, Result};
use mainstay_engine::export::{ExportRequest, backup_export};
use mainstay_workloads::export::Dump;
use mainstay_workloads::postgres::Programs;
use mainstay_workloads::process::Program;

use super::super::{Done, backup as files, check_tag};
use super::server::Known;
use crate::args::DbExport;
use crate::report::lines::{BackedUp, Line, Roots, Totals};
use crate::session::Session;

const DATABASES: &str = "databases";

pub(super) fn run(arguments: &DbExport, session: &mut Session) -> Done {
    let places = session.places()?;
    arguments.tag.iter().try_for_each(|tag| check_tag(tag))?;
    let server = Known::of(&arguments.server, session)?;
    let name = match &arguments.server.name {
        Some(name) => name.clone(),
        None => format!("{}-export", server.name),
    };
    files::check_name(&name)?;
    let dumps = dumps(arguments, &server, session)?;
    let repository = files::open(session, &places, false)?;
    let request = ExportRequest {
        host: session.doors.host.clone(),
        name,
        server: format!("postgres://{}", server.address.display()),
        tags: arguments.tag.clone(),
        directories: vec![DATABASES.into()],
        dumps,
        jobs: std::thread::available_parallelism().map_or(2, std::num::NonZero::get),
    };
    let began = session.doors.clock.monotonic();
    let progress: Arc<dyn Progress> = session.progress();
    let done = backup_export(&repository, request, &session.doors.clock, &progress);
    drop(progress);
    let point = done?;
    session.report.line(&Line::BackedUp(BackedUp {
        point: point.id.to_string(),
        workload: point.workload.name.clone(),
        host: point.host.clone(),
        roots: Roots::of(&point.roots),
        tags: arguments.tag.clone(),
        counts: Totals::from(&point.counts),
        seconds: session.seconds_since(began),
    }));
    Ok(None)
}

/// The programs to run: one for what all databases share, and one for each of them.
fn dumps(arguments: &DbExport, server: &Known, session: &Session) -> Result<Vec<Dump>> {
    let mut connection = server.dial(false)?;
    let number = connection.value("SHOW server_version_num")?;
    let major =
        number.parse::<u32>().map_err(|error| Error::integrity("its version is no number").because(error))?;
    let path = &session.doors.environment.path;
    let programs = Programs::find(major / 10_000, arguments.programs.as_deref(), path, None)?;
    let sql = "SELECT datname FROM pg_catalog.pg_database WHERE datallowconn AND NOT datistemplate ORDER BY datname";
    let there: Vec<String> =
        connection.query(sql)?.into_iter().filter_map(|row| row.into_iter().next().flatten()).collect();
    if let Some(missing) = arguments.database.iter().find(|name| !there.contains(name)) {
        return Err(Error::new(Code::NotFound, format!("there is no database {missing:?}")));
    }
    let chosen = if arguments.database.is_empty() { &there } else { &arguments.database };
    let program = |name: &str, database: &str| -> Program {
        let address = of_database(&arguments.server.server, database);
        let program =
            programs.program(name, Duration::MAX).arguments(["--no-password", "--dbname", &address]);
        server.known_to(program)
    };
    let mut globals = program("pg_dumpall", "postgres").argument("--globals-only");
    if arguments.no_role_passwords {
        globals = globals.argument("--no-role-passwords");
    }
    let mut dumps = vec![Dump { path: "globals.sql".into(), program: globals }];
    for name in chosen {
        let path = format!("{DATABASES}/{}.sql", name.replace('/', "%2F"));
        let program = program("pg_dump", name).arguments(["--format=plain", "--compress=0"]);
        dumps.push(Dump { path, program });
    }
    Ok(dumps)
}

/// The address of another database of the same server.
fn of_database(address: &str, name: &str) -> String {
    let (front, query) = address.split_once('?').unwrap_or((address, ""));
    let authority = match front.split_once("://") {
        Some((scheme, rest)) => format!("{scheme}://{}", rest.split('/').next().unwrap_or_default()),
        None => front.to_owned(),
    };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    let name: String = name
        .bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect();
    let others: Vec<&str> =
        query.split('&').filter(|pair| !pair.is_empty() && !pair.starts_with("dbname=")).collect();
    format!("{authority}/{name}{}{}", if others.is_empty() { "" } else { "?" }, others.join("&"))
}

#[cfg(test)]
mod tests {
    use super::of_database;

    #[test]
    fn only_the_database_of_an_address_is_another() {
        for (address, wanted) in [
            ("postgres://me@h:7/old?port=1&dbname=x", "postgres://me@h:7/a%20b?port=1"),
            ("postgresql:///?host=/run/a", "postgresql:///a%20b?host=/run/a"),
            ("postgres://h", "postgres://h/a%20b"),
        ] {
            assert_eq!(of_database(address, "a b"), wanted);
        }
    }
}
