//! Where things are when nobody says: the default repository, key files, and what is remembered between runs.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use mainstay_core::{Code, Error, Result};
use mainstay_repository::FamilyId;

use crate::args::Global;
use crate::doors::Doors;

/// The places of one run.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// As `store::open` takes it.
    pub repository: String,
    /// The person chose it; otherwise it is the default one.
    pub chosen: bool,
    /// Holds one key file for each repository.
    pub keys: PathBuf,
    /// Private to this user.
    pub state: PathBuf,
}

impl Places {
    /// Errors: [`Code::Usage`] when the environment does not tell where to put things.
    pub(crate) fn find(global: &Global, doors: &Doors) -> Result<Self> {
        let environment = &doors.environment;
        let own = |chosen: &Option<PathBuf>, of_root: &str, usual: &str| {
            let home = environment.home.as_ref().map(|home| home.join(usual));
            base(chosen.as_deref(), doors.superuser.then_some(of_root), home)
        };
        let data = own(&environment.xdg_data, "/var/lib/mainstay", ".local/share");
        let keys = own(&environment.xdg_config, "/etc/mainstay", ".config");
        let state = own(&environment.xdg_state, "/var/lib/mainstay", ".local/state");
        let chosen = global.repository.clone().or_else(|| environment.repository.clone());
        let nowhere = |what: &str| {
            Error::new(Code::Usage, format!("there is no home directory to keep {what} in"))
                .hint("set HOME, or name the repository with --repository and its key with --key-file")
        };
        let repository = match &chosen {
            Some(location) => absolute(location, &doors.directory),
            None => data.ok_or_else(|| nowhere("the repository"))?.join("repository").display().to_string(),
        };
        let keys: PathBuf = keys.ok_or_else(|| nowhere("key files"))?;
        let state: PathBuf = state.ok_or_else(|| nowhere("what is remembered"))?;
        Ok(Self { repository, chosen: chosen.is_some(), keys: keys.join("keys"), state: state.join("state") })
    }

    /// The key file of a repository.
    pub(crate) fn key_file(&self, family: &FamilyId) -> PathBuf {
        self.keys.join(format!("{family}.key"))
    }

    /// Makes the directories above the default repository. One that was chosen is not helped: its parent may be a
    /// disk that is not mounted.
    pub(crate) fn make_ready(&self) -> Result<()> {
        let Some(parent) = Path::new(&self.repository).parent().filter(|_| !self.chosen) else {
            return Ok(());
        };
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent);
        made.map_err(|error| Error::io(format!("cannot make {}", parent.display()), error))
    }

    /// The directory that the repository is in, when it is one of this machine.
    pub(crate) fn local_repository(&self) -> Option<PathBuf> {
        mainstay_repository::store::local_directory(&self.repository)
    }
}

/// What the environment names counts for root too: only then can a run by root keep to a place of its own.
fn base(chosen: Option<&Path>, of_root: Option<&str>, usual: Option<PathBuf>) -> Option<PathBuf> {
    match (chosen, of_root) {
        (Some(chosen), _) => Some(chosen.join("mainstay")),
        (None, Some(of_root)) => Some(PathBuf::from(of_root)),
        (None, None) => usual.map(|path| path.join("mainstay")),
    }
}

fn absolute(location: &str, directory: &Path) -> String {
    if location.is_empty() || location.contains("://") {
        return location.to_owned();
    }
    directory.join(location).display().to_string()
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::{absolute, base};

    #[test]
    fn what_the_environment_names_comes_before_what_root_and_others_use() {
        let path = |path: &str| Some(PathBuf::from(path));
        assert_eq!(base(Some(Path::new("/x")), Some("/etc/mainstay"), path("/h")), path("/x/mainstay"));
        assert_eq!(base(None, Some("/etc/mainstay"), path("/h")), path("/etc/mainstay"));
        assert_eq!(base(None, None, path("/h")), path("/h/mainstay"));
        assert_eq!(base(None, None, None), None);
    }

    #[test]
    fn directories_become_absolute_and_other_locations_stay() {
        let here = Path::new("/here");
        assert_eq!(absolute("repo", here), "/here/repo");
        assert_eq!(absolute("/repo", here), "/repo");
        assert_eq!(absolute("s3://bucket/x", here), "s3://bucket/x");
    }
}
