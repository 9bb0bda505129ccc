//! Power cuts and killed processes at every operation on the two files.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use mainstay_core::{Blocks, ChangeState, Extent, ExtentKind, Result};
use mainstay_testkit::{Rng, for_each_seed};

use super::map::{self, BLOCK, Boot, Map};
use super::medium::Medium;
use super::{Overlay, WritableBlocks, len_of};

/// Three blocks and a part of one.
const SIZE: u64 = 3 * BLOCK + 5000;
const SECTOR: usize = 512;
const BASE: [u8; 32] = [7; 32];
const THIS_BOOT: Boot = [b'1'; 36];
const NEXT_BOOT: Boot = [b'2'; 36];

struct Base(Vec<u8>);

impl Blocks for Base {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn extents(&self, range: Range<u64>) -> Result<Vec<Extent>> {
        Ok(vec![Extent { range, kind: ExtentKind::Data, change: ChangeState::Unknown }])
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let start = len_of(&(0..offset));
        buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
        // Whoever writes at the same time gets the chance to.
        std::thread::yield_now();
        Ok(())
    }
}

/// What was done to which of the two files. A hole is a write of zeros.
enum Op {
    Write { file: usize, offset: usize, bytes: Vec<u8> },
    Sync { file: usize },
}

/// A file that remembers how it came about.
#[derive(Clone)]
struct Recorded {
    file: usize,
    content: Arc<Mutex<Vec<u8>>>,
    log: Arc<Mutex<Vec<Op>>>,
}

impl Medium for Recorded {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let start = len_of(&(0..offset));
        buffer.copy_from_slice(&self.content.lock().unwrap()[start..start + buffer.len()]);
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let offset = len_of(&(0..offset));
        self.content.lock().unwrap()[offset..offset + bytes.len()].copy_from_slice(bytes);
        self.log.lock().unwrap().push(Op::Write { file: self.file, offset, bytes: bytes.to_vec() });
        Ok(())
    }

    fn punch(&self, range: Range<u64>) -> io::Result<()> {
        self.write(range.start, &vec![0; len_of(&range)])
    }

    fn sync(&self) -> io::Result<()> {
        self.log.lock().unwrap().push(Op::Sync { file: self.file });
        Ok(())
    }

    fn next_change(&self, range: &Range<u64>) -> io::Result<(u64, bool)> {
        Ok((range.end, true))
    }
}

/// Image and map.
type Files = [Vec<u8>; 2];

fn record(files: Files) -> [Recorded; 2] {
    let log = Arc::new(Mutex::new(Vec::new()));
    let mut file = 0;
    files.map(|content| {
        file += 1;
        Recorded { file: file - 1, content: Arc::new(Mutex::new(content)), log: Arc::clone(&log) }
    })
}

fn open(base: &Arc<Base>, [data, map]: &[Recorded; 2], boot: &Boot) -> Overlay {
    let base = Arc::clone(base) as Arc<dyn Blocks>;
    Overlay::over(base, Box::new(data.clone()), Box::new(map.clone()), &BASE, boot).unwrap()
}

/// What a power cut leaves: what was synced, and any sectors of what was not.
fn after_a_power_cut(start: &Files, ops: &[Op], rng: &mut Rng) -> Files {
    let mut files = start.clone();
    let synced = [0, 1].map(|wanted| {
        ops.iter().rposition(|op| matches!(op, Op::Sync { file } if *file == wanted)).unwrap_or(0)
    });
    for (number, op) in ops.iter().enumerate() {
        let Op::Write { file, offset, bytes } = op else { continue };
        let (mut at, end) = (*offset, offset + bytes.len());
        while at < end {
            let until = ((at / SECTOR + 1) * SECTOR).min(end);
            if number < synced[*file] || rng.chance(50) {
                files[*file][at..until].copy_from_slice(&bytes[at - offset..until - offset]);
            }
            at = until;
        }
    }
    files
}

/// What the end of the process leaves: everything.
fn after_a_kill(start: &Files, ops: &[Op]) -> Files {
    let mut files = start.clone();
    for op in ops {
        if let Op::Write { file, offset, bytes } = op {
            files[*file][*offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    }
    files
}

/// The device as the model has it, when so many operations on the files had been done.
struct Moment {
    ops: usize,
    device: Vec<u8>,
    flushed: bool,
}

fn read(overlay: &Overlay) -> Vec<u8> {
    let mut device = vec![0; len_of(&(0..SIZE))];
    overlay.read_at(0, &mut device).unwrap();
    device
}

/// Every byte is one that a candidate has.
fn is_of(device: &[u8], candidates: &[Moment]) -> bool {
    (0..device.len()).step_by(SECTOR).all(|start| {
        let sector = start..(start + SECTOR).min(device.len());
        let same = |moment: &Moment| moment.device[sector.clone()] == device[sector.clone()];
        candidates.iter().any(same)
            || sector.clone().all(|at| candidates.iter().any(|moment| moment.device[at] == device[at]))
    })
}

/// One random act on the overlay and on the model; true for a flush.
fn act(overlay: &Overlay, model: &mut [u8], rng: &mut Rng) -> bool {
    let start = rng.range(0..SIZE);
    let range = start..start + rng.range(0..(SIZE - start).min(2 * BLOCK) + 1);
    let part = &mut model[len_of(&(0..range.start))..len_of(&(0..range.end))];
    match rng.below(10) {
        0 | 1 => {
            overlay.flush().unwrap();
            return true;
        }
        2 => {
            part.fill(0);
            overlay.zero(range).unwrap();
        }
        3 => overlay.pull(range).unwrap(),
        4 => {
            let whole = range.start / BLOCK * BLOCK..(range.start / BLOCK + 1) * BLOCK.min(SIZE);
            let whole = whole.start..whole.end.min(SIZE);
            let part = &mut model[len_of(&(0..whole.start))..len_of(&(0..whole.end))];
            rng.fill(part);
            overlay.write_at(whole.start, part).unwrap();
        }
        _ => {
            let short = rng.below(2000).min(part.len());
            rng.fill(&mut part[..short]);
            overlay.write_at(range.start, &part[..short]).unwrap();
        }
    }
    false
}

#[test]
fn what_was_flushed_survives_power_cuts_and_what_was_written_survives_kills() {
    for_each_seed(12, |seed| {
        let mut rng = Rng::new(seed);
        let mut base = rng.bytes(len_of(&(0..SIZE)));
        let empty = rng.below(3) * len_of(&(0..BLOCK));
        base[empty..empty + len_of(&(0..BLOCK))].fill(0);
        let base = Arc::new(Base(base));
        let len = len_of(&(0..map::file_len(SIZE).unwrap()));
        // What was there before, say from an attempt that a power cut undid, must not show.
        let files = record([rng.bytes(len_of(&(0..SIZE))), vec![0; len]]);
        Map::make(&files[1], SIZE, &BASE, &THIS_BOOT).unwrap();
        let start = [0, 1].map(|file: usize| files[file].content.lock().unwrap().clone());
        files[0].log.lock().unwrap().clear();
        let overlay = open(&base, &files, &THIS_BOOT);
        let mut model = base.0.clone();
        let mut moments = vec![Moment { ops: 0, device: model.clone(), flushed: true }];
        for _ in 0..12 {
            let flushed = act(&overlay, &mut model, &mut rng);
            assert!(read(&overlay) == model);
            let ops = files[0].log.lock().unwrap().len();
            moments.push(Moment { ops, device: model.clone(), flushed });
        }
        let log = files[0].log.lock().unwrap();
        for cut in 0..=log.len() {
            // The moment after the cut is the one whose act was cut.
            let done = moments.partition_point(|moment| moment.ops <= cut);
            let begun = (done + 1).min(moments.len());
            let flushed = moments[..done].iter().rposition(|moment| moment.flushed).unwrap();
            let files = record(after_a_power_cut(&start, &log[..cut], &mut rng));
            let device = read(&open(&base, &files, &NEXT_BOOT));
            assert!(is_of(&device, &moments[flushed..begun]), "power cut at {cut} of {}", log.len());
            // Opening has brought the map to the new boot; a kill now loses nothing either.
            assert!(read(&open(&base, &files, &NEXT_BOOT)) == device);

            let files = record(after_a_kill(&start, &log[..cut]));
            let overlay = open(&base, &files, &THIS_BOOT);
            let device = read(&overlay);
            assert!(is_of(&device, &moments[done - 1..begun]), "kill at {cut} of {}", log.len());
            overlay.flush().unwrap();
            let ops = files[0].log.lock().unwrap();
            let later = record(after_a_power_cut(&after_a_kill(&start, &log[..cut]), &ops, &mut rng));
            assert!(read(&open(&base, &later, &NEXT_BOOT)) == device, "flush after a kill at {cut}");
        }
    });
}

/// Threads that write to one block at the same time, each its own bytes, while another pulls it.
#[test]
fn first_writes_to_one_block_do_not_undo_each_other() {
    const WRITERS: usize = 6;
    for_each_seed(30, |seed| {
        let base = Arc::new(Base(Rng::new(seed).bytes(len_of(&(0..SIZE)))));
        let files = record([vec![0; base.0.len()], vec![0; len_of(&(0..map::file_len(SIZE).unwrap()))]]);
        Map::make(&files[1], SIZE, &BASE, &THIS_BOOT).unwrap();
        let overlay = open(&base, &files, &THIS_BOOT);
        let part_len = base.0.len() / 4 / WRITERS;
        let mut model = base.0.clone();
        let parts: Vec<Vec<u8>> = (0..4 * WRITERS).map(|part| vec![part as u8; part_len]).collect();
        for (number, part) in parts.iter().enumerate() {
            model[number * part_len..][..part_len].copy_from_slice(part);
        }
        std::thread::scope(|scope| {
            for writer in 0..WRITERS {
                let (overlay, parts) = (&overlay, &parts);
                scope.spawn(move || {
                    for number in (writer..parts.len()).step_by(WRITERS) {
                        overlay.write_at((number * part_len) as u64, &parts[number]).unwrap();
                    }
                });
            }
            scope.spawn(|| overlay.pull(0..SIZE).unwrap());
        });
        assert!(read(&overlay) == model);
    });
}
