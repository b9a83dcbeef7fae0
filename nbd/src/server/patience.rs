//! Looking for the next request for a moment before the task sleeps.
//!
//! With one request at a time, most of a request's time is that the server's thread falls asleep and is woken again. So
//! where a client has been asking one thing after the other, its connection has itself polled again and again for some
//! microseconds, and lets other tasks and other threads run in between. It costs the processor for as long as such a client
//! is active, and nothing when it is not: what was looked for in vain is not looked for again for some time, which
//! doubles each time. One connection of the process does so at a time, on machines with more than one processor, and
//! only where the export has a thread of its own: another thread that watches the same sockets would be woken by each.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::limits::{SPIN_FIRST_PAUSE, SPIN_LONGEST_PAUSE, SPIN_TIME};

/// A client that asks again within this time may be one to wait for: the time that it takes to wake this thread is in it.
const SOON: Duration = Duration::from_micros(250);
/// So many requests in a row must have come so soon.
const STEADY: u32 = 8;
/// After so many successes, a failure is an accident.
const FORGIVEN: u32 = 16;
/// So many make up for all failures before.
const MENDED: u32 = 64;

/// Whether somebody in this process is waiting.
static WAITING: AtomicBool = AtomicBool::new(false);

/// The right to wait, which one connection has at a time.
pub(super) struct Turn<'a>(&'a AtomicBool);

impl<'a> Turn<'a> {
    fn take(turn: &'a AtomicBool) -> Option<Turn<'a>> {
        // Made only if it is free: a turn that is dropped is given back.
        (!turn.swap(true, Ordering::Acquire)).then(|| Turn(turn))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Whether and how long one connection looks.
pub(super) struct Patience {
    possible: bool,
    /// Requests in a row that came alone and soon.
    steady: u32,
    /// Requests in a row that came while it looked for them.
    met: u32,
    /// Since when there is nothing to do.
    idle_since: Option<Instant>,
    /// Until when it looks.
    looking: Option<(Instant, Turn<'static>)>,
    pause: Duration,
    not_before: Option<Instant>,
}

impl Patience {
    /// For a connection with a thread of its own, or without; where there is one processor, it never looks.
    pub(super) fn new(own_thread: bool) -> Patience {
        static PROCESSORS: OnceLock<usize> = OnceLock::new();
        let processors = *PROCESSORS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from));
        Patience::on(processors, own_thread)
    }

    fn on(processors: usize, own_thread: bool) -> Patience {
        Patience {
            possible: own_thread && processors > 1,
            steady: 0,
            met: 0,
            idle_since: None,
            looking: None,
            pause: SPIN_FIRST_PAUSE,
            not_before: None,
        }
    }

    /// Whether it may ever look.
    pub(super) fn is_possible(&self) -> bool {
        self.possible
    }

    /// There is nothing to do. Whether to look once more.
    pub(super) fn looks(&mut self, now: Instant) -> bool {
        self.looks_with(now, &WAITING)
    }

    fn looks_with(&mut self, now: Instant, turn: &'static AtomicBool) -> bool {
        self.idle_since.get_or_insert(now);
        match &self.looking {
            Some((until, _)) if now < *until => true,
            Some(_) => {
                self.missed(now);
                false
            }
            None if self.steady < STEADY || self.not_before.is_some_and(|time| now < time) => false,
            None => {
                self.looking = Turn::take(turn).map(|turn| (now + SPIN_TIME, turn));
                self.looking.is_some()
            }
        }
    }

    /// One request has come after [`Patience::looks`].
    pub(super) fn came(&mut self, now: Instant) {
        let soon = self.idle_since.take().is_some_and(|since| now.saturating_duration_since(since) <= SOON);
        self.steady = if soon { self.steady.saturating_add(1) } else { 0 };
        self.met = if self.looking.take().is_some() { self.met.saturating_add(1) } else { 0 };
        if self.met >= MENDED {
            self.pause = SPIN_FIRST_PAUSE;
        }
    }

    /// Nothing has come.
    fn missed(&mut self, now: Instant) {
        self.looking = None;
        if std::mem::take(&mut self.met) >= FORGIVEN {
            return;
        }
        self.steady = 0;
        self.not_before = Some(now + self.pause);
        self.pause = (self.pause * 2).min(SPIN_LONGEST_PAUSE);
    }

    /// The client does not ask one thing after the other, or there is other work.
    pub(super) fn busy(&mut self) {
        (self.steady, self.met, self.idle_since, self.looking) = (0, 0, None, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GAP: Duration = Duration::from_micros(20);

    /// A turn of the test's own.
    fn turn() -> &'static AtomicBool {
        Box::leak(Box::default())
    }

    fn patient() -> Patience {
        Patience::on(2, true)
    }

    /// A client that asks one thing after the other, from `now` on; when it was last answered, and how often it was
    /// looked for.
    fn asks(patience: &mut Patience, turn: &'static AtomicBool, mut now: Instant, times: u32) -> (Instant, u32) {
        let mut looked = 0;
        for _ in 0..times {
            looked += u32::from(patience.looks_with(now, turn));
            now += GAP;
            patience.came(now);
        }
        (now, looked)
    }

    #[test]
    fn a_steady_client_is_looked_for_and_a_slow_one_is_not() {
        let (turn, mut patience) = (turn(), patient());
        let (now, looked) = asks(&mut patience, turn, Instant::now(), 100);
        assert_eq!(looked, 100 - STEADY);
        assert!(patience.looks_with(now, turn) && patience.looks_with(now + SPIN_TIME - GAP, turn));
        patience.came(now + SOON + GAP);
        assert!(!patience.looks_with(now, turn), "the client was slow");
        patience.came(now);
        assert_eq!(asks(&mut patience, turn, now, STEADY).1, 1, "one was steady already");
        patience.busy();
        assert_eq!(asks(&mut patience, turn, now, STEADY).1, 0, "the client asked several things at once");
    }

    #[test]
    fn nobody_looks_on_one_processor_or_without_a_thread_of_its_own() {
        for (processors, own_thread) in [(1, true), (2, false)] {
            assert!(!Patience::on(processors, own_thread).is_possible());
        }
        assert!(Patience::on(2, true).is_possible());
    }

    #[test]
    fn one_looks_at_a_time() {
        let (turn, mut one, mut two) = (turn(), patient(), patient());
        let (now, _) = asks(&mut one, turn, Instant::now(), STEADY);
        assert!(one.looks_with(now, turn));
        assert_eq!(asks(&mut two, turn, now, 50).1, 0);
        one.busy();
        assert_eq!(asks(&mut two, turn, now, 50).1, 50);
        assert!(two.looks_with(now, turn) && !two.looks_with(now + SPIN_TIME, turn), "in vain");
        assert!(!turn.load(Ordering::Relaxed), "others may");
    }

    #[test]
    fn looking_in_vain_becomes_rare() {
        let (turn, mut patience, begin) = (turn(), patient(), Instant::now());
        let (mut now, mut in_vain) = (begin, 0);
        // Always soon, and never soon enough.
        while now < begin + Duration::from_secs(60) {
            if patience.looks_with(now, turn) {
                in_vain += 1;
                assert!(!patience.looks_with(now + SPIN_TIME, turn));
            }
            now += SPIN_TIME * 2;
            patience.came(now);
        }
        assert!((50..=75).contains(&in_vain), "{in_vain} times in a minute");
        // A client that has become steady again is forgiven.
        let (now, looked) = asks(&mut patience, turn, now + SPIN_LONGEST_PAUSE, MENDED + STEADY);
        assert!(looked >= MENDED);
        assert!(patience.looks_with(now, turn) && !patience.looks_with(now + SPIN_TIME, turn));
        assert!(patience.looks_with(now + SPIN_TIME, turn), "it was an accident");
        let later = now + SPIN_TIME * 2;
        assert!(!patience.looks_with(later, turn) && !patience.looks_with(later, turn));
        assert_eq!(patience.not_before, Some(later + SPIN_FIRST_PAUSE));
    }
}
