//! The laboratory for machines: small real guests under an emulator, a storage daemon that plays a guest in
//! milliseconds, and a libvirt of the test's own. Everything a value here starts ends with it.
//!
//! Needs what `cargo xtask setup` brings; without it every error names that command.

mod disk;
mod far;
mod guest;
mod image;
mod inside;
mod libvirt;
mod mariadb;
mod monitor;
mod nbd;
mod postgres;
mod process;
mod sqlite;
mod storage;
mod writer;
mod writers;

pub use disk::{FileSystem, Fsck, blank, compare, formatted, rebase_unseen, to_raw};
pub use far::{Cable, FarQemu, Side, certificates};
pub use guest::{Bus, Guest, GuestPlan};
pub use image::GuestImage;
pub use inside::{Inside, Ran};
pub use libvirt::{Domain, DomainPlan, Libvirt};
pub use mariadb::MariaDb;
pub use monitor::Monitor;
pub use nbd::NbdGuest;
pub use postgres::{Postgres, PostgresPlan};
pub use sqlite::SqliteShell;
pub use storage::StorageDaemon;
pub use writer::check_rounds;
pub use writers::Writers;

use std::time::Duration;

use mainstay_core::{Clock as _, Code, Error, Result};

use crate::RealClock;

/// What every error says that may come from a machine nobody has prepared.
const SETUP: &str = "`cargo xtask setup` brings what guests need";

/// Long enough for a guest that boots while two busy processors emulate three others; a guard, not a measurement.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// Asks again and again until there is an answer, for so long and at least once.
///
/// Errors: what `ask` fails with, [`Code::Io`] when the time is up.
pub fn patiently<T>(what: &str, limit: Duration, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let end = RealClock.monotonic() + limit;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if RealClock.monotonic() > end {
            return Err(Error::new(Code::Io, format!("{what}: nothing within {} seconds", limit.as_secs())));
        }
        RealClock.sleep(Duration::from_millis(20));
    }
}

/// An error of the operating system, in one line.
fn io(what: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> Error {
    move |error| Error::io(what.to_string(), error)
}

fn directory(kind: &str) -> Result<tempfile::TempDir> {
    // Short, because the paths of Unix sockets are: 107 bytes.
    tempfile::Builder::new().prefix(&format!("ms-{kind}-")).tempdir().map_err(io("cannot make a directory"))
}
