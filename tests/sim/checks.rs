//! What must hold: at every step, whenever a record was written, whenever a disk is opened again, and in the end.

use lazy_migrate::block_map::codec::PageWords;
use lazy_migrate::migration::phase::{DestinationPhase, SourcePhase};
use lazy_migrate::units::{BlockIndex, BlockRange};

use super::export::is_present;
use super::model::Model;
use super::plants::Rule;
use super::shape::CELLS;
use super::world::{A, B, Gate, World};

impl World {
    /// What must hold at every step.
    pub fn check(&mut self) {
        let here = self.source_may_write() || self.hosts[A].runs;
        let may_write = self.target_may_write();
        let there = may_write || self.hosts[B].runs;
        let broken = |what: &'static str| Some(what);
        let source = self.a.recorded.as_ref();
        let target = self.b.recorded.as_ref();
        let given = source.is_some_and(|it| matches!(it.phase, SourcePhase::HandedOver | SourcePhase::Released));
        let owner = if here && there {
            broken("both hosts run the container or acknowledge writes")
        } else if given && here {
            broken("the source's disk is used although it is handed over")
        } else if may_write && source.map(|it| it.epoch) > target.map(|it| it.epoch) {
            broken("a write is acknowledged at an epoch that was rolled back")
        } else {
            None
        };
        if let Some(what) = owner {
            return self.violate(Rule::OneOwner, || what.into());
        }
        let released = source.is_some_and(|it| it.phase == SourcePhase::Released);
        let complete = target.is_some_and(|it| it.phase == DestinationPhase::Complete);
        let record = if may_write && !target.is_some_and(|it| it.owned) {
            broken("the destination acknowledges writes before it has recorded that it owns the disk")
        } else if complete && !released {
            broken("the destination goes on without a lease although the source has not recorded its release")
        } else {
            None
        };
        if let Some(what) = record {
            return self.violate(Rule::RecordFirst, || what.into());
        }
        if released && target.is_some_and(|it| it.phase == DestinationPhase::Discarded) {
            return self.violate(Rule::Release, || "released and discarded: nobody owns the disk".into());
        }
        if given && !released {
            self.check_freeze_point();
        }
        if let Some(export) = &self.b.export
            && export.waiters.len() != export.queue.waiting()
        {
            let (here, there) = (export.waiters.len(), export.queue.waiting());
            self.violate(Rule::Waiters, || format!("{here} wait, of whom the queue knows {there}"));
        }
    }

    /// The source's disk is what it was when it was handed over, and a power loss would change nothing.
    pub fn check_freeze_point(&mut self) {
        let Some(freeze) = &self.a.freeze else { return };
        let given = |phase| matches!(phase, SourcePhase::HandedOver | SourcePhase::Released | SourcePhase::RolledBack);
        if !self.a.recorded.as_ref().is_some_and(|it| given(it.phase)) {
            return;
        }
        let store = &self.a.store;
        if store.cache != *freeze {
            self.violate(Rule::FreezePoint, || "the source's disk has changed since the handover".into());
        } else if !store.is_synced() {
            self.violate(Rule::FreezePoint, || "a power loss would change the source's disk".into());
        }
    }

    /// A record is in a journal: a release must be right at this moment.
    pub fn check_record(&mut self) {
        if self.a.recorded.as_ref().is_none_or(|it| it.phase != SourcePhase::Released) {
            return;
        }
        let (Some(media), Some(model)) = (&self.b.media, &self.b.model) else { return };
        let words = media.map_file.durable_words().unwrap_or_else(|_| PageWords::default());
        let missing = (0..self.shape.blocks()).find(|block| !is_present(&words, *block));
        if let Some(block) = missing {
            return self.violate(Rule::Release, || format!("released, and a power loss at B would lose block {block}"));
        }
        let wrong = |cell: &usize| media.store.possible(*cell).any(|value| !model.may_survive(*cell, value));
        if let Some(cell) = (0..self.shape.cells).find(wrong) {
            let text = model.describe(cell);
            self.violate(Rule::Release, || format!("released, and a power loss at B would change {text}"));
        }
    }

    /// B's process has opened its export again: what it holds, with the source behind it, is right.
    pub fn check_reopened(&mut self) {
        let lost_power = std::mem::take(&mut self.b.power_lost);
        let (Some(media), Some(export), Some(model)) = (&self.b.media, &self.b.export, &mut self.b.model) else {
            return;
        };
        // After a rollback nobody reads it any more, and the source behind it has gone on. But a rollback may be half recorded,
        // and forgotten when the source loses its power too.
        let epoch = self.b.recorded.as_ref().map(|it| it.epoch);
        let given = self.a.recorded.as_ref().map(|it| it.epoch) == epoch;
        let origin = self.a.freeze.as_ref();
        let mut holds = Vec::with_capacity(self.shape.cells);
        for cell in 0..self.shape.cells {
            let block = (cell / CELLS) as u64;
            let present = export.map.is_present(BlockRange::new(BlockIndex(block), BlockIndex(block + 1)));
            let Some(value) = (if present { Some(media.store.cache[cell]) } else { origin.map(|it| it[cell]) }) else {
                return;
            };
            let fits = if lost_power { model.may_survive(cell, value) } else { model.may_hold(cell, value) };
            if given && !fits {
                let (rule, text) =
                    (if lost_power { Rule::PowerLoss } else { Rule::ProcessDeath }, model.describe(cell));
                return self.violate(rule, || format!("block {block} holds {value} (present: {present}); {text}"));
            }
            holds.push(value);
        }
        if lost_power {
            *model = Model::new(&holds);
        }
    }

    /// What the source's disk holds after a power loss is right.
    pub fn check_source_after_power_loss(&mut self) {
        for cell in 0..self.shape.cells {
            let value = self.a.store.cache[cell];
            if !self.a.model.may_survive(cell, value) {
                let text = self.a.model.describe(cell);
                return self.violate(Rule::PowerLoss, || format!("the source holds {value} in {text}"));
            }
        }
        self.a.model = Model::new(&self.a.store.cache);
        self.check();
    }

    /// One host serves, and nothing is left to decide.
    pub fn is_settled(&self) -> bool {
        let complete = self.b.machine.as_ref().is_some_and(|it| it.record().phase == DestinationPhase::Complete);
        match self.source_phase() {
            SourcePhase::Serving => {
                let gone = self.b.machine.as_ref().is_none_or(|it| it.record().phase == DestinationPhase::Discarded);
                self.source_may_write() && (!self.container || self.hosts[A].runs) && gone && self.a.pending.is_empty()
            }
            SourcePhase::Released => complete && self.target_may_write() && self.b.kernel.is_empty(),
            _ => false,
        }
    }

    /// What must have been reached in the end.
    pub fn check_end(&mut self) {
        let complete = self.b.machine.as_ref().is_some_and(|it| it.record().phase == DestinationPhase::Complete);
        let phase = self.source_phase();
        let serves = self.source_may_write();
        let text = match phase {
            SourcePhase::Serving if !serves => "the source serves, but its disk does not",
            SourcePhase::Serving if self.container && !self.hosts[A].runs => {
                "the source serves, but its container stands still"
            }
            SourcePhase::Serving if complete => "two owners in the end",
            SourcePhase::Released if !(complete && self.target_may_write()) => {
                "released, but the destination is not free of its lease"
            }
            SourcePhase::Serving | SourcePhase::Released => "",
            _ => "the migration did not end although the operator repeated the command",
        };
        if !text.is_empty() {
            return self.violate(Rule::End, || format!("{text} ({phase})"));
        }
        let waiting = if phase == SourcePhase::Released { self.b.kernel.len() } else { self.a.pending.len() };
        if waiting > 0 {
            return self.violate(Rule::Waiters, || format!("{waiting} requests were never answered"));
        }
        let (Some(media), Some(model)) = (&self.b.media, &self.b.model) else { return };
        if phase == SourcePhase::Released {
            let wrong = (0..self.shape.cells).find(|cell| !model.may_hold(*cell, media.store.cache[*cell]));
            if let Some(cell) = wrong {
                let (value, text) = (media.store.cache[cell], model.describe(cell));
                self.violate(Rule::Reads, || format!("in the end the destination holds {value} in {text}"));
            }
        } else if self.hosts[B].gate == Gate::Open && self.hosts[B].runs {
            self.violate(Rule::OneOwner, || "the source serves, and the destination as well".into());
        }
    }
}
