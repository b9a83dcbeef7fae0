//! `in-podman`: what podman runs in the place of its OCI runtime while a container is restored. It asks no node.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::container::stand_in;
use crate::error::Outcome;

#[derive(Debug, clap::Args)]
pub(super) struct InPodmanArguments {
    /// The directory with the order, which the node wrote.
    directory: PathBuf,
    /// What the OCI runtime was asked for.
    #[arg(last = true, required = true)]
    words: Vec<OsString>,
}

pub(super) fn run(arguments: &InPodmanArguments) -> Outcome<()> {
    stand_in::run(&arguments.directory, &arguments.words)
}
