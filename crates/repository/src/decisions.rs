//! What people have decided about the things around a repository, such as machines that need no protection. Signed by
//! somebody who may expire points, since saying that a thing needs none does as much; sealed like other words of the log.

use mainstay_core::{Id16, Result, Time, WriterId};

use crate::keys::Powers;
use crate::log::random_id;
use crate::log::record::Change;
use crate::repository::Repository;

/// A decision that stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    pub id: Id16,
    /// In the words of whoever keeps such decisions.
    pub text: String,
    pub writer: WriterId,
    pub decided: Time,
}

impl Repository {
    /// Decides something, in place of the decision `instead` if there is one. Empty words take that back.
    ///
    /// Errors: [`mainstay_core::Code::NoPower`] for who may not expire points.
    pub fn decide(&self, instead: Option<Id16>, text: &str) -> Result<()> {
        let id = instead.map_or_else(random_id, Ok)?;
        let words = self.shared.seal_text(text)?;
        self.append(Powers::EXPIRE, &mut |_| Ok(Change::Decision { id, words: words.clone() }))
    }

    /// The decisions that stand and that this holder can read, in no order.
    pub fn decisions(&self) -> Vec<Decision> {
        let state = self.shared.state();
        let open = state.decisions().filter_map(|(id, decided, writer, words)| {
            // Words of another domain are for others.
            let text = words.open(&self.shared.ring).ok().filter(|text| !text.is_empty())?;
            Some(Decision { id: *id, text, writer: *writer, decided: *decided })
        });
        open.collect()
    }
}
