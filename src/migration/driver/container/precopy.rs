//! Rounds of pre-dumps on the source: the container runs meanwhile, and runs on whatever becomes of them.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Found, SourceHold, failed};
use crate::container::{Cgroup, CheckpointOptions};
use crate::error::{Failure, Outcome, chain};

/// What others have to know of a pre-dump: it may be stopped, and its images are removed only when it has ended.
#[derive(Debug, Default)]
pub(super) struct PreDumps {
    stop: CancellationToken,
    running: watch::Sender<bool>,
}

impl PreDumps {
    /// None is begun any more; returns when none is running.
    pub async fn end(&self) {
        self.stop.cancel();
        // The sender is ours, so it cannot be gone.
        let _ = self.running.subscribe().wait_for(|running| !running).await;
    }
}

impl SourceHold {
    /// Dumps what the container has written since so many rounds, while it runs.
    pub async fn pre_dump(&self, found: &Found, rounds: u32) -> Outcome<()> {
        let Found { runtime, id, cgroup, record } = found;
        // Told first: whoever ends them meanwhile either is seen here, or waits for this one.
        let mut running = Running::begin(cgroup, &self.pre_dumps.running);
        if self.pre_dumps.stop.is_cancelled() {
            return Err(cancelled());
        }
        if cgroup.is_frozen().map_err(|error| failed(&error))? {
            return Err(Failure::refused(format!(
                "container {id} is paused, so its memory does not change; migrate it without --memory precopy"
            )));
        }
        running.may_freeze = true;
        let options = CheckpointOptions { tcp_established: record.tcp_established, rounds };
        let dumped = tokio::select! {
            dumped = runtime.pre_dump(id, self.images().to_path_buf(), self.work(), options) => dumped,
            () = self.pre_dumps.stop.cancelled() => return Err(cancelled()),
        };
        dumped.map_err(|error| failed(&error))?;
        running.may_freeze = false;
        Ok(())
    }
}

fn cancelled() -> Failure {
    Failure::failed("it was cancelled while the container's memory was copied")
}

/// A pre-dump that is running. It stops all tasks for a moment; one that fails, is killed, or is given up with this node may
/// leave them so.
struct Running<'a> {
    cgroup: &'a Cgroup,
    told: &'a watch::Sender<bool>,
    may_freeze: bool,
}

impl<'a> Running<'a> {
    fn begin(cgroup: &'a Cgroup, told: &'a watch::Sender<bool>) -> Self {
        told.send_replace(true);
        Self { cgroup, told, may_freeze: false }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if self.may_freeze
            && let Err(error) = self.cgroup.set_frozen(false)
        {
            tracing::warn!(cgroup = self.cgroup.path(), error = chain(&error), "cannot thaw the container");
        }
        self.told.send_replace(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn images_wait_for_the_end_of_a_pre_dump_and_none_begins_after_that() {
        let dumps = PreDumps::default();
        dumps.end().await;
        assert!(dumps.stop.is_cancelled());
        let dumps = PreDumps::default();
        let cgroup = Cgroup::at("/lazy-migrate-test-that-is-not-there").unwrap();
        let running = Running::begin(&cgroup, &dumps.running);
        let mut end = std::pin::pin!(dumps.end());
        assert!(futures::poll!(&mut end).is_pending(), "it is running");
        assert!(dumps.stop.is_cancelled(), "it was told to stop");
        drop(running);
        assert!(futures::poll!(&mut end).is_ready());
    }
}
