//! The destination's driver: runs a [`DestinationMachine`] on the journal, the export, the container and the source.
//!
//! - `handle`: what the rest of the node sees of it
//! - `effects`: what the machine wants done

mod effects;
mod handle;

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use effects::perform;
use handle::Command;
pub use handle::{ContainerState, DestinationHandle, DestinationView, DestinationWorld};

use super::verify::Verifier;
use super::{note, pending, remove_all};
use crate::clock;
use crate::error::{Failure, Outcome};
use crate::migration::lease::Beat;
use crate::migration::machine::{BeatAnswer, Denied, DestinationEffect, DestinationEvent, DestinationMachine};
use crate::migration::phase::DestinationPhase;
use crate::peer::{Progress, Reply, Request, Subject};
use crate::pull::PullState;
use crate::units::BootTime;

/// How often it is looked whether a read starves.
const MIN_LOOK: Duration = Duration::from_millis(20);
const MAX_LOOK: Duration = Duration::from_secs(1);

type BeatResult = (Beat, Result<BeatAnswer, String>);

struct Driver {
    world: Arc<DestinationWorld>,
    machine: DestinationMachine,
    publish: watch::Sender<DestinationView>,
    running: Option<BoxFuture<'static, DestinationEvent>>,
    beating: Option<BoxFuture<'static, BeatResult>>,
    resuming: Option<BoxFuture<'static, Outcome<()>>>,
    telling: Option<BoxFuture<'static, DestinationEvent>>,
    verifying: Option<BoxFuture<'static, DestinationEvent>>,
    verifier: Arc<Verifier>,
    guarding: Option<BoxFuture<'static, bool>>,
    waiting: Option<oneshot::Sender<Result<(), Denied>>>,
    resume_waiting: Vec<oneshot::Sender<Outcome<()>>>,
    next_beat: BootTime,
    /// What the gate was told last.
    deadline: Option<Option<BootTime>>,
    /// What the container is while it does not run here.
    absent: ContainerState,
    fenced_since: Option<BootTime>,
    fenced: Duration,
    tearing_down: bool,
    torn_down: bool,
    heard_at: Option<BootTime>,
    last_error: Option<String>,
}

impl Driver {
    fn new(world: DestinationWorld, machine: DestinationMachine, publish: watch::Sender<DestinationView>) -> Self {
        Self {
            world: Arc::new(world),
            machine,
            publish,
            running: None,
            beating: None,
            resuming: None,
            telling: None,
            verifying: None,
            verifier: Arc::default(),
            guarding: None,
            waiting: None,
            resume_waiting: Vec::new(),
            next_beat: BootTime::default(),
            deadline: None,
            absent: ContainerState::Awaited,
            fenced_since: None,
            fenced: Duration::ZERO,
            tearing_down: false,
            torn_down: false,
            heard_at: None,
            last_error: None,
        }
    }

    async fn run(mut self, mut inbox: mpsc::Receiver<Command>, stop: CancellationToken) {
        let mut pull = self.world.export.complete();
        let mut told_durable = false;
        if self.machine.record().owned {
            // The node was restarted, perhaps under a container that lives.
            let found = self.world.hold.found();
            let runs = found == ContainerState::Running;
            self.absent = if runs { ContainerState::Gone } else { found };
            self.machine.handle(clock::now(), DestinationEvent::Resumed { runs });
            let hold = self.world.hold.clone();
            self.guarding = Some(Box::pin(async move {
                hold.guard_again().await;
                false
            }));
        }
        loop {
            self.look_for_starvation();
            self.start_effects();
            self.start_beat();
            self.set_deadline();
            self.count_fence();
            self.publish();
            let wake = self.wake_at();
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                event = pending(&mut self.running) => {
                    self.running = None;
                    self.torn_down |= std::mem::take(&mut self.tearing_down);
                    self.machine.handle(clock::now(), event);
                }
                (beat, answer) = pending(&mut self.beating) => {
                    self.beating = None;
                    match answer {
                        Ok(answer) => {
                            self.heard_at = Some(clock::now());
                            self.machine.handle(clock::now(), DestinationEvent::BeatAnswered { beat, answer });
                        }
                        Err(why) => {
                            self.last_error = Some(why);
                            self.machine.handle(clock::now(), DestinationEvent::Tick);
                        }
                    }
                }
                outcome = pending(&mut self.resuming) => {
                    self.resuming = None;
                    // What failed is not begun again: the checkpoint has been used.
                    self.absent = ContainerState::Gone;
                    self.machine.handle(clock::now(), DestinationEvent::Resumed { runs: outcome.is_ok() });
                    if let Err(failure) = &outcome {
                        self.last_error = Some(failure.message.clone());
                    }
                    for reply in self.resume_waiting.drain(..) {
                        let _ = reply.send(outcome.clone());
                    }
                }
                frozen = pending(&mut self.guarding) => {
                    self.guarding = None;
                    // This node may have stood still since: then its lease is over, and thawing would make a second owner.
                    self.machine.handle(clock::now(), DestinationEvent::Tick);
                    // It froze while the lease was being renewed.
                    if frozen && self.machine.record().phase == DestinationPhase::Active && !self.machine.is_starving() {
                        self.world.hold.set_frozen(false);
                    }
                }
                event = pending(&mut self.telling) => {
                    self.telling = None;
                    self.note_refusal(&event);
                    self.machine.handle(clock::now(), event);
                }
                event = pending(&mut self.verifying) => {
                    self.verifying = None;
                    self.note_refusal(&event);
                    self.machine.handle(clock::now(), event);
                }
                Ok(_) = pull.wait_for(|state| *state == PullState::Complete), if !told_durable => {
                    told_durable = true;
                    self.machine.handle(clock::now(), DestinationEvent::AllDurable);
                }
                () = clock::sleep_until(wake) => self.machine.handle(clock::now(), DestinationEvent::Tick),
                command = inbox.recv() => match command {
                    None => return,
                    Some(command) => self.command(command),
                },
            }
        }
    }

    /// The gate compares it at every acknowledgement, whatever this task is doing.
    fn set_deadline(&mut self) {
        let deadline = self.machine.io_deadline();
        if self.deadline != Some(deadline) {
            self.deadline = Some(deadline);
            let nanoseconds = |at: BootTime| i64::try_from(at.since_boot().as_nanos()).unwrap_or(i64::MAX - 1);
            self.world.export.gate().set_deadline(deadline.map_or(i64::MAX, nanoseconds));
            self.world.hold.set_deadline(deadline);
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Do(_, reply) if self.machine.is_busy() => {
                let _ = reply.send(Err(Denied::Busy));
            }
            Command::Do(event, reply) => {
                self.waiting = Some(reply);
                self.machine.handle(clock::now(), event);
            }
            Command::ColdStart(reply) => {
                let phase = self.machine.record().phase;
                if !matches!(phase, DestinationPhase::Active | DestinationPhase::Complete) {
                    let _ = reply.send(Err(Failure::refused(format!(
                        "{} is {phase} on this host; a container can be started where the disk is active or complete",
                        self.world.disk
                    ))));
                } else if let Some(why) = self.no_cold_start() {
                    let _ = reply.send(Err(Failure::refused(why)));
                } else {
                    self.resume_waiting.push(reply);
                    let hold = self.world.hold.clone();
                    self.resuming = Some(Box::pin(async move { hold.cold_start().await }));
                }
            }
            Command::Resume(epoch, reply) => {
                let record = self.machine.record();
                if epoch != record.epoch || record.phase != DestinationPhase::Active {
                    let _ = reply.send(Err(Failure::refused(format!(
                        "{} is {} at epoch {} on this host, so its container cannot be resumed at epoch {epoch}",
                        self.world.disk, record.phase, record.epoch
                    ))));
                } else if self.machine.container_runs() {
                    let _ = reply.send(Ok(()));
                } else {
                    self.resume_waiting.push(reply);
                    if self.resuming.is_none() {
                        let hold = self.world.hold.clone();
                        self.resuming = Some(Box::pin(async move { hold.resume().await }));
                    }
                }
            }
        }
    }

    fn start_effects(&mut self) {
        while self.running.is_none() {
            let Some(effect) = self.machine.poll_effect() else { return };
            if let DestinationEffect::Answer(result) = effect {
                self.publish();
                if let Some(reply) = self.waiting.take() {
                    let _ = reply.send(result);
                }
                continue;
            }
            if effect == DestinationEffect::TearDown {
                // Closed I/O makes what is being restored fail; it is torn down by the same hold afterwards.
                let resuming = self.resuming.take();
                let waiting = std::mem::take(&mut self.resume_waiting);
                self.tearing_down = true;
                let (hold, owned) = (self.world.hold.clone(), self.machine.record().owned);
                self.running = Some(Box::pin(async move {
                    if let Some(resuming) = resuming {
                        let outcome = resuming.await;
                        for reply in waiting {
                            let _ = reply.send(outcome.clone());
                        }
                    }
                    remove_all("the discarded migration", || hold.tear_down(owned)).await;
                    DestinationEvent::Done
                }));
                return;
            }
            let performed = perform(self.world.clone(), effect.clone(), self.progress(), self.subject());
            match effect {
                DestinationEffect::TellComplete(_) => self.telling = Some(performed),
                DestinationEffect::Verify => {
                    let (verifier, world) = (self.verifier.clone(), self.world.clone());
                    let subject = self.subject();
                    self.verifying = Some(Box::pin(async move {
                        DestinationEvent::Verified(verifier.all(&world.export, &world.peer, &subject).await)
                    }));
                }
                _ => self.running = Some(performed),
            }
        }
    }

    /// The operator sees why the source is not released.
    fn note_refusal(&mut self, event: &DestinationEvent) {
        if let DestinationEvent::SourceKnows(Err(failure)) | DestinationEvent::Verified(Err(failure)) = event {
            if self.last_error.as_ref() != Some(&failure.message) {
                tracing::warn!(%failure, "the source is not released yet");
            }
            self.last_error = Some(failure.message.clone());
        }
    }

    /// Why the container is not started from the disk alone, if so.
    fn no_cold_start(&self) -> Option<String> {
        let disk = &self.world.disk;
        match self.container() {
            ContainerState::Gone if self.resuming.is_none() => None,
            ContainerState::None => Some(format!("no container came with {disk}; attach the disk and use it")),
            ContainerState::Awaited => Some(format!(
                "the container of {disk} has not been restored yet, and its checkpoint is here; `lazy-migrate rollback {disk}` \
                 on the source brings it back if its migration has failed"
            )),
            _ => Some(format!("the container of {disk} is here; it can be started anew only when it is gone")),
        }
    }

    fn container(&self) -> ContainerState {
        let record = self.machine.record();
        match record.phase {
            _ if record.container.is_none() => ContainerState::None,
            DestinationPhase::Discarded => ContainerState::None,
            DestinationPhase::Preparing | DestinationPhase::Ready => ContainerState::Awaited,
            _ if !self.machine.container_runs() => self.absent,
            DestinationPhase::Fenced => ContainerState::Frozen,
            _ if self.machine.is_starving() => ContainerState::Starved,
            _ => ContainerState::Running,
        }
    }

    /// A read that waits longer than the operator wants stops the container, before its file system sees anything.
    fn look_for_starvation(&mut self) {
        let Some(limit) = self.world.starve_after else { return };
        // A restore that reads is let read.
        let starving =
            self.machine.container_runs() && self.world.export.longest_wait().is_some_and(|wait| wait >= limit);
        if starving != self.machine.is_starving() {
            tracing::warn!(disk = self.world.disk, starving, "the container's reads wait for the source");
            self.machine.handle(clock::now(), DestinationEvent::Starving(starving));
        }
    }

    /// How long the service stood still for want of a lease.
    fn count_fence(&mut self) {
        let now = clock::now();
        let fenced = self.machine.record().phase == DestinationPhase::Fenced;
        match (fenced, self.fenced_since) {
            (true, None) => self.fenced_since = Some(now),
            (false, Some(since)) => {
                self.fenced += now.since(since);
                self.fenced_since = None;
            }
            _ => {}
        }
    }

    fn start_beat(&mut self) {
        let now = clock::now();
        if self.beating.is_some() || !self.machine.beats() || now < self.next_beat {
            return;
        }
        if self.guarding.is_none() {
            let hold = self.world.hold.clone();
            self.guarding = Some(Box::pin(async move { hold.look_after_guard().await }));
        }
        let beat = self.machine.send_beat(now);
        let interval = self.machine.lease().beat_interval();
        self.next_beat = now.after(interval);
        let request = Request::Beat {
            subject: self.subject(),
            beat,
            phase: self.machine.record().phase,
            progress: self.progress(),
        };
        let peer = self.world.peer.clone();
        self.beating = Some(Box::pin(async move {
            let answer = match peer.call(&request, interval * 2).await {
                Ok(Reply::Beat { answer }) => Ok(answer),
                Ok(_) => Err("the source answered a beat with something else".into()),
                Err(error) => Err(error.into_failure().message),
            };
            (beat, answer)
        }));
    }

    fn wake_at(&self) -> BootTime {
        let mut wake = clock::now().after(Duration::from_secs(60));
        if self.machine.beats() && self.beating.is_none() {
            wake = wake.min(self.next_beat);
        }
        if let Some(limit) = self.world.starve_after {
            wake = wake.min(clock::now().after((limit / 4).clamp(MIN_LOOK, MAX_LOOK)));
        }
        self.machine.next_timeout().map_or(wake, |at| wake.min(at))
    }

    fn subject(&self) -> Subject {
        let record = self.machine.record();
        Subject { disk: self.world.disk.clone(), migration: record.migration.clone(), epoch: record.epoch }
    }

    fn progress(&self) -> Progress {
        let status = self.world.export.status();
        Progress {
            present_bytes: status.present_bytes,
            dirty_bytes: status.dirty_bytes,
            pulled_bytes: status.pulled_bytes,
            skipped_bytes: status.skipped_bytes,
            demand_fetches: status.demand_fetches,
            pull_rate: status.pull_rate,
        }
    }

    fn publish(&self) {
        note(self.machine.record().epoch, self.machine.record().phase.name());
        self.publish.send_modify(|view| {
            *view = DestinationView {
                record: self.machine.record().clone(),
                heard_at: self.heard_at,
                lease_ends: self.machine.lease().ends_at().filter(|_| self.machine.beats()),
                container: self.container(),
                fenced: self.fenced + self.fenced_since.map_or(Duration::ZERO, |since| clock::now().since(since)),
                torn_down: self.torn_down,
                last_error: self.last_error.clone(),
            }
        });
    }
}
