//! Virtual machines: their recovery points, and the files inside them.

mod along;
mod apply;
mod backup;
mod boot;
mod disks;
mod fstab;
mod in_place;
mod inside;
mod instant;
mod kernel;
mod lean;
mod mixed;
mod mounted;
mod private;
pub mod recover;
mod restore;
mod source;
mod timeline;
mod tree;
mod view;

pub use apply::{Applied, Newer, WrittenDisk};
pub use backup::{MachineBackup, MachinePoint, backup_machine, random_id, repository_mark, root_of};
pub use boot::Boot;
pub use disks::{ImageFormat, ImageTarget, RawTarget, write_disk};
pub use in_place::{
    InPlacePlan, PresentDisk, RestoredInPlace, UNDO_TAG, plan_in_place, restore_in_place, shut_down,
    takes_back,
};
pub use inside::{Inside, Keys};
pub use instant::{Cost, Instant, Proof, ProofRequest, is_whole, machine, prove};
pub use kernel::or_by_kernel;
pub use lean::Leave;
pub use mixed::MixedView;
pub use restore::{DiskPlaces, Goal, ImageFolder, MachinePlan, plan_machine, restore_machine};
pub use timeline::{
    Composed, check_machine, compose, longest_unproven, machine_of, machine_tag, newer_files, put_tag,
    timeline,
};
pub use tree::VolumeSeen;
pub use view::MachineView;

pub use mainstay_workloads::vm::KIND;
