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
    keys: Option<PathBuf>,
    /// What is remembered between runs; private to this user.
    pub state: Option<PathBuf>,
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
        let chosen = match (&global.repository, &environment.repository) {
            (Some(chosen), _) => Some(chosen.clone()),
            (None, Some(chosen)) => Some(chosen.to_str().map(str::to_owned).ok_or_else(|| {
                Error::new(Code::Usage, "MAINSTAY_REPOSITORY is not UTF-8")
                    .hint("give the repository a name that is, or reach it through a link that has one")
            })?),
            (None, None) => None,
        };
        let repository = match &chosen {
            Some(location) => absolute(location, &doors.directory),
            None => data.ok_or_else(|| nowhere("the repository"))?.join("repository").display().to_string(),
        };
        let keys = keys.map(|path| path.join("keys"));
        let state = state.map(|path| path.join("state"));
        Ok(Self { repository, chosen: chosen.is_some(), keys, state })
    }

    /// The directory of key files. Errors: [`Code::Usage`].
    pub(crate) fn keys(&self) -> Result<&Path> {
        self.keys.as_deref().ok_or_else(|| nowhere("key files"))
    }

    /// The key file of a repository. Errors: [`Code::Usage`].
    pub(crate) fn key_file(&self, family: &FamilyId) -> Result<PathBuf> {
        Ok(self.keys()?.join(format!("{family}.key")))
    }

    /// What a restore must never delete: the repository, the keys, what is remembered.
    pub(crate) fn own(&self) -> impl Iterator<Item = PathBuf> {
        [self.local_repository(), self.keys.clone(), self.state.clone()].into_iter().flatten()
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

fn nowhere(what: &str) -> Error {
    Error::new(Code::Usage, format!("there is no home directory to keep {what} in"))
        .hint("set HOME, or name the repository with --repository and its key with --key-file")
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
