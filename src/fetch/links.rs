//! The connections to the upstream: one for demand, further ones for the background where the server allows them.
//!
//! Each costs some round trips. Where the upstream has to be asked for the disk's size they begin before the export does, the
//! further ones as soon as the server has greeted the first: one that serves a single client must not take another for it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::fetcher::LaneKind;
use super::threads::PullThreads;
use crate::limits::{BACKGROUND_CONNECTIONS, EXTRA_CONNECT_TIMEOUT};
use crate::upstream::{Connection, Greeted, LinkReport, LinkState, Upstream, UpstreamError};

type Dialled = Result<Arc<dyn Connection>, UpstreamError>;

/// How lanes get their connections.
pub(crate) struct Links {
    upstream: Upstream,
    /// Of the disk, in bytes, once it is known.
    size: OnceLock<u64>,
    pub(crate) report: LinkReport,
    /// The demand lane's, while it has one.
    demand: watch::Sender<Option<Arc<dyn Connection>>>,
    /// The server has taken the demand connection, or the one that is to be it.
    greeted: Greeted,
    /// The server left a second connection waiting: it serves one client at a time.
    only_one: AtomicBool,
    early: Mutex<Early>,
    threads: Option<PullThreads>,
}

/// What was begun before the lanes.
#[derive(Default)]
struct Early {
    demand: Option<Arc<dyn Connection>>,
    extras: [Option<AbortOnDropHandle<Dialled>>; BACKGROUND_CONNECTIONS],
}

/// A connection for a lane.
pub(crate) struct Link {
    pub(crate) connection: Arc<dyn Connection>,
    /// It is the demand lane's: not to be closed.
    pub(crate) shared: bool,
}

impl Links {
    /// For the disk of that name, whose pull gets threads of its own; `None`: it is done where everything else is.
    pub(crate) fn new(upstream: Upstream, disk: Option<String>) -> Links {
        let report = LinkReport::default();
        report.update(|status| {
            status.target = upstream.describe();
            status.state = LinkState::Connecting;
        });
        Links {
            size: OnceLock::new(),
            report,
            demand: watch::Sender::new(None),
            greeted: Greeted::default(),
            only_one: AtomicBool::new(false),
            early: Mutex::default(),
            threads: disk.map(|name| PullThreads::new(name, upstream.is_encrypted())),
            upstream,
        }
    }

    /// The disk's size, before the lanes begin: a connection to another one is none.
    pub(crate) fn expect(&self, size: u64) {
        // It does not change.
        let _ = self.size.set(size);
    }

    /// One try for the demand connection, which says how many bytes the disk has.
    pub(crate) async fn dial_early(&self) -> Result<u64, UpstreamError> {
        let connection = self.upstream.connect(None, &self.greeted).await?;
        let size = connection.size();
        self.early().demand = Some(connection);
        Ok(size)
    }

    /// The background's connections begin when the server has greeted the demand connection.
    pub(crate) fn dial_extras_early(&self) {
        let dial = |lane| {
            let (upstream, mut greeted) = (self.upstream.clone(), self.greeted.subscribe());
            Some(AbortOnDropHandle::new(self.runtime_of(lane).spawn(async move {
                if greeted.wait_for(|greeted| *greeted).await.is_err() {
                    // The sender goes with whoever would use the connection.
                    std::future::pending::<()>().await;
                }
                upstream.connect_to_read(None).await
            })))
        };
        self.early().extras = std::array::from_fn(dial);
    }

    /// Where a background lane belongs, with its connection.
    pub(crate) fn runtime_of(&self, lane: usize) -> Handle {
        self.threads.as_ref().map_or_else(Handle::current, |threads| threads.of_lane(lane))
    }

    /// The background lanes have ended.
    pub(crate) fn end_threads(&self) {
        if let Some(threads) = &self.threads {
            threads.end();
        }
    }

    /// Closes what no lane has taken.
    pub(crate) async fn forget_early(&self) {
        let early = std::mem::take(&mut *self.early());
        if let Some(connection) = early.demand {
            connection.close().await;
        }
    }

    fn early(&self) -> MutexGuard<'_, Early> {
        self.early.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One try.
    pub(crate) async fn dial(&self, lane: LaneKind) -> Result<Link, UpstreamError> {
        match lane {
            LaneKind::Demand => {
                let early = self.early().demand.take();
                let connection = match early {
                    Some(connection) => connection,
                    None => self.upstream.connect(self.size.get().copied(), &self.greeted).await?,
                };
                Ok(self.adopt(connection))
            }
            LaneKind::Background(index) => self.dial_extra(index).await,
        }
    }

    async fn dial_extra(&self, index: usize) -> Result<Link, UpstreamError> {
        let shared = || self.demand.borrow().clone().map(|connection| Link { connection, shared: true });
        if self.only_one.load(Ordering::Acquire)
            && let Some(link) = shared()
        {
            return Ok(link);
        }
        let _ = self.greeted.subscribe().wait_for(|greeted| *greeted).await;
        let early = self.early().extras.get_mut(index).and_then(Option::take);
        let size = self.size.get().copied();
        let dialling = async {
            let early = match early {
                Some(early) => early.await.ok(),
                None => None,
            };
            match (early, size) {
                (Some(dialled), Some(size)) => self.upstream.check(size, dialled?).await,
                _ => self.upstream.connect_to_read(size).await,
            }
        };
        match tokio::time::timeout(EXTRA_CONNECT_TIMEOUT, dialling).await {
            Ok(Ok(connection)) => Ok(Link { connection, shared: false }),
            Ok(Err(error)) if error.is_fatal() => Err(error),
            Ok(Err(error)) => shared().ok_or(error),
            Err(_) => {
                let target = self.upstream.describe();
                let source = std::io::ErrorKind::TimedOut.into();
                let link = shared().ok_or(UpstreamError::Dial { target, source })?;
                if !self.only_one.swap(true, Ordering::AcqRel) {
                    tracing::info!("the upstream serves one connection at a time: demand and background share it");
                }
                Ok(link)
            }
        }
    }

    /// The demand lane's connection, as soon as there is one.
    pub(crate) async fn shared(&self) -> Link {
        let mut demand = self.demand.subscribe();
        loop {
            if let Some(connection) = demand.borrow_and_update().clone() {
                return Link { connection, shared: true };
            }
            if demand.changed().await.is_err() {
                // The sender is ours: this cannot be while we are here.
                std::future::pending::<()>().await;
            }
        }
    }

    /// A connection becomes the demand lane's.
    fn adopt(&self, connection: Arc<dyn Connection>) -> Link {
        self.only_one.store(false, Ordering::Release);
        self.greeted.send_replace(true);
        self.demand.send_replace(Some(connection.clone()));
        self.report.update(|status| status.state = LinkState::Connected);
        Link { connection, shared: false }
    }

    /// The demand lane has lost its connection.
    pub(crate) fn retire(&self, why: &str) {
        self.greeted.send_replace(false);
        self.demand.send_replace(None);
        self.report.update(|status| {
            status.state = LinkState::Lost;
            status.last_error = Some(why.to_owned());
        });
    }

    /// Everything is here: no connection is needed any more.
    pub(crate) fn release(&self) {
        self.demand.send_replace(None);
        self.report.update(|status| status.state = LinkState::None);
    }

    /// A try failed; answers how long to wait before the next one at least.
    pub(crate) fn failed(&self, lane: LaneKind, error: &UpstreamError) -> Duration {
        if lane == LaneKind::Demand {
            self.greeted.send_replace(false);
        }
        self.report.update(|status| {
            status.last_error = Some(error.to_string());
            if error.is_fatal() {
                status.state = LinkState::WrongDisk;
            } else if lane == LaneKind::Demand {
                status.state = LinkState::Lost;
            }
        });
        if error.is_fatal() { crate::limits::RETRY_MAX } else { crate::limits::RETRY_MIN }
    }
}
