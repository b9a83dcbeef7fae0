//! The source's container: frozen until release or rollback.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::kept::Kept;
use super::precopy::PreDumps;
use super::{
    RESTORE_LIMIT, Runtimes, attach_mounted, failed, forget_rule, id, lock, open_network, source_owner, unmount,
};
use crate::container::{Bundle, Cgroup, ContainerId, Error, NetDrop, RestoreSpec, Runtime, quiesce};
use crate::device::{DeviceSlot, mounts_of};
use crate::error::{Failure, Outcome, chain};
use crate::export::LazyExport;
use crate::migration::record::SourceContainer;

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
    kept: Kept,
    pub(super) pre_dumps: PreDumps,
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
        let (owner, container, cgroup) = (source_owner(disk), Mutex::new(container), Mutex::default());
        let (kept, pre_dumps) = (Kept::new(images), PreDumps::default());
        Self { owner, runtimes, device, container, cgroup, kept, pre_dumps }
    }

    /// Where the checkpoint's images are, with all rounds before it; kept until release.
    pub fn images(&self) -> &Path {
        self.kept.images()
    }

    /// Where criu keeps its log meanwhile.
    pub fn work(&self) -> PathBuf {
        self.kept.work()
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
            bundle: Bundle::origin(&found.bundle),
        };
        Ok(Found { runtime, id, cgroup, record })
    }

    /// Nothing of an earlier checkpoint is left that could be taken for the one to come, or for a round before it.
    pub async fn begin(&self) -> Outcome<()> {
        self.kept.remove().await
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

    /// The checkpoint outlives a restart of this host from now on: then it is what a rollback brings back.
    pub async fn keep_images(&self) -> Outcome<()> {
        self.kept.keep().await
    }

    /// The frozen tasks are gone, with a restart of this host or by hand: the container comes back from its checkpoint, as it
    /// was frozen. Where that fails before it has come to life it may be tried again, until somebody writes to the disk.
    async fn restore(
        &self,
        runtime: &dyn Runtime,
        id: &ContainerId,
        container: &SourceContainer,
        disk: &LazyExport,
    ) -> Outcome<()> {
        let image = || disk.mark().unwrap_or_default();
        let told = |why| Failure::failed(format!("container {id} does not exist any more, and {why}"));
        self.kept.check(image()).map_err(told)?;
        let mut has_run = false;
        let Err(failure) = self.try_restore(runtime, id, container, &mut has_run).await else {
            tracing::info!(container = %id, "restored from the checkpoint that was kept");
            return Ok(());
        };
        if !has_run {
            // Then nobody of ours writes to the disk.
            let unmounted = unmount(&self.device).await;
            if let Err(failure) = unmounted.and(self.kept.tried(image()).await) {
                tracing::warn!(%failure, "after a restore that failed");
            }
        }
        Err(failure.context(format!(
            "container {id} was gone, and could not be brought back from its checkpoint in {}",
            self.images().display()
        )))
    }

    async fn try_restore(
        &self,
        runtime: &dyn Runtime,
        id: &ContainerId,
        container: &SourceContainer,
        has_run: &mut bool,
    ) -> Outcome<()> {
        attach_mounted(&self.device, &container.mount).await?;
        // Its tasks may have been killed while all was frozen.
        quiesce::thaw(&container.mount).await.map_err(|error| failed(&error))?;
        let bundle = runtime.bundle(id, Some(container.bundle.clone())).await.map_err(|error| failed(&error))?;
        let drop = self.net_drop(container);
        if let Some(drop) = &drop {
            drop.install().await.map_err(|error| failed(&error))?;
        }
        if runtime.inspect(id).await.is_ok() {
            // Only its name is left.
            runtime.kill_and_delete(id).await.map_err(|error| failed(&error))?;
        }
        if let Some(drop) = &drop {
            drop.outlast_the_dead().await.map_err(|error| failed(&error))?;
        }
        let spec = RestoreSpec {
            bundle,
            image_dir: Some(self.images().to_owned()),
            work_dir: self.work(),
            state_dir: self.images().with_extension("bundle"),
            cgroup: Cgroup::at(&format!("/lazy-migrate-{id}-back")).map_err(|error| failed(&error))?,
            tcp_established: container.tcp_established,
            limit: RESTORE_LIMIT,
        };
        self.kept.begin().await?;
        runtime.restore(id, spec).await.map(std::mem::drop).map_err(|error| {
            *has_run = error.may_have_run();
            failed(&error)
        })
    }

    /// Everything goes on as if nothing had been. The tasks first: clients wait for them. What arrives before they run
    /// waits in their sockets.
    pub async fn thaw(&self, disk: &LazyExport) -> Outcome<()> {
        let thawed = match self.held() {
            Some(container) => self.thaw_held(&container, disk).await,
            // It was never frozen, only dumped while it ran.
            None => {
                self.pre_dumps.end().await;
                Ok(())
            }
        };
        if thawed.is_err() {
            // Whoever likes may write to the disk from now on.
            if let Err(failure) = self.kept.left_alone(disk.mark().unwrap_or_default()).await {
                tracing::warn!(%failure, "after a container that does not go on");
            }
            return thawed;
        }
        *lock(&self.container) = None;
        // It runs, whatever is left of its images: a rest is in nobody's way.
        if let Err(failure) = self.kept.remove().await {
            tracing::warn!(%failure, "what was dumped of the container is left behind");
        }
        Ok(())
    }

    async fn thaw_held(&self, container: &SourceContainer, disk: &LazyExport) -> Outcome<()> {
        let runtime = self.runtimes.find(&container.runtime)?;
        let id = id(&container.id)?;
        // A live group answers at once; only without one the runtime is asked whether there is a container at all.
        let known = lock(&self.cgroup).as_ref().is_some_and(|cgroup| cgroup.is_populated().unwrap_or(false));
        let gone = !known
            && match runtime.inspect(&id).await {
                Ok(found) => found.pid.is_none(),
                Err(error) => matches!(error, Error::NoSuchContainer { .. }),
            };
        let open = async {
            match self.net_drop(container) {
                Some(drop) => open_network(&drop, None).await,
                None => Ok(()),
            }
        };
        if gone {
            self.restore(&*runtime, &id, container, disk).await?;
            return open.await;
        }
        let thawed = quiesce::thaw(&container.mount).await.map_err(|error| failed(&error));
        let cgroup = lock(&self.cgroup).take();
        let unfrozen = cgroup.map(|cgroup| cgroup.set_frozen(false));
        if let Some(Err(error)) = &unfrozen {
            tracing::debug!(error = chain(error), "the runtime has to thaw the container");
        }
        let (opened, resumed) = tokio::join!(open, runtime.thaw(&id));
        let runs = resumed.is_ok() || matches!(unfrozen, Some(Ok(())));
        // Each was tried, whatever became of the others.
        let outcome = thawed.and(resumed.map_err(|error| failed(&error))).and(opened);
        if outcome.is_err() && runs {
            self.kept.outlived().await?;
        }
        outcome
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
            runtime.release(&id(&container.id)?).await.map_err(|error| failed(&error))?;
            quiesce::thaw(&container.mount).await.map_err(|error| failed(&error))?;
            unmount(&self.device).await?;
            // There is nothing to write: the disk is immutable since the handover.
            self.device.abandon().await?;
            *lock(&self.container) = None;
        }
        self.kept.remove().await
    }

    fn net_drop(&self, container: &SourceContainer) -> Option<NetDrop> {
        container.netns.as_ref().map(|netns| NetDrop::new(netns, &self.owner))
    }

    /// The network of a released container is open again: the operator forgets the disk.
    pub async fn open_network(&self, container: &SourceContainer) -> Outcome<()> {
        forget_rule(self.net_drop(container)).await
    }

    fn held(&self) -> Option<SourceContainer> {
        lock(&self.container).clone()
    }
}
