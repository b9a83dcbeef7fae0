//! The destination's driver and what it acts on, with the guard that freezes the container when the node cannot.

use std::time::Duration;

use lazy_migrate::error::Failure;
use lazy_migrate::migration::lease::Beat;
use lazy_migrate::migration::machine::{BeatAnswer, Denied, DestinationEffect, DestinationEvent, DestinationMachine};
use lazy_migrate::migration::phase::DestinationPhase;
use lazy_migrate::migration::record::{DestinationContainer, DestinationRecord, MigrationId, Record};
use lazy_migrate::units::BlockIndex;

use super::export::Media;
use super::failure;
use super::link::{Body, Envelope, Purpose, Reply};
use super::model::Model;
use super::plants::{Plant, Rule};
use super::shape::{CELLS, block_size};
use super::world::note;
use super::world::{A, B, Event, Gate, Waiting, World};

impl World {
    /// Whether writing a record succeeds.
    pub fn write_works(&mut self, host: usize) -> bool {
        let fails = !self.is_quiet() && self.dice.percent(2);
        let journal = if host == A { &mut self.a.journal } else { &mut self.b.journal };
        journal.poisoned |= fails;
        !journal.poisoned
    }

    pub fn destination_asked(&mut self, envelope: Envelope) {
        let ours = self.b.machine.as_ref().is_some_and(|machine| machine.record().migration.0 == envelope.migration);
        match envelope.body {
            Body::Prepare => {
                if let Some(machine) = &self.b.machine {
                    let phase = machine.record().phase;
                    if ours && phase == DestinationPhase::Ready {
                        return self.reply(&envelope, Reply::Yes);
                    }
                    if phase != DestinationPhase::Discarded || !self.b.torn_down {
                        return self.reply(&envelope, Reply::No);
                    }
                }
                self.new_destination(&envelope);
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
                let active = self.b.machine.as_ref().is_some_and(|machine| {
                    machine.record().phase == DestinationPhase::Active && machine.record().epoch == envelope.epoch
                });
                if !active {
                    return self.reply(&envelope, Reply::No);
                }
                // Once restored it may have changed the disk: the checkpoint's memory does not fit any more.
                let again = self.plant == Some(Plant::RestoredAgain) && !self.hosts[B].runs && !self.hosts[B].frozen;
                if !self.b.restoring && (!self.b.restored || again) {
                    self.b.restoring = true;
                    let most = self.lease();
                    let delay = self.dice.between(10, most);
                    self.at(delay, Event::Restored { life: self.generation, migration: envelope.migration.clone() });
                }
                self.reply(&envelope, Reply::Yes);
            }
            Body::Beat(..) | Body::Complete(_) => {}
        }
    }

    /// What an earlier attempt left is retired with its processes.
    fn new_destination(&mut self, envelope: &Envelope) {
        self.generation += 1;
        let record = DestinationRecord {
            migration: MigrationId(envelope.migration.clone()),
            epoch: envelope.epoch,
            phase: DestinationPhase::Preparing,
            owned: false,
            source: "10.0.0.1:10810".into(),
            peer_name: None,
            size: self.shape.size(),
            block_size: block_size(),
            timings: self.timings,
            container: self.container.then(|| DestinationContainer {
                id: "c".into(),
                runtime: "runc".into(),
                tcp_established: false,
            }),
        };
        let first = self.first_beat();
        self.b.machine = Some(DestinationMachine::new(record, first));
        let host = &mut self.hosts[B];
        (host.gate, host.runs, host.frozen, host.performing) = (Gate::Held, false, false, false);
        let b = &mut self.b;
        (b.beating, b.restoring, b.torn_down, b.restored, b.attached) = (false, false, false, false, false);
        b.starving = false;
        (b.guard, b.guard_froze, b.model) = (None, false, None);
        b.kernel.clear();
        b.media = Some(Media::new(self.shape));
        self.open_export();
        if self.plant == Some(Plant::FetchBeforeHandover) {
            self.start_pull();
        }
        self.at(0, Event::Beat { life: self.generation });
    }

    /// Numbers that no earlier process has used.
    pub fn first_beat(&mut self) -> Beat {
        Beat(self.dice.any() >> 1)
    }

    fn destination_command(&mut self, event: DestinationEvent, envelope: Envelope) {
        if self.b.machine.as_ref().is_some_and(DestinationMachine::is_busy) {
            return self.reply(&envelope, Reply::Busy);
        }
        self.hosts[B].waiting = Some(Waiting::Call(envelope));
        self.destination_event(event);
    }

    pub fn destination_event(&mut self, event: DestinationEvent) {
        let now = self.clock(B);
        if !matches!(event, DestinationEvent::Tick | DestinationEvent::Done | DestinationEvent::BeatAnswered { .. }) {
            note!(self, "B <- {event:?}");
        }
        if let Some(machine) = &mut self.b.machine {
            machine.handle(now, event);
        }
        self.tell_guard();
        self.destination_effects();
        self.gate_changed();
    }

    /// The node tells the container's guard until when the container may run.
    fn tell_guard(&mut self) {
        let Some(machine) = &self.b.machine else { return };
        let holds = match machine.record().phase {
            DestinationPhase::Active => {
                self.b.guard = machine.lease().stop_at();
                machine.lease().holds(self.clock(B))
            }
            DestinationPhase::Complete => {
                self.b.guard = None;
                true
            }
            _ => false,
        };
        if holds && std::mem::take(&mut self.b.guard_froze) {
            let host = &mut self.hosts[B];
            host.runs |= std::mem::take(&mut host.frozen);
        }
    }

    /// The guard looks at its clock.
    pub fn guard(&mut self) {
        let node_lives = self.hosts[B].up && self.hosts[B].stalled_until <= self.now;
        let lazy = match self.plant {
            Some(Plant::NoGuard) => true,
            // The guard would cover these up.
            Some(Plant::NoFence | Plant::FenceBehindTelling) => node_lives,
            _ => false,
        };
        let over = self.b.guard.is_some_and(|end| self.clock(B) >= end);
        if over && !lazy && self.hosts[B].runs {
            note!(self, "B's guard freezes the container");
            (self.hosts[B].runs, self.hosts[B].frozen, self.b.guard_froze) = (false, true, true);
        }
        let pause = self.lease() / 50;
        self.at(pause, Event::Guard);
    }

    pub fn destination_effects(&mut self) {
        while !self.hosts[B].performing {
            let Some(effect) = self.b.machine.as_mut().and_then(DestinationMachine::poll_effect) else { return };
            let life = self.generation;
            note!(self, "B does {effect:?}");
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
                    let delay = self.dice.between(1, 400);
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
                    self.b.journal.begin(&Record::Destination(record.clone()));
                    if self.plant == Some(Plant::OpenBeforeRecord) && record.phase == DestinationPhase::Active {
                        self.hosts[B].gate = Gate::Open;
                    }
                    self.write_time()
                }
                DestinationEffect::TearDown => self.dice.between(0, 1000),
                _ => self.moment(),
            };
            let ok = !matches!(effect, DestinationEffect::Journal(_)) || self.write_works(B);
            self.hosts[B].performing = true;
            self.at(delay, Event::DestinationDone { life, effect, ok });
        }
    }

    pub fn destination_done(&mut self, effect: DestinationEffect, ok: bool) {
        self.hosts[B].performing = false;
        match effect {
            DestinationEffect::Journal(record) => {
                let there = if ok {
                    self.b.journal.end(self.plant != Some(Plant::JournalWithoutSync));
                    true
                } else {
                    self.b.journal.fail(&mut self.dice, false)
                };
                if there {
                    self.b.recorded = Some(record);
                    self.check_record();
                }
                let result = if ok { Ok(()) } else { Err(failure("no space")) };
                return self.destination_event(DestinationEvent::Journaled(result));
            }
            DestinationEffect::Open => {
                self.hosts[B].gate = Gate::Open;
                if self.b.model.is_none() {
                    // From here on clients may use it: it holds the freeze point.
                    self.b.model = self.a.freeze.as_deref().map(Model::new);
                }
                self.b.attached |= !self.container;
            }
            DestinationEffect::Hold => self.hosts[B].gate = Gate::Held,
            DestinationEffect::Close => {
                self.hosts[B].gate = Gate::Closed;
                self.b.attached = false;
            }
            DestinationEffect::StartPull => self.start_pull(),
            DestinationEffect::FreezeContainer => {
                if self.plant != Some(Plant::NoFence) {
                    let host = &mut self.hosts[B];
                    host.frozen |= std::mem::take(&mut host.runs);
                    self.b.guard_froze = false;
                }
            }
            DestinationEffect::ThawContainer => {
                // The node may have stood still in the middle of it: then the guard has frozen the container again.
                let over = self.b.guard.is_some_and(|end| self.clock(B) >= end);
                let host = &mut self.hosts[B];
                if over {
                    self.b.guard_froze = host.frozen;
                } else {
                    host.runs |= std::mem::take(&mut host.frozen);
                }
            }
            DestinationEffect::TearDown => {
                (self.hosts[B].runs, self.hosts[B].frozen) = (false, false);
                (self.b.restoring, self.b.torn_down, self.b.attached) = (false, true, false);
                self.b.kernel.clear();
                self.b.export = None;
            }
            DestinationEffect::Verify | DestinationEffect::TellComplete(_) | DestinationEffect::Answer(_) => {}
        }
        self.destination_event(DestinationEvent::Done);
    }

    pub fn destination_hears(&mut self, purpose: Purpose, reply: Reply) {
        match (purpose, reply) {
            (Purpose::Beat(beat), Reply::Beat(answer)) => {
                self.b.beating = false;
                self.beat_answered(beat, answer);
            }
            (Purpose::Beat(_), _) => {
                self.b.beating = false;
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

    pub fn beat_answered(&mut self, beat: Beat, answer: BeatAnswer) {
        let now = self.clock(B);
        let late = self.plant == Some(Plant::LeaseFromAnswer);
        let machine = self.b.machine.as_mut().filter(|_| late);
        let beat = machine.map_or(beat, |machine| machine.send_beat(now));
        self.destination_event(DestinationEvent::BeatAnswered { beat, answer });
    }

    /// The destination's driver wakes: a beat, or the lease's end.
    pub fn beat(&mut self) {
        let life = self.generation;
        let (interval, clock) = (self.timings.beat, self.clock(B));
        let Some(machine) = &mut self.b.machine else { return };
        if !self.b.beating && machine.beats() {
            let (beat, phase) = (machine.send_beat(clock), machine.record().phase);
            self.b.beating = true;
            self.call(B, Body::Beat(beat, phase), interval * 2, Purpose::Beat(beat));
        }
        // Twice as often as a beat is due: the lease's end is looked for with a delay, as a busy host does.
        self.destination_event(DestinationEvent::Tick);
        self.look_for_starvation();
        self.at(interval.as_millis() as u64 / 2, Event::Beat { life });
    }

    /// The restore has come as far as it can; it reads the disk, so it ends only while the disk answers or a moment later.
    pub fn container_restored(&mut self, migration: String) {
        let Some(machine) = &self.b.machine else { return };
        if !self.b.restoring || machine.record().migration.0 != migration {
            return;
        }
        if !self.target_may_write() {
            let life = self.generation;
            return self.at(200, Event::Restored { life, migration });
        }
        self.b.restoring = false;
        let untouched = match (&self.b.model, &self.a.freeze) {
            (Some(model), Some(freeze)) => model.is_untouched(freeze),
            _ => true,
        };
        if !untouched {
            self.violate(Rule::Memory, || "the checkpoint is restored on a disk that was written since".into());
        }
        (self.hosts[B].runs, self.b.restored, self.b.attached) = (true, true, true);
        self.destination_event(DestinationEvent::Resumed { runs: true });
    }

    /// After a power loss the operator starts what was there anew, from the disk as it is.
    pub fn cold_start(&mut self) {
        if !self.target_may_write() {
            let life = self.generation;
            return self.at(300, Event::ColdStart { life });
        }
        note!(self, "B: a cold start");
        self.b.attached = true;
        self.b.restored = true;
        self.hosts[B].runs = self.container;
        self.destination_event(DestinationEvent::Resumed { runs: self.container });
    }

    /// Whether a read waits longer for the source than the operator wants the container to see.
    fn look_for_starvation(&mut self) {
        let (Some(limit), Some(export)) = (self.starve_after, &self.b.export) else { return };
        let waits = |request: &u64| export.running.get(request).is_some_and(|it| it.since + limit < self.now);
        let starving = export.waiters.values().any(waits);
        if std::mem::replace(&mut self.b.starving, starving) != starving {
            self.destination_event(DestinationEvent::Starving(starving));
        }
    }

    /// Whether the container has outlived the node is known.
    pub fn looked(&mut self) {
        let runs = self.hosts[B].runs || self.hosts[B].frozen;
        self.destination_event(DestinationEvent::Resumed { runs });
    }

    /// Compares what came from the source with what it has.
    pub fn verify(&mut self) {
        let reachable = self.link == [true; 2] && self.hosts[A].up;
        let (Some(media), Some(export)) = (&self.b.media, &self.b.export) else { return };
        let same = |cell: usize| {
            let dirty = export.map.is_dirty(BlockIndex((cell / CELLS) as u64));
            dirty || media.store.cache[cell] == self.a.store.cache[cell]
        };
        let result = if !reachable {
            Err(Failure::unreachable("no answer"))
        } else if (0..self.shape.cells).all(same) {
            Ok(())
        } else {
            Err(failure("a block is not the source's"))
        };
        self.destination_event(DestinationEvent::Verified(result));
    }

    pub fn destination_all_durable(&mut self) {
        self.destination_event(DestinationEvent::AllDurable);
    }
}
