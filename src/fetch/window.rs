//! How much background pull is in flight: enough to fill the link, little enough that a demand fetch does not queue
//! behind it. Pure.

use std::time::Duration;

use crate::limits::{
    BACKGROUND_CONNECTIONS, BACKGROUND_PIECE_MAX, BACKGROUND_PIECE_MIN, BACKGROUND_PIECE_TIME, BACKGROUND_QUEUE_DELAY,
    BACKGROUND_WINDOW_MAX, BACKGROUND_WINDOW_MIN, BACKGROUND_WINDOW_START, DEMAND_REST, DEMAND_STALL, MAX_FETCH,
};

/// How often the path is measured anew.
const PROBE_EVERY: Duration = Duration::from_secs(30);

/// When it is measured for the first time. Until then the first answer stands for it, in front of which nothing queued but
/// its own kind: a long link would stand idle for a round trip, in which a short disk is pulled.
const PROBE_FIRST: Duration = Duration::from_secs(1);

/// The shortest time over which a rate is measured.
const RATE_OVER: Duration = Duration::from_millis(5);

/// The window of bytes in flight. It grows while replies take about as long as one alone takes, and shrinks when they
/// queue. What one alone takes is measured by sending one alone, soon after the start and now and then: on a path that is
/// always full nothing else shows it.
///
/// While clients fetch, what is in flight is no more than the link itself holds (its rate times its delay) and two short
/// requests: nothing queues in front of a fetch.
#[derive(Debug)]
pub struct Window {
    bytes: u64,
    /// One request is alone in the air since then.
    probing: Option<Duration>,
    /// When to measure again, once something was answered.
    probe_at: Option<Duration>,
    alone: Option<Duration>,
    /// How many bytes had passed the link when the answer came from which that is known, itself included.
    passed: u64,
    shrunk_at: Option<Duration>,
    /// Bytes that came since then.
    counted: u64,
    counted_since: Duration,
    /// The best rate of late, in bytes a second.
    rate: f64,
    /// When the latest demand fetch was seen.
    demand_at: Option<Duration>,
}

/// What may be sent now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes in flight, at most.
    pub window: u64,
    /// Bytes of one request, at most.
    pub piece: u64,
    /// Then there may be more room although nothing else happens.
    pub more_at: Option<Duration>,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            bytes: BACKGROUND_WINDOW_START,
            probing: None,
            probe_at: None,
            alone: None,
            // Before the first measurement there is one from each connection.
            passed: BACKGROUND_CONNECTIONS as u64 * MAX_FETCH,
            shrunk_at: None,
            counted: 0,
            counted_since: Duration::ZERO,
            rate: 0.0,
            demand_at: None,
        }
    }
}

impl Window {
    /// A client fetches.
    pub fn demanded(&mut self, now: Duration) {
        self.demand_at = Some(now);
    }

    /// How much may be in flight at `now`.
    pub fn room(&self, now: Duration, demand_waits: bool) -> Room {
        let rested_at = self.demand_at.map(|at| at + DEMAND_REST).filter(|at| now < *at);
        if demand_waits || rested_at.is_some() {
            let piece = self.piece();
            let window = self.held_by_the_link().min(self.bytes) + 2 * piece;
            return Room { window, piece, more_at: rested_at.filter(|_| !demand_waits) };
        }
        let window = if self.probing.is_some() { BACKGROUND_WINDOW_MIN } else { self.bytes };
        Room { window, piece: MAX_FETCH, more_at: None }
    }

    /// A request of `bytes` was answered at `now`, `took` after it was sent.
    pub fn answered(&mut self, now: Duration, took: Duration, bytes: u64) {
        let sent = now.saturating_sub(took);
        self.count(now, bytes);
        if bytes < MAX_FETCH / 2 {
            // A short one takes less, and says nothing of those that count.
            return;
        }
        if let Some(since) = self.probing {
            if sent >= since {
                (self.probing, self.probe_at) = (None, Some(now + PROBE_EVERY));
                (self.alone, self.passed) = (Some(took), bytes);
            }
            return;
        }
        if now >= *self.probe_at.get_or_insert(now + PROBE_FIRST) {
            self.probing = Some(now);
            return;
        }
        let alone = self.alone.unwrap_or(took).min(took);
        self.alone = Some(alone);
        if took <= alone + BACKGROUND_QUEUE_DELAY.max(alone / 2) {
            // Twice as much after each round until something queues, then a little more each time.
            let more = if self.shrunk_at.is_none() { bytes } else { bytes / 4 };
            self.bytes = (self.bytes + more).min(BACKGROUND_WINDOW_MAX);
        } else if self.shrunk_at.is_none_or(|at| sent >= at) {
            // Once for each round: what is in flight was sent under the old window.
            self.bytes = (self.bytes / 4 * 3).max(BACKGROUND_WINDOW_MIN);
            self.shrunk_at = Some(now);
        }
    }

    fn count(&mut self, now: Duration, bytes: u64) {
        self.counted += bytes;
        let over = now.saturating_sub(self.counted_since);
        if over >= RATE_OVER.max(self.alone.unwrap_or_default()) {
            let rate = self.counted as f64 / over.as_secs_f64();
            self.rate = rate.max(self.rate * 0.9);
            (self.counted, self.counted_since) = (0, now);
        }
    }

    /// A fetch that has had no answer for so long does not get through: the path drops it, for the pull has filled it.
    pub fn patience(&self) -> Duration {
        let delay = if self.rate > 0.0 { self.held_by_the_link() as f64 / self.rate } else { 0.0 };
        DEMAND_STALL + 2 * Duration::from_secs_f64(delay)
    }

    /// Short enough to be no obstacle.
    fn piece(&self) -> u64 {
        let carried = (self.rate * BACKGROUND_PIECE_TIME.as_secs_f64()) as u64;
        if carried == 0 { BACKGROUND_PIECE_MAX } else { carried.clamp(BACKGROUND_PIECE_MIN, BACKGROUND_PIECE_MAX) }
    }

    /// Bytes that are on their way when nothing queues: rate times delay, the delay without the time that the bytes took to
    /// pass by which it was measured.
    fn held_by_the_link(&self) -> u64 {
        let alone = self.alone.unwrap_or_default().as_secs_f64();
        (self.rate * alone - self.passed as f64).max(0.0) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const MINUTES: Duration = Duration::from_secs(600);

    /// A link of `rate` bytes a millisecond and a fixed delay, kept full by the window for a while; clients fetch from
    /// half of it on. Answers the window and its room under demand.
    fn settle(rate: u64, delay: Duration, length: Duration) -> (u64, Room) {
        let mut window = Window::default();
        let each = |bytes: u64| Duration::from_secs_f64(bytes as f64 / rate as f64 / 1000.0);
        let (mut now, mut free_at) = (Duration::ZERO, Duration::ZERO);
        let mut flying = std::collections::VecDeque::new();
        let mut bytes_flying = 0;
        while now < length {
            let demand = now > length / 2;
            let room = window.room(now, demand);
            while bytes_flying + room.piece <= room.window.max(room.piece) {
                free_at = free_at.max(now) + each(room.piece);
                flying.push_back((now, free_at + delay, room.piece));
                bytes_flying += room.piece;
            }
            if let Some((sent, done, bytes)) = flying.pop_front() {
                now = now.max(done);
                bytes_flying -= bytes;
                window.answered(now, now - sent, bytes);
            }
        }
        (window.bytes, window.room(now, true))
    }

    #[test]
    fn a_slow_link_gets_a_small_window_and_a_long_one_a_large() {
        let (slow, under_demand) = settle(10 << 10, MS, MINUTES);
        assert!(slow <= 6 << 20, "10 MB/s: {slow}");
        assert!(under_demand.window <= 128 << 10, "nothing may queue: {under_demand:?}");
        let (long, under_demand) = settle(100 << 10, MS * 200, MINUTES);
        assert!(long >= 16 << 20, "100 MB/s at 200 ms: {long}");
        assert!(under_demand.window >= 14 << 20, "the link holds 20 MB: {under_demand:?}");
    }

    #[test]
    fn a_long_link_is_full_after_a_few_rounds() {
        let (window, _) = settle(900 << 10, MS * 10, MS * 36);
        assert!(window >= 12 << 20, "{window}");
    }

    /// Two requests over each of two connections, which share a link of a megabyte a second: the first answers say what the
    /// link holds, which is nothing, although each of them took long.
    #[test]
    fn a_slow_link_is_known_by_its_first_answers() {
        let mut window = Window::default();
        for (at, took) in [(2100, 2100), (2110, 2110), (4200, 4200), (4210, 4210)] {
            window.answered(MS * at, MS * took, MAX_FETCH);
        }
        let under_demand = window.room(MS * 4211, true);
        assert!(under_demand.window <= 256 << 10, "a fetch waits a second behind a mebibyte: {under_demand:?}");
        assert!(window.patience() < DEMAND_STALL + MS * 200, "{:?}", window.patience());
    }

    #[test]
    fn demand_makes_it_small_and_for_a_while_after() {
        let mut window = Window { bytes: 8 << 20, probing: None, ..Window::default() };
        let full = Room { window: 8 << 20, piece: MAX_FETCH, more_at: None };
        let small = Room { window: 2 * BACKGROUND_PIECE_MAX, piece: BACKGROUND_PIECE_MAX, more_at: None };
        assert_eq!((window.room(MS, false), window.room(MS, true)), (full, small));
        window.demanded(MS);
        assert_eq!(window.room(MS * 2, false), Room { more_at: Some(MS + DEMAND_REST), ..small });
        assert_eq!(window.room(MS + DEMAND_REST, false), full);
    }
}
