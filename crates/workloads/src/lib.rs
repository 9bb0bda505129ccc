//! The workloads: each protected kind of thing is one folder here and one line in [`WORKLOADS`]. None of them
//! knows what a repository is; they meet the rest through the traits of `mainstay-core`.

pub mod armed;
pub mod export;
pub mod files;
mod flow;
pub mod mariadb;
pub mod postgres;
pub mod process;
pub mod promise;
pub mod sandbox;
pub mod sqlite;
pub mod vm;

/// The kinds of workload that this build knows, by the name that recovery points carry.
pub const WORKLOADS: &[&str] =
    &[export::KIND, files::KIND, mariadb::KIND, postgres::KIND, sqlite::KIND, vm::KIND];
