//! The threads of a disk's pull, while it has one.
//!
//! The connections of a pull write to one file, whose lock one of two threads would wait for, spinning; so they share a
//! thread. Encrypted ones have each their own: to decrypt is most of their work. The lanes are where their connections
//! are, for they send by turns.

use std::sync::{Mutex, PoisonError};

use tokio::runtime::Handle;

use crate::limits::BACKGROUND_CONNECTIONS;
use crate::thread::OwnThread;

/// Started when they are needed.
pub(crate) struct PullThreads {
    /// The disk's.
    name: String,
    count: usize,
    started: Mutex<Vec<OwnThread>>,
}

impl PullThreads {
    pub(crate) fn new(name: String, encrypted: bool) -> PullThreads {
        let count = if encrypted { BACKGROUND_CONNECTIONS } else { 1 };
        PullThreads { name, count, started: Mutex::default() }
    }

    /// Where a background lane and its connection belong. Without a thread the pull goes on among the node's other work.
    pub(super) fn of_lane(&self, index: usize) -> Handle {
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        while started.len() < self.count {
            match OwnThread::start(format!("pull {}", self.name), || {}, || {}) {
                Ok(thread) => started.push(thread),
                Err(error) => {
                    tracing::warn!(
                        "cannot start a thread for the pull: {error}; it is slower without; raise the limit of threads (ulimit -u)"
                    );
                    break;
                }
            }
        }
        match started.len() {
            0 => Handle::current(),
            count => started[index % count].handle().clone(),
        }
    }

    /// They are not needed any more.
    pub(super) fn end(&self) {
        self.started.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn plain_connections_share_one_and_encrypted_ones_do_not() {
        let (plain, encrypted) = (PullThreads::new("web".into(), false), PullThreads::new("web".into(), true));
        let same = |threads: &PullThreads| threads.of_lane(0).id() == threads.of_lane(1).id();
        assert!(same(&plain) && !same(&encrypted));
        let here = Handle::current().id();
        assert!([&plain, &encrypted].iter().all(|threads| threads.of_lane(0).id() != here));
        plain.end();
        assert!(plain.started.lock().unwrap().is_empty());
    }
}
