//! The guest agent behind an honest monitor: every answer is what the fuzzer makes of it.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use mainstay_fuzz::host::{self, runs};
use mainstay_fuzz::peer::Supply;
use mainstay_workloads::vm::Hypervisor as _;

fuzz_target!(|input: &[u8]| {
    let lab = host::Lab::new(&Supply::new(b""), runs, &Supply::new(input));
    for machine in lab.host().list().unwrap_or_default() {
        drop(lab.host().ask_guest(&machine.id, "guest-info", serde_json::json!({}), Duration::from_secs(1)));
        drop(lab.host().snapshot(&machine.id, &host::request()));
    }
});
