//! The guard: a small process that freezes a migrated container when the lease ends, whatever became of the node.
//!
//! On a migration's destination the container may run only while the lease holds. The node freezes it in time; but a
//! node may hang, be stopped or be dead, and then nobody would. So the node writes the point at which everything must
//! stand still into a page that it shares with the guard ([`GuardLease`]), moves that point with every renewal, and
//! sees to it that a guard is there ([`ensure`]). The guard ([`run`]) sleeps until that point and writes
//! `cgroup.freeze`. It never thaws: only the node knows whether that is right.
//!
//! ```text
//! node --deadline--> lease file --> guard --"1"--> cgroup.freeze
//!      <--fired, alive--
//! ```

mod lease_file;
mod process;
mod report;
mod spawn;
mod watch;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use lease_file::GuardLease;
pub use process::run;
pub use spawn::{Guarding, ensure, ensure_by};

/// What can go wrong with a guard or its lease file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The system refused something.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The file is something else, or was damaged.
    #[error("{} is not a lease file: {why}; remove it, and the node makes a new one", path.display())]
    NotALease {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The file was made before the machine was started again, so its times mean nothing.
    #[error("the lease file {} is of another boot of this host; remove it, and the node makes a new one", path.display())]
    OtherBoot {
        /// The file.
        path: PathBuf,
    },
    /// Which boot this is cannot be told.
    #[error(transparent)]
    Boot(#[from] crate::store::MapError),
    /// Another guard has the file.
    #[error("another guard already watches {}; one is enough", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// The container's group cannot be found.
    #[error(transparent)]
    Cgroup(#[from] crate::container::Error),
    /// A guard was started, and ended before it guarded.
    #[error("the guard ended at once ({status}); see {}", log.display())]
    Ended {
        /// How it ended.
        status: std::process::ExitStatus,
        /// Where it says why.
        log: PathBuf,
    },
    /// A guard was started, and does not guard yet.
    #[error("the guard was not ready within {within:?}; see {}", log.display())]
    NotReady {
        /// How long it was given.
        within: Duration,
        /// Where it says why.
        log: PathBuf,
    },
}

impl Error {
    fn io<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> Error {
        let path = path.to_owned();
        move |source| Error::Io { what, path, source: source.into() }
    }
}
