//! The destination's machine: runs only while its lease holds, and keeps what it has until the source knows.
//!
//! ```text
//! Preparing --export made, source answers--> Ready --told, fresh beat--> Active --all durable, source knows--> Complete
//!     |                                        |                          |  ^
//!     |  cancel                                | cancel            lease  v  | renewed
//!     +------------> Discarded <---------------+---- rolled back ------ Fenced
//! ```

use std::collections::VecDeque;
use std::time::Duration;

use super::{BeatAnswer, Command, Denied, Grant};
use crate::error::{Failure, Kind};
use crate::migration::lease::{Beat, HeldLease};
use crate::migration::phase::{DestinationPhase, DestinationStep};
use crate::migration::record::DestinationRecord;
use crate::units::{BootTime, Epoch};

/// How long after a comparison that failed the next one is made.
const VERIFY_AGAIN: Duration = Duration::from_secs(30);

/// Something to do. The driver does them one after the other and reports each.
#[derive(Clone, Debug, PartialEq)]
pub enum DestinationEffect {
    /// Make the record durable.
    Journal(DestinationRecord),
    /// Serve I/O.
    Open,
    /// Hold I/O: nothing fails, nothing is acknowledged.
    Hold,
    /// End I/O with ESHUTDOWN.
    Close,
    /// Fetch in the background.
    StartPull,
    /// The container stops, I/O pending or not.
    FreezeContainer,
    /// The container goes on.
    ThawContainer,
    /// The container is killed, its device torn down.
    TearDown,
    /// Compare every block that was not written here with the source's; report with [`DestinationEvent::Verified`].
    /// Done beside the others, like the next one: a fence must not wait for it.
    Verify,
    /// Tell the source that every block is durable here; report with [`DestinationEvent::SourceKnows`]. The source may
    /// not answer.
    TellComplete(Grant),
    /// The command that is being done has ended.
    Answer(Result<(), Denied>),
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub enum DestinationEvent {
    /// The export is made and the source's disk answers.
    ExportReady,
    /// The source hands over: `beat` is the last beat that it had heard.
    Activate {
        /// At this epoch.
        epoch: Epoch,
        /// From whose sending the lease counts.
        beat: Beat,
    },
    /// The source's answer to a beat.
    BeatAnswered {
        /// Which one.
        beat: Beat,
        /// What it said.
        answer: BeatAnswer,
    },
    /// Time has passed.
    Tick,
    /// Every block is present, and durable with its bit.
    AllDurable,
    /// The answer to [`DestinationEffect::Verify`]: what came from the source is what the source has, or not.
    Verified(Result<(), Failure>),
    /// A read waits longer for the source than the operator wants the container to see, or none does any more.
    Starving(bool),
    /// The answer to [`DestinationEffect::TellComplete`]: the source has recorded its release, or not.
    SourceKnows(Result<(), Failure>),
    /// The source cancelled or rolled back, at this epoch.
    Discard {
        /// At this epoch.
        epoch: Epoch,
        /// The last beat that the source had heard; a host that owns the disk heeds the word only while that is not older
        /// than a lease. `None` before the handover.
        beat: Option<Beat>,
    },
    /// The restore has ended (or it was looked for what outlived the node), which takes its time: the lease may have ended meanwhile.
    Resumed {
        /// Whether the container runs here now.
        runs: bool,
    },
    /// The record is durable, or could not be made so.
    Journaled(Result<(), Failure>),
    /// Any other effect has ended.
    Done,
}

/// See the module's text.
pub struct DestinationMachine {
    record: DestinationRecord,
    lease: HeldLease,
    all_durable: bool,
    verifying: bool,
    verified: bool,
    verify_at: BootTime,
    telling: bool,
    /// A discarded disk is known to be so at the source.
    source_knows: bool,
    /// The last granting answer.
    grant: Grant,
    /// The container runs here, or would if it were not frozen.
    runs: bool,
    starving: bool,
    /// It is discarded, and everything stands still.
    given_up: bool,
    command: Command,
    /// Where a completion that cannot be recorded goes back to.
    before_complete: DestinationPhase,
    /// Whether the journal says that this host was given the disk.
    durably_owned: bool,
    writing_owned: bool,
    /// The phase of the record that is being written.
    writing: DestinationPhase,
    effects: VecDeque<DestinationEffect>,
}

impl DestinationMachine {
    /// A new migration, to be made ready; `record` is at [`DestinationPhase::Preparing`]. It is journaled first. Beats are
    /// numbered from `first` on: see [`HeldLease::new`].
    pub fn new(record: DestinationRecord, first: Beat) -> Self {
        let lease = HeldLease::new(record.timings, first);
        let effects = VecDeque::from([DestinationEffect::Journal(record.clone())]);
        Self {
            before_complete: record.phase,
            durably_owned: record.owned,
            writing_owned: false,
            record,
            lease,
            all_durable: false,
            verifying: false,
            verified: false,
            verify_at: BootTime::default(),
            telling: false,
            source_knows: false,
            grant: Grant::default(),
            runs: false,
            starving: false,
            given_up: false,
            writing: DestinationPhase::Preparing,
            command: Command::None,
            effects,
        }
    }

    /// After a restart. What was not handed over is given up; what was waits, fenced, for a renewed lease. Whether the
    /// container has outlived the node is told by [`DestinationEvent::Resumed`]; if not, nothing is started by itself.
    pub fn recover(record: DestinationRecord, first: Beat) -> Self {
        let mut machine = Self::new(record, first);
        machine.effects.clear();
        match machine.record.phase {
            DestinationPhase::Preparing | DestinationPhase::Ready => {
                machine.discard();
                machine.effects.push_back(DestinationEffect::TearDown);
            }
            DestinationPhase::Active | DestinationPhase::Fenced => {
                machine.record.phase = DestinationPhase::Fenced;
                machine.effects.extend([DestinationEffect::FreezeContainer, DestinationEffect::Hold]);
            }
            DestinationPhase::Complete => machine.effects.push_back(DestinationEffect::Open),
            DestinationPhase::Discarded => {
                machine.given_up = true;
                machine.effects.extend([DestinationEffect::Close, DestinationEffect::TearDown]);
            }
        }
        machine
    }

    /// The state as it would be journaled.
    pub fn record(&self) -> &DestinationRecord {
        &self.record
    }

    /// Whether a command is being done.
    pub fn is_busy(&self) -> bool {
        self.command != Command::None
    }

    /// Whether beats are to be sent.
    pub fn beats(&self) -> bool {
        match self.record.phase {
            DestinationPhase::Ready | DestinationPhase::Active | DestinationPhase::Fenced => true,
            // Until the source knows: its asking may have been answered in vain. But not while anything may still run: it takes
            // the disk at that word.
            DestinationPhase::Discarded => self.record.owned && self.given_up && !self.source_knows,
            DestinationPhase::Preparing | DestinationPhase::Complete => false,
        }
    }

    /// The number for the beat that is sent now.
    pub fn send_beat(&mut self, now: BootTime) -> Beat {
        self.lease.send_beat(now)
    }

    /// Whether the container runs here, or would if it were not frozen.
    pub fn container_runs(&self) -> bool {
        self.runs
    }

    /// Whether the container stands still because its reads wait for the source.
    pub fn is_starving(&self) -> bool {
        self.starving
    }

    /// The lease as it is held.
    pub fn lease(&self) -> &HeldLease {
        &self.lease
    }

    /// Until when I/O may be acknowledged: `None` is without end (complete), the past when it may not at all.
    pub fn io_deadline(&self) -> Option<BootTime> {
        match self.record.phase {
            DestinationPhase::Complete => None,
            DestinationPhase::Active => Some(self.lease.stop_at().unwrap_or_default()),
            _ => Some(BootTime::default()),
        }
    }

    /// When [`DestinationEvent::Tick`] is due.
    pub fn next_timeout(&self) -> Option<BootTime> {
        (self.record.phase == DestinationPhase::Active).then(|| self.lease.stop_at()).flatten()
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<DestinationEffect> {
        let effect = self.effects.pop_front();
        match &effect {
            Some(DestinationEffect::Answer(_)) => self.command = Command::None,
            Some(DestinationEffect::Journal(record)) => {
                (self.writing_owned, self.writing) = (record.owned, record.phase)
            }
            _ => {}
        }
        effect
    }

    /// Something happened. `ExportReady`, `Activate` and `Discard` are commands: they end with
    /// [`DestinationEffect::Answer`].
    pub fn handle(&mut self, now: BootTime, event: DestinationEvent) {
        match event {
            DestinationEvent::ExportReady => self.command(|machine| {
                machine.step(DestinationStep::BecomeReady)?;
                machine.effects.push_back(DestinationEffect::Hold);
                machine.journal();
                machine.answer(Ok(()));
                Ok(())
            }),
            DestinationEvent::Activate { epoch, beat } => self.command(|machine| {
                machine.check_epoch(epoch)?;
                let next = machine.record.phase.step(DestinationStep::Activate)?;
                // A word that lay in the link for longer than a lease is not a lease.
                if !machine.lease.renew(now, beat) {
                    return Err(Denied::NoBeat);
                }
                machine.record.phase = next;
                machine.record.owned = true;
                machine.journal();
                machine.effects.push_back(DestinationEffect::Open);
                machine.start_pull();
                machine.answer(Ok(()));
                Ok(())
            }),
            DestinationEvent::Discard { epoch, beat } => self.command(|machine| {
                machine.check_epoch(epoch)?;
                machine.record.phase.step(DestinationStep::Discard)?;
                let owns = matches!(machine.record.phase, DestinationPhase::Active | DestinationPhase::Fenced);
                if owns && !beat.is_some_and(|beat| machine.lease.is_fresh(now, beat)) {
                    return Err(Denied::OldWord);
                }
                machine.discard();
                // Recorded, closed and frozen is enough for the source to go on; the rest takes its time.
                machine.answer(Ok(()));
                machine.effects.push_back(DestinationEffect::TearDown);
                Ok(())
            }),
            DestinationEvent::BeatAnswered { beat, answer } => self.beat_answered(now, beat, answer),
            DestinationEvent::Tick => self.fence_if_over(now),
            DestinationEvent::AllDurable => {
                self.all_durable = true;
                self.tell_complete(now);
            }
            DestinationEvent::Verified(result) => {
                self.verifying = false;
                self.verified = result.is_ok();
                let unheard = result.is_err_and(|failure| failure.kind == Kind::Unreachable);
                // Again with a beat that is answered.
                self.verify_at = if unheard { now } else { now.after(VERIFY_AGAIN) };
                if self.verified {
                    self.tell_complete(now);
                }
            }
            DestinationEvent::Starving(starving) => {
                if self.starving != starving && self.record.phase == DestinationPhase::Active {
                    self.effects.push_back(match starving {
                        true => DestinationEffect::FreezeContainer,
                        false => DestinationEffect::ThawContainer,
                    });
                }
                self.starving = starving;
            }
            DestinationEvent::SourceKnows(result) => {
                self.telling = false;
                if result.is_ok() {
                    self.complete();
                }
            }
            DestinationEvent::Resumed { runs } => {
                self.runs = runs;
                if runs && self.record.phase == DestinationPhase::Active {
                    self.start_pull();
                }
                let starves = self.starving && self.record.phase == DestinationPhase::Active;
                if starves || matches!(self.record.phase, DestinationPhase::Fenced | DestinationPhase::Discarded) {
                    self.effects.push_back(DestinationEffect::FreezeContainer);
                }
            }
            DestinationEvent::Done => {}
            DestinationEvent::Journaled(Ok(())) => {
                self.durably_owned |= self.writing_owned;
                // Freezing and holding came before it.
                self.given_up |= self.writing == DestinationPhase::Discarded;
            }
            DestinationEvent::Journaled(Err(failure)) => self.journal_failed(failure),
        }
    }

    /// What the record stands for must not happen; a destination that cannot record gives up what it was about to take,
    /// and keeps still with what it has.
    fn journal_failed(&mut self, failure: Failure) {
        self.effects.clear();
        self.command.reopen();
        match self.record.phase {
            DestinationPhase::Active | DestinationPhase::Fenced if !self.durably_owned => {
                self.record.phase = DestinationPhase::Discarded;
                self.given_up = true;
                self.effects.push_back(DestinationEffect::Close);
            }
            // The source has recorded its release and says so again with every beat: this is tried again.
            DestinationPhase::Complete => self.record.phase = self.before_complete,
            // Recorded or not, nothing runs here without a grant that is still to come: a node that starts again with the
            // older record asks for one first. So the source may have its disk back, although this host's own is broken.
            DestinationPhase::Discarded => {
                self.given_up = true;
                self.effects.push_back(DestinationEffect::Close);
                self.answer(Ok(()));
                self.effects.push_back(DestinationEffect::TearDown);
                return;
            }
            _ => {}
        }
        self.answer(Err(Denied::Failed(failure.context("cannot write the journal"))));
    }

    fn beat_answered(&mut self, now: BootTime, beat: Beat, answer: BeatAnswer) {
        match answer {
            BeatAnswer::Granted(grant) => {
                if matches!(self.record.phase, DestinationPhase::Active | DestinationPhase::Fenced) {
                    // Not the highest: a source that was restarted counts anew.
                    self.grant = grant;
                }
                let holds = self.lease.renew(now, beat);
                if holds && self.record.phase == DestinationPhase::Fenced && self.step(DestinationStep::Unfence).is_ok()
                {
                    self.effects.push_back(DestinationEffect::Open);
                    self.thaw();
                    self.start_pull();
                }
                self.fence_if_over(now);
                self.tell_complete(now);
            }
            // An answer that lay on the link for longer than a lease may have been thought better of.
            BeatAnswer::GiveBack if !self.lease.is_fresh(now, beat) => {}
            BeatAnswer::GiveBack | BeatAnswer::RolledBack => {
                self.source_knows |= answer == BeatAnswer::RolledBack;
                if self.record.phase.step(DestinationStep::Discard).is_ok() {
                    self.discard();
                    self.effects.push_back(DestinationEffect::TearDown);
                }
            }
            // It knows already: the answer to the last word was lost.
            BeatAnswer::Released => {
                // It never comes back for the disk, so running on is safe even if that cannot be recorded yet.
                self.lease.renew(now, beat);
                self.complete();
            }
        }
    }

    fn fence_if_over(&mut self, now: BootTime) {
        if self.record.phase == DestinationPhase::Active
            && !self.lease.holds(now)
            && self.step(DestinationStep::Fence).is_ok()
        {
            // The gate's deadline has passed by itself; the container has only this.
            self.effects.extend([DestinationEffect::FreezeContainer, DestinationEffect::Hold]);
        }
    }

    /// Everything is here: it is compared, then the source is told. But never before the container runs here: what the
    /// source keeps of it would be gone.
    fn tell_complete(&mut self, now: BootTime) {
        if !self.all_durable || !self.moved() || self.record.phase != DestinationPhase::Active {
            return;
        }
        if !self.verified {
            if !self.verifying && now >= self.verify_at {
                self.verifying = true;
                self.effects.push_back(DestinationEffect::Verify);
            }
        } else if !self.telling {
            self.telling = true;
            self.effects.push_back(DestinationEffect::TellComplete(self.grant));
        }
    }

    /// Whether there is nothing that still has to come to life here.
    fn moved(&self) -> bool {
        self.runs || self.record.container.is_none()
    }

    /// Not before the container runs: no disk content competes with the pause.
    fn start_pull(&mut self) {
        if self.moved() {
            self.effects.push_back(DestinationEffect::StartPull);
        }
    }

    /// The container goes on, unless it would only wait for its disk.
    fn thaw(&mut self) {
        if !self.starving {
            self.effects.push_back(DestinationEffect::ThawContainer);
        }
    }

    fn complete(&mut self) {
        let before = self.record.phase;
        let fenced = before == DestinationPhase::Fenced;
        if fenced && self.step(DestinationStep::Unfence).is_err() {
            return;
        }
        if self.step(DestinationStep::Complete).is_ok() {
            self.before_complete = before;
            self.journal();
            if fenced {
                self.effects.push_back(DestinationEffect::Open);
                self.thaw();
            }
        }
    }

    fn discard(&mut self) {
        self.runs = false;
        self.effects.push_back(DestinationEffect::FreezeContainer);
        self.effects.push_back(DestinationEffect::Hold);
        if self.step(DestinationStep::Discard).is_ok() {
            self.journal();
            self.effects.push_back(DestinationEffect::Close);
        }
    }

    fn check_epoch(&self, epoch: Epoch) -> Result<(), Denied> {
        if epoch == self.record.epoch {
            Ok(())
        } else {
            Err(Denied::Stale { theirs: epoch.0, ours: self.record.epoch.0 })
        }
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
            self.effects.push_back(DestinationEffect::Answer(result));
        }
    }

    fn step(&mut self, step: DestinationStep) -> Result<(), Denied> {
        self.record.phase = self.record.phase.step(step)?;
        Ok(())
    }

    fn journal(&mut self) {
        self.effects.push_back(DestinationEffect::Journal(self.record.clone()));
    }
}
