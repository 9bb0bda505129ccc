//! `mainstay vm list`.

use mainstay_core::Result;
use mainstay_engine::vm::{KIND, root_of};
use mainstay_repository::PointInfo;
use mainstay_workloads::vm::{Hypervisor, MachineState, MachineSummary};

use super::super::Done;
use super::hosts;
use crate::args::VmList;
use crate::report::lines::{Line, stamp};
use crate::report::machines;
use crate::session::Session;

pub(super) fn run(arguments: &VmList, session: &mut Session) -> Done {
    let scratch = std::env::temp_dir();
    let hosts = arguments.host.iter().map(|host| hosts::open(host, &scratch, session));
    let hosts: Vec<Box<dyn Hypervisor>> = hosts.collect::<Result<_>>()?;
    let points = session.open()?.points()?;
    let mut rows = Vec::new();
    for host in &hosts {
        for machine in host.list()? {
            rows.push(Line::Machine(row(host.as_ref(), machine, &points)));
        }
    }
    session.report.table(&rows);
    Ok(None)
}

fn row(host: &dyn Hypervisor, machine: MachineSummary, points: &[PointInfo]) -> machines::Machine {
    let root = root_of(&machine.id);
    let last = points.iter().rfind(|point| point.workload.kind.0 == KIND && point.roots == [root.clone()]);
    machines::Machine {
        id: machine.id.0,
        name: machine.name,
        host: host.name(),
        state: state(machine.state).to_owned(),
        bytes: machine.disks.iter().filter_map(|disk| disk.size).sum(),
        disks: machine.disks.into_iter().map(|disk| disk.name).collect(),
        workload: last.map(|point| point.workload.name.clone()),
        last_point: last.map(|point| point.id.to_string()),
        last_backed_up: last.map(|point| stamp(point.moment)),
    }
}

fn state(state: MachineState) -> &'static str {
    match state {
        MachineState::Running => "running",
        MachineState::Paused => "paused",
        MachineState::ShutOff => "shut off",
        MachineState::Crashed => "crashed",
        MachineState::Unknown => "unknown",
    }
}
