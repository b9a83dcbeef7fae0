//! What is being fetched, for whom, and in which order: the pure heart of the demand path.
//!
//! A **flight** is one request to the upstream for missing blocks. No block is ever in two flights. A **ticket** is
//! someone who waits for flights. A **claim** is a local write to missing blocks that is going on: the flights over it
//! lose those blocks ("write wins"), and whoever wants to read them waits for the claim.
//!
//! ```text
//! request ─> Waiting ──poll──> Sent ──arrived──> Landing ──landed──> gone, tickets finish
//!               ^              │ ^ └─piece──> Writing
//!               │              │ └──put_down───┘ │
//!               └──────────────┴─────────────────┘
//!       failed (after a pause), connection lost (at once)
//! ```
//! While a flight is Writing or Landing nobody can claim its blocks: who wants to waits for the end of it, which takes no
//! longer than a write to the store.
//!
//! The caller holds a lock around it and calculates what is missing **under that lock**; present bits are set before
//! [`FetchQueue::landed`] and [`FetchQueue::release`] are called. Time is an argument: the time since some start.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use rustc_hash::FxHashMap;
use smallvec::SmallVec;

use super::ranges::{Ranges, intersects, subtract, subtract_each, without};
use crate::limits::{RETRY_MAX, RETRY_MIN};
use crate::units::{BlockIndex, BlockRange};

/// How urgent a fetch is; a later one is more urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// The puller wants it.
    Background,
    /// A client will probably want it.
    ReadAhead,
    /// A client waits for it.
    Demand,
}

/// Someone who waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// Nearly always one.
pub type Tickets = SmallVec<[Ticket; 2]>;

/// One request to the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlightId(u64);

/// One local write to missing blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ClaimId(u64);

/// The connection that a flight was sent over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Carrier(pub u64);

/// Where a flight's bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cargo {
    /// From the upstream.
    Bytes,
    /// They are known to be zeroes: nothing is sent.
    Zeroes,
}

/// A flight that is to be executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outgoing {
    /// Its name, for the answer.
    pub id: FlightId,
    /// The blocks.
    pub range: BlockRange,
    /// How.
    pub cargo: Cargo,
    /// How urgent.
    pub class: Class,
}

/// What came of a claim.
#[derive(Debug, PartialEq, Eq)]
pub enum Claimed {
    /// The blocks are the writer's until [`FetchQueue::release`]. Some tickets may have nothing left to wait for.
    Granted(ClaimId, Tickets),
    /// A flight is being written to the store right now: wait for the ticket, then look at the map again.
    Wait(Ticket),
}

/// Whom a landing serves.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Landed {
    /// All who waited for the flight: its bytes are for them.
    pub joined: Tickets,
    /// Those of them who have nothing left to wait for.
    pub finished: Tickets,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting {
        not_before: Duration,
    },
    Sent(Carrier),
    /// A piece of it is being written to the store; `orphaned`: its connection was lost meanwhile.
    Writing {
        carrier: Carrier,
        orphaned: bool,
    },
    Landing,
}

#[derive(Debug)]
struct Flight {
    range: BlockRange,
    class: Class,
    cargo: Cargo,
    state: State,
    sent: Duration,
    /// Blocks that a local write took away.
    lost: Ranges,
    /// Those of them that somebody wants, because the write has failed: they count again when the flight is sent anew.
    again: Ranges,
    tickets: Tickets,
    /// Writers who wait for the end of a write to the store.
    writers: Tickets,
    attempts: u32,
}

impl Flight {
    /// One that can be sent, for nobody yet.
    fn new(range: BlockRange, class: Class, cargo: Cargo, lost: Ranges) -> Flight {
        let (state, sent) = (State::Waiting { not_before: Duration::ZERO }, Duration::ZERO);
        let (again, tickets, writers) = (Ranges::new(), Tickets::new(), Tickets::new());
        Flight { range, class, cargo, state, sent, lost, again, tickets, writers, attempts: 0 }
    }

    /// The blocks that it will not bring, also when it is sent anew.
    fn lost_for_good(&self) -> Ranges {
        without(&self.lost, &self.again)
    }
}

#[derive(Debug)]
struct Waiter {
    /// What it asked for.
    wanted: Ranges,
    class: Class,
    /// How many flights and claims it still waits for.
    open: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct FetchQueue {
    max_flight: u64,
    flights: FxHashMap<FlightId, Flight>,
    by_start: BTreeMap<u64, FlightId>,
    ready: [VecDeque<FlightId>; 3],
    pausing: BTreeSet<(Duration, FlightId)>,
    claims: Vec<(ClaimId, BlockRange, Tickets)>,
    tickets: FxHashMap<Ticket, Waiter>,
    in_flight: [u64; 3],
    next_id: u64,
}

impl FetchQueue {
    /// An empty queue whose flights have at most `max_flight` blocks (at least 1).
    pub fn new(max_flight: u64) -> Self {
        Self {
            max_flight: max_flight.max(1),
            flights: FxHashMap::default(),
            by_start: BTreeMap::new(),
            ready: Default::default(),
            pausing: BTreeSet::new(),
            claims: Vec::new(),
            tickets: FxHashMap::default(),
            in_flight: [0; 3],
            next_id: 0,
        }
    }

    /// Someone waits for missing blocks, given as runs in order. Blocks in flight are joined (and made as urgent as
    /// this request where they have not been sent), claimed ones are waited for, all others make new flights. `None`
    /// when nothing is missing.
    pub fn request(&mut self, missing: &[BlockRange], class: Class) -> Option<Ticket> {
        missing.first()?;
        let ticket = self.new_ticket(missing.into(), class);
        self.plan(missing, class, Cargo::Bytes, Some(ticket));
        Some(ticket)
    }

    /// Makes background flights for the missing blocks that nobody has asked for yet; answers how many flights.
    pub fn background(&mut self, missing: &[BlockRange], cargo: Cargo) -> usize {
        self.plan(missing, Class::Background, cargo, None)
    }

    /// The next flight to send at `least` this urgent (for [`Class::Background`]: only background), if there is one.
    pub fn poll(&mut self, lane: Class, carrier: Carrier, now: Duration) -> Option<Outgoing> {
        self.wake(now);
        let classes: &[Class] =
            if lane == Class::Background { &[Class::Background] } else { &[Class::Demand, Class::ReadAhead] };
        for class in classes {
            while let Some(id) = self.ready[*class as usize].pop_front() {
                // An entry may be out of date: the flight was cut, claimed or promoted meanwhile.
                let Some(flight) = self.flights.get_mut(&id) else { continue };
                if flight.class != *class || !matches!(flight.state, State::Waiting { .. }) {
                    continue;
                }
                flight.state = State::Sent(carrier);
                flight.sent = now;
                self.in_flight[*class as usize] += flight.range.len();
                return Some(Outgoing { id, range: flight.range, cargo: flight.cargo, class: *class });
            }
        }
        None
    }

    /// Whether [`FetchQueue::poll`] may have something for a client right now.
    pub fn has_ready(&self) -> bool {
        [Class::Demand, Class::ReadAhead].iter().any(|class| !self.ready[*class as usize].is_empty())
    }

    /// When [`FetchQueue::poll`] may have something new although nothing else happens.
    pub fn next_timeout(&self) -> Option<Duration> {
        self.pausing.first().map(|(at, _)| *at)
    }

    /// The bytes of a flight are here. Answers the blocks that may be written to the store and then marked present;
    /// until [`FetchQueue::landed`] nobody can claim them. Empty for a flight that is not known (any more).
    pub fn arrived(&mut self, id: FlightId) -> Ranges {
        let Some(flight) = self.flights.get_mut(&id) else { return Ranges::new() };
        if let State::Sent(_) = flight.state {
            self.in_flight[flight.class as usize] -= flight.range.len();
        }
        flight.state = State::Landing;
        subtract(flight.range, &flight.lost)
    }

    /// Bytes of a flight are here before the rest, by this carrier. Answers the blocks that may be written to the store
    /// but not marked present, until [`FetchQueue::put_down`]; `None` where nothing may.
    pub fn piece(&mut self, id: FlightId, carrier: Carrier) -> Option<Ranges> {
        let flight = self.flights.get_mut(&id).filter(|flight| flight.state == State::Sent(carrier))?;
        flight.state = State::Writing { carrier, orphaned: false };
        Some(subtract(flight.range, &flight.lost))
    }

    /// The piece is written, or not. Answers who has nothing left to wait for.
    pub fn put_down(&mut self, id: FlightId) -> Tickets {
        let Some(flight) = self.flights.get_mut(&id) else { return Tickets::new() };
        let State::Writing { carrier, orphaned } = flight.state else { return Tickets::new() };
        flight.state = State::Sent(carrier);
        let writers = std::mem::take(&mut flight.writers);
        if orphaned {
            self.send_again(vec![id]);
        }
        writers.into_iter().filter(|ticket| self.settle(*ticket)).collect()
    }

    /// The landing is over, well or not: the flight is gone.
    pub fn landed(&mut self, id: FlightId) -> Landed {
        let Some(Flight { tickets: mut joined, writers, .. }) = self.remove(id) else { return Landed::default() };
        joined.retain(|ticket| self.tickets.contains_key(ticket));
        let mut finished = Tickets::new();
        for ticket in joined.iter().chain(&writers) {
            if self.settle(*ticket) {
                finished.push(*ticket);
            }
        }
        Landed { joined, finished }
    }

    /// The upstream could not answer: the flight is tried again after a pause that doubles.
    pub fn failed(&mut self, id: FlightId, now: Duration) {
        let Some(flight) = self.flights.get_mut(&id) else { return };
        let State::Sent(_) = flight.state else { return };
        self.in_flight[flight.class as usize] -= flight.range.len();
        flight.state = State::Waiting { not_before: now };
        if !self.is_worth_sending(id) {
            return;
        }
        let Some(flight) = self.flights.get_mut(&id) else { return };
        let pause = RETRY_MIN.saturating_mul(1 << flight.attempts.min(16)).min(RETRY_MAX);
        flight.attempts += 1;
        flight.state = State::Waiting { not_before: now + pause };
        self.pausing.insert((now + pause, id));
    }

    /// A connection is gone: what it carried is sent again, before anything else of its class.
    pub fn lost(&mut self, carrier: Carrier) {
        let mut ids: Vec<(BlockIndex, FlightId)> = Vec::new();
        for (id, flight) in &mut self.flights {
            match &mut flight.state {
                State::Sent(by) if *by == carrier => ids.push((flight.range.start, *id)),
                State::Writing { carrier: by, orphaned } if *by == carrier => *orphaned = true,
                _ => {}
            }
        }
        ids.sort_by(|a, b| b.cmp(a));
        self.send_again(ids.into_iter().map(|(_, id)| id).collect());
    }

    /// Flights that were sent go before anything else of their class; the last of these is the first.
    fn send_again(&mut self, ids: Vec<FlightId>) {
        for id in ids {
            if let Some(flight) = self.flights.get_mut(&id) {
                flight.state = State::Waiting { not_before: Duration::ZERO };
                self.in_flight[flight.class as usize] -= flight.range.len();
            }
            if self.is_worth_sending(id) {
                let class = self.flights[&id].class;
                self.ready[class as usize].push_front(id);
            }
        }
    }

    /// A flight is to be sent again: as urgently as anybody waits for it, or not at all where everything of it was written
    /// locally meanwhile.
    fn is_worth_sending(&mut self, id: FlightId) -> bool {
        let Some(flight) = self.flights.get_mut(&id) else { return false };
        flight.lost = flight.lost_for_good();
        flight.again.clear();
        if subtract(flight.range, &flight.lost).is_empty() {
            // Nobody waits for it: see `claim`.
            self.remove(id);
            return false;
        }
        let tickets = flight.tickets.clone();
        let class = self.urgency(&tickets);
        if let (Some(flight), Some(class)) = (self.flights.get_mut(&id), class) {
            flight.class = flight.class.max(class);
        }
        true
    }

    /// Whether a local write of some of these blocks is under way.
    pub fn is_claimed(&self, range: BlockRange) -> bool {
        self.claims.iter().any(|(_, claimed, _)| claimed.intersect(range).is_some())
    }

    /// A local write is about to change blocks of which some are missing.
    pub fn claim(&mut self, range: BlockRange) -> Claimed {
        let over = self.overlapping(range);
        let written = |id: &FlightId| matches!(self.flights[id].state, State::Writing { .. } | State::Landing);
        let writing: Vec<FlightId> = over.iter().copied().filter(written).collect();
        if !writing.is_empty() {
            let ticket = self.new_ticket(Ranges::from_slice(&[range]), Class::Demand);
            for id in writing {
                if let (Some(flight), Some(waiter)) = (self.flights.get_mut(&id), self.tickets.get_mut(&ticket)) {
                    flight.writers.push(ticket);
                    waiter.open += 1;
                }
            }
            return Claimed::Wait(ticket);
        }
        let mut finished = Tickets::new();
        for id in over {
            let Some(flight) = self.flights.get_mut(&id) else { continue };
            flight.lost.extend(flight.range.intersect(range));
            flight.again = without(&flight.again, &[range]);
            let (whole, lost) = (flight.range, flight.lost_for_good());
            let (waiting, tickets) =
                (matches!(flight.state, State::Waiting { .. }), std::mem::take(&mut flight.tickets));
            // Who wants nothing else of the flight waits for the claim instead: the flight may never be heard of again.
            let (kept, gone): (Tickets, Tickets) =
                tickets.into_iter().partition(|ticket| self.wants(*ticket, whole, &lost));
            finished.extend(gone.into_iter().filter(|ticket| self.settle(*ticket)));
            if let Some(flight) = self.flights.get_mut(&id) {
                flight.tickets = kept;
            }
            if waiting && subtract(whole, &lost).is_empty() {
                self.remove(id);
            }
        }
        let id = ClaimId(self.id());
        self.claims.push((id, range, Tickets::new()));
        Claimed::Granted(id, finished)
    }

    /// The write of a claim is over. If it wrote, the blocks were marked present before this; if not, whoever waited
    /// asks again. Answers who has nothing left to wait for.
    pub fn release(&mut self, id: ClaimId) -> Tickets {
        let Some(at) = self.claims.iter().position(|(claim, ..)| *claim == id) else { return Tickets::new() };
        let (_, _, tickets) = self.claims.swap_remove(at);
        tickets.into_iter().filter(|ticket| self.settle(*ticket)).collect()
    }

    /// Nobody waits for a ticket any more. Flights that were not sent and that nobody else waits for are dropped.
    pub fn cancel(&mut self, ticket: Ticket) {
        let Some(waiter) = self.tickets.remove(&ticket) else { return };
        let over: Vec<FlightId> = waiter.wanted.iter().flat_map(|range| self.overlapping(*range)).collect();
        for id in over {
            let Some(flight) = self.flights.get_mut(&id) else { continue };
            flight.tickets.retain(|joined| *joined != ticket);
            flight.writers.retain(|writer| *writer != ticket);
            let idle = flight.tickets.is_empty() && flight.class != Class::Background;
            if idle && matches!(flight.state, State::Waiting { .. }) {
                self.remove(id);
            }
        }
    }

    /// Blocks in flight of a class: sent, and neither arrived nor failed.
    pub fn in_flight(&self, class: Class) -> u64 {
        self.in_flight[class as usize]
    }

    /// How long the flight has been in the air that was sent first of those that somebody waits for.
    pub fn longest_in_the_air(&self, now: Duration) -> Duration {
        let flies = |flight: &Flight| matches!(flight.state, State::Sent(_) | State::Writing { .. });
        let wanted = self.flights.values().filter(|flight| flies(flight) && !flight.tickets.is_empty());
        wanted.map(|flight| now - flight.sent.min(now)).max().unwrap_or_default()
    }

    /// Nothing waits, flies or lands.
    pub fn is_idle(&self) -> bool {
        self.flights.is_empty()
    }

    /// How many wait for something.
    pub fn waiting(&self) -> usize {
        self.tickets.len()
    }

    fn plan(&mut self, missing: &[BlockRange], class: Class, cargo: Cargo, ticket: Option<Ticket>) -> usize {
        let mut made = 0;
        for run in missing {
            if let Some(ticket) = ticket {
                self.wait_for_claims(*run, ticket);
            }
            for free in subtract_each(*run, self.claims.iter().map(|(_, range, _)| *range)) {
                let over = self.overlapping(free);
                let gaps = subtract_each(free, over.iter().map(|id| self.flights[id].range));
                if let Some(ticket) = ticket {
                    for id in over {
                        self.join(id, free, class, ticket);
                    }
                }
                for gap in gaps {
                    made += self.launch(gap, class, cargo, ticket);
                }
            }
        }
        made
    }

    fn wait_for_claims(&mut self, run: BlockRange, ticket: Ticket) {
        for (_, range, tickets) in &mut self.claims {
            if intersects(*range, run) && !tickets.contains(&ticket) {
                tickets.push(ticket);
                if let Some(waiter) = self.tickets.get_mut(&ticket) {
                    waiter.open += 1;
                }
            }
        }
    }

    fn launch(&mut self, gap: BlockRange, class: Class, cargo: Cargo, ticket: Option<Ticket>) -> usize {
        let longest = if cargo == Cargo::Zeroes { u64::MAX } else { self.max_flight };
        let (mut at, mut made) = (gap.start.0, 0);
        while at < gap.end.0 {
            let end = gap.end.0.min(at.saturating_add(longest));
            let range = BlockRange::new(BlockIndex(at), BlockIndex(end));
            let id = self.insert(Flight::new(range, class, cargo, Ranges::new()));
            if let Some(ticket) = ticket {
                self.attach(id, ticket);
            }
            (at, made) = (end, made + 1);
        }
        made
    }

    /// Joins a flight; one that was not sent and is less urgent is cut, and the part that is wanted is promoted.
    fn join(&mut self, id: FlightId, wanted: BlockRange, class: Class, ticket: Ticket) {
        let Some(flight) = self.flights.get_mut(&id) else { return };
        // What is wanted is missing and nobody's claim: if it was lost, then to a write that failed.
        if matches!(flight.state, State::Waiting { .. }) {
            flight.lost = without(&flight.lost, &[wanted]);
        } else {
            flight.again.extend(flight.lost.iter().filter_map(|lost| lost.intersect(wanted)));
        }
        self.attach(id, ticket);
        let Some(flight) = self.flights.get(&id) else { return };
        let promote = flight.class < class && matches!(flight.state, State::Waiting { .. });
        let Some(inner) = flight.range.intersect(wanted).filter(|_| promote) else { return };
        let Some(whole) = self.remove(id) else { return };
        let mut parts = vec![inner];
        parts.extend(subtract(whole.range, &[inner]));
        for range in parts {
            let lost: Ranges = whole.lost.iter().filter_map(|lost| lost.intersect(range)).collect();
            if subtract(range, &lost).is_empty() {
                continue;
            }
            let tickets: Tickets =
                whole.tickets.iter().copied().filter(|joined| self.wants(*joined, range, &lost)).collect();
            let class = self.urgency(&tickets).map_or(whole.class, |class| class.max(whole.class));
            let part = self.insert(Flight::new(range, class, whole.cargo, lost));
            tickets.into_iter().for_each(|joined| self.attach(part, joined));
        }
        for joined in whole.tickets {
            // The parts were attached before, and each wants one of them at least: nobody can finish here.
            if let Some(waiter) = self.tickets.get_mut(&joined) {
                waiter.open -= 1;
            }
        }
    }

    /// Whether a ticket asked for anything of a range but what was lost.
    fn wants(&self, ticket: Ticket, range: BlockRange, lost: &[BlockRange]) -> bool {
        let parts = self.tickets.get(&ticket).map(|waiter| waiter.wanted.iter().filter_map(|it| it.intersect(range)));
        parts.is_some_and(|mut parts| parts.any(|part| !subtract(part, lost).is_empty()))
    }

    /// How urgent the most urgent of them is.
    fn urgency(&self, tickets: &[Ticket]) -> Option<Class> {
        tickets.iter().filter_map(|ticket| self.tickets.get(ticket)).map(|waiter| waiter.class).max()
    }

    fn attach(&mut self, id: FlightId, ticket: Ticket) {
        let (Some(flight), Some(waiter)) = (self.flights.get_mut(&id), self.tickets.get_mut(&ticket)) else { return };
        if !flight.tickets.contains(&ticket) {
            flight.tickets.push(ticket);
            waiter.open += 1;
        }
    }

    /// One thing less to wait for; true when it was the last.
    fn settle(&mut self, ticket: Ticket) -> bool {
        let Some(waiter) = self.tickets.get_mut(&ticket) else { return false };
        waiter.open -= 1;
        let finished = waiter.open == 0;
        if finished {
            self.tickets.remove(&ticket);
        }
        finished
    }

    fn wake(&mut self, now: Duration) {
        while let Some((at, id)) = self.pausing.first().copied().filter(|(at, _)| *at <= now) {
            self.pausing.remove(&(at, id));
            if let Some(flight) = self.flights.get_mut(&id) {
                flight.state = State::Waiting { not_before: Duration::ZERO };
                self.ready[flight.class as usize].push_back(id);
            }
        }
    }

    fn overlapping(&self, range: BlockRange) -> Vec<FlightId> {
        let before = self.by_start.range(..range.start.0).next_back();
        let inside = self.by_start.range(range.start.0..range.end.0.max(range.start.0));
        before
            .into_iter()
            .chain(inside)
            .map(|(_, id)| *id)
            .filter(|id| intersects(self.flights[id].range, range))
            .collect()
    }

    fn insert(&mut self, flight: Flight) -> FlightId {
        let id = FlightId(self.id());
        self.by_start.insert(flight.range.start.0, id);
        self.ready[flight.class as usize].push_back(id);
        self.flights.insert(id, flight);
        id
    }

    fn remove(&mut self, id: FlightId) -> Option<Flight> {
        let flight = self.flights.remove(&id)?;
        self.by_start.remove(&flight.range.start.0);
        match flight.state {
            State::Waiting { not_before } => {
                self.pausing.remove(&(not_before, id));
            }
            State::Sent(_) | State::Writing { .. } => self.in_flight[flight.class as usize] -= flight.range.len(),
            State::Landing => {}
        }
        Some(flight)
    }

    fn new_ticket(&mut self, wanted: Ranges, class: Class) -> Ticket {
        let ticket = Ticket(self.id());
        self.tickets.insert(ticket, Waiter { wanted, class, open: 0 });
        ticket
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

#[cfg(test)]
#[path = "queue_race_tests.rs"]
mod race_tests;
#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
