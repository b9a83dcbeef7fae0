//! The node's part in migrations: what its operator's commands do.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::Instrument;

use super::disk::Role;
use super::spec::{DiskSpec, Origin};
use super::{Disk, DiskName, Node, home_of, returning};
use crate::clock;
use crate::control::api::{Memory, MigrateAsk, MigrateEvent, RollbackReport, WaitFor};
use crate::control::status::DiskStatus;
use crate::error::{Failure, Outcome, chain};
use crate::events::{EventKind, EventLog};
use crate::export::{ExportConfig, GateMode, LazyExport};
use crate::migration::driver::DestinationHold;
use crate::migration::driver::{
    DestinationHandle, DestinationWorld, MigrateWorld, Places, SourceHandle, SourceHold, SourceView, SourceWorld,
    migrate, new_record,
};
use crate::migration::lease::Beat;
use crate::migration::machine::{DestinationMachine, SourceEvent, SourceMachine};
use crate::migration::phase::{DestinationPhase, SourcePhase};
use crate::migration::record::{
    DestinationContainer, DestinationRecord, LinkPolicy, MigrationId, Record, RollbackMode, SourceRecord,
};
use crate::peer::client::PeerClient;
use crate::peer::link::{PeerAddress, host_of};
use crate::peer::{self, PrepareAsk, Subject};
use crate::pull::PullState;
use crate::upstream::Upstream;

/// How many events of a `migrate` may wait for a slow listener.
const EVENTS: usize = 256;
/// How long a disk that comes from another node may take from its being listed to its part in the migration.
const ARRIVAL_TIME: Duration = Duration::from_secs(10);
/// How often a rollback that waits looks again.
const ROLLBACK_INTERVAL: Duration = Duration::from_millis(500);
/// How long `rollback --plan` tries to reach the destination.
const PLAN_TIME: Duration = Duration::from_secs(2);

impl Node {
    /// Asks a destination to make room for a disk.
    pub async fn prepare(self: &Arc<Self>, name: &DiskName, to: &str, policy: LinkPolicy) -> Outcome<()> {
        let disk = self.disk(name)?;
        if let Role::Source(source, _) = disk.role() {
            let view = source.view();
            if view.record.phase == SourcePhase::Preparing && view.ready && view.record.peer == to {
                return source.first_beat().await;
            }
        }
        let source = self.begin_source(&disk, to, None, policy)?;
        source.prepare().await.map_err(|failure| failure.context(format!("{to} is not prepared")))
    }

    /// Hands a prepared disk over.
    pub async fn handover(&self, name: &DiskName) -> Outcome<()> {
        let (source, _) = self.disk(name)?.source()?;
        source.command(SourceEvent::HandOver).await.map_err(|failure| failure.context(format!("handover of {name}")))
    }

    /// Gives a migration up before the handover. Where there is none, there is nothing to do.
    pub async fn cancel(&self, name: &DiskName) -> Outcome<()> {
        let disk = self.disk(name)?;
        if let Role::Idle = disk.role() {
            return Ok(());
        }
        let (source, _) = disk.source()?;
        source.command(SourceEvent::Cancel).await
    }

    /// Moves a container with its disk; what happens is told by the receiver, the last event is its end.
    pub fn migrate(self: &Arc<Self>, name: &DiskName, ask: MigrateAsk) -> Outcome<mpsc::Receiver<MigrateEvent>> {
        let disk = self.disk(name)?;
        let (tell, events) = mpsc::channel(EVENTS);
        let (told, steps) = mpsc::channel(EVENTS);
        tokio::spawn(pass_on(disk.clone(), self.events.clone(), steps, tell));
        let node = self.clone();
        tokio::spawn(async move {
            if let Err(failure) = node.migrate_now(disk, ask, told.clone()).await {
                let _ = told.send(MigrateEvent::Failed(failure)).await;
            }
        });
        Ok(events)
    }

    async fn migrate_now(
        self: Arc<Self>,
        disk: Arc<Disk>,
        ask: MigrateAsk,
        tell: mpsc::Sender<MigrateEvent>,
    ) -> Outcome<()> {
        // Looked at before anything is begun: the answers are those of this host, and cost the peer nothing.
        let hold = self.source_hold(&disk, None);
        let found = hold.inspect(&ask.container, &ask.runtime, ask.tcp_established).await?;
        if ask.memory == Memory::Precopy {
            found.runtime.can_pre_dump().await.map_err(|error| {
                Failure::refused(format!("--memory precopy with runtime {}: {}", ask.runtime, chain(&error)))
            })?;
        }
        let container = DestinationContainer {
            id: ask.container.clone(),
            runtime: ask.runtime.clone(),
            tcp_established: ask.tcp_established,
        };
        let source = self.begin_source(&disk, &ask.to, Some(container), ask.policy)?;
        let (source, hold) = match disk.role() {
            Role::Source(_, hold) => (source, hold),
            _ => return Err(Failure::refused("another migration of this disk has begun")),
        };
        let world = MigrateWorld { disk: disk.name().to_string(), size: disk.spec.size, source, hold };
        migrate(world, ask, found, tell, disk.stop.clone()).instrument(disk.span.clone()).await;
        Ok(())
    }

    /// Says what a rollback would do, and changes nothing.
    pub async fn rollback_plan(&self, name: &DiskName) -> Outcome<RollbackReport> {
        let disk = self.disk(name)?;
        let (source, _) = disk.source()?;
        let reachable =
            tokio::time::timeout(PLAN_TIME, tokio::net::TcpStream::connect(source.peer().address().address()))
                .await
                .is_ok_and(|connected| connected.is_ok());
        let mut report = report(&disk, &source, reachable);
        report.safe_now |= report.phase == SourcePhase::HandedOver.name() && reachable;
        Ok(report)
    }

    /// Takes the disk back.
    pub async fn rollback(&self, name: &DiskName, wait: bool) -> Outcome<RollbackReport> {
        let disk = self.disk(name)?;
        let (source, _) = disk.source()?;
        let begun = Instant::now();
        let view = source.view();
        let before = report(&disk, &source, view.link_up(clock::now()));
        let was_handed_over = view.record.phase == SourcePhase::HandedOver;
        loop {
            match source.command(SourceEvent::RollBack { mode: RollbackMode::FreezePoint, insist: wait }).await {
                Ok(()) => break,
                Err(failure) if wait && failure.retry_after_ms.is_some() => {
                    let left = Duration::from_millis(failure.retry_after_ms.unwrap_or_default());
                    tokio::time::sleep(left.min(ROLLBACK_INTERVAL)).await;
                }
                // The destination may have given it up between two askings, so that it was taken back by itself.
                Err(failure) if is_back(&source.view()) => match source.settled().await?.stuck {
                    Some(stuck) => return Err(stuck.context(name)),
                    None if was_handed_over => break,
                    None => return Err(failure.context(format!("{name} is not rolled back"))),
                },
                Err(failure) => return Err(failure.context(format!("{name} is not rolled back"))),
            }
        }
        let view = source.view();
        Ok(RollbackReport {
            rolled_back: true,
            phase: view.record.phase.to_string(),
            epoch: view.record.epoch.0,
            safe_now: true,
            safe_in_ms: 0,
            took_ms: u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX),
            ..before
        })
    }

    /// Starts a container that came here anew from its disk, where its memory is gone.
    pub async fn cold_start(&self, name: &DiskName) -> Outcome<()> {
        match self.disk(name)?.role() {
            Role::Destination(destination) => destination.cold_start().await,
            Role::Idle | Role::Source(..) => Err(Failure::refused(format!(
                "{name} did not come to this host with a container; start it with its own runtime"
            ))),
        }
    }

    /// Waits until something is true of a disk.
    pub async fn wait(&self, name: &DiskName, what: WaitFor, timeout: Option<Duration>) -> Outcome<DiskStatus> {
        let disk = self.disk(name)?;
        let waited = async {
            tokio::select! {
                waited = wait_for(&disk, what) => waited,
                () = disk.stop.cancelled() => {
                    Err(Failure::unreachable(format!("{name} was removed, or its node is shutting down")))
                }
            }
        };
        match timeout {
            None => waited.await?,
            Some(timeout) => tokio::time::timeout(timeout, waited).await.map_err(|_| {
                let status = disk.status();
                Failure::timed_out(format!(
                    "{name} is not {} after {:.1} s: it is {}{}",
                    format!("{what:?}").to_lowercase(),
                    timeout.as_secs_f64(),
                    status.phase,
                    status.paused.map(|why| format!(", and paused: {why}")).unwrap_or_default()
                ))
            })??,
        }
        Ok(disk.status())
    }

    fn begin_source(
        self: &Arc<Self>,
        disk: &Arc<Disk>,
        to: &str,
        container: Option<DestinationContainer>,
        policy: LinkPolicy,
    ) -> Outcome<SourceHandle> {
        if self.config.peer.is_none() {
            return Err(Failure::refused(
                "this node has no peer address, so no destination could fetch from it; start it with --peer",
            ));
        }
        let Some(host) = to.rsplit_once(':').filter(|(_, port)| port.parse::<u16>().is_ok()).and(host_of(to)) else {
            return Err(Failure::usage(format!("--to {to}: a peer address is host:port")));
        };
        // It must be the host that the operator named, now and later.
        let peer_name = self.config.tls.is_some().then_some(host);
        let timings = self.config.timings;
        if policy.link_timeout < timings.beat * 3 {
            return Err(Failure::usage(format!(
                "--link-timeout {} ms: a heartbeat comes every {} ms, so silence cannot be told from a late one before three",
                policy.link_timeout.as_millis(),
                timings.beat.as_millis()
            )));
        }
        let mut role = disk.role.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (epoch, base) = match &*role {
            Role::Idle if matches!(disk.spec.origin, Origin::Migration { .. }) => {
                return Err(Failure::refused(format!(
                    "{} was never handed over to this host, so there is nothing to give away; remove it",
                    disk.name()
                )));
            }
            Role::Idle => (crate::units::Epoch::default(), None),
            Role::Source(source, _) => {
                let view = source.view();
                let record = view.record;
                if record.phase == SourcePhase::Serving && !view.settled {
                    // Its driver would be dropped with what it still has to do: thaw the container, say.
                    return Err(Failure::refused(format!(
                        "an earlier migration of {} is still being taken back; try again in a few seconds",
                        disk.name()
                    )));
                }
                if let Some(container) = record.held() {
                    // It would be forgotten as it stands: frozen, or only in its checkpoint.
                    let (id, disk) = (&container.id, disk.name());
                    return Err(Failure::refused(format!(
                        "container {id} of an earlier migration does not go on here; `lazy-migrate rollback {disk}` tries again"
                    )));
                }
                if record.phase != SourcePhase::Serving {
                    return Err(Failure::refused(format!(
                        "{} is {} to {} at epoch {}; finish or cancel that first",
                        disk.name(),
                        record.phase,
                        record.peer,
                        record.epoch
                    )));
                }
                (record.epoch, record.base)
            }
            Role::Destination(destination) => {
                let record = destination.view().record;
                if record.phase != DestinationPhase::Complete {
                    return Err(Failure::refused(format!(
                        "{} is {} here: it can move on when it is complete",
                        disk.name(),
                        record.phase
                    )));
                }
                (record.epoch, Some(record.migration))
            }
        };
        let epoch = epoch.next();
        let migration = MigrationId(random_id()?);
        let subject = Subject { disk: disk.name().to_string(), migration: migration.clone(), epoch };
        let ask = PrepareAsk {
            subject,
            size: disk.spec.size,
            block_size: disk.spec.block_size,
            timings,
            advertise: self.config.advertise.clone(),
            port: self.peer_port,
            container,
            base: base.clone(),
        };
        let record = SourceRecord { base, ..new_record(migration, epoch, to, peer_name, timings, policy) };
        let (handle, hold) = self.spawn_source(disk, SourceMachine::new(record), Some(ask));
        *role = Role::Source(handle.clone(), hold);
        disk.role_set.send_replace(());
        Ok(handle)
    }

    fn spawn_source(
        &self,
        disk: &Arc<Disk>,
        machine: SourceMachine,
        ask: Option<PrepareAsk>,
    ) -> (SourceHandle, Arc<SourceHold>) {
        let record: &SourceRecord = machine.record();
        let hold = self.source_hold(disk, record.container.clone());
        let world = SourceWorld {
            disk: disk.name().to_string(),
            export: disk.export.clone(),
            journal: disk.journal.clone(),
            peer: Arc::new(PeerClient::new(self.peer_at(&record.peer, record.peer_name.as_deref()))),
            ask,
            hold: hold.clone(),
        };
        (disk.span.in_scope(|| SourceHandle::spawn(world, machine, disk.stop.clone())), hold)
    }

    fn source_hold(
        &self,
        disk: &Arc<Disk>,
        container: Option<crate::migration::record::SourceContainer>,
    ) -> Arc<SourceHold> {
        Arc::new(SourceHold::new(
            disk.name().as_str(),
            self.config.runtimes.clone(),
            disk.device.clone(),
            container,
            disk.directory.join("checkpoint"),
        ))
    }

    /// The destination's driver of a disk.
    pub(super) fn spawn_destination(&self, disk: &Arc<Disk>, machine: DestinationMachine) -> DestinationHandle {
        let record: &DestinationRecord = machine.record();
        let hold = self.destination_hold(disk, record);
        let world = DestinationWorld {
            disk: disk.name().to_string(),
            export: disk.export.clone(),
            journal: disk.journal.clone(),
            peer: Arc::new(PeerClient::new(self.peer_at(&record.source, record.peer_name.as_deref()))),
            hold: hold.clone(),
            starve_after: self.config.starve_after,
        };
        disk.span.in_scope(|| DestinationHandle::spawn(world, machine, disk.stop.clone()))
    }

    /// The container's side of a disk that comes to here.
    pub(super) fn destination_hold(&self, disk: &Arc<Disk>, record: &DestinationRecord) -> Arc<DestinationHold> {
        let places = Places {
            state: disk.directory.clone(),
            lease: self.run_dir.join(format!(
                "guard-{:08x}-{}-{}.lease",
                crc32fast::hash(self.config.state_dir.as_os_str().as_encoded_bytes()),
                disk.name(),
                record.epoch
            )),
            bundles: self.config.bundle_dir.clone(),
            mounts: self.config.mount_dir.clone(),
        };
        Arc::new(DestinationHold::new(
            disk.name().as_str(),
            record.epoch,
            self.config.runtimes.clone(),
            disk.device.clone(),
            record.container.clone(),
            places,
        ))
    }

    /// After a restart: the journal says what this host is to a disk.
    pub(super) async fn recover(self: &Arc<Self>, disk: &Arc<Disk>, record: Option<Record>) -> Outcome<()> {
        match record {
            None => {
                if let Origin::Migration { .. } = disk.spec.origin {
                    // Made, but never recorded: nothing was promised.
                    disk.export.gate().set(GateMode::Closed).await;
                }
            }
            Some(Record::Source(record)) => {
                let gate = match record.phase {
                    SourcePhase::HandedOver | SourcePhase::Released => GateMode::ReadOnly,
                    _ => GateMode::Open,
                };
                disk.export.gate().set(gate).await;
                let (handle, hold) = self.spawn_source(disk, SourceMachine::recover(record, clock::now()), None);
                disk.set_role(Role::Source(handle, hold));
            }
            Some(Record::Destination(record)) => {
                let first = first_beat()?;
                let held = if record.phase == DestinationPhase::Complete { GateMode::Open } else { GateMode::Held };
                disk.export.gate().set(held).await;
                let handle = self.spawn_destination(disk, DestinationMachine::recover(record, first));
                disk.set_role(Role::Destination(handle));
                self.retire_when_torn_down(disk);
            }
        }
        Ok(())
    }

    /// Another node, which has to prove the name that a migration was begun with.
    pub(super) fn peer_at(&self, address: &str, name: Option<&str>) -> PeerAddress {
        match (&self.config.tls, name) {
            (Some(tls), Some(name)) => PeerAddress::secured(address, tls.client.clone(), name),
            _ => PeerAddress::plain(address),
        }
    }

    /// The blocks of a disk at its source.
    pub(super) fn migration_upstream(&self, name: &DiskName, from: &PeerAddress) -> Upstream {
        Upstream::dialed(Arc::new(peer::nbd::PeerDialer::new(from.clone())), name.as_str())
    }

    /// The export of a disk that comes from another node; everything is held until it is handed over.
    /// With `returns` its store was the disk when it left this host.
    pub(super) async fn open_migration(
        &self,
        spec: &DiskSpec,
        from: &PeerAddress,
        returns: bool,
    ) -> Outcome<LazyExport> {
        let directory = self.directory(&spec.name);
        let mut config = ExportConfig::new(spec.name.as_str(), &directory, identity(&spec.name));
        config.store = spec.origin.store().map(Path::to_owned);
        config.returns = returns;
        config.size = Some(spec.size);
        config.block_size = spec.block_size;
        config.background = false;
        config.traffic = self.traffic.clone();
        config.home = Some(home_of(&spec.name)?);
        let upstream = self.migration_upstream(&spec.name, from);
        let export = LazyExport::lazy(config, upstream).await.map_err(|error| Failure::failed(chain(&error)))?;
        export.gate().set(GateMode::Held).await;
        Ok(export)
    }

    /// A discarded migration that never owned the disk leaves nothing here.
    pub(super) fn retire_when_torn_down(self: &Arc<Self>, disk: &Arc<Disk>) {
        let Role::Destination(handle) = disk.role() else { return };
        let (node, disk) = (self.clone(), disk.clone());
        tokio::spawn(async move {
            let mut watch = handle.watch();
            let torn_down = watch.wait_for(|view| view.torn_down).await.map(|view| view.record.owned);
            if torn_down.is_ok_and(|owned| !owned)
                && let Err(failure) = node.retire(&disk, false).await
            {
                tracing::error!(disk = %disk.name(), %failure, "what a cancelled migration left could not be removed");
            }
        });
    }

    /// Takes a destination's disk off the list; its store is kept when it may hold what is nowhere else. A disk that was
    /// to come back is again what it was. Done once, whoever asks: what is in its place afterwards is another disk.
    pub(super) async fn retire(self: &Arc<Self>, disk: &Arc<Disk>, keep: bool) -> Outcome<()> {
        let retired = disk.retired.get_or_try_init(|| async {
            if let Err(error) = disk.end().await {
                tracing::warn!(disk = %disk.name(), %error, "a discarded store could not be synced");
            }
            if !keep && returning::is_pending(&disk.directory) {
                return self.turn_back(disk).await;
            }
            // As long as it is listed nobody makes a new disk in its directory.
            if keep {
                self.move_aside(&disk.directory)?
            } else {
                super::remove_directory_aside(&disk.directory).await?
            }
            self.disks.remove_if(disk.name(), |_, found| Arc::ptr_eq(found, disk));
            Ok(())
        });
        retired.await.copied()
    }
}

/// What a block map of a migration says that it is of.
pub(super) fn identity(name: &DiskName) -> String {
    format!("migration of {name}")
}

/// It was handed over, and is this host's again.
fn is_back(view: &SourceView) -> bool {
    matches!(view.record.phase, SourcePhase::RolledBack | SourcePhase::Serving)
}

fn report(disk: &Disk, source: &SourceHandle, reachable: bool) -> RollbackReport {
    let view = source.view();
    let now = clock::now();
    let left = view.safe_at.map_or(Duration::ZERO, |at| at.since(now));
    RollbackReport {
        name: disk.name().clone(),
        mode: RollbackMode::FreezePoint,
        rolled_back: false,
        phase: view.record.phase.to_string(),
        epoch: view.record.epoch.0,
        peer: view.record.peer.clone(),
        peer_reachable: reachable,
        safe_now: view.record.phase == SourcePhase::HandedOver && left.is_zero(),
        safe_in_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
        lost_bytes: view.progress.dirty_bytes,
        container: view.record.container.map(|container| container.id),
        took_ms: 0,
    }
}

async fn wait_for(disk: &Disk, what: WaitFor) -> Outcome<()> {
    let gone = |_| Failure::unreachable("the node is shutting down");
    let wanted = format!("{what:?}").to_lowercase();
    let never = |why: String| Err(Failure::refused(format!("{} will not be {wanted}: {why}", disk.name())));
    let mut roles = disk.role_set.subscribe();
    if matches!((disk.role(), &disk.spec.origin), (Role::Idle, Origin::Migration { .. })) {
        // It is being made at this moment.
        let _ = tokio::time::timeout(ARRIVAL_TIME, roles.changed()).await;
    }
    match disk.role() {
        Role::Idle => match what {
            WaitFor::Complete => {
                let mut pull = disk.export.complete();
                pull.wait_for(|state| *state == PullState::Complete).await.map_err(gone)?;
                Ok(())
            }
            WaitFor::Serving => Ok(()),
            _ => never("it is not being migrated".into()),
        },
        Role::Source(source, _) => {
            let mut watch = source.watch();
            let done = |phase: SourcePhase, ready: bool, told: bool| match what {
                WaitFor::Complete => phase == SourcePhase::Released,
                WaitFor::Active => phase == SourcePhase::Released || phase == SourcePhase::HandedOver && told,
                WaitFor::Ready => phase == SourcePhase::Preparing && ready,
                WaitFor::Serving => phase == SourcePhase::Serving,
            };
            let over = |phase: SourcePhase| match what {
                WaitFor::Serving => phase == SourcePhase::Released,
                // Cancelled or rolled back.
                _ => matches!(phase, SourcePhase::RolledBack | SourcePhase::Serving),
            };
            let view = watch
                .wait_for(|view| done(view.record.phase, view.ready, view.told) || over(view.record.phase))
                .await
                .map_err(gone)?;
            if done(view.record.phase, view.ready, view.told) {
                Ok(())
            } else {
                never(format!("it is {}", view.record.phase))
            }
        }
        Role::Destination(destination) => {
            let mut watch = destination.watch();
            let done = |phase: DestinationPhase| match what {
                WaitFor::Complete => phase == DestinationPhase::Complete,
                WaitFor::Active => matches!(phase, DestinationPhase::Active | DestinationPhase::Complete),
                WaitFor::Ready => phase == DestinationPhase::Ready,
                WaitFor::Serving => phase == DestinationPhase::Complete,
            };
            let view = watch
                .wait_for(|view| done(view.record.phase) || view.record.phase == DestinationPhase::Discarded)
                .await
                .map_err(gone)?;
            if done(view.record.phase) { Ok(()) } else { never("the source took the disk back".into()) }
        }
    }
}

/// 64 random bits in hexadecimal.
fn random_id() -> Outcome<String> {
    Ok(format!("{:016x}", random()?))
}

/// The number of a process's first beat. With the lowest bits zero a process has numbers of its own for as long as it lives.
pub(super) fn first_beat() -> Outcome<Beat> {
    Ok(Beat(random()? & !0xffff_ffff))
}

fn random() -> Outcome<u64> {
    use std::io::Read;
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|error| Failure::failed(format!("cannot read /dev/urandom: {error}")))?;
    Ok(u64::from_ne_bytes(bytes))
}

/// The steps of a `migrate`, for the log and for whoever typed it. A slow listener misses progress, never the end.
async fn pass_on(
    disk: Arc<Disk>,
    log: Arc<EventLog>,
    mut steps: mpsc::Receiver<MigrateEvent>,
    tell: mpsc::Sender<MigrateEvent>,
) {
    while let Some(step) = steps.recv().await {
        if let Some(kind) = EventKind::of_migrate(&step) {
            log.tell(&disk.status(), &disk.directory, kind).await;
        }
        if matches!(step, MigrateEvent::Complete(_) | MigrateEvent::Failed(_)) {
            let _ = tell.send(step).await;
        } else {
            let _ = tell.try_send(step);
        }
    }
}
