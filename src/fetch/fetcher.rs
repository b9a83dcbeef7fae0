//! The fetch queue with the map, the store and the waiters around it.
//!
//! The queue's lock is held for arithmetic only: never while bytes are written, never across an await. A landing writes
//! to the store between two short holds, and nobody can claim its blocks meanwhile.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, oneshot, watch};

use super::assemble::Fetched;
use super::lane::Carriage;
use super::queue::{Cargo, Carrier, ClaimId, Claimed, Class, FetchQueue, FlightId, Outgoing, Ticket};
use super::ranges::Ranges;
use super::stats::{FaultStats, PullCounters};
use super::traffic::{Share, Traffic};
use super::waiters::{Tell, Waiters};
use super::window::Window;
use super::write_out::Backlog;
use crate::limits::{BACKGROUND_CONNECTIONS, DEMAND_REST, DEMAND_WINDOW, MAX_FETCH, RETRY_MIN};
use crate::pull::{PullOrder, PullState};
use crate::store::Disk;
use crate::units::{BlockRange, ByteRange};

/// How many bytes are marked under one hold of the lock.
const KEEP_AT_ONCE: u64 = 64 << 20;

pub(super) struct State {
    pub(super) queue: FetchQueue,
    order: PullOrder,
    pub(super) waiters: Waiters,
    pub(super) window: Window,
    pub(super) backlog: Backlog,
    /// When the rate limit lets the next background request go.
    rate_next: Duration,
    /// The store took no bytes: when to try again, and why.
    pub(super) paused: Option<(Duration, io::Error)>,
    carriers: u64,
    share: Share,
}

/// See the module's documentation.
pub struct Fetcher {
    pub(super) disk: Arc<Disk>,
    state: Mutex<State>,
    traffic: Arc<Traffic>,
    started: Instant,
    background: AtomicBool,
    /// Bytes a second of background pull; 0 is no limit.
    rate: AtomicU64,
    demand_wake: Notify,
    /// The demand lane's connection, while it has one.
    demand: Mutex<Option<Arc<Carriage>>>,
    /// The background waits for the end of demand.
    pub(super) held_back: AtomicBool,
    background_wake: [Notify; BACKGROUND_CONNECTIONS],
    /// How many background lanes have a connection.
    connected: AtomicUsize,
    /// There is enough for a batch.
    pub(super) write_out_due: Notify,
    all_present: Notify,
    pull_state: watch::Sender<PullState>,
    /// Bytes fetched and skipped.
    pub counters: PullCounters,
    /// What readers waited.
    pub faults: Arc<FaultStats>,
}

/// What a lane shall do next.
pub(crate) enum Next {
    Send(Outgoing),
    /// Nothing, until something happens or this time comes.
    Wait(Option<Duration>),
}

/// Which lane asks for work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LaneKind {
    Demand,
    Background(usize),
}

impl Fetcher {
    /// Nothing flies until lanes ask for work.
    pub fn new(
        disk: Arc<Disk>,
        order: PullOrder,
        rate: Option<u64>,
        background: bool,
        traffic: Arc<Traffic>,
    ) -> Arc<Fetcher> {
        let max_flight = MAX_FETCH / disk.block_size.bytes();
        let state = State {
            queue: FetchQueue::new(max_flight),
            order,
            waiters: Waiters::default(),
            window: Window::default(),
            backlog: Backlog::default(),
            rate_next: Duration::ZERO,
            paused: None,
            carriers: 0,
            share: Share::default(),
        };
        let first = if background { PullState::Pulling } else { PullState::Off };
        Arc::new(Fetcher {
            disk,
            state: Mutex::new(state),
            started: traffic.started(),
            traffic,
            background: AtomicBool::new(background),
            rate: AtomicU64::new(rate.unwrap_or(0)),
            demand_wake: Notify::new(),
            demand: Mutex::default(),
            held_back: AtomicBool::new(false),
            background_wake: Default::default(),
            connected: AtomicUsize::new(0),
            write_out_due: Notify::new(),
            all_present: Notify::new(),
            pull_state: watch::Sender::new(first),
            counters: PullCounters::default(),
            faults: Arc::default(),
        })
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Waits until every block of a range is present or its bytes have come. Never fails: while the upstream is away, it
    /// waits. May be dropped at any time.
    pub async fn fetch(self: &Arc<Self>, blocks: BlockRange, class: Class) -> Fetched {
        let mut brought = Fetched::default();
        loop {
            let (sender, receiver) = oneshot::channel();
            let Ok(ticket) = self.ask(blocks, &brought, class, Tell::Task(sender)) else { return brought };
            brought.extend(Waiting { fetcher: self.clone(), ticket, receiver }.done().await);
            if brought.not_brought(blocks).is_empty() {
                return brought;
            }
        }
    }

    /// Has something done for a client when there is nothing left to wait for in a range, on whatever task that is seen:
    /// it must not wait. Some of it may be missing all the same (a local write has failed): then ask again. `None`: it was
    /// done already.
    pub fn fetch_then(&self, blocks: BlockRange, done: impl FnOnce(Fetched) + Send + 'static) -> Option<Ticket> {
        let asked = self.ask(blocks, &Fetched::default(), Class::Demand, Tell::Reader(Box::new(done)));
        asked.map_err(|tell| tell.tell(Fetched::default())).ok()
    }

    /// Asks for what is missing of a range and was not brought; gives `tell` back where that is nothing.
    fn ask(&self, blocks: BlockRange, brought: &Fetched, class: Class, tell: Tell) -> Result<Ticket, Tell> {
        let mut state = self.lock();
        let wanted = brought.not_brought(blocks);
        let missing: Ranges = wanted.into_iter().flat_map(|part| self.disk.map.missing_in(part)).collect();
        let Some(ticket) = state.queue.request(&missing, class) else { return Err(tell) };
        state.waiters.add(ticket, tell);
        if class == Class::Demand && self.background() {
            state.order.hint(blocks);
        }
        drop(state);
        self.send_demand();
        Ok(ticket)
    }

    /// Nobody waits for a ticket any more: what was to be done then is dropped.
    pub fn forget(&self, ticket: Ticket) {
        let mut state = self.lock();
        let told = state.waiters.forget(ticket);
        if told.is_some() {
            state.queue.cancel(ticket);
        }
        drop(state);
        // Only now: what it does then is its own affair.
        drop(told);
    }

    /// The same for all but tasks.
    pub fn forget_readers(&self) {
        let readers = self.lock().waiters.readers();
        readers.into_iter().for_each(|ticket| self.forget(ticket));
    }

    /// The missing blocks of a range if the source's map says of all of them that they are zero.
    pub fn missing_zeroes(&self, blocks: BlockRange) -> Option<Vec<BlockRange>> {
        let state = self.lock();
        let mut missing = Vec::new();
        for part in self.disk.map.missing_in(blocks) {
            if !state.order.is_zero(part) {
                return None;
            }
            missing.push(part);
        }
        Some(missing)
    }

    /// Claims blocks for a local write. While the guard lives no fetch lands on them.
    pub async fn claim(self: &Arc<Self>, blocks: BlockRange) -> ClaimGuard {
        loop {
            match self.try_claim(blocks) {
                Ok(guard) => return guard,
                Err(mut waiting) => {
                    waiting.done().await;
                }
            }
        }
    }

    /// The same at once, unless a landing must be waited for.
    pub fn try_claim(self: &Arc<Self>, blocks: BlockRange) -> Result<ClaimGuard, Waiting> {
        let mut state = self.lock();
        match state.queue.claim(blocks) {
            Claimed::Granted(id, finished) => {
                let served = state.waiters.finish(finished);
                drop(state);
                served.tell();
                Ok(ClaimGuard { fetcher: self.clone(), id })
            }
            Claimed::Wait(ticket) => {
                let (sender, receiver) = oneshot::channel();
                state.waiters.add(ticket, Tell::Task(sender));
                Err(Waiting { fetcher: self.clone(), ticket, receiver })
            }
        }
    }

    /// The store holds these bytes already, durably: what is missing of the whole blocks among them is present from now on.
    /// Where somebody writes, or a fetch lands, at this moment, the blocks are left to the pull.
    pub(crate) fn keep(&self, bytes: ByteRange) {
        let (block_size, size) = (self.disk.block_size, self.disk.size());
        for start in (bytes.start..bytes.end).step_by(KEEP_AT_ONCE as usize) {
            let part = ByteRange::new(start, bytes.end.min(start + KEEP_AT_ONCE));
            self.keep_blocks(block_size.inside(part, size));
        }
        self.note_present();
    }

    fn keep_blocks(&self, blocks: BlockRange) {
        let mut state = self.lock();
        if blocks.is_empty() || state.queue.is_claimed(blocks) {
            return;
        }
        // As if they were written here: no fetch lands on them any more, who waits for one is served from the store.
        let (claim, mut finished) = match state.queue.claim(blocks) {
            Claimed::Granted(claim, finished) => (claim, finished),
            Claimed::Wait(ticket) => return state.queue.cancel(ticket),
        };
        let missing: Vec<BlockRange> = self.disk.map.missing_in(blocks).collect();
        for part in missing {
            self.disk.map.set_present(part);
            let bytes = self.disk.block_size.bytes_of(part, self.disk.size()).len();
            self.counters.skipped_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        finished.extend(state.queue.release(claim));
        let served = state.waiters.finish(finished);
        drop(state);
        served.tell();
    }

    /// Switches the background pull on or off. What is in flight still arrives.
    pub fn set_background(&self, on: bool) {
        self.background.store(on, Ordering::Release);
        if *self.pull_state.borrow() != PullState::Complete {
            self.pull_state.send_replace(if on { PullState::Pulling } else { PullState::Off });
        }
        self.wake_background();
    }

    /// Whether the background pull is on.
    pub fn background(&self) -> bool {
        self.background.load(Ordering::Acquire)
    }

    /// Bytes a second of background pull from now on; `None`: as fast as it goes.
    pub fn set_rate(&self, rate: Option<u64>) {
        self.rate.store(rate.unwrap_or(0), Ordering::Release);
        self.lock().rate_next = Duration::ZERO;
        self.wake_background();
    }

    /// How the pull goes.
    pub fn pull_state(&self) -> watch::Receiver<PullState> {
        self.pull_state.subscribe()
    }

    /// Why the store takes no bytes, if it does not: text for people, and the system's error number.
    pub fn store_error(&self) -> Option<(String, i32)> {
        self.lock().paused.as_ref().map(|(_, why)| (why.to_string(), why.raw_os_error().unwrap_or(nix::libc::EIO)))
    }

    /// Whether the store took no bytes when it was last tried.
    pub(super) fn store_fails(&self) -> bool {
        self.lock().paused.is_some()
    }

    /// Ends when every block is present.
    pub async fn all_present(&self) {
        let notified = self.all_present.notified();
        if !self.disk.map.all_present() {
            notified.await;
        }
    }

    /// A local write made blocks present: it may have been the last.
    pub fn note_present(&self) {
        if self.disk.map.all_present() {
            self.all_present.notify_one();
        }
    }

    pub(crate) fn set_complete(&self) {
        self.pull_state.send_replace(PullState::Complete);
    }

    pub(crate) fn with_order<T>(&self, change: impl FnOnce(&mut PullOrder) -> T) -> T {
        change(&mut self.lock().order)
    }

    pub(super) fn with_backlog<T>(&self, change: impl FnOnce(&mut Backlog) -> T) -> T {
        change(&mut self.lock().backlog)
    }

    /// The demand lane has a connection, or has none any more.
    pub(crate) fn set_demand(&self, carriage: Option<Arc<Carriage>>) {
        *self.demand.lock().unwrap_or_else(PoisonError::into_inner) = carriage;
    }

    fn send_demand(&self) {
        let carriage = self.demand.lock().unwrap_or_else(PoisonError::into_inner).clone();
        // Without one the flights wait for the lane's next connection.
        if let Some(carriage) = carriage {
            carriage.send_demand();
        }
    }

    pub(crate) fn wake(&self, lane: LaneKind) -> &Notify {
        match lane {
            LaneKind::Demand => &self.demand_wake,
            LaneKind::Background(index) => &self.background_wake[index % BACKGROUND_CONNECTIONS],
        }
    }

    pub(crate) fn wake_background(&self) {
        self.background_wake.iter().for_each(Notify::notify_one);
    }

    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub(crate) fn deadline(&self, at: Duration) -> tokio::time::Instant {
        (self.started + at).into()
    }

    pub(crate) fn new_carrier(&self) -> Carrier {
        let mut state = self.lock();
        state.carriers += 1;
        Carrier(state.carriers)
    }

    /// A background lane has a connection, or has none any more.
    pub(crate) fn set_connected(&self, connected: bool) {
        if connected {
            self.connected.fetch_add(1, Ordering::Relaxed);
        } else {
            self.connected.fetch_sub(1, Ordering::Relaxed);
            self.wake_background();
        }
    }

    /// The next flight for a lane, whose connection has so many bytes in flight.
    pub(crate) fn next(&self, lane: LaneKind, carrier: Carrier, carried: u64, now: Duration) -> Next {
        let mut state = self.lock();
        let next = match lane {
            LaneKind::Demand => self.next_demand(&mut state, carrier, now),
            LaneKind::Background(index) => self.next_background(&mut state, index, carrier, carried, now),
        };
        if let Next::Send(Outgoing { cargo: Cargo::Bytes, class, .. }) = &next {
            let counter = if *class == Class::Background {
                &self.counters.background_fetches
            } else {
                &self.counters.demand_fetches
            };
            counter.fetch_add(1, Ordering::Relaxed);
        }
        self.tell(&mut state);
        next
    }

    /// The other pulls of the node see how this one stands.
    pub(super) fn tell(&self, state: &mut State) {
        let (demanding, flying) = (state.queue.in_flight(Class::Demand) > 0, self.background_flying(state));
        self.traffic.tell(&mut state.share, demanding, flying);
    }

    /// Bytes of background requests in flight.
    fn background_flying(&self, state: &State) -> u64 {
        state.queue.in_flight(Class::Background) * self.disk.block_size.bytes()
    }

    fn next_demand(&self, state: &mut State, carrier: Carrier, now: Duration) -> Next {
        let flying = state.queue.in_flight(Class::Demand) + state.queue.in_flight(Class::ReadAhead);
        if flying * self.disk.block_size.bytes() >= DEMAND_WINDOW {
            return Next::Wait(None);
        }
        match state.queue.poll(Class::Demand, carrier, now) {
            Some(flight) => {
                state.window.demanded(now);
                self.traffic.demanded(now);
                Next::Send(flight)
            }
            None => Next::Wait(state.queue.next_timeout()),
        }
    }

    fn next_background(&self, state: &mut State, lane: usize, carrier: Carrier, carried: u64, now: Duration) -> Next {
        if !self.background() {
            return Next::Wait(None);
        }
        let flying = self.background_flying(state);
        let demanded = state.queue.in_flight(Class::Demand) > 0;
        let elsewhere = self.traffic.demands() && !demanded;
        if let Some(at) = self.traffic.demanded_at() {
            state.window.demanded(at);
        }
        let mut room = state.window.room(now, demanded || elsewhere);
        if let Some((until, _)) = &state.paused {
            if now < *until {
                return Next::Wait(Some(*until));
            }
            // One request tries whether there is room again.
            room.window = 1;
        }
        if state.backlog.is_full() {
            return Next::Wait(None);
        }
        if state.queue.longest_in_the_air(now) > state.window.patience() {
            return Next::Wait(Some(now + DEMAND_REST));
        }
        // While clients fetch, one connection pulls: the other's thread is theirs.
        let is_spare = lane > 0 && room.piece < MAX_FETCH;
        // The connections share the window: who is answered is also the first to ask again, and would have all of it.
        let share = room.window / self.connected.load(Ordering::Relaxed).max(1) as u64;
        let has_its_share = room.piece == MAX_FETCH && carried > 0 && carried + room.piece > share;
        if is_spare || has_its_share || (flying > 0 && flying + room.piece > room.window) {
            self.held_back.store(true, Ordering::Release);
            // What ends elsewhere wakes nobody here.
            return Next::Wait(if elsewhere { Some(now + DEMAND_REST) } else { room.more_at });
        }
        // While a client waits, all pulls together have no more in front of it than one alone would have.
        let others = self.traffic.flying().saturating_sub(flying);
        if room.piece < MAX_FETCH && others > 0 && others + flying + room.piece > room.window {
            return Next::Wait(Some(now + DEMAND_REST));
        }
        if let Some(until) = self.traffic.closed_until(now) {
            return Next::Wait(Some(until));
        }
        let rate = self.rate.load(Ordering::Acquire);
        if rate > 0 && now < state.rate_next {
            return Next::Wait(Some(state.rate_next));
        }
        let longest = (room.piece / self.disk.block_size.bytes()).max(1);
        let mut passes = 0;
        loop {
            if let Some(flight) = state.queue.poll(Class::Background, carrier, now) {
                if flight.cargo == Cargo::Bytes {
                    let bytes = flight.range.len() * self.disk.block_size.bytes();
                    self.traffic.sent(now, bytes);
                    if rate > 0 {
                        state.rate_next =
                            state.rate_next.max(now) + Duration::from_secs_f64(bytes as f64 / rate as f64);
                    }
                }
                return Next::Send(flight);
            }
            match state.order.next(longest, &self.disk.map) {
                Some(step) => {
                    let missing: Vec<BlockRange> = self.disk.map.missing_in(step.range()).collect();
                    let zero = matches!(step, crate::pull::Step::Zero(_));
                    state.queue.background(&missing, if zero { Cargo::Zeroes } else { Cargo::Bytes });
                }
                // Something failed or was claimed on the way: once more, but not in a circle.
                None if passes == 0 && state.queue.is_idle() && !self.disk.map.all_present() => {
                    state.order.rewind();
                    passes += 1;
                }
                None if self.disk.map.all_present() => return Next::Wait(None),
                None => return Next::Wait(Some(state.queue.next_timeout().unwrap_or(now + RETRY_MIN))),
            }
        }
    }

    /// The upstream answered an error: again after a pause.
    pub(crate) fn refused(&self, id: FlightId) {
        let mut state = self.lock();
        state.queue.failed(id, self.now());
        self.tell(&mut state);
    }

    /// A connection is gone: its flights go over the next one.
    pub(crate) fn lost(&self, carrier: Carrier) {
        let mut state = self.lock();
        state.queue.lost(carrier);
        self.tell(&mut state);
        drop(state);
        self.demand_wake.notify_one();
        self.wake_background();
    }

    pub(super) fn set_pull_state(&self, new: PullState) {
        self.pull_state.send_if_modified(|state| *state != PullState::Complete && std::mem::replace(state, new) != new);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Fetcher {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        self.traffic.tell(&mut state.share, false, 0);
    }
}

/// Someone waits for a ticket; dropping it cancels the ticket.
pub struct Waiting {
    fetcher: Arc<Fetcher>,
    ticket: Ticket,
    receiver: oneshot::Receiver<Fetched>,
}

impl Waiting {
    /// Ends when there is nothing left to wait for.
    pub async fn done(&mut self) -> Fetched {
        (&mut self.receiver).await.unwrap_or_default()
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.fetcher.forget(self.ticket);
    }
}

/// A claim of blocks for a local write; the write's blocks must be marked present before it is dropped.
pub struct ClaimGuard {
    fetcher: Arc<Fetcher>,
    id: ClaimId,
}

impl Drop for ClaimGuard {
    fn drop(&mut self) {
        let mut state = self.fetcher.lock();
        let finished = state.queue.release(self.id);
        let served = state.waiters.finish(finished);
        drop(state);
        served.tell();
        self.fetcher.note_present();
    }
}
