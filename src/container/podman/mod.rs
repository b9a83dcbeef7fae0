//! podman, with runc below it, as a [`Runtime`].
//!
//! Containers are frozen and dumped by the OCI runtime, exactly as [`super::Runc`] does it: podman can neither dump a paused
//! container nor leave one paused. What podman is for is the rest: its records, its monitor (conmon), the mounts.
//!
//! On the destination the operator has made the container with `podman create`, and that is what a bundle is for runc: the
//! only description of it that counts, so that nothing comes over the link but memory. Podman starts it as it starts any
//! container, with a [`stand_in`] for the OCI runtime: that restores it where podman wants it made. So in the words of
//! [`Runtime`] a container is there while it has processes; one that has none is a bundle.

mod described;
mod left_behind;
mod settings;
pub(crate) mod stand_in;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::future::BoxFuture;
use tokio::time::Instant;

use self::{
    described::Described,
    settings::Settings,
    stand_in::{Desk, Order},
};
use super::{
    Bundle, Cgroup, CheckpointOptions, ContainerId, Error, Inspected, OciKind, POLL, RestoreSpec, Runc, Runtime,
    command::{Call, kill_tree, log_errors},
    leftovers, private_dir,
    state::{GONE_LIMIT, remove_old},
};

/// For questions, and for what podman does at once.
const QUICK: Duration = Duration::from_secs(30);
/// How long podman may take to end a container: it waits for its monitor, and for others that use its store.
const END_LIMIT: Duration = Duration::from_secs(60);

/// podman on this host, run by root.
#[derive(Clone, Debug)]
pub struct Podman {
    /// The program; a bare name is looked up in PATH.
    binary: PathBuf,
    /// What was learnt of live containers, so that a thaw does not wait for podman.
    known: Arc<Mutex<BTreeMap<ContainerId, Known>>>,
}

/// What stays true of a container while it lives.
#[derive(Clone, Debug)]
struct Known {
    found: Described,
    full: ContainerId,
    oci: Runc,
    cgroup: Cgroup,
    /// Why it cannot move, if it cannot.
    obstacle: Option<String>,
}

impl Podman {
    /// By that program.
    pub fn new(binary: PathBuf) -> Self {
        Self { binary, known: Arc::default() }
    }
}

impl Runtime for Podman {
    fn inspect<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<Inspected, Error>> {
        Box::pin(async move {
            let found = self.ask(id).await?.ok_or_else(|| no_such(id))?;
            self.look(id, &found).await
        })
    }

    fn freeze<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(async move {
            let known = self.live(id).await?;
            if let Some(why) = known.obstacle {
                return Err(Error::Podman { id: id.to_string(), why });
            }
            // Podman is not told: its record would have to be put right before a rollback is done.
            known.oci.freeze(&known.full).await.map_err(|error| named(error, id))
        })
    }

    fn thaw<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(async move {
            let known = self.live(id).await?;
            known.oci.thaw(&known.full).await.map_err(|error| named(error, id))
        })
    }

    fn is_frozen<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<bool, Error>> {
        Box::pin(async move { self.live(id).await?.cgroup.is_frozen() })
    }

    fn checkpoint<'a>(
        &'a self,
        id: &'a ContainerId,
        image_dir: PathBuf,
        work_dir: PathBuf,
        options: CheckpointOptions,
    ) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(async move {
            let known = self.live(id).await?;
            let dump = known.oci.checkpoint(&known.full, image_dir, work_dir, options);
            // At once, for the container waits; and a dump is not broken off.
            let (dumped, nothing_left) = tokio::join!(dump, self.check_left_behind(id, &known.found));
            nothing_left.and(dumped.map_err(|error| named(error, id)))
        })
    }

    fn restore<'a>(&'a self, id: &'a ContainerId, spec: RestoreSpec) -> BoxFuture<'a, Result<Inspected, Error>> {
        Box::pin(self.do_restore(id, spec))
    }

    fn kill_and_delete<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(async move {
            let Some(found) = self.ask(id).await? else { return Ok(()) };
            self.forget(id);
            self.end(id, &found).await
        })
    }

    fn release<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(self.do_release(id))
    }

    fn probe<'a>(&'a self, scratch: PathBuf) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(async move {
            self.call("ask for its version", QUICK).arg("--version").run_ok().await?;
            // A host without runc may have a crun that can do it.
            let crun = Runc { kind: OciKind::Crun, binary: "crun".into(), ..Runc::default() };
            let runc = Runc::default();
            let oci = if runc.check_build().await.is_err() && crun.check_build().await.is_ok() { crun } else { runc };
            oci.probe(scratch).await
        })
    }

    fn bundle<'a>(&'a self, id: &'a ContainerId, _: Option<PathBuf>) -> BoxFuture<'a, Result<Bundle, Error>> {
        Box::pin(async move {
            match self.remembered(id) {
                Some(known) => Ok(described(id, &known.found)),
                None => self.movable(id).await.map(|found| described(id, &found)),
            }
        })
    }
}

impl Podman {
    /// What podman knows of that name, if anything.
    async fn ask(&self, id: &ContainerId) -> Result<Option<Described>, Error> {
        let what = format!("look at container {id}");
        let said = self.call(&what, QUICK).args(["container", "inspect", id.as_str()]).run().await?;
        let program = self.binary.display().to_string();
        if said.success {
            return Described::read(&said.stdout, id).map_err(|why| Error::BadAnswer { program, what, why });
        }
        if said.stderr.contains("no such container") {
            return Ok(None);
        }
        Err(Error::Failed { program, what, status: said.status.clone(), detail: said.why() })
    }

    /// The same of one that is there and can move.
    async fn movable(&self, id: &ContainerId) -> Result<Described, Error> {
        let bad = |why: String| Error::Podman { id: id.to_string(), why };
        let found = self.ask(id).await?.ok_or_else(|| {
            bad(format!("podman knows none of that name on this host; make it here as on the source, with `podman create --name {id}`"))
        })?;
        match found.obstacle() {
            Some(why) => Err(bad(why)),
            None => Ok(found),
        }
    }

    /// What the OCI runtime and the kernel say of a live one, which is remembered.
    async fn look(&self, id: &ContainerId, found: &Described) -> Result<Inspected, Error> {
        let gone =
            || Error::NoSuchContainer { id: format!("{id} (podman has it as {}, not as live)", found.state.status) };
        found.pid().ok_or_else(gone)?;
        let (oci, full) = (self.oci(found)?, found.full_id()?);
        let now = oci.inspect(&full).await.map_err(|error| match error {
            Error::NoSuchContainer { .. } => gone(),
            other => named(other, id),
        })?;
        let cgroup = now.cgroup.clone().ok_or_else(gone)?;
        let obstacle = match found.obstacle() {
            Some(why) => Some(why),
            None => root_obstacle(found, &now)?,
        };
        let known = Known { found: found.clone(), full, oci, cgroup, obstacle };
        lock(&self.known).insert(id.clone(), known);
        Ok(Inspected { id: id.clone(), rootfs: found.writable(), ..now })
    }

    /// A live container; podman is asked only if it is not remembered.
    async fn live(&self, id: &ContainerId) -> Result<Known, Error> {
        if let Some(known) = self.remembered(id) {
            return Ok(known);
        }
        self.inspect(id).await?;
        self.remembered(id).ok_or_else(|| no_such(id))
    }

    fn remembered(&self, id: &ContainerId) -> Option<Known> {
        lock(&self.known).get(id).filter(|known| known.cgroup.is_populated().unwrap_or(false)).cloned()
    }

    fn forget(&self, id: &ContainerId) {
        lock(&self.known).remove(id);
    }

    /// The program that podman runs for that container.
    fn oci(&self, found: &Described) -> Result<Runc, Error> {
        let kind = found.oci_kind().unwrap_or(OciKind::Runc);
        Ok(Runc { kind, binary: Settings::read()?.oci_runtime(&found.oci_runtime), ..Runc::default() })
    }

    async fn check_left_behind(&self, id: &ContainerId, found: &Described) -> Result<(), Error> {
        left_behind::check_shm(id, found)?;
        if !found.has_writable_layer() {
            return Ok(());
        }
        let pid = found.pid().ok_or_else(|| no_such(id))?;
        let what = format!("see what container {id} wrote to its layer");
        let diff =
            self.call(&what, QUICK).args(["diff", "--format", "json", found.full_id()?.as_str()]).run_ok().await?;
        left_behind::check_layer(id, found, &diff, Path::new(&format!("/proc/{pid}/root")))
    }

    async fn do_restore(&self, id: &ContainerId, spec: RestoreSpec) -> Result<Inspected, Error> {
        let found = self.movable(id).await?;
        if found.pid().is_some() && self.look(id, &found).await.is_ok() {
            return Err(Error::Exists { id: id.to_string() });
        }
        let spec = spec.checked()?;
        let (oci, full) = (self.oci(&found)?, found.full_id()?);
        oci.check_build().await?;
        let desk = Desk::at(&spec.state_dir.join("bundle"));
        let started = self.start(id, &found, &oci, &spec, &desk).await;
        if started.is_err() {
            self.forget(id);
            if let Some(worker) = desk.worker() {
                kill_tree(worker);
            }
            // Before podman or the OCI runtime gets to delete anything: they would delete through the mount.
            let unmounted = leftovers::unmount_below(&oci.state_dir(&full));
            let ended = match unmounted {
                Ok(()) => self.end(id, &found).await,
                Err(error) => Err(error),
            };
            if let Err(error) = ended {
                tracing::warn!(container = %id, %error, "cannot end the container after a failed restore");
            }
            oci.undo_restore(&full, &spec, &spec.state_dir.join("bundle")).await;
        }
        started
    }

    /// In two steps, of which the first runs nothing of the container unless the stand-in was asked: what podman makes by
    /// itself waits for the second.
    async fn start(
        &self,
        id: &ContainerId,
        found: &Described,
        oci: &Runc,
        spec: &RestoreSpec,
        desk: &Desk,
    ) -> Result<Inspected, Error> {
        let (full, log) = (found.full_id()?, spec.work_dir.join("restore.log"));
        private_dir(&spec.work_dir)?;
        remove_old(&log)?;
        let order = Order {
            runtime: oci.binary.clone(),
            images: spec.image_dir.clone(),
            work: spec.work_dir.clone(),
            cgroup: spec.cgroup.path().to_owned(),
            tcp_established: spec.tcp_established,
        };
        desk.lay_out(&order, Settings::read()?, &found.oci_runtime, &oci.state_dir(&full))?;
        let strayed = |why: String| Error::Strayed { id: id.to_string(), why };
        let what = format!("{} container {id}", if order.images.is_some() { "restore" } else { "start" });
        let init = self.call(&what, spec.limit).also_environment("CONTAINERS_CONF", desk.settings());
        match init.args(["init", full.as_str()]).run_ok().await {
            Ok(_) if desk.is_made() => {}
            Ok(_) => {
                return Err(strayed(
                    "podman did not use the OCI runtime that it was told to; does a script around it set CONTAINERS_CONF or \
                     --runtime?"
                        .to_owned(),
                ));
            }
            // It ran for a moment, perhaps.
            Err(error) if desk.is_made() => return Err(strayed(error.to_string())),
            Err(Error::Failed { program, what, status, detail }) => {
                let told = log_errors(&log);
                let detail = if told.is_empty() { detail } else { told };
                return Err(Error::Failed { program, what, status, detail });
            }
            Err(error) => return Err(error),
        }
        let now = oci.inspect(&full).await.map_err(|error| strayed(error.to_string()))?;
        if now.cgroup.as_ref() != Some(&spec.cgroup) {
            let group = now.cgroup.as_ref().map_or("none", Cgroup::path);
            return Err(strayed(format!(
                "it is {} in the control group {group}, not in {}",
                now.status,
                spec.cgroup.path()
            )));
        }
        let start = self.call(&what, spec.limit).also_environment("CONTAINERS_CONF", desk.settings());
        start.args(["start", full.as_str()]).run_ok().await.map_err(|error| strayed(error.to_string()))?;
        // A client waits; so podman is not asked what is known.
        let known = Known { found: found.clone(), full, oci: oci.clone(), cgroup: spec.cgroup.clone(), obstacle: None };
        lock(&self.known).insert(id.clone(), known);
        Ok(Inspected { id: id.clone(), rootfs: found.writable(), ..now })
    }

    /// Ends its processes; podman's record of it stays, as a bundle would.
    async fn end(&self, id: &ContainerId, found: &Described) -> Result<(), Error> {
        let (oci, full) = (self.oci(found)?, found.full_id()?);
        oci.kill_and_delete(&full).await.map_err(|error| named(error, id))?;
        // The monitor tells podman by itself, and then goes; podman is told if it was gone before.
        let monitor = self.ask(id).await?.as_ref().and_then(Described::conmon);
        self.wait_monitor_gone(id, &full, monitor.or(found.conmon())).await?;
        match self.ask(id).await? {
            Some(left) if left.pid().is_some() => {
                let what = format!("end container {id}");
                self.call(&what, END_LIMIT).args(["stop", "--time", "0", full.as_str()]).run_ok().await.map(drop)
            }
            _ => Ok(()),
        }
    }

    async fn do_release(&self, id: &ContainerId) -> Result<(), Error> {
        let Some(found) = self.ask(id).await? else { return Ok(()) };
        let (oci, full) = (self.oci(&found)?, found.full_id()?);
        let cgroup = match oci.inspect(&full).await {
            Ok(now) => now.cgroup,
            Err(Error::NoSuchContainer { .. }) => None,
            Err(error) => return Err(named(error, id)),
        };
        leftovers::unmount_below(&oci.state_dir(&full))?;
        let what = format!("remove container {id}");
        let removed = self.call(&what, END_LIMIT).args(["rm", "--force", "--time", "0", full.as_str()]).run_ok().await;
        if let Err(error) = removed
            && self.ask(id).await?.is_some()
        {
            return Err(error);
        }
        self.forget(id);
        if let Some(cgroup) = cgroup {
            cgroup.destroy(GONE_LIMIT).await?;
        }
        self.wait_monitor_gone(id, &full, found.conmon()).await
    }

    /// The monitor calls podman once more when its container has ended, and goes when that is done.
    async fn wait_monitor_gone(&self, id: &ContainerId, full: &ContainerId, monitor: Option<u32>) -> Result<(), Error> {
        let Some(pid) = monitor else { return Ok(()) };
        let deadline = Instant::now() + END_LIMIT;
        while is_monitor(pid, full) {
            if Instant::now() >= deadline {
                return Err(Error::TimedOut {
                    program: "conmon".to_owned(),
                    what: format!("end container {id}"),
                    limit: END_LIMIT,
                    detail: format!("; see process {pid}"),
                });
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    fn call(&self, what: &str, limit: Duration) -> Call {
        Call::new(&self.binary, "podman", what, limit)
    }
}

/// What stands for a bundle: podman's own description of the container.
fn described(id: &ContainerId, found: &Described) -> Bundle {
    let source = PathBuf::from(format!("podman:{id}"));
    Bundle::described(&source, &found.writable(), found.netns().as_deref())
}

/// A root that should be a directory of a disk, and is an overlay over it: what is written there does not travel.
fn root_obstacle(found: &Described, now: &Inspected) -> Result<Option<String>, Error> {
    let (Some(root), Some(pid)) = (found.own_root(), now.pid) else { return Ok(None) };
    // The disk itself is not asked: it may be the one that nobody answers for.
    let file = format!("/proc/{pid}/mountinfo");
    let mounts = std::fs::read_to_string(&file).map_err(Error::io("read", file))?;
    Ok((root_type(&mounts) == Some("overlay")).then(|| {
        let root = root.display();
        format!("its root is not {root} itself, but a layer over it that stays on this host; create it without :O")
    }))
}

/// The file system's type of what is mounted at `/`.
fn root_type(mountinfo: &str) -> Option<&str> {
    let line = mountinfo.lines().rfind(|line| line.split(' ').nth(4) == Some("/"))?;
    line.split_once(" - ")?.1.split(' ').next()
}

/// Whether that process is the container's monitor: its number may be another's by now.
fn is_monitor(pid: u32, full: &ContainerId) -> bool {
    // That of a zombie is empty.
    std::fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|words| words.split(|&byte| byte == 0).any(|word| word == full.as_str().as_bytes()))
}

/// The OCI runtime knows the container by podman's id of it, the reader by its name.
fn named(error: Error, name: &ContainerId) -> Error {
    let id = name.to_string();
    match error {
        Error::NoSuchContainer { .. } => Error::NoSuchContainer { id },
        Error::RanOn { .. } => Error::RanOn { id },
        Error::WrongState { what, status, wanted, .. } => Error::WrongState { id, what, status, wanted },
        other => other,
    }
}

fn no_such(id: &ContainerId) -> Error {
    Error::NoSuchContainer { id: id.to_string() }
}

fn lock(known: &Mutex<BTreeMap<ContainerId, Known>>) -> MutexGuard<'_, BTreeMap<ContainerId, Known>> {
    known.lock().unwrap_or_else(PoisonError::into_inner)
}
