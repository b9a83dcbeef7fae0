//! The write tracker: how often and how lately each region of a disk was written. Pure: the caller brings the time.
//!
//! A region's state is one word: a counter that halves every minute, and the second that it was brought up to date.
//! Recording is a load and a store without a lock; two writers of one region at the same instant may count as one.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::limits::REGION;
use crate::units::ByteRange;

/// After this many seconds a write counts half.
pub const HALF_LIFE: u32 = 60;

/// One write, in units of the counter: there is room for its decay below, and for many above.
const ONE: u32 = 1 << 8;

/// See the module's documentation.
pub struct Tracker {
    size: u64,
    /// High half: the second; low half: the counter.
    regions: Box<[AtomicU64]>,
}

impl Tracker {
    /// A tracker of a disk of `size` bytes that was never written.
    pub fn new(size: u64) -> Self {
        Self { size, regions: (0..size.div_ceil(REGION)).map(|_| AtomicU64::new(0)).collect() }
    }

    /// A range was written at `now` (the time since some start, which is the same for all calls).
    #[inline]
    pub fn record(&self, now: Duration, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let now = seconds(now);
        let last = (range.end - 1) / REGION;
        for region in range.start / REGION..=last {
            if let Some(word) = self.regions.get(region as usize) {
                let counter = decayed(word.load(Ordering::Relaxed), now).saturating_add(ONE);
                word.store(u64::from(now) << 32 | u64::from(counter), Ordering::Relaxed);
            }
        }
    }

    /// The whole disk in order as ranges with their scores at `now`: 0 is never written, more is hotter. Neighbours
    /// of equal score are one range.
    pub fn heat(&self, now: Duration) -> Vec<(ByteRange, u32)> {
        self.heat_in(now, ByteRange::new(0, self.size), usize::MAX)
    }

    /// The same for a part of the disk, at most `max` ranges of it.
    pub fn heat_in(&self, now: Duration, part: ByteRange, max: usize) -> Vec<(ByteRange, u32)> {
        let now = seconds(now);
        let mut ranges: Vec<(ByteRange, u32)> = Vec::new();
        let mut at = part.start;
        let end = part.end.min(self.size);
        while at < end {
            let region = at / REGION;
            let word = self.regions.get(region as usize).map_or(0, |word| word.load(Ordering::Relaxed));
            let score = if word == 0 { 0 } else { decayed(word, now).max(1) };
            let range = ByteRange::new(at, ((region + 1) * REGION).min(end));
            at = range.end;
            let full = ranges.len() == max;
            match ranges.last_mut() {
                Some((last, same)) if *same == score => last.end = range.end,
                _ if full => break,
                _ => ranges.push((range, score)),
            }
        }
        ranges
    }
}

fn seconds(now: Duration) -> u32 {
    now.as_secs().min(u64::from(u32::MAX)) as u32
}

/// The counter of a word at `now`: halved for every whole half-life, and on a straight line within one.
fn decayed(word: u64, now: u32) -> u32 {
    let (then, counter) = ((word >> 32) as u32, word as u32);
    let age = now.saturating_sub(then);
    let halved = counter.checked_shr(age / HALF_LIFE).unwrap_or(0);
    let rest = u64::from(age % HALF_LIFE);
    (u64::from(halved) - u64::from(halved) * rest / u64::from(2 * HALF_LIFE)) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 5 * REGION + 1000;

    proptest! {
        /// The tracker against sums of powers of one half. The line within a half-life is at most 6.2 % above the curve
        /// for each step, so the comparison is of the order of well separated regions.
        #[test]
        fn scores_follow_the_decayed_count(writes in prop::collection::vec((0u64..6, 0u64..600), 1..60)) {
            let tracker = Tracker::new(SIZE);
            let mut writes = writes;
            writes.sort_by_key(|(_, at)| *at);
            for (region, at) in &writes {
                tracker.record(Duration::from_secs(*at), ByteRange::at(region * REGION + 7, 500));
            }
            let now = 600u64;
            let heat = tracker.heat(Duration::from_secs(now));
            let score = |region: u64| heat.iter().find(|(r, _)| r.start <= region * REGION && region * REGION < r.end).unwrap().1;
            for region in 0..6 {
                let exact: f64 = writes.iter().filter(|(r, _)| *r == region)
                    .map(|(_, at)| 0.5f64.powf((now - at) as f64 / f64::from(HALF_LIFE))).sum();
                let found = f64::from(score(region)) / f64::from(ONE);
                if exact == 0.0 {
                    prop_assert_eq!(score(region), 0);
                } else {
                    prop_assert!(score(region) > 0, "a written region is never cold");
                    prop_assert!(found < exact * 2.0 + 0.1 && found > exact * 0.8 - 0.3, "{} for {}", found, exact);
                }
            }
            prop_assert_eq!((heat[0].0.start, heat.last().unwrap().0.end), (0, SIZE));
            prop_assert!(heat.windows(2).all(|w| w[0].0.end == w[1].0.start && w[0].1 != w[1].1));
        }
    }

    #[test]
    fn lately_beats_long_ago_and_often_beats_once() {
        let tracker = Tracker::new(SIZE);
        tracker.record(Duration::from_secs(0), ByteRange::at(0, 1));
        tracker.record(Duration::from_secs(200), ByteRange::at(REGION, 1));
        for _ in 0..9 {
            tracker.record(Duration::from_secs(100), ByteRange::at(2 * REGION - 1, 2));
        }
        let heat = tracker.heat(Duration::from_secs(200));
        let score = |region: u64| heat.iter().find(|(r, _)| r.end > region * REGION).unwrap().1;
        assert!(score(0) < score(2) && score(2) < score(1), "{heat:?}");
        assert_eq!(score(3), 0);
    }

    #[test]
    fn a_counter_that_is_full_stays_full() {
        assert_eq!(decayed(u64::from(u32::MAX), 0).saturating_add(ONE), u32::MAX);
        assert_eq!(decayed(u64::from(u32::MAX), HALF_LIFE * 40), 0);
    }

    #[test]
    fn a_part_is_cut_at_its_ends() {
        let tracker = Tracker::new(SIZE);
        tracker.record(Duration::ZERO, ByteRange::at(REGION, 1));
        let part = tracker.heat_in(Duration::ZERO, ByteRange::new(10, REGION + 10), 10);
        assert_eq!(part, vec![(ByteRange::new(10, REGION), 0), (ByteRange::new(REGION, REGION + 10), ONE)]);
        assert_eq!(tracker.heat_in(Duration::ZERO, ByteRange::new(10, REGION + 10), 1).len(), 1);
    }
}
