//! The pair: thousands of seeded runs of both machines, checked at every step.
//!
//! `SEED=number cargo test --lib migration::machine::tests::pair -- --nocapture` replays one run and prints it; `RUNS=number`
//! looks at more of them.

use std::time::Duration;

use super::world::{A, B, Body, Dice, Envelope, Event, Gate, Order, Purpose, Reply, Waiting, World};
use super::{Plant, failure};
use crate::migration::lease::Beat;
use crate::migration::machine::{BeatAnswer, DestinationMachine, PeerWord, SourceEffect, SourceEvent, SourceMachine};
use crate::migration::phase::{DestinationPhase, SourcePhase};
use crate::migration::record::RollbackMode;

/// How long things go wrong, in milliseconds.
const STORM: u64 = 60_000;
/// When the operator, who only repeats the documented command, must have arrived at one owner.
const END: u64 = 260_000;

impl World {
    /// The source's driver and what it acts on.
    fn source_event(&mut self, event: SourceEvent) {
        let now = self.clock(A);
        if !matches!(event, SourceEvent::Done) {
            self.note(format!("A <- {event:?}"));
        }
        if let Some(machine) = &mut self.source {
            machine.handle(now, event);
        }
        self.source_effects();
    }

    fn source_effects(&mut self) {
        while !self.hosts[A].performing {
            let Some(effect) = self.source.as_mut().and_then(SourceMachine::poll_effect) else { return };
            let life = self.hosts[A].life;
            let name = format!("{effect:?}");
            self.note(format!("A does {}", name.split(['(', '{']).next().unwrap_or(&name)));
            let seconds = Duration::from_secs;
            self.hosts[A].performing = true;
            match &effect {
                SourceEffect::Answer(result) => {
                    self.hosts[A].performing = false;
                    let done = result.is_ok();
                    match self.hosts[A].waiting.take() {
                        Some(Waiting::Call(envelope)) => {
                            self.reply(&envelope, if done { Reply::Yes } else { Reply::No });
                        }
                        Some(Waiting::Operator(order)) => self.operator_hears(order, done),
                        None => {}
                    }
                }
                SourceEffect::AskPrepare => self.call(A, Body::Prepare, seconds(5), Purpose::Prepare),
                SourceEffect::TellHandover(beat) => self.call(A, Body::Handover(*beat), seconds(3), Purpose::Told),
                SourceEffect::TellCancel => self.call(A, Body::Discard(None), seconds(2), Purpose::Cancel),
                SourceEffect::TellDiscard { within, beat } => {
                    self.call(A, Body::Discard(Some(*beat)), *within, Purpose::Discard);
                }
                SourceEffect::Journal(record) => {
                    if self.plant == Some(Plant::TellBeforeRecord) && record.phase == SourcePhase::HandedOver {
                        self.call(A, Body::Handover(self.last_beat), seconds(3), Purpose::Stray);
                    }
                    let (delay, ok) = (self.write_time(), self.write_works(A));
                    self.at(delay, Event::SourceDone { life, effect, ok });
                }
                SourceEffect::Seal => {
                    self.hosts[A].gate = Gate::ReadOnly;
                    let (delay, ok) = (self.dice.between(1, 500), self.calm || !self.dice.percent(3));
                    self.at(delay, Event::SourceDone { life, effect, ok });
                }
                SourceEffect::CheckUnchanged
                | SourceEffect::Unseal
                | SourceEffect::Thaw
                | SourceEffect::ReleaseContainer => {
                    let delay = self.moment();
                    self.at(delay, Event::SourceDone { life, effect, ok: true });
                }
            }
        }
    }

    fn source_done(&mut self, effect: SourceEffect, ok: bool) {
        self.hosts[A].performing = false;
        let result = if ok { Ok(()) } else { Err(failure("no space")) };
        match effect {
            SourceEffect::Journal(record) => {
                // A write that failed may be there all the same. (Not so the handover's: its container is thawed.)
                if ok || (record.phase != SourcePhase::HandedOver && self.dice.percent(50)) {
                    self.source_journal = Some(*record);
                }
                return self.source_event(SourceEvent::Journaled(result));
            }
            SourceEffect::Seal => return self.source_event(SourceEvent::Sealed(result.map(|()| None))),
            SourceEffect::CheckUnchanged => return self.source_event(SourceEvent::Unchanged(result)),
            SourceEffect::Unseal => self.hosts[A].gate = Gate::Open,
            SourceEffect::Thaw => self.hosts[A].runs = self.container,
            _ => {}
        }
        self.source_event(SourceEvent::Done);
    }

    pub(super) fn source_hears(&mut self, purpose: Purpose, reply: Reply) {
        let mut word = match reply {
            Reply::No => PeerWord::No(failure("refused")),
            Reply::Silence | Reply::Busy => PeerWord::Silence(failure("silent")),
            Reply::Yes | Reply::Beat(_) => PeerWord::Yes,
        };
        if let (Purpose::Discard, PeerWord::Silence(_)) = (purpose, &word)
            && self.plant == Some(Plant::SilenceIsEnough)
        {
            word = PeerWord::Yes;
        }
        if matches!(purpose, Purpose::Resume | Purpose::Stray) {
            return;
        }
        self.hosts[A].performing = false;
        self.source_event(match purpose {
            Purpose::Prepare => SourceEvent::PeerPrepared(word),
            Purpose::Told => SourceEvent::PeerTold(word),
            Purpose::Discard => SourceEvent::PeerDiscard(word),
            _ => SourceEvent::Done,
        });
    }

    pub(super) fn source_asked(&mut self, envelope: Envelope) {
        let now = self.clock(A);
        let Some(machine) = &mut self.source else { return self.reply(&envelope, Reply::No) };
        let (ours, epoch) = (machine.record().migration.0 == envelope.migration, envelope.epoch);
        match envelope.body {
            Body::Beat(beat, phase) => {
                self.last_beat = self.last_beat.max(beat);
                let hasty = self.plant == Some(Plant::ReleasedBeforeRecord);
                let answer = if !ours && machine.record().epoch > epoch {
                    BeatAnswer::RolledBack
                } else if !ours {
                    return self.reply(&envelope, Reply::No);
                } else if hasty && machine.record().phase == SourcePhase::Released {
                    BeatAnswer::Released
                } else {
                    machine.beat(now, epoch, beat, phase)
                };
                self.reply(&envelope, Reply::Beat(answer));
            }
            Body::Complete(_) if !ours => self.reply(&envelope, Reply::No),
            Body::Complete(_) if machine.is_busy() => self.reply(&envelope, Reply::Busy),
            Body::Complete(grant) => {
                self.hosts[A].waiting = Some(Waiting::Call(envelope));
                self.source_event(SourceEvent::PeerComplete { epoch, grant });
            }
            _ => {}
        }
    }

    /// An operator's command, or a script's.
    fn order(&mut self, order: Order) {
        let phase = self.source_phase();
        if !self.hosts[A].up || self.source.as_ref().is_some_and(SourceMachine::is_busy) {
            return;
        }
        let event = match order {
            Order::Prepare => {
                if phase != SourcePhase::Serving || self.hosts[A].performing {
                    return;
                }
                self.new_source();
                SourceEvent::Prepare
            }
            Order::HandOver => {
                // The container is frozen first.
                if phase == SourcePhase::Preparing {
                    self.hosts[A].runs = false;
                }
                SourceEvent::HandOver
            }
            Order::Cancel => SourceEvent::Cancel,
            Order::RollBack { insist } => SourceEvent::RollBack { mode: RollbackMode::FreezePoint, insist },
        };
        if self.source.is_some() {
            self.hosts[A].waiting = Some(Waiting::Operator(order));
            self.source_event(event);
        }
    }

    fn operator_hears(&mut self, order: Order, done: bool) {
        self.note(format!("operator: {order:?} {}", if done { "done" } else { "refused" }));
        match (order, done, self.source_phase()) {
            (Order::HandOver, true, SourcePhase::HandedOver) if self.container => {
                self.call(A, Body::Resume, Duration::from_secs(5), Purpose::Resume);
            }
            (Order::HandOver, false, SourcePhase::Preparing | SourcePhase::Frozen) => {
                self.at(1, Event::Order(Order::Cancel));
            }
            _ => {}
        }
    }

    fn crash(&mut self, host: usize) {
        if !self.hosts[host].up {
            return;
        }
        self.note(format!("{} crashes", ["A", "B"][host]));
        // A record that was being written is durable or not.
        let writing = self.queue.values().rev().find_map(|event| match event {
            Event::SourceDone { life, effect: SourceEffect::Journal(record), .. }
                if host == A && *life == self.hosts[A].life =>
            {
                Some(crate::migration::record::Record::Source((**record).clone()))
            }
            Event::DestinationDone { life, effect: super::DestinationEffect::Journal(record), .. }
                if host == B && *life == self.generation =>
            {
                Some(crate::migration::record::Record::Destination(record.clone()))
            }
            _ => None,
        });
        if self.dice.percent(50) && !self.hosts[host].poisoned {
            match writing {
                Some(crate::migration::record::Record::Source(record)) => self.source_journal = Some(record),
                Some(crate::migration::record::Record::Destination(record)) => self.destination_journal = Some(record),
                None => {}
            }
        }
        let state = &mut self.hosts[host];
        (state.up, state.gate, state.runs, state.frozen) = (false, Gate::Closed, false, false);
        (state.performing, state.poisoned, state.waiting) = (false, false, None);
        state.life += 1;
        if host == A {
            self.source = None;
        } else {
            self.destination = None;
            self.generation += 1;
        }
    }

    fn restart(&mut self, host: usize) {
        if self.hosts[host].up {
            return;
        }
        self.note(format!("{} restarts", ["A", "B"][host]));
        self.hosts[host].up = true;
        let now = self.clock(host);
        if host == A {
            let phase = self.source_journal.as_ref().map_or(SourcePhase::Serving, |record| record.phase);
            let given = matches!(phase, SourcePhase::HandedOver | SourcePhase::Released);
            self.hosts[A].gate = if given { Gate::ReadOnly } else { Gate::Open };
            // Nothing starts a container by itself, except the end of a rollback.
            self.hosts[A].runs = self.container && phase == SourcePhase::Serving;
            self.source = self.source_journal.clone().map(|record| SourceMachine::recover(record, now));
            self.source_effects();
        } else if let Some(record) = self.destination_journal.clone() {
            let complete = record.phase == DestinationPhase::Complete;
            self.hosts[B].gate = if complete { Gate::Open } else { Gate::Held };
            self.torn_down = false;
            self.destination = Some(DestinationMachine::recover(record, Beat(1000 * self.generation)));
            self.restart_beats();
            self.destination_effects();
            if self.has_all {
                self.destination_event(super::DestinationEvent::AllDurable);
            }
        }
    }

    fn step(&mut self) -> bool {
        let Some(((time, _), event)) = self.queue.pop_first() else { return false };
        self.now = time;
        if self.now < self.stalled_until && event.is_at_the_destination() {
            self.at(self.stalled_until - self.now, event);
            return true;
        }
        match event {
            Event::SourceDone { life, effect, ok } if life == self.hosts[A].life => self.source_done(effect, ok),
            Event::DestinationDone { life, effect, ok } if life == self.generation => self.destination_done(effect, ok),
            Event::Question(envelope) => self.question(envelope),
            Event::Answer(envelope, reply) => self.answered(&envelope, reply),
            Event::Beat { life } if life == self.generation => self.beat(),
            Event::Verified { life } if life == self.generation => {
                self.destination_event(super::DestinationEvent::Verified(Ok(())));
            }
            Event::Restored { life, migration } if life == self.generation => self.restored(migration),
            Event::Pulled { life, migration } if life == self.generation => self.pulled(migration),
            Event::Order(order) => self.order(order),
            Event::Crash(host) => self.crash(host),
            Event::Restart(host) => self.restart(host),
            Event::Link(link) => {
                self.note(format!("link from A {}, from B {}", link[0], link[1]));
                self.link = link;
            }
            // Without the driver only a container's own guard could freeze it; that is not part of the machines.
            Event::Stall(long) if !self.container => self.stalled_until = self.now + long,
            Event::Calm => {
                self.calm = true;
                for host in [A, B] {
                    if self.hosts[host].poisoned {
                        self.crash(host);
                    }
                    self.restart(host);
                }
            }
            _ => {}
        }
        self.now < END
    }

    /// What must hold at every step.
    fn check(&self) -> Result<(), &'static str> {
        let here = self.source_may_write() || self.hosts[A].runs;
        let there = self.destination_may_write() || self.hosts[B].runs;
        if here && there {
            return Err("both hosts run the container or acknowledge writes");
        }
        let source = self.source_journal.as_ref();
        let destination = self.destination_journal.as_ref();
        let given = source.is_some_and(|it| matches!(it.phase, SourcePhase::HandedOver | SourcePhase::Released));
        if given && here {
            return Err("the source's disk changes although it is handed over");
        }
        if self.destination_may_write() && !destination.is_some_and(|it| it.owned) {
            return Err("the destination acknowledges writes before it has recorded that it owns the disk");
        }
        let (at_source, at_destination) = (source.map(|it| it.epoch), destination.map(|it| it.epoch));
        if self.destination_may_write() && at_source > at_destination {
            return Err("a write is acknowledged at an epoch that was rolled back");
        }
        if source.is_some_and(|it| it.phase == SourcePhase::Released) {
            if !self.has_all {
                return Err("released without every block durable at the destination");
            }
            if destination.is_some_and(|it| it.phase == DestinationPhase::Discarded) {
                return Err("nobody owns the disk");
            }
        }
        let complete = destination.is_some_and(|it| it.phase == DestinationPhase::Complete);
        if complete && !source.is_some_and(|it| it.phase == SourcePhase::Released) {
            return Err("the destination goes on without a lease although the source has not recorded its release");
        }
        Ok(())
    }

    /// What must have been reached in the end.
    fn ended(&self) -> Result<(), &'static str> {
        let complete = self.destination.as_ref().is_some_and(|it| it.record().phase == DestinationPhase::Complete);
        let free = self.destination_may_write() && complete;
        match self.source_phase() {
            SourcePhase::Serving if !self.source_may_write() => Err("the source serves, but its disk does not"),
            SourcePhase::Serving if self.container && !self.hosts[A].runs => {
                Err("the source serves, but its container stands still")
            }
            SourcePhase::Serving if complete => Err("two owners in the end"),
            SourcePhase::Serving => Ok(()),
            SourcePhase::Released if !free => Err("released, but the destination is not free of its lease"),
            SourcePhase::Released => Ok(()),
            _ => Err("the migration did not end although the operator repeated the command"),
        }
    }
}

impl Event {
    fn is_at_the_destination(&self) -> bool {
        match self {
            Event::DestinationDone { .. } | Event::Beat { .. } | Event::Restored { .. } | Event::Pulled { .. } => true,
            Event::Question(envelope) => envelope.from == A,
            Event::Answer(envelope, _) => envelope.from == B,
            _ => false,
        }
    }
}

/// One run; `Err` says which rule broke, and when.
fn run(seed: u64, plant: Option<Plant>) -> (World, Result<SourcePhase, &'static str>) {
    let mut world = World::new(seed, plant);
    let mut dice = Dice(!seed);
    let handover = dice.between(600, 4000);
    world.at(10, Event::Order(Order::Prepare));
    world.at(handover, Event::Order(Order::HandOver));
    for _ in 0..dice.between(0, 8) {
        let order = match dice.between(0, 10) {
            0 | 1 => Order::Prepare,
            2..=4 => Order::HandOver,
            5 => Order::Cancel,
            insist => Order::RollBack { insist: insist > 7 },
        };
        let delay = dice.between(100, STORM);
        world.at(delay, Event::Order(order));
    }
    for _ in 0..dice.between(0, 4) {
        let (host, delay, down) = (dice.between(0, 2) as usize, dice.between(100, STORM), dice.between(1, 8000));
        world.at(delay, Event::Crash(host));
        world.at(delay + down, Event::Restart(host));
    }
    if dice.percent(40) {
        // Something breaks close to the handover.
        let (host, delay) = (dice.between(0, 2) as usize, handover + dice.between(0, 600));
        world.at(delay, Event::Crash(host));
        world.at(delay + dice.between(1, 5000), Event::Restart(host));
    }
    for _ in 0..dice.between(0, 4) {
        let (delay, long) = (dice.between(100, STORM), dice.between(100, 25_000));
        let cut = [[false, false], [true, false], [false, true]][dice.between(0, 3) as usize];
        world.at(delay, Event::Link(cut));
        world.at(delay + long, Event::Link([true, true]));
    }
    for _ in 0..dice.between(0, 3) {
        let (delay, long) = (dice.between(100, STORM), dice.between(100, 20_000));
        world.at(delay, Event::Stall(long));
    }
    world.at(STORM + 30_000, Event::Calm);
    let forward = dice.percent(50);
    for time in (STORM + 31_000..END).step_by(2100) {
        world.at(time, Event::Check);
    }
    loop {
        let asks = world.queue.first_key_value().is_some_and(|(_, event)| matches!(event, Event::Check));
        let goes_on = world.step();
        if asks {
            let patience = forward && world.now < STORM + 100_000;
            match world.source_phase() {
                SourcePhase::Preparing | SourcePhase::Frozen => world.order(Order::Cancel),
                SourcePhase::HandedOver if patience => world.order(Order::HandOver),
                SourcePhase::HandedOver => world.order(Order::RollBack { insist: true }),
                _ => {}
            }
        }
        if let Err(broken) = world.check() {
            world.note(broken);
            return (world, Err(broken));
        }
        if !goes_on {
            break;
        }
    }
    let ended = world.ended().map(|()| world.source_phase());
    (world, ended)
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

#[test]
fn one_owner_in_thousands_of_runs() {
    let (replayed, runs) = (number("SEED"), number("RUNS").unwrap_or(RUNS));
    let seeds = replayed.map_or(0..runs, |seed| seed..seed + 1);
    let (mut released, mut serving) = (0, 0);
    for seed in seeds {
        let (world, result) = run(seed, None);
        match result {
            Ok(SourcePhase::Released) => released += 1,
            Ok(_) => serving += 1,
            Err(broken) => panic!("SEED={seed}: {broken}\n{}", world.log.join("\n")),
        }
        if replayed.is_some() {
            println!("{}", world.log.join("\n"));
        }
    }
    if replayed.is_none() {
        // Both ends are really reached.
        assert!(released > runs / 20 && serving > runs / 20, "{released} released, {serving} rolled back or cancelled");
    }
}

/// How many seeds a run of the tests looks at.
const RUNS: u64 = 3000;

#[test]
fn every_planted_bug_is_found() {
    for plant in Plant::ALL {
        let found = (0..number("RUNS").unwrap_or(RUNS))
            .find_map(|seed| run(seed, Some(plant)).1.err().map(|broken| (seed, broken)));
        let (seed, broken) = found.unwrap_or_else(|| panic!("{plant:?} was not found in {RUNS} runs"));
        println!("{plant:?}: found in run {seed}: {broken}");
    }
}
