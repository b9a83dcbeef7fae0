//! The container's side of a migration, on either host: what is frozen, thawed, restored, removed.
//!
//! Everything here may be repeated: a step that is done already is done. The destination runs only what its own
//! operator configured: runtimes, and the directories of bundles and mounts; nothing of that comes over the link.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::container::{Bundle, Cgroup, ContainerId, NetDrop, RestoreSpec, Runtime, announce, quiesce};
use crate::device::{DeviceSlot, Via, mount, mounts_of};
use crate::error::{Failure, Outcome, chain};
use crate::migration::record::{DestinationContainer, SourceContainer};
use crate::units::Epoch;

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

/// A container that may move, as it was found.
pub struct Found {
    /// What runs it.
    pub runtime: Arc<dyn Runtime>,
    /// Its id.
    pub id: ContainerId,
    /// Its control group: says whether it stands still without anybody being asked.
    pub cgroup: Cgroup,
    /// What is recorded of it.
    pub record: SourceContainer,
}

/// The source's container: frozen until release or rollback.
pub struct SourceHold {
    owner: String,
    runtimes: Runtimes,
    device: Arc<DeviceSlot>,
    container: Mutex<Option<SourceContainer>>,
    /// Its control group, unless the node was restarted since: the shortest way to a thaw.
    cgroup: Mutex<Option<Cgroup>>,
    images: PathBuf,
}

impl SourceHold {
    /// Of a disk; `container` is what the journal knows after a restart; `images` is the checkpoint's directory.
    pub fn new(
        disk: &str,
        runtimes: Runtimes,
        device: Arc<DeviceSlot>,
        container: Option<SourceContainer>,
        images: PathBuf,
    ) -> Self {
        let container = Mutex::new(container);
        Self { owner: source_owner(disk), runtimes, device, container, cgroup: Mutex::default(), images }
    }

    /// Where the checkpoint's images are; kept until release.
    pub fn images(&self) -> &Path {
        &self.images
    }

    /// Where criu keeps its log meanwhile.
    pub fn work(&self) -> PathBuf {
        self.images.with_extension("work")
    }

    /// Looks at a container that is to move: it must run, with the disk's device mounted under it.
    pub async fn inspect(&self, container: &str, runtime: &str, tcp_established: bool) -> Outcome<Found> {
        let (name, id, runtime) = (runtime, id(container)?, self.runtimes.find(runtime)?);
        let found = runtime.inspect(&id).await.map_err(|error| failed(&error))?;
        let Some(cgroup) = found.cgroup else {
            return Err(Failure::refused(format!("container {id} is {}; only a running one can move", found.status)));
        };
        let Some(device) = self.device.device() else {
            return Err(Failure::refused(format!(
                "the disk of container {id} is not attached by this node; use `lazy-migrate attach`, and run it from there"
            )));
        };
        let mounts = mounts_of(&device).map_err(|error| failed(&error))?;
        let Some(mount) = mounts.iter().find(|mount| found.rootfs.starts_with(mount)) else {
            return Err(Failure::refused(format!(
                "the root {} of container {id} does not lie on {}, which is this disk; name the disk that holds it",
                found.rootfs.display(),
                device.display()
            )));
        };
        let record = SourceContainer {
            id: container.into(),
            runtime: name.into(),
            mount: mount.clone(),
            netns: found.netns.clone(),
            tcp_established,
        };
        Ok(Found { runtime, id, cgroup, record })
    }

    /// From now on a thaw or a release is about this container.
    pub fn hold(&self, found: &Found) {
        *lock(&self.container) = Some(found.record.clone());
        *lock(&self.cgroup) = Some(found.cgroup.clone());
    }

    /// Packets dropped, then all tasks stopped.
    pub async fn freeze(&self, runtime: &dyn Runtime, id: &ContainerId) -> Outcome<()> {
        if let Some(drop) = self.held().and_then(|container| self.net_drop(&container)) {
            drop.install().await.map_err(|error| failed(&error))?;
        }
        runtime.freeze(id).await.map_err(|error| failed(&error))
    }

    /// Everything goes on as if nothing had been. The tasks first: clients wait for them. What arrives before they run
    /// waits in their sockets.
    pub async fn thaw(&self) -> Outcome<()> {
        let Some(container) = self.held() else { return Ok(()) };
        let runtime = self.runtimes.find(&container.runtime)?;
        let id = id(&container.id)?;
        let thawed = quiesce::thaw(&container.mount).await.map_err(|error| failed(&error));
        let cgroup = lock(&self.cgroup).take();
        if let Some(Err(error)) = cgroup.map(|cgroup| cgroup.set_frozen(false)) {
            tracing::debug!(error = chain(&error), "the runtime has to thaw the container");
        }
        let open = async {
            match self.net_drop(&container) {
                Some(drop) => open_network(&drop, None).await,
                None => Ok(()),
            }
        };
        let (opened, resumed) = tokio::join!(open, runtime.thaw(&id));
        // Each was tried, whatever became of the others.
        thawed.and(resumed.map_err(|error| failed(&error))).and(opened)?;
        *lock(&self.container) = None;
        self.remove_images().await
    }

    /// The container, its mount, its device and its images go; the disk itself stays.
    pub async fn release(&self) -> Outcome<()> {
        if let Some(container) = self.held() {
            let runtime = self.runtimes.find(&container.runtime)?;
            if let Some(drop) = self.net_drop(&container)
                && let Err(error) = drop.end_connections().await
            {
                tracing::warn!(error = chain(&error), "the departed container's connections were not ended");
            }
            // And its network stays closed: nothing may still speak for the address that has moved.
            runtime.kill_and_delete(&id(&container.id)?).await.map_err(|error| failed(&error))?;
            quiesce::thaw(&container.mount).await.map_err(|error| failed(&error))?;
            unmount(&self.device).await?;
            // There is nothing to write: the disk is immutable since the handover.
            self.device.abandon().await?;
            *lock(&self.container) = None;
        }
        self.remove_images().await
    }

    async fn remove_images(&self) -> Outcome<()> {
        remove_tree(&self.images).await?;
        remove_tree(&self.work()).await
    }

    fn net_drop(&self, container: &SourceContainer) -> Option<NetDrop> {
        container.netns.as_ref().map(|netns| NetDrop::new(netns, &self.owner))
    }

    /// The network of a released container is open again: the operator forgets the disk.
    pub async fn open_network(&self, container: &SourceContainer) -> Outcome<()> {
        match self.net_drop(container) {
            Some(drop) if drop.netns().exists() => drop.remove().await.map_err(|error| failed(&error)),
            _ => Ok(()),
        }
    }

    fn held(&self) -> Option<SourceContainer> {
        lock(&self.container).clone()
    }
}

/// The destination's container: restored from images, then guarded by the lease.
pub struct DestinationHold {
    disk: String,
    epoch: Epoch,
    runtimes: Runtimes,
    device: Arc<DeviceSlot>,
    container: Option<DestinationContainer>,
    places: Places,
}

/// The directories of one disk on a destination.
#[derive(Clone, Debug)]
pub struct Places {
    /// Where this disk's files are.
    pub state: PathBuf,
    /// Where the operator keeps bundles, one directory a container.
    pub bundles: Option<PathBuf>,
    /// Where disks are mounted, one directory a disk.
    pub mounts: Option<PathBuf>,
}

impl Places {
    /// The received checkpoint.
    pub fn images(&self) -> PathBuf {
        self.state.join("images")
    }
}

impl DestinationHold {
    /// Of a disk that comes to this host.
    pub fn new(
        disk: &str,
        epoch: Epoch,
        runtimes: Runtimes,
        device: Arc<DeviceSlot>,
        container: Option<DestinationContainer>,
        places: Places,
    ) -> Self {
        Self { disk: disk.into(), epoch, runtimes, device, container, places }
    }

    /// Whether everything for the container is there; its network is closed until it runs.
    pub async fn prepare(&self) -> Outcome<()> {
        let Some(container) = &self.container else { return Ok(()) };
        let runtime = self.runtimes.find(&container.runtime)?;
        let id = id(&container.id)?;
        let bundle = self.bundle(container)?;
        let mount = self.mount_point()?;
        bundle.check_rootfs_below(&mount).map_err(|error| failed(&error))?;
        tokio::fs::create_dir_all(&mount)
            .await
            .map_err(|error| Failure::failed(format!("cannot make the mount point {}: {error}", mount.display())))?;
        if let Ok(found) = runtime.inspect(&id).await {
            return Err(Failure::refused(format!(
                "a container {id} exists on this host already ({}); remove it first",
                found.status
            )));
        }
        remove_tree(&self.places.images()).await?;
        runtime.probe(self.places.state.join("probe")).await.map_err(|error| failed(&error))?;
        if let Some(drop) = self.net_drop()? {
            drop.install().await.map_err(|error| failed(&error))?;
        }
        Ok(())
    }

    /// The disk attached and mounted, the container restored, its network open. A failure leaves the container gone.
    pub async fn resume(&self) -> Outcome<()> {
        let Some(container) = &self.container else { return Ok(()) };
        let runtime = self.runtimes.find(&container.runtime)?;
        let id = id(&container.id)?;
        let bundle = self.bundle(container)?;
        let mount_point = self.mount_point()?;
        let begun = Instant::now();
        let told = |what| tracing::info!(disk = self.disk, elapsed_ms = begun.elapsed().as_millis(), "{what}");
        let device = self.device.attach(Via::Auto, None).await?;
        told("attached");
        let mounted = mounts_of(&device).map_err(|error| failed(&error))?;
        if !mounted.contains(&mount_point) {
            let fstype = known_type(device.clone()).await?;
            mount::mount(&device, &mount_point, fstype, &[], MOUNT_LIMIT).await.map_err(|error| failed(&error))?;
        }
        told("mounted");
        check_rootfs(bundle.clone(), mount_point).await?;
        told("the root is there");
        let spec = RestoreSpec {
            bundle,
            image_dir: self.places.images(),
            work_dir: self.places.state.join("restore"),
            state_dir: self.places.state.join("bundle"),
            cgroup: self.cgroup(&id)?,
            tcp_established: container.tcp_established,
            limit: RESTORE_LIMIT,
        };
        runtime.restore(&id, spec).await.map_err(|error| failed(&error))?;
        told("restored");
        if let Some(drop) = self.net_drop()? {
            // A container that comes back finds the rule of its own departure.
            let departed = NetDrop::new(drop.netns(), &source_owner(&self.disk));
            open_network(&drop, Some(&departed)).await?;
        }
        told("network open");
        remove_tree(&self.places.images()).await
    }

    /// Whether the container runs on this host.
    pub async fn is_running(&self) -> bool {
        let Some(container) = &self.container else { return false };
        let (Ok(runtime), Ok(id)) = (self.runtimes.find(&container.runtime), id(&container.id)) else { return false };
        runtime.inspect(&id).await.is_ok_and(|found| found.pid.is_some())
    }

    /// Stops the tasks by the cgroup alone: tasks that wait for the stalled disk stop when it answers.
    pub async fn freeze(&self) {
        self.set_frozen(true);
    }

    /// Lets the tasks go on.
    pub async fn thaw(&self) {
        self.set_frozen(false);
    }

    /// Container, mount, device and network rule go; what was written stays in the store.
    pub async fn tear_down(&self) -> Outcome<()> {
        let mut outcome = Ok(());
        if let Some(container) = &self.container {
            let (runtime, id) = (self.runtimes.find(&container.runtime)?, id(&container.id)?);
            outcome = runtime.kill_and_delete(&id).await.map_err(|error| failed(&error));
            if let Some(drop) = self.net_drop()? {
                outcome = outcome.and(drop.remove().await.map_err(|error| failed(&error)));
            }
        }
        // What was not written is given up with the disk; a device that still wants to write must not hang.
        let mounts = match self.device.device() {
            Some(device) => mounts_of(&device).map_err(|error| failed(&error))?,
            None => Vec::new(),
        };
        outcome = outcome.and(self.device.abandon().await);
        for mount in mounts {
            outcome = outcome.and(mount::umount(&mount, MOUNT_LIMIT).await.map_err(|error| failed(&error)));
        }
        outcome.and(remove_tree(&self.places.images()).await)
    }

    /// Nobody is asked: a restore makes the container in this group or not at all, and a lease does not wait.
    fn set_frozen(&self, frozen: bool) {
        let Some(container) = &self.container else { return };
        let set = id(&container.id).and_then(|id| self.cgroup(&id)).and_then(|cgroup| {
            // Nothing to freeze while nothing was restored.
            if cgroup.is_populated().map_err(|error| failed(&error))? {
                cgroup.set_frozen(frozen).map_err(|error| failed(&error))?;
            }
            Ok(())
        });
        if let Err(failure) = set {
            tracing::error!(disk = self.disk, frozen, %failure, "cannot freeze or thaw the container");
        }
    }

    fn cgroup(&self, id: &ContainerId) -> Outcome<Cgroup> {
        Cgroup::at(&format!("/lazy-migrate-{}-{}", id.as_str(), self.epoch)).map_err(|error| failed(&error))
    }

    fn bundle(&self, container: &DestinationContainer) -> Outcome<Bundle> {
        let Some(bundles) = &self.places.bundles else {
            return Err(Failure::refused(
                "this host takes no containers; start its node with --bundle-dir and --mount-dir",
            ));
        };
        Bundle::read(&bundles.join(&container.id)).map_err(|error| failed(&error))
    }

    fn mount_point(&self) -> Outcome<PathBuf> {
        match &self.places.mounts {
            Some(mounts) => Ok(mounts.join(&self.disk)),
            None => Err(Failure::refused("this host mounts no disks; start its node with --mount-dir")),
        }
    }

    fn net_drop(&self) -> Outcome<Option<NetDrop>> {
        let Some(container) = &self.container else { return Ok(None) };
        let netns = self.bundle(container)?.netns();
        Ok(netns.map(|netns| NetDrop::new(netns, &format!("{}-destination", self.disk))))
    }
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
