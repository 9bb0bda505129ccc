//! The small guest: built once from Debian's packages, for all tests of this build directory.

use std::hash::{Hash as _, Hasher as _};
use std::path::{Path, PathBuf};

use mainstay_core::{Code, Error, Result};
use rustix::fs::FlockOperation;

use super::{SETUP, io, process};

/// What the guest is made by; a change makes it anew.
const RECIPE: [&str; 6] = [
    include_str!("../../guest/build.sh"),
    include_str!("../../guest/first-init"),
    include_str!("../../guest/init"),
    include_str!("../../guest/shutdown"),
    include_str!("../../guest/freeze-hook"),
    include_str!("../../guest/writer"),
];

/// Files to start a guest from; shared, so never written to.
#[derive(Clone, Debug)]
pub struct GuestImage {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
    /// qcow2, 256 MiB: partition 1 is ext4.
    pub disk: PathBuf,
}

impl GuestImage {
    /// Builds it unless it is there. Tests that ask at once wait for the one that builds.
    ///
    /// Errors: [`Code::Unsupported`] when the packages were never fetched.
    pub fn get() -> Result<Self> {
        let home = build_directory()?.join("guest");
        let packages = home.join("packages");
        let wanted = std::fs::read_to_string(packages.join("wanted")).map_err(|error| {
            let what = format!("there are no packages for a guest in {}", packages.display());
            Error::new(Code::Unsupported, what).because(error).hint(SETUP)
        })?;
        let mut hasher = std::hash::DefaultHasher::new();
        (RECIPE, wanted).hash(&mut hasher);
        let at = home.join(format!("{:016x}", hasher.finish()));
        std::fs::create_dir_all(&at).map_err(io("cannot make a directory for the guest"))?;
        let lock = std::fs::File::create(at.join("lock")).map_err(io("cannot make a lock file"))?;
        rustix::fs::flock(&lock, FlockOperation::LockExclusive)
            .map_err(|errno| Error::io("cannot lock the guest", errno.into()))?;
        let built = at.join("built");
        if !built.exists() {
            let script = concat!(env!("CARGO_MANIFEST_DIR"), "/guest/build.sh");
            process::run("sh", [Path::new(script), &packages, &at])?;
            std::fs::write(built, "").map_err(io("cannot write in the guest's directory"))?;
        }
        Ok(Self { kernel: at.join("vmlinuz"), initrd: at.join("initrd.img"), disk: at.join("disk.qcow2") })
    }

    /// A copy of the disk, to be written to.
    pub fn copy_disk(&self, to: &Path) -> Result<()> {
        std::fs::copy(&self.disk, to).map(drop).map_err(io("cannot copy the guest's disk"))
    }
}

/// Where cargo puts what it builds: this test lies somewhere below.
fn build_directory() -> Result<PathBuf> {
    let test = std::env::current_exe().map_err(io("cannot tell where this test lies"))?;
    // Cargo writes the first into a directory that it makes, and the second into any that it uses.
    let marks = ["CACHEDIR.TAG", ".rustc_info.json"];
    let is_it = |directory: &&Path| marks.iter().any(|mark| directory.join(mark).exists());
    let found = test.ancestors().find(is_it);
    found.map(Path::to_owned).ok_or_else(|| {
        Error::new(Code::Unsupported, format!("{} is in no build directory of cargo", test.display()))
    })
}
