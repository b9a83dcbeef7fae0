//! How a disk filled, over time: at most [`HISTORY_SAMPLES`] samples, however long it takes. Pure: time is an argument.

use serde::{Deserialize, Serialize};

use crate::limits::HISTORY_SAMPLES;

/// One moment. What is counted from the beginning may begin anew with the node's process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Milliseconds since 1970.
    pub at_ms: u64,
    /// Bytes in the local store.
    pub present_bytes: u64,
    /// Bytes written here since the handover.
    pub dirty_bytes: u64,
    /// Bytes fetched from the upstream.
    pub pulled_bytes: u64,
    /// Bytes that needed not be sent.
    pub skipped_bytes: u64,
    /// Requests to the upstream because a client waited.
    pub demand_fetches: u64,
    /// Requests to the upstream in the background.
    pub background_fetches: u64,
    /// Requests of clients that waited for a missing block since the sample before.
    pub waits: u64,
    /// 99 of 100 of these waited less, in microseconds.
    pub wait_p99_us: u64,
    /// What they waited altogether, with the time that the disk was fenced, in microseconds.
    pub stalled_us: u64,
    /// The least that was left of the lease, in milliseconds.
    pub lease_remaining_ms: Option<u64>,
    /// Whether the other host was heard all the time.
    pub link_up: bool,
}

impl Sample {
    /// One sample in place of two that follow each other.
    fn joined(self, next: Sample) -> Sample {
        Sample {
            waits: self.waits + next.waits,
            wait_p99_us: self.wait_p99_us.max(next.wait_p99_us),
            stalled_us: self.stalled_us + next.stalled_us,
            lease_remaining_ms: self.lease_remaining_ms.into_iter().chain(next.lease_remaining_ms).min(),
            link_up: self.link_up && next.link_up,
            ..next
        }
    }
}

/// The samples of one disk. When they are too many, two by two become one, and from then on each stands for twice as long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// How many looks make a sample.
    each: u32,
    /// How many of them the last sample has.
    last_has: u32,
    samples: Vec<Sample>,
}

impl Default for History {
    fn default() -> Self {
        Self { each: 1, last_has: 1, samples: Vec::new() }
    }
}

impl History {
    /// A look at the disk; they come at about the same distance.
    pub fn add(&mut self, sample: Sample) {
        match self.samples.pop() {
            Some(last) if self.last_has < self.each => {
                self.samples.push(last.joined(sample));
                self.last_has += 1;
                return;
            }
            last => self.samples.extend(last),
        }
        if self.samples.len() == HISTORY_SAMPLES {
            let mut old = std::mem::take(&mut self.samples).into_iter();
            while let Some(first) = old.next() {
                self.samples.push(match old.next() {
                    Some(second) => first.joined(second),
                    None => first,
                });
            }
            self.each = self.each.saturating_mul(2);
        }
        self.samples.push(sample);
        self.last_has = 1;
    }

    /// The samples, the oldest first.
    pub fn samples(&self) -> &[Sample] {
        &self.samples
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(at: u64) -> Sample {
        Sample {
            at_ms: at,
            present_bytes: at,
            waits: 1,
            wait_p99_us: at % 100,
            stalled_us: 2,
            link_up: true,
            ..Sample::default()
        }
    }

    proptest! {
        #[test]
        fn it_is_bounded_and_forgets_no_wait(looks in 1u64..20_000) {
            let mut history = History::default();
            (1..=looks).for_each(|at| history.add(sample(at)));
            let samples = history.samples();
            prop_assert!(samples.len() <= HISTORY_SAMPLES);
            prop_assert!(samples.len() as u64 >= looks.min(HISTORY_SAMPLES as u64 / 2));
            prop_assert_eq!(samples.iter().map(|sample| sample.waits).sum::<u64>(), looks);
            prop_assert_eq!(samples.iter().map(|sample| sample.stalled_us).sum::<u64>(), looks * 2);
            prop_assert!(samples.is_sorted_by(|a, b| a.at_ms < b.at_ms));
            prop_assert_eq!(samples.last().unwrap().present_bytes, looks);
            let longest = (1..=looks).map(|at| at % 100).max().unwrap();
            prop_assert_eq!(samples.iter().map(|sample| sample.wait_p99_us).max().unwrap(), longest);
        }
    }

    #[test]
    fn two_moments_become_the_worse_of_both() {
        let first = Sample { lease_remaining_ms: Some(3), link_up: false, ..sample(1) };
        let both = first.joined(Sample { lease_remaining_ms: None, ..sample(2) });
        assert_eq!((both.lease_remaining_ms, both.link_up, both.at_ms), (Some(3), false, 2));
    }

    #[test]
    fn it_is_the_same_after_a_restart() {
        let mut history = History::default();
        (1..=3000).for_each(|at| history.add(sample(at)));
        let text = serde_json::to_string(&history).unwrap();
        assert_eq!(serde_json::from_str::<History>(&text).unwrap(), history);
    }
}
