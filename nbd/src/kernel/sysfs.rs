//! What /sys says of an NBD device, and the one thing that must be written there.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use super::KernelError;

/// /sys counts in sectors of this many bytes, whatever the device's block size.
const SECTOR: u64 = 512;
/// How often a size that changes is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// The device's node, `/dev/nbdN`.
pub fn device_path(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{index}"))
}

/// The device's size in bytes; 0 when it is not connected, or does not exist.
pub fn device_size(index: u32) -> Result<u64, KernelError> {
    let path = attribute(index, "size");
    let Some(text) = read_optional(&path)? else { return Ok(0) };
    let sectors: u64 = text.parse().map_err(|_| KernelError::Sysfs {
        path,
        source: io::Error::new(io::ErrorKind::InvalidData, format!("{text:?} is not a number")),
    })?;
    Ok(sectors.saturating_mul(SECTOR))
}

/// The identifier that the device was connected with; none when it is not connected, or was connected without one.
pub fn backend_identifier(index: u32) -> Result<Option<String>, KernelError> {
    read_optional(&attribute(index, "backend"))
}

/// Whether somebody has connected the device. (It stays so when the server has died.)
pub fn is_connected(index: u32) -> bool {
    attribute(index, "pid").exists()
}

/// The connected devices and their backend identifiers (empty for a device without one), by number.
///
/// A node that died between connecting a device and writing down its number finds it again here.
pub fn devices() -> Result<Vec<(u32, String)>, KernelError> {
    let path = Path::new("/sys/block");
    let failed = |source| KernelError::Sysfs { path: path.to_owned(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let index = name.to_str().and_then(|name| name.strip_prefix("nbd")).and_then(|number| number.parse().ok());
        if let Some(index) = index.filter(|&index| is_connected(index)) {
            found.push((index, backend_identifier(index)?.unwrap_or_default()));
        }
    }
    found.sort();
    Ok(found)
}

/// Sets after how long the block layer looks at a request that has no answer, in milliseconds.
///
/// Only then are requests that were sent to a dead server sent again; requests in flight keep the old value. So it is
/// set right after the device was connected. A server that is merely slow is only logged (one socket, timeout 0).
pub fn set_io_timeout(index: u32, milliseconds: u32) -> Result<(), KernelError> {
    let path = attribute(index, "queue/io_timeout");
    fs::write(&path, milliseconds.to_string()).map_err(|source| KernelError::Sysfs { path, source })
}

/// Waits until the device has a size in bytes (rounded down to whole sectors), or `limit` has passed.
pub fn wait_for_size(index: u32, size: u64, limit: Duration) -> Result<(), KernelError> {
    let expected = size - size % SECTOR;
    let start = Instant::now();
    loop {
        let found = device_size(index)?;
        if found == expected {
            return Ok(());
        }
        let waited = start.elapsed();
        if waited >= limit {
            let waited_ms = waited.as_millis() as u64;
            return Err(KernelError::WrongSize { index, expected, found, waited_ms });
        }
        thread::sleep(POLL_INTERVAL);
    }
}

fn attribute(index: u32, name: &str) -> PathBuf {
    PathBuf::from(format!("/sys/block/nbd{index}/{name}"))
}

/// A file that may not be there. The kernel takes attributes away while somebody reads them: that is ENODEV.
fn read_optional(path: &Path) -> Result<Option<String>, KernelError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => Ok(None),
        Err(source) => Err(KernelError::Sysfs { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No machine has this many.
    const ABSENT: u32 = 4_000_000_000;

    #[test]
    fn a_device_that_is_not_there_has_no_size_no_backend_and_no_connection() {
        assert_eq!(device_size(ABSENT).unwrap(), 0);
        assert_eq!(backend_identifier(ABSENT).unwrap(), None);
        assert!(!is_connected(ABSENT));
        assert!(set_io_timeout(ABSENT, 3000).is_err());
    }

    #[test]
    fn waiting_ends_at_its_limit_and_says_what_it_saw() {
        let error = wait_for_size(ABSENT, 1000, Duration::ZERO).unwrap_err();
        assert!(matches!(error, KernelError::WrongSize { expected: 512, found: 0, .. }), "{error}");
        wait_for_size(ABSENT, 511, Duration::ZERO).unwrap();
    }
}
