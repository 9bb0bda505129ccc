//! `mainstay vm`.

mod backup;
mod hosts;
mod in_place;
mod list;
mod newer;
mod receive;
mod recover;
mod recreate;
mod restore;
mod run;

use super::Done;
use crate::args::Vm;
use crate::session::Session;

pub(super) fn run(verb: Vm, session: &mut Session) -> Done {
    match verb {
        Vm::List(arguments) => list::run(&arguments, session),
        Vm::Ignore(arguments) => list::ignore(&arguments, session),
        Vm::Backup(arguments) => backup::run(&arguments, session),
        Vm::Receive(arguments) => receive::run(&arguments, session),
        Vm::Restore(arguments) => restore::run(&arguments, session),
        Vm::Recover(arguments) => recover::run(&arguments, session),
        Vm::Run(arguments) => run::run(&arguments, session),
        Vm::Prove(arguments) => run::prove(&arguments, session),
        Vm::Guard => mainstay_workloads::vm::attend_at_standard_streams().map(|()| None),
    }
}
