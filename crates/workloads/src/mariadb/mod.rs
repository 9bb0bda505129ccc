//! MariaDB: a server's files through its own `mariadb-backup`, read as a stream; its binary log over the replication
//! protocol; and both given back.
//!
//! `mariadb-backup` reads the files themselves, so Mainstay runs on the machine of the server. The log is read from
//! anywhere. <https://mariadb.com/kb/en/clientserver-protocol/>

mod address;
mod auth;
mod backup;
mod binlog;
mod follow;
mod programs;
mod server;
mod stream;
mod wire;

pub use address::Address;
pub use backup::{BackupRequest, DATA, DESCRIPTION, Description, FilesBackup, PARTS, part_offset};
pub use binlog::{Event, FILE_START, Gtid, LogFile, Place, log_bytes};
pub use follow::BinlogStream;
pub use programs::Login;
pub use server::{PrivateServer, give_to_server, prepare, replay};
pub use wire::{Connection, Rows};

/// What points of servers are called.
pub const KIND: &str = "mariadb";
