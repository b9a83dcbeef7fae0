//! Writers and landers at every interleaving of their steps, over a store: a local write wins. With a planted bug that the
//! test catches.

use super::tests::{LINE, NOW, run};
use super::*;
use crate::block_map::BlockMap;
use crate::store::{MemoryStore, Store};

/// A small generator: the same seed gives the same run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// The steps between which anything else may happen.
enum Writer {
    Idle,
    Claimed(ClaimId, BlockRange),
    Written(ClaimId, BlockRange),
    Marked(ClaimId),
}

enum Lander {
    Idle,
    /// A flight that comes in pieces of one block: those before this one are written.
    Between(Outgoing, u64),
    Piece(Outgoing, u64, bool),
    Arrived(Outgoing, Ranges),
    Stored(Outgoing, Ranges),
}

const BLOCK: u64 = 8;
const SOURCE: u8 = 1;

/// One interleaving of two writers, two landers and a reader over 6 blocks. Answers the store and what must be in it.
/// A lander that does not `heed` the queue writes all that arrived: the planted bug.
fn race(seed: u64, heed: bool) -> (Vec<u8>, Vec<u8>) {
    let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let (store, map, mut queue) = (MemoryStore::new(6 * BLOCK), BlockMap::empty(6), FetchQueue::new(3));
    let mut expected = vec![SOURCE; 6 * BLOCK as usize];
    let (mut writers, mut landers) = ([Writer::Idle, Writer::Idle], [Lander::Idle, Lander::Idle]);
    let mut sent: Vec<Outgoing> = Vec::new();
    let (mut value, mut rounds) = (10, 0);
    loop {
        rounds += 1;
        let busy = rounds < 60;
        match dice.roll(7) {
            0 | 1 if busy => {
                let at = dice.roll(6);
                let missing: Vec<BlockRange> = map.missing_in(run(at, (at + 1 + dice.roll(4)).min(6))).collect();
                queue.request(&missing, Class::Demand);
            }
            2 => sent.extend(queue.poll(Class::Demand, LINE, NOW)),
            3 | 4 => {
                let which = dice.roll(2) as usize;
                landers[which] = match std::mem::replace(&mut landers[which], Lander::Idle) {
                    Lander::Idle if sent.is_empty() => Lander::Idle,
                    Lander::Idle => {
                        let flight = sent.swap_remove(dice.roll(sent.len() as u64) as usize);
                        if dice.roll(2) == 0 {
                            landers[which] = Lander::Between(flight, flight.range.start.0);
                            continue;
                        }
                        let parts = queue.arrived(flight.id);
                        Lander::Arrived(flight, if heed { parts } else { Ranges::from_slice(&[flight.range]) })
                    }
                    Lander::Between(flight, at) if at == flight.range.end.0 => {
                        let parts = queue.arrived(flight.id);
                        Lander::Stored(flight, if heed { parts } else { Ranges::from_slice(&[flight.range]) })
                    }
                    Lander::Between(flight, at) => {
                        let parts = queue.piece(flight.id, LINE).unwrap_or_default();
                        let allowed = parts.iter().any(|part| part.contains(BlockIndex(at)));
                        Lander::Piece(flight, at, allowed || !heed)
                    }
                    Lander::Piece(flight, at, allowed) => {
                        if allowed {
                            store.write_at(at * BLOCK, &[SOURCE; BLOCK as usize]).unwrap();
                        }
                        queue.put_down(flight.id);
                        Lander::Between(flight, at + 1)
                    }
                    Lander::Arrived(flight, parts) => {
                        for part in &parts {
                            let bytes = vec![SOURCE; (part.len() * BLOCK) as usize];
                            store.write_at(part.start.0 * BLOCK, &bytes).unwrap();
                        }
                        Lander::Stored(flight, parts)
                    }
                    Lander::Stored(flight, parts) => {
                        parts.iter().for_each(|part| {
                            map.set_present(*part);
                        });
                        queue.landed(flight.id);
                        Lander::Idle
                    }
                };
            }
            _ => {
                let which = dice.roll(2) as usize;
                writers[which] = match std::mem::replace(&mut writers[which], Writer::Idle) {
                    Writer::Idle if busy => {
                        // The writers keep to their own halves: two writes at once have no order to check.
                        let at = which as u64 * 3 + dice.roll(3);
                        let range = run(at, (at + 1 + dice.roll(2)).min(which as u64 * 3 + 3));
                        match queue.claim(range) {
                            Claimed::Granted(id, _) => Writer::Claimed(id, range),
                            Claimed::Wait(ticket) => {
                                queue.cancel(ticket);
                                Writer::Idle
                            }
                        }
                    }
                    Writer::Idle => Writer::Idle,
                    Writer::Claimed(id, range) => {
                        value = value % 200 + 2;
                        let bytes = vec![value; (range.len() * BLOCK) as usize];
                        let at = range.start.0 * BLOCK;
                        store.write_at(at, &bytes).unwrap();
                        expected[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
                        Writer::Written(id, range)
                    }
                    Writer::Written(id, range) => {
                        map.set_present(range);
                        Writer::Marked(id)
                    }
                    Writer::Marked(id) => {
                        queue.release(id);
                        Writer::Idle
                    }
                };
            }
        }
        let idle =
            writers.iter().all(|w| matches!(w, Writer::Idle)) && landers.iter().all(|l| matches!(l, Lander::Idle));
        if !busy && idle && sent.is_empty() {
            if map.all_present() {
                return (store.to_bytes(), expected);
            }
            let missing: Vec<BlockRange> = map.missing_in(map.whole()).collect();
            queue.request(&missing, Class::Demand);
        }
    }
}

#[test]
fn a_write_that_races_a_fetch_wins_in_every_interleaving() {
    for seed in 0..8000 {
        let (found, expected) = race(seed, true);
        assert_eq!(found, expected, "seed {seed}");
    }
}

#[test]
fn the_race_test_catches_a_lander_that_does_not_look() {
    let caught = (0..8000).filter(|seed| {
        let (found, expected) = race(*seed, false);
        found != expected
    });
    assert!(caught.count() > 100, "the planted bug must show");
}
