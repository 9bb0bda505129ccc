//! One logical record, with everything that belongs to it, back into a live database.
//!
//! [`plan()`] compares the database as it was with the database as it is and works out what coming back takes; [`apply()`]
//! carries that out in one transaction. Neither knows an engine: that is behind [`Database`].

mod apply;
mod both;
mod database;
mod definition;
mod erased;
mod gather;
mod history;
mod model;
mod needs;
mod order;
mod plan;
pub mod postgres;
mod receipt;
mod tree;

pub use apply::{Applied, apply};
pub use both::Both;
pub use database::{Advanced, Clash, Condition, Database, Insert, Update};
pub use definition::{Definition, Then, Triggers, suggest};
pub use erased::Erased;
pub use history::{Bring, Happened, History, HistoryAsk, What, history};
pub use model::{Catalog, Row, Table, TableName};
pub use plan::{Ask, Fate, Member, Origin, Plan, Relink, plan};
pub use receipt::{RECORDS, Receipt, store};
