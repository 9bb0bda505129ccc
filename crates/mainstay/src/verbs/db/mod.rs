//! `mainstay db`.

mod backup;
mod follow;
mod restore;
mod server;
mod status;

use super::Done;
use crate::args::Db;
use crate::session::Session;

pub(super) fn run(verb: Db, session: &mut Session) -> Done {
    match verb {
        Db::Backup(arguments) => backup::run(&arguments, session),
        Db::Follow(arguments) => follow::run(&arguments, session),
        Db::Status(arguments) => status::run(&arguments, session),
        Db::Restore(arguments) => restore::run(&arguments, session),
    }
}
