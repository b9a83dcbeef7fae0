//! Looking for the next request for a moment before the task sleeps.
//!
//! With one request at a time, most of a request's time is that the server's thread falls asleep and is woken again. So
//! where a client has been asking one thing after the other, its connection looks again and again for some
//! microseconds, and lets other threads run in between. It costs the processor for as long as such a client is
//! active, and nothing when it is not: what was waited for in vain is not waited for again for some time, which
//! doubles each time. One connection of the process waits like that at a time, on machines with more than one
//! processor, and not for longer in one go than others on the same thread can do without it.
//!
//! [`Patience`] decides when; [`super::socket`] does it, below TLS.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::limits::{SPIN_FIRST_PAUSE, SPIN_LONGEST_PAUSE, SPIN_STRETCH};

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

/// Whether and how long one connection waits.
pub(super) struct Patience {
    /// How long at a time; zero: never.
    longest: Duration,
    /// Requests in a row that came alone and soon.
    steady: u32,
    /// Requests in a row that came while it waited.
    met: u32,
    /// Since when there is nothing to do.
    idle_since: Option<Instant>,
    /// When others on this thread last had their chance.
    stretch_since: Option<Instant>,
    pause: Duration,
    not_before: Option<Instant>,
}

impl Patience {
    /// For a connection whose waits take up to `longest`, and up to [`SPIN_STRETCH`] in any case; where there is one processor, it never waits.
    pub(super) fn new(longest: Duration) -> Patience {
        static PROCESSORS: OnceLock<usize> = OnceLock::new();
        let processors = *PROCESSORS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from));
        Patience::on(processors, longest)
    }

    fn on(processors: usize, longest: Duration) -> Patience {
        Patience {
            longest: if processors > 1 { longest.min(SPIN_STRETCH) } else { Duration::ZERO },
            steady: 0,
            met: 0,
            idle_since: None,
            stretch_since: None,
            pause: SPIN_FIRST_PAUSE,
            not_before: None,
        }
    }

    /// Whether it may ever wait.
    pub(super) fn is_possible(&self) -> bool {
        self.longest > Duration::ZERO
    }

    /// There is nothing to do. Until when to wait, and the right to it.
    pub(super) fn idle(&mut self, now: Instant) -> Option<(Instant, Turn<'static>)> {
        self.idle_with(now, &WAITING)
    }

    fn idle_with<'a>(&mut self, now: Instant, turn: &'a AtomicBool) -> Option<(Instant, Turn<'a>)> {
        self.idle_since.get_or_insert(now);
        if self.steady < STEADY || self.not_before.is_some_and(|time| now < time) {
            return None;
        }
        let turn = Turn::take(turn)?;
        Some((now + self.longest, turn))
    }

    /// One request has come after [`Patience::idle`]; `waited`: it was waited for.
    pub(super) fn came(&mut self, now: Instant, waited: bool) {
        let soon = self.idle_since.take().is_some_and(|since| now.saturating_duration_since(since) <= SOON);
        self.steady = if soon { self.steady.saturating_add(1) } else { 0 };
        self.met = if waited { self.met.saturating_add(1) } else { 0 };
        if self.met >= MENDED {
            self.pause = SPIN_FIRST_PAUSE;
        }
    }

    /// Nothing has come.
    pub(super) fn missed(&mut self, now: Instant) {
        self.stretch_since = None;
        if std::mem::take(&mut self.met) >= FORGIVEN {
            return;
        }
        self.steady = 0;
        self.not_before = Some(now + self.pause);
        self.pause = (self.pause * 2).min(SPIN_LONGEST_PAUSE);
    }

    /// The client does not ask one thing after the other.
    pub(super) fn busy(&mut self) {
        (self.steady, self.met, self.idle_since, self.stretch_since) = (0, 0, None, None);
    }

    /// Whether others on this thread must have their chance now. Once `true`, it is taken that they have it.
    pub(super) fn must_yield(&mut self, now: Instant) -> bool {
        let since = *self.stretch_since.get_or_insert(now);
        let must = now.saturating_duration_since(since) >= SPIN_STRETCH;
        if must {
            self.stretch_since = None;
        }
        must
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GAP: Duration = Duration::from_micros(20);

    /// A client that asks one thing after the other, from `now` on; when it was last answered.
    fn asks(patience: &mut Patience, turn: &AtomicBool, mut now: Instant, times: u32) -> (Instant, u32) {
        let mut waited = 0;
        for _ in 0..times {
            let wait = patience.idle_with(now, turn);
            waited += u32::from(wait.is_some());
            now += GAP;
            patience.came(now, wait.is_some());
        }
        (now, waited)
    }

    #[test]
    fn a_steady_client_is_waited_for_and_a_slow_one_is_not() {
        let (turn, now) = (AtomicBool::new(false), Instant::now());
        let mut patience = Patience::on(2, Duration::from_micros(50));
        let (now, waited) = asks(&mut patience, &turn, now, 100);
        assert_eq!(waited, 100 - STEADY);
        let (until, _turn) = patience.idle_with(now, &turn).unwrap();
        assert_eq!(until, now + Duration::from_micros(50));
        drop(_turn);
        patience.came(now + SOON + GAP, false);
        assert!(patience.idle_with(now, &turn).is_none(), "the client was slow");
        patience.came(now, false);
        assert_eq!(asks(&mut patience, &turn, now, STEADY).1, 1, "one was steady already");
        patience.busy();
        assert_eq!(asks(&mut patience, &turn, now, STEADY).1, 0, "the client asked several things at once");
    }

    #[test]
    fn nobody_waits_on_one_processor_or_where_it_is_switched_off() {
        for (processors, longest) in [(1, Duration::from_micros(50)), (2, Duration::ZERO)] {
            assert!(!Patience::on(processors, longest).is_possible());
        }
        assert!(Patience::on(2, Duration::from_micros(1)).is_possible());
    }

    #[test]
    fn one_waits_at_a_time() {
        let (turn, now) = (AtomicBool::new(false), Instant::now());
        let mut one = Patience::on(2, Duration::from_micros(50));
        let mut two = Patience::on(2, Duration::from_micros(50));
        let (now, _) = asks(&mut one, &turn, now, STEADY);
        let waiting = one.idle_with(now, &turn);
        assert!(waiting.is_some());
        assert_eq!(asks(&mut two, &turn, now, 50).1, 0);
        drop(waiting);
        assert_eq!(asks(&mut two, &turn, now, 50).1, 50);
    }

    #[test]
    fn waiting_in_vain_becomes_rare() {
        let turn = AtomicBool::new(false);
        let begin = Instant::now();
        let (mut now, mut in_vain) = (begin, 0);
        let mut patience = Patience::on(2, Duration::from_micros(50));
        // Always soon, and never soon enough.
        while now < begin + Duration::from_secs(60) {
            let wait = patience.idle_with(now, &turn);
            if wait.is_some() {
                in_vain += 1;
                patience.missed(now + Duration::from_micros(50));
            }
            now += Duration::from_micros(100);
            patience.came(now, false);
        }
        assert!((50..=75).contains(&in_vain), "{in_vain} times in a minute");
        // A client that has become steady again is forgiven.
        let (now, waited) = asks(&mut patience, &turn, now + SPIN_LONGEST_PAUSE, MENDED + STEADY);
        assert!(waited >= MENDED);
        patience.missed(now);
        assert!(patience.idle_with(now, &turn).is_some(), "an accident");
        patience.missed(now);
        assert!(patience.idle_with(now, &turn).is_none());
        assert_eq!(patience.not_before, Some(now + SPIN_FIRST_PAUSE));
    }

    #[test]
    fn others_have_their_turn() {
        let now = Instant::now();
        let mut patience = Patience::on(2, Duration::from_micros(50));
        assert!(!patience.must_yield(now));
        assert!(!patience.must_yield(now + SPIN_STRETCH / 2));
        assert!(patience.must_yield(now + SPIN_STRETCH));
        assert!(!patience.must_yield(now + SPIN_STRETCH));
        assert!(patience.must_yield(now + SPIN_STRETCH * 2));
    }
}
