//! A thread with a runtime of its own, for the work of one disk: what waits there for a disk or wants the processor for long holds
//! up neither another disk nor the messages between nodes, which have the node's runtime.

use std::future::{Future, pending};
use std::io;
use std::panic::resume_unwind;
use std::thread;

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::AbortOnDropHandle;

/// Ends when it is dropped; what still runs there is dropped too.
#[derive(Debug)]
pub struct OwnThread {
    handle: Handle,
    _end: DropGuard,
}

impl OwnThread {
    /// Starts the thread; `begin` is the first thing it does, `park` what it does each time before it sleeps.
    ///
    /// # Errors
    /// There are no more threads or descriptors.
    pub fn start(
        name: String,
        begin: impl FnOnce() + Send + 'static,
        park: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<OwnThread> {
        let runtime = Builder::new_current_thread().enable_all().on_thread_park(park).build()?;
        let handle = runtime.handle().clone();
        let end = CancellationToken::new();
        let ended = end.clone();
        thread::Builder::new().name(name).spawn(move || {
            begin();
            runtime.block_on(ended.cancelled());
            // Blocking file work that nobody waits for must not keep the thread.
            runtime.shutdown_background();
        })?;
        Ok(OwnThread { handle, _end: end.drop_guard() })
    }

    /// To run tasks there.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

/// Has something done on a runtime, with the sockets that it opens. Never ends when the runtime does so before.
pub async fn run_on<T: Send + 'static>(runtime: Handle, work: impl Future<Output = T> + Send + 'static) -> T {
    match AbortOnDropHandle::new(runtime.spawn(work)).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => resume_unwind(panic),
            Err(_) => pending().await,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(name: &str) -> OwnThread {
        OwnThread::start(name.into(), || {}, || {}).unwrap()
    }

    #[tokio::test]
    async fn it_is_one_thread_with_its_name() {
        let own = start("disk web");
        let here = thread::current().id();
        let there = || async { (thread::current().id(), thread::current().name().map(str::to_owned)) };
        let (first, name) = run_on(own.handle().clone(), there()).await;
        let (second, _) = run_on(own.handle().clone(), there()).await;
        assert_ne!(first, here);
        assert_eq!(first, second);
        assert_eq!(name.as_deref(), Some("disk web"));
    }

    #[tokio::test]
    async fn it_takes_its_tasks_along() {
        let own = start("web");
        let (kept, gone) = tokio::sync::oneshot::channel::<()>();
        own.handle().spawn(async move {
            let _kept = kept;
            pending::<()>().await;
        });
        drop(own);
        assert!(gone.await.is_err(), "the task was dropped");
    }
}
