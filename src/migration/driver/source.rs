//! The source's driver: runs a [`SourceMachine`] on the journal, the export, the container and the peer.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::container::SourceHold;
use super::{COMMANDS, SharedRecord, append, denied, driver_gone, note, pending, remove_all};
use crate::clock;
use crate::error::{Failure, Kind, Outcome};
use crate::export::{GateMode, LazyExport};
use crate::migration::lease::Beat;
use crate::migration::machine::{BeatAnswer, Denied, Grant, PeerWord, SourceEffect, SourceEvent, SourceMachine};
use crate::migration::phase::{DestinationPhase, SourcePhase};
use crate::migration::record::{LinkPolicy, MigrationId, Record, SourceRecord};
use crate::peer::client::{CallError, PeerClient};
use crate::peer::{PrepareAsk, Progress, Request, Subject};
use crate::units::{BootTime, Epoch};

/// How long the destination may take to make the export and connect back.
const PREPARE_TIME: Duration = Duration::from_secs(60);
/// How long the first beat of a prepared destination is waited for.
const FIRST_BEAT_TIME: Duration = Duration::from_secs(15);
/// How long a disk may take until it is written out as fast as it is written to, before it counts as prepared anyway.
const WRITE_OUT_TIME: Duration = Duration::from_secs(20);
/// How long one telling of the handover waits for its answer.
const TELL_TIME: Duration = Duration::from_secs(3);
/// How long a cancel tries to reach the destination; it finds out by its next beat otherwise.
const CANCEL_TIME: Duration = Duration::from_secs(2);
/// A link is called up when a beat came within this many beat intervals.
const BEATS_UNTIL_DOWN: u32 = 3;

/// How long a driver sleeps that waits for no time.
const IDLE: Duration = Duration::from_secs(60);

/// What the driver acts on.
pub struct SourceWorld {
    /// The disk's name.
    pub disk: String,
    /// Its export.
    pub export: LazyExport,
    /// Its journal.
    pub journal: SharedRecord,
    /// The destination.
    pub peer: Arc<PeerClient>,
    /// What the destination is asked; `None` after a restart, when nothing is asked any more.
    pub ask: Option<PrepareAsk>,
    /// The container's side.
    pub hold: Arc<SourceHold>,
}

/// The migration as others see it.
#[derive(Clone, Debug)]
pub struct SourceView {
    /// As it would be journaled.
    pub record: SourceRecord,
    /// Whether the destination is prepared.
    pub ready: bool,
    /// Whether the destination has confirmed the handover.
    pub told: bool,
    /// Whether everything is done that follows from the record: until then the driver must not be given up.
    pub settled: bool,
    /// What the destination has last said of itself.
    pub progress: Progress,
    /// When the destination was last heard.
    pub heard_at: Option<BootTime>,
    /// From when on a rollback needs nobody's word.
    pub safe_at: Option<BootTime>,
    /// When the granted lease ends.
    pub lease_ends: Option<BootTime>,
    /// Why the container does not go on, although the disk is this host's again.
    pub stuck: Option<Failure>,
    /// The last effect that went wrong.
    pub last_error: Option<String>,
}

impl SourceView {
    /// Whether the destination was heard lately.
    pub fn link_up(&self, now: BootTime) -> bool {
        self.heard_at.is_some_and(|at| now.since(at) < self.record.timings.beat * BEATS_UNTIL_DOWN)
    }

    /// What the migration is called between hosts.
    pub fn subject(&self, disk: &str) -> Subject {
        Subject { disk: disk.into(), migration: self.record.migration.clone(), epoch: self.record.epoch }
    }
}

enum Command {
    Do(SourceEvent, oneshot::Sender<Result<(), Denied>>),
    Beat { epoch: Epoch, beat: Beat, phase: DestinationPhase, progress: Progress, reply: oneshot::Sender<BeatAnswer> },
    Progress(Progress),
}

/// Commands go in here, a view comes out.
#[derive(Clone)]
pub struct SourceHandle {
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<SourceView>,
    peer: Arc<PeerClient>,
    export: LazyExport,
    frozen_ms: Arc<OnceLock<u64>>,
}

impl SourceHandle {
    /// Starts the driver.
    pub fn spawn(world: SourceWorld, machine: SourceMachine, stop: CancellationToken) -> Self {
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let (publish, view) = watch::channel(SourceView {
            record: machine.record().clone(),
            ready: false,
            told: false,
            settled: false,
            progress: Progress::default(),
            heard_at: None,
            safe_at: None,
            lease_ends: None,
            stuck: None,
            last_error: None,
        });
        let (peer, export) = (world.peer.clone(), world.export.clone());
        tokio::spawn(drive(world, machine, inbox, publish, stop).in_current_span());
        Self { commands, view, peer, export, frozen_ms: Arc::default() }
    }

    /// Does a command and waits for its end.
    pub async fn command(&self, event: SourceEvent) -> Outcome<()> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Do(event, reply)).await.map_err(|_| driver_gone())?;
        answer.await.map_err(|_| driver_gone())?.map_err(denied)
    }

    /// Prepares the destination, and waits until it beats: before that a handover would be refused. Waits also until
    /// what was written before is written out, which the pause would wait for otherwise.
    pub async fn prepare(&self) -> Outcome<()> {
        self.command(SourceEvent::Prepare).await?;
        self.first_beat().await?;
        if !self.export.written_out(WRITE_OUT_TIME).await {
            let disk = self.export.name();
            tracing::warn!(disk, "its writer is faster than the disk: the pause will wait until all is written out");
        }
        Ok(())
    }

    /// Waits until the destination was heard, if it is prepared.
    pub async fn first_beat(&self) -> Outcome<()> {
        let mut view = self.watch();
        let heard = view.wait_for(|view| view.heard_at.is_some() || view.record.phase != SourcePhase::Preparing);
        match tokio::time::timeout(FIRST_BEAT_TIME, heard).await {
            Ok(heard) => heard.map(drop).map_err(|_| driver_gone()),
            Err(_) => Err(Failure::unreachable(format!(
                "it is prepared, but no heartbeat of it arrived here within {} s; check the link, then prepare it again",
                FIRST_BEAT_TIME.as_secs()
            ))),
        }
    }

    /// A beat from the destination.
    pub async fn beat(
        &self,
        epoch: Epoch,
        beat: Beat,
        phase: DestinationPhase,
        progress: Progress,
    ) -> Outcome<BeatAnswer> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Beat { epoch, beat, phase, progress, reply };
        self.commands.send(command).await.map_err(|_| driver_gone())?;
        answer.await.map_err(|_| driver_gone())
    }

    /// The destination says that it holds everything.
    pub async fn complete(&self, epoch: Epoch, progress: Progress, grant: Grant) -> Outcome<()> {
        self.commands.send(Command::Progress(progress)).await.map_err(|_| driver_gone())?;
        self.command(SourceEvent::PeerComplete { epoch, grant }).await
    }

    /// The migration as it is now.
    pub fn view(&self) -> SourceView {
        self.view.borrow().clone()
    }

    /// For waiting.
    pub fn watch(&self) -> watch::Receiver<SourceView> {
        self.view.clone()
    }

    /// The same when everything is done that follows from it.
    pub async fn settled(&self) -> Outcome<SourceView> {
        self.watch().wait_for(|view| view.settled).await.map(|view| view.clone()).map_err(|_| driver_gone())
    }

    /// How long the container stood still, from frozen to resumed, once that is known.
    pub fn frozen_ms(&self) -> Option<u64> {
        self.frozen_ms.get().copied()
    }

    /// The container has been resumed at the destination.
    pub(super) fn set_frozen_ms(&self, frozen_ms: u64) {
        let _ = self.frozen_ms.set(frozen_ms);
    }

    /// The destination.
    pub fn peer(&self) -> &Arc<PeerClient> {
        &self.peer
    }
}

async fn drive(
    world: SourceWorld,
    mut machine: SourceMachine,
    mut inbox: mpsc::Receiver<Command>,
    publish: watch::Sender<SourceView>,
    stop: CancellationToken,
) {
    let world = Arc::new(world);
    let mut running: Option<BoxFuture<'static, SourceEvent>> = None;
    let mut waiting: Option<oneshot::Sender<Result<(), Denied>>> = None;
    // What is durable before the freeze, nothing has to wait for in the pause.
    let mut writing_out: Option<BoxFuture<'static, ()>> = None;
    let mut write_out = None;
    let mut progress = Progress::default();
    let mut heard_at = None;
    let mut last_error = None;
    loop {
        let mut answered = None;
        while running.is_none() {
            match machine.poll_effect() {
                Some(SourceEffect::Answer(result)) => {
                    if let Err(denied) = &result {
                        last_error = Some(denied.to_string());
                    }
                    answered = waiting.take().map(|reply| (reply, result));
                }
                Some(effect) => running = Some(perform(world.clone(), machine.record().clone(), effect)),
                None => break,
            }
        }
        publish_view(&publish, &machine, running.is_none(), progress, heard_at, &last_error);
        // After the view: who was answered sees what came of it.
        if let Some((reply, result)) = answered {
            let _ = reply.send(result);
        }
        let wanted = how_to_write_out(&machine);
        if wanted != write_out {
            // The one before ends first.
            drop(writing_out.take());
            write_out = wanted;
            writing_out =
                wanted.map(|paced| -> BoxFuture<'static, ()> { Box::pin(world.export.clone().write_out(paced)) });
        }
        let wake = machine.next_timeout().unwrap_or_else(|| clock::now().after(IDLE));
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = clock::sleep_until(wake) => machine.handle(clock::now(), SourceEvent::Tick),
            () = pending(&mut writing_out) => writing_out = None,
            event = pending(&mut running) => {
                running = None;
                machine.handle(clock::now(), event);
            }
            command = inbox.recv() => match command {
                None => return,
                Some(Command::Beat { epoch, beat, phase, progress: theirs, reply }) => {
                    let now = clock::now();
                    if epoch == machine.record().epoch {
                        progress = theirs;
                        heard_at = Some(now);
                    }
                    let _ = reply.send(machine.beat(now, epoch, beat, phase));
                }
                Some(Command::Progress(theirs)) => progress = theirs,
                Some(Command::Do(_, reply)) if machine.is_busy() => {
                    let _ = reply.send(Err(Denied::Busy));
                }
                Some(Command::Do(event, reply)) => {
                    waiting = Some(reply);
                    machine.handle(clock::now(), event);
                }
            },
        }
    }
}

/// Whether the disk is written out at the moment, and whether writers are slowed down for it: not once the container is
/// being frozen, for then nobody writes but its file system, and the pause waits for that.
fn how_to_write_out(machine: &SourceMachine) -> Option<bool> {
    let record = machine.record();
    (machine.is_ready() && record.phase == SourcePhase::Preparing).then_some(record.container.is_none())
}

fn publish_view(
    publish: &watch::Sender<SourceView>,
    machine: &SourceMachine,
    settled: bool,
    progress: Progress,
    heard_at: Option<BootTime>,
    last_error: &Option<String>,
) {
    note(machine.record().epoch, machine.record().phase.name());
    publish.send_modify(|view| {
        *view = SourceView {
            record: machine.record().clone(),
            ready: machine.is_ready(),
            told: machine.is_told(),
            settled,
            progress,
            heard_at,
            safe_at: machine.lease().map(|lease| lease.safe_at()),
            lease_ends: machine.lease().map(|lease| lease.ends_at()),
            stuck: machine.stuck().cloned(),
            last_error: last_error.clone(),
        }
    });
}

fn perform(world: Arc<SourceWorld>, record: SourceRecord, effect: SourceEffect) -> BoxFuture<'static, SourceEvent> {
    Box::pin(async move {
        tracing::info!(disk = world.disk, epoch = record.epoch.0, phase = %record.phase, effect = name(&effect), "source");
        let subject = Subject { disk: world.disk.clone(), migration: record.migration.clone(), epoch: record.epoch };
        match effect {
            SourceEffect::Journal(record) => {
                SourceEvent::Journaled(append(&world.journal, Record::Source(*record)).await)
            }
            SourceEffect::AskPrepare => {
                let Some(ask) = world.ask.clone() else { return SourceEvent::Done };
                SourceEvent::PeerPrepared(word(&world, &Request::Prepare(ask), PREPARE_TIME).await)
            }
            SourceEffect::Seal => {
                world.export.gate().set(GateMode::ReadOnly).await;
                let sealed = world.export.persist().await.map_err(|errno| {
                    Failure::failed(format!("cannot make {} durable before the handover: {errno}", world.disk))
                });
                SourceEvent::Sealed(
                    sealed.and_then(|()| world.export.mark().map_err(|error| unreadable(&world.disk, &error))),
                )
            }
            SourceEffect::TellHandover(beat) => {
                SourceEvent::PeerTold(word(&world, &Request::Handover { subject, beat }, TELL_TIME).await)
            }
            SourceEffect::TellCancel => {
                let _ = world.peer.call(&Request::Discard { subject, beat: None }, CANCEL_TIME).await;
                SourceEvent::Done
            }
            SourceEffect::TellDiscard { within, beat } => {
                let request = Request::Discard { subject, beat: Some(beat) };
                SourceEvent::PeerDiscard(word(&world, &request, within).await)
            }
            SourceEffect::CheckUnchanged => SourceEvent::Unchanged(check_unchanged(&world.export, &record)),
            SourceEffect::Unseal => {
                world.export.gate().set(GateMode::Open).await;
                SourceEvent::Done
            }
            SourceEffect::Thaw => {
                let thawed = world.hold.thaw(&world.export).await;
                if let Err(failure) = &thawed {
                    tracing::error!(disk = world.disk, %failure, "the container does not go on");
                }
                SourceEvent::Thawed(thawed.map_err(|failure| {
                    failure.context(format!(
                        "the disk is this host's and read-write again, but its container does not go on; put right what \
                         follows, then `lazy-migrate rollback {}` tries again",
                        world.disk
                    ))
                }))
            }
            SourceEffect::ReleaseContainer => {
                remove_all("the container that has moved", || world.hold.release()).await;
                SourceEvent::Done
            }
            SourceEffect::Answer(_) => SourceEvent::Done,
        }
    })
}

/// Nobody may write to a disk that was handed over, and this node does not. An image file tells who did all the same.
pub(crate) fn check_unchanged(export: &LazyExport, record: &SourceRecord) -> Outcome<()> {
    let Some(seal) = record.seal else { return Ok(()) };
    let disk = export.name();
    let found = export.mark().map_err(|error| unreadable(disk, &error))?;
    if found == Some(seal) {
        return Ok(());
    }
    Err(Failure::failed(format!(
        "somebody wrote to the image of {disk} after it was frozen and handed over, so it is not released; find out who, \
         then see docs/failure.md, \"The image was changed\""
    )))
}

fn unreadable(disk: &str, error: &std::io::Error) -> Failure {
    Failure::failed(format!("cannot look at the image of {disk}: {error}"))
}

async fn word(world: &SourceWorld, request: &Request, within: Duration) -> PeerWord {
    match world.peer.call(request, within).await {
        Ok(_) => PeerWord::Yes,
        // It may yet be done, by the command that is being done or by the node when it is back.
        Err(CallError::Refused(failure)) if failure.retry_after_ms.is_some() || failure.kind == Kind::Unreachable => {
            PeerWord::Silence(failure)
        }
        Err(CallError::Refused(failure)) => PeerWord::No(failure),
        Err(CallError::Silent(failure)) => PeerWord::Silence(failure),
    }
}

fn name(effect: &SourceEffect) -> &'static str {
    match effect {
        SourceEffect::Journal(_) => "journal",
        SourceEffect::AskPrepare => "ask to prepare",
        SourceEffect::Seal => "seal",
        SourceEffect::TellHandover(_) => "tell the handover",
        SourceEffect::TellCancel => "tell the cancel",
        SourceEffect::TellDiscard { .. } => "tell to discard",
        SourceEffect::CheckUnchanged => "look whether the image was changed",
        SourceEffect::Unseal => "unseal",
        SourceEffect::Thaw => "thaw",
        SourceEffect::ReleaseContainer => "release",
        SourceEffect::Answer(_) => "answer",
    }
}

/// A source record for a new migration.
pub(crate) fn new_record(
    migration: MigrationId,
    epoch: Epoch,
    peer: &str,
    peer_name: Option<String>,
    timings: crate::migration::lease::Timings,
    policy: LinkPolicy,
) -> SourceRecord {
    let (phase, peer) = (SourcePhase::Serving, peer.into());
    SourceRecord { migration, epoch, phase, peer, peer_name, timings, container: None, policy, seal: None, base: None }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;

    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;
    use crate::device::DeviceSlot;
    use crate::migration::driver::Runtimes;
    use crate::migration::journal::Journal;
    use crate::migration::lease::Timings;
    use crate::peer::link::PeerAddress;
    use crate::store::MemoryStore;

    #[tokio::test]
    async fn a_migration_is_not_settled_before_all_of_it_is_taken_back() {
        let directory = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let peer = listener.local_addr().unwrap().to_string();
        let export = LazyExport::local_on("disk", Arc::new(MemoryStore::new(4096)), false).unwrap();
        export.gate().set(GateMode::ReadOnly).await;
        let (journal, _) = Journal::open(&directory.path().join("journal"), "disk").unwrap();
        let stop = CancellationToken::new();
        let device = DeviceSlot::new("disk", directory.path(), Arc::new(export.clone()), stop.clone());
        let images = directory.path().join("checkpoint");
        let hold = SourceHold::new("disk", Runtimes::new(BTreeMap::new()), device, None, images);
        let world = SourceWorld {
            disk: "disk".into(),
            export: export.clone(),
            journal: Arc::new(Mutex::new(journal)),
            peer: Arc::new(PeerClient::new(PeerAddress::plain(&peer))),
            ask: None,
            hold: Arc::new(hold),
        };
        let record = new_record(
            MigrationId("m".into()),
            Epoch::default().next(),
            &peer,
            None,
            Timings::default(),
            LinkPolicy::default(),
        );
        let record = SourceRecord { phase: SourcePhase::Frozen, ..record };
        let handle = SourceHandle::spawn(world, SourceMachine::recover(record, clock::now()), stop.clone());
        // The destination is being told.
        let connection = timeout(Duration::from_secs(10), listener.accept()).await.unwrap().unwrap();
        let view = handle.view();
        assert_eq!((view.record.phase, view.settled), (SourcePhase::Serving, false));
        drop((connection, listener));
        let mut watch = handle.watch();
        let settled = timeout(Duration::from_secs(10), watch.wait_for(|view| view.settled)).await;
        assert!(settled.is_ok_and(|view| view.is_ok()), "it settles");
        assert_eq!(export.gate().mode(), GateMode::Open);
        stop.cancel();
    }
}
