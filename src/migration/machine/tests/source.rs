//! The source's machine alone: what comes before what, and every way in which it can fail.

use std::time::Duration;

use super::{failure, source_record};
use crate::migration::lease::{Beat, Timings};
use crate::migration::machine::{BeatAnswer, Denied, Grant, PeerWord, SourceEffect, SourceEvent, SourceMachine};
use crate::migration::phase::{DestinationPhase, SourcePhase};
use crate::migration::record::{LinkPolicy, OnLinkFailure, RollbackMode, SourceContainer, SourceRecord};
use crate::units::{BootTime, Epoch};

const EPOCH: Epoch = Epoch(1);

/// A machine and what it did, one word an effect.
struct Host {
    machine: SourceMachine,
    now: BootTime,
}

fn at(seconds: u64) -> BootTime {
    BootTime::new(Duration::from_secs(seconds))
}

fn word(effect: &SourceEffect) -> String {
    match effect {
        SourceEffect::Journal(record) => format!("journal {} {}", record.phase, record.epoch.0),
        SourceEffect::AskPrepare => "ask".into(),
        SourceEffect::Seal => "seal".into(),
        SourceEffect::TellHandover(beat) => format!("tell {}", beat.0),
        SourceEffect::TellCancel => "tell cancel".into(),
        SourceEffect::TellDiscard { .. } => "tell discard".into(),
        SourceEffect::CheckUnchanged => "check".into(),
        SourceEffect::Unseal => "unseal".into(),
        SourceEffect::Thaw => "thaw".into(),
        SourceEffect::ReleaseContainer => "release".into(),
        SourceEffect::Answer(Ok(())) => "done".into(),
        SourceEffect::Answer(Err(denied)) => match denied {
            Denied::Refused(_) => "refused".into(),
            Denied::NotSafeYet { unsafe_for } => format!("unsafe for {}", unsafe_for.as_secs()),
            Denied::Stale { .. } => "stale".into(),
            Denied::NoBeat => "no beat".into(),
            Denied::AskedBack { .. } => "asked back".into(),
            Denied::OldWord => "old word".into(),
            Denied::Unrecorded => "unrecorded".into(),
            Denied::Busy => "busy".into(),
            Denied::Failed(_) => "failed".into(),
        },
    }
}

impl Host {
    fn new() -> Self {
        Self { machine: SourceMachine::new(source_record("m", EPOCH, Timings::default())), now: at(100) }
    }

    fn recovered(phase: SourcePhase) -> Self {
        let record = SourceRecord { phase, ..source_record("m", EPOCH, Timings::default()) };
        Self { machine: SourceMachine::recover(record, at(100)), now: at(100) }
    }

    fn handed_over() -> Self {
        let mut host = Self::new();
        host.does(SourceEvent::Prepare);
        host.does(SourceEvent::PeerPrepared(PeerWord::Yes));
        host.beats(3, DestinationPhase::Ready);
        host.does(SourceEvent::HandOver);
        host.does(SourceEvent::Sealed(Ok(None)));
        host
    }

    /// The same, and the destination has confirmed it.
    fn told() -> Self {
        let mut host = Self::handed_over();
        host.does(SourceEvent::PeerTold(PeerWord::Yes));
        host
    }

    /// Gives an event, does all effects that need no answer; every record succeeds.
    fn does(&mut self, event: SourceEvent) -> Vec<String> {
        self.machine.handle(self.now, event);
        self.effects(true)
    }

    /// The same, but the first record cannot be written.
    fn fails(&mut self, event: SourceEvent) -> Vec<String> {
        self.machine.handle(self.now, event);
        self.effects(false)
    }

    fn effects(&mut self, journal_works: bool) -> Vec<String> {
        let mut done = Vec::new();
        while let Some(effect) = self.machine.poll_effect() {
            done.push(word(&effect));
            if matches!(effect, SourceEffect::Journal(_)) {
                let result = if journal_works { Ok(()) } else { Err(failure("no space")) };
                self.machine.handle(self.now, SourceEvent::Journaled(result));
            }
        }
        done
    }

    fn beats(&mut self, beat: u64, theirs: DestinationPhase) -> BeatAnswer {
        self.machine.beat(self.now, EPOCH, Beat(beat), theirs)
    }

    fn phase(&self) -> SourcePhase {
        self.machine.record().phase
    }
}

fn rollback(insist: bool) -> SourceEvent {
    SourceEvent::RollBack { mode: RollbackMode::FreezePoint, insist }
}

fn complete_at(epoch: Epoch, grant: u64) -> SourceEvent {
    SourceEvent::PeerComplete { epoch, grant: Grant(grant) }
}

/// All is durable, says a destination that has that granting answer.
fn complete(grant: u64) -> SourceEvent {
    complete_at(EPOCH, grant)
}

fn granted(answer: BeatAnswer) -> u64 {
    match answer {
        BeatAnswer::Granted(grant) => grant.0,
        other => panic!("{other:?}"),
    }
}

fn silence() -> PeerWord {
    PeerWord::Silence(failure("silent"))
}

fn no() -> PeerWord {
    PeerWord::No(failure("no"))
}

#[test]
fn a_migration_does_each_thing_after_its_record() {
    let mut host = Host::new();
    assert_eq!(host.does(SourceEvent::Prepare), ["journal preparing 1", "ask"]);
    assert_eq!(host.does(SourceEvent::PeerPrepared(PeerWord::Yes)), ["done"]);
    granted(host.beats(3, DestinationPhase::Ready));
    assert_eq!(host.does(SourceEvent::HandOver), ["journal frozen 1", "seal"]);
    assert_eq!(host.does(SourceEvent::Sealed(Ok(None))), ["journal handed-over 1", "tell 3"]);
    assert_eq!(host.does(SourceEvent::PeerTold(PeerWord::Yes)), ["done"]);
    assert_eq!(host.does(complete(0)), ["check"]);
    assert_eq!(host.does(SourceEvent::Unchanged(Ok(()))), ["journal released 1", "done", "release"]);
    assert_eq!(host.beats(9, DestinationPhase::Active), BeatAnswer::Released);
    assert_eq!(host.does(complete(0)), ["done"], "its answer may have been lost");
    assert_eq!(host.does(rollback(true)), ["refused"]);
}

#[test]
fn a_destination_that_does_not_prepare_is_told_to_forget() {
    for word in [no(), silence()] {
        let mut host = Host::new();
        host.does(SourceEvent::Prepare);
        let undone = ["tell cancel", "unseal", "thaw", "journal serving 1", "failed"];
        assert_eq!(host.does(SourceEvent::PeerPrepared(word)), undone);
        assert_eq!(host.phase(), SourcePhase::Serving);
    }
}

#[test]
fn nothing_is_handed_over_without_a_ready_destination_or_a_sealed_disk() {
    let mut host = Host::new();
    assert_eq!(host.does(SourceEvent::HandOver), ["refused"]);
    host.does(SourceEvent::Prepare);
    host.does(SourceEvent::PeerPrepared(PeerWord::Yes));
    host.does(SourceEvent::HandOver);
    let undone = |end| ["tell cancel", "unseal", "thaw", "journal serving 1", end];
    assert_eq!(host.does(SourceEvent::Sealed(Ok(None))), undone("no beat"));

    let mut host = Host::new();
    host.does(SourceEvent::Prepare);
    host.does(SourceEvent::PeerPrepared(PeerWord::Yes));
    host.beats(1, DestinationPhase::Ready);
    host.does(SourceEvent::HandOver);
    assert_eq!(host.does(SourceEvent::Sealed(Err(failure("EIO")))), undone("failed"));
}

#[test]
fn a_record_that_cannot_be_written_stops_what_it_stands_for() {
    let mut host = Host::new();
    assert_eq!(
        host.fails(SourceEvent::Prepare),
        ["journal preparing 1", "tell cancel", "unseal", "thaw", "failed"],
        "nothing is asked"
    );
    assert_eq!(host.phase(), SourcePhase::Serving);

    let mut host = Host::new();
    host.does(SourceEvent::Prepare);
    host.does(SourceEvent::PeerPrepared(PeerWord::Yes));
    host.beats(1, DestinationPhase::Ready);
    host.does(SourceEvent::HandOver);
    let done = host.fails(SourceEvent::Sealed(Ok(None)));
    assert_eq!(done, ["journal handed-over 1", "tell cancel", "unseal", "thaw", "failed"], "the word is not given");

    let mut host = Host::told();
    host.does(complete(0));
    let done = host.fails(SourceEvent::Unchanged(Ok(())));
    assert_eq!(done, ["journal released 1", "failed"], "nothing is removed");
    assert_eq!(host.phase(), SourcePhase::HandedOver);
    // The journal may say "released" after a restart: the destination must not be asked back.
    granted(host.beats(9, DestinationPhase::Active));
    assert_eq!(host.does(rollback(true)), ["unrecorded"]);

    let mut host = Host::told();
    host.does(rollback(false));
    let done = host.fails(SourceEvent::PeerDiscard(PeerWord::Yes));
    assert_eq!(done, ["journal rolled-back 2", "failed"], "the disk stays read-only, the container frozen");
    assert_eq!((host.phase(), host.machine.record().epoch), (SourcePhase::HandedOver, EPOCH));
    // The journal may say "rolled back" after a restart: the destination must not go on.
    assert_eq!(host.beats(9, DestinationPhase::Active), BeatAnswer::GiveBack);
}

#[test]
fn a_lost_word_is_told_again() {
    let mut host = Host::handed_over();
    assert_eq!(host.does(SourceEvent::PeerTold(silence())), ["failed"]);
    assert_eq!(host.phase(), SourcePhase::HandedOver);
    assert_eq!(host.does(SourceEvent::HandOver), ["tell 3"]);
    assert_eq!(host.does(SourceEvent::PeerTold(PeerWord::Yes)), ["done"]);
    assert_eq!(host.does(SourceEvent::HandOver), ["done"]);
    // A beat says so as well.
    let mut host = Host::handed_over();
    host.does(SourceEvent::PeerTold(silence()));
    host.beats(4, DestinationPhase::Active);
    assert_eq!(host.does(SourceEvent::HandOver), ["done"]);
}

#[test]
fn after_a_restart_the_word_is_not_believed_to_have_arrived() {
    let mut host = Host::recovered(SourcePhase::HandedOver);
    assert_eq!(host.does(SourceEvent::HandOver), ["no beat"]);
    host.beats(7, DestinationPhase::Ready);
    assert_eq!(host.does(SourceEvent::HandOver), ["tell 7"]);
}

#[test]
fn a_refused_handover_is_undone_only_when_the_destination_has_forgotten_it() {
    let rolled_back = ["journal rolled-back 2", "unseal", "thaw", "journal serving 2", "failed"];
    let mut host = Host::handed_over();
    assert_eq!(host.does(SourceEvent::PeerTold(no())), ["tell discard"]);
    assert_eq!(host.does(SourceEvent::PeerDiscard(PeerWord::Yes)), rolled_back);
    let mut host = Host::handed_over();
    host.does(SourceEvent::PeerTold(no()));
    assert_eq!(host.does(SourceEvent::PeerDiscard(silence())), ["unsafe for 11"]);
    assert_eq!(host.phase(), SourcePhase::HandedOver);
}

#[test]
fn a_rollback_needs_the_word_or_the_end_of_the_lease() {
    let rolled_back = ["journal rolled-back 2", "unseal", "thaw", "journal serving 2", "done"];
    let mut host = Host::told();
    assert_eq!(host.does(rollback(false)), ["tell discard"]);
    assert_eq!(host.does(SourceEvent::PeerDiscard(no())), ["failed"]);
    host.does(rollback(false));
    assert_eq!(host.does(SourceEvent::PeerDiscard(silence())), ["unsafe for 11"]);
    granted(host.beats(5, DestinationPhase::Active));
    host.does(rollback(true));
    assert_eq!(host.does(SourceEvent::PeerDiscard(silence())), ["unsafe for 11"]);
    assert_eq!(host.beats(6, DestinationPhase::Active), BeatAnswer::GiveBack, "the lease is let end");
    host.now = at(110);
    assert_eq!(host.machine.unsafe_for(host.now), Duration::from_secs(1));
    host.now = at(111);
    host.does(rollback(false));
    assert_eq!(host.does(SourceEvent::PeerDiscard(silence())), rolled_back);
    assert_eq!(host.beats(7, DestinationPhase::Fenced), BeatAnswer::RolledBack);

    let mut host = Host::told();
    host.does(rollback(false));
    assert_eq!(host.does(SourceEvent::PeerDiscard(PeerWord::Yes)), rolled_back, "its word needs no waiting");
}

#[test]
fn a_restart_counts_the_lease_anew_and_a_beat_lengthens_it() {
    let mut host = Host::recovered(SourcePhase::HandedOver);
    host.now = at(105);
    assert_eq!(host.machine.unsafe_for(host.now), Duration::from_secs(6));
    granted(host.beats(1, DestinationPhase::Active));
    assert_eq!(host.machine.unsafe_for(host.now), Duration::from_secs(11));
}

#[test]
fn nothing_is_released_once_the_disk_was_asked_back() {
    let mut host = Host::told();
    host.does(rollback(false));
    host.does(SourceEvent::PeerDiscard(silence()));
    // The word may have been on its way since before the destination discarded.
    assert_eq!(host.does(complete(0)), ["asked back"]);
    assert_eq!(host.phase(), SourcePhase::HandedOver);
    let mut host = Host::told();
    assert_eq!(host.does(complete_at(Epoch(7), 0)), ["stale"]);
}

#[test]
fn a_destination_that_outlived_the_asking_back_is_released_again() {
    let mut host = Host::told();
    let early = granted(host.beats(4, DestinationPhase::Active));
    host.does(rollback(false));
    host.does(SourceEvent::PeerDiscard(silence()));
    host.now = at(110);
    let before = granted(host.beats(5, DestinationPhase::Active));
    host.now = at(112);
    for grant in [early, before] {
        assert_eq!(host.does(complete(grant)), ["asked back"], "it may have been said before it discarded");
    }
    // From here on the destination ignores what it was told at 100 s.
    let after = granted(host.beats(6, DestinationPhase::Active));
    assert_eq!(host.does(complete(before)), ["asked back"]);
    assert_eq!(host.does(complete(after)), ["check"]);
}

#[test]
fn nobody_is_asked_back_who_was_not_heard_since_the_restart() {
    let mut host = Host::recovered(SourcePhase::HandedOver);
    assert_eq!(host.does(rollback(true)), ["unsafe for 11"]);
    host.now = at(111);
    assert_eq!(host.does(rollback(true)), ["journal rolled-back 2", "unseal", "thaw", "journal serving 2", "done"]);
}

#[test]
fn a_disk_that_the_destination_has_given_up_is_taken_back() {
    let rolled_back = ["journal rolled-back 2", "unseal", "thaw", "journal serving 2"];
    let mut host = Host::told();
    host.does(rollback(false));
    host.does(SourceEvent::PeerDiscard(silence()));
    assert_eq!(host.beats(4, DestinationPhase::Discarded), BeatAnswer::GiveBack, "not recorded yet");
    assert_eq!(host.effects(true), rolled_back);
    assert_eq!(host.beats(5, DestinationPhase::Discarded), BeatAnswer::RolledBack);
    // While it is being asked, the answer to that counts.
    let mut host = Host::told();
    host.does(rollback(false));
    host.beats(4, DestinationPhase::Discarded);
    assert_eq!(host.effects(true), [""; 0]);
    assert_eq!(host.does(SourceEvent::PeerDiscard(PeerWord::Yes))[..4], rolled_back);
}

#[test]
fn nothing_is_released_while_the_disk_is_wanted_back() {
    // Nobody was told yet, but the next beat will be.
    let mut host = Host::recovered(SourcePhase::HandedOver);
    host.does(rollback(true));
    assert_eq!(host.does(complete(0)), ["asked back"]);
    assert_eq!(host.beats(4, DestinationPhase::Active), BeatAnswer::GiveBack);
    assert_eq!(host.does(complete(0)), ["asked back"]);
}

#[test]
fn an_answer_of_an_earlier_process_proves_nothing() {
    let mut host = Host::recovered(SourcePhase::HandedOver);
    let after_restart = granted(host.beats(4, DestinationPhase::Active));
    host.does(rollback(false));
    host.does(SourceEvent::PeerDiscard(silence()));
    host.now = at(112);
    let survived = granted(host.beats(5, DestinationPhase::Active));
    for grant in [after_restart, survived + 1, 0, u64::MAX] {
        assert_eq!(host.does(complete(grant)), ["asked back"], "{grant}");
    }
    assert_eq!(host.does(complete(survived)), ["check"]);
}

#[test]
fn an_image_that_somebody_wrote_to_is_not_released() {
    let mut host = Host::told();
    host.does(complete(0));
    assert_eq!(host.does(SourceEvent::Unchanged(Err(failure("changed")))), ["failed"]);
    assert_eq!(host.phase(), SourcePhase::HandedOver);
    host.does(complete(0));
    assert_eq!(host.does(SourceEvent::Unchanged(Ok(()))), ["journal released 1", "done", "release"]);
}

#[test]
fn the_source_takes_the_disk_back_by_itself_only_when_told_to_and_when_it_is_safe() {
    let policy = LinkPolicy { on_link_failure: OnLinkFailure::Rollback, link_timeout: Duration::from_secs(30) };
    let record =
        SourceRecord { policy, phase: SourcePhase::HandedOver, ..source_record("m", EPOCH, Timings::default()) };
    let mut host = Host { machine: SourceMachine::recover(record, at(100)), now: at(100) };
    host.now = at(120);
    granted(host.beats(4, DestinationPhase::Active));
    assert_eq!(host.machine.next_timeout(), Some(at(150)));
    host.now = at(149);
    granted(host.beats(5, DestinationPhase::Active));
    assert_eq!(host.machine.next_timeout(), Some(at(179)));
    host.now = at(178);
    assert_eq!(host.does(SourceEvent::Tick), [""; 0]);
    host.now = at(179);
    assert_eq!(host.does(SourceEvent::Tick), ["tell discard"]);
    assert_eq!(host.machine.next_timeout(), None, "one after the other");
    assert_eq!(host.beats(6, DestinationPhase::Active), BeatAnswer::GiveBack, "it is decided");
    let back = ["journal rolled-back 2", "unseal", "thaw", "journal serving 2"];
    assert_eq!(host.does(SourceEvent::PeerDiscard(silence())), back, "the lease ended long ago");

    // A lease that is longer than the patience is waited for.
    let policy = LinkPolicy { link_timeout: Duration::from_secs(2), ..policy };
    let record =
        SourceRecord { policy, phase: SourcePhase::HandedOver, ..source_record("m", EPOCH, Timings::default()) };
    let mut host = Host { machine: SourceMachine::recover(record, at(100)), now: at(100) };
    granted(host.beats(4, DestinationPhase::Active));
    host.now = at(102);
    assert_eq!(host.does(SourceEvent::Tick), ["tell discard"]);
    host.now = at(105);
    assert_eq!(host.does(SourceEvent::PeerDiscard(silence())), [""; 0]);
    assert_eq!(host.machine.next_timeout(), Some(at(111)));
    host.now = at(111);
    host.does(SourceEvent::Tick);
    assert_eq!(host.does(SourceEvent::PeerDiscard(silence())), back);
    let waits = Host::told();
    assert_eq!(waits.machine.next_timeout(), None, "an operator decides");
}

/// Handles the event and takes effects up to the first record, which is left being written.
fn until_record(host: &mut Host, event: SourceEvent) {
    host.machine.handle(host.now, event);
    let first = host.machine.poll_effect();
    assert!(matches!(first, Some(SourceEffect::Journal(_))), "{first:?}");
}

#[test]
fn a_beat_is_told_nothing_that_is_not_recorded_yet() {
    let mut host = Host::told();
    host.does(complete(0));
    until_record(&mut host, SourceEvent::Unchanged(Ok(())));
    assert_eq!(host.phase(), SourcePhase::Released);
    host.now = at(105);
    granted(host.beats(8, DestinationPhase::Active));
    host.machine.handle(host.now, SourceEvent::Journaled(Err(failure("no space"))));
    assert_eq!(host.machine.unsafe_for(host.now), Duration::from_secs(11), "what was granted meanwhile counts");

    let mut host = Host::told();
    host.does(rollback(false));
    until_record(&mut host, SourceEvent::PeerDiscard(PeerWord::Yes));
    assert_eq!(host.beats(8, DestinationPhase::Fenced), BeatAnswer::GiveBack);
}

#[test]
fn a_command_lasts_until_its_answer_was_taken() {
    let mut host = Host::told();
    host.does(complete(0));
    until_record(&mut host, SourceEvent::Unchanged(Ok(())));
    assert!(host.machine.is_busy(), "the next one would get this one's answer");
    host.machine.handle(host.now, SourceEvent::Journaled(Ok(())));
    assert_eq!(host.effects(true), ["done", "release"]);
    assert!(!host.machine.is_busy());
}

#[test]
fn a_container_that_does_not_go_on_is_told_kept_in_the_record_and_tried_again() {
    let recorded = |host: &Host| host.machine.record().container.clone();
    let mut host = Host::new();
    host.does(SourceEvent::Prepare);
    host.does(SourceEvent::PeerPrepared(PeerWord::Yes));
    host.beats(3, DestinationPhase::Ready);
    host.does(SourceEvent::Freezing(container()));
    host.does(SourceEvent::HandOver);
    host.does(SourceEvent::Sealed(Ok(None)));
    host.does(SourceEvent::PeerTold(PeerWord::Yes));
    host.does(rollback(false));
    host.machine.handle(host.now, SourceEvent::PeerDiscard(PeerWord::Yes));
    assert_eq!(until_thaw(&mut host), ["journal rolled-back 2", "unseal", "thaw"]);
    assert_eq!(host.does(SourceEvent::Thawed(Err(failure("no memory")))), ["journal serving 2", "failed"]);
    assert_eq!((host.machine.stuck().is_some(), recorded(&host)), (true, Some(container())));

    // By the operator, without and with success; and by a restart of the node.
    for again in [SourceEvent::Cancel, rollback(true)] {
        host.machine.handle(host.now, again);
        assert_eq!(until_thaw(&mut host), ["thaw"]);
        assert_eq!(host.does(SourceEvent::Thawed(Err(failure("no memory")))), ["journal serving 2", "failed"]);
    }
    let mut restarted = SourceMachine::recover(host.machine.record().clone(), at(100));
    assert_eq!(restarted.poll_effect(), Some(SourceEffect::Thaw));
    host.machine.handle(host.now, rollback(false));
    assert_eq!(until_thaw(&mut host), ["thaw"]);
    host.machine.handle(host.now, SourceEvent::Thawed(Ok(())));
    let Some(SourceEffect::Journal(record)) = host.machine.poll_effect() else { panic!("it is not recorded") };
    assert_eq!((record.phase, record.container), (SourcePhase::Serving, None));
    assert_eq!(host.effects(true), ["done"]);
    assert_eq!((host.machine.stuck(), recorded(&host)), (None, None));
    assert_eq!(host.does(rollback(false)), ["refused"], "nothing is to be taken back");
}

fn container() -> SourceContainer {
    SourceContainer {
        id: "web".into(),
        runtime: "runc".into(),
        mount: "/mnt/web".into(),
        netns: None,
        tcp_established: true,
        bundle: "/bundles/web".into(),
    }
}

/// Gives out effects up to the thaw, which is then being done; every record succeeds.
fn until_thaw(host: &mut Host) -> Vec<String> {
    let mut done = Vec::new();
    while done.last().is_none_or(|last| last != "thaw") {
        let effect = host.machine.poll_effect().expect("a thaw");
        done.push(word(&effect));
        if matches!(effect, SourceEffect::Journal(_)) {
            host.machine.handle(host.now, SourceEvent::Journaled(Ok(())));
        }
    }
    done
}

#[test]
fn a_cancel_goes_back_to_serving_before_the_handover_only() {
    let undone = ["tell cancel", "unseal", "thaw", "journal serving 1", "done"];
    let mut host = Host::new();
    host.does(SourceEvent::Prepare);
    host.does(SourceEvent::PeerPrepared(PeerWord::Yes));
    assert_eq!(host.does(SourceEvent::Cancel), undone);
    assert_eq!(host.beats(1, DestinationPhase::Ready), BeatAnswer::RolledBack);
    let mut host = Host::told();
    assert_eq!(host.does(SourceEvent::Cancel), ["refused"]);
}

#[test]
fn recovery_repeats_the_last_record() {
    let cases: [(SourcePhase, &[&str], SourcePhase); 6] = [
        (SourcePhase::Serving, &[], SourcePhase::Serving),
        (SourcePhase::Preparing, &["tell cancel", "unseal", "thaw", "journal serving 1"], SourcePhase::Serving),
        (SourcePhase::Frozen, &["tell cancel", "unseal", "thaw", "journal serving 1"], SourcePhase::Serving),
        (SourcePhase::HandedOver, &[], SourcePhase::HandedOver),
        (SourcePhase::Released, &["release"], SourcePhase::Released),
        (SourcePhase::RolledBack, &["unseal", "thaw", "journal serving 1"], SourcePhase::Serving),
    ];
    for (phase, effects, ends) in cases {
        let mut host = Host::recovered(phase);
        assert_eq!(host.effects(true), effects, "{phase}");
        assert_eq!(host.phase(), ends);
    }
}
