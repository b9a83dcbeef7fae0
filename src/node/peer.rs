//! What the node answers its peers.

use std::net::SocketAddr;
use std::sync::Arc;

use futures::future::BoxFuture;
use nbd::server::{ServeOptions, serve_connection, serve_socket};
use tokio_util::sync::CancellationToken;

use super::disk::Role;
use super::exports::MigrationExports;
use super::migrations::first_beat;
use super::spec::{DiskSpec, Origin};
use super::{Disk, DiskName, NewDirectory, Node};
use crate::error::{Failure, Outcome, chain};
use crate::migration::driver::{DestinationHandle, check_unchanged, checksums};
use crate::migration::machine::{BeatAnswer, DestinationEvent, DestinationMachine};
use crate::migration::phase::DestinationPhase;
use crate::migration::record::DestinationRecord;
use crate::peer::link::{Caller, PeerStream};
use crate::peer::server::PeerService;
use crate::peer::{PrepareAsk, Reply, Request, Subject, images};

/// See the module's text.
pub(super) struct Service(pub(super) Arc<Node>);

impl PeerService for Service {
    fn answer(&self, from: Caller, request: Request) -> BoxFuture<'_, Outcome<Reply>> {
        Box::pin(self.0.answer(from, request))
    }

    fn serve_nbd(&self, from: Caller, stream: PeerStream, stop: CancellationToken) -> BoxFuture<'_, ()> {
        let exports = Arc::new(MigrationExports { node: self.0.clone(), caller: from });
        Box::pin(async move {
            let options = ServeOptions::default();
            let served = match stream {
                PeerStream::Left(socket) => match socket.into_std() {
                    Ok(socket) => serve_socket(socket, exports, &options, stop).await,
                    Err(error) => Err(error.into()),
                },
                PeerStream::Right(stream) => serve_connection(stream, exports, &options, stop).await,
            };
            if let Err(error) = served {
                tracing::debug!(error = chain(&error), "a data connection ended");
            }
        })
    }

    fn receive_images(&self, from: Caller, stream: PeerStream) -> BoxFuture<'_, ()> {
        Box::pin(self.0.receive_images(from, stream))
    }
}

impl Node {
    async fn answer(self: &Arc<Self>, from: Caller, request: Request) -> Outcome<Reply> {
        match request {
            Request::Prepare(ask) => self.make_room(from, ask).await.map(|()| Reply::Done),
            Request::Handover { subject, beat } => {
                let (_, destination) = self.coming(&subject, &from)?;
                let epoch = subject.epoch;
                destination.command(DestinationEvent::Activate { epoch, beat }).await.map(|()| Reply::Done)
            }
            Request::Resume { subject } => {
                let (_, destination) = self.coming(&subject, &from)?;
                destination.resume(subject.epoch).await.map(|()| Reply::Done)
            }
            Request::Discard { subject, beat } => match self.found(&subject) {
                Some((_, destination)) => {
                    from.must_be(destination.view().record.peer_name.as_deref())?;
                    let epoch = subject.epoch;
                    destination.command(DestinationEvent::Discard { epoch, beat }).await.map(|()| Reply::Done)
                }
                // Nothing of that migration is here, so nothing of it can own anything.
                None => Ok(Reply::Done),
            },
            Request::Beat { subject, beat, phase, progress } => {
                let disk = self.named(&subject)?;
                let Role::Source(source, _) = disk.role() else {
                    return Err(Failure::refused(format!("{} is not given away by this host", subject.disk)));
                };
                let known = source.view().record;
                from.must_be(known.peer_name.as_deref())?;
                let answer = if known.migration == subject.migration {
                    source.beat(subject.epoch, beat, phase, progress).await?
                } else if known.epoch > subject.epoch {
                    BeatAnswer::RolledBack
                } else {
                    return Err(Failure::refused(format!(
                        "{} has no migration {} at epoch {}",
                        subject.disk, subject.migration.0, subject.epoch
                    )));
                };
                Ok(Reply::Beat { answer })
            }
            Request::Complete { subject, progress, grant } => {
                let disk = self.named(&subject)?;
                let (source, _) = disk.source()?;
                let record = source.view().record;
                from.must_be(record.peer_name.as_deref())?;
                if record.migration != subject.migration {
                    return Err(Failure::refused(format!("{} is in another migration here", subject.disk)));
                }
                source.complete(subject.epoch, progress, grant).await.map(|()| Reply::Done)
            }
            Request::Checksums { subject, first, count } => {
                let disk = self.named(&subject)?;
                let (source, _) = disk.source()?;
                let record = source.view().record;
                from.must_be(record.peer_name.as_deref())?;
                if record.migration != subject.migration || record.epoch != subject.epoch {
                    return Err(Failure::refused(format!("{} is in another migration here", subject.disk)));
                }
                let digests = checksums(&disk.export, first, count).await?;
                // Afterwards: what was read before a change is as good as if it had not come.
                check_unchanged(&disk.export, &record)?;
                Ok(Reply::Checksums { digests })
            }
        }
    }

    /// A destination's answer to `prepare`: an empty export, connected to its source, or what is left of the disk here
    /// since it went there. Whatever fails leaves all as it was.
    async fn make_room(self: &Arc<Self>, from: Caller, ask: PrepareAsk) -> Outcome<()> {
        let peer_name = self.may_prepare(&from)?;
        let name: DiskName = ask.subject.disk.parse().map_err(Failure::refused)?;
        let timings = ask.timings.checked().map_err(Failure::refused)?;
        if let Ok(disk) = self.disk(&name)
            && let Role::Destination(destination) = disk.role()
        {
            let record = destination.view().record;
            if record.migration == ask.subject.migration && record.phase == DestinationPhase::Ready {
                return Ok(());
            }
            if record.phase != DestinationPhase::Discarded {
                return Err(Failure::refused(format!(
                    "an export '{name}' is there already ({}, from {}); remove it first",
                    record.phase, record.source
                )));
            }
            let mut watch = destination.watch();
            watch
                .wait_for(|view| view.torn_down)
                .await
                .map_err(|_| Failure::unreachable("the node is shutting down"))?;
            self.retire(&disk, record.owned).await?;
        }
        let source = match &ask.advertise {
            Some(address) => address.clone(),
            None => SocketAddr::new(from.address.ip(), ask.port).to_string(),
        };
        let upstream = self.peer_at(&source, peer_name.as_deref());
        let left = self.disk(&name).ok();
        let _changing = if left.is_some() { self.begin(&name)? } else { self.begin_new(&name)? };
        let disk = match left {
            Some(left) => self.come_back(&left, &ask, &source, &upstream).await?,
            None => {
                let made = NewDirectory::make(&self.directory(&name))?;
                let origin = Origin::Migration { from: source.clone(), store: None };
                let spec = DiskSpec::new(name, ask.size, ask.block_size, origin);
                let export = self.open_migration(&spec, &upstream, false).await?;
                let disk = self.make(spec, export)?;
                made.keep();
                disk
            }
        };
        let record = DestinationRecord {
            migration: ask.subject.migration,
            epoch: ask.subject.epoch,
            phase: DestinationPhase::Preparing,
            owned: false,
            source,
            peer_name,
            size: ask.size,
            block_size: ask.block_size,
            timings,
            container: ask.container,
        };
        let readied = self.ready(&disk, record).await;
        if readied.is_err() {
            self.retire(&disk, false).await?;
        }
        readied
    }

    async fn ready(self: &Arc<Self>, disk: &Arc<Disk>, record: DestinationRecord) -> Outcome<()> {
        let hold = self.destination_hold(disk, &record);
        let source = self.peer_at(&record.source, record.peer_name.as_deref());
        let machine = DestinationMachine::new(record, first_beat()?);
        // The last that it does is to close the network that the container will have.
        hold.prepare().await?;
        let reached = async {
            let upstream = self.migration_upstream(disk.name(), &source);
            let connection = upstream
                .connect(Some(disk.spec.size), &crate::upstream::Greeted::default())
                .await
                .map_err(|error| {
                    Failure::unreachable(format!(
                        "cannot read the disk from its source: {}; is the source's peer address reachable from here \
                     (--advertise)?",
                        chain(&error)
                    ))
                })?;
            connection.close().await;
            Ok(())
        };
        if let Err(failure) = reached.await {
            if let Err(left) = hold.open_network().await {
                tracing::error!(disk = %disk.name(), failure = %left, "what a refused migration left could not be removed");
            }
            return Err(failure);
        }
        let handle = self.spawn_destination(disk, machine);
        disk.set_role(Role::Destination(handle.clone()));
        self.retire_when_torn_down(disk);
        handle.command(DestinationEvent::ExportReady).await
    }

    async fn receive_images(self: &Arc<Self>, from: Caller, mut stream: PeerStream) {
        let received = async {
            let head = images::read_head(&mut stream)
                .await
                .map_err(|error| Failure::unreachable(format!("the checkpoint's stream broke: {error}")))?;
            let (disk, destination) = self.coming(&head.subject, &from)?;
            if destination.view().record.phase != DestinationPhase::Ready {
                return Err(Failure::refused(format!("{} is not ready for a checkpoint", disk.name())));
            }
            Ok(disk)
        };
        match received.await {
            Ok(disk) => {
                let directory = disk.directory.join("images");
                let received = async {
                    super::remove_directory_aside(&directory).await?;
                    images::receive(&mut stream, &directory).await
                };
                match received.await {
                    Ok(received) => tracing::info!(disk = %disk.name(), bytes = received.bytes, "checkpoint received"),
                    Err(failure) => tracing::warn!(disk = %disk.name(), %failure, "checkpoint not received"),
                }
            }
            Err(failure) => images::answer(&mut stream, Err(failure)).await,
        }
    }

    fn named(&self, subject: &Subject) -> Outcome<Arc<Disk>> {
        self.disk(&subject.disk.parse().map_err(Failure::refused)?)
    }

    /// The name by which the host that brings a disk proves who it is, if it has to.
    fn may_prepare(&self, from: &Caller) -> Outcome<Option<String>> {
        let Some(identity) = &from.identity else { return Ok(None) };
        let known = self.config.allowed_peers.iter().find(|name| identity.is(name));
        known.cloned().map(Some).ok_or_else(|| {
            Failure::refused(format!(
                "this host takes no disks from {} (its certificate names {}); start its node with --allow-peer NAME",
                from.address,
                from.names()
            ))
        })
    }

    /// The destination's side of exactly that migration, for the host that brings the disk.
    fn coming(&self, subject: &Subject, from: &Caller) -> Outcome<(Arc<Disk>, DestinationHandle)> {
        let (disk, destination) = self.found(subject).ok_or_else(|| {
            Failure::refused(format!(
                "the destination takes no part in migration {} of {}; was it restarted? prepare it again",
                subject.migration.0, subject.disk
            ))
        })?;
        from.must_be(destination.view().record.peer_name.as_deref())?;
        Ok((disk, destination))
    }

    fn found(&self, subject: &Subject) -> Option<(Arc<Disk>, DestinationHandle)> {
        let disk = self.named(subject).ok()?;
        match disk.role() {
            Role::Destination(handle) if handle.view().record.migration == subject.migration => Some((disk, handle)),
            _ => None,
        }
    }
}
