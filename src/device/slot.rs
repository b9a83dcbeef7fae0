//! The one block device of a disk: attached, detached, given up, found again after a restart.
//!
//! A slot serves the device's connection itself, so a device works whatever addresses the node listens on. What is
//! attached is written down in the disk's directory, because a device outlives the node.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ::nbd::address::Address;
use ::nbd::export::{Export, Exports};
use ::nbd::server::{Draining, Listener, ServeOptions};
use futures::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use super::{AttachDevice, AttachRequest, Attached, Connector, DETACH_LIMIT, How, Link, Via};
use crate::error::{Failure, Outcome, chain};

/// How long an attach may take; a lazily filled disk whose source is far away answers its first read late.
const ATTACH_LIMIT: Duration = Duration::from_secs(30);

/// See the module's text.
pub struct DeviceSlot {
    name: String,
    directory: PathBuf,
    export: Arc<dyn Export>,
    stop: CancellationToken,
    connections: TaskTracker,
    /// Whether the socket for nbdfuse is there: from the first attach by FUSE on, to the node's end.
    listening: AtomicBool,
    state: Mutex<State>,
}

enum State {
    Empty,
    /// Somebody attaches or detaches.
    Busy(Option<PathBuf>),
    Attached(Box<AttachDevice>),
}

impl DeviceSlot {
    /// Nothing is attached yet. `directory` is the disk's; connections end with `stop`.
    pub fn new(name: &str, directory: &Path, export: Arc<dyn Export>, stop: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            directory: directory.into(),
            export,
            stop,
            connections: TaskTracker::new(),
            listening: AtomicBool::new(false),
            state: Mutex::new(State::Empty),
        })
    }

    /// The device, while it is attached.
    pub fn device(&self) -> Option<PathBuf> {
        match &*self.lock() {
            State::Empty => None,
            State::Busy(device) => device.clone(),
            State::Attached(device) => Some(device.device().to_path_buf()),
        }
    }

    /// Attaches; attached already is done.
    pub async fn attach(&self, via: Via, device: Option<PathBuf>) -> Outcome<PathBuf> {
        {
            let mut state = self.lock();
            match &*state {
                State::Attached(found)
                    if device.as_ref().is_none_or(|device| device == found.device()) && found.is_by(via) =>
                {
                    return Ok(found.device().to_path_buf());
                }
                State::Attached(found) => {
                    return Err(Failure::refused(format!(
                        "{} is attached to {} already, by {}; detach it first",
                        self.name,
                        found.device().display(),
                        if found.is_by(Via::Fuse) { "FUSE" } else { "the kernel" }
                    )));
                }
                State::Busy(_) => return Err(self.busy()),
                State::Empty => *state = State::Busy(None),
            }
        }
        match self.attach_now(via, device).await {
            Ok(attached) => {
                let device = attached.device().to_path_buf();
                *self.lock() = State::Attached(Box::new(attached));
                Ok(device)
            }
            Err(failure) => {
                *self.lock() = State::Empty;
                Err(failure)
            }
        }
    }

    /// Detaches; refused while it is in use, and done when nothing is attached.
    pub async fn detach(&self) -> Outcome<()> {
        let Some(mut device) = self.take()? else { return Ok(()) };
        let detached = device.detach(DETACH_LIMIT).await;
        self.put_back(device, detached.map_err(|error| Failure::refused(chain(&error))))
    }

    /// Takes the device away whoever uses it; what was not written is lost.
    pub async fn abandon(&self) -> Outcome<()> {
        let Some(mut device) = self.take()? else { return Ok(()) };
        let abandoned = device.abandon().await;
        self.put_back(device, abandoned.map_err(|error| Failure::failed(chain(&error))))
    }

    /// After a restart of the node: the device that the one before had attached gets a new connection.
    pub async fn readopt(&self) -> Outcome<()> {
        let path = self.record_path();
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Failure::failed(format!("cannot read {}: {error}", path.display()))),
        };
        let record: Attached = serde_json::from_slice(&text)
            .map_err(|error| Failure::failed(format!("{} is damaged: {error}; detach by hand", path.display())))?;
        let connector = self.connector();
        match AttachDevice::readopt(&record, &*connector).await {
            Ok(device) => {
                *self.lock() = State::Attached(Box::new(device));
                Ok(())
            }
            Err(error) => {
                let mut device = AttachDevice::from_record(record);
                if device.is_there() {
                    // It can still be detached by its record.
                    *self.lock() = State::Attached(Box::new(device));
                    return Err(Failure::failed(chain(&error)));
                }
                let _ = std::fs::remove_file(&path);
                Err(Failure::failed(format!(
                    "{} is gone, with a restart of this host or by hand; `lazy-migrate attach {}` makes a new device",
                    device.device().display(),
                    self.name
                )))
            }
        }
    }

    /// Ends the device's connections, which the stop token has told to end; a kernel device holds its I/O until the
    /// next node. Before the export is closed: an error answer would reach the file system.
    pub async fn hang_up(&self) {
        self.connections.close();
        self.connections.wait().await;
    }

    async fn attach_now(&self, via: Via, device: Option<PathBuf>) -> Outcome<AttachDevice> {
        let info = self.export.info();
        let directory = self.directory.join("fuse");
        let socket = self.directory.join("fuse.sock");
        let listens = via == Via::Kernel || self.listening.load(Ordering::Relaxed);
        let fuse = if listens { None } else { Some(self.listen_for_fuse(&socket).await?) };
        let request = AttachRequest {
            name: self.name.clone(),
            size: info.size,
            read_only: info.read_only,
            via,
            device,
            backend_id: format!("lazy-migrate:{}", self.directory.display()),
            uri: format!("nbd+unix:///{}?socket={}", self.name, socket.display()),
            directory,
            limit: ATTACH_LIMIT,
        };
        let connector = self.connector();
        let mut attached = AttachDevice::attach(&request, &*connector)
            .await
            .map_err(|error| Failure::failed(format!("cannot attach {}: {}", self.name, chain(&error))))?;
        if let Err(failure) = self.write_record(attached.record()) {
            // Without its record nobody could detach it; nobody uses it yet.
            return Err(match attached.abandon().await {
                Ok(()) => failure,
                Err(error) => failure.context(format!(
                    "{} stays attached and unrecorded ({}), detach it by hand",
                    attached.device().display(),
                    chain(&error)
                )),
            });
        }
        if let Some(listening) = fuse
            && matches!(attached.record().how, How::Fuse { .. })
        {
            // nbdfuse has connected: its connection lives until the node's end, and the next one is taken there too.
            listening.disarm();
            self.listening.store(true, Ordering::Relaxed);
        }
        Ok(attached)
    }

    /// A private socket for nbdfuse, which wants a URI.
    async fn listen_for_fuse(&self, socket: &Path) -> Outcome<tokio_util::sync::DropGuard> {
        let listener =
            Listener::bind(&Address::Unix(socket.into())).await.map_err(|error| Failure::failed(chain(&error)))?;
        let stop = self.stop.child_token();
        let exports = Arc::new(One(self.name.clone(), self.export.clone()));
        self.connections.spawn(listener.run(exports, serve_options(), stop.clone()).in_current_span());
        Ok(stop.drop_guard())
    }

    fn connector(&self) -> Box<Connector<'static>> {
        let exports: Arc<dyn Exports> = Arc::new(One(self.name.clone(), self.export.clone()));
        let (name, stop, connections) = (self.name.clone(), self.stop.clone(), self.connections.clone());
        Box::new(move || -> BoxFuture<'static, std::io::Result<Link>> {
            let (exports, name, stop) = (exports.clone(), name.clone(), stop.clone());
            let connections = connections.clone();
            Box::pin(async move { Link::to_export(exports, &name, &connections, stop).await })
        })
    }

    fn take(&self) -> Outcome<Option<Box<AttachDevice>>> {
        let mut state = self.lock();
        match std::mem::replace(&mut *state, State::Empty) {
            State::Empty => Ok(None),
            State::Busy(device) => {
                *state = State::Busy(device);
                Err(self.busy())
            }
            State::Attached(device) => {
                *state = State::Busy(Some(device.device().to_path_buf()));
                Ok(Some(device))
            }
        }
    }

    fn put_back(&self, device: Box<AttachDevice>, outcome: Outcome<()>) -> Outcome<()> {
        match outcome {
            Ok(()) => {
                *self.lock() = State::Empty;
                match std::fs::remove_file(self.record_path()) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Failure::failed(format!(
                        "{} is detached, but {} cannot be removed: {error}",
                        self.name,
                        self.record_path().display()
                    ))),
                    _ => Ok(()),
                }
            }
            Err(failure) => {
                *self.lock() = State::Attached(device);
                Err(failure)
            }
        }
    }

    fn write_record(&self, record: &Attached) -> Outcome<()> {
        let path = self.record_path();
        crate::files::write_atomically(&path, &serde_json::to_vec(record).map_err(Failure::failed)?)
            .map_err(|error| Failure::failed(format!("cannot write {}: {error}", path.display())))
    }

    fn record_path(&self) -> PathBuf {
        self.directory.join("device.json")
    }

    fn busy(&self) -> Failure {
        Failure::refused(format!("{} is being attached or detached; try again when that has ended", self.name))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The kernel sends again what is not answered: an error would reach the file system.
fn serve_options() -> ServeOptions {
    ServeOptions { draining: Draining::HangUp, ..ServeOptions::default() }
}

/// The one export that a device sees.
struct One(String, Arc<dyn Export>);

impl Exports for One {
    fn find(&self, name: &str) -> Option<Arc<dyn Export>> {
        (name == self.0).then(|| self.1.clone())
    }

    fn list(&self) -> Vec<(String, String)> {
        vec![(self.0.clone(), self.1.info().description)]
    }
}
