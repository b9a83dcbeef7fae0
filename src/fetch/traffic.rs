//! What the pulls of one node know of each other: they share its links, so what one client waits for goes before what any
//! of them pulls, and a limit is for all of them together. Times are since the start that all of them count from.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Shared by the [`Fetcher`](super::Fetcher)s of a node; one that is alone has one of its own.
#[derive(Debug)]
pub struct Traffic {
    started: Instant,
    /// Bytes a second of background pull; 0 is no limit.
    rate: u64,
    /// When the limit lets the next background request go.
    next: Mutex<Duration>,
    /// How many disks have a client that waits.
    demanding: AtomicUsize,
    /// When the latest demand fetch was sent: nanoseconds, and one; 0 is never.
    demanded_at: AtomicU64,
    /// Bytes of background requests that are not answered.
    flying: AtomicU64,
}

/// What one pull has told of itself.
#[derive(Debug, Default)]
pub(super) struct Share {
    demanding: bool,
    flying: u64,
}

impl Default for Traffic {
    fn default() -> Self {
        Traffic::new(None)
    }
}

impl Traffic {
    /// With a limit in bytes a second for the background of all together.
    pub fn new(rate: Option<u64>) -> Self {
        Self {
            started: Instant::now(),
            rate: rate.unwrap_or(0),
            next: Mutex::default(),
            demanding: AtomicUsize::new(0),
            demanded_at: AtomicU64::new(0),
            flying: AtomicU64::new(0),
        }
    }

    /// What all times count from.
    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// A demand fetch is sent.
    pub(super) fn demanded(&self, now: Duration) {
        self.demanded_at.store(now.as_nanos() as u64 + 1, Ordering::Relaxed);
    }

    /// When the latest one was, of any disk.
    pub(super) fn demanded_at(&self) -> Option<Duration> {
        self.demanded_at.load(Ordering::Relaxed).checked_sub(1).map(Duration::from_nanos)
    }

    /// Whether a client of any disk waits.
    pub(crate) fn demands(&self) -> bool {
        self.demanding.load(Ordering::Relaxed) > 0
    }

    /// Bytes of background requests in flight, of all disks.
    pub(super) fn flying(&self) -> u64 {
        self.flying.load(Ordering::Relaxed)
    }

    /// One of the pulls stands so now.
    pub(super) fn tell(&self, share: &mut Share, demanding: bool, flying: u64) {
        if share.demanding != demanding {
            let one = if demanding { 1 } else { usize::MAX };
            self.demanding.fetch_add(one, Ordering::Relaxed);
        }
        if share.flying != flying {
            self.flying.fetch_add(flying.wrapping_sub(share.flying), Ordering::Relaxed);
        }
        *share = Share { demanding, flying };
    }

    /// Until when nothing may be sent, for the limit's sake.
    pub(super) fn closed_until(&self, now: Duration) -> Option<Duration> {
        let next = *self.next.lock().unwrap_or_else(PoisonError::into_inner);
        (self.rate > 0 && now < next).then_some(next)
    }

    /// A background request of so many bytes is sent.
    pub(super) fn sent(&self, now: Duration, bytes: u64) {
        if self.rate > 0 {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            *next = next.max(now) + Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_limit_is_for_all_together() {
        let traffic = Traffic::new(Some(1000));
        let mut sent = 0;
        for ms in 0..10_000 {
            // Twenty pulls, each of which would send all the time.
            for _ in 0..20 {
                if traffic.closed_until(MS * ms).is_none() {
                    traffic.sent(MS * ms, 50);
                    sent += 50;
                }
            }
        }
        assert!((9_900..=10_100).contains(&sent), "{sent} bytes in 10 s at 1000 a second");
        assert_eq!(Traffic::new(None).closed_until(MS), None);
    }

    #[test]
    fn what_the_pulls_tell_adds_up_and_goes_with_them() {
        let traffic = Traffic::default();
        let (mut one, mut two) = (Share::default(), Share::default());
        traffic.tell(&mut one, true, 100);
        traffic.tell(&mut two, true, 50);
        traffic.tell(&mut one, true, 70);
        assert_eq!((traffic.demands(), traffic.flying()), (true, 120));
        traffic.tell(&mut one, false, 0);
        assert_eq!((traffic.demands(), traffic.flying()), (true, 50));
        traffic.tell(&mut two, false, 0);
        assert_eq!((traffic.demands(), traffic.flying()), (false, 0));
        assert_eq!(traffic.demanded_at(), None);
        traffic.demanded(Duration::ZERO);
        assert_eq!(traffic.demanded_at(), Some(Duration::ZERO));
    }
}
