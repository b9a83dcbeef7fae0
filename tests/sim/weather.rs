//! What goes wrong: processes that die, hosts that lose their power, and what is done when they are back.

use lazy_migrate::migration::machine::{DestinationMachine, SourceMachine};
use lazy_migrate::migration::phase::{DestinationPhase, SourcePhase};
use lazy_migrate::migration::record::Record;
use lazy_migrate::tracker::Tracker;

use super::media::Torn;
use super::plants::{Plant, Rule};
use super::world::note;
use super::world::{A, B, Event, Gate, World};

const NAMES: [&str; 2] = ["A", "B"];

impl World {
    /// The node's process dies. The container, and what the kernel holds, stay.
    pub fn crash(&mut self, host: usize) {
        if !self.hosts[host].up {
            return;
        }
        note!(self, "{}'s node dies", NAMES[host]);
        let state = &mut self.hosts[host];
        (state.up, state.gate, state.performing, state.waiting) = (false, Gate::Closed, false, None);
        state.stalled_until = 0;
        state.life += 1;
        if host == A {
            self.a.machine = None;
            self.a.journal.lose_process(&mut self.dice);
            self.a.sealing = None;
            self.a.pending.clear();
            self.a.syncs.clear();
            self.a.tracker = Tracker::new(self.shape.size());
            self.a.written.fill(false);
            self.connections_break();
        } else {
            self.b.machine = None;
            self.b.journal.lose_process(&mut self.dice);
            self.b.export = None;
            self.b.restoring = false;
            self.b.beating = false;
            self.b.starving = false;
            self.generation += 1;
        }
    }

    /// The host loses its power.
    pub fn power_loss(&mut self, host: usize) {
        if !self.hosts[host].powered {
            return;
        }
        self.crash(host);
        note!(self, "{} loses its power", NAMES[host]);
        let state = &mut self.hosts[host];
        (state.powered, state.runs, state.frozen) = (false, false, false);
        if host == A {
            self.a.journal.lose_power(&mut self.dice);
            self.a.store.lose_power(&mut self.dice);
            self.check_source_after_power_loss();
        } else {
            self.b.journal.lose_power(&mut self.dice);
            self.b.kernel.clear();
            self.b.attached = false;
            self.b.guard = None;
            self.b.guard_froze = false;
            if let Some(media) = &mut self.b.media {
                media.store.lose_power(&mut self.dice);
                media.map_file.lose_power(&mut self.dice);
                media.live &= self.plant == Some(Plant::LiveMapTrusted);
                self.b.power_lost = true;
            }
        }
    }

    /// The host has its power again, and the node's process is started.
    pub fn restart(&mut self, host: usize) {
        if self.hosts[host].up {
            return;
        }
        note!(self, "{} restarts", NAMES[host]);
        let cold = !std::mem::replace(&mut self.hosts[host].powered, true);
        self.hosts[host].up = true;
        let torn = match self.plant {
            Some(Plant::TornRecordKept) => Torn::Kept,
            Some(Plant::TornRecordTaken) => Torn::Taken,
            _ => Torn::Cut,
        };
        let journal = if host == A { &mut self.a.journal } else { &mut self.b.journal };
        let record = match journal.open(torn) {
            Ok(record) => record,
            Err(error) => return self.violate(Rule::Journal, || error.to_string()),
        };
        if host == A {
            let Some(Record::Source(record)) = record else {
                self.a.recorded = None;
                self.hosts[A].gate = Gate::Open;
                self.hosts[A].runs |= self.container && cold;
                return;
            };
            self.restart_source(record, cold);
        } else {
            let Some(Record::Destination(record)) = record else {
                // Whatever was being prepared is forgotten.
                self.b.recorded = None;
                self.b.media = None;
                return;
            };
            self.restart_destination(record, cold);
        }
    }

    fn restart_source(&mut self, record: lazy_migrate::migration::record::SourceRecord, cold: bool) {
        let now = self.clock(A);
        let given = matches!(record.phase, SourcePhase::HandedOver | SourcePhase::RolledBack | SourcePhase::Released);
        self.hosts[A].gate = if given { Gate::ReadOnly } else { Gate::Open };
        // Nothing starts a container by itself, except the end of a rollback; in an ordinary life it is started.
        let ordinary = !given && record.container.is_none();
        self.hosts[A].runs |= cold && self.container && ordinary;
        if !given {
            self.a.freeze = None;
        }
        self.a.recorded = Some(record.clone());
        self.a.machine = Some(SourceMachine::recover(record, now));
        self.source_effects();
    }

    fn restart_destination(&mut self, record: lazy_migrate::migration::record::DestinationRecord, cold: bool) {
        let phase = record.phase;
        self.hosts[B].gate = if phase == DestinationPhase::Complete { Gate::Open } else { Gate::Held };
        self.b.torn_down = false;
        self.b.recorded = Some(record.clone());
        let first = self.first_beat();
        self.b.machine = Some(DestinationMachine::recover(record, first));
        self.open_export();
        if phase == DestinationPhase::Complete {
            self.b.attached |= !self.container && !cold;
        }
        // A container whose checkpoint was not restored yet is not started without it.
        let gone = !self.container || self.b.restored;
        if cold && gone && self.b.model.is_some() && self.dice.percent(60) {
            self.at(500, Event::ColdStart { life: self.generation });
        }
        self.at(0, Event::Beat { life: self.generation });
        self.destination_effects();
        if self.b.restored {
            let looks = self.dice.between(1, 300);
            self.at(looks, Event::Looked { life: self.generation });
        }
    }

    /// Nothing goes wrong any more, and what is down comes up.
    pub fn becomes_calm(&mut self) {
        note!(self, "from here on nothing goes wrong");
        self.calm = true;
        self.link = [true; 2];
        for host in [A, B] {
            self.hosts[host].stalled_until = 0;
            let journal = if host == A { &self.a.journal } else { &self.b.journal };
            if journal.poisoned {
                self.crash(host);
            }
            self.restart(host);
        }
    }
}
