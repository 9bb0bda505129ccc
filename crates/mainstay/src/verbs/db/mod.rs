//! `mainstay db`.

mod backup;
pub(super) mod drill;
pub(super) mod engine;
mod export;
mod follow;
mod mariadb;
mod moment;
mod offline;
pub(super) mod open;
mod others;
mod push;
pub(super) mod record;
pub(super) mod restore;
mod server;
mod sqlite;
mod standby;
pub(super) mod status;

use mainstay_core::{Code, Error};

use super::Done;
use crate::args::Db;
use crate::session::Session;
use engine::Engine;

pub(super) fn run(verb: Db, session: &mut Session) -> Done {
    match verb {
        Db::Backup(arguments) => match Engine::of_address(&arguments.server.server)? {
            Engine::Postgres => backup::run(&arguments, session),
            Engine::MariaDb => mariadb::backup(&arguments, session),
            Engine::Sqlite => sqlite::backup(&arguments, session),
        },
        Db::Follow(arguments) => match Engine::of_address(&arguments.server.server)? {
            Engine::Postgres => follow::run(&arguments, session),
            Engine::MariaDb => mariadb::follow(&arguments, session),
            Engine::Sqlite => sqlite::follow(&arguments, session),
        },
        Db::Status(arguments) => status::run(&arguments, session),
        Db::PushWal(arguments) => push::push(&arguments, session),
        Db::FetchWal(arguments) => push::fetch(&arguments, session),
        Db::Restore(arguments) => {
            let repository = session.open()?;
            match Engine::of_workload(&arguments.workload, &repository.points()?, &repository)? {
                (Engine::Postgres, _) => restore::run(&arguments, &repository, session),
                (Engine::MariaDb, workload) => mariadb::restore(&arguments, &workload, &repository, session),
                (Engine::Sqlite, workload) => sqlite::restore(&arguments, &workload, &repository, session),
            }
        }
        Db::Standby(arguments) => standby::run(&arguments, session),
        Db::Export(arguments) => match Engine::of_address(&arguments.server.server)? {
            Engine::Postgres => export::run(&arguments, session),
            Engine::MariaDb | Engine::Sqlite => Err(no_dump()),
        },
        Db::Drill(arguments) => drill::run(&arguments, session),
        Db::StartGuard => mainstay_workloads::promise::attend(std::io::stdin()).map(|()| None),
        Db::Guard => mainstay_workloads::sandbox::attend(std::io::stdin()).map(|()| None),
    }
}

/// What has no dump program.
fn no_dump() -> Error {
    Error::new(Code::Usage, "databases of this kind are not exported")
        .hint("take a point of them: mainstay db backup")
}
