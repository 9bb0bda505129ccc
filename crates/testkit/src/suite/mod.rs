//! Conformance suites: what every implementation of a trait of `mainstay-core` must do. A suite is a module of
//! plain checks and a macro that makes one test of each.

pub mod blob_store;
pub mod source;
pub mod target;
