//! Partition tables, LVM and LUKS that somebody damaged, with their checksums mended so that they are looked at.

use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::digest;
use mainstay_diskimage::volume::{Encryption, Layout, Secret, volumes};
use mainstay_testkit::{Rng, for_each_seed};

use crate::hostile::{Mutant, explore};
use crate::lvm::Loops;
use crate::tools::{feed, shell};

fn disk(folder: &Path, mebibytes: u64) -> std::path::PathBuf {
    let disk = folder.join("disk");
    std::fs::File::create(&disk).unwrap().set_len(mebibytes << 20).unwrap();
    disk
}

/// Reads what is left of the volumes. Every place must be on the disk.
fn look(mutant: Mutant, passphrase: Option<&str>, random: &mut Rng) -> Option<Layout> {
    let size = mutant.size as u64;
    let key = |_: &_| passphrase.map(|key| Secret::Passphrase(key.as_bytes().to_vec().into()));
    let layout = volumes(&[Arc::new(mutant)], &key).ok()?;
    for volume in &layout.volumes {
        explore(&*volume.blocks, random).unwrap_or_default();
        let end = volume.blocks.size().min(64 << 20);
        assert!(volume.on_disk(0..end).iter().all(|(disk, range)| *disk == 0 && range.end <= size));
    }
    Some(layout)
}

#[test]
fn partition_table_mutants() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(folder.path(), 6);
    shell(&format!("sgdisk -n 1:0:+1M -n 2:0:+1M {}", disk.display()));
    let gpt: Arc<[u8]> = std::fs::read(&disk).unwrap().into();
    shell(&format!("sgdisk -Z {}", disk.display()));
    feed("sfdisk", ["-q", disk.to_str().unwrap()], b"label: dos\n,1M\n,3M,E\n,1M\n,500K\n,500K\n");
    let mbr: Arc<[u8]> = std::fs::read(&disk).unwrap().into();
    for_each_seed(4000, |seed| {
        let mut random = Rng::new(seed);
        let (base, tempting) = match seed % 2 {
            0 => (&gpt, [440..512, 512..604, 1024..1300]),
            _ => (&mbr, [440..512, (2 << 20) + 440..(2 << 20) + 512, (3 << 20) + 440..(3 << 20) + 512]),
        };
        let mut mutant = Mutant::of(base, &tempting, &mut random);
        let table = crc32(&mutant.bytes(1024..1024 + 128 * 128));
        mutant.put(512 + 88, table.to_le_bytes().to_vec());
        mutant.put(512 + 16, vec![0; 4]);
        let header = crc32(&mutant.bytes(512..604));
        mutant.put(512 + 16, header.to_le_bytes().to_vec());
        if seed % 2 == 1 {
            mutant.patches.truncate(mutant.patches.len() - 3);
        }
        for volume in volumes(&[Arc::new(mutant)], &|_| None).map(|layout| layout.volumes).unwrap_or_default()
        {
            explore(&*volume.blocks, &mut random).unwrap();
            assert!(
                volume.on_disk(0..u64::MAX).iter().all(|(disk, range)| *disk == 0 && range.end <= 6 << 20)
            );
        }
    });
}

fn crc32(bytes: &[u8]) -> u32 {
    !register(!0, bytes)
}

fn register(start: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(start, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (0xEDB8_8320 & 0u32.wrapping_sub(sum & 1)))
    })
}

#[test]
fn lvm_mutants() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk(folder.path(), 12);
    let loops = Loops::of(std::slice::from_ref(&disk));
    loops.lvm(&format!("vgcreate --quiet -s 64k vg {}", loops.0[0]));
    loops.lvm("lvcreate --quiet -an -Zn -Wn -n root -l 3 vg");
    loops.lvm("lvcreate --quiet -an -Zn -Wn -n home -l 30 vg");
    loops.lvm("lvextend --quiet -l +3 vg/root");
    drop(loops);
    let base: Arc<[u8]> = std::fs::read(&disk).unwrap().into();
    let number =
        |at: usize| usize::try_from(u64::from_le_bytes(base[at..at + 8].try_into().unwrap())).unwrap();
    let text = 4096 + number(4096 + 40)..4096 + number(4096 + 40) + number(4096 + 48);
    let (mut found, mut lost) = (0, 0);
    for_each_seed(3000, |seed| {
        let mut random = Rng::new(seed);
        let tempting = [512..640, 4096..4096 + 64, text.clone(), text.clone(), text.clone()];
        let mut mutant = Mutant::of(&base, &tempting, &mut random);
        for (sum, summed) in [(4096 + 56, text.clone()), (4096, 4100..4608), (512 + 16, 532..1024)] {
            let sum_of = register(0xF597_A6CF, &mutant.bytes(summed));
            mutant.put(sum, sum_of.to_le_bytes().to_vec());
        }
        let volumes = look(mutant, None, &mut random).map_or(0, |layout| layout.volumes.len());
        found += u32::from(volumes == 2);
        lost += u32::from(volumes < 2);
    });
    println!("of 3000 groups {found} are whole and {lost} lost something");
    assert!(found > 300 && lost > 300);
}

fn encrypted(folder: &Path, options: &str) -> Arc<[u8]> {
    let disk = disk(folder, 20);
    let key = folder.join("key");
    std::fs::write(&key, "hush").unwrap();
    shell(&format!("cryptsetup -q luksFormat --key-file {} {options} {}", key.display(), disk.display()));
    std::fs::read(disk).unwrap().into()
}

#[test]
fn luks_1_mutants() {
    let folder = tempfile::tempdir().unwrap();
    let base = encrypted(folder.path(), "--type luks1 --pbkdf-force-iterations 1000");
    let (mut unlocked, mut locked) = (0, 0);
    for_each_seed(1000, |seed| {
        let mut random = Rng::new(seed);
        let mut mutant = Mutant::of(&base, &[6..112, 164..260, 208..256, 304..352], &mut random);
        // Rounds that are believed would take their time, honestly.
        for at in [164, 212] {
            mutant.put(at, 1000u32.to_be_bytes().to_vec());
        }
        for at in (260..592).step_by(48) {
            mutant.put(at, 2u32.to_be_bytes().to_vec());
        }
        let layout = look(mutant, Some("hush"), &mut random);
        let opened = layout.is_some_and(|layout| layout.volumes[0].encryption == Encryption::Unlocked);
        unlocked += u32::from(opened);
        locked += u32::from(!opened);
    });
    assert!(unlocked > 50 && locked > 50, "{unlocked} unlocked, {locked} locked");
}

#[test]
fn luks_2_mutants() {
    let folder = tempfile::tempdir().unwrap();
    let options =
        "--type luks2 --pbkdf argon2id --pbkdf-memory 32 --pbkdf-force-iterations 4 --pbkdf-parallel 1";
    let base = encrypted(folder.path(), options);
    let text = base[4096..].iter().position(|byte| *byte == 0).unwrap();
    let contains =
        |bytes: &[u8], words: &str| bytes.windows(words.len()).any(|window| window == words.as_bytes());
    let (mut unlocked, mut locked) = (0, 0);
    for_each_seed(1000, |seed| {
        let mut random = Rng::new(seed);
        let tempting = [6..512, 4096..4096 + text, 4096..4096 + text, 4096..4096 + text];
        let mut mutant = Mutant::of(&base, &tempting, &mut random);
        // The second copy would hide what happens to the first.
        mutant.put(0x4000, vec![0; 8]);
        mutant.put(448, vec![0; 64]);
        let header = mutant.bytes(0..0x4000);
        mutant.put(448, digest::digest(&digest::SHA256, &header).as_ref().to_vec());
        let cheap = contains(&header, "\"time\":4,\"memory\":32,\"cpus\":1")
            && contains(&header, "\"iterations\":1000,");
        let layout = look(mutant, cheap.then_some("hush"), &mut random);
        let opened = layout.is_some_and(|layout| layout.volumes[0].encryption == Encryption::Unlocked);
        unlocked += u32::from(opened);
        locked += u32::from(!opened);
    });
    assert!(unlocked > 50 && locked > 50, "{unlocked} unlocked, {locked} locked");
}
