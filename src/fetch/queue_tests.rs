//! Tests of the queue: examples and a property test against a per-block model.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;
use crate::block_map::BlockMap;

pub(super) const NOW: Duration = Duration::ZERO;
pub(super) const LINE: Carrier = Carrier(1);

pub(super) fn run(start: u64, end: u64) -> BlockRange {
    BlockRange::new(BlockIndex(start), BlockIndex(end))
}

fn poll_all(queue: &mut FetchQueue, lane: Class) -> Vec<Outgoing> {
    std::iter::from_fn(|| queue.poll(lane, LINE, NOW)).collect()
}

fn ranges(flights: &[Outgoing]) -> Vec<(u64, u64)> {
    flights.iter().map(|flight| (flight.range.start.0, flight.range.end.0)).collect()
}

fn claim(queue: &mut FetchQueue, range: BlockRange) -> ClaimId {
    match queue.claim(range) {
        Claimed::Granted(id, _) => id,
        Claimed::Wait(_) => panic!("a landing is in the way"),
    }
}

#[test]
fn sixty_four_readers_of_one_block_make_one_flight() {
    let mut queue = FetchQueue::new(256);
    let tickets: Tickets = (0..64).filter_map(|_| queue.request(&[run(5, 6)], Class::Demand)).collect();
    let flights = poll_all(&mut queue, Class::Demand);
    assert_eq!(ranges(&flights), vec![(5, 6)]);
    assert_eq!(queue.arrived(flights[0].id)[..], [run(5, 6)]);
    let landed = queue.landed(flights[0].id);
    assert_eq!((landed.joined, landed.finished), (tickets.clone(), tickets));
    assert!(queue.is_idle() && queue.waiting() == 0);
}

#[test]
fn how_long_something_was_waited_for_is_counted_from_when_it_was_sent() {
    let (mut queue, ms) = (FetchQueue::new(256), Duration::from_millis(1));
    queue.background(&[run(0, 4)], Cargo::Bytes);
    let pulled = queue.poll(Class::Background, LINE, ms).unwrap();
    assert_eq!(queue.longest_in_the_air(ms * 50), Duration::ZERO, "nobody waits for it");
    queue.request(&[run(3, 4), run(9, 10)], Class::Demand).unwrap();
    assert_eq!(queue.longest_in_the_air(ms * 50), ms * 49);
    let asked = queue.poll(Class::Demand, LINE, ms * 50).unwrap();
    queue.arrived(pulled.id);
    queue.landed(pulled.id);
    assert_eq!(queue.longest_in_the_air(ms * 60), ms * 10);
    queue.failed(asked.id, ms * 60);
    assert_eq!(queue.longest_in_the_air(ms * 70), Duration::ZERO, "it pauses");
    let again = queue.poll(Class::Demand, LINE, ms * 5000).map(|sent| sent.id);
    assert_eq!((again, queue.longest_in_the_air(ms * 5001)), (Some(asked.id), ms));
}

#[test]
fn only_the_rest_of_a_range_in_flight_is_sent_and_all_of_it_is_waited_for() {
    let mut queue = FetchQueue::new(256);
    queue.request(&[run(4, 6)], Class::Demand).unwrap();
    let first = poll_all(&mut queue, Class::Demand);
    let ticket = queue.request(&[run(2, 8)], Class::Demand).unwrap();
    let second = poll_all(&mut queue, Class::Demand);
    assert_eq!(ranges(&second), vec![(2, 4), (6, 8)]);
    for flight in second {
        queue.arrived(flight.id);
        assert!(queue.landed(flight.id).finished.is_empty());
    }
    queue.arrived(first[0].id);
    assert!(queue.landed(first[0].id).finished.contains(&ticket));
}

#[test]
fn long_requests_are_cut_at_the_limit() {
    let mut queue = FetchQueue::new(4);
    queue.request(&[run(0, 10)], Class::Demand).unwrap();
    assert_eq!(ranges(&poll_all(&mut queue, Class::Demand)), vec![(0, 4), (4, 8), (8, 10)]);
    assert_eq!(queue.in_flight(Class::Demand), 10);
}

#[test]
fn demand_does_not_wait_for_the_background_to_make_zeroes() {
    let mut queue = FetchQueue::new(256);
    queue.background(&[run(0, 1000)], Cargo::Zeroes);
    queue.request(&[run(40, 42)], Class::Demand).unwrap();
    let flights = poll_all(&mut queue, Class::Demand);
    assert_eq!((ranges(&flights), flights[0].cargo), (vec![(40, 42)], Cargo::Zeroes));
    assert_eq!(ranges(&poll_all(&mut queue, Class::Background)), vec![(0, 40), (42, 1000)]);
}

#[test]
fn demand_takes_just_its_blocks_out_of_a_background_flight_that_was_not_sent() {
    let mut queue = FetchQueue::new(256);
    queue.background(&[run(0, 100)], Cargo::Bytes);
    queue.request(&[run(40, 42)], Class::Demand).unwrap();
    assert_eq!(ranges(&poll_all(&mut queue, Class::Demand)), vec![(40, 42)]);
    assert_eq!(ranges(&poll_all(&mut queue, Class::Background)), vec![(0, 40), (42, 100)]);
    assert_eq!((queue.in_flight(Class::Demand), queue.in_flight(Class::Background)), (2, 98));
}

#[test]
fn a_flight_that_was_promoted_serves_those_who_waited_before() {
    let mut queue = FetchQueue::new(256);
    let early = queue.request(&[run(0, 8)], Class::ReadAhead).unwrap();
    let late = queue.request(&[run(2, 4)], Class::Demand).unwrap();
    let flights = poll_all(&mut queue, Class::Demand);
    assert_eq!(ranges(&flights)[0], (2, 4), "demand first");
    let finished: Vec<Tickets> = flights
        .iter()
        .map(|flight| {
            queue.arrived(flight.id);
            queue.landed(flight.id).finished
        })
        .collect();
    let finished: Vec<&[Ticket]> = finished.iter().map(|tickets| &tickets[..]).collect();
    assert_eq!(finished, [&[late][..], &[], &[early]]);
}

#[test]
fn a_claim_takes_its_blocks_from_a_flight_and_its_readers_wait_for_it() {
    let mut queue = FetchQueue::new(256);
    queue.request(&[run(0, 8)], Class::Demand).unwrap();
    let flight = poll_all(&mut queue, Class::Demand)[0];
    let id = claim(&mut queue, run(2, 4));
    let reader = queue.request(&[run(3, 4)], Class::Demand).unwrap();
    assert!(poll_all(&mut queue, Class::Demand).is_empty(), "a claimed block is not fetched");
    assert_eq!(queue.release(id)[..], [reader]);
    assert_eq!(queue.arrived(flight.id)[..], [run(0, 2), run(4, 8)], "write wins");
}

#[test]
fn a_claim_waits_for_a_landing_and_no_longer() {
    let mut queue = FetchQueue::new(256);
    queue.request(&[run(0, 8)], Class::Demand).unwrap();
    let flight = poll_all(&mut queue, Class::Demand)[0];
    queue.arrived(flight.id);
    let Claimed::Wait(ticket) = queue.claim(run(7, 9)) else { panic!("it must wait") };
    assert!(queue.landed(flight.id).finished.contains(&ticket));
    claim(&mut queue, run(7, 9));
}

#[test]
fn a_flight_whose_blocks_are_all_written_locally_is_not_sent() {
    let mut queue = FetchQueue::new(256);
    let ticket = queue.request(&[run(3, 5)], Class::Demand).unwrap();
    match queue.claim(run(0, 8)) {
        Claimed::Granted(_, finished) => assert_eq!(finished[..], [ticket], "its reader looks at the map again"),
        Claimed::Wait(_) => panic!("nothing lands"),
    }
    assert!(poll_all(&mut queue, Class::Demand).is_empty());
}

#[test]
fn a_reader_does_not_wait_for_a_flight_of_which_everything_it_wanted_was_written() {
    let mut queue = FetchQueue::new(256);
    queue.background(&[run(0, 8)], Cargo::Bytes);
    let flight = queue.poll(Class::Background, LINE, NOW).unwrap();
    let reader = queue.request(&[run(2, 3), run(6, 7)], Class::Demand).unwrap();
    let Claimed::Granted(first, finished) = queue.claim(run(2, 4)) else { panic!("nothing lands") };
    assert!(finished.is_empty(), "it waits for the other block");
    queue.release(first);
    // The flight was sent, and may never be heard of again: once all is present nobody asks for it.
    let Claimed::Granted(_, finished) = queue.claim(run(4, 8)) else { panic!("nothing lands") };
    assert_eq!(finished[..], [reader]);
    claim(&mut queue, run(0, 2));
    queue.lost(LINE);
    assert!(queue.is_idle() && queue.waiting() == 0, "nothing is left of {flight:?}");
}

#[test]
fn a_background_flight_that_a_reader_waits_for_is_sent_again_as_demand() {
    for lost in [true, false] {
        let mut queue = FetchQueue::new(256);
        queue.background(&[run(0, 8)], Cargo::Bytes);
        let flight = queue.poll(Class::Background, LINE, NOW).unwrap();
        queue.request(&[run(2, 3)], Class::Demand).unwrap();
        if lost {
            queue.lost(LINE)
        } else {
            queue.failed(flight.id, NOW)
        }
        assert_eq!(queue.in_flight(Class::Background), 0);
        let again = queue.poll(Class::Demand, LINE, RETRY_MIN).unwrap();
        assert_eq!((again.id, again.class, queue.in_flight(Class::Demand)), (flight.id, Class::Demand, 8));
    }
}

#[test]
fn a_part_that_was_written_is_not_waited_for_when_a_flight_is_cut() {
    let mut queue = FetchQueue::new(256);
    queue.background(&[run(6, 9)], Cargo::Bytes);
    queue.poll(Class::Background, LINE, NOW).unwrap();
    let written = claim(&mut queue, run(7, 8));
    queue.release(written);
    let reader = queue.request(&[run(6, 7), run(8, 9)], Class::ReadAhead).unwrap();
    queue.lost(LINE);
    queue.request(&[run(6, 7)], Class::Demand).unwrap();
    queue.request(&[run(8, 9)], Class::Demand).unwrap();
    let flights = poll_all(&mut queue, Class::Demand);
    assert_eq!(ranges(&flights), vec![(6, 7), (8, 9)]);
    let finished: Vec<Ticket> = flights
        .iter()
        .flat_map(|flight| {
            queue.arrived(flight.id);
            queue.landed(flight.id).finished
        })
        .collect();
    assert!(finished.contains(&reader) && queue.is_idle(), "{queue:?}");
}

#[test]
fn what_failed_comes_again_after_a_pause_that_doubles() {
    let mut queue = FetchQueue::new(256);
    queue.request(&[run(0, 1)], Class::Demand).unwrap();
    let mut now = NOW;
    for pause in [50, 100, 200, 400, 800, 1600, 2000, 2000] {
        let flight = queue.poll(Class::Demand, LINE, now).unwrap();
        queue.failed(flight.id, now);
        let due = now + Duration::from_millis(pause);
        assert_eq!(queue.next_timeout(), Some(due));
        assert!(queue.poll(Class::Demand, LINE, due - Duration::from_millis(1)).is_none());
        now = due;
    }
    assert_eq!(queue.in_flight(Class::Demand), 0);
}

#[test]
fn what_a_lost_connection_carried_goes_over_the_next_one_in_order() {
    let mut queue = FetchQueue::new(2);
    queue.request(&[run(0, 6)], Class::Demand).unwrap();
    let before = ranges(&poll_all(&mut queue, Class::Demand));
    queue.lost(Carrier(9));
    assert!(poll_all(&mut queue, Class::Demand).is_empty(), "another connection's flights stay");
    queue.lost(LINE);
    assert_eq!(ranges(&poll_all(&mut queue, Class::Demand)), before);
}

#[test]
fn a_writer_waits_for_a_piece_and_not_for_the_flight() {
    let mut queue = FetchQueue::new(256);
    queue.background(&[run(0, 8)], Cargo::Bytes);
    let flight = poll_all(&mut queue, Class::Background)[0];
    assert_eq!(queue.piece(flight.id, LINE), Some(Ranges::from_slice(&[run(0, 8)])));
    let Claimed::Wait(writer) = queue.claim(run(2, 4)) else { panic!("a piece is being written") };
    assert_eq!(queue.put_down(flight.id)[..], [writer]);
    let claim = claim(&mut queue, run(2, 4));
    assert_eq!(queue.piece(flight.id, LINE), Some(Ranges::from_slice(&[run(0, 2), run(4, 8)])), "the write wins");
    queue.lost(LINE);
    assert!(poll_all(&mut queue, Class::Background).is_empty(), "its blocks may be half written just now");
    assert!(queue.put_down(flight.id).is_empty());
    assert_eq!(queue.in_flight(Class::Background), 0);
    assert_eq!(poll_all(&mut queue, Class::Background)[0].id, flight.id, "it goes over the next connection");
    assert!(queue.release(claim).is_empty());
}

#[test]
fn a_request_that_nobody_waits_for_any_more_is_not_sent() {
    let mut queue = FetchQueue::new(256);
    let gone = queue.request(&[run(0, 4)], Class::Demand).unwrap();
    let stays = queue.request(&[run(2, 6)], Class::Demand).unwrap();
    queue.cancel(gone);
    assert_eq!(ranges(&poll_all(&mut queue, Class::Demand)), vec![(0, 4), (4, 6)], "somebody else waits for 2..4");
    queue.cancel(stays);
    assert_eq!(queue.waiting(), 0);
    let alone = queue.request(&[run(10, 11)], Class::Demand).unwrap();
    queue.cancel(alone);
    assert!(poll_all(&mut queue, Class::Demand).is_empty());
}

const BLOCKS: u64 = 24;

#[derive(Clone, Debug)]
enum Op {
    Request(u64, u64, bool),
    Background(u64, u64),
    Poll(bool),
    Piece(usize),
    PutDown(usize),
    Arrive(usize),
    Land(usize),
    Fail(usize),
    Lose,
    Claim(u64, u64),
    Release(usize, bool),
    Cancel(usize),
    Later(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let range = || (0..BLOCKS, 1..6u64).prop_map(|(at, len)| (at, (at + len).min(BLOCKS)));
    prop_oneof![
        4 => (range(), any::<bool>()).prop_map(|((a, b), demand)| Op::Request(a, b, demand)),
        2 => range().prop_map(|(a, b)| Op::Background(a, b)),
        5 => any::<bool>().prop_map(Op::Poll),
        3 => any::<usize>().prop_map(Op::Piece),
        3 => any::<usize>().prop_map(Op::PutDown),
        4 => any::<usize>().prop_map(Op::Arrive),
        4 => any::<usize>().prop_map(Op::Land),
        1 => any::<usize>().prop_map(Op::Fail),
        1 => Just(Op::Lose),
        3 => range().prop_map(|(a, b)| Op::Claim(a, b)),
        3 => (any::<usize>(), any::<bool>()).prop_map(|(at, wrote)| Op::Release(at, wrote)),
        1 => any::<usize>().prop_map(Op::Cancel),
        1 => (0..3000u64).prop_map(Op::Later),
    ]
}

/// The queue with a model of every block beside it.
struct Model {
    queue: FetchQueue,
    map: BlockMap,
    now: Duration,
    asked: HashSet<u64>,
    sent: Vec<Outgoing>,
    /// Of which a piece is being written; whether its connection is lost.
    writing: Vec<(Outgoing, bool)>,
    landing: Vec<(Outgoing, Ranges)>,
    claims: Vec<(ClaimId, BlockRange)>,
    /// Per flight in the air: blocks that were claimed since it was sent.
    taken: HashMap<FlightId, HashSet<u64>>,
    open: HashSet<Ticket>,
}

impl Model {
    fn missing(&self, a: u64, b: u64) -> Vec<BlockRange> {
        self.map.missing_in(run(a, b)).collect()
    }

    fn finish(&mut self, tickets: Tickets) {
        for ticket in tickets {
            assert!(self.open.remove(&ticket), "a ticket finishes once, and only while somebody holds it");
        }
    }

    fn poll(&mut self, lane: Class) -> bool {
        let Some(flight) = self.queue.poll(lane, LINE, self.now) else { return false };
        let written = self.writing.iter().map(|(flight, _)| flight);
        let others = self.sent.iter().chain(self.landing.iter().map(|(flight, _)| flight)).chain(written);
        assert!(others.into_iter().all(|other| !intersects(other.range, flight.range)), "a block in two flights");
        assert!(flight.range.iter().all(|block| self.asked.contains(&block.0)), "nobody asked for it");
        assert!(lane != Class::Background || flight.class == Class::Background);
        self.taken.insert(flight.id, HashSet::new());
        self.sent.push(flight);
        true
    }

    fn piece(&mut self, at: usize) {
        let flight = self.sent.swap_remove(at);
        assert_eq!(self.queue.piece(flight.id, Carrier(LINE.0 + 1)), None, "by a connection that does not carry it");
        let parts = self.queue.piece(flight.id, LINE).expect("it is sent");
        self.check_parts(&flight, &parts);
        self.writing.push((flight, false));
    }

    fn put_down(&mut self, at: usize) {
        let (flight, orphaned) = self.writing.swap_remove(at);
        let finished = self.queue.put_down(flight.id);
        self.finish(finished);
        if !orphaned {
            self.sent.push(flight);
        }
    }

    fn arrive(&mut self, at: usize) {
        let flight = self.sent.swap_remove(at);
        let parts = self.queue.arrived(flight.id);
        self.check_parts(&flight, &parts);
        self.landing.push((flight, parts));
    }

    /// What may be written of a flight.
    fn check_parts(&self, flight: &Outgoing, parts: &[BlockRange]) {
        for block in parts.iter().flat_map(|part| part.iter()) {
            assert!(!self.taken[&flight.id].contains(&block.0), "write wins");
            assert!(self.claims.iter().all(|(_, claimed)| !claimed.contains(block)), "claimed right now");
            assert!(!self.map.is_present(run(block.0, block.0 + 1)), "it is here already");
        }
    }

    fn is_written(&self, range: BlockRange) -> bool {
        let landing = self.landing.iter().map(|(flight, _)| flight.range);
        landing.chain(self.writing.iter().map(|(flight, _)| flight.range)).any(|written| intersects(written, range))
    }

    fn land(&mut self, at: usize) {
        let (flight, parts) = self.landing.swap_remove(at);
        parts.iter().for_each(|part| {
            self.map.set_present(*part);
        });
        let landed = self.queue.landed(flight.id);
        self.finish(landed.finished);
    }

    fn release(&mut self, at: usize, wrote: bool) {
        let (id, range) = self.claims.swap_remove(at);
        if wrote {
            self.map.set_present(range);
        }
        let finished = self.queue.release(id);
        self.finish(finished);
    }

    fn apply(&mut self, op: Op) {
        let pick = |at: usize, len: usize| (len > 0).then(|| at % len.max(1));
        match op {
            Op::Request(a, b, demand) => {
                let class = if demand { Class::Demand } else { Class::ReadAhead };
                let missing = self.missing(a, b);
                let ticket = self.queue.request(&missing, class);
                assert_eq!(ticket.is_some(), !missing.is_empty());
                self.asked.extend(missing.iter().flat_map(|run| run.iter()).map(|block| block.0));
                self.open.extend(ticket);
            }
            Op::Background(a, b) => {
                let missing = self.missing(a, b);
                self.queue.background(&missing, Cargo::Bytes);
                self.asked.extend(missing.iter().flat_map(|run| run.iter()).map(|block| block.0));
            }
            Op::Poll(demand) => {
                self.poll(if demand { Class::Demand } else { Class::Background });
            }
            Op::Piece(at) => {
                if let Some(at) = pick(at, self.sent.len()) {
                    self.piece(at);
                }
            }
            Op::PutDown(at) => {
                if let Some(at) = pick(at, self.writing.len()) {
                    self.put_down(at);
                }
            }
            Op::Arrive(at) => {
                if let Some(at) = pick(at, self.sent.len()) {
                    self.arrive(at);
                }
            }
            Op::Land(at) => {
                if let Some(at) = pick(at, self.landing.len()) {
                    self.land(at);
                }
            }
            Op::Fail(at) => {
                if let Some(at) = pick(at, self.sent.len()) {
                    let flight = self.sent.swap_remove(at);
                    self.queue.failed(flight.id, self.now);
                }
            }
            Op::Lose => {
                self.sent.clear();
                self.writing.iter_mut().for_each(|(_, orphaned)| *orphaned = true);
                self.queue.lost(LINE);
            }
            Op::Claim(a, b) => match self.queue.claim(run(a, b)) {
                Claimed::Granted(id, finished) => {
                    assert!(!self.is_written(run(a, b)), "it is being written");
                    self.finish(finished);
                    self.claims.push((id, run(a, b)));
                    for taken in self.taken.values_mut() {
                        taken.extend(a..b);
                    }
                }
                Claimed::Wait(ticket) => {
                    assert!(self.is_written(run(a, b)));
                    self.open.insert(ticket);
                }
            },
            Op::Release(at, wrote) => {
                if let Some(at) = pick(at, self.claims.len()) {
                    self.release(at, wrote);
                }
            }
            Op::Cancel(at) => {
                let mut open: Vec<Ticket> = self.open.iter().copied().collect();
                open.sort();
                if let Some(at) = pick(at, open.len()) {
                    self.open.remove(&open[at]);
                    self.queue.cancel(open[at]);
                }
            }
            Op::Later(ms) => self.now += Duration::from_millis(ms),
        }
        let air = self.sent.iter().chain(self.writing.iter().map(|(flight, _)| flight));
        let flying: u64 = air.map(|flight| flight.range.len()).sum();
        let classes = [Class::Background, Class::ReadAhead, Class::Demand];
        assert_eq!(classes.iter().map(|class| self.queue.in_flight(*class)).sum::<u64>(), flying);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    /// Whatever happens in whatever order: no block flies twice, none is fetched that nobody asked for, a claimed block
    /// is never landed on, and in the end everybody who waits has finished, once.
    #[test]
    fn the_queue_keeps_its_promises(ops in prop::collection::vec(op(), 1..80)) {
        let mut model = Model {
            queue: FetchQueue::new(4),
            map: BlockMap::empty(BLOCKS),
            now: NOW,
            asked: HashSet::new(),
            sent: Vec::new(),
            writing: Vec::new(),
            landing: Vec::new(),
            claims: Vec::new(),
            taken: HashMap::new(),
            open: HashSet::new(),
        };
        ops.into_iter().for_each(|op| model.apply(op));
        while !model.claims.is_empty() {
            model.release(0, true);
        }
        while !model.writing.is_empty() {
            model.put_down(0);
        }
        model.now += RETRY_MAX;
        loop {
            let polled = model.poll(Class::Demand) | model.poll(Class::Background);
            if !model.sent.is_empty() {
                model.arrive(0);
            }
            if !model.landing.is_empty() {
                model.land(0);
            }
            if !polled && model.sent.is_empty() && model.landing.is_empty() {
                break;
            }
        }
        prop_assert!(model.open.is_empty(), "somebody waits for ever");
        prop_assert!(model.queue.is_idle() && model.queue.waiting() == 0);
    }
}
