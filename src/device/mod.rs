//! Block devices on this host that show an export: the kernel's NBD device, or nbdfuse and a loop device without one.
//!
//! The node attaches an export where a container's filesystem is to be mounted, writes the [`Attached`] record down, and
//! detaches by it, also after a restart. A device outlives the node: dropping an [`AttachDevice`] leaves it attached, and
//! a kernel device holds its I/O until [`AttachDevice::readopt`] gives it a new connection.
//!
//! - [`link`]: the socket pair between a device and the node's own NBD server.
//! - [`kernel`], [`fuse`]: the two ways to attach.
//! - [`block`]: what is done with any block device: the first read, the claim before a detach, dropping its cache.
//! - [`mounts`], [`mount`]: what is mounted, and mounting.

pub mod block;
mod command;
pub mod fuse;
pub mod kernel;
pub mod link;
pub mod mount;
pub mod mounts;
mod slot;

use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use ::nbd::kernel::KernelError;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

pub use block::flush_buffers;
pub use link::Link;
pub use mounts::mounts_of;
pub use slot::DeviceSlot;

use fuse::{FuseDevice, Session};
use kernel::KernelDevice;

/// For how long a detach waits until the device's cache is written and until the device is gone, unless told otherwise.
pub const DETACH_LIMIT: Duration = Duration::from_secs(60);

/// Why a device could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The kernel's NBD device.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A device name that the chosen way of attaching does not have.
    #[error("cannot attach to {}: {wanted} is wanted", device.display())]
    BadDevice {
        /// The name that was given.
        device: PathBuf,
        /// What it should look like.
        wanted: &'static str,
    },
    /// Neither auto, kernel nor fuse.
    #[error("there is no way {0:?} to attach a device: use auto, kernel or fuse")]
    BadVia(String),
    /// The node could not serve the device's end.
    #[error("cannot serve {name} to its device: {source}")]
    Connect {
        /// The export.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The device must not be detached yet.
    #[error("{} is mounted on {}: unmount it first", device.display(), directory.display())]
    Mounted {
        /// The device.
        device: PathBuf,
        /// Where it is mounted; one of several, maybe.
        directory: PathBuf,
    },
    /// Another device is built on it.
    #[error("{} is used by the block device {holder}: remove that first", device.display())]
    Held {
        /// The device.
        device: PathBuf,
        /// The name of the other one.
        holder: String,
    },
    /// Somebody has it open exclusively: mounted in another mount namespace, swap, or a tool at work.
    #[error(
        "{} is in use (mounted in another namespace, say in a container, or swap): end that use first",
        device.display()
    )]
    InUse {
        /// The device.
        device: PathBuf,
    },
    /// A system call on a device or a file failed.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something took longer than it may.
    #[error("{what} {} took longer than {} s: {next}", path.display(), limit.as_secs())]
    TooSlow {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// How long it had.
        limit: Duration,
        /// What to do.
        next: &'static str,
    },
    /// A program that is not installed.
    #[error("cannot run {program}: it is not installed; install the Debian package {package}")]
    Missing {
        /// The program.
        program: &'static str,
        /// The package that brings it.
        package: &'static str,
    },
    /// A program that failed.
    #[error("{command} failed ({status}): {output}")]
    Failed {
        /// The program and its arguments.
        command: String,
        /// How it ended.
        status: String,
        /// What it wrote to stderr, on one line.
        output: String,
    },
    /// A FUSE attachment lost its server.
    #[error("nbdfuse behind {} does not reconnect: unmount it, detach it, and attach it again", device.display())]
    CannotReconnect {
        /// The loop device.
        device: PathBuf,
    },
    /// The runtime is shutting down.
    #[error("the node is shutting down")]
    Stopped,
}

/// How to attach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Via {
    /// The kernel's NBD device where there is one, FUSE otherwise.
    #[default]
    Auto,
    /// The kernel's NBD device.
    Kernel,
    /// nbdfuse and a loop device.
    Fuse,
}

impl FromStr for Via {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Via::Auto),
            "kernel" => Ok(Via::Kernel),
            "fuse" => Ok(Via::Fuse),
            _ => Err(DeviceError::BadVia(text.to_owned())),
        }
    }
}

/// Makes a new connection to the export: called once for each attach and readopt.
pub type Connector<'a> = dyn Fn() -> BoxFuture<'a, io::Result<Link>> + Send + Sync + 'a;

/// What is to be attached, and how.
#[derive(Clone, Debug)]
pub struct AttachRequest {
    /// The export's name, for messages and the record.
    pub name: String,
    /// Size in bytes, 512 or more. A partial last sector of 512 bytes is not visible through the device.
    pub size: u64,
    /// Writes are refused by the device already.
    pub read_only: bool,
    /// The way.
    pub via: Via,
    /// The device, `/dev/nbdN` or `/dev/loopN`; a free one otherwise.
    pub device: Option<PathBuf>,
    /// Says whose kernel device it is, and for what: the node writes it down before it attaches, so that a device is
    /// found again (`nbd::kernel::devices`) although the node died before it knew the number.
    pub backend_id: String,
    /// NBD URI of the export, for nbdfuse.
    pub uri: String,
    /// A directory for this attachment alone, for nbdfuse; made and removed here.
    pub directory: PathBuf,
    /// How long the attach may take, the first read included.
    pub limit: Duration,
}

/// What is attached: all that a restarted node needs to take it over or to detach it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The export's name.
    pub name: String,
    /// The block device.
    pub device: PathBuf,
    /// Size in bytes that was asked for.
    pub size: u64,
    /// The way, and what belongs to it.
    #[serde(flatten)]
    pub how: How,
}

/// The part of [`Attached`] that depends on the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "via", rename_all = "lowercase")]
pub enum How {
    /// The kernel's NBD device.
    Kernel {
        /// Its number.
        index: u32,
        /// The backend identifier it was connected with.
        backend_id: String,
    },
    /// nbdfuse and a loop device.
    Fuse {
        /// nbdfuse's process.
        pid: u32,
        /// When that process started, in clock ticks since boot: process numbers are used again.
        started: u64,
        /// The attachment's own directory.
        directory: PathBuf,
    },
}

/// An attached device. Dropping it detaches nothing.
#[derive(Debug)]
pub enum AttachDevice {
    /// The kernel's NBD device.
    Kernel(KernelDevice),
    /// nbdfuse and a loop device.
    Fuse(FuseDevice),
}

impl AttachDevice {
    /// Whether it was attached in this way.
    pub fn is_by(&self, via: Via) -> bool {
        match via {
            Via::Auto => true,
            Via::Kernel => matches!(self, Self::Kernel(_)),
            Via::Fuse => matches!(self, Self::Fuse(_)),
        }
    }

    /// Attaches, and returns when a direct read of the device's first block has succeeded.
    ///
    /// When it fails, or its future is dropped, nothing stays attached.
    pub async fn attach(request: &AttachRequest, connector: &Connector<'_>) -> Result<Self, DeviceError> {
        match choose(request).await? {
            Via::Fuse => FuseDevice::attach(request).await.map(AttachDevice::Fuse),
            _ => KernelDevice::attach(request, connector).await.map(AttachDevice::Kernel),
        }
    }

    /// Gives a device whose server died (with the node before this one, or alone) a new connection. Its I/O goes on, at
    /// the latest after `nbd::kernel::IO_TIMEOUT_MS` or so. When it fails, the device is as it was.
    pub async fn readopt(record: &Attached, connector: &Connector<'_>) -> Result<Self, DeviceError> {
        match Self::from_record(record.clone()) {
            AttachDevice::Kernel(mut device) => {
                device.reconnect(connector).await?;
                Ok(AttachDevice::Kernel(device))
            }
            AttachDevice::Fuse(_) => Err(DeviceError::CannotReconnect { device: record.device.clone() }),
        }
    }

    /// A device from its record, without a connection: to be detached or abandoned.
    pub fn from_record(record: Attached) -> Self {
        match record.how.clone() {
            How::Kernel { index, backend_id } => {
                AttachDevice::Kernel(KernelDevice::from_record(record, index, backend_id))
            }
            How::Fuse { pid, started, directory } => {
                AttachDevice::Fuse(FuseDevice::from_record(record, Session::new(pid, started, directory)))
            }
        }
    }

    /// Whether there is still something to detach: a restart of the host takes the device away.
    pub fn is_there(&mut self) -> bool {
        match self {
            // When it cannot be told, it is looked at again at the detach.
            AttachDevice::Kernel(device) => device.is_ours().unwrap_or(true),
            AttachDevice::Fuse(device) => device.is_running(),
        }
    }

    /// What to write down.
    pub fn record(&self) -> &Attached {
        match self {
            AttachDevice::Kernel(device) => device.record(),
            AttachDevice::Fuse(device) => device.record(),
        }
    }

    /// The block device.
    pub fn device(&self) -> &Path {
        &self.record().device
    }

    /// Detaches: refused while the device is mounted or held, then everything is written, then the device goes away.
    /// A device that is gone already counts as detached. After an error it can be called again.
    pub async fn detach(&mut self, limit: Duration) -> Result<(), DeviceError> {
        match self {
            AttachDevice::Kernel(device) => device.detach(limit).await,
            AttachDevice::Fuse(device) => device.detach(limit).await,
        }
    }

    /// Takes the device away whoever uses it: what was not written is lost, and all I/O on it fails from now on. It frees
    /// tasks that are stuck in I/O. For a disk whose content is given up anyway.
    pub async fn abandon(&mut self) -> Result<(), DeviceError> {
        match self {
            AttachDevice::Kernel(device) => device.abandon().await,
            AttachDevice::Fuse(device) => device.abandon().await,
        }
    }
}

/// The way that a request takes on this host.
async fn choose(request: &AttachRequest) -> Result<Via, DeviceError> {
    if request.via != Via::Auto {
        return Ok(request.via);
    }
    if request.device.as_deref().is_some_and(|device| number_of(device, fuse::DEVICE_PREFIX).is_some()) {
        return Ok(Via::Fuse);
    }
    match blocking(|| Ok(::nbd::kernel::available())).await? {
        Ok(()) => Ok(Via::Kernel),
        Err(KernelError::NoNbd { .. }) => Ok(Via::Fuse),
        Err(error) => Err(error.into()),
    }
}

/// The number at the end of a device's path.
fn number_of(device: &Path, prefix: &str) -> Option<u32> {
    let digits = device.to_str()?.strip_prefix(prefix)?;
    if digits.bytes().all(|byte| byte.is_ascii_digit()) { digits.parse().ok() } else { None }
}

/// Runs something that blocks. What it returns is dropped when nobody waits for it any more, so what must be undone then
/// is undone by a `Drop`.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, DeviceError> + Send + 'static,
) -> Result<T, DeviceError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| DeviceError::Stopped)?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(how: How) -> Attached {
        Attached { name: "web".to_owned(), device: PathBuf::from("/dev/x"), size: 4096, how }
    }

    #[test]
    fn the_records_on_disk_look_like_this() {
        let kernel = record(How::Kernel { index: 3, backend_id: "lazy-migrate web".to_owned() });
        let text =
            r#"{"name":"web","device":"/dev/x","size":4096,"via":"kernel","index":3,"backend_id":"lazy-migrate web"}"#;
        assert_eq!(serde_json::to_string(&kernel).unwrap(), text);
        assert_eq!(serde_json::from_str::<Attached>(text).unwrap(), kernel);
        let fuse = record(How::Fuse { pid: 7, started: 8, directory: PathBuf::from("/run/x") });
        let text =
            r#"{"name":"web","device":"/dev/x","size":4096,"via":"fuse","pid":7,"started":8,"directory":"/run/x"}"#;
        assert_eq!(serde_json::to_string(&fuse).unwrap(), text);
        assert_eq!(serde_json::from_str::<Attached>(text).unwrap(), fuse);
    }

    #[test]
    fn a_device_is_taken_by_its_exact_name() {
        let prefix = kernel::DEVICE_PREFIX;
        assert_eq!(number_of(Path::new("/dev/nbd12"), prefix), Some(12));
        for bad in ["/dev/nbd", "/dev/nbd1p1", "/dev/nbd+1", "nbd1", "/dev/loop1", "/dev/nbd99999999999"] {
            assert_eq!(number_of(Path::new(bad), prefix), None, "{bad}");
        }
    }

    #[test]
    fn ways_are_named() {
        assert_eq!("fuse".parse::<Via>().unwrap(), Via::Fuse);
        assert!("Fuse".parse::<Via>().unwrap_err().to_string().contains("auto, kernel or fuse"));
    }

    #[tokio::test]
    async fn a_fuse_device_says_that_it_cannot_be_taken_over() {
        let fuse = record(How::Fuse { pid: 7, started: 8, directory: PathBuf::from("/run/x") });
        let connector =
            || -> BoxFuture<'static, io::Result<Link>> { Box::pin(async { Err(io::Error::other("unused")) }) };
        let error = AttachDevice::readopt(&fuse, &connector).await.unwrap_err();
        assert!(error.to_string().contains("does not reconnect"), "{error}");
    }
}
