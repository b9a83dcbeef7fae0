//! `guard`: the process that freezes a container when its lease ends. The node starts it; it asks no node.

use std::path::PathBuf;

use crate::container::Cgroup;
use crate::error::{Failure, chain};
use crate::guard;

#[derive(Debug, clap::Args)]
pub(super) struct GuardArguments {
    /// The file that says until when the container may run.
    #[arg(long, value_name = "FILE")]
    lease: PathBuf,
    /// The container's group, as a path below the cgroup file system.
    #[arg(long, value_name = "GROUP")]
    cgroup: String,
}

/// Runs in this thread, without a runtime: the guard's memory is locked, and nothing may hold it up.
pub(super) fn run(arguments: &GuardArguments) -> Result<(), Failure> {
    let cgroup = Cgroup::at(&arguments.cgroup).map_err(Failure::usage)?;
    guard::run(&arguments.lease, &cgroup).map_err(|error| match error {
        guard::Error::Busy { .. } => Failure::refused(error),
        _ => Failure::failed(chain(&error)),
    })
}
