//! The guard of one container, as the node keeps it: started before the container is, told every deadline, looked after
//! at every beat.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::{failed, lock};
use crate::container::Cgroup;
use crate::error::{Failure, Outcome};
use crate::guard::{self, GuardLease, Guarding};
use crate::units::BootTime;

pub(super) struct Guarded {
    /// On a file system that no disk can hold up.
    lease: PathBuf,
    log: PathBuf,
    state: Mutex<State>,
}

struct State {
    lease: Option<Arc<GuardLease>>,
    deadline: Option<BootTime>,
    /// How often the guard had frozen the container when that was last looked at.
    fired: u64,
}

impl Guarded {
    /// Nothing is started yet; everything must stand still until a deadline is set.
    pub(super) fn new(lease: PathBuf, log: PathBuf) -> Self {
        let state = State { lease: None, deadline: Some(BootTime::default()), fired: 0 };
        Self { lease, log, state: Mutex::new(state) }
    }

    /// Sees to it that the group is guarded from now on; the guard of a node before this one is taken over. Without a lease
    /// there is nothing to guard.
    pub(super) async fn begin(&self, cgroup: &Cgroup) -> Outcome<()> {
        {
            let mut state = lock(&self.state);
            if state.deadline.is_none() {
                return Ok(());
            }
            if state.lease.is_none() {
                let lease = GuardLease::open(&self.lease).or_else(|_| GuardLease::create(&self.lease));
                let lease = lease.map_err(|error| failed(&error))?;
                lease.set_deadline(state.deadline);
                state.fired = lease.fired();
                state.lease = Some(Arc::new(lease));
            }
        }
        self.ensure(cgroup).await.map(drop)
    }

    /// Until when the container may run; `None`: no lease is needed any more, and no guard.
    pub(super) fn set_deadline(&self, deadline: Option<BootTime>) {
        let mut state = lock(&self.state);
        state.deadline = deadline;
        if let Some(lease) = &state.lease {
            lease.set_deadline(deadline);
        }
        if deadline.is_none() && state.lease.take().is_some() {
            self.remove();
        }
    }

    /// Whether the container must stand still at `now`.
    pub(super) fn is_over(&self, now: BootTime) -> bool {
        lock(&self.state).deadline.is_some_and(|deadline| deadline <= now)
    }

    /// Starts the guard again if it has gone. Whether it may have frozen the container since the last look: one that froze
    /// while the lease was being renewed does not know better.
    pub(super) async fn look(&self, cgroup: &Cgroup) -> Outcome<bool> {
        if lock(&self.state).lease.is_none() {
            return Ok(false);
        }
        let started = self.ensure(cgroup).await? == Guarding::Started;
        let mut state = lock(&self.state);
        let fired = state.lease.as_ref().map_or(state.fired, |lease| lease.fired());
        let froze = std::mem::replace(&mut state.fired, fired) != fired;
        Ok(started || froze)
    }

    /// The container has gone, and its guard follows.
    pub(super) fn end(&self) {
        self.set_deadline(None);
        lock(&self.state).deadline = Some(BootTime::default());
        self.remove();
    }

    async fn ensure(&self, cgroup: &Cgroup) -> Outcome<Guarding> {
        let (lease, cgroup, log) = (self.lease.clone(), cgroup.clone(), self.log.clone());
        tokio::task::spawn_blocking(move || guard::ensure(&lease, &cgroup, &log))
            .await
            .map_err(|error| Failure::failed(format!("cannot guard the container: {error}")))?
            .map_err(|error| failed(&error).context("nobody would stop the container if this node hung"))
    }

    fn remove(&self) {
        match std::fs::remove_file(&self.lease) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.lease.display(), %error, "cannot remove the guard's file");
            }
            _ => {}
        }
    }
}
