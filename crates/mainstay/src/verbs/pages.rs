//! What the program prints about itself: completions, man pages, exit codes, the schema of its JSON.

use std::path::Path;

use clap::CommandFactory as _;
use clap_complete::Shell;
use mainstay_core::{Code, Error};

use super::Done;
use crate::args::Arguments;
use crate::report::lines::{ExitCode, Line};
use crate::session::Session;

pub(super) fn completions(shell: Shell, session: &Session) -> Done {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "mainstay", &mut script);
    session.report.raw(&script);
    Ok(None)
}

pub(super) fn man(directory: &Path, session: &Session) -> Done {
    let directory = session.doors.directory.join(directory);
    let fail = |error| Error::io(format!("cannot write man pages into {}", directory.display()), error);
    std::fs::create_dir_all(&directory).map_err(fail)?;
    clap_mangen::generate_to(Arguments::command(), &directory).map_err(fail)?;
    session.report.say(&format!("The man pages are in {}.", directory.display()));
    Ok(None)
}

pub(super) fn exit_codes(session: &Session) -> Done {
    let mut codes = Code::ALL.to_vec();
    codes.sort_by_key(|code| code.exit());
    let meaning = "everything that was asked for is done".to_owned();
    let done = ExitCode { exit: 0, name: "done".to_owned(), meaning };
    let codes = std::iter::once(done).chain(codes.into_iter().map(ExitCode::from));
    let rows: Vec<Line> = codes.map(Line::ExitCode).collect();
    session.report.table(&rows);
    Ok(None)
}

pub(super) fn schema(session: &Session) -> Done {
    let schema = schemars::schema_for!(Line);
    let text = serde_json::to_string_pretty(&schema);
    let text = text.map_err(|error| Error::bug("cannot write the schema").because(error))?;
    session.report.raw(text.as_bytes());
    session.report.raw(b"\n");
    Ok(None)
}
