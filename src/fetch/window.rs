//! How much background pull is in flight: enough to fill the link, little enough that a demand fetch does not queue
//! behind it. Pure.

use std::time::Duration;

use crate::limits::{BACKGROUND_QUEUE_DELAY, BACKGROUND_WINDOW_MAX, BACKGROUND_WINDOW_MIN, BACKGROUND_WINDOW_START};

/// After this time the fastest reply is looked for anew: the path may have changed.
const FORGET_FASTEST: Duration = Duration::from_secs(10);

/// The window of bytes in flight. It grows while replies come about as fast as the fastest, and shrinks when they queue.
#[derive(Debug)]
pub struct Window {
    bytes: u64,
    fastest: Option<(Duration, Duration)>,
    shrunk_at: Duration,
}

impl Default for Window {
    fn default() -> Self {
        Self { bytes: BACKGROUND_WINDOW_START, fastest: None, shrunk_at: Duration::ZERO }
    }
}

impl Window {
    /// In bytes; a quarter of it (not less than one request) while a client waits for a fetch.
    pub fn bytes(&self, demand_waits: bool) -> u64 {
        if demand_waits { (self.bytes / 4).max(BACKGROUND_WINDOW_MIN) } else { self.bytes }
    }

    /// A request of `bytes` was answered at `now`, `took` after it was sent.
    pub fn answered(&mut self, now: Duration, took: Duration, bytes: u64) {
        let fastest = match self.fastest {
            Some((since, fastest)) if fastest <= took && now < since + FORGET_FASTEST => fastest,
            _ => {
                self.fastest = Some((now, took));
                took
            }
        };
        if took <= fastest + BACKGROUND_QUEUE_DELAY.max(fastest / 2) {
            self.bytes = (self.bytes + bytes / 4).min(BACKGROUND_WINDOW_MAX);
        } else if now >= self.shrunk_at + took {
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

    /// A link of `rate` bytes a millisecond and a fixed delay, kept full by the window.
    fn settle(rate: u64, delay: Duration) -> u64 {
        let mut window = Window::default();
        let mut now = Duration::ZERO;
        for _ in 0..2000 {
            let took = delay + MS * (window.bytes(false) / rate) as u32;
            now += MS * ((1 << 20) / rate).max(1) as u32;
            window.answered(now, took.max(delay + MS * ((1 << 20) / rate) as u32), 1 << 20);
        }
        window.bytes(false)
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
        let window = Window::default();
        assert_eq!(window.bytes(true), BACKGROUND_WINDOW_START / 4);
        assert!(Window { bytes: BACKGROUND_WINDOW_MIN, ..window }.bytes(true) >= BACKGROUND_WINDOW_MIN);
    }
}
