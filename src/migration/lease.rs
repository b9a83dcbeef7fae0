//! The lease: the destination's permission to run, which ends by itself.
//!
//! The destination sends numbered beats and counts a renewal **from when the beat was sent**; the source counts from
//! when it answered, which is later. So the destination always believes that its lease ends no later than the source
//! believes it does, whatever the link delays. On top of that the destination stops `margin` before the end, and the
//! source waits `guard` after it, for drift of the two clocks and for the time that freezing takes. Pure: time is an
//! argument.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::units::BootTime;

/// The timings of a lease; the same on both hosts, because the source sends them in `prepare`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// How long a renewal lasts.
    pub duration: Duration,
    /// How often the destination sends a beat.
    pub beat: Duration,
    /// How long before the end the destination stops.
    pub margin: Duration,
    /// How long after the end the source still waits.
    pub guard: Duration,
}

/// Timings that contradict each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("lease timings contradict each other: {0}")]
pub struct BadTimings(&'static str);

impl Default for Timings {
    fn default() -> Self {
        Self::of(Duration::from_secs(10))
    }
}

impl Timings {
    /// Proportions that hold for any lease: ten beats fit, the last fifth is the margin, a tenth the guard.
    pub fn of(duration: Duration) -> Self {
        Self { duration, beat: duration / 10, margin: duration / 5, guard: duration / 10 }
    }

    /// Checks data from a peer or a journal against each other.
    pub fn checked(self) -> Result<Self, BadTimings> {
        let within = |low: Duration, value: Duration, high: Duration| low <= value && value <= high;
        if !within(Duration::from_secs(1), self.duration, Duration::from_secs(3600)) {
            return Err(BadTimings("the lease must last 1 s to 1 h"));
        }
        if self.beat.is_zero() || self.beat.saturating_mul(3) > self.duration - self.margin.min(self.duration) {
            return Err(BadTimings("three beats must fit into the lease less its margin"));
        }
        if self.margin.saturating_mul(2) > self.duration || self.margin < self.duration / 100 {
            return Err(BadTimings("the margin must be between a hundredth and a half of the lease"));
        }
        // Two clocks that drift by less than 1 % each stay within a fiftieth of the lease.
        if !within(self.duration / 50, self.guard, Duration::from_secs(600)) {
            return Err(BadTimings("the guard must be at least a fiftieth of the lease, and at most 10 min"));
        }
        Ok(self)
    }
}

/// The number of a beat; rises by one with each that is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Beat(pub u64);

/// How many sent beats are remembered; an answer to an older one renews nothing.
const REMEMBERED_BEATS: usize = 64;

/// The destination's side: what it may still do.
#[derive(Clone, Debug)]
pub struct HeldLease {
    timings: Timings,
    next: Beat,
    sent: VecDeque<(Beat, BootTime)>,
    counted_from: Option<BootTime>,
}

impl HeldLease {
    /// No lease yet; beats may be sent, `first` on. A number that an earlier process of this host may have used must not
    /// come again, or the other host would take an old word for a new one: so it is chosen at random.
    pub fn new(timings: Timings, first: Beat) -> Self {
        Self { timings, next: first, sent: VecDeque::new(), counted_from: None }
    }

    /// A beat is about to be sent at `now`.
    pub fn send_beat(&mut self, now: BootTime) -> Beat {
        let beat = self.next;
        self.next = Beat(beat.0.wrapping_add(1));
        if self.sent.len() == REMEMBERED_BEATS {
            self.sent.pop_front();
        }
        self.sent.push_back((beat, now));
        beat
    }

    /// The source has answered a beat as owner-giver: the lease counts from when that beat was **sent**. An answer to a
    /// beat that is not remembered changes nothing, and an older answer never shortens the lease. Returns whether the
    /// lease holds now.
    pub fn renew(&mut self, now: BootTime, beat: Beat) -> bool {
        if let Some(sent) = self.sent_at(beat) {
            self.counted_from = Some(self.counted_from.map_or(sent, |before| before.max(sent)));
        }
        self.holds(now)
    }

    /// Whether a word that refers to this beat still counts: the beat was sent less than a lease ago. What has lain on the
    /// link for longer is void, so that the source knows when it can be forgotten.
    pub fn is_fresh(&self, now: BootTime, beat: Beat) -> bool {
        self.sent_at(beat).is_some_and(|sent| now < sent.after(self.timings.duration))
    }

    fn sent_at(&self, beat: Beat) -> Option<BootTime> {
        self.sent.iter().find(|(number, _)| *number == beat).map(|&(_, sent)| sent)
    }

    /// Whether I/O may be acknowledged and the container may run.
    pub fn holds(&self, now: BootTime) -> bool {
        self.stop_at().is_some_and(|stop| now < stop)
    }

    /// When everything must stand still: the end of the lease less the margin.
    pub fn stop_at(&self) -> Option<BootTime> {
        self.counted_from.map(|from| from.after(self.timings.duration - self.timings.margin))
    }

    /// When the lease itself ends.
    pub fn ends_at(&self) -> Option<BootTime> {
        self.counted_from.map(|from| from.after(self.timings.duration))
    }

    /// How often to beat.
    pub fn beat_interval(&self) -> Duration {
        self.timings.beat
    }
}

/// The source's side: until when the destination may believe that it owns the disk.
#[derive(Clone, Debug)]
pub struct GrantedLease {
    timings: Timings,
    granted_at: BootTime,
}

impl GrantedLease {
    /// Granted at `now`. Also right after a restart of the source, which does not know when it last answered: the last
    /// answer was before `now`.
    pub fn new(timings: Timings, now: BootTime) -> Self {
        Self { timings, granted_at: now }
    }

    /// A beat is answered at `now`.
    pub fn grant(&mut self, now: BootTime) {
        self.granted_at = self.granted_at.max(now);
    }

    /// From when on the destination certainly stands still.
    pub fn safe_at(&self) -> BootTime {
        self.granted_at.after(self.timings.duration + self.timings.guard)
    }

    /// When a word that is given now, and refers to a beat that was heard before, is certainly void at the destination:
    /// see [`HeldLease::is_fresh`].
    pub fn void_at(timings: Timings, now: BootTime) -> BootTime {
        now.after(timings.duration + timings.guard)
    }

    /// How long until then; zero when it is so already.
    pub fn unsafe_for(&self, now: BootTime) -> Duration {
        self.safe_at().since(now)
    }

    /// When the lease itself ends.
    pub fn ends_at(&self) -> BootTime {
        self.granted_at.after(self.timings.duration)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(ms: u64) -> BootTime {
        BootTime::new(Duration::from_millis(ms))
    }

    #[test]
    fn the_defaults_do_not_contradict_each_other() {
        for seconds in [1, 2, 10, 30, 3600] {
            Timings::of(Duration::from_secs(seconds)).checked().unwrap();
        }
        assert!(Timings::of(Duration::from_millis(500)).checked().is_err());
        let no_guard = Timings { guard: Duration::ZERO, ..Timings::default() };
        assert!(no_guard.checked().is_err());
        // A peer may send anything.
        for odd in [
            Timings { beat: Duration::MAX, ..Timings::default() },
            Timings { margin: Duration::MAX, ..Timings::default() },
            Timings { guard: Duration::MAX, ..Timings::default() },
        ] {
            assert!(odd.checked().is_err(), "{odd:?}");
        }
    }

    #[test]
    fn a_lease_counts_from_when_the_beat_was_sent() {
        let mut lease = HeldLease::new(Timings::default(), Beat(1));
        assert!(!lease.holds(at(0)));
        let beat = lease.send_beat(at(1000));
        assert!(lease.renew(at(5000), beat));
        assert_eq!(lease.stop_at(), Some(at(9000)));
        assert!(lease.holds(at(8999)) && !lease.holds(at(9000)));
    }

    #[test]
    fn an_answer_that_comes_too_late_renews_nothing() {
        let mut lease = HeldLease::new(Timings::default(), Beat(1));
        let beat = lease.send_beat(at(1000));
        assert!(!lease.renew(at(60_000), beat));
        assert!(!lease.renew(at(60_000), Beat(99)));
    }

    #[test]
    fn a_word_is_void_a_lease_after_the_beat_that_it_refers_to() {
        let mut lease = HeldLease::new(Timings::default(), Beat(7));
        let beat = lease.send_beat(at(1000));
        assert_eq!(beat, Beat(7));
        assert!(lease.is_fresh(at(10_999), beat) && !lease.is_fresh(at(11_000), beat));
        assert!(!lease.is_fresh(at(1000), Beat(8)));
    }

    #[test]
    fn an_old_answer_does_not_shorten_the_lease() {
        let mut lease = HeldLease::new(Timings::default(), Beat(1));
        let first = lease.send_beat(at(0));
        let second = lease.send_beat(at(1000));
        lease.renew(at(1100), second);
        lease.renew(at(1200), first);
        assert_eq!(lease.ends_at(), Some(at(11_000)));
    }

    proptest! {
        /// Whatever is delayed, lost or reordered: the source never thinks it safe while the destination still runs,
        /// with clocks that drift against each other by up to 1 %.
        #[test]
        fn the_source_waits_longer_than_the_destination_runs(
            delays in proptest::collection::vec((0u64..3000, 0u64..20_000, any::<bool>()), 1..40),
            drift in -100i64..=100,
        ) {
            let timings = Timings::default();
            let source_clock = |ms: u64| at((ms as i64 + ms as i64 * drift / 10_000) as u64);
            let mut held = HeldLease::new(timings, Beat(1));
            let mut granted: Option<GrantedLease> = None;
            let mut now = 0;
            let mut answers: Vec<(u64, Beat)> = Vec::new();
            for (pause, travel, lost) in delays {
                now += pause;
                let beat = held.send_beat(at(now));
                let answered = now + travel / 2;
                match &mut granted {
                    Some(lease) => lease.grant(source_clock(answered)),
                    None => granted = Some(GrantedLease::new(timings, source_clock(answered))),
                }
                if !lost {
                    answers.push((now + travel, beat));
                }
            }
            answers.sort();
            for (arrives, beat) in answers {
                held.renew(at(arrives), beat);
            }
            if let (Some(stop), Some(granted)) = (held.stop_at(), granted) {
                let stop_ms = stop.since_boot().as_millis() as u64;
                prop_assert!(granted.safe_at() > source_clock(stop_ms));
            }
        }
    }
}
