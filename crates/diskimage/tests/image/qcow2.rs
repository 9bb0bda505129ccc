//! qcow2 images of many shapes, filled at random by QEMU, read as QEMU reads them.

use mainstay_diskimage::container::Format;
use mainstay_testkit::{Rng, for_each_seed};

use crate::tools::{check, scribble, shell};

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
        scribble(&image, "qcow2", size, !plain, &mut random);
        if !shape.contains("refcount") {
            shell(&format!("qemu-img snapshot -c before {}", image.display()));
        }
        scribble(&image, "qcow2", size, false, &mut random);
        check(&image, Format::Qcow2, &mut random);
    });
}
