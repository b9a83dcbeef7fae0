//! What is done with a block device, whatever is behind it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use nix::libc::{self, O_DIRECT, O_EXCL};
use tokio::time::timeout;

use super::mounts::{self, mounts_of};
use super::{DeviceError, blocking};

/// The unit of direct I/O that suits every device.
const BLOCK: usize = 4096;
/// The smallest unit of a block device.
const SECTOR: u64 = 512;

/// A device that nobody else can mount or claim for as long as this lives.
#[derive(Debug)]
pub struct Claim(File);

impl Claim {
    /// Claims a device for the moment of its end: refused while it is mounted, held by another device, or in use.
    pub fn take(device: &Path) -> Result<Self, DeviceError> {
        if let Some(directory) = mounts_of(device)?.into_iter().next() {
            return Err(DeviceError::Mounted { device: device.to_owned(), directory });
        }
        if let Some(holder) = mounts::holders_of(device)?.into_iter().next() {
            return Err(DeviceError::Held { device: device.to_owned(), holder });
        }
        // For reading: a close after writing makes udev read the device again.
        match OpenOptions::new().read(true).custom_flags(O_EXCL).open(device) {
            Ok(file) => Ok(Self(file)),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                Err(DeviceError::InUse { device: device.to_owned() })
            }
            Err(source) => Err(DeviceError::Io { what: "open", path: device.to_owned(), source }),
        }
    }

    /// Writes everything that the device's cache still holds.
    fn sync(&self, device: &Path) -> Result<(), DeviceError> {
        self.0.sync_all().map_err(|source| DeviceError::Io { what: "flush", path: device.to_owned(), source })
    }
}

/// Claims a device and writes what its cache holds, within a time limit.
pub(super) async fn claim_and_sync(device: &Path, limit: Duration) -> Result<Claim, DeviceError> {
    let (claim, synced) = claim_and_try_to_sync(device, limit).await?;
    synced.map(|()| claim)
}

/// The same, with the claim also where the device does not take what is written to it.
pub(super) async fn claim_and_try_to_sync(
    device: &Path,
    limit: Duration,
) -> Result<(Claim, Result<(), DeviceError>), DeviceError> {
    let path = device.to_owned();
    let work = blocking(move || {
        let claim = Claim::take(&path)?;
        let synced = claim.sync(&path);
        Ok((claim, synced))
    });
    timeout(limit, work).await.unwrap_or_else(|_| {
        Err(DeviceError::TooSlow {
            what: "flushing",
            path: device.to_owned(),
            limit,
            next: "it is still attached; see whether its export answers (lazy-migrate status), then detach again",
        })
    })
}

/// Reads the first block of a disk of `size` bytes past every cache: the proof that a device works. Blocks.
pub fn read_first(device: &Path, size: u64) -> Result<(), DeviceError> {
    let failed = |source| DeviceError::Io { what: "read", path: device.to_owned(), source };
    let file = OpenOptions::new().read(true).custom_flags(O_DIRECT).open(device).map_err(failed)?;
    let length = (size - size % SECTOR).min(BLOCK as u64) as usize;
    let mut buffer = vec![0; 2 * BLOCK];
    let start = buffer.as_ptr().align_offset(BLOCK);
    file.read_exact_at(&mut buffer[start..start + length], 0).map_err(failed)
}

/// Writes and drops what the kernel has cached of a device, so that the next buffered read sees what is behind it now.
///
/// Only the cache of the device itself, and only what nobody uses: unmount it first. Blocks while it writes.
pub fn flush_buffers(device: &Path) -> Result<(), DeviceError> {
    let failed = |source: io::Error| DeviceError::Io { what: "drop the cache of", path: device.to_owned(), source };
    let file = File::open(device).map_err(failed)?;
    drop_cache(&file).map_err(failed)
}

/// The BLKFLSBUF request of `ioctl(2)`; it needs CAP_SYS_ADMIN.
#[allow(unsafe_code)]
fn drop_cache(device: &File) -> io::Result<()> {
    mod request {
        nix::ioctl_none!(block_flush_buffers, 0x12, 97);
    }
    // SAFETY: BLKFLSBUF takes no argument and touches no memory of ours; the descriptor is open.
    unsafe { request::block_flush_buffers(device.as_raw_fd()) }.map(drop).map_err(io::Error::from)
}

/// The size of a block device in bytes as /sys has it.
pub(super) fn size_of(device: &Path) -> Result<u64, DeviceError> {
    let path = mounts::sysfs_directory(device)?.join("size");
    let text =
        fs::read_to_string(&path).map_err(|source| DeviceError::Io { what: "read", path: path.clone(), source })?;
    let sectors: u64 = text.trim().parse().map_err(|_| DeviceError::Io {
        what: "understand",
        path,
        source: io::Error::new(io::ErrorKind::InvalidData, "not a number"),
    })?;
    Ok(sectors.saturating_mul(SECTOR))
}
