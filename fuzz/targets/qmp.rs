//! QEMU's monitor: every answer is what the fuzzer makes of it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mainstay_fuzz::host::{self, greeted};
use mainstay_fuzz::peer::Supply;
use mainstay_workloads::vm::Hypervisor as _;

fuzz_target!(|input: &[u8]| {
    let lab = host::Lab::new(&Supply::new(input), greeted, &Supply::new(b""));
    for machine in lab.host().list().unwrap_or_default().iter().take(2) {
        drop(lab.host().config(&machine.id));
        drop(lab.host().snapshot(&machine.id, &host::request()));
    }
});
