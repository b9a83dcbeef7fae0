//! Counters for people: what was pulled, and what readers of missing blocks had to wait.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use slab::Slab;

/// Buckets of the histogram: 8 for each doubling of microseconds.
const STEPS: u32 = 8;
const BUCKETS: usize = 40 * STEPS as usize;

/// What came from the upstream. All figures only grow.
#[derive(Debug, Default)]
pub struct PullCounters {
    /// Bytes that arrived from the upstream, demand and background.
    pub pulled_bytes: AtomicU64,
    /// Bytes that needed not be sent: known zeroes, and blocks written here before they were fetched are not counted.
    pub skipped_bytes: AtomicU64,
    /// Requests sent because a client waited.
    pub demand_fetches: AtomicU64,
    /// Requests sent in the background.
    pub background_fetches: AtomicU64,
}

/// How long requests waited for missing blocks: a histogram without a lock, exact to an eighth.
pub struct FaultStats {
    buckets: [AtomicU64; BUCKETS],
    count: AtomicU64,
    max_us: AtomicU64,
    total_us: AtomicU64,
    /// Since when those wait who wait at the moment.
    waiting: Mutex<Slab<Instant>>,
}

/// One request that waits for a missing block. It is counted when it has got it, not when it was given up.
pub struct Fault {
    stats: Arc<FaultStats>,
    place: usize,
    since: Instant,
}

impl Fault {
    /// The block is here.
    pub fn served(self) {
        self.stats.record(self.since.elapsed());
    }
}

impl Drop for Fault {
    fn drop(&mut self) {
        self.stats.waiting().remove(self.place);
    }
}

impl Default for FaultStats {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            count: AtomicU64::new(0),
            max_us: AtomicU64::new(0),
            total_us: AtomicU64::new(0),
            waiting: Mutex::default(),
        }
    }
}

/// The faults so far, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultSummary {
    /// Requests that had to wait for a missing block.
    pub count: u64,
    /// Half of them waited less.
    pub p50_us: u64,
    /// 99 of 100 waited less.
    pub p99_us: u64,
    /// The longest wait.
    pub max_us: u64,
}

/// Waits counted below bounds that double, as Prometheus wants them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WaitHistogram {
    /// A bound in seconds, and how many waited less, in rising order.
    pub below: Vec<(f64, u64)>,
    /// All that waited.
    pub count: u64,
    /// All waits together, in seconds.
    pub sum_seconds: f64,
}

/// The bounds of [`WaitHistogram`], as powers of two in microseconds: 128 us to 67 s.
const BOUNDS: std::ops::RangeInclusive<u32> = 7..=26;

impl FaultStats {
    /// A request begins to wait.
    pub fn begin(self: &Arc<Self>) -> Fault {
        let since = Instant::now();
        Fault { stats: self.clone(), place: self.waiting().insert(since), since }
    }

    /// For how long the request that has waited longest has done so.
    pub fn longest_wait(&self) -> Option<Duration> {
        self.waiting().iter().map(|(_, since)| *since).min().map(|since| since.elapsed())
    }

    fn waiting(&self) -> MutexGuard<'_, Slab<Instant>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One request waited this long.
    fn record(&self, waited: Duration) {
        let us = waited.as_micros().min(u128::from(u64::MAX)) as u64;
        self.buckets[bucket(us)].fetch_add(1, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
        self.max_us.fetch_max(us, Ordering::Relaxed);
        self.total_us.fetch_add(us, Ordering::Relaxed);
    }

    /// All waits together, in microseconds.
    pub fn total_us(&self) -> u64 {
        self.total_us.load(Ordering::Relaxed)
    }

    /// The figures for graphs.
    pub fn histogram(&self) -> WaitHistogram {
        let counts = self.counts();
        let below = |power: u32| counts[..bucket(1 << power)].iter().sum();
        WaitHistogram {
            below: BOUNDS.map(|power| ((1_u64 << power) as f64 / 1e6, below(power))).collect(),
            // Of the same look: a bucket never holds more than all.
            count: counts.iter().sum(),
            sum_seconds: self.total_us() as f64 / 1e6,
        }
    }

    /// The figures for people.
    pub fn summary(&self) -> FaultSummary {
        let (counts, max_us) = (self.counts(), self.max_us.load(Ordering::Relaxed));
        let at = |percent: u64| percentile(&counts, percent).min(max_us);
        FaultSummary { count: self.count.load(Ordering::Relaxed), p50_us: at(50), p99_us: at(99), max_us }
    }

    /// How many waited how long, so far: as [`percentile`] and [`wait_limit_us`] want it.
    pub fn counts(&self) -> Vec<u64> {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect()
    }
}

/// So many of 100 waited less than this, in microseconds; 0 where nobody waited.
pub fn percentile(counts: &[u64], percent: u64) -> u64 {
    let wanted = (counts.iter().sum::<u64>() * percent).div_ceil(100);
    let mut seen = 0;
    let found = counts.iter().position(|count| {
        seen += count;
        seen >= wanted && wanted > 0
    });
    found.map_or(0, wait_limit_us)
}

fn bucket(us: u64) -> usize {
    if us < u64::from(STEPS) {
        return us as usize;
    }
    let exponent = us.ilog2();
    let step = (us >> (exponent - 3)) & 7;
    (((exponent - 2) * STEPS) as usize + step as usize).min(BUCKETS - 1)
}

/// The longest wait that is counted in a bucket, in microseconds.
pub fn wait_limit_us(bucket: usize) -> u64 {
    if bucket < STEPS as usize {
        return bucket as u64;
    }
    let (exponent, step) = (bucket as u32 / STEPS + 2, bucket as u64 % u64::from(STEPS));
    ((u64::from(STEPS) + step + 1) << (exponent - 3)) - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_its_bucket() {
        for us in (0..5000).chain([1 << 20, (1 << 30) + 12345]) {
            let found = bucket(us);
            assert!(us <= wait_limit_us(found) && (found == 0 || us > wait_limit_us(found - 1)), "{us} in {found}");
        }
    }

    #[test]
    fn whoever_waits_is_seen_until_served_or_given_up() {
        let stats = Arc::new(FaultStats::default());
        assert_eq!(stats.longest_wait(), None);
        let (first, second, third) = (stats.begin(), stats.begin(), stats.begin());
        assert!(stats.longest_wait().is_some_and(|wait| wait >= second.since.elapsed().saturating_sub(wait)));
        second.served();
        assert!(stats.longest_wait() >= Some(third.since - first.since));
        drop(first);
        assert!(stats.longest_wait().is_some());
        third.served();
        assert_eq!((stats.longest_wait(), stats.summary().count), (None, 2));
    }

    #[test]
    fn the_histogram_counts_what_lies_below_each_bound() {
        let stats = FaultStats::default();
        [127, 128, 255, 256, 1 << 30].iter().for_each(|&us| stats.record(Duration::from_micros(us)));
        let found = stats.histogram();
        assert_eq!(found.below[..3], [(0.000128, 1), (0.000256, 3), (0.000512, 4)]);
        assert_eq!((found.below.last(), found.count), (Some(&(67.108864, 4)), 5));
        assert!((found.sum_seconds - 1073.742590).abs() < 1e-6, "{found:?}");
    }

    #[test]
    fn percentiles_are_exact_to_an_eighth() {
        let stats = FaultStats::default();
        (1..=1000).for_each(|us| stats.record(Duration::from_micros(us)));
        let found = stats.summary();
        assert_eq!((found.count, found.max_us, stats.total_us()), (1000, 1000, 500_500));
        assert!((500..=563).contains(&found.p50_us) && (990..=1000).contains(&found.p99_us), "{found:?}");
    }
}
