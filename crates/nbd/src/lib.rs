//! The Network Block Device protocol, both sides, and a local overlay to write into.
//!
//! A hypervisor's disk read over the network is a [`mainstay_core::Blocks`] ([`Client::blocks`]), and any `Blocks` is
//! offered to a hypervisor ([`Server`]). The crate knows nothing of backups.
//!
//! The protocol is the NBD project's `doc/proto.md`: fixed newstyle only, structured replies, block status, TLS by
//! certificates. Pre-shared keys are not there, because rustls does not have them. The experimental extended headers
//! are not there either: nothing that moves recovery data needs a request longer than 4 GiB.
//!
//! Blocking threads. Every wait has a limit ([`stream`]); whatever a peer sends is bounded before it is believed.

mod address;
mod blocks;
mod client;
mod overlay;
mod server;
mod stream;
mod tls;
mod wire;

pub use address::Address;
pub use blocks::WritableBlocks;
pub use client::{Client, Description, ExportInfo, Remote};
pub use overlay::Overlay;
pub use server::{Counters, Export, ReadObserver, Server, ServerOptions, Trace};
pub use stream::Stream;
pub use tls::{ClientTls, Identity, ServerTls};
