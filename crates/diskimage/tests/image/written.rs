//! Images that we write, judged by QEMU and by our own reader.

use std::ops::Range;

use mainstay_core::{Blocks as _, Code};
use mainstay_diskimage::Qcow2Writer;
use mainstay_diskimage::container::Format;
use mainstay_testkit::{Rng, for_each_seed};

use crate::tools::{check, shell};

/// Anything from a byte to several clusters.
fn place(random: &mut Rng, size: u64) -> Range<u64> {
    let start = random.range(0..size);
    start..(start + 1 + random.range(0..300_000)).min(size)
}

#[test]
fn qcow2_images_that_are_written_in_any_order_read_as_they_should() {
    for_each_seed(4, |seed| {
        let mut random = Rng::new(seed);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        let size = random.range(1..4000) * 512;
        let writer = Qcow2Writer::create(&path, size).unwrap();
        let mut model = vec![0; size as usize];
        for flushes in 0..3 {
            let work: Vec<(Range<u64>, Option<Vec<u8>>)> = (0..12)
                .map(|_| {
                    let range = place(&mut random, size);
                    let bytes = random.bytes((range.end - range.start) as usize);
                    (range, Some(bytes).filter(|_| random.chance(80)))
                })
                .collect();
            for (range, bytes) in work {
                let part = &mut model[range.start as usize..range.end as usize];
                match bytes {
                    Some(bytes) => {
                        writer.write_at(range.start, &bytes).unwrap();
                        part.copy_from_slice(&bytes);
                    }
                    None => {
                        writer.zero(range).unwrap();
                        part.fill(0);
                    }
                }
            }
            let mut read = vec![1; model.len()];
            writer.read_at(0, &mut read).unwrap();
            assert!(read == model, "seed {seed}");
            if flushes == 0 {
                // A run that dies here leaves nothing that could be taken for the disk.
                assert!(std::fs::read(&path).unwrap().iter().take(8).all(|byte| *byte == 0));
            }
            writer.flush().unwrap();
            shell(&format!("qemu-img check -q -f qcow2 {}", path.display()));
            let opened = check(&path, Format::Qcow2, &mut random);
            let mut read = vec![1; model.len()];
            opened.blocks.read_at(0, &mut read).unwrap();
            assert!(read == model, "seed {seed}");
        }
        assert_eq!(Qcow2Writer::create(&path, size).map(drop).unwrap_err().code(), Code::AlreadyExists);
    });
}

#[test]
fn threads_write_beside_each_other_and_a_huge_disk_takes_no_space() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let size = 40 << 40;
    let writer = Qcow2Writer::create(&path, size).unwrap();
    // Several share a cluster, and a table.
    let places: Vec<u64> = (0..64).map(|number| number * 20_000 + (number % 3) * (15 << 40)).collect();
    std::thread::scope(|scope| {
        for half in places.chunks(16) {
            scope.spawn(|| half.iter().for_each(|at| writer.write_at(*at, &at.to_be_bytes()).unwrap()));
        }
    });
    writer.flush().unwrap();
    shell(&format!("qemu-img check -q -f qcow2 {}", path.display()));
    let opened = mainstay_diskimage::container::open(
        &path,
        None,
        &mainstay_diskimage::container::Directories::of(&path).unwrap(),
    );
    let opened = opened.unwrap();
    assert_eq!(opened.blocks.size(), size);
    for at in places {
        let mut read = [0; 8];
        opened.blocks.read_at(at, &mut read).unwrap();
        assert_eq!(u64::from_be_bytes(read), at);
    }
    assert!(path.metadata().unwrap().len() < 32 << 20);
    assert_eq!(writer.write_at(size - 4, &[0; 8]).unwrap_err().code(), Code::Io);
}
