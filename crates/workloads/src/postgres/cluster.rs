//! What there is to know of a cluster beside its files.

use mainstay_core::{Error, Result};
use serde::{Deserialize, Serialize};

/// The oldest version whose base backups are understood.
const VERSION_MIN: u32 = 150_000;

/// Stored beside the files of every point, as JSON.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    /// Such as `15.4 (Debian 15.4-1)`, and as a number: 150004.
    pub version: String,
    pub version_number: u32,
    /// Of the cluster: the same on all its standbys.
    pub system: String,
    /// Bytes of a segment of the write-ahead log, and of a page.
    pub segment_bytes: u64,
    pub page_bytes: u32,
    pub data_checksums: bool,
    /// The backup began and ended here.
    pub start: String,
    pub start_timeline: u32,
    pub end: String,
    pub end_timeline: u32,
    pub from_standby: bool,
    pub tablespaces: Vec<Tablespace>,
    /// Every setting that is not its default, and where the files lie that are outside the data directory.
    pub settings: Vec<(String, String)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    pub oid: u32,
    /// Where it lay.
    pub location: String,
}

impl Cluster {
    pub fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self)
            .map_err(|error| Error::bug("a cluster cannot be described").because(error))
    }

    /// Errors: [`mainstay_core::Code::Integrity`] for what describes no cluster.
    pub fn from_json(text: &[u8]) -> Result<Self> {
        let cluster: Self = serde_json::from_slice(text).map_err(|error| {
            Error::integrity("the description of the cluster is malformed").because(error)
        })?;
        let sizes = cluster.segment_bytes.is_power_of_two() && cluster.segment_bytes <= 1 << 30;
        if sizes && cluster.segment_bytes >= 1 << 20 {
            return Ok(cluster);
        }
        Err(Error::integrity("the description of the cluster names an impossible size of segments"))
    }

    /// Errors: [`mainstay_core::Code::Unsupported`] for a server that is too old.
    pub(super) fn check_version(version: &str, number: u32) -> Result<()> {
        if number >= VERSION_MIN {
            return Ok(());
        }
        let what = format!(
            "PostgreSQL {version} is too old: its base backups come as this version does not read them"
        );
        Err(Error::new(mainstay_core::Code::Unsupported, what)
            .hint("servers from version 15 on can be backed up"))
    }
}

#[cfg(test)]
mod tests {
    use mainstay_core::Code;

    use super::Cluster;

    #[test]
    fn a_server_that_is_too_old_is_told_which_are_not() {
        Cluster::check_version("15.4", 150_004).unwrap();
        let error = Cluster::check_version("14.11", 140_011).unwrap_err();
        assert_eq!(error.code(), Code::Unsupported);
        assert!(error.what().contains("14.11") && error.next_step().unwrap().contains("15"), "{error:?}");
    }
}
