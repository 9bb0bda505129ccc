//! qcow2 images of many shapes, filled at random by QEMU, read as QEMU reads them.

use std::path::Path;

use mainstay_diskimage::container::{Directories, Format, OpenedImage, open};
use mainstay_testkit::{Rng, for_each_seed};

use crate::tools::{assert_extents, assert_reads, raw, run, shell};

const SHAPES: &[&str] = &[
    "compat=0.10",
    "compat=0.10,cluster_size=512",
    "compat=1.1",
    "compat=1.1,lazy_refcounts=on,cluster_size=4k",
    "cluster_size=2M",
    "compression_type=zstd",
    "compression_type=zstd,cluster_size=2M",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on,cluster_size=128k,compression_type=zstd",
    "preallocation=metadata",
    "preallocation=metadata,extended_l2=on",
    "refcount_bits=1",
];

/// Random writes, zeros and discards, as one run of qemu-io makes them. In a `fresh` image some clusters are written
/// compressed before; 2 MiB is a multiple of every cluster.
fn scribble(image: &Path, size: u64, fresh: bool, random: &mut Rng) {
    let mut commands = Vec::new();
    if fresh {
        let mut places: Vec<u64> = (0..size >> 21).collect();
        random.shuffle(&mut places);
        for place in places.iter().take(3) {
            commands.push(format!("write -c -P {} {}M 2M", random.range(1..256), place * 2));
        }
    }
    for _ in 0..40 {
        let offset = random.range(0..size / 512) * 512;
        let length = (random.range(1..300) * 512).min(size - offset);
        commands.push(match random.range(0..10) {
            0 => format!("write -z {offset} {length}"),
            1 => format!("write -z -u {offset} {length}"),
            2 => format!("discard {offset} {length}"),
            _ => format!("write -P {} {offset} {length}", random.range(1..256)),
        });
    }
    let commands = commands.into_iter().flat_map(|command| ["-c".to_owned(), command]);
    let arguments = ["-f", "qcow2"].map(str::to_owned).into_iter().chain(commands);
    run("qemu-io", arguments.chain([image.display().to_string()]));
}

fn opened(image: &Path) -> OpenedImage {
    open(image, None, &Directories::of(image).unwrap()).unwrap()
}

fn check(image: &Path, random: &mut Rng) -> OpenedImage {
    let opened = opened(image);
    assert_eq!(opened.format, Format::Qcow2);
    let expected = raw(image, "qcow2");
    assert_reads(&*opened.blocks, &expected, random);
    assert_extents(&*opened.blocks, image, "qcow2", &expected);
    opened
}

#[test]
fn images_of_every_shape_read_as_qemu_reads_them() {
    for_each_seed(SHAPES.len() as u64, |seed| {
        let mut random = Rng::new(seed);
        let shape = SHAPES[usize::try_from(seed).unwrap() % SHAPES.len()];
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.qcow2");
        let size = random.range(9000..30_000) * 512;
        shell(&format!("qemu-img create -q -f qcow2 -o {shape} {} {size}", image.display()));
        // Clusters that are there already, and those that may have one owner only, are not packed by QEMU.
        let plain = shape.contains("prealloc") || shape.contains("refcount");
        scribble(&image, size, !plain, &mut random);
        if !shape.contains("refcount") {
            shell(&format!("qemu-img snapshot -c before {}", image.display()));
        }
        scribble(&image, size, false, &mut random);
        check(&image, &mut random);
    });
}
