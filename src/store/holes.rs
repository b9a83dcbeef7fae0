//! Where a store has holes, remembered: asking the file system each time is slow on some of them.
//!
//! Nothing is kept until somebody asks. From then on writes mark what they touched, **after** they wrote and before they
//! are acknowledged; the file system is scanned once; and a granule is a hole when the scan or a discard said so and no
//! write touched it since. So a block that was written is never reported as a hole.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::Store;
use crate::limits::{HOLE_GRANULES_MAX, MAX_STORE_EXTENTS};
use crate::units::ByteRange;

/// The least unit of a hole, in bytes.
const GRANULE_MIN: u64 = 4096;

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Holes {
    planes: OnceLock<Planes>,
}

struct Planes {
    size: u64,
    granule: u64,
    hole: Box<[AtomicU64]>,
    touched: Box<[AtomicU64]>,
    scanned: AtomicBool,
}

impl Holes {
    /// Whether a scan was made.
    pub(super) fn known(&self) -> bool {
        self.planes.get().is_some_and(|planes| planes.scanned.load(Ordering::Acquire))
    }

    /// Asks the file system. May take long.
    pub(super) fn scan(&self, store: &dyn Store) -> io::Result<()> {
        let planes = self.planes.get_or_init(|| Planes::new(store.size()));
        let mut at = 0;
        if let Some(ranges) = store.data_ranges(0, MAX_STORE_EXTENTS)? {
            let all_seen = ranges.len() < MAX_STORE_EXTENTS;
            for data in ranges {
                planes.set(&planes.hole, ByteRange::new(at, data.start.max(at)), true);
                at = data.end;
            }
            if all_seen {
                planes.set(&planes.hole, ByteRange::new(at, store.size().max(at)), true);
            }
        }
        planes.scanned.store(true, Ordering::Release);
        Ok(())
    }

    /// A range was written.
    #[inline]
    pub(super) fn written(&self, range: ByteRange) {
        let Some(planes) = self.planes.get() else { return };
        for granule in range.start / planes.granule..range.end.div_ceil(planes.granule) {
            let (word, bit) = (&planes.touched[(granule / 64) as usize], 1 << (granule % 64));
            if word.load(Ordering::Acquire) & bit == 0 {
                word.fetch_or(bit, Ordering::AcqRel);
            }
        }
    }

    /// The space of a range will now be given back. A write that overlaps with it and ends after this is remembered,
    /// whichever of the two the store does last: what it wrote must not pass for a hole.
    pub(super) fn discarding(&self, range: ByteRange) {
        if let Some(planes) = self.planes.get() {
            // In this order: between the two, the granules are no holes.
            planes.set(&planes.hole, range, false);
            planes.set(&planes.touched, range, false);
        }
    }

    /// The space of a range was given back.
    pub(super) fn discarded(&self, range: ByteRange) {
        if let Some(planes) = self.planes.get() {
            planes.set(&planes.hole, range, true);
        }
    }

    /// Whether `at` lies in a hole, and up to where that is so.
    pub(super) fn run(&self, at: u64, end: u64) -> (u64, bool) {
        let Some(planes) = self.planes.get() else { return (end, false) };
        let word = |index: u64| {
            let index = index as usize;
            planes.hole[index].load(Ordering::Acquire) & !planes.touched[index].load(Ordering::Acquire)
        };
        let mut granule = at / planes.granule;
        let first = word(granule / 64) >> (granule % 64) & 1 == 1;
        while granule * planes.granule < end {
            let bits = word(granule / 64);
            let differs = (if first { !bits } else { bits }) >> (granule % 64);
            if differs != 0 {
                granule += u64::from(differs.trailing_zeros());
                break;
            }
            granule = (granule / 64 + 1) * 64;
        }
        ((granule * planes.granule).min(end), first)
    }
}

impl Planes {
    fn new(size: u64) -> Planes {
        let mut granule = GRANULE_MIN;
        while size / granule > HOLE_GRANULES_MAX {
            granule *= 2;
        }
        let plane = || (0..size.div_ceil(granule).div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Planes { size, granule, hole: plane(), touched: plane(), scanned: AtomicBool::new(false) }
    }

    /// Sets or clears the granules that lie whole in a range.
    fn set(&self, plane: &[AtomicU64], range: ByteRange, on: bool) {
        let end = if range.end >= self.size { self.size.div_ceil(self.granule) } else { range.end / self.granule };
        let mut granule = range.start.div_ceil(self.granule);
        while granule < end {
            let stop = end.min((granule / 64 + 1) * 64);
            let mask = (u64::MAX >> (64 - (stop - granule))) << (granule % 64);
            let word = &plane[(granule / 64) as usize];
            if on {
                word.fetch_or(mask, Ordering::AcqRel);
            } else {
                word.fetch_and(!mask, Ordering::AcqRel);
            }
            granule = stop;
        }
    }
}
