//! What `status` shows of an export's data.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nbd::wire::Errno;
use serde::{Deserialize, Serialize};

use crate::fetch::FaultSummary;
use crate::pull::PullState;
use crate::upstream::UpstreamStatus;

/// The data plane of one export. Sizes in bytes, times as their names say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataStatus {
    /// The disk.
    pub size: u64,
    /// The unit of the map.
    pub block_size: u64,
    /// In the local store.
    pub present_bytes: u64,
    /// Written locally.
    pub dirty_bytes: u64,
    /// Still at the source.
    pub missing_bytes: u64,
    /// Come from the upstream so far, in this process.
    pub pulled_bytes: u64,
    /// Not sent, because they are known to be zeroes, in this process.
    pub skipped_bytes: u64,
    /// Requests to the upstream because a client waited.
    pub demand_fetches: u64,
    /// Requests to the upstream in the background.
    pub background_fetches: u64,
    /// Bytes a second that became present lately.
    pub pull_rate: u64,
    /// Until all is present, at that rate; none while nothing comes.
    pub eta_s: Option<u64>,
    /// What requests waited for missing blocks.
    pub faults: FaultSummary,
    /// All those waits together.
    pub stalled_us: u64,
    /// The upstream.
    pub upstream: UpstreamStatus,
    /// How the pull goes.
    pub pull: PullState,
    /// Why the store takes no more bytes, if so.
    pub paused_reason: Option<String>,
    /// Clients that are connected.
    pub clients: usize,
}

/// How fast blocks become present: a mean that forgets half in a few seconds.
#[derive(Default)]
pub(super) struct RateMeter(Mutex<Option<Sample>>);

struct Sample {
    at: Duration,
    bytes: u64,
    rate: f64,
}

impl RateMeter {
    /// `bytes` in all have become present by `now`. Called about every second.
    pub(super) fn sample(&self, now: Duration, bytes: u64) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let rate = match &*last {
            None => 0.0,
            Some(sample) => {
                let seconds = now.saturating_sub(sample.at).as_secs_f64();
                if seconds <= 0.0 {
                    return;
                }
                let fresh = bytes.saturating_sub(sample.bytes) as f64 / seconds;
                if sample.rate == 0.0 { fresh } else { sample.rate * 0.7 + fresh * 0.3 }
            }
        };
        *last = Some(Sample { at: now, bytes, rate });
    }

    /// Bytes a second.
    pub(super) fn rate(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map_or(0, |sample| sample.rate as u64)
    }
}

/// The protocol's error for one of the system.
pub(super) fn errno_of(error: &io::Error) -> Errno {
    match error.raw_os_error() {
        Some(nix::libc::ENOSPC | nix::libc::EDQUOT | nix::libc::EFBIG) => Errno::ENOSPC,
        Some(nix::libc::ENOMEM) => Errno::ENOMEM,
        Some(nix::libc::EPERM | nix::libc::EROFS | nix::libc::EBADF) => Errno::EPERM,
        _ => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_follows_what_comes_and_falls_when_nothing_does() {
        let meter = RateMeter::default();
        (0..20).for_each(|second| meter.sample(Duration::from_secs(second), second * 1000));
        assert_eq!(meter.rate(), 1000);
        (20..60).for_each(|second| meter.sample(Duration::from_secs(second), 19_000));
        assert_eq!(meter.rate(), 0);
    }
}
