//! The destination's container: restored from images, then guarded by the lease.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::guarded::Guarded;
use super::{
    MOUNT_LIMIT, RESTORE_LIMIT, Runtimes, check_rootfs, failed, id, known_type, open_network, remove_file, remove_tree,
    source_owner,
};
use crate::clock;
use crate::container::{Bundle, Cgroup, ContainerId, NetDrop, RestoreSpec};
use crate::device::{DeviceSlot, Via, mount, mounts_of};
use crate::error::{Failure, Outcome};
use crate::migration::record::DestinationContainer;
use crate::units::{BootTime, Epoch};

/// The destination's container: restored from images, then guarded by the lease.
pub struct DestinationHold {
    disk: String,
    epoch: Epoch,
    runtimes: Runtimes,
    device: Arc<DeviceSlot>,
    container: Option<DestinationContainer>,
    places: Places,
    /// The container has been restored whole: its network follows its freezing and thawing.
    open: AtomicBool,
    guard: Guarded,
}

/// The directories of one disk on a destination.
#[derive(Clone, Debug)]
pub struct Places {
    /// Where this disk's files are.
    pub state: PathBuf,
    /// The file that is shared with the container's guard.
    pub lease: PathBuf,
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

    /// The file that says that a container was restored from them.
    fn used(&self) -> PathBuf {
        self.state.join("images.used")
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
        let guard = Guarded::new(places.lease.clone(), places.state.join("guard.log"));
        let open = AtomicBool::new(false);
        Self { disk: disk.into(), epoch, runtimes, device, container, places, open, guard }
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
        remove_file(&self.places.used()).await?;
        runtime.probe(self.places.state.join("probe")).await.map_err(|error| failed(&error))?;
        if let Some(drop) = self.net_drop()? {
            drop.install().await.map_err(|error| failed(&error))?;
        }
        Ok(())
    }

    /// The disk attached and mounted, the container restored, its network open. A failure leaves the container gone.
    pub async fn resume(&self) -> Outcome<()> {
        let Some(container) = &self.container else { return Ok(()) };
        self.start(container, Some(self.places.images())).await?;
        remove_tree(&self.places.images()).await
    }

    /// After a restart of this host: the container is started anew, from what is on its disk.
    pub async fn cold_start(&self) -> Outcome<()> {
        let Some(container) = &self.container else { return Ok(()) };
        self.start(container, None).await?;
        tracing::info!(disk = self.disk, container = container.id, "started anew from its disk");
        Ok(())
    }

    /// From here on the memory in the images may be older than the disk, whatever becomes of this host: they are used once.
    async fn use_images(&self) -> Outcome<()> {
        let used = self.places.used();
        if used.exists() {
            return Err(Failure::refused(
                "the checkpoint was used here before, and what ran from it may have written to the disk since: it cannot be \
                 used again",
            ));
        }
        tokio::task::spawn_blocking(move || {
            crate::files::write_atomically(
                &used,
                b"a container was restored from the images; they are not used again\n",
            )
            .map_err(|error| Failure::failed(format!("cannot write {}: {error}", used.display())))
        })
        .await
        .map_err(|error| Failure::failed(format!("cannot use the checkpoint: {error}")))?
    }

    /// From its images, or anew.
    async fn start(&self, container: &DestinationContainer, images: Option<PathBuf>) -> Outcome<()> {
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
        if images.is_none() && runtime.inspect(&id).await.is_ok_and(|found| found.pid.is_none()) {
            // Only the name of the one that was here is left.
            runtime.kill_and_delete(&id).await.map_err(|error| failed(&error))?;
        }
        let spec = RestoreSpec {
            bundle,
            image_dir: images,
            work_dir: self.places.state.join("restore"),
            state_dir: self.places.state.join("bundle"),
            cgroup: self.cgroup(&id)?,
            tcp_established: container.tcp_established,
            limit: RESTORE_LIMIT,
        };
        if spec.image_dir.is_some() {
            self.use_images().await?;
        }
        // Before there is anything to guard: a task that runs for a moment only must be stopped as well.
        self.guard.begin(&spec.cgroup).await?;
        runtime.restore(&id, spec).await.map_err(|error| failed(&error))?;
        told("it runs");
        if let Some(drop) = self.net_drop()? {
            // A container that comes back finds the rule of its own departure.
            let departed = NetDrop::new(drop.netns(), &source_owner(&self.disk));
            open_network(&drop, Some(&departed)).await?;
        }
        self.open.store(true, Ordering::SeqCst);
        told("network open");
        Ok(())
    }

    /// Whether the container has outlived this host's node. The runtime is not asked: it takes its time while tasks wait
    /// for their disk. A restore that was under way does not count; the source asks for it again.
    pub fn outlived(&self) -> bool {
        let Some(container) = &self.container else { return false };
        let group = id(&container.id).and_then(|id| self.cgroup(&id));
        let lives = group.is_ok_and(|group| group.is_populated().unwrap_or(false)) && !self.has_images();
        self.open.store(lives, Ordering::SeqCst);
        lives
    }

    /// A guard for the container that outlived the node.
    pub async fn guard_again(&self) {
        let Some(container) = &self.container else { return };
        let Ok(cgroup) = id(&container.id).and_then(|id| self.cgroup(&id)) else { return };
        if let Err(failure) = self.guard.begin(&cgroup).await {
            tracing::error!(disk = self.disk, %failure, "the container is not guarded");
        }
    }

    /// Until when the container may run, for its guard; `None`: without end.
    pub fn set_deadline(&self, deadline: Option<BootTime>) {
        self.guard.set_deadline(deadline);
    }

    /// Looks after the guard; whether the container may have been frozen by it although the lease holds.
    pub async fn look_after_guard(&self) -> bool {
        let Some(container) = &self.container else { return false };
        let Ok(cgroup) = id(&container.id).and_then(|id| self.cgroup(&id)) else { return false };
        self.guard.look(&cgroup).await.unwrap_or_else(|failure| {
            tracing::error!(disk = self.disk, %failure, "the container is not guarded");
            false
        })
    }

    /// Whether the checkpoint is still here: it goes when the container has been restored from it.
    pub fn has_images(&self) -> bool {
        self.places.images().exists()
    }

    /// Stops the tasks by the cgroup alone: tasks that wait for the stalled disk stop when it answers. Then nothing goes in
    /// or out any more: the kernel would acknowledge for the tasks what they may never get.
    pub async fn freeze(&self) {
        self.set_frozen(true);
        if self.open.load(Ordering::SeqCst) {
            self.network("close", async |drop| drop.install().await).await;
        }
    }

    /// Lets the tasks go on, unless the lease has ended while this was being done: the guard has frozen them then, and they
    /// are thawed after a renewal.
    pub async fn thaw(&self) {
        if self.open.load(Ordering::SeqCst) {
            self.network("open", async |drop| drop.remove().await).await;
        }
        if !self.guard.is_over(clock::now()) {
            self.set_frozen(false);
        }
    }

    /// A container that runs has its network, and another must not get it.
    async fn network(&self, what: &str, act: impl AsyncFnOnce(NetDrop) -> Result<(), crate::container::Error>) {
        let acted = match self.net_drop() {
            Ok(Some(drop)) => act(drop).await.map_err(|error| failed(&error)),
            Ok(None) => Ok(()),
            Err(failure) => Err(failure),
        };
        if let Err(failure) = acted {
            tracing::error!(disk = self.disk, %failure, "cannot {what} the container's network");
        }
    }

    /// Container, mount, device and network rule go; what was written stays in the store.
    pub async fn tear_down(&self) -> Outcome<()> {
        if self.places.used().exists() {
            self.silence().await;
        }
        // The tasks first, whatever they wait for; then what they wait for, for what was not written is given up with the
        // disk. So they are gone when the runtime looks.
        let killed = self.container.as_ref().map_or(Ok(()), |container| {
            let group = id(&container.id).and_then(|id| self.cgroup(&id))?;
            group.kill().map_err(|error| failed(&error))
        });
        let mounts = self.device.device().map_or(Ok(Vec::new()), |device| mounts_of(&device));
        let mut outcome = killed.and(self.device.abandon().await);
        if let Some(container) = &self.container {
            outcome = outcome.and(self.remove_container(container).await);
        }
        for mount in mounts.map_err(|error| failed(&error))? {
            outcome = outcome.and(mount::umount(&mount, MOUNT_LIMIT).await.map_err(|error| failed(&error)));
        }
        outcome.and(remove_tree(&self.places.images()).await)
    }

    /// A container that ran here has gone to where it came from, with its address: nothing here may still speak for that, not
    /// even the sockets of tasks that are killed. So its packets stay dropped until the disk is removed or comes again.
    async fn silence(&self) {
        self.network("close", async |drop| {
            drop.install().await?;
            drop.end_connections().await
        })
        .await;
    }

    /// The network of a container that has gone is open again: the operator forgets the disk.
    pub async fn open_network(&self) -> Outcome<()> {
        match self.net_drop()? {
            Some(drop) if drop.netns().exists() => drop.remove().await.map_err(|error| failed(&error)),
            _ => Ok(()),
        }
    }

    async fn remove_container(&self, container: &DestinationContainer) -> Outcome<()> {
        let (runtime, id) = (self.runtimes.find(&container.runtime)?, id(&container.id)?);
        runtime.kill_and_delete(&id).await.map_err(|error| failed(&error))?;
        self.guard.end();
        if self.places.used().exists() { Ok(()) } else { self.open_network().await }
    }

    /// Nobody is asked: a restore makes the container in this group or not at all, and a lease does not wait.
    pub fn set_frozen(&self, frozen: bool) {
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
