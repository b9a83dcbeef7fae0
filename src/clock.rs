//! The one clock: time since boot, suspend included (CLOCK_BOOTTIME). Leases are counted on it.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::units::BootTime;

/// The time since this host's boot.
pub fn now() -> BootTime {
    // The clock exists on every Linux that can run this program, and reading it cannot fail.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map(|time| BootTime::new(Duration::from(time))).unwrap_or_default()
}

/// Waits until a point of that clock; a suspend in between counts as waited.
pub async fn sleep_until(until: BootTime) {
    // The runtime's clock stands still during suspend, so long waits are cut into pieces.
    const PIECE: Duration = Duration::from_secs(1);
    loop {
        let left = until.since(now());
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(PIECE)).await;
    }
}
