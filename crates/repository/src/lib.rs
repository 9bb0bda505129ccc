//! Placeholder.

pub mod cut;
pub mod seal;
pub mod sign;
pub mod store;
pub mod wrap;
