//! One disk of a node: its export, its journal, its device, and its part in a migration.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use nbd::wire::Errno;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::DiskName;
use super::spec::{DiskSpec, Origin};
use crate::clock;
use crate::control::status::{DiskStatus, Faults, Filling};
use crate::device::DeviceSlot;
use crate::error::{Failure, Outcome};
use crate::events::History;
use crate::export::LazyExport;
use crate::migration::driver::{ContainerState, DestinationHandle, SharedRecord, SourceHandle, SourceHold};
use crate::migration::phase::{DestinationPhase, SourcePhase};
use crate::pull::PullState;
use crate::units::Epoch;

/// See the module's text.
pub struct Disk {
    /// As it was made.
    pub spec: DiskSpec,
    /// Where its files are.
    pub directory: PathBuf,
    /// What is served.
    pub export: LazyExport,
    /// Who owns it.
    pub journal: SharedRecord,
    /// Where it is attached.
    pub device: Arc<DeviceSlot>,
    /// What its lines in the log carry.
    pub span: tracing::Span,
    /// Ends everything that belongs to it.
    pub stop: CancellationToken,
    /// Changes when the role is another one.
    pub(crate) role_set: watch::Sender<()>,
    pub(super) role: Mutex<Role>,
    pub(super) history: Mutex<History>,
    /// It was taken off the list.
    pub(super) retired: tokio::sync::OnceCell<()>,
    /// Its observer.
    pub(super) tasks: TaskTracker,
}

/// A disk's part in a migration.
#[derive(Clone)]
pub enum Role {
    /// None, so far.
    Idle,
    /// It is given away from here.
    Source(SourceHandle, Arc<SourceHold>),
    /// It comes to here.
    Destination(DestinationHandle),
}

impl Disk {
    /// Its name.
    pub fn name(&self) -> &DiskName {
        &self.spec.name
    }

    /// Its part in a migration, now.
    pub fn role(&self) -> Role {
        self.role.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_role(&self, role: Role) {
        *self.role.lock().unwrap_or_else(PoisonError::into_inner) = role;
        self.role_set.send_replace(());
    }

    /// How it filled.
    pub fn history(&self) -> History {
        self.with_history(|history| history.clone())
    }

    pub(crate) fn with_history<T>(&self, change: impl FnOnce(&mut History) -> T) -> T {
        change(&mut self.history.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Ends all that belongs to it, in order. Whatever comes of that, nothing writes into its directory any more.
    ///
    /// # Errors
    /// It could not be made durable.
    pub(super) async fn end(&self) -> Result<(), Errno> {
        self.stop.cancel();
        self.device.hang_up().await;
        let ended = self.export.shutdown().await;
        self.tasks.wait().await;
        ended
    }

    /// The highest epoch that this host knows of it.
    pub fn epoch(&self) -> Epoch {
        match self.role() {
            Role::Idle => Epoch::default(),
            Role::Source(source, _) => source.view().record.epoch,
            Role::Destination(destination) => destination.view().record.epoch,
        }
    }

    /// Its side of a migration that it gives away.
    pub fn source(&self) -> Outcome<(SourceHandle, Arc<SourceHold>)> {
        match self.role() {
            Role::Source(handle, hold) => Ok((handle, hold)),
            Role::Idle => Err(Failure::refused(format!(
                "{} is not being migrated; `lazy-migrate prepare` or `migrate` begins it",
                self.name()
            ))),
            Role::Destination(_) => Err(Failure::refused(format!(
                "{} came to this host; this is done on the host that it comes from",
                self.name()
            ))),
        }
    }

    /// Why it must not be forgotten, if so.
    pub fn owed(&self) -> Option<String> {
        match self.role() {
            Role::Idle => None,
            Role::Source(source, _) => {
                let view = source.view();
                match view.record.phase {
                    SourcePhase::Serving | SourcePhase::Released if view.settled => None,
                    SourcePhase::Serving | SourcePhase::Released => {
                        Some("a migration of it is still being ended; try again in a few seconds".into())
                    }
                    SourcePhase::HandedOver => Some(format!(
                        "{} still needs this disk until the migration is complete; wait for it, or roll back",
                        view.record.peer
                    )),
                    phase => Some(format!("a migration is under way ({phase}); cancel it first")),
                }
            }
            Role::Destination(destination) => {
                let view = destination.view();
                match view.record.phase {
                    DestinationPhase::Complete | DestinationPhase::Discarded => None,
                    phase => Some(format!(
                        "it comes from {} and is {phase} here; wait until it is complete, or roll back there",
                        view.record.source
                    )),
                }
            }
        }
    }

    /// What `status` shows.
    pub fn status(&self) -> DiskStatus {
        let data = self.export.status();
        let now = clock::now();
        let mut status = DiskStatus {
            name: self.name().to_string(),
            role: match &self.spec.origin {
                Origin::Local { .. } => "local".into(),
                Origin::Pull { .. } => "pull".into(),
                Origin::Migration { .. } => "destination".into(),
            },
            phase: match data.pull {
                _ if matches!(self.spec.origin, Origin::Local { .. }) => "serving".into(),
                PullState::Complete => "complete".into(),
                PullState::Off => "serving".into(),
                PullState::Pulling | PullState::PausedNoSpace => "pulling".into(),
            },
            epoch: 0,
            size: data.size,
            block_size: u32::from(self.spec.block_size),
            present_bytes: data.present_bytes,
            dirty_bytes: data.dirty_bytes,
            missing_bytes: data.missing_bytes,
            pulled_bytes: data.pulled_bytes,
            skipped_bytes: data.skipped_bytes,
            pull_rate: data.pull_rate,
            eta_s: data.eta_s,
            faults: Faults {
                count: data.demand_fetches,
                p50_us: data.faults.p50_us,
                p99_us: data.faults.p99_us,
                max_us: data.faults.max_us,
            },
            stalled_us: data.stalled_us,
            lease_remaining_ms: None,
            link: "none".into(),
            frozen_ms: None,
            upstream: data.upstream.state.to_string(),
            clients: data.clients as u64,
            device: self.device.device(),
            peer: None,
            container: None,
            container_state: None,
            paused: data.paused_reason,
            last_error: data.upstream.last_error,
            destination: None,
        };
        let link = |needed: bool, up: bool| match (needed, up) {
            (false, _) => "none".to_string(),
            (true, true) => "up".to_string(),
            (true, false) => "down".to_string(),
        };
        let millis = |left: std::time::Duration| u64::try_from(left.as_millis()).unwrap_or(u64::MAX);
        match self.role() {
            Role::Idle => {}
            Role::Source(source, _) => {
                let view = source.view();
                status.role = "source".into();
                status.phase = view.record.phase.to_string();
                status.epoch = view.record.epoch.0;
                let ended = matches!(view.record.phase, SourcePhase::Serving | SourcePhase::Released);
                status.link = link(!ended, view.link_up(now));
                status.lease_remaining_ms = view.lease_ends.map(|end| millis(end.since(now)));
                status.last_error = view.last_error.or(status.last_error);
                if view.record.phase != SourcePhase::Serving {
                    status.peer = Some(view.record.peer.clone());
                    status.container = view.record.container.map(|container| container.id);
                } else if let Some(failure) = view.stuck {
                    status.container = view.record.container.map(|container| container.id);
                    status.container_state = Some(ContainerState::Stuck);
                    status.last_error = Some(failure.to_string());
                }
                status.frozen_ms = source.frozen_ms();
                let theirs = view.progress;
                status.destination = match view.record.phase {
                    SourcePhase::HandedOver => Some(Filling::of(data.size, theirs.present_bytes, theirs.pull_rate)),
                    // On proof, whatever its last beat said before.
                    SourcePhase::Released => Some(Filling::of(data.size, data.size, 0)),
                    _ => None,
                };
            }
            Role::Destination(destination) => {
                let view = destination.view();
                let beats = view.record.timings.beat * 3;
                status.role = "destination".into();
                status.phase = view.record.phase.to_string();
                status.epoch = view.record.epoch.0;
                let ended = matches!(view.record.phase, DestinationPhase::Complete | DestinationPhase::Discarded);
                status.link = link(!ended, view.heard_at.is_some_and(|at| now.since(at) < beats));
                status.lease_remaining_ms = view.lease_ends.map(|end| millis(end.since(now)));
                status.last_error = view.last_error.or(status.last_error);
                status.peer = Some(view.record.source.clone());
                status.container = view.record.container.map(|container| container.id);
                status.container_state = (view.container != ContainerState::None).then_some(view.container);
                status.stalled_us += u64::try_from(view.fenced.as_micros()).unwrap_or(u64::MAX);
            }
        }
        status
    }
}
