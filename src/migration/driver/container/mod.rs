//! The container's side of a migration, on either host: what is frozen, thawed, restored, removed.
//!
//! Everything here may be repeated: a step that is done already is done. The destination runs only what its own
//! operator configured: runtimes, and the directories of bundles and mounts; nothing of that comes over the link.

mod destination;
mod guarded;
mod kept;
mod precopy;
mod source;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

pub use destination::{DestinationHold, Places};
pub use source::{Found, SourceHold};

use crate::container::{Bundle, ContainerId, NetDrop, Runtime, announce};
use crate::device::{DeviceSlot, Via, mount, mounts_of};
use crate::error::{Failure, Outcome, chain};

/// How long a restore may take before it is undone and the source goes on.
const RESTORE_LIMIT: Duration = Duration::from_secs(120);

/// How long a mount or an unmount may take; a lazily filled disk answers late.
const MOUNT_LIMIT: Duration = Duration::from_secs(30);

/// The runtimes that this host's operator allows, by name.
#[derive(Clone, Debug, Default)]
pub struct Runtimes(BTreeMap<String, Arc<dyn Runtime>>);

impl Runtimes {
    /// By name.
    pub fn new(runtimes: BTreeMap<String, Arc<dyn Runtime>>) -> Self {
        Self(runtimes)
    }

    /// The runtime of that name.
    pub fn find(&self, name: &str) -> Outcome<Arc<dyn Runtime>> {
        self.0.get(name).cloned().ok_or_else(|| {
            Failure::refused(format!(
                "no runtime '{name}' is configured on this host; start its node with --runtime {name}"
            ))
        })
    }
}

/// Whose rule it is that closes the network of a container that has gone.
fn source_owner(disk: &str) -> String {
    format!("{disk}-source")
}

fn failed(error: &dyn std::error::Error) -> Failure {
    Failure::failed(chain(error))
}

fn id(text: &str) -> Outcome<ContainerId> {
    ContainerId::new(text).map_err(Failure::usage)
}

/// The file system's type, when its first block tells: mount(8) would look for signatures all over the disk, and each
/// look is a block that has to come from the source while the container waits. The first block is there since the attach.
async fn known_type(device: PathBuf) -> Outcome<Option<&'static str>> {
    use std::os::unix::fs::FileExt;
    let read = tokio::task::spawn_blocking(move || {
        let mut block = [0; 4096];
        std::fs::File::open(&device)?.read_exact_at(&mut block, 0).map(|()| type_of(&block))
    });
    match tokio::time::timeout(MOUNT_LIMIT, read).await {
        Ok(Ok(found)) => found.map_err(|error| Failure::failed(format!("cannot read the disk's first block: {error}"))),
        Ok(Err(error)) => Err(Failure::failed(format!("cannot read the disk's first block: {error}"))),
        Err(_) => Err(Failure::failed("the disk does not answer; see whether its source can be reached")),
    }
}

/// Lets packets pass again, and tells the network where the container's addresses are now.
async fn open_network(drop: &NetDrop, other: Option<&NetDrop>) -> Outcome<()> {
    drop.remove_with(other).await.map_err(|error| failed(&error))?;
    if drop.netns().exists()
        && let Err(error) = announce(drop.netns()).await
    {
        // It is found as soon as it says something itself.
        tracing::warn!(error = chain(&error), "the network was not told where the container is now");
    }
    Ok(())
}

/// The network of a container that has gone is open again: the operator forgets the disk.
async fn forget_rule(drop: Option<NetDrop>) -> Outcome<()> {
    match drop {
        Some(drop) if drop.netns().exists() => drop.remove().await.map_err(|error| failed(&error)),
        _ => Ok(()),
    }
}

/// Attaches the disk and mounts it there, as far as that is not so already.
async fn attach_mounted(slot: &DeviceSlot, mount_point: &Path) -> Outcome<()> {
    let device = slot.attach(Via::Auto, None).await?;
    if mounts_of(&device).map_err(|error| failed(&error))?.iter().any(|mount| mount == mount_point) {
        return Ok(());
    }
    let fstype = known_type(device.clone()).await?;
    mount::mount(&device, mount_point, fstype, &[], MOUNT_LIMIT).await.map_err(|error| failed(&error))
}

/// By the magic numbers of the two file systems that containers live on; another is left to mount(8).
fn type_of(block: &[u8; 4096]) -> Option<&'static str> {
    match (&block[..4], &block[0x438..0x43a]) {
        (b"XFSB", _) => Some("xfs"),
        // ext2, ext3 and ext4 share it, and their driver.
        (_, [0x53, 0xef]) => Some("ext4"),
        _ => None,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Looks for the root on the mounted disk. Not on one of the runtime's own threads: the lookup waits for blocks, which
/// this very process has to serve and to fetch.
async fn check_rootfs(bundle: Bundle, mount_point: PathBuf) -> Outcome<()> {
    let look = tokio::task::spawn_blocking(move || bundle.check_rootfs_present(&mount_point));
    match tokio::time::timeout(MOUNT_LIMIT, look).await {
        Ok(Ok(found)) => found.map_err(|error| failed(&error)),
        Ok(Err(error)) => Err(Failure::failed(format!("cannot look for the container's root: {error}"))),
        Err(_) => Err(Failure::failed(format!(
            "the container's root was not found within {} s: the disk does not answer; see whether its source can be \
             reached",
            MOUNT_LIMIT.as_secs()
        ))),
    }
}

/// Everything that is mounted from the device is unmounted, the innermost first.
async fn unmount(device: &DeviceSlot) -> Outcome<()> {
    let Some(device) = device.device() else { return Ok(()) };
    for mount in mounts_of(&device).map_err(|error| failed(&error))?.iter().rev() {
        mount::umount(mount, MOUNT_LIMIT).await.map_err(|error| failed(&error))?;
    }
    Ok(())
}

/// Removes a file of ours; one that is not there is removed.
async fn remove_file(path: &Path) -> Outcome<()> {
    match tokio::fs::remove_file(path).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::failed(format!("cannot remove {}: {error}", path.display())))
        }
        _ => Ok(()),
    }
}

/// Gives a file or directory of ours another name beside the old one, durably.
async fn rename(from: PathBuf, to: PathBuf) -> Outcome<()> {
    let failed = format!("cannot rename {} to {}", from.display(), to.display());
    tokio::task::spawn_blocking(move || std::fs::rename(&from, &to).and_then(|()| crate::files::sync_parent(&to)))
        .await
        .map_err(|error| Failure::failed(format!("{failed}: {error}")))?
        .map_err(|error| Failure::failed(format!("{failed}: {error}")))
}

/// Makes everything below a directory durable.
fn sync_tree(directory: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => sync_tree(&entry.path())?,
            kind if kind.is_file() => std::fs::File::open(entry.path())?.sync_all()?,
            // criu leaves links to descriptors there while it works; they hold nothing. Links between the rounds of a
            // pre-dump are durable with their directories.
            _ => {}
        }
    }
    std::fs::File::open(directory)?.sync_all()
}

/// Removes a directory of ours; one that is not there is removed.
async fn remove_tree(path: &Path) -> Outcome<()> {
    match tokio::fs::remove_dir_all(path).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Failure::failed(format!("cannot remove {}: {error}", path.display())))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_is_known_by_its_first_block() {
        let mut block = [0; 4096];
        assert_eq!(type_of(&block), None);
        block[0x438..0x43a].copy_from_slice(&0xef53_u16.to_le_bytes());
        assert_eq!(type_of(&block), Some("ext4"));
        block[..4].copy_from_slice(b"XFSB");
        assert_eq!(type_of(&block), Some("xfs"));
    }
}
