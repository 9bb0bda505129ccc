//! The verbs: what Mainstay does with a repository and a workload. Nothing here prints.

pub mod address;
pub mod backup;
pub mod copy;
pub mod export;
pub mod find;
pub mod follow;
pub mod mariadb;
mod mirror;
pub mod mount;
pub mod postgres;
pub mod record;
pub mod restore;
pub mod retention;
pub mod sqlite;
pub mod status;
pub mod undo;
pub mod verify;
pub mod view;
pub mod vm;
pub mod workload;
mod written;

#[cfg(test)]
mod testing;
