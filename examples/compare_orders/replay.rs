//! One trace, one order, one link: the destination in virtual time.

use std::collections::BTreeSet;
use std::time::Duration;

use lazy_migrate::block_map::BlockMap;
use lazy_migrate::fetch::queue::{Cargo, Carrier, Claimed, Class, FetchQueue, FlightId, Ticket};
use lazy_migrate::limits::{BACKGROUND_WINDOW_MAX, BACKGROUND_WINDOW_MIN, MAX_FETCH};
use lazy_migrate::pull::{Order, PullOrder, Step};
use lazy_migrate::tracker::Tracker;
use lazy_migrate::units::{BlockRange, BlockSize, ByteRange};

use crate::trace::Trace;

const BLOCK: BlockSize = BlockSize::DEFAULT;
const LINE: Carrier = Carrier(0);
/// Bytes a second of the link: 1 Gbit/s.
const RATE: u64 = 125_000_000;
/// Requests that are at most this far apart were made at once: nobody waited for the first before the second.
const AT_ONCE: Duration = Duration::from_micros(100);

/// What is compared.
#[derive(Clone, Copy)]
pub struct Plan {
    /// The order of the background pull, if there is one.
    pub order: Option<Order>,
    /// Whether a fault moves its neighbourhood to the front.
    pub hints: bool,
}

/// What an order left to wait for.
pub struct Left {
    /// Reads that had to fetch something, or to wait for what was under way.
    pub fetches: u64,
    /// How long the application waited altogether.
    pub stalled: Duration,
    /// When all was present, if there was a pull.
    pub complete: Option<Duration>,
}

/// See the module's documentation.
pub struct Replay {
    plan: Plan,
    map: BlockMap,
    queue: FetchQueue,
    order: PullOrder,
    round_trip: Duration,
    now: Duration,
    /// When the link has carried all that was sent.
    link_free: Duration,
    /// What arrives, by time.
    arrivals: BTreeSet<(Duration, FlightId)>,
    waiting: BTreeSet<Ticket>,
    complete: Option<Duration>,
}

impl Replay {
    /// At the handover: nothing is present, and the heat of the source's writes is known.
    pub fn new(trace: &Trace, plan: Plan, round_trip: Duration) -> Replay {
        let mut order = PullOrder::new(plan.order.unwrap_or_default(), BLOCK, trace.size);
        let tracker = Tracker::new(trace.size);
        // The first second is not the first of the clock: a word of 0 means never.
        let mut clock = Duration::from_secs(1);
        for write in &trace.source {
            clock += write.gap;
            tracker.record(clock, BLOCK.bytes_of(write.blocks, trace.size));
        }
        order.set_heat(&tracker.heat(clock));
        order.set_zero(zeroes(trace));
        Replay {
            plan,
            map: BlockMap::empty(BLOCK.count(trace.size)),
            queue: FetchQueue::new(MAX_FETCH / BLOCK.bytes()),
            order,
            round_trip,
            now: Duration::ZERO,
            link_free: Duration::ZERO,
            arrivals: BTreeSet::new(),
            waiting: BTreeSet::new(),
            complete: None,
        }
    }

    /// Replays what happens at the destination, and lets the pull come to its end.
    pub fn run(mut self, trace: &Trace) -> Left {
        let (mut fetches, mut stalled) = (0, Duration::ZERO);
        for access in &trace.destination {
            if access.gap > AT_ONCE {
                stalled += self.wait();
            }
            self.pass(access.gap);
            if access.writes {
                self.write(access.blocks);
            } else {
                fetches += u64::from(self.read(access.blocks));
            }
        }
        stalled += self.wait();
        while self.plan.order.is_some() && self.arrive() {}
        Left { fetches, stalled, complete: self.complete }
    }

    /// The application does something else for so long.
    fn pass(&mut self, time: Duration) {
        let until = self.now + time;
        self.send();
        while self.next_arrival().is_some_and(|at| at <= until) {
            self.arrive();
        }
        self.now = until;
    }

    /// The application waits for all that it asked for; answers how long.
    fn wait(&mut self) -> Duration {
        let begun = self.now;
        while !self.waiting.is_empty() && self.arrive() {}
        self.now - begun
    }

    /// Answers whether anything of it must be waited for.
    fn read(&mut self, blocks: BlockRange) -> bool {
        let missing: Vec<BlockRange> = self.map.missing_in(blocks).collect();
        let Some(ticket) = self.queue.request(&missing, Class::Demand) else { return false };
        self.waiting.insert(ticket);
        if self.plan.hints {
            self.order.hint(blocks);
        }
        self.send();
        true
    }

    /// Whole blocks: nothing is fetched.
    fn write(&mut self, blocks: BlockRange) {
        if let Claimed::Granted(claim, finished) = self.queue.claim(blocks) {
            self.map.set_dirty(blocks);
            self.map.set_present(blocks);
            let freed = self.queue.release(claim);
            self.finish(finished.into_iter().chain(freed));
        }
    }

    fn finish(&mut self, tickets: impl IntoIterator<Item = Ticket>) {
        tickets.into_iter().for_each(|ticket| {
            self.waiting.remove(&ticket);
        });
    }

    /// Sends what may be sent: all that somebody waits for, and as much in the background as the window lets through.
    fn send(&mut self) {
        while self.fly(Class::Demand) {}
        if self.plan.order.is_none() {
            return;
        }
        // What fills the link, and one request more, as the real window finds out; a quarter of it while somebody waits.
        let fill = (self.round_trip.as_secs_f64() * RATE as f64) as u64 + MAX_FETCH;
        let window = fill.clamp(BACKGROUND_WINDOW_MIN, BACKGROUND_WINDOW_MAX);
        let window = if self.waiting.is_empty() { window } else { (window / 4).max(BACKGROUND_WINDOW_MIN) };
        while self.queue.in_flight(Class::Background) * BLOCK.bytes() < window {
            if self.fly(Class::Background) {
                continue;
            }
            match self.order.next(MAX_FETCH / BLOCK.bytes(), &self.map) {
                Some(Step::Fetch(range)) => {
                    self.queue.background(&[range], Cargo::Bytes);
                }
                Some(Step::Zero(range)) => {
                    self.map.set_present(range);
                    self.note_complete();
                }
                None => break,
            }
        }
    }

    fn fly(&mut self, lane: Class) -> bool {
        let Some(flight) = self.queue.poll(lane, LINE, self.now) else { return false };
        let takes = Duration::from_secs_f64((flight.range.len() * BLOCK.bytes()) as f64 / RATE as f64);
        self.link_free = self.link_free.max(self.now + self.round_trip / 2) + takes;
        self.arrivals.insert((self.link_free + self.round_trip / 2, flight.id));
        true
    }

    fn next_arrival(&self) -> Option<Duration> {
        self.arrivals.first().map(|(at, _)| *at)
    }

    /// Time goes on to the next arrival; answers whether there was one.
    fn arrive(&mut self) -> bool {
        self.send();
        let Some((at, flight)) = self.arrivals.pop_first() else { return false };
        self.now = self.now.max(at);
        for part in self.queue.arrived(flight) {
            self.map.set_present(part);
        }
        let landed = self.queue.landed(flight);
        self.finish(landed.finished);
        self.note_complete();
        self.send();
        true
    }

    fn note_complete(&mut self) {
        if self.map.all_present() {
            self.complete.get_or_insert(self.now);
        }
    }
}

/// What lies between the data.
fn zeroes(trace: &Trace) -> Vec<ByteRange> {
    let mut zeroes = Vec::new();
    let mut at = 0;
    for data in &trace.data {
        let bytes = BLOCK.bytes_of(*data, trace.size);
        if at < bytes.start {
            zeroes.push(ByteRange::new(at, bytes.start));
        }
        at = bytes.end;
    }
    if at < trace.size {
        zeroes.push(ByteRange::new(at, trace.size));
    }
    zeroes
}
