//! The operator's own commands as a [`Runtime`]: for services that are in no container that this program knows.
//!
//! What stays ours is what a migration rests on. A service is what is in one control group, and the kernel is asked
//! whether that is frozen: no command's answer stands for it. The restore command runs in the group that is made for
//! what it restores, so that a guard can freeze all of it from its first moment, and a failure ends all of it.

mod config;
mod records;
#[cfg(test)]
mod tests;
mod tree;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use futures::future::BoxFuture;
use serde::Deserialize;
use tokio::time::Instant;

use self::{
    config::{Hooks, Template},
    records::{Records, Restored},
};
use super::{
    Bundle, Cgroup, CheckpointOptions, ContainerId, ContainerStatus, Error, Inspected, POLL, RestoreSpec, Runtime,
    absolute,
    command::Call,
    leftovers,
    netdrop::lift_criu_lock,
    private_dir,
    state::{GONE_LIMIT, own_netns, wait_frozen, wrong_state},
};

/// Where the records are when nothing else is said: empty after a boot.
const DEFAULT_ROOT: &str = "/run/lazy-migrate/hook";

/// What is told of a command that has gone since the file was read.
const PACKAGE: &str = "that brings it, or correct the hooks file";

/// Moves itself into a group and becomes the command that follows. The command's words are its arguments, never its text.
const ENTER: &str = r#"echo "$$" >"$0" && exec "$@""#;

/// The commands of one file.
#[derive(Clone, Debug)]
pub struct Hook {
    hooks: Hooks,
    records: Records,
}

/// What the inspect command prints.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Told {
    pid: Option<u32>,
    cgroup: Option<String>,
}

/// The names and values that a command gets in its environment.
type Environment = Vec<(&'static str, OsString)>;

impl Hook {
    /// Reads and checks `file`. What was restored is recorded in `root`, which must be this node's alone and empty after a
    /// boot; without one it is `/run/lazy-migrate/hook`.
    pub fn read(file: &Path, root: Option<PathBuf>) -> Result<Self, Error> {
        let records = Records::at(root.unwrap_or_else(|| DEFAULT_ROOT.into()));
        Ok(Self { hooks: Hooks::read(file)?, records })
    }
}

impl Runtime for Hook {
    fn inspect<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<Inspected, Error>> {
        Box::pin(self.do_inspect(id))
    }

    fn freeze<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(self.do_freeze(id))
    }

    fn thaw<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(self.do_thaw(id))
    }

    fn is_frozen<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<bool, Error>> {
        Box::pin(async move { self.live(id, "look at").await?.1.is_frozen() })
    }

    fn checkpoint<'a>(
        &'a self,
        id: &'a ContainerId,
        image_dir: PathBuf,
        work_dir: PathBuf,
        options: CheckpointOptions,
    ) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(self.do_checkpoint(id, image_dir, work_dir, options))
    }

    fn restore<'a>(&'a self, id: &'a ContainerId, spec: RestoreSpec) -> BoxFuture<'a, Result<Inspected, Error>> {
        Box::pin(self.do_restore(id, spec))
    }

    fn kill_and_delete<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(self.do_kill_and_delete(id))
    }

    fn probe<'a>(&'a self, scratch: PathBuf) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(self.do_probe(scratch))
    }

    /// The file says it all; no bundle is asked for.
    fn bundle<'a>(&'a self, id: &'a ContainerId, _: Option<PathBuf>) -> BoxFuture<'a, Result<Bundle, Error>> {
        Box::pin(async move { Ok(self.described(id)) })
    }
}

impl Hook {
    fn described(&self, id: &ContainerId) -> Bundle {
        let netns = self.hooks.netns.as_ref().map(|netns| PathBuf::from(netns.fill(id)));
        Bundle::described(&self.hooks.file, Path::new(&self.hooks.root.fill(id)), netns.as_deref())
    }

    async fn do_inspect(&self, id: &ContainerId) -> Result<Inspected, Error> {
        let gone = || Error::NoSuchContainer { id: id.to_string() };
        let (restored, cgroup, told) = match self.records.find(id)? {
            Some(Restored { cgroup, bundle }) => (Some(bundle), cgroup, None),
            None => {
                let (cgroup, pid) = self.ask(id).await?.ok_or_else(gone)?;
                (None, cgroup, pid)
            }
        };
        let tasks = cgroup.processes()?;
        if tasks.is_empty() && restored.is_none() {
            return Err(gone());
        }
        let own = Cgroup::of_process(std::process::id());
        if own.is_ok_and(|own| cgroup.holds(&own)) {
            let why = "this node itself is in it, and would be frozen with it; run one of them in another".to_owned();
            return Err(Error::Cgroup { what: format!("container {id}, {}", cgroup.path()), why });
        }
        let bundle = self.described(id);
        let mut found = Inspected {
            id: id.clone(),
            pid: None,
            status: ContainerStatus::Stopped,
            bundle: restored.unwrap_or_else(|| self.hooks.file.clone()),
            rootfs: bundle.rootfs().to_owned(),
            cgroup: None,
            netns: None,
        };
        if let Some(pid) = told.filter(|pid| !tasks.contains(pid)) {
            let why = format!("[inspect] names process {pid}, which is not in the control group {}", cgroup.path());
            return Err(Error::Hooks { file: self.hooks.file.clone(), why });
        }
        if let Some(pid) = told.or_else(|| tree::head(&tasks)).or_else(|| tasks.first().copied()) {
            found.pid = Some(pid);
            found.status = if cgroup.is_frozen()? { ContainerStatus::Paused } else { ContainerStatus::Running };
            found.netns = own_netns(pid, bundle.netns())?;
            found.cgroup = Some(cgroup);
        }
        Ok(found)
    }

    /// The control group of a service that was not restored here, and its first process where the command names one.
    async fn ask(&self, id: &ContainerId) -> Result<Option<(Cgroup, Option<u32>)>, Error> {
        let written = self.hooks.cgroup_of(id)?;
        let Some(inspect) = &self.hooks.inspect else { return Ok(written.map(|cgroup| (cgroup, None))) };
        let said = self.call(inspect, "inspect", id, Vec::new()).run_ok().await?;
        if said.trim().is_empty() {
            return Ok(None);
        }
        let program = inspect.program.display().to_string();
        let bad =
            |why: String| Error::BadAnswer { program: program.clone(), what: format!("inspect container {id}"), why };
        let told: Told = serde_json::from_str(&said).map_err(|e| bad(e.to_string()))?;
        let cgroup = match (&told.cgroup, written, told.pid) {
            (Some(path), _, _) => Cgroup::at(path)?,
            (None, Some(cgroup), _) => cgroup,
            (None, None, Some(pid)) => Cgroup::of_process(pid)?,
            (None, None, None) => return Err(bad("it names neither a cgroup nor a pid".to_owned())),
        };
        Ok(Some((cgroup, told.pid)))
    }

    async fn live(&self, id: &ContainerId, what: &'static str) -> Result<(Inspected, Cgroup), Error> {
        let found = self.do_inspect(id).await?;
        match found.cgroup.clone() {
            Some(cgroup) => Ok((found, cgroup)),
            None => Err(wrong_state(id, what, found.status)),
        }
    }

    async fn do_freeze(&self, id: &ContainerId) -> Result<(), Error> {
        let (found, cgroup) = self.live(id, "freeze").await?;
        if found.status == ContainerStatus::Paused {
            return Ok(());
        }
        let freeze = async {
            match &self.hooks.freeze {
                Some(hook) => self.call(hook, "freeze", id, environment(&found)?).run_ok().await.map(drop)?,
                None => cgroup.set_frozen(true)?,
            }
            wait_frozen(id, &cgroup, true).await
        };
        let Err(error) = freeze.await else { return Ok(()) };
        // A freeze that is half done would take effect later, unasked.
        if let Err(thaw) = self.do_thaw(id).await {
            tracing::warn!(container = %id, %thaw, "cannot thaw the container after a failed freeze");
        }
        Err(error)
    }

    async fn do_thaw(&self, id: &ContainerId) -> Result<(), Error> {
        let (found, cgroup) = self.live(id, "thaw").await?;
        let thawed = match &self.hooks.thaw {
            // Also one that runs: the command may have to undo more than the kernel knows of.
            Some(hook) => self.call(hook, "thaw", id, environment(&found)?).run_ok().await.map(drop),
            None => Ok(()),
        };
        // Whatever became of the command: the tasks go on.
        cgroup.set_frozen(false)?;
        let lifted = match &found.netns {
            Some(netns) => lift_criu_lock(netns).await,
            None => Ok(()),
        };
        wait_frozen(id, &cgroup, false).await?;
        thawed.and(lifted)
    }

    async fn do_checkpoint(
        &self,
        id: &ContainerId,
        image_dir: PathBuf,
        work_dir: PathBuf,
        options: CheckpointOptions,
    ) -> Result<(), Error> {
        let (image_dir, work_dir) = (absolute(&image_dir)?, absolute(&work_dir)?);
        let (found, cgroup) = self.live(id, "checkpoint").await?;
        if !cgroup.is_frozen()? {
            return Err(wrong_state(id, "checkpoint", found.status));
        }
        private_dir(&image_dir)?;
        private_dir(&work_dir)?;
        let mut variables = environment(&found)?;
        variables.extend(dump_variables(&image_dir, &work_dir, options.tcp_established));
        self.call(&self.hooks.checkpoint, "checkpoint", id, variables).run_ok().await?;
        // The command was content, but whether the tasks may have run since is the kernel's to say.
        if cgroup.is_frozen()? { Ok(()) } else { Err(Error::RanOn { id: id.to_string() }) }
    }

    async fn do_restore(&self, id: &ContainerId, spec: RestoreSpec) -> Result<Inspected, Error> {
        match self.do_inspect(id).await {
            Err(Error::NoSuchContainer { .. }) => {}
            Ok(_) => return Err(Error::Exists { id: id.to_string() }),
            Err(other) => return Err(other),
        }
        let spec = spec.checked()?;
        let started = self.start_restored(id, &spec).await;
        if started.is_err() {
            self.undo_restore(id, &spec).await;
        }
        started
    }

    async fn start_restored(&self, id: &ContainerId, spec: &RestoreSpec) -> Result<Inspected, Error> {
        let (hook, action) = match (&spec.image_dir, &self.hooks.start) {
            (Some(_), _) => (&self.hooks.restore, "restore"),
            (None, Some(start)) => (start, "start"),
            (None, None) => {
                let why = "no [start] says how a service is started from its disk alone".to_owned();
                return Err(Error::Hooks { file: self.hooks.file.clone(), why });
            }
        };
        private_dir(&spec.work_dir)?;
        let mut variables = vec![("LAZY_MIGRATE_ROOT", spec.bundle.rootfs().into())];
        variables.extend(group_variables(&spec.cgroup)?);
        variables.extend(spec.bundle.netns().map(|netns| ("LAZY_MIGRATE_NETNS", netns.into())));
        match &spec.image_dir {
            Some(images) => variables.extend(dump_variables(images, &spec.work_dir, spec.tcp_established)),
            None => variables.push(("LAZY_MIGRATE_WORK", spec.work_dir.clone().into())),
        }
        // First what says that there may be something of it.
        let restored = Restored { cgroup: spec.cgroup.clone(), bundle: token(spec) };
        private_dir(&restored.bundle)?;
        self.records.keep(id, &restored)?;
        spec.cgroup.make()?;
        variables.push(("LAZY_MIGRATE_CONTAINER", id.as_str().into()));
        variables.push(("LAZY_MIGRATE_ACTION", action.into()));
        let what = format!("{action} container {id}");
        let call = Call::new(Path::new("/bin/sh"), "dash", what, hook.limit.min(spec.limit))
            .args(["-c", ENTER])
            .arg(spec.cgroup.dir()?.join("cgroup.procs"))
            .arg(&hook.program)
            .args(hook.arguments.iter().map(|argument| argument.fill(id)))
            .only_environment(variables);
        let program = hook.program.display();
        let why = match call.run().await {
            Err(Error::TimedOut { what, limit, detail, .. }) => {
                return Err(Error::TimedOut { program: program.to_string(), what, limit, detail });
            }
            Err(Error::KeptOpen { what, .. }) => Error::KeptOpen { program: program.to_string(), what }.to_string(),
            Err(error) => error.to_string(),
            Ok(said) if !said.success => format!("{program} failed ({}): {}", said.status, said.why()),
            Ok(_) => match self.do_inspect(id).await? {
                found if found.pid.is_none() => format!("{program} ended well, and left nothing in its control group"),
                found if spec.bundle.netns().is_some_and(|netns| found.netns.as_ref() != Some(&netns)) => {
                    "it is not in the network namespace that the hooks file names".to_owned()
                }
                found => return Ok(found),
            },
        };
        Err(Error::HookRestore { id: id.to_string(), why })
    }

    /// Removes all that a failed restore may have left. What cannot be removed is told, and does not hide the failure.
    async fn undo_restore(&self, id: &ContainerId, spec: &RestoreSpec) {
        let told = |what: &str, error: &dyn std::fmt::Display| {
            tracing::warn!(container = %id, %error, "cannot {what} after a failed restore");
        };
        match spec.cgroup.destroy(GONE_LIMIT).await {
            Ok(()) => {
                if let Err(error) = self.records.forget(id) {
                    told("forget the container", &error);
                }
            }
            Err(error) => told("remove the control group", &error),
        }
        for dir in [&spec.work_dir].into_iter().chain(&spec.image_dir) {
            if let Err(error) = leftovers::remove_yards(dir) {
                told("unmount what criu left", &error);
            }
        }
        if let Err(error) = leftovers::remove_mount_roots(&spec.work_dir.join("restore.log")) {
            told("remove what criu left", &error);
        }
        if let Some(netns) = spec.bundle.netns()
            && let Err(error) = lift_criu_lock(&netns).await
        {
            told("free the network", &error);
        }
        if let Err(error) = leftovers::remove_flat(&token(spec)) {
            told("remove what stands for its bundle", &error);
        }
    }

    async fn do_kill_and_delete(&self, id: &ContainerId) -> Result<(), Error> {
        let restored = self.records.find(id)?.map(|restored| restored.cgroup);
        let cgroup = match &restored {
            Some(cgroup) => cgroup.clone(),
            None => match self.ask(id).await? {
                Some((cgroup, _)) => cgroup,
                None => return Ok(()),
            },
        };
        if cgroup.is_populated()? {
            if let Some(hook) = &self.hooks.kill
                && let Ok(found) = self.do_inspect(id).await
                && let Err(error) = self.call(hook, "kill", id, environment(&found)?).run_ok().await
            {
                tracing::warn!(container = %id, %error, "the kill command failed; its control group ends it");
            }
            // Frozen tasks die of it as they are; thawing them would let the others run on for a moment.
            cgroup.kill()?;
        }
        if restored.is_some() {
            cgroup.destroy(GONE_LIMIT).await?;
            return self.records.forget(id);
        }
        let deadline = Instant::now() + GONE_LIMIT;
        while cgroup.is_populated()? {
            if Instant::now() >= deadline {
                return Err(Error::TimedOut {
                    program: "the kernel".to_owned(),
                    what: format!("kill container {id}"),
                    limit: GONE_LIMIT,
                    detail: String::new(),
                });
            }
            tokio::time::sleep(POLL).await;
        }
        // The group is somebody else's, and what is started in it next must not be born frozen.
        if cgroup.dir()?.exists() { cgroup.set_frozen(false) } else { Ok(()) }
    }

    async fn do_probe(&self, scratch: PathBuf) -> Result<(), Error> {
        self.hooks.look()?;
        let Some(hook) = &self.hooks.probe else { return Ok(()) };
        let dir = absolute(&scratch)?.join(format!("hook-probe-{}", std::process::id()));
        private_dir(&dir)?;
        let variables = vec![("LAZY_MIGRATE_ACTION", "probe".into()), ("LAZY_MIGRATE_WORK", dir.clone().into())];
        let what = "try whether checkpoints work on this host";
        // No container is meant, so nothing stands for its id.
        let arguments = hook.arguments.iter().map(Template::without_id);
        let call = Call::new(&hook.program, PACKAGE, what, hook.limit).args(arguments).only_environment(variables);
        let probed = call.run_ok().await.map(drop);
        let removed = std::fs::remove_dir_all(&dir).map_err(Error::io("remove", &dir));
        probed.and(removed)
    }

    /// A call of a command of the file.
    fn call(&self, hook: &config::Hook, action: &'static str, id: &ContainerId, mut variables: Environment) -> Call {
        variables.push(("LAZY_MIGRATE_CONTAINER", id.as_str().into()));
        variables.push(("LAZY_MIGRATE_ACTION", action.into()));
        Call::new(&hook.program, PACKAGE, format!("{action} container {id}"), hook.limit)
            .args(hook.arguments.iter().map(|argument| argument.fill(id)))
            .only_environment(variables)
    }
}

/// The directory that stands for the bundle of what is restored: who asked for it knows it again by that.
fn token(spec: &RestoreSpec) -> PathBuf {
    spec.state_dir.join("bundle")
}

/// What a live container's command is told.
fn environment(found: &Inspected) -> Result<Environment, Error> {
    let mut variables: Environment = vec![("LAZY_MIGRATE_ROOT", found.rootfs.clone().into())];
    if let Some(cgroup) = &found.cgroup {
        variables.extend(group_variables(cgroup)?);
        // Only where one tree is all there is: who dumps a part of it would lose the rest.
        let head = tree::head(&cgroup.processes()?);
        variables.extend(head.map(|pid| ("LAZY_MIGRATE_PID", pid.to_string().into())));
    }
    variables.extend(found.netns.clone().map(|netns| ("LAZY_MIGRATE_NETNS", netns.into())));
    Ok(variables)
}

fn group_variables(cgroup: &Cgroup) -> Result<Environment, Error> {
    Ok(vec![("LAZY_MIGRATE_CGROUP", cgroup.path().into()), ("LAZY_MIGRATE_CGROUP_DIR", cgroup.dir()?.into())])
}

fn dump_variables(images: &Path, work: &Path, tcp_established: bool) -> Environment {
    let tcp = if tcp_established { "1" } else { "0" };
    vec![
        ("LAZY_MIGRATE_IMAGES", images.into()),
        ("LAZY_MIGRATE_WORK", work.into()),
        ("LAZY_MIGRATE_TCP_ESTABLISHED", tcp.into()),
    ]
}
