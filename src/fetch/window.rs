//! How much background pull is in flight: enough to fill the link, little enough that a demand fetch does not queue
//! behind it. Pure.

use std::time::Duration;

use crate::limits::{
    BACKGROUND_QUEUE_DELAY, BACKGROUND_WINDOW_MAX, BACKGROUND_WINDOW_MIN, BACKGROUND_WINDOW_START, MAX_FETCH,
};

/// How often the path is measured anew.
const PROBE_EVERY: Duration = Duration::from_secs(30);

/// The window of bytes in flight. It grows while replies take about as long as one alone takes, and shrinks when they
/// queue. What one alone takes is measured by sending one alone, at the start and now and then: on a path that is always
/// full nothing else shows it.
#[derive(Debug)]
pub struct Window {
    bytes: u64,
    /// One request is alone in the air since then.
    probing: Option<Duration>,
    measured_at: Duration,
    alone: Option<Duration>,
    shrunk_at: Duration,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            bytes: BACKGROUND_WINDOW_START,
            probing: Some(Duration::ZERO),
            measured_at: Duration::ZERO,
            alone: None,
            shrunk_at: Duration::ZERO,
        }
    }
}

impl Window {
    /// In bytes; a quarter of it (not less than one request) while a client waits for a fetch.
    pub fn bytes(&self, demand_waits: bool) -> u64 {
        match (self.probing, demand_waits) {
            (Some(_), _) => BACKGROUND_WINDOW_MIN,
            (None, true) => (self.bytes / 4).max(BACKGROUND_WINDOW_MIN),
            (None, false) => self.bytes,
        }
    }

    /// A request of `bytes` was answered at `now`, `took` after it was sent.
    pub fn answered(&mut self, now: Duration, took: Duration, bytes: u64) {
        let sent = now.saturating_sub(took);
        if let Some(since) = self.probing {
            if sent >= since && bytes >= MAX_FETCH / 2 {
                (self.probing, self.measured_at, self.alone) = (None, now, Some(took));
            }
            return;
        }
        if now >= self.measured_at + PROBE_EVERY {
            self.probing = Some(now);
            return;
        }
        let alone = self.alone.unwrap_or(took).min(took);
        self.alone = Some(alone);
        if took <= alone + BACKGROUND_QUEUE_DELAY.max(alone / 2) {
            self.bytes = (self.bytes + bytes / 4).min(BACKGROUND_WINDOW_MAX);
        } else if sent >= self.shrunk_at {
            // Once for each round: what is in flight was sent under the old window.
            self.bytes = (self.bytes / 4 * 3).max(BACKGROUND_WINDOW_MIN);
            self.shrunk_at = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A link of `rate` bytes a millisecond and a fixed delay, kept full by the window for ten minutes.
    fn settle(rate: u64, delay: Duration) -> u64 {
        let mut window = Window::default();
        let each = MS * ((1 << 20) / rate).max(1) as u32;
        let (mut now, mut flying, mut free_at) = (Duration::ZERO, std::collections::VecDeque::new(), Duration::ZERO);
        while now < Duration::from_secs(600) {
            while (flying.len() as u64) << 20 < window.bytes(false) {
                free_at = free_at.max(now) + each;
                flying.push_back((now, free_at + delay));
            }
            if let Some((sent, done)) = flying.pop_front() {
                now = now.max(done);
                window.answered(now, now - sent, 1 << 20);
            }
        }
        window.bytes
    }

    #[test]
    fn a_slow_link_gets_a_small_window_and_a_long_one_a_large() {
        let slow = settle(10 << 10, MS);
        assert!(slow <= 6 << 20, "10 MB/s: {slow}");
        let long = settle(100 << 10, MS * 200);
        assert!(long >= 16 << 20, "100 MB/s at 200 ms: {long}");
    }

    #[test]
    fn demand_makes_it_smaller_but_never_nothing() {
        let window = Window { bytes: 8 << 20, probing: None, ..Window::default() };
        assert_eq!((window.bytes(false), window.bytes(true)), (8 << 20, 2 << 20));
        assert_eq!(Window { bytes: BACKGROUND_WINDOW_MIN, ..window }.bytes(true), BACKGROUND_WINDOW_MIN);
    }
}
