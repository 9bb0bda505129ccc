//! A data directory whose configuration lay elsewhere is made one that a server starts on.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use mainstay_core::{Error, ItemPath, Result};
use mainstay_workloads::postgres::{CONFIGURATION, Cluster};

use super::restore::write;

/// A server refuses to recover with lower limits than the one that wrote the log had.
const LIMITS: [&str; 5] = [
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
];
const MAIN: &str = "postgresql.conf";
/// What is in the place of a file that is not stored: whoever is a user of this name on the machine gets in.
const ACCESS: &str = "local all all peer\n";

pub(super) fn path() -> Result<ItemPath> {
    ItemPath::new(CONFIGURATION).map_err(|error| Error::bug("a name of ours is no path").because(error))
}

/// Has a data directory without `postgresql.conf` use what lies `beside`; what was not stored is made up for.
pub(super) fn settle(cluster: &Cluster, beside: &Path, to: &Path) -> Result<()> {
    if to.join(MAIN).exists() {
        return Ok(());
    }
    let absolute = |path: &Path| {
        std::path::absolute(path).map_err(|error| Error::io(format!("cannot name {}", path.display()), error))
    };
    let (beside, data) = (absolute(beside)?, absolute(to)?);
    let setting = |wanted: &str| {
        cluster.settings.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str())
    };
    let stored = |name: &str| -> Option<PathBuf> {
        let path = beside.join(setting(name)?.trim_start_matches('/'));
        path.exists().then_some(path)
    };
    let mut text =
        "# Written by Mainstay: this cluster had its configuration outside its data directory.\n".to_owned();
    let mut line = |name: &str, value: &str| {
        // Writing to a text does not fail.
        let _written = writeln!(text, "{name} = '{}'", value.replace('\\', "\\\\").replace('\'', "''"));
    };
    match stored("config_file") {
        Some(file) => line("include", &file.display().to_string()),
        None => LIMITS.iter().for_each(|limit| {
            if let Some(value) = setting(limit) {
                line(limit, value);
            }
        }),
    }
    line("data_directory", &data.display().to_string());
    line("external_pid_file", "");
    for (name, file) in [("hba_file", "pg_hba.conf"), ("ident_file", "pg_ident.conf")] {
        let here = data.join(file);
        match stored(name) {
            _ if here.exists() => line(name, &here.display().to_string()),
            Some(stored) => line(name, &stored.display().to_string()),
            None => {
                write(&here, if name == "hba_file" { ACCESS } else { "" }.as_bytes(), to)?;
                line(name, &here.display().to_string());
            }
        }
    }
    write(&to.join(MAIN), text.as_bytes(), to)
}
