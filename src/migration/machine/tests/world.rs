//! Two hosts, a link and an operator, in virtual time: what the drivers do around the machines, reduced to what can be
//! seen from outside. A journal survives a crash, all else does not; a clock is its host's own and drifts.
//!
//! A message is lost with its sender's or its receiver's process, as a connection is; otherwise it may come late, twice, out
//! of order, or not at all.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Plant, destination_record, failure, source_record};
use crate::migration::lease::{Beat, Timings};
use crate::migration::machine::{
    BeatAnswer, Denied, DestinationEffect, DestinationEvent, DestinationMachine, Grant, SourceEffect, SourceMachine,
};
use crate::migration::phase::{DestinationPhase, SourcePhase};
use crate::migration::record::{DestinationRecord, SourceRecord};
use crate::units::{BootTime, Epoch};

/// The source host, and the destination host.
pub(super) const A: usize = 0;
pub(super) const B: usize = 1;

/// A small generator: the same seed, the same run.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low)
    }

    pub(super) fn percent(&mut self, chance: u64) -> bool {
        self.between(0, 100) < chance
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Gate {
    Open,
    ReadOnly,
    Held,
    Closed,
}

/// What both kinds of host have.
pub(super) struct Host {
    pub(super) up: bool,
    /// Rises with every restart: what belongs to an earlier life is nobody's.
    pub(super) life: u64,
    /// In hundredths of a percent.
    pub(super) drift: i64,
    pub(super) gate: Gate,
    pub(super) runs: bool,
    /// There is a container, and it stands still.
    pub(super) frozen: bool,
    pub(super) performing: bool,
    /// An append failed: no other may follow in this life.
    pub(super) poisoned: bool,
    pub(super) waiting: Option<Waiting>,
}

/// Who waits for the end of a command.
#[derive(Clone, Debug)]
pub(super) enum Waiting {
    Operator(Order),
    Call(Envelope),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Order {
    Prepare,
    HandOver,
    Cancel,
    RollBack { insist: bool },
}

#[derive(Clone, Debug)]
pub(super) enum Body {
    Prepare,
    Handover(Beat),
    Resume,
    Discard(Option<Beat>),
    Beat(Beat, DestinationPhase),
    Complete(Grant),
}

/// A question on its way, or being answered.
#[derive(Clone, Debug)]
pub(super) struct Envelope {
    pub(super) call: u64,
    pub(super) from: usize,
    pub(super) lives: [u64; 2],
    pub(super) migration: String,
    pub(super) epoch: Epoch,
    pub(super) body: Body,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Reply {
    Yes,
    No,
    /// Another command is being done.
    Busy,
    Beat(BeatAnswer),
    /// Nobody answered in time.
    Silence,
}

/// What a question is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    Prepare,
    Told,
    Discard,
    Cancel,
    Resume,
    Beat(Beat),
    Complete,
    /// Asked by a planted bug; the answer is nobody's.
    Stray,
}

#[derive(Clone, Debug)]
pub(super) enum Event {
    SourceDone { life: u64, effect: SourceEffect, ok: bool },
    DestinationDone { life: u64, effect: DestinationEffect, ok: bool },
    Question(Envelope),
    Answer(Envelope, Reply),
    Beat { life: u64 },
    Verified { life: u64 },
    Restored { life: u64, migration: String },
    Pulled { life: u64, migration: String },
    Order(Order),
    Crash(usize),
    Restart(usize),
    Link([bool; 2]),
    Stall(u64),
    Calm,
    Check,
}

/// The whole of it.
pub(super) struct World {
    pub(super) dice: Dice,
    pub(super) plant: Option<Plant>,
    pub(super) timings: Timings,
    /// In milliseconds.
    pub(super) now: u64,
    sequence: u64,
    pub(super) queue: BTreeMap<(u64, u64), Event>,
    pub(super) hosts: [Host; 2],
    pub(super) source: Option<SourceMachine>,
    pub(super) source_journal: Option<SourceRecord>,
    pub(super) destination: Option<DestinationMachine>,
    pub(super) destination_journal: Option<DestinationRecord>,
    pub(super) torn_down: bool,
    /// Rises with every destination machine: what belongs to an earlier one is nobody's.
    pub(super) generation: u64,
    pub(super) restoring: bool,
    beating: bool,
    /// Every block is durable at the destination.
    pub(super) has_all: bool,
    calls: BTreeMap<u64, (usize, u64, Purpose)>,
    /// Whether messages from A, and from B, get through.
    pub(super) link: [bool; 2],
    pub(super) calm: bool,
    pub(super) attempts: u64,
    /// Whether a container moves along, or the disk alone.
    pub(super) container: bool,
    /// Until then the destination's driver gets no processor; its I/O goes on.
    pub(super) stalled_until: u64,
    /// What the source has heard, for a planted bug.
    pub(super) last_beat: Beat,
    pub(super) log: Vec<String>,
}

impl World {
    pub(super) fn new(seed: u64, plant: Option<Plant>) -> Self {
        let mut dice = Dice(seed);
        let container = dice.percent(60);
        let mut host = |gate| Host {
            up: true,
            life: 0,
            drift: dice.between(0, 201) as i64 - 100,
            gate,
            runs: container && gate == Gate::Open,
            frozen: false,
            performing: false,
            poisoned: false,
            waiting: None,
        };
        let hosts = [host(Gate::Open), host(Gate::Closed)];
        let timings = Timings::of(Duration::from_secs(dice.between(2, 11)));
        Self {
            dice,
            plant,
            timings,
            now: 0,
            sequence: 0,
            queue: BTreeMap::new(),
            hosts,
            source: None,
            source_journal: None,
            destination: None,
            destination_journal: None,
            torn_down: false,
            generation: 0,
            restoring: false,
            beating: false,
            has_all: false,
            calls: BTreeMap::new(),
            link: [true; 2],
            calm: false,
            attempts: 0,
            container,
            stalled_until: 0,
            last_beat: Beat(0),
            log: Vec::new(),
        }
    }

    pub(super) fn note(&mut self, what: impl std::fmt::Display) {
        self.log.push(format!("{:>8} ms  {what}", self.now));
    }

    pub(super) fn at(&mut self, delay: u64, event: Event) {
        self.sequence += 1;
        self.queue.insert((self.now + delay, self.sequence), event);
    }

    /// Which machine of a host it is.
    pub(super) fn life(&self, host: usize) -> u64 {
        if host == A { self.hosts[A].life } else { self.generation }
    }

    /// A host's own clock.
    pub(super) fn clock(&self, host: usize) -> BootTime {
        let (now, drift) = (self.now as i64, self.hosts[host].drift);
        BootTime::new(Duration::from_micros((now * 1000 + now * drift / 10 + 1_000_000) as u64))
    }

    /// How long something local takes that must not take long: a hundredth of the lease at most.
    pub(super) fn moment(&mut self) -> u64 {
        let most = self.timings.duration.as_millis() as u64 / 100;
        self.dice.between(0, most)
    }

    /// How long a record takes to become durable: now and then far longer than a lease.
    pub(super) fn write_time(&mut self) -> u64 {
        let most = if !self.calm && self.dice.percent(8) { 15_000 } else { 40 };
        self.dice.between(0, most)
    }

    pub(super) fn source_may_write(&self) -> bool {
        self.hosts[A].up && self.hosts[A].gate == Gate::Open
    }

    /// The gate compares the deadline with the clock at every acknowledgement.
    pub(super) fn destination_may_write(&self) -> bool {
        let Some(machine) = &self.destination else { return false };
        let in_time = machine.io_deadline().is_none_or(|end| self.clock(B) < end);
        let in_time = in_time || self.plant == Some(Plant::GateWithoutDeadline);
        self.hosts[B].up && self.hosts[B].gate == Gate::Open && in_time
    }

    /// Asks the other host; the answer, or silence after `within`, comes as an event.
    pub(super) fn call(&mut self, from: usize, body: Body, within: Duration, purpose: Purpose) {
        self.sequence += 1;
        let (migration, epoch) = if from == A {
            let Some(machine) = &self.source else { return };
            (machine.record().migration.0.clone(), machine.record().epoch)
        } else {
            let Some(machine) = &self.destination else { return };
            (machine.record().migration.0.clone(), machine.record().epoch)
        };
        let lives = [self.hosts[A].life, self.hosts[B].life];
        let envelope = Envelope { call: self.sequence, from, lives, migration, epoch, body };
        self.calls.insert(envelope.call, (from, self.life(from), purpose));
        self.at(within.as_millis() as u64, Event::Answer(envelope.clone(), Reply::Silence));
        self.send(from, Event::Question(envelope));
    }

    /// Puts a message on the link.
    pub(super) fn send(&mut self, from: usize, message: Event) {
        let copies = if self.calm || self.dice.percent(90) { 1 } else { 2 };
        for _ in 0..copies {
            if !self.calm && (!self.link[from] || self.dice.percent(4)) {
                continue;
            }
            let most = if !self.calm && self.dice.percent(6) { 20_000 } else { 60 };
            let delay = self.dice.between(1, most);
            self.at(delay, message.clone());
        }
    }

    pub(super) fn reply(&mut self, envelope: &Envelope, reply: Reply) {
        self.send(1 - envelope.from, Event::Answer(envelope.clone(), reply));
    }

    /// An answer, or the end of waiting for it: whoever asked is told once.
    pub(super) fn answered(&mut self, envelope: &Envelope, reply: Reply) {
        if reply != Reply::Silence && envelope.lives != [self.hosts[A].life, self.hosts[B].life] {
            return;
        }
        let Some((host, life, purpose)) = self.calls.remove(&envelope.call) else {
            // The machine may get a beat's answer at any time, and twice: the lease counts from the sending.
            let ours = self.destination.as_ref().is_some_and(|it| it.record().migration.0 == envelope.migration);
            if let (Body::Beat(beat, _), Reply::Beat(answer), true) = (&envelope.body, reply, ours) {
                self.beat_answered(*beat, answer);
            }
            return;
        };
        if life != self.life(host) {
            return;
        }
        if host == A { self.source_hears(purpose, reply) } else { self.destination_hears(purpose, reply) }
    }

    pub(super) fn question(&mut self, envelope: Envelope) {
        let to = 1 - envelope.from;
        if envelope.lives == [self.hosts[A].life, self.hosts[B].life] && self.hosts[to].up {
            if to == A { self.source_asked(envelope) } else { self.destination_asked(envelope) }
        }
    }

    /// What a record's writing came to: `None` while the disk fails, else whether it succeeded.
    pub(super) fn write_works(&mut self, host: usize) -> bool {
        let fails = self.hosts[host].poisoned || (!self.calm && self.dice.percent(2));
        self.hosts[host].poisoned = fails;
        !fails
    }

    fn destination_asked(&mut self, envelope: Envelope) {
        let ours = self.destination.as_ref().is_some_and(|machine| machine.record().migration.0 == envelope.migration);
        match envelope.body {
            Body::Prepare => {
                if let Some(machine) = &self.destination {
                    let phase = machine.record().phase;
                    if ours && phase == DestinationPhase::Ready {
                        return self.reply(&envelope, Reply::Yes);
                    }
                    if phase != DestinationPhase::Discarded || !self.torn_down {
                        return self.reply(&envelope, Reply::No);
                    }
                }
                // What an earlier attempt left is retired with its processes.
                self.generation += 1;
                let record = destination_record(&envelope.migration, envelope.epoch, self.timings);
                self.destination = Some(DestinationMachine::new(record, Beat(1000 * self.generation)));
                let host = &mut self.hosts[B];
                (host.gate, host.runs, host.frozen, host.performing) = (Gate::Held, false, false, false);
                (self.beating, self.restoring, self.torn_down, self.has_all) = (false, false, false, false);
                self.at(0, Event::Beat { life: self.generation });
                self.destination_command(DestinationEvent::ExportReady, envelope);
            }
            Body::Discard(_) if !ours => self.reply(&envelope, Reply::Yes),
            _ if !ours => self.reply(&envelope, Reply::No),
            Body::Handover(beat) => {
                self.destination_command(DestinationEvent::Activate { epoch: envelope.epoch, beat }, envelope);
            }
            Body::Discard(beat) => {
                self.destination_command(DestinationEvent::Discard { epoch: envelope.epoch, beat }, envelope);
            }
            Body::Resume => {
                let active = self.destination.as_ref().is_some_and(|machine| {
                    machine.record().phase == DestinationPhase::Active && machine.record().epoch == envelope.epoch
                });
                if !active {
                    return self.reply(&envelope, Reply::No);
                }
                if !self.restoring && !self.hosts[B].runs {
                    self.restoring = true;
                    let delay = self.dice.between(10, 6000);
                    self.at(delay, Event::Restored { life: self.generation, migration: envelope.migration.clone() });
                }
                self.reply(&envelope, Reply::Yes);
            }
            Body::Beat(..) | Body::Complete(_) => {}
        }
    }

    fn destination_command(&mut self, event: DestinationEvent, envelope: Envelope) {
        if self.destination.as_ref().is_some_and(DestinationMachine::is_busy) {
            return self.reply(&envelope, Reply::Busy);
        }
        self.hosts[B].waiting = Some(Waiting::Call(envelope));
        self.destination_event(event);
    }

    pub(super) fn destination_event(&mut self, event: DestinationEvent) {
        let now = self.clock(B);
        if !matches!(event, DestinationEvent::Tick | DestinationEvent::Done | DestinationEvent::BeatAnswered { .. }) {
            self.note(format!("B <- {event:?}"));
        }
        if let Some(machine) = &mut self.destination {
            machine.handle(now, event);
        }
        self.destination_effects();
    }

    pub(super) fn destination_effects(&mut self) {
        while !self.hosts[B].performing {
            let Some(effect) = self.destination.as_mut().and_then(DestinationMachine::poll_effect) else { return };
            let life = self.generation;
            let name = format!("{effect:?}");
            self.note(format!("B does {}", name.split(['(', '{']).next().unwrap_or(&name)));
            let delay = match &effect {
                DestinationEffect::Answer(result) => {
                    let reply = match result {
                        Ok(()) => Reply::Yes,
                        Err(Denied::Busy | Denied::OldWord) => Reply::Busy,
                        Err(_) => Reply::No,
                    };
                    if let Some(Waiting::Call(envelope)) = self.hosts[B].waiting.take() {
                        self.reply(&envelope, reply);
                    }
                    continue;
                }
                DestinationEffect::Verify => {
                    let delay = self.dice.between(1, 3000);
                    self.at(delay, Event::Verified { life });
                    continue;
                }
                DestinationEffect::TellComplete(grant) => {
                    self.call(B, Body::Complete(*grant), Duration::from_secs(10), Purpose::Complete);
                    if self.plant != Some(Plant::FenceBehindTelling) {
                        continue;
                    }
                    self.hosts[B].performing = true;
                    return;
                }
                DestinationEffect::Journal(record) => {
                    if self.plant == Some(Plant::OpenBeforeRecord) && record.phase == DestinationPhase::Active {
                        self.hosts[B].gate = Gate::Open;
                    }
                    self.write_time()
                }
                DestinationEffect::TearDown => self.dice.between(0, 3000),
                _ => self.moment(),
            };
            let ok = !matches!(effect, DestinationEffect::Journal(_)) || self.write_works(B);
            self.hosts[B].performing = true;
            self.at(delay, Event::DestinationDone { life, effect, ok });
        }
    }

    pub(super) fn destination_done(&mut self, effect: DestinationEffect, ok: bool) {
        self.hosts[B].performing = false;
        let life = self.generation;
        match effect {
            DestinationEffect::Journal(record) => {
                // A write that failed may be there all the same.
                if ok || self.dice.percent(50) {
                    self.destination_journal = Some(record);
                }
                let result = if ok { Ok(()) } else { Err(failure("no space")) };
                return self.destination_event(DestinationEvent::Journaled(result));
            }
            DestinationEffect::Open => self.hosts[B].gate = Gate::Open,
            DestinationEffect::Hold => self.hosts[B].gate = Gate::Held,
            DestinationEffect::Close => self.hosts[B].gate = Gate::Closed,
            DestinationEffect::StartPull => {
                let migration = self.destination.as_ref().map(|machine| machine.record().migration.0.clone());
                let delay = if self.has_all { 1 } else { self.dice.between(100, 20_000) };
                self.at(delay, Event::Pulled { life, migration: migration.unwrap_or_default() });
            }
            DestinationEffect::FreezeContainer => {
                if self.plant != Some(Plant::NoFence) {
                    let host = &mut self.hosts[B];
                    host.frozen |= std::mem::take(&mut host.runs);
                }
            }
            DestinationEffect::ThawContainer => {
                let host = &mut self.hosts[B];
                host.runs |= std::mem::take(&mut host.frozen);
            }
            DestinationEffect::TearDown => {
                (self.hosts[B].runs, self.hosts[B].frozen) = (false, false);
                (self.restoring, self.torn_down) = (false, true);
            }
            DestinationEffect::Verify | DestinationEffect::TellComplete(_) | DestinationEffect::Answer(_) => {}
        }
        self.destination_event(DestinationEvent::Done);
    }

    fn destination_hears(&mut self, purpose: Purpose, reply: Reply) {
        match (purpose, reply) {
            (Purpose::Beat(beat), Reply::Beat(answer)) => {
                self.beating = false;
                self.beat_answered(beat, answer);
            }
            (Purpose::Beat(_), _) => {
                self.beating = false;
                self.destination_event(DestinationEvent::Tick);
            }
            (Purpose::Complete, reply) => {
                if self.plant == Some(Plant::FenceBehindTelling) {
                    self.hosts[B].performing = false;
                }
                let result = if reply == Reply::Yes { Ok(()) } else { Err(failure("not released")) };
                self.destination_event(DestinationEvent::SourceKnows(result));
            }
            _ => {}
        }
    }

    fn beat_answered(&mut self, beat: Beat, answer: BeatAnswer) {
        let now = self.clock(B);
        let late = self.plant == Some(Plant::LeaseFromAnswer);
        let machine = self.destination.as_mut().filter(|_| late);
        let beat = machine.map_or(beat, |machine| machine.send_beat(now));
        self.destination_event(DestinationEvent::BeatAnswered { beat, answer });
    }

    /// The destination's driver wakes: a beat, or the lease's end.
    pub(super) fn beat(&mut self) {
        let life = self.generation;
        let (interval, clock) = (self.timings.beat, self.clock(B));
        let Some(machine) = &mut self.destination else { return };
        if !self.beating && machine.beats() {
            let (beat, phase) = (machine.send_beat(clock), machine.record().phase);
            self.beating = true;
            self.call(B, Body::Beat(beat, phase), interval * 2, Purpose::Beat(beat));
        }
        // Twice as often as a beat is due: the lease's end is looked for with a delay, as a busy host does.
        self.destination_event(DestinationEvent::Tick);
        self.at(interval.as_millis() as u64 / 2, Event::Beat { life });
    }

    /// The restore has come as far as it can; it reads the disk, so it ends only while the disk answers or a moment later.
    pub(super) fn restored(&mut self, migration: String) {
        let Some(machine) = &self.destination else { return };
        if !self.restoring || machine.record().migration.0 != migration {
            return;
        }
        if !self.destination_may_write() {
            let life = self.generation;
            return self.at(200, Event::Restored { life, migration });
        }
        self.restoring = false;
        self.hosts[B].runs = true;
        self.destination_event(DestinationEvent::Resumed { runs: true });
    }

    pub(super) fn pulled(&mut self, migration: String) {
        let ours = self.destination.as_ref().is_some_and(|machine| machine.record().migration.0 == migration);
        if !ours {
            return;
        }
        let reachable = self.link[A] && self.link[B] && self.hosts[A].up;
        if !self.has_all && !reachable {
            let life = self.generation;
            return self.at(500, Event::Pulled { life, migration });
        }
        self.has_all = true;
        self.destination_event(DestinationEvent::AllDurable);
    }

    pub(super) fn new_source(&mut self) {
        self.attempts += 1;
        let epoch = self.source_journal.as_ref().map_or(Epoch(0), |record| record.epoch).next();
        let migration = format!("m{}", self.attempts);
        self.source = Some(SourceMachine::new(source_record(&migration, epoch, self.timings)));
    }

    pub(super) fn source_phase(&self) -> SourcePhase {
        self.source.as_ref().map_or(SourcePhase::Serving, |machine| machine.record().phase)
    }

    pub(super) fn restart_beats(&mut self) {
        self.beating = false;
        self.restoring = false;
        self.at(0, Event::Beat { life: self.generation });
    }
}
