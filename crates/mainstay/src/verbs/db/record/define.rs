//! `mainstay record define`.

use mainstay_engine::record::postgres::Postgres;
use mainstay_engine::record::{Database as _, suggest};
use mainstay_workloads::postgres::Sql;

use super::super::super::Done;
use super::super::server::Known;
use crate::args::{RecordDefine, Server};
use crate::report::lines::Line;
use crate::report::records::RecordText;
use crate::session::Session;

pub(super) fn run(arguments: &RecordDefine, session: &mut Session) -> Done {
    let server = Server {
        server: arguments.server.clone(),
        password_file: arguments.password_file.clone(),
        name: None,
        slot: None,
    };
    let known = Known::of(&server, session)?;
    let mut database = Postgres::read(Sql::new(known.dial(false)?))?;
    let catalog = database.catalog()?;
    let text = suggest(&catalog, catalog.find(&arguments.table)?)?;
    session.report.line(&Line::RecordText(RecordText { what: "definition".into(), text }));
    Ok(None)
}
