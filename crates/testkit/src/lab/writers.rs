//! A guest that never stops writing, and what its disks must look like at any moment.

use std::path::Path;

use mainstay_core::{Error, Result};

use super::{FileSystem, Fsck, GuestPlan, Inside, check_rounds, io};

/// Where they write in the guest: the system disk, and the data disk after it.
const PLACES: [&str; 2] = ["/data", "/mnt"];

/// Rounds that make a difference.
const SOME: u64 = 5;

/// One writer on each of the first two disks of a guest.
#[derive(Clone, Debug)]
pub struct Writers {
    inside: Inside,
}

impl Writers {
    /// Waits until the guest has booted, and sets them to work; after every boot anew.
    pub fn start(inside: &Inside) -> Result<Self> {
        inside.wait()?;
        inside.run_well("grep -q ' /mnt ' /proc/mounts || mount /dev/vdb /mnt")?;
        for place in PLACES {
            inside.start_writer(place)?;
        }
        let writers = Self { inside: inside.clone() };
        writers.write_on()?;
        Ok(writers)
    }

    /// The last round that each has finished.
    pub fn rounds(&self) -> Result<[u64; 2]> {
        Ok([self.inside.rounds(PLACES[0])?, self.inside.rounds(PLACES[1])?])
    }

    /// Waits until each has written some more; a frozen guest does not.
    pub fn write_on(&self) -> Result<()> {
        PLACES.iter().try_for_each(|place| self.inside.wait_for_rounds(place, SOME).map(drop))
    }

    /// Stops them. From now on nothing changes the disks.
    pub fn rest(&self) -> Result<()> {
        self.inside.run_well("killall writer; sync; umount /mnt && mount -o remount,ro / && sync").map(drop)
    }

    /// Errors: [`mainstay_core::Code::Integrity`] unless the images are a moment of the guest between two others.
    pub fn check(images: [&Path; 2], expected: Fsck, before: [u64; 2], after: [u64; 2]) -> Result<()> {
        for (disk, (image, place)) in images.into_iter().zip([PLACES[0], "/"]).enumerate() {
            let system = FileSystem::of(image)?;
            system.fsck(expected)?;
            let out = tempfile::tempdir().map_err(io("cannot make a directory"))?;
            let round = check_rounds(&system.tree(place, out.path())?)?;
            let between = before[disk]..=after[disk];
            if !between.contains(&round) {
                return Err(Error::integrity(format!("disk {disk} is of round {round}, not of {between:?}")));
            }
        }
        Ok(())
    }

    /// Boots a machine from the images, where the writers go on from their last rounds. Changes the images.
    pub fn go_on(images: [&Path; 2]) -> Result<()> {
        let plan = images.into_iter().fold(GuestPlan::bare()?.boots_itself(), GuestPlan::disk);
        let mut guest = plan.start()?;
        guest.inside().wait()?;
        guest.inside().run_well("mount /dev/vdb /mnt")?;
        let before = [guest.inside().rounds(PLACES[0])?, guest.inside().rounds(PLACES[1])?];
        let writers = Self::start(guest.inside())?;
        let least = writers.rounds()?;
        guest.shut_down()?;
        if before.contains(&0) {
            return Err(Error::integrity(format!("the machine has lost everything: {before:?}")));
        }
        Self::check(images, Fsck::Clean, least, [u64::MAX; 2])
    }
}
