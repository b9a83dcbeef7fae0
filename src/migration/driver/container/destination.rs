//! The destination's container: restored from images, then guarded by the lease.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tokio::sync::OnceCell;

use super::guarded::Guarded;
use super::{
    MOUNT_LIMIT, RESTORE_LIMIT, Runtimes, attach_mounted, check_rootfs, failed, forget_rule, id, open_network,
    remove_tree, rename, source_owner,
};
use crate::clock;
use crate::container::{Bundle, Cgroup, ContainerId, Error, Inspected, NetDrop, RestoreSpec};
use crate::device::{DeviceSlot, mount, mounts_of};
use crate::error::{Failure, Outcome, chain};
use crate::migration::driver::ContainerState;
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
    /// The container's network namespace, once its runtime was asked: a fence does not wait for that.
    netns: OnceCell<Option<PathBuf>>,
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

    /// The checkpoint while a container is being restored from it: the memory in it may be older than the disk from now on,
    /// whatever becomes of this host, so it is not used again.
    fn restoring(&self) -> PathBuf {
        self.state.join("images.restoring")
    }

    /// The checkpoint when the container runs, on its way out.
    fn done(&self) -> PathBuf {
        self.state.join("images.done")
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
        Self { disk: disk.into(), epoch, runtimes, device, container, places, netns: OnceCell::new(), open, guard }
    }

    /// Whether everything for the container is there; its network is closed until it runs.
    pub async fn prepare(&self) -> Outcome<()> {
        let Some(container) = &self.container else { return Ok(()) };
        let runtime = self.runtimes.find(&container.runtime)?;
        let id = id(&container.id)?;
        let bundle = self.bundle(container).await?;
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
        runtime.probe(self.places.state.join("probe")).await.map_err(|error| failed(&error))?;
        if let Some(drop) = self.net_drop().await? {
            drop.install().await.map_err(|error| failed(&error))?;
        }
        Ok(())
    }

    /// The disk attached and mounted, the container restored, its network open. A failure leaves the container gone.
    pub async fn resume(&self) -> Outcome<()> {
        let Some(container) = &self.container else { return Ok(()) };
        self.start(container, Some(self.places.restoring())).await?;
        remove_tree(&self.places.done()).await
    }

    /// After a restart of this host: the container is started anew, from what is on its disk.
    pub async fn cold_start(&self) -> Outcome<()> {
        let Some(container) = &self.container else { return Ok(()) };
        if self.places.restoring().exists() {
            // What is started now is no restore that broke off.
            rename(self.places.restoring(), self.places.done()).await?;
            remove_tree(&self.places.done()).await?;
        }
        self.start(container, None).await?;
        tracing::info!(disk = self.disk, container = container.id, "started anew from its disk");
        Ok(())
    }

    /// Takes the images, once and for all.
    async fn use_images(&self) -> Outcome<()> {
        if !self.places.images().exists() {
            return Err(Failure::refused(
                "the checkpoint is not here: it never came, or was used before, and what ran from it may have written to \
                 the disk since",
            ));
        }
        rename(self.places.images(), self.places.restoring()).await
    }

    /// From its images, or anew.
    async fn start(&self, container: &DestinationContainer, images: Option<PathBuf>) -> Outcome<()> {
        let runtime = self.runtimes.find(&container.runtime)?;
        let id = id(&container.id)?;
        let bundle = self.bundle(container).await?;
        let mount_point = self.mount_point()?;
        let begun = Instant::now();
        let told = |what| tracing::info!(disk = self.disk, elapsed_ms = begun.elapsed().as_millis(), "{what}");
        attach_mounted(&self.device, &mount_point).await?;
        told("mounted");
        check_rootfs(bundle.clone(), mount_point).await?;
        told("the root is there");
        if images.is_none()
            && let Ok(found) = runtime.inspect(&id).await
            && found.pid.is_none()
            && self.is_of_this_disk(&found)
        {
            // Only the name of the one that was here is left.
            runtime.kill_and_delete(&id).await.map_err(|error| failed(&error))?;
        }
        let restoring = images.is_some();
        let spec = RestoreSpec {
            bundle,
            image_dir: images,
            work_dir: self.places.state.join("restore"),
            state_dir: self.places.state.join("bundle"),
            cgroup: self.cgroup(&id)?,
            tcp_established: container.tcp_established,
            limit: RESTORE_LIMIT,
        };
        if restoring {
            self.use_images().await?;
        }
        // Before there is anything to guard: a task that runs for a moment only must be stopped as well.
        self.guard.begin(&spec.cgroup).await?;
        runtime.restore(&id, spec).await.map_err(|error| failed(&error))?;
        told("it runs");
        if restoring {
            // Before it is heard of: what runs from here on is not an attempt that broke off.
            rename(self.places.restoring(), self.places.done()).await?;
        }
        if let Some(drop) = self.net_drop().await? {
            // A container that comes back finds the rule of its own departure.
            let departed = NetDrop::new(drop.netns(), &source_owner(&self.disk));
            open_network(&drop, Some(&departed)).await?;
        }
        self.open.store(true, Ordering::SeqCst);
        told("network open");
        Ok(())
    }

    /// What has become of the container when this host's node starts. The runtime is not asked: it takes its time while
    /// tasks wait for their disk. A restore that broke off with the node is given up.
    pub fn found(&self) -> ContainerState {
        let Some(container) = &self.container else { return ContainerState::None };
        if self.places.images().exists() {
            return ContainerState::Awaited;
        }
        let Ok(cgroup) = id(&container.id).and_then(|id| self.cgroup(&id)) else { return ContainerState::Gone };
        if self.places.restoring().exists() {
            if let Err(error) = cgroup.kill() {
                tracing::error!(disk = self.disk, error = chain(&error), "what a restore left cannot be ended");
            }
            return ContainerState::Gone;
        }
        let lives = cgroup.is_populated().unwrap_or(false);
        self.open.store(lives, Ordering::SeqCst);
        if lives { ContainerState::Running } else { ContainerState::Gone }
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
    async fn network(&self, what: &str, act: impl AsyncFnOnce(NetDrop) -> Result<(), Error>) {
        let acted = match self.net_drop().await {
            Ok(Some(drop)) => act(drop).await.map_err(|error| failed(&error)),
            Ok(None) => Ok(()),
            Err(failure) => Err(failure),
        };
        if let Err(failure) = acted {
            tracing::error!(disk = self.disk, %failure, "cannot {what} the container's network");
        }
    }

    /// Container, mount and device go; what was written stays in the store. Where the disk was `owned`, the network rule
    /// stays too.
    pub async fn tear_down(&self, owned: bool) -> Outcome<()> {
        if owned {
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
        if !owned {
            outcome = outcome.and(self.open_network().await);
        }
        for mount in mounts.map_err(|error| failed(&error))? {
            outcome = outcome.and(mount::umount(&mount, MOUNT_LIMIT).await.map_err(|error| failed(&error)));
        }
        for images in [self.places.images(), self.places.restoring(), self.places.done()] {
            outcome = outcome.and(remove_tree(&images).await);
        }
        outcome
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
        forget_rule(self.net_drop().await?).await
    }

    async fn remove_container(&self, container: &DestinationContainer) -> Outcome<()> {
        let (runtime, id) = (self.runtimes.find(&container.runtime)?, id(&container.id)?);
        let removed = match runtime.inspect(&id).await {
            Ok(found) if !self.is_of_this_disk(&found) => Ok(()),
            // The runtime may have begun to make one.
            Ok(_) | Err(Error::NoSuchContainer { .. }) => runtime.kill_and_delete(&id).await,
            Err(error) => Err(error),
        };
        removed.map_err(|error| failed(&error))?;
        self.guard.end();
        Ok(())
    }

    /// Whether a container of the name is the one that came with this disk: it runs from the bundle that was derived here.
    /// Another is somebody else's, and is not touched.
    fn is_of_this_disk(&self, found: &Inspected) -> bool {
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        real(&found.bundle).starts_with(real(&self.places.state))
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

    async fn bundle(&self, container: &DestinationContainer) -> Outcome<Bundle> {
        let (runtime, id) = (self.runtimes.find(&container.runtime)?, id(&container.id)?);
        let dir = self.places.bundles.as_ref().map(|bundles| bundles.join(&container.id));
        runtime.bundle(&id, dir).await.map_err(|error| match error {
            Error::NoBundleDir => Failure::refused(error),
            other => failed(&other),
        })
    }

    fn mount_point(&self) -> Outcome<PathBuf> {
        match &self.places.mounts {
            Some(mounts) => Ok(mounts.join(&self.disk)),
            None => Err(Failure::refused("this host mounts no disks; start its node with --mount-dir")),
        }
    }

    async fn net_drop(&self) -> Outcome<Option<NetDrop>> {
        let Some(container) = &self.container else { return Ok(None) };
        let netns = self.netns.get_or_try_init(|| async { Ok::<_, Failure>(self.bundle(container).await?.netns()) });
        Ok(netns.await?.as_ref().map(|netns| NetDrop::new(netns, &format!("{}-destination", self.disk))))
    }
}
