//! runc, together with criu, as a [`Runtime`]; and crun, where it was built with criu.
//!
//! Measured with runc 1.1.5 and criu 3.17.1: during a dump the control group is thawed and only ptrace holds the tasks,
//! so runc's answer alone does not prove that the container did not run; a restore may hang for good on images that are
//! cut off, so it has a time limit and everything below runc is ended with it; and a restored container keeps runc's
//! stdin, stdout and stderr, so these are `/dev/null` and runc's messages go to a log file.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use futures::future::BoxFuture;
use serde::Deserialize;
use tokio::time::Instant;

use super::{
    Cgroup, CheckpointOptions, ContainerId, ContainerStatus, Error, Inspected, POLL, RestoreSpec, Runtime, absolute,
    bundle::Bundle,
    command::{Call, Said, log_errors, runc_log_errors},
    leftovers,
    netdrop::lift_criu_lock,
    private_dir, probe, rounds,
    state::{FREEZE_LIMIT, GONE_LIMIT, own_netns, remove_old, wait_frozen, with_log, wrong_state},
};

/// For questions and for what the kernel does at once.
const QUICK: Duration = Duration::from_secs(20);
/// How long a dump may take: it writes all of the container's memory.
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(600);

/// runc on this host, or crun, which takes the same arguments.
#[derive(Clone, Debug)]
pub struct Runc {
    /// Which of them it is.
    pub kind: OciKind,
    /// The program; a bare name is looked up in PATH.
    pub binary: PathBuf,
    /// runc's state directory (`--root`), if not its default.
    pub root: Option<PathBuf>,
    /// The criu program (`--criu`), if not the one in PATH.
    pub criu: Option<PathBuf>,
}

impl Default for Runc {
    fn default() -> Self {
        Self { kind: OciKind::Runc, binary: "runc".into(), root: None, criu: None }
    }
}

/// The programs that take runc's arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OciKind {
    /// runc itself; it starts the criu program.
    Runc,
    /// crun. It has criu built in, or not: most builds, Debian's among them, are without.
    Crun,
}

impl OciKind {
    /// The program's name, which is its Debian package's as well.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Crun => "crun",
        }
    }

    /// Where it keeps its state when it is run by root and not told otherwise.
    fn default_root(self) -> &'static Path {
        Path::new(match self {
            Self::Runc => "/run/runc",
            Self::Crun => "/run/crun",
        })
    }
}

/// What `runc state` prints.
#[derive(Deserialize)]
struct State {
    pid: u32,
    status: ContainerStatus,
    bundle: PathBuf,
    rootfs: PathBuf,
}

impl Runtime for Runc {
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
        Box::pin(async move { self.live_cgroup(id, "look at").await?.is_frozen() })
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

    fn can_pre_dump(&self) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(probe::page_tracking(self.criu()))
    }

    fn pre_dump<'a>(
        &'a self,
        id: &'a ContainerId,
        image_dir: PathBuf,
        work_dir: PathBuf,
        options: CheckpointOptions,
    ) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(self.do_pre_dump(id, image_dir, work_dir, options))
    }

    fn restore<'a>(&'a self, id: &'a ContainerId, spec: RestoreSpec) -> BoxFuture<'a, Result<Inspected, Error>> {
        Box::pin(self.do_restore(id, spec))
    }

    fn kill_and_delete<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(self.do_kill_and_delete(id))
    }

    fn probe<'a>(&'a self, scratch: PathBuf) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(async move {
            self.check_build().await?;
            probe::criu(self.criu(), &scratch).await
        })
    }
}

impl Runc {
    fn criu(&self) -> &Path {
        self.criu.as_deref().unwrap_or(Path::new("criu"))
    }

    /// Whether the program is there, and was built so that it can checkpoint.
    pub async fn check_build(&self) -> Result<(), Error> {
        let said = self.call("ask for its version", QUICK).arg("--version").run_ok().await?;
        if self.kind == OciKind::Runc || said.split_whitespace().any(|word| word == "+CRIU") {
            return Ok(());
        }
        let version = said.lines().next().unwrap_or_default().trim().to_owned();
        Err(Error::NoCheckpoint { program: self.binary.display().to_string(), version })
    }

    async fn do_inspect(&self, id: &ContainerId) -> Result<Inspected, Error> {
        let what = format!("look at container {id}");
        let said = self.call(&what, QUICK).arg("state").arg(id.as_str()).run().await?;
        if !said.success {
            return Err(self.refused(id, what, &said));
        }
        let state: State = serde_json::from_str(&said.stdout).map_err(|e| Error::BadAnswer {
            program: self.binary.display().to_string(),
            what,
            why: e.to_string(),
        })?;
        let live = state.pid != 0 && state.status != ContainerStatus::Stopped;
        let looked = live.then_some(state.pid).map(|pid| {
            Ok::<_, Error>((
                pid,
                Cgroup::of_process(pid)?,
                own_netns(pid, Bundle::read(&state.bundle).ok().and_then(|b| b.netns()))?,
            ))
        });
        let (pid, cgroup, netns) = match looked.transpose() {
            Ok(Some((pid, cgroup, netns))) => (Some(pid), Some(cgroup), netns),
            Ok(None) => (None, None, None),
            // It has ended since runc looked.
            Err(_) if !PathBuf::from(format!("/proc/{}", state.pid)).exists() => (None, None, None),
            Err(error) => return Err(error),
        };
        Ok(Inspected {
            id: id.clone(),
            pid,
            status: if pid.is_some() { state.status } else { ContainerStatus::Stopped },
            cgroup,
            netns,
            bundle: state.bundle,
            rootfs: state.rootfs,
        })
    }

    async fn do_freeze(&self, id: &ContainerId) -> Result<(), Error> {
        let now = self.do_inspect(id).await?;
        let cgroup = now.cgroup.ok_or_else(|| wrong_state(id, "freeze", now.status))?;
        match now.status {
            ContainerStatus::Running => {
                let what = format!("freeze container {id}");
                let paused = self.call(&what, FREEZE_LIMIT).arg("pause").arg(id.as_str()).run_ok().await;
                if let Err(error) = paused {
                    // A freeze that is half done would take effect later, unasked.
                    if let Err(thaw) = self.do_thaw(id).await {
                        tracing::warn!(container = %id, %thaw, "cannot thaw the container after a failed freeze");
                    }
                    return Err(error);
                }
            }
            ContainerStatus::Paused => {}
            other => return Err(wrong_state(id, "freeze", other)),
        }
        wait_frozen(id, &cgroup, true).await
    }

    async fn do_thaw(&self, id: &ContainerId) -> Result<(), Error> {
        let now = self.do_inspect(id).await?;
        let lift = async {
            match &now.netns {
                Some(netns) => lift_criu_lock(netns).await,
                None => Ok(()),
            }
        };
        let resume = async {
            match now.status {
                ContainerStatus::Running => Ok(()),
                ContainerStatus::Paused => {
                    let what = format!("thaw container {id}");
                    self.call(&what, QUICK).arg("resume").arg(id.as_str()).run_ok().await.map(drop)
                }
                other => Err(wrong_state(id, "thaw", other)),
            }
        };
        // At once: a rollback waits for both.
        let (lifted, resumed) = tokio::join!(lift, resume);
        resumed?;
        let cgroup = now.cgroup.ok_or_else(|| wrong_state(id, "thaw", now.status))?;
        wait_frozen(id, &cgroup, false).await?;
        lifted
    }

    async fn live_cgroup(&self, id: &ContainerId, what: &'static str) -> Result<Cgroup, Error> {
        let now = self.do_inspect(id).await?;
        now.cgroup.ok_or_else(|| wrong_state(id, what, now.status))
    }

    async fn do_checkpoint(
        &self,
        id: &ContainerId,
        image_dir: PathBuf,
        work_dir: PathBuf,
        options: CheckpointOptions,
    ) -> Result<(), Error> {
        let (image_dir, work_dir) = (absolute(&image_dir)?, absolute(&work_dir)?);
        let now = self.do_inspect(id).await?;
        let cgroup = match now.cgroup {
            Some(cgroup) if now.status == ContainerStatus::Paused && cgroup.is_frozen()? => cgroup,
            _ => return Err(wrong_state(id, "checkpoint", now.status)),
        };
        private_dir(&image_dir)?;
        let parent = rounds::parent_of_dump(options.rounds);
        self.dump(id, "--leave-running", &image_dir, &work_dir, parent, options).await?;
        // runc was content, but if criu was killed at the very end the group may have been left thawed.
        if cgroup.is_frozen()? { Ok(()) } else { Err(Error::RanOn { id: id.to_string() }) }
    }

    async fn do_pre_dump(
        &self,
        id: &ContainerId,
        image_dir: PathBuf,
        work_dir: PathBuf,
        options: CheckpointOptions,
    ) -> Result<(), Error> {
        let (image_dir, work_dir) = (absolute(&image_dir)?, absolute(&work_dir)?);
        let now = self.do_inspect(id).await?;
        if now.status != ContainerStatus::Running {
            return Err(wrong_state(id, "pre-dump", now.status));
        }
        let round = options.rounds + 1;
        let directory = image_dir.join(rounds::directory(round));
        private_dir(&image_dir)?;
        private_dir(&directory)?;
        self.dump(id, "--pre-dump", &directory, &work_dir, rounds::parent_of_round(round), options).await
    }

    /// One run of criu; `how` says what becomes of the container, `parent` where the images before are, from these.
    async fn dump(
        &self,
        id: &ContainerId,
        how: &str,
        images: &Path,
        work_dir: &Path,
        parent: Option<String>,
        options: CheckpointOptions,
    ) -> Result<(), Error> {
        private_dir(work_dir)?;
        let log = work_dir.join("dump.log");
        remove_old(&log)?;
        let what = if how == "--pre-dump" { "pre-dump" } else { "checkpoint" };
        let mut call = self.call(&format!("{what} container {id}"), CHECKPOINT_LIMIT);
        call = call.args(["checkpoint", how, "--image-path"]).arg(images).arg("--work-path").arg(work_dir);
        if let Some(parent) = parent {
            call = call.arg("--parent-path").arg(parent);
        }
        if options.tcp_established {
            call = call.arg("--tcp-established");
        }
        call.arg(id.as_str()).run_ok().await.map(drop).map_err(|error| with_log(error, &log))
    }

    async fn do_restore(&self, id: &ContainerId, spec: RestoreSpec) -> Result<Inspected, Error> {
        match self.do_inspect(id).await {
            Err(Error::NoSuchContainer { .. }) => {}
            Ok(_) => return Err(Error::Exists { id: id.to_string() }),
            Err(other) => return Err(other),
        }
        let spec = spec.checked()?;
        private_dir(&spec.work_dir)?;
        let derived = spec.state_dir.join("bundle");
        spec.bundle.derive(&derived, &spec.cgroup, spec.tcp_established)?;
        let started = match self.start_restored(id, &spec, &derived).await {
            Ok(()) => match self.do_inspect(id).await {
                Ok(now) if now.cgroup.as_ref() == Some(&spec.cgroup) => return Ok(now),
                Ok(now) => Err(format!(
                    "it is {} in the control group {}, not in {}",
                    now.status,
                    now.cgroup.as_ref().map_or("none", Cgroup::path),
                    spec.cgroup.path()
                )),
                Err(error) => Err(error.to_string()),
            }
            .map_err(|why| Error::Strayed { id: id.to_string(), why }),
            Err(error) => Err(error),
        };
        self.undo_restore(id, &spec, &derived).await;
        started
    }

    async fn start_restored(&self, id: &ContainerId, spec: &RestoreSpec, derived: &Path) -> Result<(), Error> {
        let (log, runc_log) = (spec.work_dir.join("restore.log"), spec.work_dir.join("runc.log"));
        remove_old(&log)?;
        remove_old(&runc_log)?;
        let what = format!("{} container {id}", if spec.image_dir.is_some() { "restore" } else { "start" });
        let mut call = self.call_logged(&what, spec.limit, &runc_log);
        match &spec.image_dir {
            None => call = call.args(["run", "--detach", "--bundle"]).arg(derived),
            Some(images) => {
                call = call.args(["restore", "--detach", "--bundle"]).arg(derived);
                call = call.arg("--image-path").arg(images).arg("--work-path").arg(&spec.work_dir);
                if spec.tcp_established {
                    call = call.arg("--tcp-established");
                }
            }
        }
        let program = call.program();
        let said = call.arg(id.as_str()).silent().run().await.map_err(|error| with_log(error, &log))?;
        if said.success {
            return Ok(());
        }
        let told: Vec<String> =
            [log_errors(&log), runc_log_errors(&runc_log)].into_iter().filter(|t| !t.is_empty()).collect();
        let detail = if told.is_empty() { format!("see {}", log.display()) } else { told.join("; ") };
        Err(Error::Failed { program, what, status: said.status, detail })
    }

    /// Removes all that a failed restore may have left. What cannot be removed is told, and does not hide the failure.
    pub(super) async fn undo_restore(&self, id: &ContainerId, spec: &RestoreSpec, derived: &Path) {
        let told = |what: &str, error: &dyn std::fmt::Display| {
            tracing::warn!(container = %id, %error, "cannot {what} after a failed restore");
        };
        if let Err(error) = self.do_kill_and_delete(id).await {
            told("delete the container", &error);
        }
        if let Err(error) = spec.cgroup.destroy(GONE_LIMIT).await {
            told("remove the control group", &error);
        }
        for dir in [&spec.work_dir, &spec.state_dir].into_iter().chain(&spec.image_dir) {
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
        if let Err(error) = leftovers::remove_flat(derived) {
            told("remove the derived bundle", &error);
        }
    }

    async fn do_kill_and_delete(&self, id: &ContainerId) -> Result<(), Error> {
        let state_dir = self.state_dir(id);
        // Before runc gets to delete anything: it would delete through the mount.
        leftovers::unmount_below(&state_dir)?;
        let now = match self.do_inspect(id).await {
            Err(Error::NoSuchContainer { .. }) => return leftovers::forget_half_made(&state_dir),
            other => other?,
        };
        if now.pid.is_some() {
            // A task in the freezer dies of SIGKILL as it is; thawing it would let the others run on for a moment.
            let what = format!("kill container {id}");
            let killed = self.call(&what, QUICK).args(["kill", "--all", id.as_str(), "KILL"]).run_ok().await;
            if let Err(error) = killed {
                tracing::debug!(container = %id, %error, "kill was refused; delete ends it");
            }
        }
        let deadline = Instant::now() + GONE_LIMIT;
        loop {
            let what = format!("delete container {id}");
            let deleted = self.call(&what, QUICK).args(["delete", "--force", id.as_str()]).run_ok().await;
            match self.do_inspect(id).await {
                Err(Error::NoSuchContainer { .. }) => break,
                _ if Instant::now() < deadline => tokio::time::sleep(POLL).await,
                Err(error) => return Err(error),
                Ok(left) => return Err(deleted.err().unwrap_or_else(|| wrong_state(id, "delete", left.status))),
            }
        }
        match now.cgroup {
            Some(cgroup) => cgroup.destroy(GONE_LIMIT).await,
            None => Ok(()),
        }
    }

    /// runc's own directory of a container.
    pub(super) fn state_dir(&self, id: &ContainerId) -> PathBuf {
        self.root.as_deref().unwrap_or(self.kind.default_root()).join(id.as_str())
    }

    /// A call of runc with its global options.
    fn call(&self, what: &str, limit: Duration) -> Call {
        let mut call = Call::new(&self.binary, self.kind.name(), what, limit);
        if let Some(root) = &self.root {
            call = call.arg("--root").arg(root);
        }
        if let Some(criu) = &self.criu {
            call = call.arg("--criu").arg(criu);
        }
        call
    }

    fn call_logged(&self, what: &str, limit: Duration, log: &Path) -> Call {
        self.call(what, limit).args(["--log-format", "json", "--log"]).arg(log)
    }

    fn refused(&self, id: &ContainerId, what: String, said: &Said) -> Error {
        let unknown = match self.kind {
            OciKind::Runc => said.stderr.contains("does not exist"),
            // Its file of a container's state is what it misses.
            OciKind::Crun => said.stderr.contains("No such file or directory") && !self.state_dir(id).exists(),
        };
        if unknown {
            return Error::NoSuchContainer { id: id.to_string() };
        }
        let program = self.binary.display().to_string();
        Error::Failed { program, what, status: said.status.clone(), detail: said.why() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_build_that_cannot_checkpoint_is_refused_before_anything_is_frozen() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let crun = Runc { kind: OciKind::Crun, binary: dir.path().join("crun"), ..Runc::default() };
        let says = |features: &str| {
            std::fs::write(&crun.binary, format!("#!/bin/sh\necho crun version 1.8.1\necho '{features}'\n")).unwrap();
            std::fs::set_permissions(&crun.binary, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        says("+SYSTEMD +CAP +YAJL");
        let text = crun.probe(dir.path().join("scratch")).await.unwrap_err().to_string();
        assert!(text.contains("crun version 1.8.1") && text.contains("was built without criu"), "{text}");
        assert!(!dir.path().join("scratch").exists());
        says("+SYSTEMD +CRIU +YAJL");
        crun.check_build().await.unwrap();
        let runc = Runc { kind: OciKind::Runc, ..crun.clone() };
        says("");
        runc.check_build().await.unwrap();
    }

    #[tokio::test]
    async fn a_kernel_that_tracks_no_pages_is_named_with_what_to_do() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let criu = dir.path().join("criu");
        let runc = Runc { criu: Some(criu.clone()), ..Runc::default() };
        let answers = |status: u8| {
            let asked = "[ \"$*\" = 'check --feature mem_dirty_track' ] || exit 9";
            std::fs::write(&criu, format!("#!/bin/sh\n{asked}\necho it says so\nexit {status}\n")).unwrap();
            std::fs::set_permissions(&criu, std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        answers(1);
        let text = runc.can_pre_dump().await.unwrap_err().to_string();
        assert!(text.contains("it says so") && text.contains("without --memory precopy"), "{text}");
        answers(0);
        runc.can_pre_dump().await.unwrap();
    }

    #[tokio::test]
    async fn a_missing_runc_is_named_with_its_package() {
        let runc = Runc { binary: "/nonexistent/runc".into(), ..Runc::default() };
        let error = runc.inspect(&ContainerId::new("web").unwrap()).await.unwrap_err();
        assert!(error.to_string().ends_with("install package runc"), "{error}");
    }
}
