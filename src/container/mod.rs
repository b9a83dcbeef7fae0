//! The container side of a move: freeze it, dump its memory, stream the dump, restore it elsewhere, end what is left.
//!
//! Order on the source: [`NetDrop::install`], [`Runtime::freeze`], [`Runtime::checkpoint`] (while an [`ImageFollower`]
//! streams the growing images), [`quiesce::freeze`], handover. On the destination: an [`ImageReceiver`] takes the
//! frames, and after the handover [`Runtime::restore`] starts the container from them. Until release the source's
//! container stays paused, so that a rollback is [`quiesce::thaw`], [`Runtime::thaw`] and [`NetDrop::remove`].
//!
//! Nothing here decides when: the migration driver does. Every operation has a time limit, may be repeated, and leaves
//! nothing half-made when it fails.

mod announce;
pub mod bundle;
mod cgroup;
mod command;
mod error;
mod hook;
pub mod image_receiver;
pub mod image_stream;
pub mod images;
mod leftovers;
mod netdrop;
mod podman;
mod probe;
pub mod quiesce;
pub mod rounds;
mod runc;
mod state;

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};

pub use announce::announce;
pub use bundle::Bundle;
pub use cgroup::Cgroup;
pub use error::Error;
pub use hook::Hook;
pub use image_receiver::ImageReceiver;
pub use images::ImageFollower;
pub use netdrop::NetDrop;
pub use podman::Podman;
pub(crate) use podman::stand_in;
pub use runc::{OciKind, Runc};

/// How often a state that nothing announces is looked at again.
const POLL: Duration = Duration::from_millis(5);

/// A container's name in its runtime: 1 to 255 characters of `[A-Za-z0-9_.+-]`, not beginning with `-` or `.`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContainerId(String);

impl ContainerId {
    /// Checks the characters, so that the id is safe as an argument and as a part of a path.
    pub fn new(id: impl Into<String>) -> Result<Self, Error> {
        let id = id.into();
        let fits = (1..=255).contains(&id.len()) && !id.starts_with(['-', '.']);
        if fits && id.chars().all(|c| c.is_ascii_alphanumeric() || "_.+-".contains(c)) {
            return Ok(Self(id));
        }
        Err(Error::BadId { id: id.chars().take(64).collect() })
    }

    /// The id as the runtime wants it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ContainerId {
    type Err = Error;
    fn from_str(id: &str) -> Result<Self, Error> {
        Self::new(id)
    }
}

impl TryFrom<String> for ContainerId {
    type Error = Error;
    fn try_from(id: String) -> Result<Self, Error> {
        Self::new(id)
    }
}

impl From<ContainerId> for String {
    fn from(id: ContainerId) -> String {
        id.0
    }
}

/// The state that a runtime reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ContainerStatus {
    /// Made, but its program has not been started.
    Created,
    /// Its program runs.
    Running,
    /// Its tasks are in the freezer.
    Paused,
    /// Its program has ended.
    Stopped,
}

impl fmt::Display for ContainerStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// What is known of a container. It holds for the moment of asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspected {
    /// Its id.
    pub id: ContainerId,
    /// Its first process on the host; `None` when it has stopped.
    pub pid: Option<u32>,
    /// Its state.
    pub status: ContainerStatus,
    /// The directory of its `config.json`.
    pub bundle: PathBuf,
    /// Its root directory on the host.
    pub rootfs: PathBuf,
    /// Its control group; `None` when it has stopped.
    pub cgroup: Option<Cgroup>,
    /// A path to its network namespace, when it has one of its own: the one its bundle names where that is the same
    /// namespace (it outlives the container), `/proc/PID/ns/net` otherwise.
    pub netns: Option<PathBuf>,
}

/// How to dump.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckpointOptions {
    /// Dump established TCP connections too; without it a container that has some cannot be dumped.
    pub tcp_established: bool,
    /// How many rounds of [`Runtime::pre_dump`] lie in the image directory: what is dumped is what has changed since the last.
    pub rounds: u32,
}

/// What to restore, from what, and where the parts of it go.
#[derive(Clone, Debug)]
pub struct RestoreSpec {
    /// The bundle that the operator of this host made for it.
    pub bundle: Bundle,
    /// The complete image directory; without one the container is started anew, from its disk alone.
    pub image_dir: Option<PathBuf>,
    /// Where criu writes its log; made if it is missing.
    pub work_dir: PathBuf,
    /// Where the derived bundle goes; it must outlive the container, and is removed when the restore fails.
    pub state_dir: PathBuf,
    /// The control group that the container gets. It must not exist with tasks in it.
    pub cgroup: Cgroup,
    /// Restore established TCP connections: as it was in [`CheckpointOptions`].
    pub tcp_established: bool,
    /// How long the restore may take before it is undone.
    pub limit: Duration,
}

impl RestoreSpec {
    /// What every runtime does first: paths are made absolute; refused where something is in the control group.
    fn checked(self) -> Result<Self, Error> {
        if self.cgroup.is_populated()? {
            let why = "it is in use on this host, so nothing may be restored into it".to_owned();
            return Err(Error::Cgroup { what: self.cgroup.path().to_owned(), why });
        }
        Ok(Self {
            image_dir: self.image_dir.as_deref().map(absolute).transpose()?,
            work_dir: absolute(&self.work_dir)?,
            state_dir: absolute(&self.state_dir)?,
            ..self
        })
    }
}

/// A program that runs containers and can checkpoint them. All of it may be repeated after a crash of the caller.
pub trait Runtime: fmt::Debug + Send + Sync {
    /// What is known of a container.
    fn inspect<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<Inspected, Error>>;

    /// Stops all of its tasks in the freezer, and returns when they have stopped. A paused container stays so.
    /// When it fails, the container has been thawed again as far as that was possible.
    fn freeze<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<(), Error>>;

    /// Lets it run again. A running container stays so.
    fn thaw<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<(), Error>>;

    /// Whether the kernel says that every task of it is frozen.
    fn is_frozen<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<bool, Error>>;

    /// Dumps a frozen container into `image_dir` (made with mode 0700: it holds the container's memory) and leaves it
    /// frozen. `Ok` says that the dump is whole **and** that the container was frozen when it had ended. After an error
    /// the container may be frozen or running: the caller thaws it, and uses nothing of the images.
    fn checkpoint<'a>(
        &'a self,
        id: &'a ContainerId,
        image_dir: PathBuf,
        work_dir: PathBuf,
        options: CheckpointOptions,
    ) -> BoxFuture<'a, Result<(), Error>>;

    /// Whether it can do [`Runtime::pre_dump`] on this host. By default no runtime can; the error says so.
    fn can_pre_dump(&self) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async { Err(Error::NoPreDump) })
    }

    /// Dumps the memory of a container that runs on, as far as it has changed since round `options.rounds`, as the next round
    /// below `image_dir` ([`rounds`]). It is of use only together with a [`Runtime::checkpoint`] into the same directory. When
    /// it fails, the container runs on; when the future is dropped, it may be left frozen.
    fn pre_dump<'a>(
        &'a self,
        _id: &'a ContainerId,
        _image_dir: PathBuf,
        _work_dir: PathBuf,
        _options: CheckpointOptions,
    ) -> BoxFuture<'a, Result<(), Error>> {
        Box::pin(async { Err(Error::NoPreDump) })
    }

    /// Starts a container under a new id, from its images or anew. A failure leaves nothing: no container, no process, no
    /// mount, no control group.
    fn restore<'a>(&'a self, id: &'a ContainerId, spec: RestoreSpec) -> BoxFuture<'a, Result<Inspected, Error>>;

    /// Ends a container in any state and forgets it, but for what stands for its bundle; returns when it is gone. One that
    /// does not exist is gone.
    fn kill_and_delete<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<(), Error>>;

    /// Finds out, by a throwaway dump with its files below `scratch`, whether checkpoints work on this host. It also
    /// spares the first real dump the seconds that criu takes to learn the kernel's features.
    fn probe<'a>(&'a self, scratch: PathBuf) -> BoxFuture<'a, Result<(), Error>>;

    /// Ends a container that has moved away for good; returns when this host knows nothing of it any more.
    fn release<'a>(&'a self, id: &'a ContainerId) -> BoxFuture<'a, Result<(), Error>> {
        self.kill_and_delete(id)
    }

    /// What this host knows of a container before it is restored: by default the bundle in `dir`, the place for it.
    fn bundle<'a>(&'a self, _id: &'a ContainerId, dir: Option<PathBuf>) -> BoxFuture<'a, Result<Bundle, Error>> {
        Box::pin(async move { Bundle::read(&dir.ok_or(Error::NoBundleDir)?) })
    }
}

/// Makes a directory (and what is missing above it) that only root can look into.
pub(crate) fn private_dir(dir: &std::path::Path) -> Result<(), Error> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(Error::io("create", dir))?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).map_err(Error::io("set the mode of", dir))
}

/// The path from the root, without resolving links.
pub(crate) fn absolute(path: &std::path::Path) -> Result<PathBuf, Error> {
    std::path::absolute(path).map_err(Error::io("find", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_safe_as_arguments_and_in_paths() {
        for good in ["web", "a", "Web_1.2+x-y", &"x".repeat(255)] {
            assert_eq!(ContainerId::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "-f", ".", "..", ".x", "a/b", "a b", "ä", "a\n", &"x".repeat(256)] {
            assert!(ContainerId::new(bad).is_err(), "{bad:?} was taken");
        }
        let text = ContainerId::new("y".repeat(10_000)).unwrap_err().to_string();
        assert!(text.len() < 300 && !text.contains('\n'), "{text}");
    }

    #[test]
    fn statuses_are_named_as_the_runtimes_name_them() {
        let status: ContainerStatus = serde_json::from_str("\"paused\"").unwrap();
        assert_eq!((status, status.to_string().as_str()), (ContainerStatus::Paused, "paused"));
    }

    #[test]
    fn an_existing_directory_is_made_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("a/images");
        std::fs::create_dir_all(&images).unwrap();
        std::fs::set_permissions(&images, std::fs::Permissions::from_mode(0o755)).unwrap();
        private_dir(&images).unwrap();
        assert_eq!(std::fs::metadata(&images).unwrap().permissions().mode() & 0o777, 0o700);
    }
}
