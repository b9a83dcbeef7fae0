//! The source's driver and what it acts on.

use std::time::Duration;

use lazy_migrate::migration::machine::{BeatAnswer, PeerWord, SourceEffect, SourceEvent, SourceMachine};
use lazy_migrate::migration::phase::SourcePhase;
use lazy_migrate::migration::record::{MigrationId, Record, RollbackMode, SourceContainer, SourceRecord};
use lazy_migrate::units::{Epoch, ImageMark};

use super::failure;
use super::link::{Body, Envelope, Purpose, Reply};
use super::plants::Plant;
use super::world::note;
use super::world::{A, Event, Gate, Order, Waiting, World};

impl World {
    pub fn source_phase(&self) -> SourcePhase {
        self.a.machine.as_ref().map_or(SourcePhase::Serving, |machine| machine.record().phase)
    }

    /// It is frozen, or was, by the migration in the record.
    fn a_holds_a_container(&self) -> bool {
        self.a.machine.as_ref().is_some_and(|machine| machine.record().container.is_some())
    }

    fn new_source(&mut self) {
        self.attempts += 1;
        let epoch = self.a.recorded.as_ref().map_or(Epoch(0), |record| record.epoch).next();
        self.a.machine = Some(SourceMachine::new(SourceRecord {
            migration: MigrationId(format!("m{}", self.attempts)),
            epoch,
            phase: SourcePhase::Serving,
            peer: "10.0.0.2:10810".into(),
            peer_name: None,
            timings: self.timings,
            container: None,
            policy: self.policy,
            seal: None,
            base: None,
        }));
    }

    pub fn source_event(&mut self, event: SourceEvent) {
        let now = self.clock(A);
        if !matches!(event, SourceEvent::Done) {
            note!(self, "A <- {event:?}");
        }
        if let Some(machine) = &mut self.a.machine {
            machine.handle(now, event);
        }
        self.source_effects();
    }

    pub fn source_effects(&mut self) {
        while !self.hosts[A].performing {
            let Some(effect) = self.a.machine.as_mut().and_then(SourceMachine::poll_effect) else { return };
            let life = self.hosts[A].life;
            note!(self, "A does {effect:?}");
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
                    if record.phase == SourcePhase::HandedOver && self.a.freeze.is_none() {
                        self.a.freeze = Some(self.a.store.cache.clone());
                    }
                    if self.plant == Some(Plant::TellBeforeRecord) && record.phase == SourcePhase::HandedOver {
                        self.call(A, Body::Handover(self.a.last_beat), seconds(3), Purpose::Stray);
                    }
                    self.a.journal.begin(&Record::Source((**record).clone()));
                    let (delay, ok) = (self.write_time(), self.write_works(A));
                    self.at(delay, Event::SourceDone { life, effect, ok });
                }
                SourceEffect::Seal => {
                    self.hosts[A].gate = Gate::ReadOnly;
                    let (delay, ok) = (self.dice.between(1, 10), self.is_quiet() || !self.dice.percent(3));
                    self.at(delay, Event::SourceDone { life, effect, ok });
                }
                SourceEffect::CheckUnchanged | SourceEffect::Unseal | SourceEffect::ReleaseContainer => {
                    let delay = self.moment();
                    self.at(delay, Event::SourceDone { life, effect, ok: true });
                }
                SourceEffect::Thaw => {
                    let held = self.a_holds_a_container();
                    let (delay, ok) = (self.moment(), !held || self.is_quiet() || !self.dice.percent(20));
                    self.at(delay, Event::SourceDone { life, effect, ok });
                }
            }
        }
    }

    pub fn source_done(&mut self, effect: SourceEffect, ok: bool) {
        let result = if ok { Ok(()) } else { Err(failure("no space")) };
        if effect == SourceEffect::Seal && self.seal(ok) {
            return;
        }
        self.hosts[A].performing = false;
        match effect {
            SourceEffect::Journal(record) => {
                // A write that failed may be there all the same. (Not so the handover's: its container is thawed.)
                let there = if ok {
                    self.a.journal.end(self.plant != Some(Plant::JournalWithoutSync));
                    true
                } else {
                    self.a.journal.fail(&mut self.dice, record.phase == SourcePhase::HandedOver)
                };
                if there {
                    self.a.recorded = Some(*record);
                    self.check_record();
                }
                return self.source_event(SourceEvent::Journaled(result));
            }
            SourceEffect::Seal => {
                let mark = self.image_mark();
                return self.source_event(SourceEvent::Sealed(result.map(|()| Some(mark))));
            }
            SourceEffect::CheckUnchanged => {
                let sealed = self.a.recorded.as_ref().and_then(|record| record.seal);
                let same = sealed == Some(self.image_mark());
                let result = if same { Ok(()) } else { Err(failure("the image was changed")) };
                return self.source_event(SourceEvent::Unchanged(result));
            }
            SourceEffect::Unseal => {
                self.check_freeze_point();
                self.a.freeze = None;
                self.hosts[A].gate = Gate::Open;
            }
            SourceEffect::Thaw => {
                // The tasks may run although something else has failed.
                if self.a_holds_a_container() && (ok || self.dice.percent(30)) {
                    (self.hosts[A].runs, self.hosts[A].frozen) = (self.container, false);
                }
                return self.source_event(SourceEvent::Thawed(result));
            }
            _ => {}
        }
        self.source_event(SourceEvent::Done);
    }

    /// What the image says of itself.
    fn image_mark(&self) -> ImageMark {
        ImageMark { modified_ns: self.a.store.begin_sync() as i64, size: self.shape.size() }
    }

    /// The source's driver wakes: it may have waited for too long.
    pub fn source_tick(&mut self) {
        let now = self.clock(A);
        let due = self.a.machine.as_ref().and_then(SourceMachine::next_timeout).is_some_and(|at| at <= now);
        if due {
            self.source_event(SourceEvent::Tick);
        }
        let pause = self.lease() / 10;
        self.at(pause, Event::SourceTick);
    }

    /// Waits for what was admitted before, then syncs; true while it is not over.
    fn seal(&mut self, ok: bool) -> bool {
        let life = self.hosts[A].life;
        let wait = |world: &mut World, delay| {
            world.at(delay, Event::SourceDone { life, effect: SourceEffect::Seal, ok });
            true
        };
        match self.a.sealing.take() {
            None if self.passes_at_a() > 0 => wait(self, 1),
            None if ok && self.plant != Some(Plant::SealWithoutSync) => {
                self.a.sealing = Some(self.a.store.begin_sync());
                let takes = self.dice.between(1, 200);
                wait(self, takes)
            }
            None => false,
            Some(began) => {
                self.a.store.end_sync(began);
                // Whatever was acknowledged is durable now.
                let all = 0..self.shape.cells;
                let mark = self.a.model.mark(&all);
                self.a.model.flushed(&mark);
                false
            }
        }
    }

    pub fn source_hears(&mut self, purpose: Purpose, reply: Reply) {
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

    pub fn source_asked(&mut self, envelope: Envelope) {
        let now = self.clock(A);
        let Some(machine) = &mut self.a.machine else { return self.reply(&envelope, Reply::No) };
        let (ours, epoch) = (machine.record().migration.0 == envelope.migration, envelope.epoch);
        match envelope.body {
            Body::Beat(beat, phase) => {
                self.a.last_beat = beat;
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
                // A destination that has given the disk up makes this side take it.
                self.source_effects();
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
    pub fn order(&mut self, order: Order) {
        let phase = self.source_phase();
        if !self.hosts[A].up || self.hosts[A].stalled_until > self.now {
            return;
        }
        if self.a.machine.as_ref().is_some_and(SourceMachine::is_busy) {
            return;
        }
        let ready = self.a.machine.as_ref().is_some_and(SourceMachine::is_ready);
        let event = match order {
            Order::Prepare => {
                let held = self.a.machine.as_ref().is_some_and(|machine| machine.record().held().is_some());
                let refused = held && self.plant != Some(Plant::StuckForgotten);
                if phase != SourcePhase::Serving || self.hosts[A].performing || refused {
                    return;
                }
                self.new_source();
                SourceEvent::Prepare
            }
            // The container is recorded, then frozen, then the disk is handed over.
            Order::HandOver if phase == SourcePhase::Preparing && ready && self.hosts[A].runs => {
                return self.order(Order::Freeze);
            }
            Order::Freeze => SourceEvent::Freezing(SourceContainer {
                id: "c".into(),
                runtime: "runc".into(),
                mount: "/mnt".into(),
                netns: None,
                tcp_established: false,
                bundle: "/bundle".into(),
            }),
            Order::HandOver => SourceEvent::HandOver,
            Order::Cancel => SourceEvent::Cancel,
            Order::RollBack { insist } => SourceEvent::RollBack { mode: RollbackMode::FreezePoint, insist },
        };
        if self.a.machine.is_some() {
            self.hosts[A].waiting = Some(Waiting::Operator(order));
            self.source_event(event);
        }
    }

    fn operator_hears(&mut self, order: Order, done: bool) {
        note!(self, "operator: {order:?} {}", if done { "done" } else { "refused" });
        match (order, done, self.source_phase()) {
            (Order::Freeze, true, SourcePhase::Preparing) => {
                self.hosts[A].frozen |= std::mem::take(&mut self.hosts[A].runs);
                self.at(1, Event::Order(Order::HandOver));
            }
            (Order::HandOver, true, SourcePhase::HandedOver) if self.container => {
                self.call(A, Body::Resume, Duration::from_secs(5), Purpose::Resume);
            }
            (Order::HandOver | Order::Freeze, false, SourcePhase::Preparing | SourcePhase::Frozen) => {
                self.at(1, Event::Order(Order::Cancel));
            }
            _ => {}
        }
    }
}
