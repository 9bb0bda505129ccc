//! `mainstay db push-wal` and `mainstay db fetch-wal`: what a server calls by itself.

use mainstay_core::{Code, Error};
use mainstay_engine::postgres::{Pushed, fetch_wal, push_wal};

use super::super::Done;
use crate::args::{DbFetchWal, DbPushWal};
use crate::session::Session;

pub(super) fn push(arguments: &DbPushWal, session: &mut Session) -> Done {
    let name = arguments.name.clone().unwrap_or_else(|| session.doors.host.clone());
    let file = session.doors.directory.join(&arguments.file);
    let repository = session.open()?;
    if push_wal(&repository, &name, &file)? == Pushed::Aside {
        session.report.note(&format!(
            "{} has other bytes than what is stored in its place; it is kept beside that: mainstay db status {name}",
            file.display()
        ));
    }
    Ok(None)
}

pub(super) fn fetch(arguments: &DbFetchWal, session: &mut Session) -> Done {
    let name = arguments.name.clone().unwrap_or_else(|| session.doors.host.clone());
    let to = session.doors.directory.join(&arguments.to);
    let fetched = session.open().and_then(|repository| fetch_wal(&repository, &name, &arguments.file, &to));
    match fetched {
        Err(error) if !is_missing(&error) => {
            session.report.error(&error);
            // A server takes every status up to 125 for the end of the log.
            Ok(Some(Code::Cancelled))
        }
        fetched => fetched.map(|()| None),
    }
}

fn is_missing(error: &Error) -> bool {
    error.code() == Code::NotFound
}
