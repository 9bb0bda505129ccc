//! Machines brought back as machines of a host, one or many of them by a plan.

mod example;
mod machine;
mod plan;
mod run;

pub use example::example;
pub use machine::{
    Record, Recovered, Recovery, Stage, Times, Wait, check_recovery, recover_machine, whole_machine,
};
pub(super) use machine::{is_running, state_of};
pub use plan::{PlannedMachine, RecoveryPlan};
pub use run::{Find, Outcome, Ready, Step, look, recover};
