//! The source's machine: gives the disk away at one point, and takes it back only when that is safe.
//!
//! ```text
//! Serving --prepare--> Preparing --handover--> Frozen --recorded, told--> HandedOver --proof--> Released
//!    ^                    |  cancel              | cancel                    | rollback
//!    +--------------------+----------------------+---------- RolledBack <----+
//! ```

mod words;

use std::collections::VecDeque;
use std::time::Duration;

use super::{BeatAnswer, Command, Denied, Grant};
use crate::error::Failure;
use crate::migration::lease::{Beat, GrantedLease};
use crate::migration::phase::{DestinationPhase, Refusal, SourcePhase, SourceStep};
use crate::migration::record::{OnLinkFailure, RollbackMode, SourceRecord};
use crate::units::{BootTime, Epoch};
pub use words::{PeerWord, SourceEffect, SourceEvent};

/// How long a rollback that is safe already still tries to tell the destination first.
const TELL_WHEN_SAFE: Duration = Duration::from_millis(300);
/// How long a rollback that is not safe yet tries to reach the destination.
const TELL_WHEN_UNSAFE: Duration = Duration::from_secs(3);

/// The disk was asked back without success.
#[derive(Clone, Copy, Debug)]
struct AskedBack {
    /// From then on the destination ignores what it was told.
    void_at: BootTime,
    /// The first granting answer that was given after that: whoever has it has not discarded, and will not.
    survived: Option<Grant>,
}

/// See the module's text.
pub struct SourceMachine {
    record: SourceRecord,
    ready: bool,
    told: bool,
    insisting: bool,
    rolling_back: bool,
    /// The destination was told to discard, and may yet do so: it is not released until that is impossible.
    asked_back: Option<AskedBack>,
    /// The number of the last granting answer.
    grant: Grant,
    /// When this side takes the disk back by itself, if it is to and nothing is heard.
    give_up_at: Option<BootTime>,
    /// A release or rollback could not be recorded: which of them the journal will say later, nobody knows.
    unrecorded: bool,
    /// Why the destination did not take the disk, while it is asked to forget it.
    refused: Option<Failure>,
    /// Why the container does not go on, although the disk is this host's again.
    stuck: Option<Failure>,
    command: Command,
    /// What the journal says; `record` runs ahead of it while a record is being written.
    durable: SourceRecord,
    writing: Option<SourceRecord>,
    last_beat: Option<Beat>,
    lease: Option<GrantedLease>,
    effects: VecDeque<SourceEffect>,
}

impl SourceMachine {
    /// A new migration; `record` is at [`SourcePhase::Serving`].
    pub fn new(record: SourceRecord) -> Self {
        debug_assert_eq!(record.phase, SourcePhase::Serving);
        Self {
            durable: record.clone(),
            record,
            writing: None,
            ready: false,
            told: false,
            insisting: false,
            rolling_back: false,
            asked_back: None,
            grant: Grant::default(),
            give_up_at: None,
            unrecorded: false,
            refused: None,
            stuck: None,
            command: Command::None,
            last_beat: None,
            lease: None,
            effects: VecDeque::new(),
        }
    }

    /// After a restart: the last record's effects are repeated. A lease that may have been granted counts from now.
    pub fn recover(record: SourceRecord, now: BootTime) -> Self {
        let phase = record.phase;
        let mut machine = Self::new(SourceRecord { phase: SourcePhase::Serving, ..record });
        machine.record.phase = phase;
        machine.durable.phase = phase;
        match phase {
            SourcePhase::Preparing | SourcePhase::Frozen => {
                machine.effects.push_back(SourceEffect::TellCancel);
                machine.back_to_serving();
            }
            SourcePhase::HandedOver => {
                machine.lease = Some(GrantedLease::new(machine.record.timings, now));
                // No number of an earlier process may pass for one of this one's.
                machine.grant = Grant(now.since_boot().as_nanos() as u64);
                machine.heard(now);
            }
            SourcePhase::RolledBack => machine.finish_rollback(),
            SourcePhase::Released => machine.effects.push_back(SourceEffect::ReleaseContainer),
            SourcePhase::Serving if machine.record.held().is_some() => machine.thaw_again(),
            SourcePhase::Serving => {}
        }
        machine
    }

    /// The state as it would be journaled.
    pub fn record(&self) -> &SourceRecord {
        &self.record
    }

    /// Whether the destination is prepared.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Whether the destination has confirmed the handover.
    pub fn is_told(&self) -> bool {
        self.told
    }

    /// Why the container does not go on, although the disk is this host's again.
    pub fn stuck(&self) -> Option<&Failure> {
        self.stuck.as_ref()
    }

    /// Whether a command is being done.
    pub fn is_busy(&self) -> bool {
        self.command != Command::None
    }

    /// The granted lease, once something was handed over.
    pub fn lease(&self) -> Option<&GrantedLease> {
        self.lease.as_ref().filter(|_| self.record.phase == SourcePhase::HandedOver)
    }

    /// When [`SourceEvent::Tick`] is due.
    pub fn next_timeout(&self) -> Option<BootTime> {
        let waits = self.record.phase == SourcePhase::HandedOver && !self.unrecorded;
        self.give_up_at.filter(|_| waits && !self.rolling_back && !self.is_busy())
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<SourceEffect> {
        let effect = self.effects.pop_front();
        match &effect {
            Some(SourceEffect::Answer(_)) => self.command = Command::None,
            Some(SourceEffect::Journal(record)) => self.writing = Some(SourceRecord::clone(record)),
            _ => {}
        }
        effect
    }

    /// A beat from the destination: answered at once, whatever else is being done.
    pub fn beat(&mut self, now: BootTime, epoch: Epoch, beat: Beat, theirs: DestinationPhase) -> BeatAnswer {
        // What is said here is believed, so it must be in the journal: until a release or a rollback is, it is not told.
        let durable = self.durable.phase == SourcePhase::HandedOver;
        let known = if durable { &self.durable } else { &self.record };
        if epoch != known.epoch {
            // After a rollback the epoch is higher: whoever speaks of a lower one has lost the disk.
            return BeatAnswer::RolledBack;
        }
        match known.phase {
            SourcePhase::Released => BeatAnswer::Released,
            SourcePhase::Serving | SourcePhase::RolledBack => BeatAnswer::RolledBack,
            SourcePhase::Preparing | SourcePhase::Frozen => {
                self.last_beat = Some(beat);
                BeatAnswer::Granted(self.next_grant())
            }
            SourcePhase::HandedOver if self.wants_back() || theirs == DestinationPhase::Discarded => {
                self.last_beat = Some(beat);
                self.note_asked_back(now);
                if theirs == DestinationPhase::Discarded && !self.unrecorded && !self.is_busy() && !self.rolling_back {
                    // Its answer to an earlier asking was lost, and nobody else will have the disk.
                    self.take_back();
                }
                BeatAnswer::GiveBack
            }
            SourcePhase::HandedOver => {
                if let Some(lease) = &mut self.lease {
                    lease.grant(now);
                }
                self.heard(now);
                self.last_beat = Some(beat);
                self.told |= matches!(theirs, DestinationPhase::Active | DestinationPhase::Fenced);
                let grant = self.next_grant();
                if let Some(asked) = self.asked_back.as_mut().filter(|asked| now >= asked.void_at) {
                    asked.survived.get_or_insert(grant);
                }
                BeatAnswer::Granted(grant)
            }
        }
    }

    /// Whether the lease is not renewed any more; also while the rollback's record is being written.
    fn wants_back(&self) -> bool {
        let taken = matches!(self.record.phase, SourcePhase::RolledBack | SourcePhase::Serving);
        self.insisting || self.rolling_back || taken
    }

    /// Something happened. Commands end with [`SourceEffect::Answer`].
    pub fn handle(&mut self, now: BootTime, event: SourceEvent) {
        match event {
            SourceEvent::Prepare => self.command(|machine| {
                machine.step(SourceStep::Prepare)?;
                machine.journal();
                machine.effects.push_back(SourceEffect::AskPrepare);
                Ok(())
            }),
            SourceEvent::Freezing(container) => self.command(|machine| {
                machine.record.phase.step(SourceStep::Freeze)?;
                machine.record.container = Some(container);
                machine.journal();
                machine.answer(Ok(()));
                Ok(())
            }),
            SourceEvent::HandOver => self.command(|machine| {
                if machine.record.phase == SourcePhase::Preparing && !machine.ready {
                    return Err(Denied::NoBeat);
                }
                if let (SourcePhase::HandedOver, false, Some(beat)) =
                    (machine.record.phase, machine.told, machine.last_beat)
                {
                    // The word may have been lost: giving it again is the same word.
                    machine.effects.push_back(SourceEffect::TellHandover(beat));
                    return Ok(());
                }
                if machine.record.phase == SourcePhase::HandedOver && !machine.told {
                    // Restarted, and the destination has not been heard since.
                    return Err(Denied::NoBeat);
                }
                machine.step(SourceStep::Freeze)?;
                machine.journal();
                machine.effects.push_back(SourceEffect::Seal);
                Ok(())
            }),
            SourceEvent::Cancel | SourceEvent::RollBack { .. } if self.record.held().is_some() => {
                self.command(|machine| {
                    machine.thaw_again();
                    machine.answer(Ok(()));
                    Ok(())
                })
            }
            SourceEvent::Cancel => self.command(|machine| {
                machine.record.phase.step(SourceStep::Cancel)?;
                machine.effects.push_back(SourceEffect::TellCancel);
                machine.back_to_serving();
                machine.answer(Ok(()));
                Ok(())
            }),
            SourceEvent::RollBack { mode: RollbackMode::FreezePoint, insist } => self.command(|machine| {
                machine.record.phase.step(SourceStep::RollBack)?;
                if machine.unrecorded {
                    return Err(Denied::Unrecorded);
                }
                machine.insisting |= insist;
                machine.ask_back(now);
                Ok(())
            }),
            SourceEvent::Thawed(outcome) => self.thawed(outcome),
            SourceEvent::Tick => self.give_up_waiting(now),
            SourceEvent::PeerComplete { epoch, grant } => self.command(|machine| {
                if epoch != machine.record.epoch {
                    return Err(Denied::Stale { theirs: epoch.0, ours: machine.record.epoch.0 });
                }
                machine.record.phase.step(SourceStep::Release)?;
                if machine.wants_back() {
                    // The next beat will be told so: releasing now could leave the disk without an owner.
                    return Err(Denied::AskedBack { void_in: machine.unsafe_for(now) });
                }
                if let Some(asked) = machine.asked_back {
                    if !asked.survived.is_some_and(|survived| (survived..=machine.grant).contains(&grant)) {
                        // Its word may be older than ours: the same could happen.
                        return Err(Denied::AskedBack { void_in: asked.void_at.since(now) });
                    }
                    machine.asked_back = None;
                }
                machine.effects.push_back(SourceEffect::CheckUnchanged);
                Ok(())
            }),
            SourceEvent::Unchanged(Ok(())) => {
                // Nothing else was begun meanwhile: this is a command.
                if let Err(denied) = self.step(SourceStep::Release) {
                    return self.answer(Err(denied));
                }
                self.journal();
                self.answer(Ok(()));
                self.effects.push_back(SourceEffect::ReleaseContainer);
            }
            SourceEvent::Unchanged(Err(failure)) => self.answer(Err(Denied::Failed(failure))),
            SourceEvent::Done => {}
            SourceEvent::Journaled(Ok(())) => {
                if let Some(record) = self.writing.take() {
                    self.durable = record;
                }
            }
            SourceEvent::Journaled(Err(failure)) => self.journal_failed(failure),
            SourceEvent::PeerPrepared(word) => match word {
                PeerWord::Yes => {
                    self.ready = true;
                    self.answer(Ok(()));
                }
                PeerWord::No(failure) | PeerWord::Silence(failure) => self.give_up(failure),
            },
            SourceEvent::Sealed(Ok(seal)) => match self.last_beat {
                Some(beat) => {
                    self.record.seal = seal;
                    if let Err(denied) = self.step(SourceStep::HandOver) {
                        return self.answer(Err(denied));
                    }
                    // The record first: from here on the destination may own the disk.
                    self.lease = Some(GrantedLease::new(self.record.timings, now));
                    self.heard(now);
                    self.journal();
                    self.effects.push_back(SourceEffect::TellHandover(beat));
                }
                None => self.deny_handover(Denied::NoBeat),
            },
            SourceEvent::Sealed(Err(failure)) => self.deny_handover(Denied::Failed(failure)),
            SourceEvent::PeerTold(word) => match word {
                PeerWord::Yes => {
                    self.told = true;
                    self.answer(Ok(()));
                }
                // This word was refused, but an earlier copy of it may still be on its way: the destination forgets the
                // disk first. Nothing ran there, so the freeze point is still the present.
                PeerWord::No(failure) => {
                    self.refused = Some(failure);
                    self.ask_back(now);
                }
                PeerWord::Silence(failure) => self.answer(Err(Denied::Failed(failure))),
            },
            SourceEvent::PeerDiscard(word) => self.discard_answered(now, word),
        }
    }

    /// How long a rollback without the destination's word would still be unsafe.
    pub fn unsafe_for(&self, now: BootTime) -> Duration {
        self.lease().map_or(Duration::ZERO, |lease| lease.unsafe_for(now))
    }

    fn discard_answered(&mut self, now: BootTime, word: PeerWord) {
        self.rolling_back = false;
        let outcome = self.refused.take().map_or(Ok(()), |failure| Err(Denied::Failed(failure)));
        if self.record.phase != SourcePhase::HandedOver {
            return self.answer(outcome);
        }
        match word {
            PeerWord::Yes => {}
            PeerWord::No(failure) => {
                self.insisting = false;
                self.heard(now);
                return self.answer(Err(Denied::Failed(failure)));
            }
            PeerWord::Silence(_) => {
                let unsafe_for = self.unsafe_for(now);
                if !unsafe_for.is_zero() {
                    self.give_up_at = self.give_up_at.map(|_| now.after(unsafe_for));
                    return self.answer(Err(Denied::NotSafeYet { unsafe_for }));
                }
            }
        }
        self.take_back();
        self.answer(outcome);
    }

    /// Tells the destination to discard. Without a beat since this node was started there is nobody to tell.
    fn ask_back(&mut self, now: BootTime) {
        let Some(beat) = self.last_beat else {
            return self.discard_answered(now, PeerWord::Silence(Failure::unreachable("it was not heard yet")));
        };
        self.rolling_back = true;
        self.note_asked_back(now);
        // Whoever does not answer is not waited for much longer than for the lease's end.
        let within = TELL_WHEN_UNSAFE.min(self.unsafe_for(now) + TELL_WHEN_SAFE);
        self.effects.push_back(SourceEffect::TellDiscard { within, beat });
    }

    /// The destination is told to discard at `now`, and would ignore that word later than a lease from now.
    fn note_asked_back(&mut self, now: BootTime) {
        let void_at = GrantedLease::void_at(self.record.timings, now);
        self.asked_back = Some(AskedBack { void_at, survived: None });
    }

    /// Somebody who waits for too long takes the disk back, if that was ordered.
    fn give_up_waiting(&mut self, now: BootTime) {
        if self.next_timeout().is_some_and(|at| now >= at) {
            self.insisting = true;
            self.ask_back(now);
        }
    }

    /// The destination lives: from now on its silence is counted.
    fn heard(&mut self, now: BootTime) {
        let policy = self.record.policy;
        self.give_up_at = (policy.on_link_failure == OnLinkFailure::Rollback).then(|| now.after(policy.link_timeout));
    }

    fn next_grant(&mut self) -> Grant {
        self.grant.0 += 1;
        self.grant
    }

    fn take_back(&mut self) {
        if self.step(SourceStep::RollBack).is_err() {
            return;
        }
        self.record.epoch = self.record.epoch.next();
        self.journal();
        self.finish_rollback();
    }

    fn finish_rollback(&mut self) {
        self.effects.extend([SourceEffect::Unseal, SourceEffect::Thaw]);
        if self.step(SourceStep::Resume).is_ok() {
            self.journal();
        }
    }

    fn back_to_serving(&mut self) {
        self.effects.extend([SourceEffect::Unseal, SourceEffect::Thaw]);
        if self.step(SourceStep::Cancel).is_ok() {
            self.ready = false;
            self.journal();
        }
    }

    fn thaw_again(&mut self) {
        self.effects.push_back(SourceEffect::Thaw);
        self.journal();
    }

    /// The disk is back whatever the outcome. A container that is not stays in the record, so that it can be tried again,
    /// and whoever waits for it hears that.
    fn thawed(&mut self, outcome: Result<(), Failure>) {
        self.stuck = outcome.err();
        if self.stuck.is_none() {
            self.record.container = None;
        }
        for effect in &mut self.effects {
            match effect {
                SourceEffect::Journal(record) => record.container.clone_from(&self.record.container),
                SourceEffect::Answer(answer @ Ok(())) => {
                    *answer = self.stuck.clone().map_or(Ok(()), |failure| Err(Denied::Failed(failure)));
                }
                _ => {}
            }
        }
    }

    fn give_up(&mut self, failure: Failure) {
        self.effects.push_back(SourceEffect::TellCancel);
        self.back_to_serving();
        self.answer(Err(Denied::Failed(failure)));
    }

    /// Nothing was given away: the disk is read-write again, the destination stays prepared or is told to forget.
    fn deny_handover(&mut self, denied: Denied) {
        self.effects.push_back(SourceEffect::TellCancel);
        self.back_to_serving();
        self.answer(Err(denied));
    }

    fn journal_failed(&mut self, failure: Failure) {
        // The effects behind the record must not happen. Before the handover the way back needs no record; after it
        // the disk stays as the journal has it, and the operator is told.
        self.effects.clear();
        self.writing = None;
        self.command.reopen();
        let failure = failure.context("cannot write the journal");
        match (self.durable.phase, self.record.phase) {
            (SourcePhase::HandedOver, phase) => {
                // After a rollback that may be read from the journal later, the destination must not run again; after
                // such a release it must not be asked back.
                self.unrecorded = true;
                self.insisting |= phase != SourcePhase::Released;
                self.record = self.durable.clone();
            }
            // In use again, and only the end of the rollback or cancel is not recorded: recovery repeats it.
            (SourcePhase::RolledBack | SourcePhase::Released, _) | (_, SourcePhase::Serving) => {}
            _ => {
                // The word was not given, since telling comes after the record.
                self.record.phase = SourcePhase::Serving;
                self.lease = None;
                self.ready = false;
                self.effects.extend([SourceEffect::TellCancel, SourceEffect::Unseal, SourceEffect::Thaw]);
            }
        }
        self.answer(Err(Denied::Failed(failure)));
    }

    fn command(&mut self, body: impl FnOnce(&mut Self) -> Result<(), Denied>) {
        debug_assert!(!self.is_busy(), "the driver gives one command at a time");
        self.command = Command::Doing;
        match body(self) {
            Ok(()) => {}
            Err(denied) if denied.is_already() => self.answer(Ok(())),
            Err(denied) => self.answer(Err(denied)),
        }
    }

    fn answer(&mut self, result: Result<(), Denied>) {
        if self.command.answer() {
            self.effects.push_back(SourceEffect::Answer(result));
        }
    }

    fn step(&mut self, step: SourceStep) -> Result<(), Denied> {
        self.record.phase = self.record.phase.step(step)?;
        Ok(())
    }

    fn journal(&mut self) {
        self.effects.push_back(SourceEffect::Journal(Box::new(self.record.clone())));
    }
}

impl SourceMachine {
    /// Whether a step would be taken now, without taking it.
    pub fn allows(&self, step: SourceStep) -> Result<(), Denied> {
        match self.record.phase.step(step) {
            Ok(_) => Ok(()),
            Err(refused) if refused.refusal == Refusal::Already => Ok(()),
            Err(refused) => Err(refused.into()),
        }
    }
}
