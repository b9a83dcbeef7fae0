//! A destination's migration as the rest of the node holds it: commands go in, a view comes out.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::super::container::DestinationHold;
use super::super::{COMMANDS, SharedRecord, denied, driver_gone};
use super::Driver;
use crate::error::Outcome;
use crate::export::LazyExport;
use crate::migration::machine::{Denied, DestinationEvent, DestinationMachine};
use crate::migration::record::DestinationRecord;
use crate::peer::client::PeerClient;
use crate::units::{BootTime, Epoch};

/// What the driver acts on.
pub struct DestinationWorld {
    /// The disk's name.
    pub disk: String,
    /// Its export.
    pub export: LazyExport,
    /// Its journal.
    pub journal: SharedRecord,
    /// The source.
    pub peer: Arc<PeerClient>,
    /// The container's side.
    pub hold: Arc<DestinationHold>,
    /// Freeze the container when a read waits longer than this for the source.
    pub starve_after: Option<Duration>,
}

/// The migration as others see it.
#[derive(Clone, Debug)]
pub struct DestinationView {
    /// As it would be journaled.
    pub record: DestinationRecord,
    /// When the source last answered.
    pub heard_at: Option<BootTime>,
    /// When the lease ends.
    pub lease_ends: Option<BootTime>,
    /// What the container does here.
    pub container: ContainerState,
    /// How long all I/O was held because the lease had not been renewed in time, all in all.
    pub fenced: Duration,
    /// Whether nothing of a discarded migration is left but the store.
    pub torn_down: bool,
    /// The last thing that went wrong.
    pub last_error: Option<String>,
}

/// What a destination's container does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ContainerState {
    /// None moves along, or it has gone with what was discarded.
    None,
    /// It has not been restored yet.
    Awaited,
    /// It runs.
    Running,
    /// It stands still: the lease was not renewed in time.
    Frozen,
    /// It stands still: a read waits too long for the source.
    Starved,
    /// It ran here and does not any more: it has ended, or this host was restarted.
    Gone,
    /// The disk came back to this host, and the container does not go on here: its thaw or its restore failed.
    Stuck,
}

pub(super) enum Command {
    Do(DestinationEvent, oneshot::Sender<Result<(), Denied>>),
    Resume(Epoch, oneshot::Sender<Outcome<()>>),
    ColdStart(oneshot::Sender<Outcome<()>>),
}

/// Commands go in here, a view comes out.
#[derive(Clone)]
pub struct DestinationHandle {
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<DestinationView>,
    peer: Arc<PeerClient>,
}

impl DestinationHandle {
    /// Starts the driver.
    pub fn spawn(world: DestinationWorld, machine: DestinationMachine, stop: CancellationToken) -> Self {
        let (commands, inbox) = mpsc::channel(COMMANDS);
        let (publish, view) = watch::channel(DestinationView {
            record: machine.record().clone(),
            heard_at: None,
            lease_ends: None,
            container: ContainerState::None,
            fenced: Duration::ZERO,
            torn_down: false,
            last_error: None,
        });
        let peer = world.peer.clone();
        tokio::spawn(Driver::new(world, machine, publish).run(inbox, stop).in_current_span());
        Self { commands, view, peer }
    }

    /// Does a command and waits for its end.
    pub async fn command(&self, event: DestinationEvent) -> Outcome<()> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Do(event, reply)).await.map_err(|_| driver_gone())?;
        answer.await.map_err(|_| driver_gone())?.map_err(denied)
    }

    /// Attaches, mounts and restores; done already is done.
    pub async fn resume(&self, epoch: Epoch) -> Outcome<()> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Resume(epoch, reply)).await.map_err(|_| driver_gone())?;
        answer.await.map_err(|_| driver_gone())?
    }

    /// Attaches, mounts and starts the container anew from the disk, where its memory is gone.
    pub async fn cold_start(&self) -> Outcome<()> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::ColdStart(reply)).await.map_err(|_| driver_gone())?;
        answer.await.map_err(|_| driver_gone())?
    }

    /// The migration as it is now.
    pub fn view(&self) -> DestinationView {
        self.view.borrow().clone()
    }

    /// For waiting.
    pub fn watch(&self) -> watch::Receiver<DestinationView> {
        self.view.clone()
    }

    /// The source.
    pub fn peer(&self) -> &Arc<PeerClient> {
        &self.peer
    }
}
