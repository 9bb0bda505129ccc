//! A VHDX file as a crash leaves it: its tables damaged, and a log that mends them. QEMU empties its own log with every
//! write, so the log is written here; QEMU then judges by applying it.

use std::path::Path;

use mainstay_core::Code;
use mainstay_diskimage::container::{Alone, open};
use mainstay_testkit::{Rng, for_each_seed};

use crate::containers::write_only;
use crate::tools::{raw, shell};

const UNIT: usize = 4096;
const GUID: [u8; 16] = *b"the log of today";
const BLOCKS: [u8; 16] =
    [0x66, 0x77, 0xC2, 0x2D, 0x23, 0xF6, 0x00, 0x42, 0x9D, 0x64, 0x11, 0x5E, 0x9B, 0xFD, 0x4A, 0x08];

enum Write {
    Page(u64, Vec<u8>),
    Zeros(u64, u64),
}

struct Image {
    bytes: Vec<u8>,
    /// Where the table of blocks lies.
    table: usize,
    log: std::ops::Range<usize>,
}

impl Image {
    fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let regions = &bytes[192 << 10..][..64 << 10];
        let entry = regions.windows(16).position(|window| window == BLOCKS).unwrap();
        let table = u64_at(regions, entry + 16);
        let start = u64_at(&bytes, (64 << 10) + 72);
        Self { bytes, table, log: start..start + (1 << 20) }
    }

    /// Writes log entries one behind the other, the first at `at` of the log, each needing all before it. Returns
    /// where each begins in the file.
    fn put_log(&mut self, at: usize, entries: &[Vec<Write>]) -> Vec<usize> {
        let (mut place, mut places) = (at, Vec::new());
        for (sequence, writes) in (7u64..).zip(entries) {
            let entry = entry(sequence, at, self.bytes.len(), writes);
            places.push(self.log.start + place % self.log.len());
            for page in entry.chunks(UNIT) {
                let here = self.log.start + place % self.log.len();
                self.bytes[here..here + UNIT].copy_from_slice(page);
                place += UNIT;
            }
        }
        for header in [64 << 10, 128 << 10] {
            self.bytes[header + 48..header + 64].copy_from_slice(&GUID);
            let header = &mut self.bytes[header..header + UNIT];
            header[4..8].fill(0);
            let sum = crc32c(header);
            header[4..8].copy_from_slice(&sum.to_le_bytes());
        }
        places
    }
}

fn u64_at(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap()
}

fn entry(sequence: u64, tail: usize, file: usize, writes: &[Write]) -> Vec<u8> {
    let head = (64 + writes.len() * 32).next_multiple_of(UNIT);
    let pages = writes.iter().filter(|write| matches!(write, Write::Page(..))).count();
    let length = u32::try_from(head + pages * UNIT).unwrap();
    let mut bytes = [
        b"loge\0\0\0\0".as_slice(),
        &length.to_le_bytes(),
        &u32::try_from(tail).unwrap().to_le_bytes(),
        &sequence.to_le_bytes(),
        &u64::try_from(writes.len()).unwrap().to_le_bytes(),
        &GUID,
        &file.to_le_bytes(),
        &file.to_le_bytes(),
    ]
    .concat();
    let mut data = Vec::new();
    for write in writes {
        match write {
            Write::Zeros(place, length) => {
                bytes.extend(
                    [b"zero\0\0\0\0".as_slice(), &length.to_le_bytes(), &place.to_le_bytes()].concat(),
                );
            }
            Write::Page(place, page) => {
                bytes.extend([b"desc", &page[UNIT - 4..], &page[..8], &place.to_le_bytes()].concat());
                let (high, low) = (u32::try_from(sequence >> 32).unwrap(), u32::try_from(sequence).unwrap());
                data.extend([b"data", &high.to_le_bytes(), &page[8..UNIT - 4], &low.to_le_bytes()].concat());
            }
        }
        bytes.extend(sequence.to_le_bytes());
    }
    bytes.resize(head, 0);
    bytes.extend(data);
    let sum = crc32c(&bytes);
    bytes[4..8].copy_from_slice(&sum.to_le_bytes());
    bytes
}

pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ (0x82F6_3B78 & 0u32.wrapping_sub(sum & 1)))
    })
}

#[test]
fn a_vhdx_that_was_not_closed_reads_as_after_a_repair() {
    for_each_seed(6, |seed| {
        let mut random = Rng::new(seed);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.vhdx");
        let size: u64 = 24 << 20;
        shell(&format!("qemu-img create -q -f vhdx -o block_size=1M {} {size}", path.display()));
        write_only(&path, size, &mut random);
        let expected = raw(&path, "vhdx");

        let mut image = Image::read(&path);
        let (table, place) = (image.table, image.table as u64);
        let whole = image.bytes[table..table + UNIT].to_vec();
        // With every second seed the last write empties the disk.
        let (last, expected) = if seed % 2 == 0 {
            image.bytes[table..table + UNIT].fill(0);
            (Write::Page(place, whole), expected)
        } else {
            (Write::Zeros(place, UNIT as u64), vec![0; expected.len()])
        };
        let entries = [
            vec![Write::Page(place, random.bytes(UNIT)), Write::Zeros(place, 64 << 10)],
            vec![Write::Page(place, random.bytes(UNIT)), Write::Zeros(place + UNIT as u64, 4096)],
            vec![last],
        ];
        // From the last seeds on, the log goes on at its start.
        let places = image
            .put_log([0, 8 * UNIT, image.log.len() - 3 * UNIT][usize::try_from(seed % 3).unwrap()], &entries);
        std::fs::write(&path, &image.bytes).unwrap();

        let opened = open(&path, None, &Alone).unwrap();
        let mut read = vec![0; expected.len()];
        opened.blocks.read_at(0, &mut read).unwrap();
        assert!(read == expected);
        shell(&format!("qemu-img check -q -r all {}", path.display()));
        assert!(raw(&path, "vhdx") == expected, "the log is one that QEMU reads in the same way");

        // What is behind a damaged entry was promised to somebody, so the state before it is not the disk.
        image.bytes[places[1] + 100] ^= 1;
        std::fs::write(&path, &image.bytes).unwrap();
        assert_eq!(open(&path, None, &Alone).err().map(|error| error.code()), Some(Code::Integrity));
    });
}
