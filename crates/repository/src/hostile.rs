//! For tests of decoders: every input that is nearly valid, and many that are not. Nothing panics, nothing takes
//! memory without bound.

use mainstay_testkit::Rng;

use counted::peak_of;

/// Inputs up to this many bytes are cut at every length and changed at every byte.
const EXHAUSTIVE_BYTES: usize = 3 << 10;
const MUTANTS: usize = 3000;

/// Feeds `decode` with the valid bytes cut, changed, shuffled and stretched, and with noise. Each call may hold up to
/// `memory_max` bytes at once.
pub(crate) fn feed(valid: &[u8], memory_max: usize, decode: impl Fn(&[u8])) {
    let seed = u64::from_le_bytes(blake3::hash(valid).as_bytes()[..8].try_into().unwrap());
    let mut rng = Rng::new(seed);
    let try_one = |bytes: &[u8]| {
        let peak = peak_of(|| decode(bytes));
        assert!(peak <= memory_max, "{peak} bytes of memory for {} bytes: {bytes:02x?}", bytes.len());
    };
    try_one(valid);
    let step = valid.len() / EXHAUSTIVE_BYTES + 1;
    for at in (0..valid.len()).step_by(step) {
        try_one(&valid[..at]);
        for change in [1, 0x7f, 0x80, 0xff] {
            let mut bytes = valid.to_vec();
            bytes[at] ^= change;
            try_one(&bytes);
        }
    }
    for _ in 0..MUTANTS {
        let mut bytes = valid.to_vec();
        for _ in 0..=rng.below(4) {
            mutate(&mut bytes, &mut rng);
        }
        try_one(&bytes);
    }
    for _ in 0..MUTANTS / 10 {
        let length = rng.below(400);
        try_one(&rng.bytes(length));
    }
}

fn mutate(bytes: &mut Vec<u8>, rng: &mut Rng) {
    let at = rng.below(bytes.len() + 1);
    let end = (at + rng.below(40)).min(bytes.len());
    match rng.below(6) {
        0 => drop(bytes.drain(at..end)),
        1 => drop(bytes.splice(at..at, [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1])),
        2 => {
            let again = bytes[at..end].to_vec();
            drop(bytes.splice(at..at, again));
        }
        3 => bytes[at..end].fill(0xff),
        4 => bytes[at..end].fill(0),
        _ => {
            let noise = rng.bytes(end - at);
            bytes[at..end].copy_from_slice(&noise);
        }
    }
}

mod counted {
    #![expect(unsafe_code, reason = "an allocator that counts is an allocator")]

    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;

    thread_local! {
        /// Bytes held now, and at most, by what this thread allocated since it was asked.
        static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
    }

    struct Counted;

    #[global_allocator]
    static COUNTED: Counted = Counted;

    fn count(bytes: isize) {
        // A thread that ends has nothing to be asked any more.
        let _ended = HELD.try_with(|held| {
            let (now, most) = held.get();
            held.set((now + bytes, most.max(now + bytes)));
        });
    }

    // SAFETY: the system's allocator does all the work.
    unsafe impl GlobalAlloc for Counted {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            count(layout.size().cast_signed());
            // SAFETY: the caller's promise is passed on.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
            count(-layout.size().cast_signed());
            // SAFETY: as above.
            unsafe { System.dealloc(pointer, layout) }
        }
    }

    /// The most bytes that `act` held at once.
    pub(super) fn peak_of(act: impl FnOnce()) -> usize {
        HELD.set((0, 0));
        act();
        HELD.get().1.cast_unsigned()
    }

    #[test]
    fn what_is_allocated_is_counted() {
        assert!(peak_of(|| drop(Vec::<u8>::with_capacity(5000))) >= 5000);
        assert_eq!(peak_of(|| ()), 0);
    }
}
