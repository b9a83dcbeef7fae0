//! Who may do what at the moment.
//!
//! Every request asks the gate. A request that changes bytes holds a [`Pass`] while it does, and only then: never while
//! it waits for the upstream. So [`Gate::set`] can promise that, when it returns, nothing that was admitted before still
//! changes a byte: `set(ReadOnly)` and a flush are the freeze point. The acknowledgement is checked again: a write that
//! was done while the export was fenced is not acknowledged, it waits for the decision.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

use nbd::wire::Errno;
use tokio::sync::{Mutex, Notify, watch};

/// What is admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateMode {
    /// Everything.
    Open,
    /// Reads; changes are answered EPERM.
    ReadOnly,
    /// Nothing: requests wait until the mode changes. They do not fail.
    Held,
    /// Nothing: requests are answered ESHUTDOWN.
    Closed,
}

impl GateMode {
    fn from_bits(word: u64) -> GateMode {
        match word & 3 {
            0 => GateMode::Open,
            1 => GateMode::ReadOnly,
            2 => GateMode::Held,
            _ => GateMode::Closed,
        }
    }
}

/// Nanoseconds of a clock that goes on during suspend and that nobody sets.
pub type Clock = Arc<dyn Fn() -> i64 + Send + Sync>;

/// CLOCK_BOOTTIME. If it cannot be read, the end of time: then no lease is valid.
pub fn boottime_clock() -> Clock {
    Arc::new(|| match nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME) {
        Ok(time) => time.tv_sec().saturating_mul(1_000_000_000).saturating_add(time.tv_nsec()),
        Err(_) => i64::MAX,
    })
}

/// See the module's documentation.
pub struct Gate {
    /// The mode in the lowest two bits, above it a number that rises with every change.
    word: AtomicU64,
    /// Requests that hold a pass, by the lowest bit of the number under which they were admitted.
    passes: [AtomicU64; 2],
    /// Somebody waits for passes to end; spares every request the notification.
    draining: AtomicBool,
    drained: Notify,
    changed: watch::Sender<()>,
    setting: Mutex<()>,
    /// When the lease ends, by the clock; `i64::MAX`: there is none, and none is needed.
    deadline: AtomicI64,
    clock: Clock,
    when_closed: Option<Box<dyn Fn() + Send + Sync>>,
}

/// Why a request was not admitted at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// It waits: [`Gate::until_served`].
    Wait,
    /// It fails.
    Fail(Errno),
}

/// The permission to change bytes, for the time of its life.
pub(crate) struct Pass<'a> {
    gate: &'a Gate,
    slot: usize,
}

impl Gate {
    /// A gate in a mode, without a lease.
    pub fn new(mode: GateMode, clock: Clock) -> Gate {
        Gate {
            word: AtomicU64::new(mode as u64),
            passes: Default::default(),
            draining: AtomicBool::new(false),
            drained: Notify::new(),
            changed: watch::Sender::new(()),
            setting: Mutex::new(()),
            deadline: AtomicI64::new(i64::MAX),
            clock,
            when_closed: None,
        }
    }

    /// Has something done whenever it is closed: for readers who wait for the upstream, which may never answer again when
    /// the disk belongs to another. It must not wait. Who asks the gate after it has begun to wait is not forgotten: either
    /// it finds the gate closed, or it is seen by this.
    pub(crate) fn when_closed(self, work: impl Fn() + Send + Sync + 'static) -> Gate {
        Gate { when_closed: Some(Box::new(work)), ..self }
    }

    /// The mode now.
    pub fn mode(&self) -> GateMode {
        GateMode::from_bits(self.word.load(Ordering::SeqCst))
    }

    /// Changes the mode for all requests from now on, and waits until those that were admitted before have ended their
    /// changes. May be dropped: then the mode counts all the same, and only the waiting is given up.
    pub async fn set(&self, mode: GateMode) {
        let _one_at_a_time = self.setting.lock().await;
        self.draining.store(true, Ordering::SeqCst);
        let old = self.word.load(Ordering::SeqCst);
        let (slot, next) = (number(old) & 1, number(old).wrapping_add(1));
        // The mode counts from here on, also if the caller gives up waiting.
        self.word.store(number(old) << 2 | mode as u64, Ordering::SeqCst);
        self.changed.send_replace(());
        if let (GateMode::Closed, Some(work)) = (mode, &self.when_closed) {
            work();
        }
        // Passes of the change before last, if somebody gave up waiting for them: their slot is needed now.
        self.drain(1 - slot).await;
        self.word.store(next << 2 | mode as u64, Ordering::SeqCst);
        self.drain(slot).await;
        self.draining.store(false, Ordering::SeqCst);
    }

    /// Sets when the lease ends, in nanoseconds of the gate's clock; `i64::MAX` for no lease. A renewal lets what waited
    /// for it go on.
    pub fn set_deadline(&self, nanoseconds: i64) {
        self.deadline.store(nanoseconds, Ordering::SeqCst);
        self.changed.send_replace(());
    }

    /// Whether a request may be served, and an answer given, right now.
    #[inline]
    pub(crate) fn serve(&self) -> Result<(), Refusal> {
        match self.mode() {
            GateMode::Closed => Err(Refusal::Fail(Errno::ESHUTDOWN)),
            GateMode::Held => Err(Refusal::Wait),
            GateMode::Open | GateMode::ReadOnly if self.lease_ended() => Err(Refusal::Wait),
            GateMode::Open | GateMode::ReadOnly => Ok(()),
        }
    }

    /// Waits until a request may be served.
    pub(crate) async fn until_served(&self) -> Result<(), Errno> {
        // Mostly at once, and then nothing has to be heard.
        if self.serve().is_ok() {
            return Ok(());
        }
        let mut changed = self.changed.subscribe();
        loop {
            match self.serve() {
                Ok(()) => return Ok(()),
                Err(Refusal::Fail(errno)) => return Err(errno),
                // The sender lives as long as the gate.
                Err(Refusal::Wait) => changed.changed().await.map_err(|_| Errno::ESHUTDOWN)?,
            }
        }
    }

    /// Waits until nothing will be served here any more; for tasks that wait for the upstream meanwhile.
    pub(crate) async fn until_closed(&self) -> Errno {
        let mut changed = self.changed.subscribe();
        // The sender lives as long as the gate.
        while self.mode() != GateMode::Closed && changed.changed().await.is_ok() {}
        Errno::ESHUTDOWN
    }

    /// The permission to change bytes.
    #[inline]
    pub(crate) fn enter(&self) -> Result<Pass<'_>, Refusal> {
        loop {
            let word = self.word.load(Ordering::SeqCst);
            self.serve()?;
            if GateMode::from_bits(word) == GateMode::ReadOnly {
                return Err(Refusal::Fail(Errno::EPERM));
            }
            let pass = Pass { gate: self, slot: (number(word) & 1) as usize };
            self.passes[pass.slot].fetch_add(1, Ordering::SeqCst);
            // Admitted only if the mode is still the one that was looked at: otherwise a change may not wait for us.
            if self.word.load(Ordering::SeqCst) == word {
                return Ok(pass);
            }
        }
    }

    fn lease_ended(&self) -> bool {
        let deadline = self.deadline.load(Ordering::SeqCst);
        deadline != i64::MAX && (self.clock)() >= deadline
    }

    async fn drain(&self, slot: u64) {
        loop {
            let mut drained = std::pin::pin!(self.drained.notified());
            drained.as_mut().enable();
            if self.passes[slot as usize & 1].load(Ordering::SeqCst) == 0 {
                return;
            }
            drained.await;
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let left = self.gate.passes[self.slot].fetch_sub(1, Ordering::SeqCst) - 1;
        if left == 0 && self.gate.draining.load(Ordering::SeqCst) {
            self.gate.drained.notify_waiters();
        }
    }
}

fn number(word: u64) -> u64 {
    word >> 2
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn gate(mode: GateMode) -> Arc<Gate> {
        Arc::new(Gate::new(mode, Arc::new(|| 0)))
    }

    #[tokio::test]
    async fn a_change_waits_for_those_admitted_before_and_not_for_later_ones() {
        let gate = gate(GateMode::Open);
        let pass = gate.enter().ok().unwrap();
        let changer = gate.clone();
        let mut change = tokio::spawn(async move { changer.set(GateMode::ReadOnly).await });
        while gate.mode() == GateMode::Open {
            tokio::task::yield_now().await;
        }
        assert_eq!(gate.enter().err(), Some(Refusal::Fail(Errno::EPERM)));
        assert!(
            tokio::time::timeout(Duration::from_millis(30), &mut change).await.is_err(),
            "it must wait for the pass"
        );
        drop(pass);
        change.await.unwrap();
        gate.set(GateMode::Open).await;
        let _later = gate.enter().ok().unwrap();
    }

    #[tokio::test]
    async fn a_change_that_nobody_waited_for_loses_no_pass() {
        let gate = gate(GateMode::Open);
        let pass = gate.enter().ok().unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(5), gate.set(GateMode::Held)).await.is_err());
        let changer = gate.clone();
        let mut change = tokio::spawn(async move { changer.set(GateMode::ReadOnly).await });
        assert!(tokio::time::timeout(Duration::from_millis(30), &mut change).await.is_err());
        drop(pass);
        change.await.unwrap();
        assert_eq!(gate.mode(), GateMode::ReadOnly);
    }

    #[tokio::test]
    async fn a_change_counts_at_once_although_an_earlier_one_is_still_waited_for() {
        let gate = gate(GateMode::Open);
        let pass = gate.enter().ok().unwrap();
        for mode in [GateMode::Held, GateMode::Open, GateMode::ReadOnly, GateMode::Closed] {
            let set = tokio::time::timeout(Duration::from_millis(5), gate.set(mode)).await;
            assert!(set.is_err(), "{mode:?} must wait for the pass");
            assert_eq!(gate.mode(), mode);
        }
        drop(pass);
        gate.set(GateMode::Open).await;
        let _later = gate.enter().ok().unwrap();
    }

    #[tokio::test]
    async fn what_is_held_goes_on_when_the_gate_opens_and_fails_when_it_closes() {
        for (mode, wanted) in [(GateMode::Open, Ok(())), (GateMode::Closed, Err(Errno::ESHUTDOWN))] {
            let gate = gate(GateMode::Held);
            assert_eq!(gate.enter().err(), Some(Refusal::Wait));
            let waiter = gate.clone();
            let waiting = tokio::spawn(async move { waiter.until_served().await });
            gate.set(mode).await;
            assert_eq!(waiting.await.unwrap(), wanted);
        }
    }

    #[tokio::test]
    async fn nothing_is_acknowledged_after_the_lease_until_it_is_renewed() {
        let now = Arc::new(AtomicI64::new(10));
        let clock = now.clone();
        let gate = Arc::new(Gate::new(GateMode::Open, Arc::new(move || clock.load(Ordering::SeqCst))));
        gate.set_deadline(20);
        assert_eq!(gate.serve(), Ok(()));
        now.store(20, Ordering::SeqCst);
        assert_eq!(gate.serve(), Err(Refusal::Wait));
        let waiter = gate.clone();
        let waiting = tokio::spawn(async move { waiter.until_served().await });
        gate.set_deadline(30);
        assert_eq!(waiting.await.unwrap(), Ok(()));
    }
}
