//! A kernel NBD device of an export: attach, take over after a restart, detach.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use ::nbd::kernel::{self, ConnectParams, IO_TIMEOUT_MS, KernelError, ServerFlags};
use tokio::time::{sleep, timeout_at};

use super::link::Witness;
use super::{AttachRequest, Attached, Connector, DeviceError, How, block, blocking, number_of};

/// What a kernel device's path begins with.
pub(super) const DEVICE_PREFIX: &str = "/dev/nbd";

/// How long a device may take to vanish after it was disconnected.
const GONE_LIMIT: Duration = Duration::from_secs(10);

/// How long a new connection is offered while the old one is still there: its server has just been ended.
const OLD_CONNECTION_LIMIT: Duration = Duration::from_secs(2);
/// How often.
const OFFER_INTERVAL: Duration = Duration::from_millis(50);

/// An attached kernel NBD device.
#[derive(Debug)]
pub struct KernelDevice {
    record: Attached,
    index: u32,
    backend_id: String,
    /// Our own end of the connection; none when this process never made one.
    witness: Option<Witness>,
}

impl KernelDevice {
    pub(super) async fn attach(request: &AttachRequest, connector: &Connector<'_>) -> Result<Self, DeviceError> {
        let index = match &request.device {
            Some(device) => Some(number_of(device, DEVICE_PREFIX).ok_or_else(|| DeviceError::BadDevice {
                device: device.clone(),
                wanted: "a kernel NBD device, /dev/nbdN,",
            })?),
            None => None,
        };
        let deadline = Instant::now() + request.limit;
        let too_slow = |path: PathBuf| DeviceError::TooSlow {
            what: "attaching",
            path,
            limit: request.limit,
            next: "see whether the source can be reached (lazy-migrate status), then attach again",
        };
        let link = match timeout_at(deadline.into(), connector()).await {
            Ok(link) => link.map_err(|source| DeviceError::Connect { name: request.name.clone(), source })?,
            Err(_) => return Err(too_slow(PathBuf::from(&request.name))),
        };
        let params = ConnectParams {
            index,
            size: request.size,
            flags: if request.read_only { ServerFlags::READ_ONLY } else { ServerFlags::WRITABLE },
            backend_identifier: request.backend_id.clone(),
        };
        let connection = blocking(move || {
            let (socket, witness) = link.into_parts();
            let index = kernel::connect(socket.as_fd(), &params)?;
            let connection = Connection { index, witness: Some(witness) };
            kernel::set_io_timeout(index, IO_TIMEOUT_MS)?;
            kernel::wait_for_size(index, params.size, deadline.saturating_duration_since(Instant::now()))?;
            Ok(connection)
        })
        .await?;
        let device = kernel::device_path(connection.index);
        let (path, size) = (device.clone(), request.size);
        // When this is too slow, dropping the connection makes the read fail, which frees its thread.
        match timeout_at(deadline.into(), blocking(move || block::read_first(&path, size))).await {
            Ok(read) => read?,
            Err(_) => return Err(too_slow(device)),
        }
        let (index, witness) = connection.keep();
        let how = How::Kernel { index, backend_id: request.backend_id.clone() };
        let record = Attached { name: request.name.clone(), device, size: request.size, how };
        Ok(Self { record, index, backend_id: request.backend_id.clone(), witness })
    }

    /// A device that this process has no connection to.
    pub(super) fn from_record(record: Attached, index: u32, backend_id: String) -> Self {
        Self { record, index, backend_id, witness: None }
    }

    pub(super) fn record(&self) -> &Attached {
        &self.record
    }

    /// Gives the device a new connection. The old one may be about to end, so that is waited for, for a moment.
    pub(super) async fn reconnect(&mut self, connector: &Connector<'_>) -> Result<(), DeviceError> {
        let deadline = Instant::now() + OLD_CONNECTION_LIMIT;
        self.witness = Some(loop {
            match self.offer(connector).await {
                Err(DeviceError::Kernel(KernelError::NotTaken { .. })) if Instant::now() < deadline => {
                    sleep(OFFER_INTERVAL).await;
                }
                other => break other?,
            }
        });
        Ok(())
    }

    /// Offers the kernel one new connection.
    async fn offer(&self, connector: &Connector<'_>) -> Result<Witness, DeviceError> {
        let link =
            connector().await.map_err(|source| DeviceError::Connect { name: self.record.name.clone(), source })?;
        let (index, backend_id) = (self.index, self.backend_id.clone());
        blocking(move || {
            let (socket, witness) = link.into_parts();
            kernel::reconfigure(index, socket, witness.as_fd(), &backend_id, None)?;
            kernel::set_io_timeout(index, IO_TIMEOUT_MS)?;
            Ok(witness)
        })
        .await
    }

    pub(super) async fn detach(&mut self, limit: Duration) -> Result<(), DeviceError> {
        if !self.is_ours()? {
            return Ok(());
        }
        let claim = block::claim_and_sync(&self.record.device, limit).await?;
        self.disconnect().await?;
        drop(claim);
        self.wait_until_gone().await
    }

    pub(super) async fn abandon(&mut self) -> Result<(), DeviceError> {
        if !self.is_ours()? {
            return Ok(());
        }
        // Whoever has the device open keeps its size; so nothing is waited for.
        self.disconnect().await
    }

    /// Whether the device is still there, and still the one that we attached.
    pub(super) fn is_ours(&self) -> Result<bool, KernelError> {
        Ok(kernel::is_connected(self.index)
            && kernel::backend_identifier(self.index)?.as_deref() == Some(self.backend_id.as_str()))
    }

    async fn disconnect(&mut self) -> Result<(), DeviceError> {
        if let Some(witness) = self.witness.take() {
            witness.hang_up();
        }
        let index = self.index;
        blocking(move || Ok(kernel::disconnect(index)?)).await
    }

    async fn wait_until_gone(&self) -> Result<(), DeviceError> {
        let index = self.index;
        blocking(move || Ok(kernel::wait_for_size(index, 0, GONE_LIMIT)?)).await
    }
}

/// A device that is connected, but not yet known to work: disconnected when dropped.
struct Connection {
    index: u32,
    witness: Option<Witness>,
}

impl Connection {
    fn keep(mut self) -> (u32, Option<Witness>) {
        (self.index, self.witness.take())
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let Some(witness) = self.witness.take() else { return };
        witness.hang_up();
        let index = self.index;
        let disconnect = move || {
            if let Err(error) = kernel::disconnect(index) {
                tracing::warn!("a failed attach could not be undone: {error}");
            }
        };
        // The kernel answers in milliseconds, but a runtime's thread must not wait for it.
        if let Err(error) = thread::Builder::new().name("disconnect".to_owned()).spawn(disconnect) {
            tracing::warn!("/dev/nbd{index} stays connected after a failed attach: {error}");
        }
    }
}
