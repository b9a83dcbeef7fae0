//! `migrate`: a container and its disk, the happy path as a list of phases, the way back in one place.
//!
//! Until the handover every failure thaws the container and leaves nothing on the destination. After it, the destination
//! either resumes the container, or says that it could not and gives the disk back, or says nothing: then the disk stays
//! handed over, and the operator decides with `rollback`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::container::{Found, SourceHold};
use super::source::{SourceHandle, SourceView};
use crate::container::{CheckpointOptions, quiesce, rounds};
use crate::control::api::{Memory, MigrateAsk, MigrateEvent, MigrateReport};
use crate::error::{Failure, Kind, Outcome, chain};
use crate::migration::machine::SourceEvent;
use crate::migration::phase::SourcePhase;
use crate::migration::record::RollbackMode;
use crate::peer::client::CallError;
use crate::peer::images::Sending;
use crate::peer::link::PeerStream;
use crate::peer::{Request, images};

/// How long the file system may take to become quiet.
const QUIESCE_LIMIT: Duration = Duration::from_secs(30);
/// How long the file system may take before that to write out what it holds back, while the container runs.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);
/// How long the destination may take to accept the checkpoint's connection.
const DIAL_TIME: Duration = Duration::from_secs(10);
/// How long one asking for the container's resumption waits: longer than the destination tries. A lost link shows sooner.
const RESUME_TIME: Duration = Duration::from_secs(240);
/// How long the destination is asked again when it does not answer.
const RESUME_PATIENCE: Duration = Duration::from_secs(20);
/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// What a migration works with.
pub struct MigrateWorld {
    /// The disk's name.
    pub disk: String,
    /// Its size in bytes.
    pub size: u64,
    /// The migration's driver; the destination is not prepared yet.
    pub source: SourceHandle,
    /// The container's side.
    pub hold: Arc<SourceHold>,
}

/// Runs it to its end, telling what happens. Ends at completion, or with a failure that says how things stand.
pub async fn migrate(
    world: MigrateWorld,
    ask: MigrateAsk,
    found: Found,
    tell: mpsc::Sender<MigrateEvent>,
    stop: CancellationToken,
) {
    let begun = Instant::now();
    let run = Run { world, tell: tell.clone(), begun };
    let outcome = tokio::select! {
        () = stop.cancelled() => Err(Failure::unreachable("the node is shutting down; the migration goes on when it is back")),
        outcome = run.all(&ask, &found) => outcome,
    };
    let last = match outcome {
        Ok(report) => MigrateEvent::Complete(report),
        Err(failure) => {
            tracing::warn!(disk = run.world.disk, %failure, "the migration failed");
            MigrateEvent::Failed(failure)
        }
    };
    // Nobody listens when the command was interrupted; the migration is the node's.
    let _ = tell.send(last).await;
}

/// Runs a dump and sends it meanwhile; `send` gets what says that the dump is whole.
async fn dump_and_send<T, F: Future<Output = Outcome<T>>>(
    dump: impl Future<Output = Outcome<()>>,
    send: impl FnOnce(CancellationToken) -> F,
) -> Outcome<T> {
    let (dumped, spoilt) = (CancellationToken::new(), CancellationToken::new());
    let dump = async {
        let result = dump.await;
        if result.is_ok() {
            dumped.cancel()
        } else {
            spoilt.cancel()
        }
        result
    };
    // A stream that breaks does not end criu half way: it is let finish.
    let sending = async {
        tokio::select! {
            sent = send(dumped.clone()) => sent,
            () = spoilt.cancelled() => Err(Failure::failed("the dump failed")),
        }
    };
    let (dump, sent) = tokio::join!(dump, sending);
    dump?;
    sent
}

struct Run {
    world: MigrateWorld,
    tell: mpsc::Sender<MigrateEvent>,
    begun: Instant,
}

impl Run {
    async fn all(&self, ask: &MigrateAsk, found: &Found) -> Outcome<MigrateReport> {
        let before = async {
            let probe = self.world.hold.images().with_extension("probe");
            let (prepared, probed) = tokio::join!(self.world.source.prepare(), found.runtime.probe(probe));
            prepared.map_err(|failure| failure.context(format!("{} is not prepared", ask.to)))?;
            probed.map_err(|error| Failure::failed(chain(&error)))?;
            self.tell(MigrateEvent::Prepared { at_ms: self.at_ms() });
            self.freeze_and_send(ask, found).await
        };
        let frozen_at = match before.await {
            Ok(frozen_at) => frozen_at,
            Err(failure) => return Err(self.undo(failure).await),
        };
        // From here on the source's driver decides: it takes the disk back when the destination certainly refused.
        if let Err(failure) = self.world.source.command(SourceEvent::HandOver).await {
            return Err(self.after_failed_handover(failure));
        }
        self.tell(MigrateEvent::HandedOver { at_ms: self.at_ms() });
        let hold = self.world.hold.clone();
        // Beside the rest: the container waits.
        let kept = async move {
            if let Err(failure) = hold.keep_images().await {
                tracing::warn!(%failure, "kept in memory only");
            }
        };
        tokio::spawn(kept.in_current_span());
        self.resume().await?;
        let frozen_ms = u64::try_from(frozen_at.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.world.source.set_frozen_ms(frozen_ms);
        self.tell(MigrateEvent::Resumed { at_ms: self.at_ms(), frozen_ms });
        self.wait_for_release(frozen_ms).await
    }

    /// Sends what can be sent while the container runs. Then the pause begins; the image directory travels while criu fills it.
    async fn freeze_and_send(&self, ask: &MigrateAsk, found: &Found) -> Outcome<Instant> {
        let Found { runtime, id, cgroup, record } = found;
        let hold = &self.world.hold;
        hold.begin().await?;
        // Before the pause, for it costs round trips; and so is what can be written out already.
        let sending = Sending::begin(self.dial().await?, hold.images())?;
        let (sending, rounds) = match ask.memory {
            Memory::Frozen => (sending, 0),
            Memory::Precopy => self.copy_while_it_runs(found, sending).await?,
        };
        if let Err(error) = quiesce::settle(&record.mount, SETTLE_LIMIT).await {
            tracing::warn!(disk = self.world.disk, error = chain(&error), "the pause will be longer");
        }
        hold.hold(found);
        self.world.source.command(SourceEvent::Freezing(record.clone())).await?;
        let frozen_at = Instant::now();
        hold.freeze(&**runtime, id).await?;
        self.tell(MigrateEvent::Frozen { at_ms: self.at_ms() });
        let options = CheckpointOptions { tcp_established: record.tcp_established, rounds };
        let dump = async {
            let dumped = runtime.checkpoint(id, hold.images().to_path_buf(), hold.work(), options).await;
            dumped.map_err(|error| Failure::failed(chain(&error)))
        };
        let sent = dump_and_send(dump, |dumped| sending.finish(dumped)).await?;
        self.tell(MigrateEvent::Checkpointed { at_ms: self.at_ms(), image_bytes: sent.bytes });
        // After criu, which may write to it; this flushes everything to the export.
        quiesce::freeze(&record.mount, QUIESCE_LIMIT).await.map_err(|error| Failure::failed(chain(&error)))?;
        if !cgroup.is_frozen().map_err(|error| Failure::failed(chain(&error)))? {
            return Err(Failure::failed(format!("container {id} does not stand still any more; somebody resumed it")));
        }
        tracing::info!(disk = self.world.disk, elapsed_ms = frozen_at.elapsed().as_millis(), "the disk is quiet");
        Ok(frozen_at)
    }

    /// Rounds of pre-dumps, until what is left is little, or no longer gets less. Answers how many there were.
    async fn copy_while_it_runs(&self, found: &Found, mut sending: Sending) -> Outcome<(Sending, u32)> {
        let mut sizes = Vec::new();
        while rounds::another(&sizes) {
            let round = sizes.len() as u32;
            let dump = self.world.hold.pre_dump(found, round);
            let (next, sent) = dump_and_send(dump, |dumped| sending.round(dumped)).await?;
            sending = next;
            sizes.push(sent.bytes);
            self.tell(MigrateEvent::Precopied { at_ms: self.at_ms(), round: round + 1, image_bytes: sent.bytes });
        }
        Ok((sending, sizes.len() as u32))
    }

    async fn dial(&self) -> Outcome<PeerStream> {
        let subject = self.world.source.view().subject(&self.world.disk);
        let lost = |why: String| Failure::unreachable(format!("cannot open the checkpoint's stream: {why}"));
        match tokio::time::timeout(DIAL_TIME, images::dial(self.world.source.peer().address(), &subject)).await {
            Ok(dialed) => dialed.map_err(|error| lost(error.to_string())),
            Err(_) => Err(lost(format!("no answer within {} s", DIAL_TIME.as_secs()))),
        }
    }

    async fn resume(&self) -> Outcome<()> {
        let began = Instant::now();
        loop {
            let subject = self.world.source.view().subject(&self.world.disk);
            match self.world.source.peer().call(&Request::Resume { subject }, RESUME_TIME).await {
                Ok(_) => return Ok(()),
                Err(CallError::Refused(failure)) => {
                    let back = self
                        .world
                        .source
                        .command(SourceEvent::RollBack { mode: RollbackMode::FreezePoint, insist: true })
                        .await;
                    return Err(match back {
                        Ok(()) => Failure::failed(format!(
                            "the container could not be restored at the destination, and goes on here: {failure}"
                        )),
                        Err(back) if self.world.source.view().stuck.is_some() => {
                            back.context(format!("the container could not be restored at the destination ({failure})"))
                        }
                        Err(back) => Failure::new(
                            back.kind,
                            format!(
                                "the container could not be restored at the destination ({failure}), and the disk \
                                     is not back yet: {back}"
                            ),
                        ),
                    });
                }
                Err(CallError::Silent(failure)) if began.elapsed() > RESUME_PATIENCE => {
                    return Err(Failure::unreachable(format!(
                        "{failure}; the disk is handed over: `lazy-migrate wait {disk}` when the link is back, or \
                         `lazy-migrate rollback {disk} --wait`",
                        disk = self.world.disk
                    )));
                }
                Err(CallError::Silent(_)) => tokio::time::sleep(Duration::from_millis(500)).await,
            }
        }
    }

    async fn wait_for_release(&self, frozen_ms: u64) -> Outcome<MigrateReport> {
        let mut watch = self.world.source.watch();
        let mut tick = tokio::time::interval(PROGRESS_INTERVAL);
        loop {
            let view = watch.borrow_and_update().clone();
            match view.record.phase {
                SourcePhase::Released => return Ok(self.report(&view, frozen_ms)),
                SourcePhase::HandedOver => {}
                _ if !view.settled => {}
                _ => {
                    let container = view.stuck.map_or("the container goes on here".into(), |stuck| stuck.to_string());
                    return Err(Failure::failed(format!("the migration was rolled back; {container}")));
                }
            }
            tokio::select! {
                changed = watch.changed() => changed.map_err(|_| Failure::unreachable("the node is shutting down"))?,
                _ = tick.tick() => self.tell(MigrateEvent::Progress {
                    present_bytes: view.progress.present_bytes,
                    size: self.world.size,
                    pull_rate: view.progress.pull_rate,
                }),
            }
        }
    }

    fn report(&self, view: &SourceView, frozen_ms: u64) -> MigrateReport {
        MigrateReport {
            frozen_ms,
            demand_fetches: view.progress.demand_fetches,
            pulled_bytes: view.progress.pulled_bytes,
            skipped_bytes: view.progress.skipped_bytes,
            total_s: (self.begun.elapsed().as_secs_f64() * 1000.0).round() / 1000.0,
        }
    }

    /// Before the handover: the driver tells the destination to forget it, and thaws the container.
    async fn undo(&self, failure: Failure) -> Failure {
        if self.world.source.view().record.phase == SourcePhase::Serving {
            return failure;
        }
        match self.world.source.command(SourceEvent::Cancel).await {
            Ok(()) => failure.context("the migration was cancelled and the container goes on here"),
            Err(undo) => failure.context(format!("the migration failed, and could not be cancelled ({undo})")),
        }
    }

    fn after_failed_handover(&self, failure: Failure) -> Failure {
        if self.world.source.view().record.phase == SourcePhase::HandedOver {
            let disk = &self.world.disk;
            return Failure::new(
                Kind::Unreachable,
                format!(
                    "{failure}; the destination may own the disk: `lazy-migrate handover {disk}` when the link is back, \
                     or `lazy-migrate rollback {disk} --wait`"
                ),
            );
        }
        failure.context("the handover was refused and the container goes on here")
    }

    fn tell(&self, event: MigrateEvent) {
        // A slow listener misses progress, never an end: that one is awaited.
        let _ = self.tell.try_send(event);
    }

    fn at_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}
