//! Placeholder.

pub mod cut;
pub mod keys;
pub mod seal;
pub mod sign;
pub mod store;
pub mod wrap;
