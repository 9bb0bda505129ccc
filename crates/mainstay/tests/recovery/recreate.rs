//! `vm restore --as`.
