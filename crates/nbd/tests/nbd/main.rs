//! Both sides of the protocol, against each other and against QEMU and libnbd.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail as tests do")]

mod fleecing;
mod hostile;
mod lab;
mod machine;
mod overlay;
mod peers;
mod proxy;
mod recovery;
mod rules;
mod tls;
mod together;
mod trouble;
