//! PostgreSQL: a cluster read over its own replication protocol, its write-ahead log followed, and both given back.
//!
//! Only the protocol is spoken, so Mainstay runs beside the server or far from it; of its programs none is needed to back
//! up. Servers from version 15 on: before it, base backups came as several streams.

mod address;
mod base;
mod checksum;
mod cluster;
mod configuration;
mod lsn;
mod offline;
mod pages;
mod programs;
mod segment;
mod server;
mod sql;
mod tar;
mod timeline;
mod tls;
mod wal;
pub mod walread;
mod watch;
mod wire;

pub use address::{Address, Place};
pub use base::{BaseBackup, BaseRequest, CLUSTER, DATA, MANIFEST, TABLESPACES};
pub use cluster::{Cluster, Tablespace};
pub use configuration::CONFIGURATION;
pub use lsn::Lsn;
pub use offline::{OfflineFiles, describe_offline, is_standby, read_log};
pub use programs::{Programs, server_user};
pub use segment::{SegmentHead, SegmentName};
pub use server::Server;
pub use sql::{Sql, SqlRow, text_array};
pub use timeline::History;
pub use tls::{Tls, TlsMode};
pub use wal::{Identity, Slot, Switch, WalRequest, WalStream};
pub use wire::{Connection, Refusal, Rows};

/// What points of clusters are called.
pub const KIND: &str = "postgres";
