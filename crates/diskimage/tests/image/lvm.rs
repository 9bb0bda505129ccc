//! Volume groups made by LVM itself, on loop devices and without activating anything.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mainstay_core::{Blocks, ExtentKind};
use mainstay_diskimage::FileBlocks;
use mainstay_diskimage::volume::{Encryption, Layout, Secret, Volume, VolumeKind, volumes};
use mainstay_testkit::Rng;

use crate::tools::{assert_reads, run, shell};

const MIB: u64 = 1 << 20;

/// Files as block devices, as long as it lives.
pub(crate) struct Loops(pub(crate) Vec<String>);

impl Loops {
    pub(crate) fn of(disks: &[PathBuf]) -> Self {
        Self(
            disks
                .iter()
                .map(|disk| shell(&format!("losetup --find --show {}", disk.display())).trim().into())
                .collect(),
        )
    }

    /// Runs a program of LVM that sees these devices only and leaves the kernel alone.
    pub(crate) fn lvm(&self, line: &str) -> String {
        let mut words = line.split_whitespace();
        let program = words.next().unwrap();
        let devices = self.0.join(",");
        let quiet =
            ["--devices", &devices, "--config", "global/activation=0 backup/backup=0 backup/archive=0"];
        run(program, quiet.into_iter().chain(words))
    }
}

impl Drop for Loops {
    fn drop(&mut self) {
        for device in &self.0 {
            run("losetup", ["--detach", device]);
        }
    }
}

fn disks(folder: &Path, count: usize) -> Vec<PathBuf> {
    let disks = (0..count).map(|number| folder.join(format!("disk-{number}")));
    disks.inspect(|disk| std::fs::File::create(disk).unwrap().set_len(48 * MIB).unwrap()).collect()
}

fn open(disks: &[PathBuf]) -> Layout {
    let disks: Vec<Arc<dyn Blocks>> =
        disks.iter().map(|disk| Arc::new(FileBlocks::open(disk).unwrap()) as Arc<dyn Blocks>).collect();
    volumes(&disks, &|_| None).unwrap()
}

fn named<'a>(layout: &'a Layout, name: &str) -> &'a Volume {
    let known: Vec<_> = layout.volumes.iter().map(|volume| &volume.name).collect();
    layout.volumes.iter().find(|volume| volume.name == name).unwrap_or_else(|| panic!("{name} in {known:?}"))
}

/// Writes random bytes where `place` says that they lie, and reads them through the volume.
fn fill_and_check(volume: &Volume, disks: &[PathBuf], place: impl Fn(u64) -> (usize, u64), random: &mut Rng) {
    use std::os::unix::fs::FileExt as _;
    let files: Vec<_> =
        disks.iter().map(|disk| std::fs::File::options().write(true).open(disk).unwrap()).collect();
    let expected = random.bytes(usize::try_from(volume.blocks.size()).unwrap());
    for (at, piece) in (0..).step_by(4096).zip(expected.chunks(4096)) {
        let (disk, offset) = place(at);
        files[disk].write_all_at(piece, offset).unwrap();
    }
    assert_reads(&*volume.blocks, &expected, random);
    for _ in 0..100 {
        let start = random.range(0..volume.blocks.size() / 4096) * 4096;
        let end = (start + 4096 * random.range(1..100)).min(volume.blocks.size());
        let places = volume.on_disk(start..end);
        let mut at = start;
        for (disk, range) in places {
            for offset in range.step_by(4096) {
                assert_eq!((disk, offset), place(at));
                at += 4096;
            }
        }
        assert_eq!(at, end);
    }
}

/// Where LVM says that a linear volume's segments lie, in extents: the first of the volume, how many, the disk, the
/// first there.
fn segments(loops: &Loops, volume: &str) -> Vec<(u64, u64, usize, u64)> {
    let columns = "pv_name,pvseg_start,pvseg_size,seg_start_pe,lv_full_name";
    let told = loops.lvm(&format!("pvs --noheadings --separator : --segments -o {columns}"));
    let lines = told.lines().map(|line| line.trim().split(':').collect::<Vec<_>>());
    let lines = lines.filter(|words| words.last() == Some(&volume));
    let number = |word: &str| word.parse::<u64>().unwrap();
    let disk = |name: &str| loops.0.iter().position(|device| device == name).unwrap();
    lines.map(|words| (number(words[3]), number(words[2]), disk(words[0]), number(words[1]))).collect()
}

#[test]
fn linear_and_striped_volumes_over_several_disks() {
    let mut random = Rng::new(1);
    let folder = tempfile::tempdir().unwrap();
    let disks = disks(folder.path(), 3);
    let loops = Loops::of(&disks);
    let devices = loops.0.join(" ");
    loops.lvm(&format!("vgcreate --quiet -s 1M data-1 {devices}"));
    let create = "lvcreate --quiet -an -Zn -Wn";
    loops.lvm(&format!("{create} -n root -l 7 data-1 {}", loops.0[0]));
    loops.lvm(&format!("{create} -n fast -i 3 -I 64k -l 9 data-1"));
    loops.lvm(&format!("{create} -n gap -l 2 data-1 {}", loops.0[0]));
    loops.lvm("lvextend --quiet -l +40 data-1/root");
    loops.lvm("lvremove --quiet -y data-1/gap");
    let known = segments(&loops, "data-1/root");
    assert!(known.len() > 2, "the volume should lie in pieces: {known:?}");
    let fast = loops.lvm("lvs --noheadings -o seg_pe_ranges data-1/fast");
    drop(loops);

    let layout = open(&disks);
    let names: Vec<_> = layout.volumes.iter().map(|volume| volume.name.as_str()).collect();
    assert_eq!((names.as_slice(), &layout.notes), (["data-1/fast", "data-1/root"].as_slice(), &vec![]));
    assert_eq!(layout.volumes[0].kind, VolumeKind::Logical);
    let linear = |at: u64| {
        let extent = at / MIB;
        let (first, _, disk, there) =
            known.iter().find(|(first, count, ..)| (*first..first + count).contains(&extent)).unwrap();
        (*disk, MIB + (extent - first + there) * MIB + at % MIB)
    };
    fill_and_check(named(&layout, "data-1/root"), &disks, linear, &mut random);

    // "/dev/loop0:7-9 /dev/loop1:0-2 …": where each leg begins.
    let legs: Vec<u64> = fast
        .split_whitespace()
        .map(|leg| leg.rsplit(':').next().unwrap().split('-').next().unwrap().parse().unwrap())
        .collect();
    let striped = |at: u64| {
        let (stripe, inside) = (at / (64 << 10), at % (64 << 10));
        let leg = usize::try_from(stripe % 3).unwrap();
        (leg, MIB + legs[leg] * MIB + stripe / 3 * (64 << 10) + inside)
    };
    let fast = named(&layout, "data-1/fast");
    fill_and_check(fast, &disks, striped, &mut random);
    let mut occupied = fast.occupied();
    occupied.sort_by_key(|(disk, _)| *disk);
    let leg = |disk: usize| (disk, MIB + legs[disk] * MIB..MIB + legs[disk] * MIB + 3 * MIB);
    assert_eq!(occupied, [leg(0), leg(1), leg(2)]);

    // Without one of its disks a group shows what does not lie there.
    let partial = open(&disks[..2]);
    assert!(partial.volumes.iter().all(|volume| volume.name != "data-1/fast"));
    assert!(partial.notes[0].contains("data-1/fast") && partial.notes[0].contains("none of these disks"));
}

#[test]
fn a_group_on_partitions_survives_many_changes_of_its_metadata() {
    let folder = tempfile::tempdir().unwrap();
    let disks = disks(folder.path(), 1);
    shell(&format!("sgdisk -n 1:0:+4M -n 2:0:0 -t 2:8e00 {}", disks[0].display()));
    // The partition as a device: the kernel's partition scan is not needed.
    let device = shell(&format!("losetup --find --show --offset {} {}", 5 * MIB, disks[0].display()));
    let loops = Loops(vec![device.trim().to_owned()]);
    loops.lvm(&format!("vgcreate --quiet -s 1M vg {}", loops.0[0]));
    loops.lvm("lvcreate --quiet -an -Zn -Wn -n home -l 3 vg");
    // The ring has nearly 1 MiB, so the metadata is made long enough to go round it more than once.
    let tags: String = (0..60).map(|number| format!(" --addtag {number}{}", "x".repeat(1000))).collect();
    loops.lvm(&format!("lvchange --quiet{tags} vg/home"));
    for round in 0..40 {
        loops.lvm(&format!("lvchange --quiet --addtag round{round} vg/home"));
        assert_eq!((open(&disks).volumes.len(), open(&disks).notes.len()), (2, 0), "round {round}");
    }
    drop(loops);
    let layout = open(&disks);
    let names: Vec<_> = layout.volumes.iter().map(|volume| volume.name.as_str()).collect();
    assert_eq!((names.as_slice(), &layout.notes), (["vda1", "vg/home"].as_slice(), &vec![]));
    assert_eq!(layout.volumes[1].blocks.extents(0..MIB).unwrap()[0].kind, ExtentKind::Hole);
    let places = layout.volumes[1].on_disk(0..4096);
    assert_eq!(places, [(0, 6 * MIB..6 * MIB + 4096)]);
}

#[test]
fn other_kinds_of_logical_volumes_are_told_about() {
    let folder = tempfile::tempdir().unwrap();
    let disks = disks(folder.path(), 1);
    let loops = Loops::of(&disks);
    loops.lvm(&format!("vgcreate --quiet -s 1M vg {}", loops.0[0]));
    loops.lvm("lvcreate --quiet -an -Zn -Wn -n plain -l 3 vg");
    loops.lvm("lvcreate --quiet -an -Zn -Wn --type error -n broken -l 4 vg");
    drop(loops);
    let layout = open(&disks);
    let names: Vec<_> = layout.volumes.iter().map(|volume| volume.name.as_str()).collect();
    assert_eq!(names, ["vg/plain"]);
    assert!(
        layout.notes.iter().any(|note| note.contains("vg/broken") && note.contains("error")),
        "{:?}",
        layout.notes
    );
}

#[test]
fn a_disk_that_missed_changes_does_not_undo_them() {
    let folder = tempfile::tempdir().unwrap();
    let disks = disks(folder.path(), 2);
    let loops = Loops::of(&disks);
    loops.lvm(&format!("vgcreate --quiet -s 1M vg {}", loops.0.join(" ")));
    loops.lvm("lvcreate --quiet -an -Zn -Wn -n home -l 3 vg");
    let old: Vec<_> = disks.iter().map(|disk| std::fs::read(disk).unwrap()).collect();
    loops.lvm("lvextend --quiet -l 8 vg/home");
    drop(loops);
    let new: Vec<_> = disks.iter().map(|disk| std::fs::read(disk).unwrap()).collect();
    for (stale, fresh) in [(0, 1), (1, 0)] {
        std::fs::write(&disks[stale], &old[stale]).unwrap();
        std::fs::write(&disks[fresh], &new[fresh]).unwrap();
        assert_eq!(named(&open(&disks), "vg/home").blocks.size(), 8 * MIB);
    }
    // A copy of a disk beside the disk itself is noticed.
    let twice = open(&[disks[0].clone(), disks[1].clone(), disks[0].clone()]);
    assert!(twice.notes[0].contains("vdc is a copy of the physical volume vda"), "{:?}", twice.notes);
}

/// As installers set up a machine: one encrypted partition, and a volume group in it.
#[test]
fn a_group_inside_an_encrypted_partition() {
    let mut random = Rng::new(1);
    let folder = tempfile::tempdir().unwrap();
    let disks = disks(folder.path(), 1);
    let loops = Loops::of(&disks);
    loops.lvm(&format!("vgcreate --quiet -s 1M vg {}", loops.0[0]));
    loops.lvm("lvcreate --quiet -an -Zn -Wn -n root -l 5 vg");
    drop(loops);
    let mut group = std::fs::read(&disks[0]).unwrap();
    let content = random.bytes(5 << 20);
    group[1 << 20..6 << 20].copy_from_slice(&content);
    let options = "--pbkdf argon2id --pbkdf-memory 32 --pbkdf-force-iterations 4 --pbkdf-parallel 1";
    let encrypted = std::fs::read(crate::luks::encrypted(folder.path(), options, &group)).unwrap();

    let disk = folder.path().join("whole");
    std::fs::File::create(&disk).unwrap().set_len(100 * MIB).unwrap();
    shell(&format!("sgdisk -n 1:0:+2M -n 2:0:0 -t 2:8309 {}", disk.display()));
    let mut bytes = std::fs::read(&disk).unwrap();
    bytes[3 << 20..(3 << 20) + encrypted.len()].copy_from_slice(&encrypted);
    std::fs::write(&disk, bytes).unwrap();
    let blocks: Arc<dyn Blocks> = Arc::new(FileBlocks::open(&disk).unwrap());
    let names = |layout: &Layout| layout.volumes.iter().map(|volume| volume.name.clone()).collect::<Vec<_>>();
    let locked = volumes(std::slice::from_ref(&blocks), &|_| None).unwrap();
    assert_eq!(
        (names(&locked).as_slice(), locked.volumes[1].encryption),
        (["vda1", "vda2"].map(str::to_owned).as_slice(), Encryption::Locked)
    );
    let layout = volumes(&[blocks], &|_| Some(Secret::Passphrase(b"hush".to_vec().into()))).unwrap();
    assert_eq!(names(&layout), ["vda1", "vg/root"]);
    assert_reads(&*layout.volumes[1].blocks, &content, &mut random);
    // The partition, the header of the encryption, and that of LVM.
    assert_eq!(layout.volumes[1].on_disk(0..4096), [(0, 20 * MIB..20 * MIB + 4096)]);
    assert!(
        layout.volumes[1].encryption == Encryption::Unlocked,
        "what lies on the disk there is not its content"
    );
}
