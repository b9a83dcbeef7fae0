//! A host's node: its disks by name, its listeners, and how it starts and stops.
//!
//! ```text
//! state-dir/lock                 one node at a time
//! state-dir/disks/NAME/          disk.json, journal, map, map.live, disk.img, device.json, images/, events.jsonl, history.json
//!                                before/: see returning.rs
//! state-dir/removed/NAME.N/      stores that were forgotten: nothing deletes what may be the only copy
//! ```

mod config;
mod disk;
mod exports;
mod migrations;
mod name;
mod peer;
mod returning;
mod rights;
mod spec;
mod verify;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use dashmap::DashMap;
use nbd::address::Address;
use nbd::server::{Listener, ServeOptions};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

pub use config::{NodeConfig, is_private};
pub use disk::{Disk, Role};
pub use name::{BadName, DiskName};
pub use rights::{ClientRight, ClientRights, Seen};

use crate::control::api::PullAsk;
use crate::control::server::ControlSocket;
use crate::control::status::{NodeStatus, SCHEMA};
use crate::device::{DeviceSlot, Via};
use crate::error::{Failure, Outcome, chain};
use crate::events::{self, EventLog};
use crate::export::{ExportConfig, ExportError, Home, LazyExport};
use crate::fetch::Traffic;
use crate::limits::NODE_DISKS;
use crate::migration::journal::Journal;
use crate::migration::phase::DestinationPhase;
use crate::migration::record::Record;
use crate::units::BlockSize;
use crate::upstream::{Upstream, UpstreamError};
use spec::{DiskSpec, Origin};

/// How often a directory is tried to be removed again that somebody still wrote into.
const REMOVE_TRIES: u32 = 3;

/// See the module's text.
pub struct Node {
    config: NodeConfig,
    disks: DashMap<DiskName, Arc<Disk>>,
    /// Names that are being made or removed: one at a time.
    changing: DashMap<DiskName, ()>,
    nbd: Vec<Address>,
    peer_port: u16,
    /// Where the control socket is: a place without a disk, which small files of this boot belong to.
    run_dir: PathBuf,
    events: Arc<EventLog>,
    traffic: Arc<Traffic>,
    stop: CancellationToken,
    _lock: nix::fcntl::Flock<std::fs::File>,
}

/// A started node with its listeners, to be served until it is stopped.
pub struct Running {
    /// The node.
    pub node: Arc<Node>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Running {
    /// Starts a node: its disks first, then its listeners, the control socket last. When this returns it answers.
    pub async fn start(config: NodeConfig, control: &Path) -> Outcome<Running> {
        let stop = CancellationToken::new();
        let lock = lock(&config.state_dir)?;
        let mut listeners = Vec::new();
        for address in &config.nbd {
            listeners.push(Listener::bind(address).await.map_err(|error| Failure::failed(chain(&error)))?);
        }
        let peer =
            match &config.peer {
                None => None,
                Some(address) => Some(TcpListener::bind(address).await.map_err(|error| {
                    Failure::failed(format!("cannot listen on the peer address {address}: {error}"))
                })?),
            };
        let peer_port = match &peer {
            Some(listener) => listener.local_addr().map_err(Failure::failed)?.port(),
            None => 0,
        };
        let socket = ControlSocket::bind(control).await?;
        let run_dir =
            std::path::absolute(control).map_err(Failure::failed)?.parent().unwrap_or(Path::new("/")).to_owned();
        let events = open_events(&config.state_dir).await?;
        let node = Arc::new(Node {
            nbd: listeners.iter().map(|listener| listener.address().clone()).collect(),
            traffic: Arc::new(Traffic::new(config.pull_rate)),
            config,
            disks: DashMap::new(),
            changing: DashMap::new(),
            peer_port,
            run_dir,
            events: Arc::new(events),
            stop: stop.clone(),
            _lock: lock,
        });
        node.restore().await?;
        for (name, image) in &node.config.disks {
            node.add(name.clone(), image.clone()).await?;
        }
        let tasks = TaskTracker::new();
        for listener in listeners {
            let tls = node.config.tls_policy(listener.address());
            let exports = Arc::new(exports::SeenExports::all(node.clone()));
            tasks.spawn(listener.run(exports, ServeOptions { tls, ..ServeOptions::default() }, stop.clone()));
        }
        if let Some(listener) = peer {
            let service = Arc::new(peer::Service(node.clone()));
            let tls = node.config.tls.as_ref().map(|tls| tls.server.clone());
            tasks.spawn(crate::peer::server::serve(listener, tls, service, stop.clone()));
        }
        let (served, token) = (node.clone(), stop.clone());
        tasks.spawn(async move {
            if let Err(failure) = socket.serve(served, token).await {
                tracing::error!(%failure, "the control socket is gone");
            }
        });
        Ok(Running { node, tasks, stop })
    }

    /// Stops in order: no new clients, requests in flight finished, then everything made durable.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        for disk in self.node.disks() {
            if let Err(error) = disk.end().await {
                tracing::error!(disk = %disk.name(), error = %error, "the disk could not be made durable at the end");
            }
        }
    }
}

impl Node {
    /// An export by name.
    pub fn disk(&self, name: &DiskName) -> Outcome<Arc<Disk>> {
        self.disks.get(name).map(|disk| disk.clone()).ok_or_else(|| {
            Failure::failed(format!("no export '{name}' on this node; `lazy-migrate status` lists them"))
        })
    }

    /// All exports, by name.
    pub fn disks(&self) -> Vec<Arc<Disk>> {
        let mut disks: Vec<_> = self.disks.iter().map(|entry| entry.value().clone()).collect();
        disks.sort_by(|a, b| a.name().cmp(b.name()));
        disks
    }

    /// What `status` shows.
    pub fn status(&self) -> NodeStatus {
        self.status_of(&self.disks())
    }

    /// The same with these disks only.
    pub fn status_of(&self, disks: &[Arc<Disk>]) -> NodeStatus {
        NodeStatus {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION").into(),
            state_dir: self.config.state_dir.clone(),
            nbd: self.nbd.iter().map(ToString::to_string).collect(),
            peer: self.config.peer.clone(),
            disks: disks.iter().map(|disk| disk.status()).collect(),
        }
    }

    /// What happened on this node.
    pub fn events(&self) -> &EventLog {
        &self.events
    }

    /// Ends when the node stops.
    pub fn stopping(&self) -> impl Future<Output = ()> + Send + use<> {
        self.stop.clone().cancelled_owned()
    }

    /// An existing image becomes an export. The same again changes nothing.
    pub async fn add(self: &Arc<Self>, name: DiskName, image: PathBuf) -> Outcome<Arc<Disk>> {
        let image = std::path::absolute(image).map_err(Failure::failed)?;
        let known = image.canonicalize().ok();
        let same = |origin: &Origin| {
            origin.store().is_some_and(|store| store == image || known.is_some() && store.canonicalize().ok() == known)
        };
        if let Ok(disk) = self.disk(&name) {
            return match &disk.spec.origin {
                Origin::Pull { .. } => Err(exists(&name)),
                // It left this host and came back to where it was.
                origin if same(origin) => Ok(disk),
                _ => Err(exists(&name)),
            };
        }
        let _changing = self.begin_new(&name)?;
        if let Some(other) = self.disks().iter().find(|disk| same(&disk.spec.origin)) {
            return Err(Failure::refused(format!(
                "{} is the export '{}' already; two exports of one image would destroy it",
                image.display(),
                other.name()
            )));
        }
        let export = open_local(&name, &image)?;
        let size = export.status().size;
        let spec = DiskSpec::new(name, size, BlockSize::DEFAULT, Origin::Local { image });
        self.make(spec, export)
    }

    /// A lazily filled export from an NBD server. The same again changes nothing.
    pub async fn pull(self: &Arc<Self>, ask: PullAsk) -> Outcome<Arc<Disk>> {
        let directory = self.directory(&ask.name);
        let origin = |from: &str| Origin::Pull {
            from: from.into(),
            store: ask.store.clone().unwrap_or_else(|| directory.join("disk.img")),
            order: ask.order,
            rate: ask.rate,
            background: ask.background,
        };
        if let Ok(disk) = self.disk(&ask.name) {
            return match &disk.spec.origin {
                found @ Origin::Pull { .. } if *found == origin(&ask.from) => Ok(disk),
                _ => Err(exists(&ask.name)),
            };
        }
        let _changing = self.begin_new(&ask.name)?;
        let made = NewDirectory::make(&directory)?;
        let mut spec = DiskSpec::new(ask.name.clone(), 0, BlockSize::DEFAULT, origin(&ask.from));
        let export = self.open_pull(&spec).await?;
        spec.size = export.status().size;
        let disk = self.make(spec, export)?;
        made.keep();
        Ok(disk)
    }

    /// Forgets an export. An image that was added stays where it is; a store that was filled is moved aside.
    pub async fn remove(&self, name: &DiskName) -> Outcome<()> {
        let disk = self.disk(name)?;
        if let Some(device) = disk.device.device() {
            return Err(Failure::refused(format!(
                "{name} is attached to {}; `lazy-migrate detach {name}` first",
                device.display()
            )));
        }
        if let Some(why) = disk.owed() {
            return Err(Failure::refused(format!("{name} cannot be removed: {why}")));
        }
        let _changing = self.begin(name)?;
        if let Role::Source(source, hold) = disk.role()
            && let Some(container) = source.view().record.container
        {
            hold.open_network(&container).await?;
        }
        if let Role::Destination(destination) = disk.role() {
            let record = destination.view().record;
            if record.phase == DestinationPhase::Discarded {
                self.destination_hold(&disk, &record).open_network().await?;
            }
        }
        self.forget(&disk).await
    }

    /// Attaches an export to a block device.
    pub async fn attach(&self, name: &DiskName, via: Via, device: Option<PathBuf>) -> Outcome<PathBuf> {
        let disk = self.disk(name)?;
        if let Role::Destination(destination) = disk.role() {
            let phase = destination.view().record.phase;
            use crate::migration::phase::DestinationPhase::{Active, Complete, Fenced};
            if !matches!(phase, Active | Fenced | Complete) {
                return Err(Failure::refused(format!(
                    "{name} is {phase} here: this host does not own it, and a device would see nothing; hand it over first"
                )));
            }
        }
        disk.device.attach(via, device).instrument(disk.span.clone()).await
    }

    /// Takes an export's block device away.
    pub async fn detach(&self, name: &DiskName) -> Outcome<()> {
        self.disk(name)?.device.detach().await
    }

    /// Puts a made disk into the list, with its files in its directory.
    fn make(self: &Arc<Self>, spec: DiskSpec, export: LazyExport) -> Outcome<Arc<Disk>> {
        let directory = self.directory(&spec.name);
        std::fs::create_dir_all(&directory)
            .and_then(|()| crate::files::sync_parent(&directory))
            .map_err(|error| Failure::failed(format!("cannot make {}: {error}", directory.display())))?;
        let (journal, _) = open_journal(&directory, &spec.name)?;
        spec.write(&directory)?;
        Ok(self.enlist(spec, export, journal, true))
    }

    /// Puts it into the list, and begins to fetch if it `fetches`.
    fn enlist(self: &Arc<Self>, spec: DiskSpec, export: LazyExport, journal: Journal, fetches: bool) -> Arc<Disk> {
        let stop = self.stop.child_token();
        let directory = self.directory(&spec.name);
        let device = DeviceSlot::new(spec.name.as_str(), &directory, Arc::new(export.clone()), stop.clone());
        // Whatever the filter says: without it, lines do not tell which disk they are about.
        let span = tracing::error_span!("disk", disk = %spec.name, epoch = 0u64, phase = "serving");
        if !matches!(spec.origin, Origin::Local { .. }) {
            span.record("phase", "pulling");
        }
        let disk = Arc::new(Disk {
            span,
            directory,
            export,
            journal: Arc::new(Mutex::new(journal)),
            device,
            stop,
            role_set: watch::Sender::new(()),
            role: Mutex::new(Role::Idle),
            history: Mutex::default(),
            retired: tokio::sync::OnceCell::new(),
            tasks: TaskTracker::new(),
            spec,
        });
        if fetches {
            disk.span.in_scope(|| disk.export.start());
        }
        disk.tasks.spawn(events::watch(disk.clone(), self.events.clone()).instrument(disk.span.clone()));
        disk.tasks.close();
        self.disks.insert(disk.name().clone(), disk.clone());
        disk
    }

    async fn forget(&self, disk: &Arc<Disk>) -> Outcome<()> {
        disk.end().await.map_err(|error| {
            Failure::failed(format!("cannot make {} durable before it is removed: {error}", disk.name()))
        })?;
        self.disks.remove(disk.name());
        match disk.spec.origin {
            Origin::Local { .. } => remove_directory(&disk.directory),
            _ => self.move_aside(&disk.directory),
        }
    }

    /// A store that may be the only copy is never deleted.
    fn move_aside(&self, directory: &Path) -> Outcome<()> {
        let removed = self.config.state_dir.join("removed");
        let failed =
            |error: std::io::Error| Failure::failed(format!("cannot move {} aside: {error}", directory.display()));
        std::fs::create_dir_all(&removed).map_err(failed)?;
        let name = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let target = (1..).map(|n| removed.join(format!("{name}.{n}"))).find(|path| !path.exists());
        let Some(target) = target else { return Ok(()) };
        std::fs::rename(directory, &target).map_err(failed)?;
        tracing::info!(from = %directory.display(), to = %target.display(), "moved aside; delete it when it is not needed");
        crate::files::sync_parent(&target).map_err(failed)
    }

    /// What was there when the node stopped is there again.
    async fn restore(self: &Arc<Self>) -> Outcome<()> {
        let disks = self.config.state_dir.join("disks");
        let failed = |error: std::io::Error| Failure::failed(format!("cannot read {}: {error}", disks.display()));
        std::fs::create_dir_all(&disks).map_err(failed)?;
        crate::files::sync_parent(&disks).map_err(failed)?;
        for entry in std::fs::read_dir(&disks).map_err(failed)? {
            let directory = entry.map_err(failed)?.path();
            returning::settle(&directory)?;
            let Some(spec) = DiskSpec::read(&directory)? else {
                tracing::warn!(path = %directory.display(), "a disk was being made when the node died; it is dropped");
                self.move_aside(&directory)?;
                continue;
            };
            self.restore_disk(spec, &directory).await?;
        }
        Ok(())
    }

    async fn restore_disk(self: &Arc<Self>, spec: DiskSpec, directory: &Path) -> Outcome<()> {
        let name = spec.name.clone();
        let begun = async {
            let (journal, record) = open_journal(directory, &name)?;
            let export = match &spec.origin {
                Origin::Local { image } => open_local(&name, image)?,
                Origin::Pull { .. } => self.open_pull(&spec).await?,
                Origin::Migration { from, .. } => {
                    let name = match &record {
                        Some(Record::Destination(record)) => record.peer_name.as_deref(),
                        _ => None,
                    };
                    self.open_migration(&spec, &self.peer_at(from, name), false).await?
                }
            };
            if export.status().size != spec.size {
                return Err(Failure::failed(format!(
                    "it has {} bytes, but had {}; bring the right image back, or remove {}",
                    export.status().size,
                    spec.size,
                    directory.display()
                )));
            }
            // Nobody needs what a disk lacks that was given up, and its source does not serve it any more.
            let given_up = matches!(&record, Some(Record::Destination(it)) if it.phase == DestinationPhase::Discarded);
            let disk = self.enlist(spec, export, journal, !given_up);
            self.recover(&disk, record).await?;
            Ok(disk)
        };
        let disk =
            begun.await.map_err(|failure: Failure| failure.context(format!("cannot open the export '{name}'")))?;
        if let Err(failure) = disk.device.readopt().await {
            tracing::warn!(disk = %name, %failure, "the device could not be taken over");
        }
        Ok(())
    }

    async fn open_pull(&self, spec: &DiskSpec) -> Outcome<LazyExport> {
        let Origin::Pull { from, store, order, rate, background } = &spec.origin else {
            return Err(Failure::failed("not a pull"));
        };
        let directory = self.directory(&spec.name);
        let mut config = ExportConfig::new(spec.name.as_str(), &directory, from.as_str());
        config.store = (*store != config.store_path()).then(|| store.clone());
        config.size = (spec.size > 0).then_some(spec.size);
        config.order = *order;
        config.rate = *rate;
        config.background = *background;
        config.traffic = self.traffic.clone();
        config.home = Some(home_of(&spec.name)?);
        let upstream = Upstream::from_uri(from, self.config.tls.as_ref().map(|tls| &tls.client))
            .map_err(|error| Failure::usage(chain(&error)))?;
        LazyExport::lazy(config, upstream).await.map_err(|error| match error {
            ExportError::Upstream(UpstreamError::Dial { .. }) => Failure::unreachable(chain(&error)),
            error => Failure::failed(chain(&error)),
        })
    }

    fn directory(&self, name: &DiskName) -> PathBuf {
        self.config.state_dir.join("disks").join(name.as_str())
    }

    /// The same for a name that must be new. Looked at again under the guard: what fails from here on removes the name's
    /// directory, which must not be that of a disk that was made a moment ago.
    fn begin_new(&self, name: &DiskName) -> Outcome<Changing<'_>> {
        let changing = self.begin(name)?;
        if self.disks.contains_key(name) { Err(exists(name)) } else { Ok(changing) }
    }

    /// Nobody else makes or removes the same name meanwhile.
    fn begin(self: &Node, name: &DiskName) -> Outcome<Changing<'_>> {
        if self.disks.len() >= NODE_DISKS && !self.disks.contains_key(name) {
            return Err(Failure::refused(format!("this node has {NODE_DISKS} exports already; remove some")));
        }
        match self.changing.entry(name.clone()) {
            dashmap::Entry::Occupied(_) => {
                Err(Failure::refused(format!("{name} is being made or removed already; try again when that has ended")))
            }
            dashmap::Entry::Vacant(entry) => {
                entry.insert(());
                Ok(Changing { node: self, name: name.clone() })
            }
        }
    }
}

struct Changing<'a> {
    node: &'a Node,
    name: DiskName,
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.node.changing.remove(&self.name);
    }
}

/// A disk's directory while it is not sure that it will stay.
struct NewDirectory(Option<PathBuf>);

impl NewDirectory {
    fn make(directory: &Path) -> Outcome<Self> {
        std::fs::create_dir_all(directory)
            .map_err(|error| Failure::failed(format!("cannot make {}: {error}", directory.display())))?;
        Ok(Self(Some(directory.into())))
    }

    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for NewDirectory {
    fn drop(&mut self) {
        if let Some(directory) = self.0.take()
            && let Err(failure) = remove_directory(&directory)
        {
            tracing::warn!(%failure, "what was begun is left behind");
        }
    }
}

fn remove_directory(directory: &Path) -> Outcome<()> {
    let mut removed = std::fs::remove_dir_all(directory);
    for _ in 0..REMOVE_TRIES {
        // The last line about it may be written at this moment.
        if removed.as_ref().is_err_and(|error| error.kind() == std::io::ErrorKind::DirectoryNotEmpty) {
            removed = std::fs::remove_dir_all(directory);
        }
    }
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::failed(format!("cannot remove {}: {error}", directory.display())))
        }
        _ => Ok(()),
    }
}

/// The same off the runtime's threads: giving the space of a large store back takes long, and heartbeats do not wait.
async fn remove_directory_aside(directory: &Path) -> Outcome<()> {
    let directory = directory.to_owned();
    tokio::task::spawn_blocking(move || remove_directory(&directory))
        .await
        .map_err(|error| Failure::failed(format!("cannot remove a directory: {error}")))?
}

/// The thread of an export.
fn home_of(name: &DiskName) -> Outcome<Arc<Home>> {
    Home::new(name.as_str()).map_err(|error| {
        Failure::failed(format!(
            "cannot start a thread for the export '{name}': {error}; raise the limit of threads (ulimit -u)"
        ))
    })
}

fn open_local(name: &DiskName, image: &Path) -> Outcome<LazyExport> {
    let export = LazyExport::local(name.as_str(), image, false).map_err(|error| Failure::failed(chain(&error)))?;
    Ok(export.with_home(home_of(name)?))
}

fn open_journal(directory: &Path, name: &DiskName) -> Outcome<(Journal, Option<Record>)> {
    Journal::open(&directory.join("journal"), name.as_str()).map_err(|error| Failure::failed(chain(&error)))
}

fn exists(name: &DiskName) -> Failure {
    Failure::refused(format!("an export '{name}' is there already; choose another name, or remove it first"))
}

/// What happened before, as far as it is remembered.
async fn open_events(state_dir: &Path) -> Outcome<EventLog> {
    let disks = state_dir.join("disks");
    let open = move || {
        // What cannot be listed is told where the disks are opened.
        let directories: Vec<_> =
            std::fs::read_dir(disks).into_iter().flatten().flatten().map(|it| it.path()).collect();
        EventLog::open(directories.iter().map(PathBuf::as_path))
    };
    tokio::task::spawn_blocking(open).await.map_err(|error| Failure::failed(format!("cannot read events: {error}")))
}

fn lock(state_dir: &Path) -> Outcome<nix::fcntl::Flock<std::fs::File>> {
    let failed = |error: std::io::Error| {
        Failure::failed(format!("cannot use the state directory {}: {error}", state_dir.display()))
    };
    std::fs::create_dir_all(state_dir).map_err(failed)?;
    let file = std::fs::File::create(state_dir.join("lock")).map_err(failed)?;
    nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock).map_err(|(_, _)| {
        Failure::refused(format!("another node uses the state directory {}; stop it first", state_dir.display()))
    })
}
