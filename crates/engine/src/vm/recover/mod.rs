//! Machines brought back as machines of a host, one or many of them by a plan.

mod machine;

pub(super) use machine::is_running;
pub use machine::{
    Record, Recovered, Recovery, Stage, Times, Wait, check_recovery, recover_machine, whole_machine,
};
