//! The connections to the upstream: one for demand, further ones for the background where the server allows them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;

use super::fetcher::LaneKind;
use crate::limits::EXTRA_CONNECT_TIMEOUT;
use crate::upstream::{Connection, LinkReport, LinkState, Upstream, UpstreamError};

/// How lanes get their connections.
pub(crate) struct Links {
    upstream: Upstream,
    size: u64,
    pub(crate) report: LinkReport,
    /// The demand lane's, while it has one.
    demand: watch::Sender<Option<Arc<dyn Connection>>>,
    /// The server left a second connection waiting: it serves one client at a time.
    only_one: AtomicBool,
}

/// A connection for a lane.
pub(crate) struct Link {
    pub(crate) connection: Arc<dyn Connection>,
    /// It is the demand lane's: not to be closed.
    pub(crate) shared: bool,
}

impl Links {
    pub(crate) fn new(upstream: Upstream, size: u64) -> Links {
        let report = LinkReport::default();
        report.update(|status| {
            status.target = upstream.describe();
            status.state = LinkState::Connecting;
        });
        Links { upstream, size, report, demand: watch::Sender::new(None), only_one: AtomicBool::new(false) }
    }

    /// One try.
    pub(crate) async fn dial(&self, lane: LaneKind) -> Result<Link, UpstreamError> {
        match lane {
            LaneKind::Demand => {
                let connection = self.upstream.connect(Some(self.size)).await?;
                Ok(self.adopt(connection))
            }
            LaneKind::Background(_) => self.dial_extra().await,
        }
    }

    async fn dial_extra(&self) -> Result<Link, UpstreamError> {
        let shared = || self.demand.borrow().clone().map(|connection| Link { connection, shared: true });
        if self.only_one.load(Ordering::Acquire)
            && let Some(link) = shared()
        {
            return Ok(link);
        }
        match tokio::time::timeout(EXTRA_CONNECT_TIMEOUT, self.upstream.connect_to_read(Some(self.size))).await {
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
    pub(crate) fn adopt(&self, connection: Arc<dyn Connection>) -> Link {
        self.only_one.store(false, Ordering::Release);
        self.demand.send_replace(Some(connection.clone()));
        self.report.update(|status| status.state = LinkState::Connected);
        Link { connection, shared: false }
    }

    /// The demand lane has lost its connection.
    pub(crate) fn retire(&self, why: &str) {
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
