//! VMDK and VHDX images, filled at random by QEMU, read as QEMU reads them.

use std::path::Path;

use mainstay_core::Code;
use mainstay_diskimage::container::{Directories, Format, open};
use mainstay_testkit::{Rng, for_each_seed};

use crate::tools::{check, run, scribble, shell};

const VMDK: &[&str] = &[
    "subformat=monolithicSparse",
    "subformat=monolithicSparse,zeroed_grain=on",
    "subformat=monolithicFlat",
    "subformat=twoGbMaxExtentSparse",
    "subformat=twoGbMaxExtentFlat",
];

#[test]
fn vmdk_of_every_writable_shape_reads_as_qemu_reads_it() {
    for_each_seed(VMDK.len() as u64, |seed| {
        let mut random = Rng::new(seed);
        let shape = VMDK[usize::try_from(seed).unwrap() % VMDK.len()];
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.vmdk");
        let size = random.range(9000..30_000) * 512;
        shell(&format!("qemu-img create -q -f vmdk -o {shape} {} {size}", image.display()));
        scribble(&image, "vmdk", size, false, &mut random);
        check(&image, Format::Vmdk, &mut random);
    });
}

#[test]
fn a_vmdk_in_several_files_is_read_across_them() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.vmdk");
    shell(&format!("qemu-img create -q -f vmdk -o subformat=twoGbMaxExtentSparse {} 4100M", image.display()));
    let write = ["-f", "vmdk", "-c", "write -P 7 2046M 4M", "-c", "write -P 9 4099M 1M"];
    run("qemu-io", write.iter().copied().chain([image.to_str().unwrap()]));
    let opened = open(&image, None, &Directories::of(&image).unwrap()).unwrap();
    assert_eq!(opened.files.len(), 4);
    assert_eq!(opened.blocks.size(), 4100 << 20);
    for (at, byte) in [(2046, 7), (2049, 7), (2050, 0), (2045, 0), (4099, 9), (4098, 0)] {
        let mut part = vec![1; 1 << 20];
        opened.blocks.read_at(at << 20, &mut part).unwrap();
        assert!(part.iter().all(|read| *read == byte), "{at} MiB");
    }
    let mut part = vec![0; 2 << 20];
    opened.blocks.read_at((2047 << 20) + 12_345, &mut part).unwrap();
    assert!(part.iter().all(|read| *read == 7));

    let part = folder.path().join("disk-s001.vmdk");
    let error = open(&part, None, &Directories::of(&part).unwrap()).err().unwrap();
    assert_eq!(error.code(), Code::Usage);
}

#[test]
fn a_stream_optimized_vmdk_reads_as_qemu_reads_it() {
    let mut random = Rng::new(2);
    let folder = tempfile::tempdir().unwrap();
    let (plain, image) = (folder.path().join("disk.qcow2"), folder.path().join("disk.vmdk"));
    let size = 11_000_000 / 512 * 512;
    shell(&format!("qemu-img create -q -f qcow2 {} {size}", plain.display()));
    scribble(&plain, "qcow2", size, false, &mut random);
    let convert = "qemu-img convert -O vmdk -o subformat=streamOptimized";
    shell(&format!("{convert} {} {}", plain.display(), image.display()));
    check(&image, Format::Vmdk, &mut random);
}

#[test]
fn a_vmdk_layer_shows_its_parent_unless_that_changed() {
    let mut random = Rng::new(3);
    let folder = tempfile::tempdir().unwrap();
    let (base, image) = (folder.path().join("base.vmdk"), folder.path().join("disk.vmdk"));
    let size = 9_000_448;
    shell(&format!("qemu-img create -q -f vmdk {} {size}", base.display()));
    scribble(&base, "vmdk", size, false, &mut random);
    shell(&format!("qemu-img create -q -f vmdk -F vmdk -b {} {}", base.display(), image.display()));
    scribble(&image, "vmdk", size, false, &mut random);
    let opened = check(&image, Format::Vmdk, &mut random);
    assert_eq!(opened.files.len(), 2);

    scribble(&base, "vmdk", size, false, &mut random);
    let error = open(&image, None, &Directories::of(&image).unwrap()).err().unwrap();
    assert!(error.chain().join(": ").contains("was changed after"), "{error:?}");
}

const VHDX: &[&str] =
    &["block_size=1M", "block_size=32M", "subformat=fixed", "block_size=1M,block_state_zero=off"];

#[test]
fn vhdx_of_every_shape_reads_as_qemu_reads_it() {
    for_each_seed(VHDX.len() as u64, |seed| {
        let mut random = Rng::new(seed);
        let shape = VHDX[usize::try_from(seed).unwrap() % VHDX.len()];
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.vhdx");
        // QEMU makes the size a whole number of megabytes.
        let size = random.range(9..30) << 20;
        shell(&format!("qemu-img create -q -f vhdx -o {shape} {} {size}", image.display()));
        write_only(&image, size, &mut random);
        check(&image, Format::Vhdx, &mut random);
    });
}

/// Among the entries about blocks stand others, one after every 4 GiB when blocks have 1 MiB.
#[test]
fn a_large_vhdx_is_read_to_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.vhdx");
    shell(&format!("qemu-img create -q -f vhdx -o block_size=1M {} 9G", image.display()));
    let writes = ["-c", "write -P 3 4095M 2M", "-c", "write -P 5 8191M 3M", "-c", "write -P 7 9215M 1M"];
    run("qemu-io", ["-f", "vhdx"].into_iter().chain(writes).chain([image.to_str().unwrap()]));
    let opened = open(&image, None, &Directories::of(&image).unwrap()).unwrap();
    for (at, byte) in [(4094, 0), (4095, 3), (4096, 3), (4097, 0), (8190, 0), (8192, 5), (8194, 0), (9215, 7)]
    {
        let mut part = vec![1; 1 << 20];
        opened.blocks.read_at(at << 20, &mut part).unwrap();
        assert!(part.iter().all(|read| *read == byte), "{at} MiB");
    }
}

/// Random writes; QEMU can neither discard nor write zeros in VHDX.
pub(crate) fn write_only(image: &Path, size: u64, random: &mut Rng) {
    let writes = (0..30).flat_map(|_| {
        let offset = random.range(0..size / 512) * 512;
        let length = (random.range(1..300) * 512).min(size - offset);
        ["-c".to_owned(), format!("write -P {} {offset} {length}", random.range(1..256))]
    });
    let arguments: Vec<String> = ["-f", "vhdx"].map(str::to_owned).into_iter().chain(writes).collect();
    run("qemu-io", arguments.into_iter().chain([image.display().to_string()]));
}
