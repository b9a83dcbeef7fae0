//! The destination's machine alone: what comes before what, and every way in which it can fail.

use std::time::Duration;

use super::{DestinationEffect, DestinationEvent, destination_record, failure};
use crate::error::Failure;
use crate::migration::lease::{Beat, Timings};
use crate::migration::machine::{BeatAnswer, Denied, DestinationMachine, Grant};
use crate::migration::phase::DestinationPhase;
use crate::migration::record::{DestinationContainer, DestinationRecord};
use crate::units::{BootTime, Epoch};

const EPOCH: Epoch = Epoch(1);
const GRANTED: BeatAnswer = BeatAnswer::Granted(Grant(1));

struct Host {
    machine: DestinationMachine,
    now: BootTime,
}

fn at(seconds: u64) -> BootTime {
    BootTime::new(Duration::from_secs(seconds))
}

fn word(effect: &DestinationEffect) -> String {
    match effect {
        DestinationEffect::Journal(record) => format!("journal {}", record.phase),
        DestinationEffect::Open => "open".into(),
        DestinationEffect::Hold => "hold".into(),
        DestinationEffect::Close => "close".into(),
        DestinationEffect::StartPull => "pull".into(),
        DestinationEffect::FreezeContainer => "freeze".into(),
        DestinationEffect::ThawContainer => "thaw".into(),
        DestinationEffect::TearDown => "tear down".into(),
        DestinationEffect::Verify => "verify".into(),
        DestinationEffect::TellComplete(_) => "tell".into(),
        DestinationEffect::Answer(Ok(())) => "done".into(),
        DestinationEffect::Answer(Err(Denied::NoBeat)) => "no beat".into(),
        DestinationEffect::Answer(Err(Denied::Stale { .. })) => "stale".into(),
        DestinationEffect::Answer(Err(Denied::Refused(_))) => "refused".into(),
        DestinationEffect::Answer(Err(Denied::OldWord)) => "old word".into(),
        DestinationEffect::Answer(Err(_)) => "failed".into(),
    }
}

impl Host {
    fn new() -> Self {
        Self {
            machine: DestinationMachine::new(destination_record("m", EPOCH, Timings::default()), Beat(1)),
            now: at(100),
        }
    }

    fn ready() -> Self {
        let mut host = Self::new();
        host.does(DestinationEvent::ExportReady);
        host
    }

    fn active() -> Self {
        let mut host = Self::ready();
        host.activate();
        host
    }

    fn recovered(phase: DestinationPhase) -> Self {
        let record = destination_record("m", EPOCH, Timings::default());
        let owned = !matches!(phase, DestinationPhase::Preparing | DestinationPhase::Ready);
        Self {
            machine: DestinationMachine::recover(DestinationRecord { phase, owned, ..record }, Beat(1)),
            now: at(100),
        }
    }

    fn activate(&mut self) -> Vec<String> {
        let beat = self.machine.send_beat(self.now);
        self.does(DestinationEvent::Activate { epoch: EPOCH, beat })
    }

    /// The source's word that refers to a beat sent now.
    fn discard(&mut self) -> DestinationEvent {
        DestinationEvent::Discard { epoch: EPOCH, beat: Some(self.machine.send_beat(self.now)) }
    }

    fn answered(&mut self, answer: BeatAnswer) -> Vec<String> {
        let beat = self.machine.send_beat(self.now);
        self.does(DestinationEvent::BeatAnswered { beat, answer })
    }

    fn does(&mut self, event: DestinationEvent) -> Vec<String> {
        self.machine.handle(self.now, event);
        self.effects(true)
    }

    fn fails(&mut self, event: DestinationEvent) -> Vec<String> {
        self.machine.handle(self.now, event);
        self.effects(false)
    }

    fn effects(&mut self, journal_works: bool) -> Vec<String> {
        let mut done = Vec::new();
        while let Some(effect) = self.machine.poll_effect() {
            done.push(word(&effect));
            if matches!(effect, DestinationEffect::Journal(_)) {
                let result = if journal_works { Ok(()) } else { Err(failure("no space")) };
                self.machine.handle(self.now, DestinationEvent::Journaled(result));
            }
        }
        done
    }

    fn phase(&self) -> DestinationPhase {
        self.machine.record().phase
    }

    fn may_write(&self) -> bool {
        self.machine.io_deadline().is_none_or(|end| self.now < end)
    }
}

#[test]
fn a_migration_does_each_thing_after_its_record() {
    let mut host = Host::new();
    assert_eq!(host.does(DestinationEvent::ExportReady), ["journal preparing", "hold", "journal ready", "done"]);
    assert!(!host.may_write());
    assert_eq!(host.activate(), ["journal active", "open", "pull", "done"]);
    assert!(host.may_write() && host.machine.record().owned);
    assert_eq!(host.activate(), ["done"], "its answer may have been lost");
    assert_eq!(host.does(DestinationEvent::AllDurable), ["verify"]);
    assert_eq!(host.does(DestinationEvent::Verified(Ok(()))), ["tell"]);
    assert_eq!(host.does(DestinationEvent::SourceKnows(Ok(()))), ["journal complete"]);
    assert_eq!(host.machine.io_deadline(), None);
    assert!(!host.machine.beats());
}

#[test]
fn only_a_fresh_beat_and_the_right_epoch_make_an_owner() {
    let mut host = Host::new();
    host.effects(true);
    assert_eq!(host.activate(), ["refused"], "not ready yet");
    let mut host = Host::ready();
    let beat = host.machine.send_beat(host.now);
    assert_eq!(host.does(DestinationEvent::Activate { epoch: Epoch(2), beat }), ["stale"]);
    assert_eq!(host.does(DestinationEvent::Activate { epoch: EPOCH, beat: Beat(77) }), ["no beat"]);
    host.now = at(108);
    assert_eq!(host.does(DestinationEvent::Activate { epoch: EPOCH, beat }), ["no beat"], "the word came too late");
    assert!(!host.may_write());
}

#[test]
fn the_fence_freezes_and_a_renewal_lets_go_on() {
    let mut host = Host::active();
    host.now = at(107);
    assert_eq!(host.does(DestinationEvent::Tick), [""; 0]);
    assert_eq!(host.machine.next_timeout(), Some(at(108)));
    host.now = at(108);
    assert!(!host.may_write(), "without any timer");
    assert_eq!(host.does(DestinationEvent::Tick), ["freeze", "hold"]);
    assert_eq!(host.does(DestinationEvent::AllDurable), [""; 0], "nothing is told while fenced");
    assert_eq!(host.does(DestinationEvent::Resumed { runs: true }), ["freeze"], "a restore that ended late");
    assert_eq!(host.answered(GRANTED), ["open", "thaw", "pull", "verify"]);
    assert!(host.may_write());
    assert_eq!(host.does(DestinationEvent::Resumed { runs: true }), ["pull"]);
}

#[test]
fn a_source_that_wants_the_disk_back_gets_it() {
    let given_up = ["freeze", "hold", "journal discarded", "close", "tear down"];
    for answer in [BeatAnswer::GiveBack, BeatAnswer::RolledBack] {
        let mut host = Host::active();
        assert_eq!(host.answered(answer), given_up);
        assert!(!host.may_write());
        assert_eq!(host.machine.beats(), answer == BeatAnswer::GiveBack, "until the source knows");
        assert_eq!(host.answered(BeatAnswer::RolledBack), [""; 0]);
        assert!(!host.machine.beats());
        assert_eq!(host.does(DestinationEvent::Discard { epoch: EPOCH, beat: None }), ["done"]);
        assert_eq!(host.activate(), ["refused"], "never again");
    }
    let mut host = Host::active();
    let discard = host.discard();
    let told = ["freeze", "hold", "journal discarded", "close", "done", "tear down"];
    assert_eq!(host.does(discard), told, "its word is given when all stands still");
    let stale = DestinationEvent::Discard { epoch: Epoch(2), beat: None };
    assert_eq!(Host::active().does(stale), ["stale"]);
}

#[test]
fn a_word_that_is_older_than_a_lease_takes_nothing_from_an_owner() {
    let mut host = Host::active();
    let (discard, beat) = (host.discard(), host.machine.send_beat(host.now));
    host.now = at(107);
    host.answered(GRANTED);
    host.now = at(110);
    assert_eq!(host.does(discard), ["old word"]);
    let given_back = DestinationEvent::BeatAnswered { beat, answer: BeatAnswer::GiveBack };
    assert_eq!(host.does(given_back), [""; 0]);
    assert_eq!(host.does(DestinationEvent::Discard { epoch: EPOCH, beat: None }), ["old word"]);
    assert_eq!(host.phase(), DestinationPhase::Active);
    let mut host = Host::ready();
    let forgotten = ["freeze", "hold", "journal discarded", "close", "done", "tear down"];
    assert_eq!(host.does(DestinationEvent::Discard { epoch: EPOCH, beat: None }), forgotten, "it owns nothing");
}

#[test]
fn nothing_is_released_before_the_container_runs_here_and_all_was_compared() {
    let container = DestinationContainer { id: "web".into(), runtime: "runc".into(), tcp_established: false };
    let record = DestinationRecord { container: Some(container), ..destination_record("m", EPOCH, Timings::default()) };
    let mut host = Host { machine: DestinationMachine::new(record, Beat(1)), now: at(100) };
    host.does(DestinationEvent::ExportReady);
    assert_eq!(host.activate(), ["journal active", "open", "done"]);
    assert_eq!(host.does(DestinationEvent::AllDurable), [""; 0]);
    assert_eq!(host.does(DestinationEvent::Resumed { runs: false }), [""; 0], "the source still has it");
    assert_eq!(host.answered(GRANTED), [""; 0]);
    assert_eq!(host.does(DestinationEvent::Resumed { runs: true }), ["pull"], "and no earlier");
    assert_eq!(host.answered(GRANTED), ["verify"]);
    assert_eq!(host.answered(GRANTED), [""; 0], "one comparison at a time");
    assert_eq!(host.does(DestinationEvent::Verified(Err(failure("differs")))), [""; 0]);
    host.now = at(104);
    assert_eq!(host.answered(GRANTED), [""; 0], "not at once: it reads the whole disk");
    for now in [110, 116, 122, 128] {
        host.now = at(now);
        host.answered(GRANTED);
    }
    host.now = at(134);
    assert_eq!(host.answered(GRANTED), ["verify"]);
    assert_eq!(host.does(DestinationEvent::Verified(Err(Failure::unreachable("silent")))), [""; 0]);
    assert_eq!(host.answered(GRANTED), ["verify"], "when the source answers again");
    assert_eq!(host.does(DestinationEvent::Verified(Ok(()))), ["tell"]);
}

#[test]
fn a_container_that_would_wait_for_its_disk_stands_still_meanwhile() {
    let mut host = Host::active();
    assert_eq!(host.does(DestinationEvent::Starving(true)), ["freeze"]);
    assert_eq!(host.does(DestinationEvent::Starving(true)), [""; 0]);
    assert!(host.may_write(), "the lease holds");
    assert_eq!(host.does(DestinationEvent::Resumed { runs: true }), ["pull", "freeze"], "a restore that ended late");
    host.now = at(108);
    assert_eq!(host.does(DestinationEvent::Tick), ["freeze", "hold"]);
    assert_eq!(host.answered(GRANTED), ["open", "pull"], "the link is back, but the block is not here yet");
    assert_eq!(host.does(DestinationEvent::Starving(false)), ["thaw"]);
    host.now = at(117);
    host.does(DestinationEvent::Tick);
    assert_eq!(host.does(DestinationEvent::Starving(true)), [""; 0], "it stands still already");
    assert_eq!(host.does(DestinationEvent::Starving(false)), [""; 0], "and goes on with the lease only");
    assert_eq!(host.answered(GRANTED), ["open", "thaw", "pull"]);
}

#[test]
fn the_source_hears_that_it_is_given_back_only_when_nothing_runs_any_more() {
    let mut host = Host::active();
    let discard = host.discard();
    host.machine.handle(host.now, discard);
    assert_eq!(host.phase(), DestinationPhase::Discarded);
    for effect in ["freeze", "hold", "journal discarded"] {
        assert!(!host.machine.beats(), "before {effect}");
        assert_eq!(word(&host.machine.poll_effect().unwrap()), effect);
    }
    host.machine.handle(host.now, DestinationEvent::Journaled(Ok(())));
    assert!(host.machine.beats());
}

#[test]
fn a_complete_destination_discards_nothing() {
    let mut host = Host::active();
    host.does(DestinationEvent::AllDurable);
    host.does(DestinationEvent::Verified(Ok(())));
    host.does(DestinationEvent::SourceKnows(Ok(())));
    assert_eq!(host.does(DestinationEvent::Discard { epoch: EPOCH, beat: None }), ["refused"]);
    assert_eq!(host.answered(BeatAnswer::RolledBack), [""; 0]);
    assert_eq!(host.phase(), DestinationPhase::Complete);
}

#[test]
fn the_proof_is_told_until_the_source_knows() {
    let mut host = Host::active();
    assert_eq!(host.does(DestinationEvent::AllDurable), ["verify"]);
    assert_eq!(host.does(DestinationEvent::Verified(Ok(()))), ["tell"]);
    assert_eq!(host.answered(GRANTED), [""; 0], "one telling at a time");
    assert_eq!(host.does(DestinationEvent::SourceKnows(Err(failure("silent")))), [""; 0]);
    assert_eq!(host.answered(GRANTED), ["tell"]);
    // The answer was lost, but the next beat brings it.
    assert_eq!(host.answered(BeatAnswer::Released), ["journal complete"]);
    assert_eq!(host.does(DestinationEvent::SourceKnows(Ok(()))), [""; 0]);

    let mut host = Host::active();
    host.now = at(109);
    host.does(DestinationEvent::Tick);
    assert_eq!(host.answered(BeatAnswer::Released), ["journal complete", "open", "thaw"]);
}

#[test]
fn a_record_that_cannot_be_written_stops_what_it_stands_for() {
    let mut host = Host::ready();
    let beat = host.machine.send_beat(host.now);
    let given_up = ["journal active", "close", "failed"];
    assert_eq!(host.fails(DestinationEvent::Activate { epoch: EPOCH, beat }), given_up);
    assert!(!host.may_write() && host.machine.beats(), "the source hears of it");

    let mut host = Host::active();
    let stopped = ["freeze", "hold", "journal discarded", "close", "done", "tear down"];
    let discard = host.discard();
    assert_eq!(host.fails(discard), stopped, "it stands still all the same, and says so");
    assert!(!host.may_write() && host.machine.beats(), "the source hears of it");

    let mut host = Host::active();
    assert_eq!(
        {
            let beat = host.machine.send_beat(host.now);
            host.fails(DestinationEvent::BeatAnswered { beat, answer: BeatAnswer::Released })
        },
        ["journal complete"]
    );
    assert!(host.phase() == DestinationPhase::Active && host.may_write(), "the source is gone for good");
    assert_eq!(host.answered(BeatAnswer::Released), ["journal complete"], "tried again");
    assert_eq!(host.phase(), DestinationPhase::Complete);
}

#[test]
fn what_is_not_recorded_is_not_owned_even_when_the_lease_ends_and_is_renewed_meanwhile() {
    let mut host = Host::ready();
    let beat = host.machine.send_beat(host.now);
    host.machine.handle(host.now, DestinationEvent::Activate { epoch: EPOCH, beat });
    let record = host.machine.poll_effect();
    assert!(matches!(record, Some(DestinationEffect::Journal(_))), "{record:?}");
    assert!(host.machine.is_busy(), "a discard now would get this command's answer");
    host.now = at(109);
    host.machine.handle(host.now, DestinationEvent::Tick);
    assert_eq!(host.phase(), DestinationPhase::Fenced);
    host.machine.handle(host.now, DestinationEvent::Journaled(Err(failure("no space"))));
    assert_eq!(host.effects(true), ["close", "failed"]);
    assert_eq!(host.answered(GRANTED), [""; 0]);
    assert!(!host.may_write());
}

#[test]
fn recovery_waits_fenced_or_gives_up() {
    let given_up: &[&str] = &["freeze", "hold", "journal discarded", "close", "tear down"];
    let cases: [(DestinationPhase, &[&str], DestinationPhase); 6] = [
        (DestinationPhase::Preparing, given_up, DestinationPhase::Discarded),
        (DestinationPhase::Ready, given_up, DestinationPhase::Discarded),
        (DestinationPhase::Active, &["freeze", "hold"], DestinationPhase::Fenced),
        (DestinationPhase::Fenced, &["freeze", "hold"], DestinationPhase::Fenced),
        (DestinationPhase::Complete, &["open"], DestinationPhase::Complete),
        (DestinationPhase::Discarded, &["close", "tear down"], DestinationPhase::Discarded),
    ];
    for (phase, effects, ends) in cases {
        let mut host = Host::recovered(phase);
        assert_eq!(host.effects(true), effects, "{phase}");
        assert_eq!(host.phase(), ends);
        assert_eq!(host.may_write(), phase == DestinationPhase::Complete);
    }
    let mut host = Host::recovered(DestinationPhase::Active);
    host.effects(true);
    assert_eq!(host.answered(GRANTED), ["open", "thaw", "pull"], "a renewed lease is enough");
}
