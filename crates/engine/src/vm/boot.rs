//! What a boot reads: recorded while a point is proven, and read ahead of the guest when a machine runs from its point.
//!
//! As words it is a sequence: `@766461`, a disk by the hexadecimal bytes of its name, then stretches of it such as `0+3` or
//! `-12`: blocks from the end of the stretch before on that disk (the start of the disk for the first), and how many, 1
//! if it does not say. A disk can come again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use mainstay_core::{Error, Result};
use mainstay_nbd::ReadObserver;
use mainstay_repository::StoredBlocks;

/// What is recorded by, in bytes of a disk.
const BLOCK: u64 = 64 << 10;

/// So many stretches are kept: those of a large machine's boot. As words they are some tens of KiB.
const STRETCHES_MAX: usize = 8192;

/// So many blocks are kept: 4 GiB.
const BLOCKS_MAX: usize = 1 << 16;

/// So much is opened ahead of the guest, in bytes of the cache: less than the cache holds, so that nothing is thrown out
/// before it was used.
const AHEAD: u64 = 16 << 20;

/// So many blocks are brought in at once, in the order in which they are stored.
const AT_ONCE: usize = 32;

/// Blocks that follow each other on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stretch {
    /// An index into the names.
    disk: usize,
    blocks: Range<u64>,
}

/// The blocks that a boot read, each once, in the order in which it first did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Boot {
    disks: Vec<String>,
    stretches: Vec<Stretch>,
}

impl Boot {
    /// Errors: [`mainstay_core::Code::Integrity`] for words that nobody wrote.
    pub fn parse(words: &str) -> Result<Self> {
        let mut boot = Self::default();
        let mut ends: BTreeMap<usize, u64> = BTreeMap::new();
        let mut disk = None;
        for word in words.split_ascii_whitespace() {
            let strange = || Error::integrity(format!("{word:?} is no word of a boot"));
            if let Some(name) = word.strip_prefix('@') {
                let name = unhex(name).ok_or_else(strange)?;
                let known = boot.disks.iter().position(|known| *known == name);
                disk = Some(known.unwrap_or(boot.disks.len()));
                boot.disks.extend(known.is_none().then_some(name));
                continue;
            }
            let disk = disk.ok_or_else(strange)?;
            let (gap, count) = word.split_once('+').unwrap_or((word, "1"));
            let (gap, count): (i64, u64) = gap.parse().ok().zip(count.parse().ok()).ok_or_else(strange)?;
            let end = ends.entry(disk).or_default();
            let start = end.checked_add_signed(gap).ok_or_else(strange)?;
            *end = start.checked_add(count).filter(|end| *end <= u64::MAX / BLOCK).ok_or_else(strange)?;
            boot.stretches.push(Stretch { disk, blocks: start..*end });
            if boot.stretches.len() > STRETCHES_MAX {
                break;
            }
        }
        Ok(boot)
    }

    /// In words; [`Boot::parse`] reads them.
    pub fn words(&self) -> String {
        let (mut words, mut disk) = (String::new(), None);
        let mut ends: BTreeMap<usize, u64> = BTreeMap::new();
        for stretch in &self.stretches {
            if disk != Some(stretch.disk) {
                disk = Some(stretch.disk);
                let name = self.disks.get(stretch.disk).map(String::as_str).unwrap_or_default();
                words.push_str(if words.is_empty() { "@" } else { " @" });
                for byte in name.bytes() {
                    let _to_memory = write!(words, "{byte:02x}");
                }
            }
            let end = ends.entry(stretch.disk).or_default();
            let gap = i128::from(stretch.blocks.start) - i128::from(*end);
            let count = stretch.blocks.end - stretch.blocks.start;
            let _to_memory =
                if count == 1 { write!(words, " {gap}") } else { write!(words, " {gap}+{count}") };
            *end = stretch.blocks.end;
        }
        words
    }

    fn blocks(&self) -> impl Iterator<Item = (&str, u64)> {
        let named = |stretch: &Stretch| self.disks.get(stretch.disk).map(String::as_str).unwrap_or_default();
        self.stretches.iter().flat_map(move |stretch| {
            let name = named(stretch);
            stretch.blocks.clone().map(move |block| (name, block))
        })
    }

    /// Whether nine in ten of the blocks that `other` read are among those of this one.
    pub fn foretells(&self, other: &Self) -> bool {
        let known: HashSet<_> = self.blocks().take(BLOCKS_MAX).collect();
        let (mut all, mut found) = (0, 0);
        for block in other.blocks().take(BLOCKS_MAX) {
            all += 1;
            found += usize::from(known.contains(&block));
        }
        found * 10 >= all * 9
    }
}

fn unhex(text: &str) -> Option<String> {
    let (digits, []) = text.as_bytes().as_chunks::<2>() else { return None };
    let bytes = digits.iter().map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
    String::from_utf8(bytes.collect::<Option<Vec<u8>>>()?).ok()
}

/// Records what a boot reads.
#[derive(Default)]
pub(super) struct Recorder {
    recorded: Mutex<Recorded>,
}

#[derive(Default)]
struct Recorded {
    boot: Boot,
    seen: HashSet<(usize, u64)>,
}

impl Recorder {
    /// What was recorded so far.
    pub(super) fn boot(&self) -> Boot {
        lock(&self.recorded).boot.clone()
    }

    fn read(&self, disk: usize, range: &Range<u64>) {
        let mut recorded = lock(&self.recorded);
        let Recorded { boot, seen } = &mut *recorded;
        for block in blocks_of(range) {
            if seen.len() >= BLOCKS_MAX || !seen.insert((disk, block)) {
                continue;
            }
            let full = boot.stretches.len() == STRETCHES_MAX;
            match boot.stretches.last_mut() {
                Some(last) if last.disk == disk && last.blocks.end == block => last.blocks.end += 1,
                _ if full => return,
                _ => boot.stretches.push(Stretch { disk, blocks: block..block + 1 }),
            }
        }
    }
}

/// Hears what is read of one disk.
struct Ear<T> {
    disk: usize,
    hears: Arc<T>,
}

impl ReadObserver for Ear<Recorder> {
    fn on_read(&self, range: &Range<u64>) {
        self.hears.read(self.disk, range);
    }
}

/// Observers for the disks of these names, by which the recorder hears.
pub(super) fn record(recorder: &Arc<Recorder>, disks: &[String]) -> Vec<Arc<dyn ReadObserver>> {
    lock(&recorder.recorded).boot.disks = disks.to_vec();
    let ear = |disk| Arc::new(Ear { disk, hears: Arc::clone(recorder) }) as Arc<dyn ReadObserver>;
    (0..disks.len()).map(ear).collect()
}

/// Reads ahead of a guest what an earlier boot has read, on a thread of its own. What cannot be read is left to the guest
/// to ask for. Dropped, it ends.
pub(super) struct ReadAhead {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Which step brings a block in.
    steps: HashMap<(usize, u64), usize>,
    /// The furthest step that the guest has reached, plus one.
    reached: Mutex<usize>,
    moved: Condvar,
    over: AtomicBool,
}

/// Blocks of one disk that are brought in together.
type Step = (usize, Vec<Range<u64>>);

impl ReadAhead {
    /// With the observers for the disks.
    pub(super) fn start(
        boot: &Boot,
        disks: &[(String, Arc<StoredBlocks>)],
    ) -> Result<(Self, Vec<Arc<dyn ReadObserver>>)> {
        let steps = steps(boot, disks);
        let numbered = steps.iter().enumerate();
        let of_step = numbered.flat_map(|(number, (disk, ranges))| {
            let blocks = ranges.iter().flat_map(blocks_of);
            blocks.map(move |block| ((*disk, block), number))
        });
        let shared = Arc::new(Shared {
            steps: of_step.collect(),
            reached: Mutex::new(0),
            moved: Condvar::new(),
            over: AtomicBool::new(false),
        });
        let theirs = Arc::clone(&shared);
        let blocks: Vec<_> = disks.iter().map(|(_, disk)| Arc::clone(disk)).collect();
        let thread = std::thread::Builder::new().name("read-ahead".into());
        let thread = thread.spawn(move || go_ahead(&theirs, &steps, &blocks));
        let thread = thread.map_err(|error| Error::io("cannot start a thread", error))?;
        let ear = |disk| Arc::new(Ear { disk, hears: Arc::clone(&shared) }) as Arc<dyn ReadObserver>;
        let ears = (0..disks.len()).map(ear).collect();
        Ok((Self { shared, thread: Some(thread) }, ears))
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        drop(lock(&self.shared.reached));
        self.shared.moved.notify_all();
        if let Some(thread) = self.thread.take() {
            let _it_had_nothing_to_say = thread.join();
        }
    }
}

impl ReadObserver for Ear<Shared> {
    fn on_read(&self, range: &Range<u64>) {
        let steps = blocks_of(range).filter_map(|block| self.hears.steps.get(&(self.disk, block)));
        let Some(step) = steps.max() else { return };
        let mut reached = lock(&self.hears.reached);
        if *reached <= *step {
            *reached = step + 1;
            self.hears.moved.notify_all();
        }
    }
}

/// A boot cut into steps. Disks that the machine does not have are left out.
fn steps(boot: &Boot, disks: &[(String, Arc<StoredBlocks>)]) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut room = 0;
    for (name, block) in boot.blocks().take(BLOCKS_MAX) {
        let Some(disk) = disks.iter().position(|(known, _)| known == name) else { continue };
        let range = block * BLOCK..(block + 1) * BLOCK;
        match steps.last_mut() {
            Some((last, ranges)) if *last == disk && room > 0 => match ranges.last_mut() {
                Some(before) if before.end == range.start => before.end = range.end,
                _ => ranges.push(range),
            },
            _ => {
                steps.push((disk, vec![range]));
                room = AT_ONCE;
            }
        }
        room -= 1;
    }
    steps
}

fn go_ahead(shared: &Shared, steps: &[Step], disks: &[Arc<StoredBlocks>]) {
    // How much every step up to this one has taken in the cache.
    let mut taken = Vec::with_capacity(steps.len() + 1);
    taken.push(0_u64);
    for (number, (disk, ranges)) in steps.iter().enumerate() {
        let mut reached = lock(&shared.reached);
        let so_far = taken.last().copied().unwrap_or(0);
        let used = |reached: usize| taken.get(reached).copied().unwrap_or(so_far);
        while !shared.over.load(Ordering::Acquire) && so_far - used(*reached) > AHEAD {
            reached = shared.moved.wait(reached).unwrap_or_else(PoisonError::into_inner);
        }
        // The guest may be further already.
        let is_late = *reached > number;
        drop(reached);
        if shared.over.load(Ordering::Acquire) {
            return;
        }
        let warmed = disks.get(*disk).filter(|_| !is_late).map(|disk| disk.warm(ranges));
        taken.push(so_far + warmed.and_then(Result::ok).unwrap_or(0));
    }
}

fn blocks_of(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK..range.end.div_ceil(BLOCK)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::{BLOCK, Boot, Recorder, STRETCHES_MAX, record};
    use std::sync::Arc;

    #[test]
    fn a_boot_is_recorded_once_in_order_and_comes_back_from_its_words() {
        let recorder = Arc::new(Recorder::default());
        let ears = record(&recorder, &["vda".into(), "vd b".into()]);
        let read = |disk: usize, block: u64, blocks: u64| {
            ears[disk].on_read(&(block * BLOCK + 512..(block + blocks) * BLOCK - 512));
        };
        read(0, 0, 3);
        read(0, 3, 1);
        read(0, 1, 2);
        read(1, 7, 1);
        read(0, 100, 1);
        read(0, 20, 2);
        let words = recorder.boot().words();
        assert_eq!(words, "@766461 0+4 @76642062 7 @766461 96 -81+2");
        assert_eq!(Boot::parse(&words).unwrap(), recorder.boot());
    }

    #[test]
    fn strange_words_are_refused_and_endless_ones_cut() {
        for words in
            ["0+1", "@76646", "@zz 0", "@ff 0", "@766461 -1", "@766461 x", "@766461 0+18446744073709551615"]
        {
            let _error = Boot::parse(words).unwrap_err();
        }
        let endless = format!("@766461{}", " 1".repeat(2 * STRETCHES_MAX));
        assert!(Boot::parse(&endless).unwrap().stretches.len() <= STRETCHES_MAX + 1);
    }

    #[test]
    fn a_boot_foretells_one_that_reads_nearly_the_same() {
        let boot = |words: &str| Boot::parse(words).unwrap();
        let known = boot("@61 0+90 @62 5");
        assert!(known.foretells(&boot("@61 0+9 100")));
        assert!(!known.foretells(&boot("@61 0+7 100+2")));
        assert!(!known.foretells(&boot("@62 0+4")), "another disk is another block");
        assert!(known.foretells(&Boot::default()));
    }
}
