//! Writing out while somebody writes, so that little is left to be made durable when the disk is frozen.
//!
//! While a disk waits for its handover it is made durable in rounds, and a write is answered only when no more than a
//! limit has been written since the round that runs began. The limit follows the rounds: each is to take [`ROUND`]. So
//! whenever the last write comes, what the freeze point has to wait for is the rest of one round and one more. The price
//! is the writer's: it goes at the pace of the disk, not at that of the memory, while the disk is prepared.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use super::lazy::LazyExport;
use crate::limits::{UNWRITTEN_MAX, UNWRITTEN_MIN};

/// What one round is to take at most, on a disk that can do it.
const ROUND: Duration = Duration::from_millis(2);
/// Little that was written waits this long for its round.
const INTERVAL: Duration = Duration::from_millis(100);
/// A round this short shows that the write-out has caught up with the writer.
const CAUGHT_UP: Duration = Duration::from_millis(10);
/// After so many rounds it will not any more: the disk is too slow for this writer.
const ROUNDS_MAX: u64 = 8;
/// How long a write waits at most: a slow disk makes the pause longer, not the writer stand still.
const HOLD_MAX: Duration = Duration::from_millis(100);
/// How long after a failure it is tried again.
const RETRY: Duration = Duration::from_millis(500);

/// See the module's documentation.
pub(super) struct Pace {
    on: AtomicBool,
    /// Bytes written since the last round began.
    unwritten: AtomicU64,
    /// At so many bytes a write waits for the next round; `u64::MAX`: none waits.
    limit: AtomicU64,
    /// The shortest round that had something to write out, in nanoseconds: what the disk takes however little it is.
    shortest: AtomicU64,
    /// A round may be due.
    written: Notify,
    rounds: watch::Sender<Rounds>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Rounds {
    /// Of this write-out.
    begun: u64,
    ended: u64,
    /// How long the last one took.
    took: Duration,
}

impl Rounds {
    fn is_caught_up(&self) -> bool {
        self.ended > 0 && self.took <= CAUGHT_UP
    }

    fn is_decided(&self) -> bool {
        self.is_caught_up() || self.ended >= ROUNDS_MAX
    }
}

impl Pace {
    pub(super) fn new() -> Pace {
        Pace {
            on: AtomicBool::new(false),
            unwritten: AtomicU64::new(0),
            limit: AtomicU64::new(u64::MAX),
            shortest: AtomicU64::new(u64::MAX),
            written: Notify::new(),
            rounds: watch::Sender::default(),
        }
    }

    /// So many bytes were written.
    #[inline]
    pub(super) fn wrote(&self, bytes: u64) {
        if self.on.load(Ordering::Relaxed) {
            let before = self.unwritten.fetch_add(bytes, Ordering::AcqRel);
            let due = self.limit.load(Ordering::Acquire) / 2;
            if before == 0 || (before < due && before + bytes >= due) {
                self.written.notify_one();
            }
        }
    }

    /// Whether a write that was done has to wait before it is answered.
    #[inline]
    pub(super) fn holds(&self) -> bool {
        self.on.load(Ordering::Relaxed) && self.unwritten.load(Ordering::Acquire) >= self.limit.load(Ordering::Acquire)
    }

    /// Waits until a round begins that covers what was written, for a bounded time.
    pub(super) async fn held(&self) {
        let mut rounds = self.rounds.subscribe();
        if self.holds() {
            // The sender lives as long as this.
            let _ = tokio::time::timeout(HOLD_MAX, rounds.wait_for(|_| !self.holds())).await;
        }
    }

    /// Waits until a round is worth its while.
    async fn due(&self) {
        while self.unwritten.load(Ordering::Acquire) == 0 {
            self.written.notified().await;
        }
        let enough = async {
            while self.unwritten.load(Ordering::Acquire) < self.limit.load(Ordering::Acquire) / 2 {
                self.written.notified().await;
            }
        };
        let _ = tokio::time::timeout(INTERVAL, enough).await;
    }

    /// Whether the write-out has caught up, or has shown that it will not.
    fn is_decided(&self) -> bool {
        self.rounds.borrow().is_decided()
    }

    /// A round begins; answers how much it writes out.
    fn begin(&self) -> u64 {
        let bytes = self.unwritten.swap(0, Ordering::AcqRel);
        self.rounds.send_modify(|rounds| rounds.begun += 1);
        bytes
    }

    /// What a round is to take. On a disk whose shortest takes longer (one that turns), half of it is for the bytes: a
    /// writer there keeps half of the disk's speed.
    fn target(&self) -> Duration {
        match self.shortest.load(Ordering::Acquire) {
            u64::MAX => ROUND,
            shortest => ROUND.max(Duration::from_nanos(shortest) * 2),
        }
    }

    /// A round has ended.
    fn end(&self, bytes: u64, took: Duration, paced: bool) {
        if bytes > 0 {
            self.shortest.fetch_min(took.as_nanos() as u64, Ordering::AcqRel);
        }
        if paced {
            let limit = match self.limit.load(Ordering::Acquire) {
                // The first round writes out what lay there before.
                u64::MAX => UNWRITTEN_MIN,
                limit => next_limit(limit, bytes, took, self.target()),
            };
            self.limit.store(limit, Ordering::Release);
        }
        self.rounds.send_modify(|rounds| *rounds = Rounds { ended: rounds.ended + 1, took, ..*rounds });
    }
}

/// The limit after a round of so many bytes: what would have taken as long as it is to take, in steps of a factor of two.
fn next_limit(limit: u64, bytes: u64, took: Duration, target: Duration) -> u64 {
    // Of less than half the limit a short round says nothing.
    if took <= target && bytes < limit / 2 {
        return limit;
    }
    let fitting = u128::from(bytes) * target.as_nanos() / took.as_nanos().max(1);
    let fitting = u64::try_from(fitting).unwrap_or(u64::MAX);
    fitting.clamp(limit / 2, limit * 2).clamp(UNWRITTEN_MIN, UNWRITTEN_MAX)
}

/// Ends the write-out when its future is dropped: whoever waits goes on.
struct Running(LazyExport);

impl Running {
    fn start(export: &LazyExport) -> Running {
        let pace = &export.inner.pace;
        pace.rounds.send_replace(Rounds::default());
        pace.shortest.store(u64::MAX, Ordering::SeqCst);
        pace.on.store(true, Ordering::SeqCst);
        Running(export.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let pace = &self.0.inner.pace;
        pace.on.store(false, Ordering::SeqCst);
        pace.limit.store(u64::MAX, Ordering::SeqCst);
        pace.rounds.send_modify(|_| {});
    }
}

impl LazyExport {
    /// Makes the disk durable again and again, for as long as this is polled; `paced`: and slows writers down to the
    /// disk's pace. One at a time.
    pub async fn write_out(self, paced: bool) {
        let running = Running::start(&self);
        let (inner, pace) = (&running.0.inner, &running.0.inner.pace);
        loop {
            let begun = Instant::now();
            let bytes = pace.begin();
            if let Err(errno) = inner.flusher.persist().await {
                let disk = &inner.name;
                tracing::warn!(disk, %errno, "the disk cannot be made durable, so it could not be handed over");
                // Nobody waits for what fails.
                pace.limit.store(u64::MAX, Ordering::Release);
                pace.rounds.send_modify(|_| {});
                tokio::time::sleep(RETRY).await;
                continue;
            }
            pace.end(bytes, begun.elapsed(), paced);
            // After a long round the next one shows whether the disk has caught up, also when nobody writes any more.
            if pace.is_decided() {
                pace.due().await;
            }
        }
    }

    /// Waits until the write-out that runs has caught up with the writers, or has shown that it will not; for at most
    /// `within`. Says whether it has caught up.
    pub async fn written_out(&self, within: Duration) -> bool {
        let mut rounds = self.inner.pace.rounds.subscribe();
        let decided = tokio::time::timeout(within, rounds.wait_for(Rounds::is_decided)).await;
        decided.is_ok_and(|rounds| rounds.is_ok_and(|rounds| rounds.is_caught_up()))
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Condvar, Mutex};

    use bytes::Bytes;
    use nbd::export::{Answer, Export};

    use super::super::testing::eventually;
    use super::*;
    use crate::store::{Durable, MemoryStore, Store};
    use crate::units::ByteRange;

    const MILLISECOND: Duration = Duration::from_millis(1);

    #[test]
    fn the_limit_follows_what_a_round_takes() {
        let limit = 4 * UNWRITTEN_MIN;
        assert_eq!(next_limit(limit, limit, ROUND * 4, ROUND), limit / 2, "by half at most");
        assert_eq!(next_limit(limit, limit, ROUND / 8, ROUND), limit * 2, "twofold at most");
        assert_eq!(next_limit(limit, limit, ROUND * 4 / 3, ROUND), limit * 3 / 4);
        assert_eq!(next_limit(limit, limit / 4, ROUND / 8, ROUND), limit, "too little to tell");
        assert_eq!(next_limit(UNWRITTEN_MIN, 1, ROUND * 100, ROUND), UNWRITTEN_MIN);
        assert_eq!(next_limit(UNWRITTEN_MAX, UNWRITTEN_MAX, MILLISECOND, ROUND), UNWRITTEN_MAX);
        assert_eq!(next_limit(limit, 0, Duration::ZERO, ROUND), limit);
    }

    #[test]
    fn a_disk_that_turns_is_written_to_at_half_its_speed() {
        // 20 ms for anything, and 100 bytes a microsecond.
        let took = |bytes: u64| MILLISECOND * 20 + Duration::from_micros(bytes / 100);
        let pace = Pace::new();
        pace.end(0, Duration::ZERO, true);
        for _ in 0..50 {
            let bytes = pace.limit.load(Ordering::SeqCst);
            pace.end(bytes, took(bytes), true);
        }
        let limit = pace.limit.load(Ordering::SeqCst);
        assert!((1_500_000..4_500_000).contains(&limit), "{limit}");
    }

    /// Memory whose syncs wait for permits.
    struct Slow {
        memory: MemoryStore,
        permits: Mutex<u64>,
        permitted: Condvar,
        failing: AtomicBool,
    }

    impl Slow {
        fn let_through(&self, syncs: u64) {
            *self.permits.lock().unwrap() += syncs;
            self.permitted.notify_all();
        }
    }

    impl Store for Slow {
        fn size(&self) -> u64 {
            self.memory.size()
        }
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            self.memory.read_at(offset, buffer)
        }
        fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.memory.write_at(offset, data)
        }
        fn write_zeroes(&self, range: ByteRange, no_hole: bool) -> io::Result<()> {
            self.memory.write_zeroes(range, no_hole)
        }
        fn discard(&self, range: ByteRange) -> io::Result<()> {
            self.memory.discard(range)
        }
        fn sync(&self) -> io::Result<Durable> {
            let permits = self.permits.lock().unwrap();
            let mut permits = self.permitted.wait_while(permits, |permits| *permits == 0).unwrap();
            *permits -= 1;
            if self.failing.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.memory.sync()
        }
        fn data_ranges(&self, from: u64, max: usize) -> io::Result<Option<Vec<ByteRange>>> {
            self.memory.data_ranges(from, max)
        }
    }

    /// An export that is written out, and its store.
    fn slow(permits: u64) -> (Arc<Slow>, LazyExport, tokio::task::JoinHandle<()>) {
        let store = Arc::new(Slow {
            memory: MemoryStore::new(4 * UNWRITTEN_MIN),
            permits: Mutex::new(permits),
            permitted: Condvar::new(),
            failing: AtomicBool::new(false),
        });
        let export = LazyExport::local_on("disk", store.clone(), false).unwrap();
        let task = tokio::spawn(export.clone().write_out(true));
        (store, export, task)
    }

    /// The same after a round that was short.
    async fn prepared() -> (Arc<Slow>, LazyExport, tokio::task::JoinHandle<()>) {
        let (store, export, task) = slow(1);
        let mut rounds = 1;
        ended(&export, rounds).await;
        // On a busy machine even memory may take its time.
        while !export.inner.pace.is_decided() {
            store.let_through(1);
            rounds += 1;
            ended(&export, rounds).await;
        }
        (store, export, task)
    }

    async fn ended(export: &LazyExport, rounds: u64) {
        eventually("the end of a round", || export.inner.pace.rounds.borrow().ended == rounds).await;
    }

    fn write(export: &LazyExport, bytes: u64) -> Answer<()> {
        export.write(0, Bytes::from(vec![1; bytes as usize]), false)
    }

    fn round(export: &LazyExport) -> u64 {
        export.inner.pace.rounds.borrow().begun
    }

    #[tokio::test]
    async fn a_write_beyond_the_limit_waits_for_the_next_round() {
        let (store, export, task) = prepared().await;
        let before = round(&export);
        assert!(matches!(write(&export, UNWRITTEN_MIN - 4096), Answer::Now(Ok(()))), "within the limit");
        // That was due, and its round does not end.
        eventually("a round", || round(&export) == before + 1).await;
        assert!(matches!(write(&export, UNWRITTEN_MIN - 4096), Answer::Now(Ok(()))), "counted from the round's begin");
        let Answer::Later(held) = write(&export, 4096) else { panic!("too much is not written out") };
        let mut held = tokio::spawn(held);
        assert!(tokio::time::timeout(20 * MILLISECOND, &mut held).await.is_err(), "it waits");
        store.let_through(2);
        held.await.unwrap().unwrap();
        assert_eq!(round(&export), before + 2);
        task.abort();
        let _ = task.await;
        store.let_through(10);
        assert!(matches!(write(&export, 3 * UNWRITTEN_MIN), Answer::Now(Ok(()))), "nobody waits afterwards");
    }

    #[tokio::test]
    async fn nobody_waits_for_ever_for_a_disk_that_stands_still() {
        let (store, export, task) = prepared().await;
        let Answer::Later(held) = write(&export, 2 * UNWRITTEN_MIN) else { panic!("it is too much") };
        held.await.unwrap();
        let Answer::Later(held) = write(&export, 2 * UNWRITTEN_MIN) else { panic!("it is too much") };
        let begun = Instant::now();
        held.await.unwrap();
        assert!(begun.elapsed() >= HOLD_MAX, "the second round could not begin");
        task.abort();
        store.let_through(10);
    }

    #[tokio::test]
    async fn nobody_waits_for_a_disk_that_fails() {
        let (store, export, task) = prepared().await;
        store.failing.store(true, Ordering::SeqCst);
        let Answer::Later(held) = write(&export, 2 * UNWRITTEN_MIN) else { panic!("it is too much") };
        store.let_through(10);
        held.await.unwrap();
        eventually("the failure", || export.inner.pace.limit.load(Ordering::SeqCst) == u64::MAX).await;
        assert!(matches!(write(&export, 2 * UNWRITTEN_MIN), Answer::Now(Ok(()))));
        task.abort();
    }

    #[tokio::test]
    async fn a_write_out_without_pace_slows_nobody_down() {
        let (store, export, task) = prepared().await;
        task.abort();
        let _ = task.await;
        let task = tokio::spawn(export.clone().write_out(false));
        let begun = || export.inner.pace.on.load(Ordering::SeqCst) && round(&export) == 1;
        eventually("its first round", begun).await;
        assert!(matches!(write(&export, 4 * UNWRITTEN_MIN), Answer::Now(Ok(()))));
        store.let_through(1);
        ended(&export, 1).await;
        assert!(matches!(write(&export, 4 * UNWRITTEN_MIN), Answer::Now(Ok(()))));
        // What was written is written out all the same.
        store.let_through(1);
        ended(&export, 2).await;
        task.abort();
    }

    #[tokio::test]
    async fn a_disk_is_written_out_when_a_round_is_short_and_not_when_all_are_long() {
        let export = LazyExport::local_on("disk", Arc::new(MemoryStore::new(4096)), false).unwrap();
        assert!(!export.written_out(20 * MILLISECOND).await, "nothing writes it out");
        let waits = tokio::spawn({
            let export = export.clone();
            async move { export.written_out(Duration::from_secs(30)).await }
        });
        let pace = &export.inner.pace;
        pace.end(0, CAUGHT_UP * 2, true);
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        pace.end(0, CAUGHT_UP, true);
        assert!(waits.await.unwrap());
        (0..ROUNDS_MAX).for_each(|_| pace.end(1 << 20, CAUGHT_UP * 2, true));
        assert!(!export.written_out(Duration::from_secs(30)).await);
    }

    #[tokio::test]
    async fn a_long_round_is_followed_by_another_although_nobody_writes() {
        let (store, export, task) = slow(0);
        eventually("the first round", || round(&export) == 1).await;
        // It takes longer than the bound, and nothing is left to be written out.
        tokio::time::sleep(2 * CAUGHT_UP).await;
        store.let_through(ROUNDS_MAX);
        eventually("a second round", || round(&export) >= 2).await;
        assert!(export.written_out(Duration::from_secs(30)).await || round(&export) >= ROUNDS_MAX);
        task.abort();
    }
}
