//! What can go wrong with a container, said so that the person at the terminal knows what to do next.

use std::{io, path::PathBuf, time::Duration};

/// A container operation that failed. Each text names what was tried, on what, and why it failed; all are one line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The id would be unsafe or is refused by the runtimes.
    #[error(
        "container id {id:?} is not valid: it needs 1 to 255 characters of [A-Za-z0-9_.+-] and may not begin with '-' or '.'"
    )]
    BadId {
        /// What was given, cut to a printable length.
        id: String,
    },
    /// A program is not on this host.
    #[error("{program} is not on this host: install package {package}")]
    Missing {
        /// The program that was looked for.
        program: String,
        /// The Debian package that brings it.
        package: &'static str,
    },
    /// A program is there but could not be started.
    #[error("cannot start {program} to {what}: {source}")]
    Spawn {
        /// The program.
        program: String,
        /// What it was to do.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A program was ended because it took too long.
    #[error("cannot {what}: {program} gave no answer within {limit:?} and was ended{detail}")]
    TimedOut {
        /// The program.
        program: String,
        /// What it was to do.
        what: String,
        /// How long it was given.
        limit: Duration,
        /// What its log says, with a leading separator; may be empty.
        detail: String,
    },
    /// A program ran and said no.
    #[error("cannot {what}: {program} failed ({status}): {detail}")]
    Failed {
        /// The program.
        program: String,
        /// What it was to do.
        what: String,
        /// Its exit status.
        status: String,
        /// The lines of its output or log that tell why.
        detail: String,
    },
    /// A program ended, and something that it had started writes to where its own output went.
    #[error(
        "cannot {what}: {program} ended, but what it started keeps its output open: redirect that to /dev/null or a file, \
         and end what is left of it"
    )]
    KeptOpen {
        /// The program.
        program: String,
        /// What it was to do.
        what: String,
    },
    /// A runtime that cannot checkpoint, as it was built.
    #[error(
        "{program} ({version}) was built without criu and can move no container: its --version does not say +CRIU; use \
         runc, which runs the same bundles, or a build that does"
    )]
    NoCheckpoint {
        /// The program.
        program: String,
        /// What it says of itself.
        version: String,
    },
    /// A runtime that dumps a container's memory only while it is frozen.
    #[error("it cannot dump the memory of a container that runs; migrate without --memory precopy")]
    NoPreDump,
    /// Nobody tells which pages a container has written since a pre-dump.
    #[error(
        "this host's kernel does not tell which pages of memory were written (`criu check --feature mem_dirty_track` says: \
         {why}); migrate without --memory precopy"
    )]
    NoPageTracking {
        /// criu's words.
        why: String,
    },
    /// A program answered something that cannot be read.
    #[error("cannot {what}: the answer of {program} cannot be understood: {why}")]
    BadAnswer {
        /// The program.
        program: String,
        /// What was asked.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// There is no such container.
    #[error("container {id} does not exist on this host: its runtime knows none of that name")]
    NoSuchContainer {
        /// The id that was asked for.
        id: String,
    },
    /// The id is taken, so nothing may be restored under it (and nothing was touched).
    #[error("container {id} exists already: delete it, or choose another id")]
    Exists {
        /// The id.
        id: String,
    },
    /// The container is not in the state that the operation needs.
    #[error("cannot {what} container {id}: it is {status}, and should be {wanted}")]
    WrongState {
        /// The id.
        id: String,
        /// What was to be done.
        what: &'static str,
        /// Its state.
        status: String,
        /// The state that is needed.
        wanted: &'static str,
    },
    /// The dump was written, but the container may have run since: it must not be handed over.
    #[error(
        "the checkpoint of container {id} is not usable: its cgroup was not frozen when the dump had ended, so it may have run on"
    )]
    RanOn {
        /// The id.
        id: String,
    },
    /// A container was started, but is not what was asked for.
    #[error("container {id} was started, and ended again: {why}")]
    Strayed {
        /// The id.
        id: String,
        /// What is wrong with it.
        why: String,
    },
    /// A restore command of the operator's failed.
    #[error("container {id} was not restored, and what its command had started was ended: {why}")]
    HookRestore {
        /// The id.
        id: String,
        /// What the command said, or what is wrong with what it made.
        why: String,
    },
    /// The hooks file cannot be used.
    #[error("hooks file {file}: {why}")]
    Hooks {
        /// The file.
        file: PathBuf,
        /// What is wrong with it, and what to change.
        why: String,
    },
    /// A container of podman's cannot move as it was created.
    #[error("container {id} of podman: {why}")]
    Podman {
        /// The id.
        id: String,
        /// What is in the way, and what to change.
        why: String,
    },
    /// A container of this runtime needs a bundle, and the node knows of no place for them.
    #[error("this host takes no containers; start its node with --bundle-dir and --mount-dir")]
    NoBundleDir,
    /// The control groups of this host are not as needed.
    #[error("cannot use the control group of {what}: {why}")]
    Cgroup {
        /// Which container or path.
        what: String,
        /// What is wrong.
        why: String,
    },
    /// The bundle cannot be used.
    #[error("bundle {bundle}: {why}")]
    Bundle {
        /// The bundle's directory.
        bundle: PathBuf,
        /// What is wrong with it, and what to change.
        why: String,
    },
    /// A file operation failed.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A container shares the host's network, so its packets cannot be dropped apart from the host's.
    #[error("network namespace {netns} is the host's own: its packets cannot be dropped without cutting the host off")]
    HostNetwork {
        /// The path that was given.
        netns: PathBuf,
    },
    /// A mounted file system could not be frozen in time; it is thawed as soon as its disk answers.
    #[error(
        "cannot quiesce the file system at {mount}: its disk did not take all data within {limit:?}; it goes on unfrozen"
    )]
    QuiesceTimedOut {
        /// The mount point.
        mount: PathBuf,
        /// How long it was given.
        limit: Duration,
    },
}

impl Error {
    /// After a failed restore: whether tasks of the container may have run, and written to its disk, before they were ended.
    pub fn may_have_run(&self) -> bool {
        matches!(self, Error::TimedOut { .. } | Error::Strayed { .. } | Error::HookRestore { .. })
    }

    /// For `map_err` on a file operation.
    pub(crate) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::Io { what, path, source }
    }
}
